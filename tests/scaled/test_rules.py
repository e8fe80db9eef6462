"""Each rule at its limit, and below and above it; and all of them against a slow version in plain Python."""
import math
import random
import statistics
from dataclasses import replace

import numpy as np
import pytest

from scaled import rules, sync
from scaled.rules import NAMES, RULES, events, unjudged, window_of


def rows_of(metric, values, **others):
    """One row an update, from 1."""
    return [{"update": i + 1, metric: x} | {name: y[i] for name, y in others.items()} for i, x in enumerate(values)]


def case(name, edge):
    """Rows in which one rule compares a mean with `edge` times its limit, at the end."""
    rule = RULES[NAMES.index(name)]
    flat = {rule.flat: [0.5] * 200} if rule.flat else {}
    constant = {"mismatch_kl_high": 0.02, "extreme_tokens_high": 0.1, "staleness_kl_high": 0.1,
                "weights_truncated": 0.01, "groups_equal": 0.8}
    if name in constant:
        values = [constant[name] * edge] * 8
    elif name in ("mismatch_kl_grows", "extreme_tokens_grow"):  # windows that grow by 1.4
        values = [0.002 * (1.4 * edge) ** k for k in range(4) for _ in range(8)]
    elif name == "entropy_falls":
        values = [2.0] * 8 + [1.9] * 24 + [1.0 * edge] * 8
    elif name == "entropy_rises":
        values = [2.0] * 8 + [1.0] * 8 + [1.5 * edge] * 8
    elif name == "agreement_falls":
        values = [[0.9, 0.5]] * 8 + [[0.9, 0.4 * edge]] * 8
    elif name == "truncation_rises":
        values = [0.5] * 8 + [0.6 * edge] * 8
    elif name == "gradient_grows":
        values = [1.0] * 32 + [5.0 * edge] * 8
    elif name == "sync_differs":
        values = [None, 1e-3, None, 2e-3 * edge]
    else:  # below_best: 5 % of the best is more than its noise
        values = [1.0] * 32 + [0.95 * edge] * (16 if rule.windows else 1)
    return rule, rows_of(rule.metric, values, **flat)


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_holds_beyond_its_limit_only(name):
    rule = RULES[NAMES.index(name)]
    outward = 1 + 1e-9 if rule.side == "above" else 1 - 1e-9
    for edge, holds in ((outward, True), (2 - outward, False), (1.0, False)):
        rule, rows = case(name, edge)
        if edge == 1.0 and rule.limit is rules.thrice:
            continue  # 1.4³ is not exact
        found = [event for event in events(rows, rules=[rule])]
        assert [event.rule for event in found] == [name] * holds, edge
        assert not found or found[0].update == len(rows), "the mean is beyond at its last row"
    assert len({r.name for r in RULES}) == len(RULES)


def slow(rows, rule, N):
    """The updates at which a rule begins to hold, by loops over lists."""
    def smallest(x):
        return min(x) if isinstance(x, list) else x
    kept = [row for row in rows if row.get(rule.metric) is not None and row[rule.metric] != []]
    x = [float(smallest(row[rule.metric])) for row in kept]
    w = N * -(-8 // N) if rule.windows else 1
    n = w * (rule.windows or 1)
    means, others, held, found = [], [], False, []
    for i in range(len(x)):
        if (i + 1) % w or i + 1 < n:
            continue
        m, limit = sum(x[i - n + 1:i + 1]) / n, None
        flat = sum(row[rule.flat] for row in kept[i - n + 1:i + 1]) / n if rule.flat else 0
        match rule.limit:
            case rules.fixed:
                limit = rule.number
            case rules.of_first if means:
                limit = rule.number * means[0]
            case rules.over_first if means:
                limit = means[0] + rule.number
            case rules.under_first if means:
                limit = means[0] - rule.number
            case rules.of_lowest if means:
                limit = rule.number * min(means)
            case rules.of_earlier if len(means) > 3:
                limit = rule.number * means[-4]
            case rules.of_median if len(means) > 3:
                limit = rule.number * statistics.median(means[-4:])
            case rules.thrice if len(means) > 2:
                grew = [means[-k] > rule.number * means[-k - 1] for k in (1, 2)]
                limit = rule.number * means[-1] if all(grew) else math.inf
            case rules.below_best if means and i > 3:
                steps = [abs(x[j + 1] - x[j]) for j in range(i)][-256:]
                error = statistics.median(steps) / 0.6745 / math.sqrt(2) / math.sqrt(n)
                limit = max(means) - max(rule.number * abs(max(means)), 4 * math.sqrt(2) * error)
        holds = limit is not None and (m > limit if rule.side == "above" else m < limit) and m > rule.floor
        if rule.flat and len(others) > 3 and flat > others[-4]:
            holds = False
        found += [kept[i]["update"]] if holds and not held else []
        held = holds
        means.append(m)
        others.append(flat)
    return found


@pytest.mark.parametrize("N", [1, 3, 8, 12])
def test_all_rules_against_a_slow_version(N):
    """A walk whose steps are large enough for every rule to hold sometimes."""
    draw, seen = random.Random(N), set()
    for _ in range(4):
        rows = [{"update": i + 1} for i in range(300)]
        for rule in RULES:
            level = {rules.fixed: rule.number}.get(rule.limit, 1.0) * 0.7
            for row in rows:
                level *= math.exp(draw.gauss(0.04 if rule.limit is rules.thrice else 0.0, 0.15))
                value = level * math.exp(draw.gauss(0, 0.1))
                row[rule.metric] = [value, value + 1] if rule.metric == "routing_agreement" else value
                if rule.metric in ("score", "sync_difference") and row["update"] % 7:
                    row[rule.metric] = None
        found = events(rows, N)
        for rule in RULES:
            got = [event.update for event in found if event.rule == rule.name]
            assert got == slow(rows, rule, N), rule.name
            seen |= {rule.name} if got else set()
    assert N > 1 or seen == set(NAMES)


def test_noise_alone_is_rarely_a_fall():
    """The standard error comes from the steps of the metric. Runs of independent values, deviation .1: the shares
    that fall by 4 s.e. below their best are those that the rule's source says, and almost all fall by 5 %. A true
    fall of .25 is seen in 24 updates."""
    generator = np.random.default_rng(0)
    for n, least, most in ((160, 0, 0.02), (1000, 0.1, 0.22)):
        alarms = low = 0
        for _ in range(200):
            values = generator.normal(0.5, 0.1, n)
            alarms += bool(events(rows_of("reward", values.tolist()), rules=RULES[:1]))
            means = values[:n // 16 * 16].reshape(-1, 16).mean(1)
            low += means.min() < 0.95 * means.max()
        assert low > 180 and least <= alarms / 200 <= most, (n, alarms)
    values = generator.normal(0.5, 0.1, 160)
    values[100:] -= 0.25
    found, = events(rows_of("reward", values.tolist()), rules=RULES[:1])
    assert 100 < found.update <= 124 and found.since == found.update - 15


def test_growth_and_sync_below_their_floor_are_silent():
    grows = [RULES[NAMES.index("mismatch_kl_grows")]]
    for top, holds in ((0.99e-3, False), (1.01e-3, True)):
        values = [top / 2 ** (3 - k) for k in range(4) for _ in range(8)]
        assert bool(events(rows_of("mismatch_kl", values), rules=grows)) == holds
    differs = RULES[NAMES.index("sync_differs")]
    assert differs.floor == sync.NOISE  # below it no difference means anything
    assert not events(rows_of("sync_difference", [1e-6, 9e-6]), rules=[differs])
    # one jump is no growth, however long the metric stays there
    assert not events(rows_of("mismatch_kl", [0.002] * 32 + [0.019] * 32), rules=grows)


def test_entropy_may_fall_while_the_reward_rises():
    rule = [RULES[NAMES.index("entropy_falls")]]
    entropy = [2.0] * 40 + [0.5] * 8
    rising = [0.1] * 40 + [0.2] * 8
    assert not events(rows_of("entropy", entropy, reward=rising), rules=rule)
    assert events(rows_of("entropy", entropy, reward=rising[::-1]), rules=rule)


def test_an_event_is_the_first_update_of_a_stretch():
    high, low = [0.03], [0.0]
    found = events(rows_of("mismatch_kl", high * 20 + low * 30 + high * 20))
    rule = [(event.update, event.since) for event in found if event.rule == "mismatch_kl_high"]
    assert rule == [(8, 1), (56, 49)]  # 6 of 8 at .03 are above .02


def test_a_mean_covers_whole_rollout_batches():
    assert [window_of(N) for N in (1, 2, 3, 4, 5, 8, 12, 32)] == [8, 8, 9, 8, 10, 8, 12, 32]
    staleness = [0.0, 0.1, 0.2, 0.4] * 8  # a mean of .175, and up to .4 in single mini-batches
    assert [event.update for event in events(rows_of("staleness_kl", staleness), 4)] == [8]
    assert not events(rows_of("staleness_kl", [x / 2 for x in staleness]), 4)


def test_thinned_curves_are_judged_by_points():
    """A point for 8 updates, N = 16: a window is two points."""
    rows = [{"update": 8 * (i + 1), "mismatch_kl": x} for i, x in enumerate([0.0, 0.03, 0.0, 0.05, 0.05])]
    found = events(rows, 16, 8)
    assert [(event.update, event.since, event.value) for event in found] == [(32, 17, 0.025)]
    assert [event.update for event in events(rows, 1, 8)] == [16, 32]


def test_what_is_no_number_is_an_event():
    for value in (math.nan, math.inf):
        found = events(rows_of("mismatch_kl", [0.001] * 8 + [value] + [0.001] * 7))
        assert [event.update for event in found if event.rule == "mismatch_kl_high"] == [16]
    assert str(events(rows_of("grad_norm", [1.0] * 8 + [math.nan] * 8))[0]) == (
        "update 16: gradient_grows: grad_norm is not a number")


def test_a_rule_without_its_metric_is_silent_and_named():
    assert events([]) == [] and unjudged([]) == {rule.name: f"no {rule.metric}" for rule in RULES}
    rows = rows_of("mismatch_kl", [0.03] * 40, routing_agreement=[None] * 40, score=[None] * 39 + [0.1])
    assert {event.rule for event in events(rows)} == {"mismatch_kl_high"}
    reasons = unjudged(rows)
    assert reasons["agreement_falls"] == "no routing_agreement" and reasons["score_falls"].startswith("too few rows")
    assert "mismatch_kl_high" not in reasons and "mismatch_kl_grows" not in reasons
    short = unjudged(rows[:7])
    assert short["mismatch_kl_high"] == "too few rows with mismatch_kl"


def test_an_event_fits_a_line():
    for rule in RULES:
        event = rules.Event(100_000, 1, rule.name, rule.metric, -1.23456e-10, -1.23456e-10)
        assert len(str(event)) <= 80
        assert len(rule.default) <= 42 and rule.source
        assert replace(rule) == rule
