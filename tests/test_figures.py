"""The figures: outcomes, intervals and verdicts by hand; the runner from end to end."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, sample_rollout

import nano_moe_rl as nano
from figures import claims, grid, intervals, mechanism, outcomes, runner
from figures.intervals import ABSENT, CONTRADICTED, NOT_RUN, REPRODUCED, UNDECIDED
from scaled.study import Study

CELLS = {cell.key: cell for block in grid.BLOCKS for cell in block.cells}


@pytest.mark.parametrize("count, n", [(0, 8), (3, 8), (8, 8)])
def test_clopper_pearson_bounds_are_the_counts_tail_probabilities(count, n):
    of = intervals.share(count, n)
    tail = lambda p, ks: sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in ks)  # noqa: E731
    assert of.low == 0 if count == 0 else tail(of.low, range(count, n + 1)) == pytest.approx(0.025)
    assert of.high == 1 if count == n else tail(of.high, range(count + 1)) == pytest.approx(0.025)


def test_mean_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.3, 2.0, (4000, 8))
    covered = np.mean([of.low <= 0.3 <= of.high for of in map(intervals.mean, draws)])
    assert abs(covered - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5


def test_one_seed_decides_nothing_and_equal_ones_have_no_width():
    assert intervals.mean([0.7]).above(0) == intervals.mean([0.7]).within(9) == UNDECIDED
    of = intervals.mean([0.75] * 4)
    assert (of.mean, of.low, of.high, of.n) == (0.75, 0.75, 0.75, 4)


@pytest.mark.parametrize("low, high, above, below, within", [
    (0.1, 0.2, REPRODUCED, CONTRADICTED, CONTRADICTED), (-0.2, -0.1, CONTRADICTED, REPRODUCED, CONTRADICTED),
    (-0.01, 0.02, UNDECIDED, UNDECIDED, REPRODUCED), (-0.2, 0.2, UNDECIDED, UNDECIDED, UNDECIDED),
    (0.01, 0.2, REPRODUCED, CONTRADICTED, UNDECIDED)])
def test_decisions_by_an_interval(low, high, above, below, within):
    of = intervals.Interval((low + high) / 2, low, high, 8)
    assert (of.above(0), of.below(0), of.within(0.03)) == (above, below, within)


def synthetic(end=0.7, reward=(0.3, 0.5, 0.6, 0.65, 0.7) * 4, **changes):
    """A run of 160 updates whose curves have a value every 8."""
    return dict(start=0.3, stopped=None, score=[[80, 0.8], [160, 0.9]], engine_score=[[80, 0.4], [160, end]],
                routing_share=[[80, 0.98], [160, 0.97]], reward=list(reward), entropy=[0.3] * 20,
                mismatch_kl=[1e-3] * 20, staleness_kl=[1e-3] * 20, extreme_token_fraction=[0.05] * 20,
                clip_fraction=[0.01] * 20, flips_first=[0.1, 0.2, 0.3], flips_last=[0.1, 0.2, 0.3]) | changes


def test_outcomes_of_a_run_by_hand():
    # Means of eight values, 64 updates: .8 at the twelfth, then .75 < .95 * .8.
    reward = [0.2] * 4 + [0.8] * 8 + [0.4] * 8
    run = synthetic(end=0.35, reward=reward, staleness_kl=[0.01] * 19 + [2.5])
    assert (outcomes.end(run), outcomes.best(run), outcomes.kept(run)) == pytest.approx((0.35, 0.8, 0.5))
    assert outcomes.area(run) == pytest.approx(sum(reward) / 20) and outcomes.staleness_tail(run) == 2.5
    assert outcomes.failed(run) and outcomes.updates_until_failure(run) == 104
    assert outcomes.updates_until_failure(synthetic(reward=[0.5] * 20)) is None
    assert outcomes.kept(run | dict(stopped="loss nan")) == 0
    assert outcomes.failed(synthetic(reward=[], stopped="at once"))


@pytest.mark.parametrize("ratio, failing", [(0.84, True), (0.91, True), (0.94999, True), (0.95, False), (0.97, False)])
def test_failing_as_applied_to_the_published_curves(ratio, failing):
    """Last over best of - IS, of R2 at N = 2 without clip and at N = 8 with, of R3 + clip at N = 8."""
    assert outcomes.failed(synthetic(reward=[1.0] * 10 + [ratio] * 10)) is failing


def test_entropy_and_spikes():
    rising = synthetic(entropy=[9.0] * 15 + [0.1, 0.2, 0.3, 0.4, 0.5])
    assert outcomes.entropy_slope(rising) == pytest.approx(0.1 * 100 / 8)
    assert not outcomes.kl_spikes(synthetic(mismatch_kl=[1e-3] * 10 + [2.9e-3] * 10))
    assert outcomes.kl_spikes(synthetic(mismatch_kl=[1e-3] * 10 + [3.2e-3] * 10))


def test_comparisons_are_paired_by_seed():
    ends = {"a": {1: 0.9, 2: 0.5, 3: 0.1}, "b": {2: 0.4, 1: 0.8, 9: 0.0}}
    runs = outcomes.Runs({(cell, seed): synthetic(end) for cell, of in ends.items() for seed, end in of.items()})
    of = runs.difference("a", "b")
    assert of.mean == pytest.approx(0.1) and of.n == 2
    with pytest.raises(outcomes.NotRun):
        runs.difference("a", "c")


def all_runs(run_of, seeds=range(1000, 1016)):
    """Synthetic runs of the whole grid: run_of(cell, seed, noise) -> run."""
    noise = np.random.default_rng(0)
    return outcomes.Runs({(key, seed): run_of(cell, seed, noise.normal(0, 1e-3))
                          for key, cell in CELLS.items() for seed in seeds})


def decisions(runs):
    return [verdict.decision for verdict in claims.verdicts(runs)]


def test_the_grid_has_what_the_claims_ask_for_and_fresh_seeds():
    assert len(claims.CLAIMS) == len({claim.statement for claim in claims.CLAIMS}) == 20
    assert NOT_RUN not in decisions(all_runs(lambda cell, seed, noise: synthetic(0.7 + noise)))
    seeds = {seed for block in grid.BLOCKS for seed in block.seeds}
    assert not seeds & ({*range(200, 204)} | {*grid.PILOT_SEEDS}) and mechanism.SEED not in seeds
    primary = next(block for block in grid.BLOCKS if block.name == "primary")
    assert len(primary.seeds) >= 16 and all(len(block.seeds) >= 2 for block in grid.BLOCKS)
    for cell in CELLS.values():
        assert cell.config(1000).eval_prompts >= 1024


def test_verdicts_where_everything_is_equal():
    found = decisions(all_runs(lambda cell, seed, noise: synthetic(0.7 + noise, reward=[0.69] * 20)))
    for lasting in (2, 8, 13):
        assert found[lasting - 1] == REPRODUCED
    for failing in (3, 6, 7, 11, 12):
        assert found[failing - 1] == CONTRADICTED
    assert found[4 - 1] == found[9 - 1] == found[14 - 1] == found[16 - 1] == REPRODUCED


def test_verdicts_follow_the_effects():
    gain = {"R3": 0.25, "none, no clip": -0.3, "R3, no clip": -0.2, "R2, no clip": -0.3, "DPPO": 0.1}

    def run(cell, seed, noise):
        failing = "no clip" in cell.method and cell.N == 32
        return synthetic(0.5 + noise + (gain.get(cell.method, 0) if cell.regime != "mild" else 0),
                         reward=[0.5] * 10 + [0.3 + noise if failing else 0.5] * 10,
                         mismatch_kl=[2e-3 if cell.method == "R3" else 0.4] * 20)

    found = decisions(all_runs(run))
    for reproduced in (5, 10, 11, 18, 19, 20):
        assert found[reproduced - 1] == REPRODUCED
    for contradicted in (1, 4, 9):
        assert found[contradicted - 1] == CONTRADICTED


def test_what_was_not_run_is_said_and_not_guessed():
    found = claims.verdicts(outcomes.Runs({}))
    assert {verdict.decision for verdict in found} == {NOT_RUN}
    assert "precondition not run yet" in claims.table(outcomes.Runs({}))


def test_a_claim_waits_for_all_planned_seeds():
    effect = {"R3": 0.2}
    few, all_of_them = (all_runs(lambda cell, seed, noise: synthetic(0.5 + noise + effect.get(cell.method, 0)), seeds)
                        for seeds in (range(1000, 1008), range(1000, 1016)))
    assert decisions(few)[4 - 1] == NOT_RUN and "so far (planned: 16)" in claims.verdicts(few)[4 - 1].measured
    assert decisions(all_of_them)[4 - 1] == CONTRADICTED


def test_replay_is_not_compared_where_it_cannot_matter():
    runs = all_runs(lambda cell, seed, noise: synthetic(0.7 + noise, routing_share=[[160, 0.3]]))
    for compares_replay in (1, 4, 5, 9, 10, 17):
        assert decisions(runs)[compares_replay - 1] == ABSENT
    runs = all_runs(lambda cell, seed, noise: synthetic(
        0.7 + noise, routing_share=[[160, 0.3 if cell.N == grid.MUCH else 0.9]]))
    assert [decisions(runs)[n - 1] == ABSENT for n in (9, 10, 17)] == [False, True, True]  # 17 asks for both N
    assert {line.split(" | ")[0].strip("| "): line.split(" | ")[-1] for line in outcomes.table(runs).splitlines()
            if "router, N=" in line and ", none |" in line} == {
        "router, N=1, none": "yes |", "router, N=8, none": "yes |", "router, N=32, none": "no |",
        "router, N=2, none": "yes |"}


def test_nothing_is_compared_when_the_base_recipe_fails_by_itself():
    for recipe in ("fp32", "long fp32", "long fp32, 1,024 updates"):
        def run(cell, seed, noise):
            return synthetic(reward=[0.7] * 10 + [0.3 if (cell.regime, seed) == (recipe, 1003) else 0.7] * 10)

        with pytest.raises(ValueError, match=f"{recipe} .*: 1 of 16 seeds fail"):
            claims.verdicts(all_runs(run))


def test_mechanism_takes_the_sampling_noise_out():
    """Batches are a signal and noise ten times as long; the signals' cosine is .6, their lengths 2 and 1."""
    generator = torch.Generator().manual_seed(0)
    d, n = 20_000, 48
    signal = torch.zeros(2, d)
    signal[0, 0], signal[1, 0], signal[1, 1] = 2, 0.6, 0.8
    batches = signal[:, None] + 0.02 * torch.randn(2, n, d, generator=generator)
    found = mechanism.measured(*batches)
    for name, true in (("cosine", 0.6), ("length", 2.0), ("snr", 2 / (0.02 * d**0.5))):
        mean, low, high = found[name]
        assert low < true < high and high - low < 0.6 * true, name


def test_replay_does_nothing_to_a_dense_model(config):
    """The control: with as many active experts as there are, R3's gradient is that of none, whatever the noise."""
    model = nano.Model(nano.replace(config, experts=2, top_k=2))
    rollout = mechanism.rollout(model, "fp8", 0.8, seed=0, responses=48)
    rollout.advantages = sample_rollout(model, "fp8", 12).rewards - 0.5
    none, R3 = (mechanism.gradient(model, mechanism.prepared(model, rollout, replay), mechanism.TOKEN)
                for replay in ("none", "R3"))
    assert none.norm() > 0
    torch.testing.assert_close(R3, none, atol=1e-6, rtol=1e-4)


def test_replay_of_the_response_keeps_the_prompts_own_experts(model, rollout):
    c = nano.replace(model.config, replay="R3", mini_batches=2, mini_batch=12)
    model.config = c
    batch = runner.replay_the_response(model, rollout)
    own = nano.policy(model, nano.replace(rollout, replay=None))[2]
    prompt = rollout.fed & ~rollout.mask
    assert torch.equal(batch.replay[prompt], own[prompt])
    assert torch.equal(batch.replay[rollout.mask], rollout.routing[rollout.mask])
    assert not torch.equal(own[prompt], rollout.routing[prompt]), "the case needs prompts that flip"


def figures(*arguments, cwd):
    command = [sys.executable, str(ROOT / "tutorials" / "figures"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_corrections_are_put_around_a_run_and_have_cells_and_seeds_to_be_compared_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    methods = {cell.method for block in grid.CORRECTIONS for cell in block.cells}
    keys = {cell.key for block in grid.CORRECTIONS for cell in block.cells}
    # what they are compared with is run again beside them: another machine's cold starts are others
    assert keys & CELLS.keys() == {"router | N=1 | none", "router | N=1 | R3", "mild | N=1 | none"}
    assert grid.STUDIES.keys() <= methods <= grid.METHODS.keys()
    for block in grid.CORRECTIONS:
        for cell in block.cells:
            grid.STUDIES.get(cell.method, Study()).check(cell.config(1000))
            assert set(block.seeds) <= set(grid.SIXTEEN) and cell.key.replace(cell.method, "none") in CELLS
    rows = {method: runner.run(grid.Cell("router", 1, method), 1000, quick=True)
            for method in ("R3, gate weights", "lag, slower steps", "none", "R3")}
    assert all(row["stopped"] is None for row in rows.values())
    again = runner.run(grid.Cell("router", 1, "none"), 1000, quick=True)  # nothing of a study is left behind
    assert rows["none"] | {"seconds": 0} == again | {"seconds": 0}
    assert len({rows[method]["mismatch_kl"][-1] for method in ("none", "R3", "R3, gate weights")}) == 3


def test_a_quick_grid_runs_resumes_repeats_and_draws(tmp_path):
    quick = ("--quick", "--results", "results")
    done = figures("all", *quick, "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    core = tmp_path / "results" / "core.jsonl"
    rows = {(row["cell"], row["seed"]): row for row in map(json.loads, core.read_text().splitlines())}
    assert {key for key, _ in rows} == CELLS.keys()
    assert {row["revision"] for row in rows.values()} == {runner.REVISION}
    git = subprocess.run(["git", "hash-object", "nano_moe_rl.py"], cwd=ROOT, capture_output=True, text=True).stdout
    assert git.startswith(runner.REVISION)
    assert (tmp_path / "results" / "verdicts.md").read_text().count("| **") == 20
    for name in ("summary", "long", "mechanism"):
        assert (tmp_path / "results" / f"{name}.svg").read_text().startswith("<?xml")

    lines = core.read_text().splitlines(keepends=True)
    core.write_text("".join(lines[:-2]) + lines[-1][:40])  # cut short
    assert figures("core", *quick, cwd=tmp_path).returncode == 0
    repeated = {(row["cell"], row["seed"]): row for row in map(json.loads, core.read_text().splitlines())}
    for key, row in rows.items():
        assert repeated[key] | {"seconds": 0} == row | {"seconds": 0}

    key = "router | N=8 | R3"
    assert "the same numbers" in figures("again", key, "1000", *quick, cwd=tmp_path).stdout
    core.write_text(json.dumps(rows[key, 1000] | {"reward": [0.5]}) + "\n")
    changed = figures("again", key, "1000", *quick, cwd=tmp_path)
    assert changed.returncode == 1 and "other numbers: reward" in changed.stdout
