"""The objectives beside MiniRL, the rules of the figures, and a quick grid from end to end."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import figures
import objectives

B, T, G = 6, 5, 3


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logprobs, old, rollout = (-2 * torch.rand(B, T, generator=generator) for _ in range(3))
    mask = torch.arange(T) < torch.tensor([5, 3, 1, 4, 2, 2])[:, None]
    return logprobs.requires_grad_(), old, rollout, torch.randn(B, generator=generator), mask


def clipped(ratio, advantage, low, high):
    """The objective min(r Â, clip(r) Â) and its derivative in log r."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    if ratio * advantage <= bounded * advantage:
        return ratio * advantage, ratio * advantage
    return bounded * advantage, 0.0


def slow(name, logprobs, old, rollout, advantages, mask):
    """Each objective, a token at a time -> loss, gradient in logprobs."""
    loss, gradient, n_tokens = 0.0, torch.zeros(B, T), int(mask.sum())
    for i in range(B):
        tokens, advantage = [t for t in range(T) if mask[i, t]], advantages[i].item()
        if name == "gspo":
            ratio = math.exp(sum((logprobs[i, t] - old[i, t]).item() for t in tokens) / len(tokens))
            value, slope = clipped(ratio, advantage, 3e-4, 4e-4)
            loss -= value / B
        for t in tokens:
            ratio = math.exp(logprobs[i, t] - old[i, t])
            if name == "grpo":
                value, slope = clipped(ratio, advantage, 0.2, 0.27)
                loss, gradient[i, t] = loss - value / len(tokens) / B, -slope / len(tokens) / B
            elif name == "cispo":
                gradient[i, t] = -min(max(ratio, 0.8), 1.27) * advantage / n_tokens
                loss += (gradient[i, t] * logprobs[i, t]).item()
            elif name == "gspo":
                gradient[i, t] = -slope / len(tokens) / B
            else:
                pi, mu = math.exp(logprobs[i, t]), math.exp(rollout[i, t])
                pushed_on = advantage > 0 and pi > mu or advantage < 0 and pi < mu
                if not (pushed_on and abs(pi - mu) > 0.15):
                    gradient[i, t] = -min(pi / mu, 5) * advantage / B
                    loss += (gradient[i, t] * logprobs[i, t]).item()
    return loss, gradient


@pytest.mark.parametrize("name", ["grpo", "cispo", "gspo", "dppo"])
def test_objectives_against_a_token_at_a_time(case, name):
    logprobs, *_, mask = case
    loss, gate = getattr(objectives, f"{name}_loss")(*case, n_sequences=B, n_tokens=int(mask.sum()))
    loss.backward()
    expected, gradient = slow(name, *(x.detach() for x in case))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logprobs.grad, gradient)
    assert gate.shape == mask.shape and gate.dtype == torch.bool
    assert torch.equal(gate[mask], (gradient != 0)[mask])
    assert name == "cispo" or not gate[mask].all(), "the case needs tokens without gradient"


@pytest.mark.parametrize("name", ["grpo", "cispo", "gspo", "dppo"])
def test_padding_has_no_influence_on_objectives(case, name):
    *_, advantages, mask = case
    loss_fn, kwargs = getattr(objectives, f"{name}_loss"), dict(n_sequences=B, n_tokens=int(mask.sum()))
    spoiled = [x.detach().masked_fill(~mask, math.nan) for x in case[:3]]
    spoiled[0].requires_grad_()
    loss, _ = loss_fn(*spoiled, advantages, mask, **kwargs)
    loss.backward()
    assert torch.equal(loss.detach(), loss_fn(*case, **kwargs)[0].detach())
    assert spoiled[0].grad[~mask].abs().max() == 0


def test_standardised_advantages():
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1])
    expected = [(1 - 1 / 3) / math.sqrt(2 / 9), *[-(1 / 3) / math.sqrt(2 / 9)] * 2, 0, 0, 0]
    torch.testing.assert_close(objectives.standardised_advantages(rewards, G), torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ratio, failing", [(0.84, True), (0.91, True), (0.94999, True), (0.95, False), (0.97, False)])
def test_failing_as_applied_to_the_published_curves(ratio, failing):
    """End over peak of - IS, of R2 at N = 2 without clip and at N = 8 with, of R3 + clip at N = 8."""
    assert figures.fails(ratio, 1.0) is failing
    assert not figures.collapses(ratio, 1.0) and figures.collapses(0.49, 1.0) and not figures.collapses(0.5, 1.0)


def test_smoothing_is_the_mean_of_five():
    scores = [0.1, 0.5, 0.2, 0.9, 0.4, 0.6, 0.3]
    assert figures.smooth(scores) == pytest.approx([sum(scores[i : i + 5]) / 5 for i in range(3)])


@pytest.mark.parametrize("count, n", [(0, 8), (3, 8), (8, 8)])
def test_clopper_pearson_bounds_are_the_counts_tail_probabilities(count, n):
    low, high = figures.clopper_pearson(count, n)
    tail = lambda p, ks: sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in ks)  # noqa: E731
    assert low == 0 if count == 0 else tail(low, range(count, n + 1)) == pytest.approx(0.025)
    assert high == 1 if count == n else tail(high, range(count + 1)) == pytest.approx(0.025)


def test_mean_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.3, 2.0, (4000, 8))
    covered = np.mean([low <= 0.3 <= high for _, low, high in map(figures.mean_interval, draws)])
    assert abs(covered - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5


def synthetic(scores, entropy=(0.3,) * 16, kl=(1e-3,) * 40):
    return {"score": [[8 * i, score] for i, score in enumerate(scores)], "entropy": list(entropy),
            "mismatch_kl": list(kl), "reward": [0.5] * 16, "flips": [0.01, 0.05, 0.09]}


def test_entropy_slope_is_taken_before_the_failure():
    rising_then_falling = [0.01 * i for i in range(64)] + [0.6 - 0.01 * i for i in range(32)]
    # means of five evaluations: .5, .5, .5, .48, then .46 < .95 * .5 at the evaluation of update 64
    failing = synthetic([0.5] * 7 + [0.4] * 2 + [0.1] * 4, rising_then_falling)
    assert figures.failed_run(failing)
    assert figures.slope_before_failure(failing) == pytest.approx(0.01)
    assert figures.slope_before_failure(synthetic([0.5] * 13, rising_then_falling)) == pytest.approx(-0.01)


def test_kl_spike_is_three_times_the_running_median():
    assert not figures.kl_spike(synthetic([1], kl=[1e-3] * 30 + [2.9e-3] * 10))
    assert figures.kl_spike(synthetic([1], kl=[1e-3] * 30 + [3.2e-3] * 10))


def test_the_grid_has_every_cell_once_and_all_that_the_verdicts_ask_for():
    cells = figures.grid()
    assert len({cell.key for cell in cells}) == len(cells)
    off_policy = {(c.options["mini_batches"], c.options["replay"], c.options["clip"]) for c in cells if "clip" in c.options}
    assert off_policy == {(N, r, clip) for N in (2, 4, 8) for r in ("none", "R2", "R3") for clip in (True, False)}
    for cell in cells:
        assert cell.config(0, quick=False).eval_prompts >= 1024
    assert len(figures.SEEDS) >= 8 and not set(figures.SEEDS) & set(figures.PILOT_SEEDS)
    methods = {method for *_, names in figures.FIGURES.values() for method in names}
    assert methods <= figures.STYLES.keys()


def all_runs(scores_of):
    """Synthetic runs of the whole grid: scores_of(cell, seed) -> scores."""
    return figures.Runs({(cell.key, seed): synthetic(scores_of(cell, seed))
                         for cell in figures.grid() for seed in figures.SEEDS})


def decisions(runs):
    return [decision for _, _, decision in figures.verdicts(runs)]


def test_verdicts_without_any_failure():
    """Every arm at the same .9: nothing is above anything, nothing fails, what needs a failure is absent."""
    noise = np.random.default_rng(0).normal(0, 1e-3, (1000,))
    found = decisions(all_runs(lambda cell, seed: [0.9 + noise[31 * len(cell.key) % 97 + seed]] * 13))
    assert len(found) == 20
    for stable in (2, 8, 13):
        assert found[stable - 1] == figures.REPRODUCED
    for failing in (3, 6, 7, 11, 12):
        assert found[failing - 1] == figures.CONTRADICTED
    for needs_failure in (17, 18, 19):
        assert found[needs_failure - 1] == figures.ABSENT
    assert found[13] == figures.REPRODUCED and found[15] == figures.REPRODUCED


def test_verdicts_follow_the_failures():
    failing = {"N=2 | none | stressed", "N=4 | R2 | stressed", "N=4 | R3 | stressed", "N=4 | none | stressed",
               "N=8 | R3 | stressed", "N=2 | R3 | stressed", "N=4 | none + clip | stressed"}
    found = decisions(all_runs(lambda cell, seed: [0.9] * 8 + [0.2 if cell.key in failing else 0.9] * 5))
    assert found[7 - 1] == found[11 - 1] == found[18 - 1] == figures.REPRODUCED
    assert found[8 - 1] == figures.REPRODUCED
    found = decisions(all_runs(lambda cell, seed: [0.99] * 13))
    assert found[14 - 1] == figures.ABSENT  # all arms above .98: equal peaks mean nothing


def test_a_quick_grid_runs_resumes_and_draws(tmp_path):
    command = [sys.executable, str(ROOT / "tutorials" / "figures.py"), "all", "--quick", "--results", "results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    core = tmp_path / "results" / "core.jsonl"
    rows = [json.loads(line) for line in core.read_text().splitlines()]
    assert {row["cell"] for row in rows} == {cell.key for cell in figures.grid()}
    assert done.stdout.count("| **") == 20
    for name in (*figures.FIGURES, "summary"):
        assert (tmp_path / "results" / f"{name}.svg").read_text().lstrip().startswith("<?xml")
    kept = rows[:-2]
    core.write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"cell": "N=')  # cut short
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=600).returncode == 0
    again = [json.loads(line) for line in core.read_text().splitlines()]
    assert again[: len(kept)] == kept
    by_key = {(row["cell"], row["seed"]): row for row in again}
    assert by_key == {(row["cell"], row["seed"]): row for row in rows}  # a run repeats exactly
