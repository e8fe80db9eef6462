"""Rules over the metrics of a run: rows in, events out; nothing here knows of files or processes.

A rule looks once in a window of WINDOW updates, or of a whole rollout batch where that is longer,
at the mean of a metric: one mini-batch is no event, and who looks after every update sees a fall in
any run, by chance. An event is the update at which a rule begins to hold.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 8  # updates
RECENT = 256  # rows whose steps say how noisy a metric is
FAR = 4.0  # standard errors
FEW = 4  # windows
Limit = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


# Limits: (means (n,), one a window, their standard errors (n,), number) -> what each mean is
# compared with (n,), by those before it alone; NaN where nothing can be said yet.
def fixed(means, errors, number):
    return np.full(len(means), number)


def of_first(means, errors, number):
    return before(number * np.repeat(means[:1], len(means)), 1)


def over_first(means, errors, number):
    return before(np.repeat(means[:1], len(means)) + number, 1)


def under_first(means, errors, number):
    return over_first(means, errors, -number)


def of_lowest(means, errors, number):
    return number * before(np.fmin.accumulate(means), 1)


def of_earlier(means, errors, number):
    return number * before(means, FEW)


def of_median(means, errors, number):
    return number * np.median([before(means, k + 1) for k in range(FEW)], axis=0)


def thrice(means, errors, number):
    """Exponential growth: from window to window by the number, three times running. inf where the
    last two windows did not grow so."""
    one, two, three = (before(means, k) for k in (1, 2, 3))
    grew = (one > number * two) & (two > number * three)
    return np.where(np.isnan(three), np.nan, np.where(grew, number * one, np.inf))


def below_best(means, errors, number):
    """The best mean less a share of it, and at least FAR standard errors of a difference."""
    best = before(np.fmax.accumulate(means), 1)
    return best - np.maximum(number * np.abs(best), FAR * math.sqrt(2) * errors)


def before(values: np.ndarray, places: int) -> np.ndarray:
    """(n,) -> (n,): what stood so many places earlier, NaN at the start."""
    return np.concatenate([np.full(places, np.nan), values])[:len(values)]


@dataclass(frozen=True)
class Rule:
    """What it looks at, what it compares with, and where the default comes from."""
    name: str
    metric: str  # of metrics.jsonl; of a list, one value a layer, its smallest
    side: str  # of the limit on which it holds, "above" or "below"
    number: float
    limit: Limit
    words: str  # of the limit; {} is the number
    source: str
    floor: float = -math.inf  # it holds above this only
    flat: str = ""  # it holds only while this metric is not above what it was FEW windows ago
    windows: int = 1  # in a mean; 0 for what not every update has: a value is judged by itself

    @property
    def default(self) -> str:
        return f"{self.side} {self.words.format(f'{self.number:g}')}"


PAPER, R3_PAPER = "arXiv 2512.01374", "arXiv 2510.11370"
RULES = (
    Rule("reward_falls", "reward", "below", 0.05, below_best, "its best by {} of it and 4 s.e.",
         "a failure in tutorials/figures/outcomes.py is .95 of the best; s.e.: ours, noise alone "
         "reaches 4 in 1 of 100 runs of 160 updates, 1 of 6 of 1,000", windows=2),
    Rule("score_falls", "score", "below", 0.05, below_best, "its best by {} of it and 4 s.e.",
         "as reward_falls", windows=0),
    Rule("entropy_falls", "entropy", "below", 0.5, of_earlier, "{} x 4 windows ago, reward flat",
         f"{PAPER}, figure 1 without importance weight: .31 to .105; how fast is ours",
         flat="reward"),
    Rule("entropy_rises", "entropy", "above", 1.5, of_lowest, "{} x its lowest",
         f"{PAPER}: the run that fails at N = 8 rises to 1.6 x, stable ones to 1.5 x"),
    Rule("mismatch_kl_high", "mismatch_kl", "above", 0.02, fixed, "{}",
         f"{PAPER}: stable runs to .013, failing ones .015 to .05"),
    Rule("mismatch_kl_grows", "mismatch_kl", "above", 1.4, thrice, "{} x a window, 3 running",
         f"ours: doubles in 16 updates. Above .001: {R3_PAPER} has 8e-4 for one engine, twice",
         floor=1e-3),
    Rule("extreme_tokens_high", "extreme_token_fraction", "above", 0.1, fixed, "{}",
         f"{R3_PAPER}: F(2) of runs that collapse"),
    Rule("extreme_tokens_grow", "extreme_token_fraction", "above", 1.4, thrice,
         "{} x a window, 3 running", f"as mismatch_kl_grows; {R3_PAPER}: F(2) < 1e-4 with R3",
         floor=1e-3),
    Rule("staleness_kl_high", "staleness_kl", "above", 0.1, fixed, "{}",
         "tutorials/results: replayed runs stay below .06"),
    Rule("weights_truncated", "weight_truncated_fraction", "above", 0.01, fixed, "{}", "ours"),
    Rule("agreement_falls", "routing_agreement", "below", 0.1, under_first, "its first less {}",
         f"ours, in the worst layer; {R3_PAPER}: two engines agree in .9"),
    Rule("truncation_rises", "truncation_rate", "above", 0.1, over_first, "its first plus {}",
         "ours"),
    Rule("gradient_grows", "grad_norm", "above", 5, of_median, "{} x its median of 4 windows",
         "Liu and Li 2025, When Speed Kills Stability: norms explode; the factor is ours"),
    Rule("groups_equal", "equal_groups", "above", 0.8, fixed, "{}",
         "ours; such groups have no advantage: arXiv 2503.14476 samples them again"),
    Rule("sync_differs", "sync_difference", "above", 2, of_first, "{} x its first",
         "scaled/sync.py stops a run at 3 x its first", floor=1e-5, windows=0),
)
NAMES = tuple(rule.name for rule in RULES)


@dataclass(frozen=True)
class Event:
    update: int  # at whose end the rule holds, and did not a window before
    since: int  # the first update in the mean
    rule: str
    metric: str
    value: float
    limit: float

    def __str__(self):
        rule = RULES[NAMES.index(self.rule)]
        if math.isnan(self.value):
            return f"update {self.update}: {self.rule}: {self.metric} is not a number"
        return (f"update {self.update}: {self.rule}: {self.value:.3g} is {rule.side} "
                f"{self.limit:.3g}")


def value_of(row: dict, metric: str) -> float | None:
    """None if the row does not have it."""
    value = row.get(metric)
    value = min(value, default=None) if isinstance(value, list) else value
    return None if value is None else float(value)


def window_of(mini_batches: int) -> int:
    """Updates in a mean: whole rollout batches, since staleness grows within one."""
    return math.ceil(WINDOW / mini_batches) * mini_batches


def judge(rule: Rule, rows: Sequence[dict], mini_batches: int, step: int) -> tuple:
    """Of the means (n,) that a rule looks at: the first update of each, the last, the mean, its
    limit and whether the rule holds. A mean that is not a number holds, on either side."""
    found = [(row["update"], x, value_of(row, rule.flat)) for row in rows
             if (x := value_of(row, rule.metric)) is not None]
    updates, points, other = np.array(found, dtype=float).reshape(-1, 3).T
    window = max(1, window_of(mini_batches) // step) if rule.windows else 1  # rows
    size = window * max(1, rule.windows)
    ends = np.arange(size, len(points) + 1, window)
    starts = np.append(0, updates)[ends - size] + 1
    means, others = (np.array([x[end - size:end].mean() for end in ends]) for x in (points, other))
    with np.errstate(invalid="ignore"):
        limits = rule.limit(means, standard_errors(points, ends, size), rule.number)
        holds = (means > limits if rule.side == "above" else means < limits) & (means > rule.floor)
        holds &= ~(others > before(others, FEW))
    return starts, updates[ends - 1], means, limits, holds | np.isnan(means)


def standard_errors(points: np.ndarray, ends: np.ndarray, size: int) -> np.ndarray:
    """Of means of `size` points, (n,), NaN before there are four steps: what a point's own noise
    is, its steps say, since every update has other prompts. Their median sees no single fall."""
    steps = np.abs(np.diff(points))
    typical = np.array([np.median(steps[max(0, end - 1 - RECENT):end - 1]) if end > 4 else np.nan
                        for end in ends])
    return typical / 0.6745 / math.sqrt(2 * size)  # |x| of a normal x has the median .6745 σ


def events(rows: Sequence[dict], mini_batches: int = 1, step: int = 1,
           rules: Sequence[Rule] = RULES) -> list[Event]:
    """Of rows of metrics in the order of their updates, each of one update or, in a thinned curve,
    a mean of `step`. In the order of updates, then of rules."""
    found = []
    for rule in rules:
        held = False
        for start, end, value, limit, holds in zip(*judge(rule, rows, mini_batches, step)):
            if holds and not held:
                found.append(Event(int(end), int(start), rule.name, rule.metric, float(value),
                                   float(limit)))
            held = holds
    return sorted(found, key=lambda event: event.update)


def unjudged(rows: Sequence[dict], mini_batches: int = 1, step: int = 1) -> dict[str, str]:
    """Why a rule said nothing, by name, for those that never could: its metric is in no row, or in
    too few."""
    reasons = {}
    for rule in RULES:
        limits = judge(rule, rows, mini_batches, step)[3]
        if all(value_of(row, rule.metric) is None for row in rows):
            reasons[rule.name] = f"no {rule.metric}"
        elif np.isnan(limits).all():
            reasons[rule.name] = f"too few rows with {rule.metric}"
    return reasons
