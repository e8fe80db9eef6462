"""What samples say of a policy on each problem, and means over problems with their intervals."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL, RESAMPLES = 0.95, 9999


def ks(n: int) -> list[int]:
    """The k of pass@k and maj@k that n responses can tell of: powers of two, and n."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k responses passes, unbiased, from n of which c do: 1 less the share
    of all choices of k that have none of the c (arXiv 2107.03374, equation 1)."""
    choices = math.comb(n, k)
    return (choices - math.comb(n - c, k)) / choices  # of whole numbers: for k = 1 it is c / n


def maj_at_k(answers: Sequence[str | None], passed: Sequence[bool], k: int) -> float:
    """The chance that the answer which most of k responses give passes, unbiased: a mean over the
    n // k blocks of k responses, in order. Of t answers that tie each counts 1/t, as if one were
    drawn; None is no vote, and a block without a vote counts 0. An answer passes as far as the
    responses do that give it: with a reward that looks at more, not always all or none."""
    starts = range(0, len(answers) - k + 1, k)
    return sum(majority(answers[i:i + k], passed[i:i + k]) for i in starts) / len(starts)


def majority(answers: Sequence[str | None], passed: Sequence[bool]) -> float:
    votes = defaultdict(list)
    for answer, passes in zip(answers, passed, strict=True):
        if answer is not None:
            votes[answer].append(passes)
    most = max(map(len, votes.values()), default=0)
    winners = [sum(group) / most for group in votes.values() if len(group) == most]
    return sum(winners) / len(winners) if winners else 0.0


def of_problem(row: dict, threshold: float) -> dict[str, float]:
    """Name -> value, of the n responses to one problem. row: rewards, answers (None where the
    reward extracts none), lengths and truncated, each a list of n. A response passes with a reward
    of `threshold` or more. maj@1, and maj@2 with its ties, are pass@1 and left out."""
    n, passed = len(row["rewards"]), [reward >= threshold for reward in row["rewards"]]
    values = {f"mean@{n}": sum(row["rewards"]) / n}
    values |= {f"pass@{k}": pass_at_k(n, sum(passed), k) for k in ks(n)}
    if row["answers"] is not None:
        values |= {f"maj@{k}": maj_at_k(row["answers"], passed, k)
                   for k in ks(n) if k > 1 or n == 1}
    return values | {"response_length": sum(row["lengths"]) / n,
                     "truncation_rate": sum(row["truncated"]) / n}


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """mean, low and high of a mean over problems, of which these stand for others of their kind:
    the BCa bootstrap, by scipy, whose 95 % interval stays where values can be. It is too narrow
    for few problems, some 20. None where it cannot be had, since all values are the same."""
    values = np.asarray(values, float)
    low = high = math.nan
    if np.ptp(values) > 1e-9 * np.abs(values).max():  # more than rounding
        found = stats.bootstrap(
            (values,), np.mean, n_resamples=RESAMPLES, batch=max(1, 10**6 // len(values)),
            confidence_level=LEVEL, method="BCa", rng=np.random.default_rng(0))
        low, high = map(float, found.confidence_interval)
    known = math.isfinite(low) and math.isfinite(high)
    return {"mean": float(values.mean()), "low": low if known else None,
            "high": high if known else None}


def estimate(problems: list[dict[str, float]],
             minus: list[dict[str, float]] | None = None) -> dict[str, dict]:
    """Name -> interval over problems; with `minus`, of the differences to the same problems of
    another model, in the same order."""
    return {name: interval([problem[name] - (minus[i][name] if minus else 0)
                            for i, problem in enumerate(problems)]) for name in problems[0]}
