"""The published figures of arXiv 2512.01374 in miniature, with seeds and intervals.

    python tutorials/figures.py pilot    # choose the stress level, by the rule below
    python tutorials/figures.py core     # run the grid; again: go on where it was interrupted
    python tutorials/figures.py dials    # precision x N, depth and experts; resumes as well
    python tutorials/figures.py core --results runs/figures    # anew: results/ has all of its runs already
    python tutorials/figures.py report   # pictures and the table of verdicts from what there is
    python tutorials/figures.py all --quick --results /tmp/quick    # a short look, for CI

A run is a cell of the grid and a seed. One seed is one cold start and one order of prompts, shared by
all methods. Runs go side by side, one thread each, and leave one line each in results/*.jsonl.
"""
import argparse, json, multiprocessing, os, sys  # noqa: E401
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy import stats  # noqa: E402
from tqdm import tqdm  # noqa: E402

import nano_moe_rl as nano  # noqa: E402
import objectives  # noqa: E402
import toy  # noqa: E402

# ------------------------------------------------------------------------------------------ the grid
# Default model and task; half the default mini-batch and 128 updates, so that a run takes about 20
# core-seconds.
BASE = dict(mini_batch=128, updates=128, eval_every=8, eval_prompts=1024)
SEEDS, PILOT_SEEDS, DIAL_SEEDS = range(8), range(100, 104), range(3)

# `mild` is the default recipe, fp8 rollouts. The rungs above it have a higher learning rate: a policy
# that moves further in an update leaves later mini-batches staler. `stressed` is the mildest rung at
# which, in the pilot, N = 4 without replay and clipping fails in at least half of the seeds and N = 1
# MiniRL in at most one; chosen before any run of the grid, and without a run with replay.
LADDER = tuple(dict(rollout_precision="fp8", lr=lr) for lr in (5e-4, 7e-4, 1e-3, 1.4e-3))
LEVELS = {"mild": dict(rollout_precision="fp8", lr=3e-4), "stressed": LADDER[2]}

OBJECTIVES = {  # name: (loss, advantages)
    "MiniRL": (None, nano.group_advantages),
    "GRPO": (objectives.grpo_loss, objectives.standardised_advantages),
    "CISPO": (objectives.cispo_loss, objectives.standardised_advantages),
    "DPPO": (objectives.dppo_loss, nano.group_advantages),
}


@dataclass(frozen=True)
class Cell:
    """One method in one setting. options go to nano.Config."""
    figure: str
    method: str
    level: str
    options: dict = field(hash=False)
    objective: str = "MiniRL"

    @property
    def key(self) -> str:
        return f"{self.figure} | {self.method} | {self.level}"

    def config(self, seed: int, quick: bool) -> nano.Config:
        short = dict(updates=8, eval_prompts=64, cold_start_steps=30, mini_batch=16) if quick else {}
        options = BASE | LEVELS.get(self.level, {}) | self.options | short
        return nano.Config(seed=seed, name="figures", **options)


def grid() -> list[Cell]:
    cells = []
    for method, options in {
        "MiniRL": {},
        "+ length-norm": dict(length_norm=True),
        "- IS": dict(importance_sampling="none"),
        "+ R3": dict(replay="R3"),
        "+ R3 + length-norm": dict(replay="R3", length_norm=True),
        "+ R3 - IS": dict(replay="R3", importance_sampling="none"),
    }.items():
        cells.append(Cell("N=1", method, "stressed", dict(replay="none", mini_batches=1) | options))
    for N in (2, 4, 8):
        for replay in ("none", "R2", "R3"):
            for clip in (True, False):
                method = f"{replay}{' + clip' if clip else ''}"
                cells.append(Cell(f"N={N}", method, "stressed", dict(replay=replay, mini_batches=N, clip=clip)))
    for N in (1, 4):
        for name in ("GRPO", "CISPO", "DPPO"):
            cells.append(Cell(f"N={N}", name, "stressed", dict(replay="none", mini_batches=N), name))
    cells += [Cell("N=1", method, "mild", dict(replay=replay, mini_batches=1))
              for method, replay in (("MiniRL", "none"), ("+ R3", "R3"))]
    cells += [Cell("N=4", f"{replay} + clip", "mild", dict(replay=replay, mini_batches=4))
              for replay in ("none", "R2", "R3")]
    cells += [Cell("cold starts", teacher, "mild", dict(teacher=teacher, replay="R2", mini_batches=2, updates=192))
              for teacher in nano.TEACHERS]
    return cells


def pilot_cells() -> list[Cell]:
    """Two arms on each rung; replay is not among them, and the seeds are not used again."""
    return [Cell("pilot", f"N={N}, lr {rung['lr']:g}", "rung", rung | dict(replay="none", mini_batches=N, clip=N == 1))
            for rung in LADDER for N in (1, 4)]


PRECISIONS, NS = ("fp32", "bf16", "fp8", "int4"), (1, 2, 4, 8)
DEPTHS, EXPERTS = (2, 3, 4, 6), (8, 16, 32)


def phase_cells() -> list[Cell]:
    """Precision x N for each replay mode, with clipping. R2 at N = 1 is `none` and is not run twice."""
    return [Cell("phase", f"{precision}, N={N}, {replay}", "dial",
                 dict(rollout_precision=precision, lr=LEVELS["mild"]["lr"], mini_batches=N, replay=replay))
            for precision in PRECISIONS for N in NS for replay in ("none", "R2", "R3")
            if (N, replay) != (1, "R2")]


def flip_cells() -> list[Cell]:
    """Cold starts of other depth or other numbers of experts, to count flips on; no RL."""
    shapes = [dict(layers=layers) for layers in DEPTHS] + [dict(experts=E) for E in EXPERTS if E != 16]
    return [Cell("flips", f"{precision}, " + ", ".join(f"{k} {v}" for k, v in shape.items()), "dial",
                 dict(rollout_precision=precision) | shape) for precision in ("fp8", "int4") for shape in shapes]


# ---------------------------------------------------------------------------------------- the runner

def one_thread():
    torch.set_num_threads(1)


def every(values: list[float], step: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Means of `step` updates, at the last of them."""
    n = len(values) // step
    return np.arange(1, n + 1) * step, np.reshape(values[: n * step], (n, step)).mean(1)


def run(cell: Cell, seed: int, quick: bool) -> dict:
    """Cold start and RL of one cell and seed -> what results/*.jsonl keeps of it."""
    c = cell.config(seed, quick)
    model, rows, stopped = nano.cold_start(c), [], None
    optimizer = nano.adamw(model, c.lr)
    loss_fn, advantage_fn = OBJECTIVES[cell.objective]
    first = nano.evaluate(model).rewards.mean().item()
    try:
        for _ in nano.learn(model, optimizer, rows, loss_fn, advantage_fn):
            pass
    except FloatingPointError as error:  # a collapse, not a run to drop: its last score is 0
        stopped = f"{error}, after update {len(rows)}"
        rows.append({"update": len(rows) + 1, "score": 0.0})
    scores = [(0, first)] + [(row["update"], row["score"]) for row in rows if row["score"] is not None]
    curves = {name: [row[name] for row in rows if name in row]
              for name in ("reward", "entropy", "mismatch_kl", "staleness_kl", "clip_fraction")}
    for name in ("reward", "staleness_kl", "clip_fraction"):  # no rule looks at single updates of these
        curves[name] = every(curves[name])[1]
    curves = {name: [float(f"{x:.3g}") for x in values] for name, values in curves.items()}
    late = [row["routing_agreement"] for row in rows[-16:] if "routing_agreement" in row]
    return {"cell": cell.key, "seed": seed, "score": [[u, round(s, 4)] for u, s in scores], **curves,
            "flips": [round(1 - x, 4) for x in np.mean(late, 0)] if late else [], "stopped": stopped}


def count_flips(cell: Cell, seed: int, quick: bool) -> dict:
    """Share of fed tokens for which the engines choose other experts, by layer, after the cold start."""
    c = cell.config(seed, quick)
    model = nano.cold_start(c)
    engine = nano.InferenceEngine(model, c.rollout_precision)
    rollout = nano.sample(engine, 256, 4, seed)
    with torch.no_grad():
        _, _, routing = nano.policy(model, rollout)
    agreement = nano.routing_agreement(routing, rollout.routing, rollout.fed)
    return {"cell": cell.key, "seed": seed, "flips": [round(1 - x, 4) for x in agreement.tolist()]}


def load(path: Path) -> dict[tuple[str, int], dict]:
    """Finished runs by cell and seed. A half-written last line, from an interruption, is left out."""
    runs = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        runs[row["cell"], row["seed"]] = row
    return runs


def run_all(cells: list[Cell], seeds, path: Path, jobs: int, quick: bool, work=run):
    """The runs that path does not have yet, all cells of a seed before the next seed."""
    done = load(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
    todo = [(cell, seed) for seed in seeds for cell in cells if (cell.key, seed) not in done]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=one_thread) as pool, open(path, "a") as file:
        starts = {}  # cold starts first: two runs that need the same one would both train it
        for cell, seed in todo:
            c = cell.config(seed, quick)
            starts[c.teacher, c.seed, c.layers, c.experts] = c
        list(tqdm(pool.map(cold, starts.values()), "cold starts", len(starts), leave=False, disable=None))
        futures = [pool.submit(work, cell, seed, quick) for cell, seed in todo]
        for future in tqdm(as_completed(futures), path.stem, len(futures), disable=None):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()


def cold(c: nano.Config):
    nano.cold_start(c)


# --------------------------------------------------------------------------------------------- rules

def smooth(scores, window: int = 5) -> np.ndarray:
    """Means of `window` consecutive evaluations."""
    window = min(window, len(scores))
    return np.convolve(scores, np.ones(window) / window, "valid")


def fails(end: float, peak: float) -> bool:
    return end < 0.95 * peak


def collapses(end: float, peak: float) -> bool:
    return end < 0.5 * peak


def slope_before_failure(run: dict) -> float:
    """Slope of the entropy over the last fifth of the updates before the smoothed score first lies
    below .95 of its peak so far (a run that does not fail: over the last fifth of all)."""
    scores = smooth([score for _, score in run["score"]])
    updates = [update for update, _ in run["score"]][len(run["score"]) - len(scores):]
    end = len(run["entropy"])
    for update, score, peak in zip(updates, scores, np.maximum.accumulate(scores)):
        if fails(score, peak):
            end = min(update, end)
            break
    last = np.array(run["entropy"][:end])[-max(2, end // 5):]
    return float(np.polyfit(np.arange(len(last)), last, 1)[0]) if len(last) > 1 else 0.0


def kl_spike(run: dict, window: int = 16) -> bool:
    """Whether the mismatch KL, as a mean of 4 updates, ever exceeds 3 times the median of all before."""
    kl = smooth(run["mismatch_kl"], 4)
    return any(kl[i] > 3 * np.median(kl[:i]) for i in range(window, len(kl)))


def clopper_pearson(count: int, n: int) -> tuple[float, float]:
    interval = stats.binomtest(count, n).proportion_ci(0.95, "exact")
    return interval.low, interval.high


def mean_interval(values) -> tuple[float, float, float]:
    """Mean and 95 % t interval."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), -np.inf, np.inf
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


# ------------------------------------------------------------------------------------------ verdicts
REPRODUCED, CONTRADICTED, UNDECIDED, ABSENT = "reproduced", "contradicted", "undecided", "not at this scale"
MARGIN = 0.03


class Runs:
    """The runs of the grid by cell: statistics per seed, and comparisons over the seeds that both have."""
    def __init__(self, runs: dict):
        self.cells = defaultdict(dict)
        for (cell, seed), row in runs.items():
            self.cells[cell][seed] = row

    def per_seed(self, cell: str, statistic) -> dict[int, float]:
        if cell not in self.cells:
            raise KeyError(f"no run of {cell!r} yet")
        return {seed: float(statistic(row)) for seed, row in sorted(self.cells[cell].items())}

    def difference(self, cell: str, other: str, statistic) -> tuple[float, float, float]:
        """Paired: mean and interval of statistic(cell) - statistic(other)."""
        a, b = self.per_seed(cell, statistic), self.per_seed(other, statistic)
        return mean_interval([a[seed] - b[seed] for seed in a.keys() & b.keys()])

    def failures(self, cell: str) -> tuple[int, int]:
        failed = self.per_seed(cell, failed_run)
        return int(sum(failed.values())), len(failed)


def end(run: dict) -> float:
    return float(smooth([score for _, score in run["score"]])[-1])


def peak(run: dict) -> float:
    return float(smooth([score for _, score in run["score"]]).max())


def failed_run(run: dict) -> bool:
    return fails(end(run), peak(run))


def log_kl(run: dict) -> float:
    return float(np.log(np.mean(run["mismatch_kl"])))


def sign(low: float, high: float, bound: float = 0.0) -> str:
    """Whether a claim that something exceeds the bound holds, by the interval of that something."""
    return REPRODUCED if low > bound else CONTRADICTED if high < bound else UNDECIDED


def weakest(*decisions: str) -> str:
    """A claim with several parts holds if all hold and is refuted by one that is refuted."""
    return next(x for x in (CONTRADICTED, ABSENT, UNDECIDED, REPRODUCED) if x in decisions)


def majority(runs: Runs, cell: str, claim_fails: bool) -> tuple[str, str]:
    """A claim about a single published run, as one about most seeds."""
    count, n = runs.failures(cell)
    low, high = clopper_pearson(count, n)
    decision = sign(low, high, 0.5) if claim_fails else sign(1 - high, 1 - low, 0.5)
    return f"{cell.split(' | ')[1]}: {count} of {n} fail [{low:.2f}, {high:.2f}]", decision


def above(runs: Runs, cell: str, other: str, statistic=end, margin: float = 0.0) -> tuple[str, str]:
    mean, low, high = runs.difference(cell, other, statistic)
    names = f"{cell.split(' | ')[1]} minus {other.split(' | ')[1]}"
    return f"{names}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]", sign(low, high, -margin)


def more_often(runs: Runs, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    """Difference of failure rates, paired by seed, averaged over pairs of cells."""
    per_seed, counts = defaultdict(list), [0, 0]
    for cell, other in pairs:
        a, b = runs.per_seed(cell, failed_run), runs.per_seed(other, failed_run)
        for seed in a.keys() & b.keys():
            per_seed[seed].append(a[seed] - b[seed])
            counts[0] += int(a[seed])
            counts[1] += int(b[seed])
    if not any(counts):
        return "no failure in either arm", ABSENT
    mean, low, high = mean_interval([np.mean(x) for x in per_seed.values()])
    n = sum(len(x) for x in per_seed.values())
    return f"{counts[0]} against {counts[1]} of {n} fail, {mean:+.2f} [{low:+.2f}, {high:+.2f}]", sign(low, high)


def equal(runs: Runs, cell: str, other: str, statistic) -> tuple[str, str]:
    text, _ = above(runs, cell, other, statistic)
    _, low, high = runs.difference(cell, other, statistic)
    if min(*runs.per_seed(cell, statistic).values(), *runs.per_seed(other, statistic).values()) > 0.98:
        return text, ABSENT
    if -MARGIN < low and high < MARGIN:
        return text, REPRODUCED
    return text, CONTRADICTED if low > MARGIN or high < -MARGIN else UNDECIDED


def entropy_moves(runs: Runs, cell: str, rising: bool) -> tuple[str, str]:
    """Sign of the entropy's slope before failure, over the seeds that fail."""
    slopes = [slope_before_failure(row) for row in runs.cells[cell].values() if failed_run(row)]
    if len(slopes) < 2:
        return f"entropy: {len(slopes)} failing seeds", ABSENT
    mean, low, high = mean_interval(slopes)
    return (f"entropy slope {mean:+.1e} [{low:+.1e}, {high:+.1e}] an update",
            sign(low, high) if rising else sign(-high, -low))


def all_of(*parts: tuple[str, str]) -> tuple[str, str]:
    return "; ".join(text for text, _ in parts), weakest(*(decision for _, decision in parts))


def verdicts(runs: Runs) -> list[tuple[str, str, str]]:
    """(claim, statistic with interval, decision) for the twenty claims, in their order."""
    def cell(figure, method, level="stressed"):
        return f"{figure} | {method} | {level}"

    def spike_free(name):
        failing = [row for row in runs.cells[name].values() if failed_run(row)]
        spikes = sum(map(kl_spike, failing))
        if not failing:
            return "KL spikes: no failing seeds", ABSENT
        low, high = clopper_pearson(spikes, len(failing))
        return f"KL spikes in {spikes} of {len(failing)} failing [{low:.2f}, {high:.2f}]", sign(-high, -low, -0.5)

    def best_off_policy():
        recipes = [cell("N=2", "R2 + clip"), cell("N=4", "R3 + clip"), cell("N=8", "R3 + clip")]
        best = max(recipes, key=lambda name: np.mean(list(runs.per_seed(name, peak).values())))
        text, decision = equal(runs, cell("N=1", "MiniRL"), best, peak)
        return f"peaks, {text} at {best.split(' | ')[0]}", decision

    def spreads():
        first, last = [], []
        per_teacher = [runs.cells[cell("cold starts", teacher, "mild")] for teacher in nano.TEACHERS]
        for seed in set.intersection(*map(set, per_teacher)):
            starts = [teacher[seed]["score"][0][1] for teacher in per_teacher]
            ends = [end(teacher[seed]) for teacher in per_teacher]
            first.append(max(starts) - min(starts))
            last.append(max(ends) - min(ends))
        mean, low, high = mean_interval(last)
        _, shrink_low, shrink_high = mean_interval(np.subtract(first, last))
        text = f"spread {np.mean(first):.3f} at the start, {mean:.3f} [{low:.3f}, {high:.3f}] at the end"
        return text, weakest(sign(-high, -low, -MARGIN), sign(shrink_low, shrink_high))

    def flips_grow():
        mean, low, high = mean_interval([np.polyfit(range(len(row["flips"])), row["flips"], 1)[0]
                                         for row in runs.cells[cell("N=1", "MiniRL", "mild")].values()])
        return f"slope of the flip rate a layer {mean:+.3f} [{low:+.3f}, {high:+.3f}]", sign(low, high)

    def orders():
        pairs, decisions, text = [("none", "R2"), ("none", "R3"), ("R2", "R3")], [], []
        for a, b in pairs:
            signs = [runs.difference(cell("N=4", f"{a} + clip", level), cell("N=4", f"{b} + clip", level), end)
                     for level in LEVELS]
            text.append(f"{a} minus {b}: " + ", ".join(
                f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] {level}" for level, (mean, low, high) in zip(LEVELS, signs)))
            (_, low, high), (_, low2, high2) = signs
            apart = low > 0 > high2 or low2 > 0 > high
            same = low > 0 < low2 or high < 0 > high2
            decisions.append(REPRODUCED if apart else CONTRADICTED if same else UNDECIDED)
        differs = REPRODUCED in decisions
        return "; ".join(text), REPRODUCED if differs else weakest(*decisions) if len({*decisions}) == 1 else UNDECIDED

    miniRL, R3 = cell("N=1", "MiniRL"), cell("N=1", "+ R3")
    mean, low, high = runs.difference(R3, miniRL, log_kl)
    mild_gain = runs.difference(cell("N=1", "+ R3", "mild"), cell("N=1", "MiniRL", "mild"), end)
    claims = [
        ("N=1: MiniRL ends above length-norm, - IS and R3",
         all_of(*(above(runs, miniRL, cell("N=1", m)) for m in ("+ length-norm", "- IS", "+ R3")))),
        ("N=1: length-norm is stable", majority(runs, cell("N=1", "+ length-norm"), False)),
        ("N=1: - IS fails and its entropy falls",
         all_of(majority(runs, cell("N=1", "- IS"), True), entropy_moves(runs, cell("N=1", "- IS"), False))),
        ("N=1, mild: R3 gains nothing",
         ("+ R3 minus MiniRL: {:+.3f} [{:+.3f}, {:+.3f}]".format(*mild_gain),
          sign(-mild_gain[2], -mild_gain[1], -MARGIN))),
        ("N=1: R3 lowers the training-inference KL",
         (f"by a factor of {np.exp(mean):.2f} [{np.exp(low):.2f}, {np.exp(high):.2f}]", sign(-high, -low))),
        ("N=1: R3 - IS fails without a KL spike",
         all_of(majority(runs, cell("N=1", "+ R3 - IS"), True), spike_free(cell("N=1", "+ R3 - IS")))),
        ("N=2: without clip and replay fails", majority(runs, cell("N=2", "none"), True)),
        ("N=2: R2 + clip does not fail", majority(runs, cell("N=2", "R2 + clip"), False)),
        ("N=2: R2 >= R3", above(runs, cell("N=2", "R2 + clip"), cell("N=2", "R3 + clip"), margin=MARGIN)),
        ("N=4: R3 > R2", above(runs, cell("N=4", "R3 + clip"), cell("N=4", "R2 + clip"))),
        ("N=4: without clip, or without replay and clip, fails",
         all_of(*(majority(runs, cell("N=4", m), True) for m in ("R2", "R3", "none")))),
        ("N=8: R2 + clip fails, its entropy rising",
         all_of(majority(runs, cell("N=8", "R2 + clip"), True), entropy_moves(runs, cell("N=8", "R2 + clip"), True))),
        ("N=8: R3 + clip does not fail", majority(runs, cell("N=8", "R3 + clip"), False)),
        ("on-policy and the best off-policy recipe reach equal peaks", best_off_policy()),
        ("cold starts converge", spreads()),
        ("N=1, mild: flips grow with the layer", flips_grow()),
        ("N=4, 8: clip without replay fails more often than with R2",
         more_often(runs, [(cell(f"N={N}", "none + clip"), cell(f"N={N}", "R2 + clip")) for N in (4, 8)])),
        ("R3 without clip fails more often than with",
         more_often(runs, [(cell(f"N={N}", "R3"), cell(f"N={N}", "R3 + clip")) for N in (2, 4, 8)])),
        ("DPPO's mask fails less often than MiniRL's",
         more_often(runs, [(miniRL, cell("N=1", "DPPO")), (cell("N=4", "none + clip"), cell("N=4", "DPPO"))])),
        ("the order of the replay modes is another at the mild level", orders()),
    ]
    return [(claim, text, decision) for claim, (text, decision) in claims]


def verdict_table(runs: Runs) -> str:
    rows = verdicts(runs)
    seeds = {len(cell) for cell in runs.cells.values()}
    head = f"Seeds a cell: {min(seeds)} to {max(seeds)}. " + ", ".join(
        f"{decision}: {sum(d == decision for *_, d in rows)}" for decision in (REPRODUCED, CONTRADICTED, UNDECIDED, ABSENT))
    lines = [head, "", "With 95 % intervals about one in twenty misses its value by chance. End scores are means",
             "of the last 5 evaluations; failing: below .95 of the peak of that mean. *Equal*, *>=* and *gains nothing*",
             "allow a margin of .03. Level stressed, unless a row says mild.", "",
             "| | claim | measured, 95 % interval | verdict |", "|---|---|---|---|"]
    lines += [f"| {i} | {claim} | {text} | **{decision}** |" for i, (claim, text, decision) in enumerate(rows, 1)]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------ pictures
# One colour, line and marker per method, the same everywhere; colours differ in lightness too.
STYLES = {
    "MiniRL": ("#000000", "-", "o"), "+ length-norm": ("#E69F00", "-", "s"), "- IS": ("#D55E00", "--", "v"),
    "+ R3": ("#0072B2", "-", "^"), "+ R3 + length-norm": ("#56B4E9", "-.", "D"), "+ R3 - IS": ("#CC79A7", "--", "<"),
    "none": ("#777777", "--", "x"), "none + clip": ("#000000", "-", "o"),
    "R2": ("#F0C060", "--", "P"), "R2 + clip": ("#E69F00", "-", "s"),
    "R3": ("#7FB8DA", "--", "d"), "R3 + clip": ("#0072B2", "-", "^"),
    "GRPO": ("#D55E00", "-.", "v"), "CISPO": ("#009E73", "-.", "<"), "DPPO": ("#CC79A7", "-", ">"),
    "brief": ("#000000", "-", "o"), "equation": ("#E69F00", "-", "s"), "restating": ("#0072B2", "-", "^"),
}
FIGURES = {  # file: (title, cells' figure, level, methods)
    "figure1": ("On-policy, N = 1", "N=1", "stressed",
                ["MiniRL", "+ length-norm", "- IS", "+ R3", "+ R3 + length-norm", "+ R3 - IS"]),
    **{f"figure{i}": (f"Off-policy, N = {N}", f"N={N}", "stressed",
                      [f"{replay}{clip}" for replay in ("none", "R2", "R3") for clip in (" + clip", "")])
       for i, N in ((2, 2), (3, 4), (4, 8))},
    "figure5": ("Three cold starts, R2, N = 2", "cold starts", "mild", list(nano.TEACHERS)),
    "appendix1": ("Other objectives, N = 1", "N=1", "stressed", ["MiniRL", "GRPO", "CISPO", "DPPO"]),
    "appendix4": ("Other objectives, N = 4", "N=4", "stressed", ["none + clip", "GRPO", "CISPO", "DPPO"]),
}


def picture():
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "figures", "font.size": 9})
    from matplotlib.figure import Figure
    return Figure


def bands(axes, curves: list[tuple[np.ndarray, np.ndarray]], style, label: str, log: bool = False):
    """Mean and interval over seeds, on the points that all of them have."""
    colour, line, marker = style
    n = min(len(x) for x, _ in curves)
    x, y = curves[0][0][:n], np.array([y[:n] for _, y in curves])
    mean, low, high = np.array([mean_interval(column) for column in (np.log(y.clip(1e-9)) if log else y).T]).T
    if log:
        mean, low, high = np.exp(mean), np.exp(low), np.exp(high)
    axes.plot(x, mean, color=colour, linestyle=line, marker=marker, markersize=3.5, linewidth=1.3, label=label)
    if np.isfinite(low).all():
        axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def draw_figure(runs: Runs, name: str, folder: Path):
    title, figure_key, level, methods = FIGURES[name]
    figure = picture()(figsize=(10, 6.4), layout="constrained")
    panels = figure.subplots(2, 2)
    for method in methods:
        rows = list(runs.cells.get(f"{figure_key} | {method} | {level}", {}).values())
        if not rows:
            continue
        style = STYLES[method]
        scores = [tuple(np.array(row["score"]).T) for row in rows]
        bands(panels[0, 0], scores, style, f"{method} ({len(rows)} seeds)")
        bands(panels[0, 1], [every(row["mismatch_kl"]) for row in rows], style, method, log=True)
        rewards = [np.array(row["reward"]) for row in rows]
        bands(panels[1, 0], [(np.arange(1, len(y) + 1) * 8, y) for y in rewards], style, method)
        bands(panels[1, 1], [every(row["entropy"]) for row in rows], style, method)
    for axes, text in zip(panels.flat, ("score on 1,024 held-out prompts", "training-inference KL(μ‖π)",
                                        "training reward", "entropy of π, nats")):
        axes.set(title=text, xlabel="update")
        axes.grid(alpha=0.25)
    panels[0, 1].set_yscale("log")
    panels[0, 0].legend(fontsize=8)
    options = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in LEVELS[level].items())
    figure.suptitle(f"{title}; level {level} ({options}); mean and 95 % interval. python tutorials/figures.py core")
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def draw_summary(runs: Runs, folder: Path):
    """End score and training-inference KL against N for each replay mode: the picture of the README."""
    figure = picture()(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    panels[0].set(title="score at the end", ylim=(0, 1))
    panels[1].set(title="training-inference KL, mean over the run", yscale="log")
    for place, method in enumerate(("none + clip", "R2 + clip", "R3 + clip", "none", "R2", "R3")):
        names = [f"N={N} | {method} | stressed" for N in (2, 4, 8)]
        if not all(name in runs.cells for name in names):
            continue
        colour, _, marker = STYLES[method]
        for axes, statistic, scale in ((panels[0], end, float), (panels[1], log_kl, np.exp)):
            mean, low, high = (np.array([scale(x) for x in column]) for column in zip(
                *(mean_interval(list(runs.per_seed(name, statistic).values())) for name in names)))
            axes.errorbar(np.arange(3) + 0.12 * (place - 2.5), mean, [mean - low, high - mean], color=colour, capsize=2,
                          linestyle="", marker=marker, markersize=6, label=method.replace("none", "no replay"),
                          markerfacecolor=colour if "clip" in method else "white")
    for axes in panels:
        axes.set(xticks=range(3), xticklabels=["N = 2", "N = 4", "N = 8"])
        axes.grid(alpha=0.25, axis="y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle(f"level stressed; mean and 95 % interval of {len(SEEDS)} seeds. python tutorials/figures.py core", fontsize=8)
    figure.savefig(folder / "summary.svg", metadata={"Date": None})


def draw_toys(folder: Path):
    """Errors of the first-order approximation, and the bias of replay, by enumeration: no seeds."""
    figure = picture()(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    distances = np.logspace(-3, 0, 10)
    objective, gradient, _ = zip(*map(toy.first_order_gaps, distances))
    left.loglog(distances, objective, "o-", color="#000000", label="objective: slope 2")
    left.loglog(distances, gradient, "s--", color="#0072B2", label="gradient: slope 1")
    left.set(title="error of the first-order surrogate", xlabel="distance of the policies in logits")
    moves = [0.0, 0.01, 0.02, 0.04, 0.08, 0.16]
    for label, mode, precision, line in (("R2", "R2", "fp8", "-"), ("R3, fp8 rollouts", "R3", "fp8", "-"),
                                         ("R3, int4 rollouts", "R3", "int4", "--")):
        colour, _, marker = STYLES[f"{mode} + clip"]
        right.plot(toy.replay_bias(precision, moves)[mode], line, color=colour, marker=marker, label=label)
    right.set(title="KL(π_θ replayed ‖ π_θ): bias of the target policy", xticks=range(len(moves)),
              xticklabels=["0\nfirst mini-batch"] + [f"{x:g}" for x in moves[1:]], xlabel="weights moved since the rollout")
    right.set_yscale("symlog", linthresh=1e-4)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle("by enumeration, no seeds. python tutorials/figures.py report")
    figure.savefig(folder / "toys.svg", metadata={"Date": None})


def draw_phases(runs: Runs, folder: Path):
    """End score by precision and N, a map for each replay mode; dark is low."""
    figure = picture()(figsize=(9.5, 3.2), layout="constrained")
    for axes, replay in zip(figure.subplots(1, 3), ("none", "R2", "R3")):
        ends = np.full((len(PRECISIONS), len(NS)), np.nan)
        for i, precision in enumerate(PRECISIONS):
            for j, N in enumerate(NS):
                name = f"phase | {precision}, N={N}, {'none' if (N, replay) == (1, 'R2') else replay} | dial"
                if name in runs.cells:
                    ends[i, j] = np.mean(list(runs.per_seed(name, end).values()))
                    axes.text(j, i, f"{ends[i, j]:.2f}", ha="center", va="center",
                              color="white" if ends[i, j] < 0.5 else "black")
        axes.imshow(ends, cmap="gray", vmin=0, vmax=1, aspect="auto")
        axes.set(title=replay, xticks=range(len(NS)), xticklabels=[f"N={N}" for N in NS],
                 yticks=range(len(PRECISIONS)), yticklabels=PRECISIONS)
    figure.suptitle("score at the end, with clipping; level mild but for the precision. python tutorials/figures.py dials")
    figure.savefig(folder / "phases.svg", metadata={"Date": None})


def draw_flips(runs: Runs, folder: Path):
    figure = picture()(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, values in ((left, "layers", DEPTHS), (right, "experts", EXPERTS)):
        for precision, line in (("fp8", "-"), ("int4", "--")):
            for shade, value in zip(np.linspace(0.7, 0, len(values)), values):
                shape = "layers 3" if (name, value) == ("experts", 16) else f"{name} {value}"
                rows = runs.cells.get(f"flips | {precision}, {shape} | dial", {}).values()
                if rows:
                    axes.plot(np.mean([row["flips"] for row in rows], 0), line, marker="o", color=str(shade),
                              label=f"{value} {name}" if precision == "fp8" else None)
        axes.set(title=f"tokens with other experts, by number of {name}", xlabel="layer", yscale="log",
                 xticks=range(max(DEPTHS) if name == "layers" else 3))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right")
    figure.suptitle("after the cold start, no RL; solid fp8, dashed int4 rollouts. python tutorials/figures.py dials")
    figure.savefig(folder / "flips.svg", metadata={"Date": None})


def report(results: Path):
    runs = Runs(load(results / "core.jsonl"))
    for name in FIGURES:
        draw_figure(runs, name, results)
    draw_summary(runs, results)
    draw_toys(results)
    if (results / "phase.jsonl").exists():
        draw_phases(Runs(load(results / "phase.jsonl")), results)
        draw_flips(Runs(load(results / "flips.jsonl")), results)
    failed, n = runs.failures("N=1 | MiniRL | stressed")
    table = verdict_table(runs) + (
        f"\nThe level called stressed was fixed by a pilot of four other seeds (`python tutorials/figures.py pilot`). In "
        f"the grid on-policy\nMiniRL itself fails there in {failed} of {n} seeds: read what is said of a method at that "
        "level against this number.\n")
    (results / "verdicts.md").write_text(table)
    print(table)


def pilot_report(runs: dict) -> str:
    lines = ["rung        N=1 fails   N=4 fails"]
    for rung in LADDER:
        counts = []
        for N in (1, 4):
            ends = [smooth([s for _, s in row["score"]]) for (key, _), row in runs.items()
                    if key == f"pilot | N={N}, lr {rung['lr']:g} | rung"]
            counts.append(f"{sum(fails(e[-1], e.max()) for e in ends)} of {len(ends)}")
        lines.append(f"lr {rung['lr']:<8g} {counts[0]:>9}   {counts[1]:>9}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("pilot", "core", "dials", "report", "all"))
    parser.add_argument("--quick", action="store_true", help="one seed, tiny runs: does it work at all?")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--results", type=Path, default=ROOT / "tutorials" / "results", metavar="DIR")
    given = parser.parse_args()
    if given.what in ("pilot", "all"):
        seeds = PILOT_SEEDS[:1] if given.quick else PILOT_SEEDS
        run_all(pilot_cells(), seeds, given.results / "pilot.jsonl", given.jobs, given.quick)
        print(pilot_report(load(given.results / "pilot.jsonl")))
    if given.what in ("core", "all"):
        run_all(grid(), SEEDS[:1] if given.quick else SEEDS, given.results / "core.jsonl", given.jobs, given.quick)
    if given.what in ("dials", "all"):
        seeds = DIAL_SEEDS[:1] if given.quick else DIAL_SEEDS
        run_all(flip_cells(), seeds, given.results / "flips.jsonl", given.jobs, given.quick, count_flips)
        run_all(phase_cells(), seeds, given.results / "phase.jsonl", given.jobs, given.quick)
    if given.what != "pilot":
        report(given.results)


if __name__ == "__main__":
    main()
