"""Intervals, by scipy, and the one rule that turns an interval into a decision."""
from dataclasses import dataclass

import numpy as np
from scipy import stats

REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "contradicted", "undecided"
ABSENT, NOT_RUN = "not at this scale", "not run yet"
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    n: int  # seeds

    def __str__(self):
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], {self.n} seeds"

    def above(self, bound: float) -> str:
        """Whether it is so that the mean lies above a bound."""
        return REPRODUCED if self.low > bound else CONTRADICTED if self.high < bound else UNDECIDED

    def below(self, bound: float) -> str:
        return Interval(-self.mean, -self.high, -self.low, self.n).above(-bound)

    def within(self, margin: float) -> str:
        """Whether it is so that the mean lies nearer to 0 than the margin."""
        if -margin < self.low and self.high < margin:
            return REPRODUCED
        return CONTRADICTED if self.low > margin or self.high < -margin else UNDECIDED


def mean(values) -> Interval:
    """Student's t interval; infinite for a single value."""
    values = np.asarray(values, float)
    if len(values) < 2 or np.ptp(values) == 0:  # of equal values scipy gives NaN
        width = np.inf if len(values) < 2 else 0.0
        return Interval(float(values.mean()), values.mean() - width, values.mean() + width, len(values))
    low, high = stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    return Interval(float(values.mean()), float(low), float(high), len(values))


def share(count: int, n: int) -> Interval:
    """Clopper-Pearson."""
    interval = stats.binomtest(count, n).proportion_ci(LEVEL, "exact")
    return Interval(count / n, float(interval.low), float(interval.high), n)


def all_of(decisions: list[str]) -> str:
    """A claim of several parts holds if all of them do, and is refuted by one that is refuted."""
    return next(x for x in (CONTRADICTED, NOT_RUN, ABSENT, UNDECIDED, REPRODUCED) if x in decisions)
