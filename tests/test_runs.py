"""Whole runs: files, resume, seeds, failure, the cold start they share, and a reward that rises."""

import json
import multiprocessing
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_run import (METRICS, RUN_FILES, SCORES, SCRIPT, TINY, arguments, assert_identical, checkpoint, leaves,
                      metrics, untimed)

import nano_moe_rl as nano

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_run_leaves_four_files_and_narrow_output(folder):
    options = arguments(eval_every=3)  # 4 updates: the last score is not on the grid
    run = subprocess.run([sys.executable, SCRIPT, *options], cwd=folder, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    assert run.stdout and max(map(len, run.stdout.splitlines())) <= 120
    assert {path.name for path in Path("runs").iterdir()} == {"run-1"}
    assert {path.name for path in Path("runs/run-1").iterdir()} == RUN_FILES  # and no temporary one
    config = asdict(nano.Config(**TINY | {"eval_every": 3, "name": "run-1"}))
    assert json.loads(Path("runs/run-1/config.json").read_text()) == config == checkpoint("run-1")["config"]

    first, *rows = metrics("run-1")
    assert first.keys() == {"update"} | SCORES and first["update"] == 0
    assert [row["update"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        # scores for each multiple of 3, when its rollout batch of 2 updates ends
        assert row.keys() == METRICS | (SCORES if row["update"] == 4 else set())
        assert row["reward"] * 16 % 1 == 0 and row.get("score", 0) * 8 % 1 == 0  # means of zeros and ones
        agreement = row["routing_agreement"]
        assert len(agreement) == 2 and all(0 <= share <= 1 for share in agreement)
        assert row["seconds"] > 0
    for when, row in ("before", first), ("after", rows[-1]):
        assert f"{when} RL: score {row['score']:.3f} in training precision, " \
               f"{row['engine_score']:.3f} of the inference engine\n" in run.stdout
    picture = Path("runs/run-1/curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")

    assert nano.main(options) == 0
    assert {path.name for path in Path("runs").iterdir()} == {"run-1", "run-2"}
    assert untimed(metrics("run-2")) == untimed([first, *rows])


def test_resume_equals_no_interruption(tmp_path, monkeypatch, rewarded):
    for place in ("whole", "parts"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert nano.main(arguments(name="a", updates=8)) == 0
    whole, whole_rows = checkpoint("a"), metrics("a")
    monkeypatch.chdir(tmp_path / "parts")
    assert nano.main(arguments(name="a", updates=4)) == 0
    assert nano.main(["--resume", "a", "--updates", "8"]) == 0
    parts, parts_rows = checkpoint("a"), metrics("a")

    moved = [row["grad_norm"] > 0 for row in whole_rows[1:]]
    assert any(moved[:4]) and any(moved[4:])  # else no optimizer state was there to lose
    assert untimed(whole_rows) == untimed(parts_rows)
    assert parts_rows == parts["rows"]
    for state in (whole, parts):
        state["rows"] = untimed(state["rows"])
    assert {"model", "optimizer", "rows", "config"} == whole.keys()
    assert_identical(whole, parts)
    assert json.loads(Path("runs/a/config.json").read_text())["updates"] == 8


def test_rows_beyond_the_checkpoint_are_cut_back(folder):
    assert nano.main(arguments(name="a")) == 0
    log, kept = Path("runs/a/metrics.jsonl"), metrics("a")
    with open(log, "a") as f:  # as a kill leaves it: two updates after the last save, and half a third
        for update in (5, 6):
            f.write(json.dumps(kept[-1] | {"update": update, "reward": -1.0}) + "\n")
        f.write('{"update": 7, "sco')
    assert nano.main(["--resume", "a", "--updates", "6"]) == 0
    rows = metrics("a")
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[:5] == kept and min(row["reward"] for row in rows[1:]) >= 0


def test_the_same_seed_repeats_and_another_differs(tmp_path, monkeypatch, rewarded):
    runs = {}
    for place, seed in (("first", 3), ("second", 3), ("third", 4)):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        assert nano.main(arguments(name="a", seed=seed)) == 0
        runs[place] = untimed(metrics("a")), checkpoint("a")["model"]
    assert any(row["grad_norm"] > 0 for row in runs["first"][0][1:])
    assert_identical(runs["first"], runs["second"])
    assert runs["first"][0] != runs["third"][0]
    weights, others = runs["first"][1], runs["third"][1]
    name = "layers.0.mlp.gate.weight"
    assert not torch.equal(weights[name], others[name])


def nan_from(first):
    """MiniRL's loss, NaN from call `first` on."""
    calls, minirl_loss = [], nano.minirl_loss

    def loss_fn(*tensors, **options):
        calls.append(1)
        loss, gate = minirl_loss(*tensors, **options)
        return (loss * float("nan") if len(calls) >= first else loss), gate
    return loss_fn


def test_a_nan_loss_stops_the_run_and_keeps_the_last_checkpoint(folder):
    assert nano.main(arguments(name="good", updates=6, eval_every=3)) == 0
    # The NaN comes in the second of two mini-batches: nothing of this batch may reach the disk.
    c = nano.Config(**TINY | {"name": "bad", "updates": 12, "eval_every": 3})
    with pytest.raises(FloatingPointError):
        nano.train(c, loss_fn=nan_from(8))
    good, bad = checkpoint("good"), checkpoint("bad")
    assert len(bad["rows"]) == 7 and untimed(bad["rows"]) == untimed(good["rows"])
    for part in ("model", "optimizer"):
        assert_identical(bad[part], good[part])
    for path, leaf in leaves([bad["model"], bad["optimizer"]]).items():
        assert torch.as_tensor(leaf if leaf is not None else 0).isfinite().all(), path


@pytest.mark.parametrize("call, updates", [(3, 2), (1, 0)])  # in the second rollout batch, and in the first
def test_a_nan_loss_ends_main_with_the_path_of_the_checkpoint(folder, monkeypatch, capsys, call, updates):
    with monkeypatch.context() as patch:
        patch.setattr(nano, "minirl_loss", nan_from(call))
        assert nano.main(arguments(name="bad")) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "runs/bad/checkpoint.pt" in err
    assert len(checkpoint("bad")["rows"]) == 1 + updates
    assert nano.main(["--resume", "bad"]) == 0  # with the loss repaired
    assert [row["update"] for row in metrics("bad")] == [0, 1, 2, 3, 4]


def test_the_cold_start_is_decided_by_its_own_options(monkeypatch):
    """Those before `name`: methods that differ in RL alone start from the same weights."""
    c = nano.Config(**TINY)
    weights = nano.cold_start(c).state_dict()
    for changes in ({"lr": 1e-3}, {"replay": "none", "router_noise": 1.0}, {"name": "b", "mini_batches": 1}):
        assert_identical(nano.cold_start(replace(c, **changes)).state_dict(), weights)
    for changes in ({"seed": 1}, {"teacher": "equation"}):
        other = nano.cold_start(replace(c, **changes)).state_dict()
        assert not torch.equal(other["lm_head.weight"], weights["lm_head.weight"])


def test_evaluate_changes_nothing_and_repeats(config, model, rollout):
    batch = nano.prepare_batch(model, rollout)
    nano.policy(model, batch)[0].sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    random_state = torch.get_rng_state()
    (scores, first), (again, second) = nano.evaluate(model), nano.evaluate(model)
    assert scores == again and scores.keys() == SCORES
    assert torch.equal(torch.get_rng_state(), random_state)
    for parameter, (value, gradient) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad
        assert torch.equal(parameter, value) and torch.equal(parameter.grad, gradient)
    assert len(first.tokens) == len(first.rewards) == config.eval_prompts
    assert_identical(vars(first), vars(second))


def test_the_last_score_is_that_of_the_checkpoint(finished, monkeypatch):
    monkeypatch.chdir(finished)
    state = checkpoint("done")
    model = nano.Model(nano.Config(**state["config"]))
    model.load_state_dict(state["model"])
    scores = nano.evaluate(model)[0]
    assert scores == {name: metrics("done")[-1][name] for name in SCORES}


def test_the_reward_rises(folder):
    """The default model. Seeds 0, 1 and 2 rise by 0.29, 0.39 and 0.46, so 0.15 leaves room."""
    c = nano.Config(mini_batch=128, updates=32, eval_every=32, eval_prompts=256, lr=5e-4, name="a")
    nano.train(c)
    before, *_, after = metrics("a")
    assert before["score"] > 0.2
    assert after["score"] > before["score"] + 0.15


# another task: say the letter after that of the prompt, and end
def letters(n, c, generator):
    return torch.randint(0, 4, (n, 1), generator=generator), torch.ones(n, dtype=torch.long)


def successors(n, c, generator):
    prompts, lengths = letters(n, c, generator)
    wrong = torch.rand(n, 1, generator=generator) < 0.5
    said = (prompts + 1 + wrong) % 4
    return torch.cat([prompts, said, torch.full((n, 1), 4)], 1), lengths, lengths + 2


def succeeded(tokens, prompt_lengths, lengths):
    return ((lengths == 3) & (tokens[:, 1] == (tokens[:, 0] + 1) % 4)).float()


def test_another_task(folder):
    c = nano.Config(**TINY | dict(name="next", cold_start_steps=60, updates=40, eval_every=40, eval_prompts=64, lr=1e-3,
                                  warmup=1))
    task = nano.Task("abcd.", 4, letters, successors, succeeded)
    nano.train(c, task=task)
    before, *_, after = metrics("next")
    assert 0.3 < before["score"] < 0.7 and after["score"] > 0.9
    state = checkpoint("next")
    assert len(state["model"]["embed_tokens.weight"]) == len(state["model"]["lm_head.weight"]) == 5
    nano.train(replace(c, updates=42), state, task)
    assert len(metrics("next")) == 43


def test_a_renamed_run_resumes_in_its_new_folder(folder):
    assert nano.main(arguments(name="a")) == 0
    Path("runs/a").rename("runs/b")
    assert nano.main(["--resume", "b", "--updates", "6"]) == 0
    assert not Path("runs/a").exists() and len(metrics("b")) == 7


def test_two_processes_may_save_one_file(tmp_path):
    """As runs side by side do with a cold start that both need."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=save_often, args=(tmp_path / "x", letter)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (tmp_path / "x").read_bytes() in (b"a" * 10**5, b"b" * 10**5)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def save_often(path, letter):
    for _ in range(300):
        nano.save(path, letter * 10**5)
