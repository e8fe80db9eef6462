"""The published claims, in the paper's order, and how each is decided. This file alone states them.

Regimes: router noise .8 unless a claim says otherwise. An end is the engine score after the last
update. "Lasts" and "fails" are about the reward of the last 64 updates over the best of any 64, by its
mean over seeds, above .95 or below; how many single seeds lie below is printed beside it. Every
decision is by a 95 % interval over paired seeds.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from figures import outcomes
from figures.grid import LITTLE, MUCH, PLANNED, TEACHER_OPTIONS, Cell
from figures.intervals import ABSENT, CONTRADICTED, NOT_RUN, REPRODUCED, UNDECIDED, all_of, mean, share
from figures.outcomes import FAILING, NotRun, Runs, best, end, kept

# The three recipes where the engines agree.
HEALTHY = [Cell(regime, 1, "none").key for regime in ("fp32", "long fp32", "long fp32, 1,024 updates")]
MARGIN = 0.03  # of a score: what "equal", "no worse" and "gains nothing" allow
Part = Callable[[Runs], tuple[str, str]]  # -> measured with its interval, decision


def cell(N: int, method: str, regime: str = "router") -> str:
    return Cell(regime, N, method).key


def ends(N, method, other, above=None, below=None) -> Part:
    """The end of method minus that of other lies above, or below, a bound."""
    def part(runs):
        difference = runs.difference(cell(N, method), cell(N, other))
        decision = difference.above(above) if below is None else difference.below(below)
        return f"end, N={N}, {method} minus {other}: {difference}", decision
    return part


def lasts(N, method, so: bool = True) -> Part:
    """The run keeps its best score; with so=False: it does not, it fails."""
    def part(runs):
        ratio, failures = runs.mean(cell(N, method), kept), runs.failures(cell(N, method))
        text = (f"N={N}, {method}: last over best {ratio.mean:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], "
                f"{failures.mean * failures.n:.0f} of {failures.n} seeds fail")
        return text, ratio.above(FAILING) if so else ratio.below(FAILING)
    return part


def fails(N, method) -> Part:
    return lasts(N, method, so=False)


def entropy(N, method, rises: bool) -> Part:
    def part(runs):
        slope = runs.mean(cell(N, method), outcomes.entropy_slope)
        return f"entropy in 100 updates {slope}", slope.above(0) if rises else slope.below(0)
    return part


def kl_falls(N, method, other) -> Part:
    def part(runs):
        change = runs.difference(cell(N, method), cell(N, other), outcomes.mismatch)
        low, middle, high = np.exp([change.low, change.mean, change.high])
        text = f"KL of the engines by a factor of {middle:.3g} [{low:.3g}, {high:.3g}], {change.n} seeds"
        return text, change.below(0)
    return part


def no_kl_spike(N, method) -> Part:
    def part(runs):
        spikes = [*runs.per_seed(cell(N, method), outcomes.kl_spikes).values()]
        of = share(sum(spikes), len(spikes))
        return f"KL spikes in {sum(spikes)} of {of.n} seeds [{of.low:.2f}, {of.high:.2f}]", of.below(0.5)
    return part


def equal_best(runs) -> tuple[str, str]:
    """Of the off-policy recipes with clipping and replay, the one with the highest mean counts."""
    recipes = [name for N in (LITTLE, MUCH) for method in ("R2", "R3") if (name := cell(N, method)) in runs.cells]
    if not recipes:
        raise NotRun(cell(LITTLE, "R3"))
    highest = max(recipes, key=lambda name: runs.mean(name, best).mean)
    difference = runs.difference(cell(1, "none"), highest, best)
    text = f"best of N=1, none minus best of {highest.removeprefix('router | ')}: {difference}"
    return text, difference.within(MARGIN)


def converge(runs) -> tuple[str, str]:
    """The scores of three teachers' runs end nearer to one another than they began, within MARGIN."""
    names = [cell(LITTLE, "R2", f"teacher {teacher}") for teacher in TEACHER_OPTIONS]
    starts, ends = ([runs.per_seed(name, outcome) for name in names] for outcome in (lambda run: run["start"], end))
    spread = {seed: [max(x[seed] for x in of) - min(x[seed] for x in of) for of in (starts, ends)]
              for seed in set.intersection(*(set(x) for x in ends))}
    if not spread:
        raise NotRun("three teachers in one seed")
    last, shrink = mean([b for _, b in spread.values()]), mean([a - b for a, b in spread.values()])
    text = f"spread at the end {last}; smaller than at the start by {shrink}"
    return text, all_of([last.below(MARGIN), shrink.above(0)])


def flips_grow(runs) -> tuple[str, str]:
    slope = runs.mean(cell(1, "none", "mild"), outcomes.flip_slope)
    return f"flips a layer {slope}", slope.above(0)


def gain_grows(runs) -> tuple[str, str]:
    (R3, none), (mild_R3, mild_none) = ([runs.per_seed(cell(1, method, regime), end) for method in ("R3", "none")]
                                        for regime in ("router", "mild"))
    both = set.intersection(*map(set, (R3, none, mild_R3, mild_none)))
    if not both:
        raise NotRun("both regimes in one seed")
    mild = mean([mild_R3[seed] - mild_none[seed] for seed in both])
    more = mean([R3[seed] - none[seed] - mild_R3[seed] + mild_none[seed] for seed in both])
    return f"gain of R3 with noise .8 minus gain without noise: {more}; gain without noise {mild}", more.above(0)


@dataclass(frozen=True)
class Claim:
    statement: str
    parts: list[Part]
    compares_replay: tuple[int, ...] = ()  # N of the comparisons that the regime has to be fit for


CLAIMS = [
    Claim("On-policy, MiniRL ends above each of three variants: no importance sampling, length norm, R3",
          [ends(1, "none", method, above=0) for method in ("no IS", "length norm", "R3")], (1,)),
    Claim("On-policy, length norm lasts", [lasts(1, "length norm")]),
    Claim("On-policy, without importance sampling it fails, its entropy falling",
          [fails(1, "no IS"), entropy(1, "no IS", rises=False)]),
    Claim("On-policy, R3 gains nothing", [ends(1, "R3", "none", below=MARGIN)], (1,)),
    Claim("On-policy, R3 lowers the KL of the engines", [kl_falls(1, "R3", "none")], (1,)),
    Claim("On-policy, R3 without importance sampling fails, and no KL spike shows it",
          [fails(1, "R3, no IS"), no_kl_spike(1, "R3, no IS")]),
    Claim("Little staleness: without clipping and replay it fails", [fails(LITTLE, "none, no clip")]),
    Claim("Little staleness: R2 with clipping lasts", [lasts(LITTLE, "R2")]),
    Claim("Little staleness: R2 is no worse than R3", [ends(LITTLE, "R2", "R3", above=-MARGIN)], (LITTLE,)),
    Claim("Much staleness: R3 ends above R2", [ends(MUCH, "R3", "R2", above=0)], (MUCH,)),
    Claim("Much staleness: without clipping it fails, under any replay",
          [fails(MUCH, f"{replay}, no clip") for replay in ("none", "R2", "R3")]),
    Claim("Much staleness: R2 with clipping fails, its entropy rising",
          [fails(MUCH, "R2"), entropy(MUCH, "R2", rises=True)]),
    Claim("Much staleness: R3 with clipping lasts", [lasts(MUCH, "R3")]),
    Claim("On-policy and the best off-policy recipe reach the same best score", [equal_best]),
    Claim("Three cold starts converge (no router noise)", [converge]),
    Claim("Flips grow with the layer (no router noise)", [flips_grow]),
    Claim("With clipping, no replay ends below R2, little staleness and much",
          [ends(N, "R2", "none", above=0) for N in (LITTLE, MUCH)], (LITTLE, MUCH)),
    Claim("Much staleness: R3 ends lower without clipping", [ends(MUCH, "R3", "R3, no clip", above=0)]),
    Claim("DPPO's mask, anchored on μ, ends above MiniRL's, on-policy and with much staleness",
          [ends(N, "DPPO", "none", above=0) for N in (1, MUCH)]),
    Claim("What R3 is worth on-policy grows with the noise of the router", [gain_grows]),
]


@dataclass(frozen=True)
class Verdict:
    statement: str
    measured: str
    decision: str


def precondition(runs: Runs) -> tuple[str, bool | None]:
    """Whether each recipe fails in no seed where the engines agree; None: not known yet of all."""
    texts, holds = [], []
    for key in HEALTHY:
        if (made := len(runs.cells.get(key, ()))) < PLANNED[key]:
            texts.append(f"precondition not run yet, {key}: {made} of {PLANNED[key]} seeds")
            continue
        failures = runs.failures(key)
        texts.append(f"precondition, {key}: {failures.mean * failures.n:.0f} of {failures.n} seeds fail; "
                     f"end {runs.mean(key, end)}")
        holds.append(failures.mean == 0)
    unknown = all(holds) and len(holds) < len(HEALTHY)
    return ". ".join(texts), None if unknown else all(holds)


def decide(claim: Claim, runs: Runs) -> Verdict:
    texts, decisions = [], []
    compared = [name for N in claim.compares_replay if (name := cell(N, "none")) in runs.cells]
    if not all(map(runs.fit_for_replay, compared)):
        return Verdict(claim.statement, "routing is too little of the gap for replay to matter", ABSENT)
    for part in claim.parts:
        runs.asked.clear()
        try:
            text, decision = part(runs)
            if short := [key for key in sorted(runs.asked) if len(runs.cells[key]) < PLANNED[key]]:
                # Deciding on the way, whenever an interval happens to exclude zero, would find too much.
                text += f", so far (planned: {max(PLANNED[key] for key in short)})"
                decision = NOT_RUN
        except NotRun as missing:
            text, decision = f"no run yet of {missing.args[0]}", NOT_RUN
        texts.append(text)
        decisions.append(decision)
    return Verdict(claim.statement, "; ".join(texts), all_of(decisions))


def verdicts(runs: Runs) -> list[Verdict]:
    """ValueError if a recipe fails by itself: then nothing may be compared."""
    text, holds = precondition(runs)
    if holds is False:
        raise ValueError(f"{text}: choose a milder recipe in grid.py")
    return [decide(claim, runs) for claim in CLAIMS]


def table(runs: Runs) -> str:
    found = verdicts(runs)
    counts = ", ".join(f"{decision}: {sum(v.decision == decision for v in found)}"
                       for decision in (REPRODUCED, CONTRADICTED, UNDECIDED, ABSENT, NOT_RUN))
    lines = [f"Of twenty claims, {counts}.", "", precondition(runs)[0] + ".", "", *__doc__.split("\n")[2:],
             f"Little staleness is N = {LITTLE}, much is N = {MUCH}. *Equal*, *no worse*, *nothing* allow {MARGIN:g}.",
             "Of twenty such intervals about one misses its value by chance.", "",
             "| | claim | measured, 95 % interval | verdict |", "|---|---|---|---|"]
    lines += [f"| {i} | {v.statement} | {v.measured.replace(' | ', ', ')} | **{v.decision}** |"
              for i, v in enumerate(found, 1)]
    return "\n".join(lines) + "\n"


def short_table(runs: Runs) -> str:
    """Claim and verdict alone, as the tutorials' first page has it."""
    lines = ["| | claim, in the paper's order | here |", "|---|---|---|"]
    lines += [f"| {i} | {v.statement} | {v.decision} |" for i, v in enumerate(verdicts(runs), 1)]
    return "\n".join(lines) + "\n"
