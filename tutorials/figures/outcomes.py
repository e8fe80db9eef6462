"""What is read off a run, fixed before any run of the grid. `end` is the primary outcome.

All scores but `trained_end` are those of the inference engine, the policy that is deployed. It also
samples the rollouts, so the training reward, 128 fresh responses an update, is its score as well.
"""
import numpy as np

from figures import intervals
from figures.grid import METHODS
from figures.intervals import Interval
from figures.runner import STEP

# A run that ends below FAILING of its best has failed, both as mean rewards of WINDOW updates: 1,024
# prompts, as in an evaluation, or half as many where a mini-batch is 64. The rule was changed twice
# when the precondition had run, and before any other cell had: first it compared the last evaluation
# with the best reward, then windows of 32 updates. Each called one run of the eight a failure that had
# not fallen by more than the noise of its few prompts. End scores, the primary outcome, do not depend
# on it.
FAILING, WINDOW = 0.95, 64
FIT = dict(share=0.5, extreme=1e-3)  # at least: routing share and F(2) of a regime where replay is compared


class NotRun(KeyError):
    """A cell that the results do not have."""


def end(run: dict) -> float:
    """Engine score after the last update, on 1,024 prompts, the same each time. 0 for a run that broke off."""
    return run["engine_score"][-1][1]


def trained_end(run: dict) -> float:
    """The same in the training engine."""
    return run["score"][-1][1]


def area(run: dict) -> float:
    """Mean of the training reward: area under the engine score, by update."""
    return float(np.mean(run["reward"]))


def rewards(run: dict) -> np.ndarray:
    """Means of WINDOW updates, every 8."""
    window = min(WINDOW // STEP, len(run["reward"]))
    if window == 0:  # it broke off at once
        return np.zeros(1)
    return np.convolve(run["reward"], np.ones(window) / window, "valid")


def best(run: dict) -> float:
    """The highest mean reward of WINDOW updates."""
    return float(rewards(run).max())


def kept(run: dict) -> float:
    """The last WINDOW updates' reward over the best: 1 for a run that ends at its best, 0 for one that broke off."""
    if run["stopped"]:
        return 0.0
    return float(rewards(run)[-1]) / best(run) if best(run) else 1.0


def failed(run: dict) -> bool:
    return kept(run) < FAILING


def updates_until_failure(run: dict) -> int | None:
    """Of a failed run: the update from which on no mean reward reaches FAILING of the best."""
    if not failed(run):
        return None
    if run["stopped"]:
        return (len(run["reward"]) + 1) * STEP
    reached = np.flatnonzero(rewards(run) >= FAILING * best(run))
    return int(len(run["reward"]) - len(rewards(run)) + (reached[-1] + 1 if len(reached) else 0) + 1) * STEP


def staleness_tail(run: dict) -> float:
    """The largest staleness KL, as means of 8 updates."""
    return max(run["staleness_kl"])


def mismatch(run: dict) -> float:
    """KL of the engines, by its mean over the run; log, so that differences are factors."""
    return float(np.log(np.mean(run["mismatch_kl"])))


def entropy_slope(run: dict) -> float:
    """Of the entropy of π_θ over the last quarter, nats in 100 updates."""
    last = run["entropy"][-max(2, len(run["entropy"]) // 4):]
    return float(np.polyfit(np.arange(len(last)), last, 1)[0]) * 100 / STEP


def flip_slope(run: dict) -> float:
    """How many more tokens choose other experts in a layer than in the one before, in the first updates."""
    return float(np.polyfit(range(len(run["flips_first"])), run["flips_first"], 1)[0])


def kl_spikes(run: dict) -> bool:
    """Whether the KL of the engines, by means of 8 updates, ever exceeds 3 times the median of all before."""
    kl = run["mismatch_kl"]
    return any(kl[i] > 3 * np.median(kl[:i]) for i in range(4, len(kl)))


class Runs:
    """Runs by cell and seed; comparisons over the seeds that both cells have."""
    def __init__(self, rows: dict[tuple[str, int], dict]):
        self.cells, self.asked = {}, set()  # asked: cells that were looked at, for a verdict to see
        for (cell, seed), row in sorted(rows.items()):
            self.cells.setdefault(cell, {})[seed] = row

    def per_seed(self, cell: str, outcome) -> dict[int, float]:
        if cell not in self.cells:
            raise NotRun(cell)
        self.asked.add(cell)
        return {seed: outcome(row) for seed, row in self.cells[cell].items()}

    def mean(self, cell: str, outcome) -> Interval:
        return intervals.mean([*self.per_seed(cell, outcome).values()])

    def difference(self, cell: str, other: str, outcome=end) -> Interval:
        """Paired by seed."""
        a, b = self.per_seed(cell, outcome), self.per_seed(other, outcome)
        if not a.keys() & b.keys():
            raise NotRun(f"{cell} and {other} in one seed")
        return intervals.mean([a[seed] - b[seed] for seed in a.keys() & b.keys()])

    def failures(self, cell: str) -> Interval:
        values = [*self.per_seed(cell, failed).values()]
        return intervals.share(sum(values), len(values))

    def fit_for_replay(self, cell: str) -> bool:
        """Whether routing is enough of the gap, without replay, for replay to be able to matter."""
        shares = self.per_seed(cell, lambda run: run["routing_share"][-1][1] or 0)
        extreme = self.per_seed(cell, lambda run: np.mean(run["extreme_token_fraction"]))
        return np.mean([*shares.values()]) >= FIT["share"] and np.mean([*extreme.values()]) >= FIT["extreme"]


def table(runs: Runs) -> str:
    """Every outcome of every cell: means over seeds, the primary one with its interval. Replay can help where a cell
    without it is fit for it; R2 and R3 run elsewhere too, as controls: there they should gain nothing."""
    lines = ["| cell | seeds | end | end, training engine | area | fail, median update | staleness KL, largest |"
             " KL of the engines | F(2) | routing share | replay can help |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for cell, of in runs.cells.items():
        rows, ends = [*of.values()], runs.mean(cell, end)
        average = lambda outcome: np.mean([outcome(row) for row in rows])  # noqa: E731
        late = [at for at in map(updates_until_failure, rows) if at is not None]
        shares = [share for row in rows if (share := row["routing_share"][-1][1]) is not None]
        lines.append("| " + " | ".join([
            cell.replace(" | ", ", "), str(len(rows)), f"{ends.mean:.3f} [{ends.low:.3f}, {ends.high:.3f}]",
            f"{average(trained_end):.3f}", f"{average(area):.3f}",
            f"{len(late)}, {np.median(late):.0f}" if late else "0", f"{max(map(staleness_tail, rows)):.1e}",
            f"{np.exp(average(mismatch)):.1e}", f"{average(lambda row: np.mean(row['extreme_token_fraction'])):.1e}",
            f"{np.mean(shares):.2f}" if shares else "no gap",
            "" if "replay" in METHODS[cell.split(" | ")[2]] else "yes" if runs.fit_for_replay(cell) else "no"]) + " |")
    return "\n".join(lines) + "\n"
