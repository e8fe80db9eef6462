"""pass@k and maj@k against all choices of k responses, the interval against all resamples."""
import itertools
import math
import random
from collections import Counter
from statistics import NormalDist, fmean

import pytest

from scaled.estimators import LEVEL, RESAMPLES, estimate, interval, ks, maj_at_k, of_problem, pass_at_k


def test_pass_at_k_is_the_mean_over_all_choices_of_k_responses():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            passes = [True] * c + [False] * (n - c)
            choices = [any(choice) for choice in itertools.combinations(passes, k)]
            assert pass_at_k(n, c, k) == pytest.approx(fmean(choices), abs=1e-12), (n, c, k)


def test_pass_at_k_of_many_responses_is_the_product_of_the_paper():
    for n, c, k in ((200, 3, 100), (1000, 10, 250), (10_000, 1, 5000)):
        product = math.prod(1 - k / i for i in range(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(1 - product, rel=1e-9)


def slow_majority(responses):
    """The expectation over a draw among the most frequent answers, and then among who gives it."""
    counts = Counter(answer for answer, _ in responses if answer is not None)
    drawn = [answer for answer in counts if counts[answer] == max(counts.values())]
    return fmean(fmean(passes for answer, passes in responses if answer == one) for one in drawn) if drawn else 0.0


def test_maj_at_k_has_no_bias():
    """Its mean over all orders of the responses is the mean over all choices of k of them."""
    draw = random.Random(0)
    for _ in range(6):
        answers = [draw.choice(["3", "5", "8", None]) for _ in range(6)]
        responses = [(answer, answer == "8" or answer == "5" and draw.random() < 0.5) for answer in answers]
        for k in (1, 2, 3, 4, 6):
            orders = [maj_at_k(*zip(*order), k) for order in itertools.permutations(responses)]
            choices = [slow_majority(choice) for choice in itertools.combinations(responses, k)]
            assert fmean(orders) == pytest.approx(fmean(choices), abs=1e-9)


@pytest.mark.parametrize("answers, k, value", [
    ("8853", 4, 1), ("5538", 4, 0), ("8855", 4, 1 / 2), ("8537", 4, 1 / 4), ("8__", 3, 1), ("___", 3, 0),
    ("885", 2, 1),  # one block: the last response is in none
    ("8_5588", 3, (1 / 2 + 1) / 2),  # two blocks, of which the first is a tie
])
def test_ties_and_responses_without_an_answer(answers, k, value):
    answers = [None if answer == "_" else answer for answer in answers]
    assert maj_at_k(answers, [answer == "8" for answer in answers], k) == pytest.approx(value)


def bca(values):
    """Mean and BCa interval of few values (Efron 1987) from every resample there is: the levels at which the
    distribution of the mean is to be cut, and that distribution, sorted."""
    normal, mean, n = NormalDist(), fmean(values), len(values)
    means = sorted(fmean(choice) for choice in itertools.product(values, repeat=n))
    below, ties = sum(x < mean - 1e-12 for x in means), sum(abs(x - mean) <= 1e-12 for x in means)
    bias = normal.inv_cdf((below + ties / 2) / len(means))
    left_out = [fmean(values[:i] + values[i + 1:]) for i in range(n)]
    off = [fmean(left_out) - x for x in left_out]
    skew = sum(x**3 for x in off) / (6 * sum(x**2 for x in off) ** 1.5)
    cuts = [normal.inv_cdf((1 - LEVEL) / 2), normal.inv_cdf((1 + LEVEL) / 2)]
    return [normal.cdf(bias + (bias + z) / (1 - skew * (bias + z))) for z in cuts], means


def test_the_interval_is_that_of_all_resamples():
    """scipy draws 9,999 of 46,656: each end cuts off what it should within 4 standard deviations."""
    values = [0.03, 0.95, 0.11, 0.22, 0.41, 0.27]
    found = interval(values)
    assert found["mean"] == pytest.approx(fmean(values))
    levels, means = bca(values)
    for end, level in zip((found["low"], found["high"]), levels):
        error = 4 * math.sqrt(level * (1 - level) / RESAMPLES)
        assert sum(x < end - 1e-12 for x in means) / len(means) <= level + error
        assert sum(x <= end + 1e-12 for x in means) / len(means) >= level - error
    assert 0.03 < found["low"] < found["mean"] < found["high"] < 0.95


def test_an_interval_stays_where_shares_can_be_and_is_none_where_nothing_varies():
    found = interval([1.0] * 29 + [0.0])
    assert 0.8 < found["low"] < found["mean"] < found["high"] <= 1
    assert interval([1.0] * 30) == {"mean": 1.0, "low": None, "high": None}
    assert interval([0.5]) == {"mean": 0.5, "low": None, "high": None}
    assert interval([0.2, 0.4, 0.9]) == interval([0.2, 0.4, 0.9])  # the same resamples each time


def test_differences_are_of_the_same_problems():
    """Problems that differ far more than the models: only in pairs can one tell the models apart."""
    draw = random.Random(1)
    a = [{"pass@1": draw.random() * 0.9} for _ in range(50)]
    b = [{"pass@1": problem["pass@1"] + draw.random() * 0.04} for problem in a]
    pairs = estimate(b, a)["pass@1"]
    assert pairs == interval([y["pass@1"] - x["pass@1"] for x, y in zip(a, b)])
    assert 0 < pairs["low"] < pairs["mean"] < pairs["high"] < 0.04
    alone = [estimate(problems)["pass@1"] for problems in (a, b)]
    assert alone[0]["high"] > alone[1]["low"]


def test_what_a_problem_says():
    row = dict(rewards=[1.0, 0.5, -1.0, 1.0, 2.0], answers=["8", "5", None, "8", "9"], lengths=[3, 4, 5, 6, 7],
               truncated=[False, False, True, False, False])
    values = of_problem(row, threshold=1.0)
    assert ks(5) == [1, 2, 4, 5] and ks(32) == [1, 2, 4, 8, 16, 32] and ks(1) == [1]
    assert values == {
        "mean@5": 0.7, "pass@1": pytest.approx(3 / 5), "pass@2": pytest.approx(1 - 1 / 10), "pass@4": 1.0,
        "pass@5": 1.0, "maj@2": (1 / 2 + 1) / 2, "maj@4": 1.0, "maj@5": 1.0, "response_length": 5.0,
        "truncation_rate": 0.2}
    assert of_problem(row, threshold=0.5)["pass@1"] == pytest.approx(4 / 5)
    assert not any(name.startswith("maj") for name in of_problem(row | {"answers": None}, 1.0))
