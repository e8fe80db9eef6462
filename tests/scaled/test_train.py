"""Whole runs under torchrun: two processes with real vLLM and FSDP2, as a user starts them."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import nano_moe_rl as nano
from processes import finish, start
from scaled import export, report
from tiny_run import METRICS as NANO_METRICS

ROOT = Path(nano.__file__).parent
LAPTOP = str(ROOT / "scaled/configs/laptop.toml")
MORE = {"lr", "score", "score_errors", "loss", "missing_routes", "truncation_rate", "reward_errors", "reward_timeouts",
        "sync_difference", "response_sample_size", "staleness", "stale_responses", "weight_truncated_fraction",
        "equal_groups", "peak_memory_gib", "tokens_per_second_per_device", "rollout_seconds", "reward_seconds",
        "old_seconds", "train_seconds", "sync_seconds"}
METRICS = NANO_METRICS | MORE
TIMED = {"seconds", "peak_memory_gib", "tokens_per_second_per_device"}


def run(folder, *argv, **options):
    config = () if "--resume" in argv else ("--config", LAPTOP)
    code, out, err = finish(start(folder, "scaled.train", *config, *argv, **options))
    assert code == 0, err
    run.err = err
    return out


def lines_of(folder, name, file):
    return [json.loads(line) for line in Path(folder, "runs", name, file).read_text().splitlines()]


def metrics(folder, name):
    """The rows of all updates. Row 0 is the policy before the first one."""
    first, *rows = lines_of(folder, name, "metrics.jsonl")
    assert first.keys() == {"update", "score", "score_errors", "sync_difference"} and first["update"] == 0
    return rows


def untimed(rows):
    """Without times, and without what only some updates have, which of them the intervals say."""
    return [{key: value for key, value in row.items()
             if key not in TIMED | {"score", "score_errors", "sync_difference"} and not key.endswith("_seconds")}
            for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with one finished run, runs/whole, of 24 updates."""
    folder = tmp_path_factory.mktemp("runs")
    out = run(folder, "--name", "whole", "--updates", 24, "--eval-every", 8, "--checkpoint-every", 12,
              "--tensorboard")
    (folder / "out").write_text(out)
    (folder / "err").write_text(run.err)
    return folder


def test_a_run_leaves_metrics_checkpoints_and_narrow_output(folder):
    out, rows = (folder / "out").read_text(), metrics(folder, "whole")
    assert "score 0." in out.splitlines()[0]  # before the first update
    assert max(map(len, out.splitlines())) <= 80 and len(out.splitlines()) == 29
    steps = (folder / "err").read_text().splitlines()
    assert "loading the inference engine …" in steps and steps[-1] == "first score, of 512 prompts …"
    assert all(step.endswith(" …") for step in steps)  # no library has a word there
    assert [row["update"] for row in rows] == list(range(1, 25))
    assert [row["update"] for row in rows if row["score"] is not None] == [8, 16, 24]
    for row in rows:
        assert row.keys() == METRICS
        assert row["missing_routes"] == row["reward_errors"] == row["reward_timeouts"] == 0
        assert len(row["routing_agreement"]) == 3 and min(row["routing_agreement"]) > 0.9
        assert row["reward"] * 256 % 1 == 0
    # the first sync was before the first update; of N = 4 updates the last has the next
    assert [row["update"] for row in rows if row["sync_difference"] is not None] == [4, 8]
    # N = 4: the first mini-batch of a rollout batch is on-policy, the others are not
    stale = [row["staleness_kl"] for row in rows]
    assert [row["staleness"] for row in rows] == [0, 1, 2, 3] * 6 and not any(row["stale_responses"] for row in rows)
    assert max(stale[0::4]) < 1e-9 < 1e-6 < min(stale[1::4])
    first, *_ = lines_of(folder, "whole", "metrics.jsonl")
    assert f"score {first['score']:.3f} before update 1" in out and first["score"] * 512 % 1 == 0
    checked = [row["update"] for row in rows if row["sync_difference"] is not None]
    assert checked == [4, 8] and 0 < first["sync_difference"] < 0.1  # the first three syncs, of which one is before
    # with 32 groups an update, none of 24 gave no gradient at all, and few gave a whole one
    assert all(row["equal_groups"] * 32 % 1 == 0 and row["equal_groups"] < 1 for row in rows)
    assert any(row["equal_groups"] > 0 for row in rows)
    names = {path.name for path in (folder / "runs/whole").iterdir()}
    assert {"config.json", "metrics.jsonl", "samples.jsonl", "curves.png", "log.txt", "update-000012",
            "update-000024"} < names
    assert sum(name.startswith("events.out.") for name in names) == 1 and len(names) == 8
    assert imread(folder / "runs/whole/curves.png").shape == (600, 1200, 4)


def test_a_plan_with_the_metrics_of_the_run_has_its_seconds(folder):
    """Of the rollout batches after the first; prompts of 3 to 5 digits and "="."""
    code, out, err = finish(start(folder, "scaled.plan", "--config", LAPTOP, "--gpus", 2, "--json", "--metrics",
                                  "runs/whole/metrics.jsonl", ranks=0))
    assert code == 0, err
    numbers, rows = json.loads(out), metrics(folder, "whole")[4:]
    for name in ("rollout", "reward", "old", "train", "sync"):
        mean = sum(row[f"{name}_seconds"] for row in rows) / len(rows)
        assert numbers["seconds"][name] == pytest.approx(mean)
    assert 4 <= numbers["measured"]["mean_prompt"] <= 6 and numbers["measured"]["unlike"] == []


def test_event_files_have_the_numbers_by_layer(folder):
    events = EventAccumulator(str(folder / "runs/whole")).Reload()
    rows = metrics(folder, "whole")
    for layer in range(3):
        told = [(event.step, event.value) for event in events.Scalars(f"routing_agreement/{layer}")]
        assert told == [(row["update"], pytest.approx(row["routing_agreement"][layer])) for row in rows]
    assert [event.step for event in events.Scalars("score")] == [0, 8, 16, 24]


def test_samples_are_graded_texts_and_show_routes(folder):
    """Every reward once more from the text; the experts of both engines against the agreement of all tokens."""
    rows = lines_of(folder, "whole", "samples.jsonl")
    written = [(row["update"], row["version"], row["source"]) for row in rows]
    held_out = [(update, update, "held out") for update in (0, 8, 16, 24) for _ in range(4)]
    training = [(update, update - 4, "training") for update in (4, 8, 16, 24)]
    assert sorted(written) == sorted(held_out + training) and [update for update, *_ in written] == sorted(
        update for update, *_ in written)
    asked = [row["prompt_id"] for row in rows if row["source"] == "held out"]
    assert asked == asked[:4] * 4 and len(set(asked)) == 4
    for row in rows:
        *digits, ask = row["prompt"].split()
        answer = str(sum(map(int, digits)) % 10)
        right = row["response"].split()[-2:] == [":", answer] and not row["truncated"]
        assert ask == "=" and row["reference"] == answer and row["reward"] == right
        if row["source"] == "training":
            tokens = len(row["tokens"])
            assert row["tokens"][:row["response_from"]] == row["prompt"].split()
            assert row["tokens"][row["response_from"]:] == row["response"].split()  # the last token is never fed
            engine, old = (np.array(row[f"{name}_experts"]) for name in ("engine", "old"))
            assert [*row["live_experts"]] == ["none", "R2", "R3"] and (engine[..., 0] != engine[..., 1]).all()
            for experts in (old, *map(np.array, row["live_experts"].values())):
                assert engine.shape == experts.shape == (tokens, 3, 2)
                assert (np.sort(engine) == np.sort(experts)).all(-1).mean() > 0.85
    assert len({row["response"] for row in rows}) > 8


def test_reward_rises(folder):
    reward = [row["reward"] for row in metrics(folder, "whole")]
    assert sum(reward[-8:]) / 8 > sum(reward[:8]) / 8 + 0.05


def test_resume_equals_no_interruption_whatever_was_lost_after_the_checkpoint(folder):
    """The newest checkpoint damaged, metrics and options gone: all is made again from the one before it. Scores
    disturb nothing, nor do options that a resumed run may have otherwise."""
    run(folder, "--name", "parts", "--eval-every", 4, "--checkpoint-every", 4, "--updates", 12)
    parts = folder / "runs/parts"
    (parts / "update-000012/__1_0.distcp").write_text("")
    (parts / "metrics.jsonl").unlink()
    (parts / "config.json").unlink()
    with open(parts / "samples.jsonl", "a") as file:
        file.write('{"update": 8, "ver')
    run(folder, "--resume", "parts", "--updates", 16, "--logits-mib", 500, "--no-tensorboard", "--keep", 1,
        "--checkpoint-every", 8)
    assert [line for line in run.err.splitlines() if not line.endswith(" …")] == [
        "scaled: runs/parts/update-000012 is damaged (__1_0.distcp is not as it was written): going on from "
        "runs/parts/update-000008"]
    assert untimed(metrics(folder, "parts")) == untimed(metrics(folder, "whole")[:16])
    kept = lines_of(folder, "parts", "samples.jsonl")
    assert [row["update"] for row in kept if row["source"] == "held out"] == sorted([0, 4, 8, 12, 16] * 4)
    both = [row for row in kept if row["update"] in (0, 4, 8, 16) and (row["update"], row["source"]) != (4, "held out")]
    assert both == [row for row in lines_of(folder, "whole", "samples.jsonl") if row["update"] < 24]
    assert lines_of(folder, "parts", "metrics.jsonl")[0] == lines_of(folder, "whole", "metrics.jsonl")[0]
    assert sorted(path.name for path in parts.iterdir()) == [
        "config.json", "curves.png", "damaged-update-000012", "log.txt", "metrics.jsonl", "samples.jsonl",
        "update-000016"]
    assert json.loads((parts / "config.json").read_text())["logits_mib"] == 500


def test_a_run_goes_on_with_another_number_of_ranks(folder):
    shutil.copytree(folder / "runs/whole", folder / "runs/alone")
    out = run(folder, "--resume", "alone", "--updates", 32, "--eval-every", 8, ranks=1)
    rows, before = metrics(folder, "alone"), metrics(folder, "whole")
    assert rows[:24] == before and [row["update"] for row in rows] == list(range(1, 33))
    # the same policy: what it scores on the same prompts differs by the samples alone, of 512
    score = float(re.search(r"score ([.\d]+) before update 25", out)[1])
    assert abs(score - before[-1]["score"]) < 4 * (0.5 / 512) ** 0.5
    assert all(row["reward"] * 256 % 1 == 0 for row in rows[24:]) and rows[-1]["score"] > 0.3  # as many responses


def test_a_report_has_the_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert report.main(["runs/whole", "--json"]) == 0
    told, = json.loads(capsys.readouterr().out)["runs"]
    rows = metrics(folder, "whole")
    assert told["updates"] == 24
    assert told["last_score"] == rows[-1]["score"] and told["last_reward"] == rows[-1]["reward"]
    assert [(x["update"], x["mode"]) for x in told["routes"]] == [
        (update, mode) for update in (4, 24) for mode in ("none", "R2", "R3")]
    assert [x["other_experts"] for x in told["routes"][2::3]] == [0, 0]
    page = (folder / "runs/whole/report.html").read_text()
    for sample in lines_of(folder, "whole", "samples.jsonl"):
        if sample["source"] == "held out" and sample["update"] in (0, 24):
            assert f">{sample['prompt']}<" in page and f">{sample['response']}\n" in page


@pytest.mark.parametrize("source, updates", [("runs/whole", 24), ("runs/whole@12", 12)])
def test_a_checkpoint_exports_to_the_policy_of_the_run(folder, source, updates):
    exported = folder / source.replace("/", "-")
    code, out, err = finish(start(folder, "scaled.export", source, exported, ranks=1))
    assert code == 0, err
    assert f"{updates} updates" in out
    trained = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    first = AutoModelForCausalLM.from_pretrained(folder / "runs/laptop-cold-start").state_dict()
    assert trained.keys() == first.keys()
    moved = [(trained[name] - first[name]).abs().max() for name in first]
    assert all(0 < x < 0.05 for x in moved)  # every weight learned, none is from elsewhere
    text = AutoTokenizer.from_pretrained(exported)("314=")["input_ids"]
    assert text == [3, 1, 4, nano.ASK]


def test_one_engine_on_two_ranks_trains_the_same_number_of_updates(folder):
    run(folder, "--name", "tensor", "--tensor-parallel", 2, "--updates", 8, "--mini-batches", 2,
        "--replay", "R2", "--token-budget", 400, "--rollout-precision", "int8")
    rows = metrics(folder, "tensor")
    assert len(rows) == 8 and rows[0].keys() == METRICS
    assert max(row["staleness_kl"] for row in rows[0::2]) < 1e-9 < rows[1]["staleness_kl"]
    shown = [row for row in lines_of(folder, "tensor", "samples.jsonl") if row["source"] == "training"]
    assert [row["update"] for row in shown] == [2, 8]
    for row in shown:  # the text and the experts are of one response
        assert row["tokens"] == [*row["prompt"].split(), *row["response"].split()]


def test_the_recipe_of_a_node_runs_on_a_small_checkpoint(folder):
    """bf16 training, CPU offload, gradient checkpointing, two engines of two ranks each: all of that file but for
    its sizes, its data, and fp8, for which a CPU may lack the units."""
    start_from = "runs/laptop-cold-start"
    recipe = ROOT / "scaled/configs/qwen3_30b_a3b.toml"
    code, _, err = finish(start(
        folder, "scaled.train", "--config", recipe, "--checkpoint", start_from, "--train-data",
        f"{start_from}/train.jsonl", "--eval-data", f"{start_from}/eval.jsonl", "--no-chat", "--reward", "running_sum",
        "--max-prompt", 6, "--max-response", 22, "--prompts", 8, "--group-size", 8, "--updates", 4, "--lr", 3e-4,
        "--rollout-precision", "bf16", "--token-budget", 2000, ranks=4))
    assert code == 0, err
    rows = metrics(folder, "qwen3_30b_a3b")
    assert len(rows) == 4 and all(row["grad_norm"] > 0 and row["mismatch_kl"] < 1e-3 for row in rows)
    assert rows[0]["staleness_kl"] < 1e-4 < rows[3]["staleness_kl"]


def test_a_checkpoint_of_the_single_file_exports_to_the_same_policy(finished, tmp_path, capsys):
    path = finished / "runs/done/checkpoint.pt"
    assert export.main([str(path), str(tmp_path / "hf")]) == 0
    assert "has the policy after 4 updates" in capsys.readouterr().out
    state = torch.load(path)
    model = nano.Model(nano.Config(**state["config"]))
    model.load_state_dict(state["model"])
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(len(nano.VOCABULARY), (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(twin(tokens).logits, model(tokens)[0], atol=1e-5, rtol=0)
    assert twin.config.eos_token_id == nano.EOS
