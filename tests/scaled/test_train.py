"""Whole runs under torchrun: two processes with real vLLM and FSDP2, as a user starts them."""
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import nano_moe_rl as nano
from scaled import train
from scaled.run import Run
from scaled.config import Config, read_config
from scaled.export import export_nano, nano_tokenizer
from tiny_run import METRICS as NANO_METRICS

ROOT = Path(nano.__file__).parent
LAPTOP = str(ROOT / "scaled/configs/laptop.toml")
MORE = {"lr", "score_errors", "loss", "missing_routes", "truncation_rate", "reward_errors", "reward_timeouts",
        "peak_memory_gib", "tokens_per_second_per_device", "rollout_seconds", "reward_seconds",
        "old_seconds", "train_seconds", "sync_seconds"}
METRICS = NANO_METRICS - {"tokens_per_second"} | MORE
TIMED = {"seconds", "peak_memory_gib", "tokens_per_second_per_device"}


def start(folder, module, *argv, ranks=2, **environment):
    # a session of its own: whatever it leaves behind can be found by its group
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(ranks), "-m", module, *map(str, argv)], cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | dict(PYTHONPATH=f"{ROOT}:{folder}", OMP_NUM_THREADS="1") | environment)


def finish(process, seconds=300):
    """Exit code, stdout, stderr; nothing of the process group may be alive afterwards."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise AssertionError(process.communicate())
    for _ in range(50):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.returncode, out, err
        time.sleep(0.1)
    os.killpg(process.pid, 9)
    raise AssertionError("a process is left behind")


def run(folder, *argv, **options):
    code, out, err = finish(start(folder, "scaled.train", "--config", LAPTOP, *argv, **options))
    assert code == 0, err
    return out


def metrics(folder, name):
    lines = Path(folder, "runs", name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def untimed(rows):
    return [{key: value for key, value in row.items()
             if key not in TIMED | {"score", "score_errors"} and not key.endswith("_seconds")} for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with one finished run, runs/whole, of 24 updates."""
    folder = tmp_path_factory.mktemp("runs")
    out = run(folder, "--name", "whole", "--updates", 24, "--eval-every", 8, "--checkpoint-every", 12,
              "--tensorboard")
    (folder / "out").write_text(out)
    return folder


def test_a_run_leaves_metrics_checkpoints_and_narrow_output(folder):
    out, rows = (folder / "out").read_text(), metrics(folder, "whole")
    assert "score 0." in out.splitlines()[0]  # before the first update
    assert max(map(len, out.splitlines()[:-1])) <= 80 and len(out.splitlines()) == 27
    assert [row["update"] for row in rows] == list(range(1, 25))
    assert [row["update"] for row in rows if row["score"] is not None] == [8, 16, 24]
    for row in rows:
        assert row.keys() == METRICS
        assert row["missing_routes"] == row["reward_errors"] == row["reward_timeouts"] == 0
        assert len(row["routing_agreement"]) == 3 and min(row["routing_agreement"]) > 0.9
        assert row["reward"] * 256 % 1 == 0
    # N = 4: the first mini-batch of a rollout batch is on-policy, the others are not
    stale = [row["staleness_kl"] for row in rows]
    assert max(stale[0::4]) < 1e-9 < 1e-6 < min(stale[1::4])
    names = {path.name for path in (folder / "runs/whole").iterdir()}
    assert {"config.json", "metrics.jsonl", "update-000012", "update-000024"} < names
    assert sum(name.startswith("events.") for name in names) == 1 and len(names) == 5


def test_reward_rises(folder):
    reward = [row["reward"] for row in metrics(folder, "whole")]
    assert sum(reward[-8:]) / 8 > sum(reward[:8]) / 8 + 0.05


def test_resume_equals_no_interruption_and_scores_disturb_nothing(folder):
    options = ("--name", "parts", "--eval-every", 4, "--checkpoint-every", 8)
    run(folder, *options, "--updates", 8)
    run(folder, *options, "--updates", 12, "--resume")
    assert untimed(metrics(folder, "parts")) == untimed(metrics(folder, "whole")[:12])


def test_a_checkpoint_exports_to_the_policy_of_the_run(folder):
    code, out, err = finish(start(folder, "scaled.export", "runs/whole", "exported", ranks=1))
    assert code == 0, err
    assert "24 updates" in out
    trained = AutoModelForCausalLM.from_pretrained(folder / "exported").state_dict()
    first = AutoModelForCausalLM.from_pretrained(folder / "runs/laptop-cold-start").state_dict()
    assert trained.keys() == first.keys()
    moved = [(trained[name] - first[name]).abs().max() for name in first]
    assert all(0 < x < 0.05 for x in moved)  # every weight learned, none is from elsewhere
    text = AutoTokenizer.from_pretrained(folder / "exported")("314=")["input_ids"]
    assert text == [3, 1, 4, nano.ASK]


def test_one_engine_on_two_ranks_trains_the_same_number_of_updates(folder):
    run(folder, "--name", "tensor", "--tensor-parallel", 2, "--updates", 8, "--mini-batches", 2,
        "--replay", "R2", "--token-budget", 400, "--rollout-precision", "int8")
    rows = metrics(folder, "tensor")
    assert len(rows) == 8 and rows[0].keys() == METRICS
    assert max(row["staleness_kl"] for row in rows[0::2]) < 1e-9 < rows[1]["staleness_kl"]


def test_the_recipe_of_a_node_runs_on_a_small_checkpoint(folder):
    """bf16 training, CPU offload, gradient checkpointing, two engines of two ranks each: all of that file but for
    its sizes, its data, and fp8, for which a CPU may lack the units."""
    start_from = "runs/laptop-cold-start"
    recipe = ROOT / "scaled/configs/qwen3_30b_a3b.toml"
    code, _, err = finish(start(
        folder, "scaled.train", "--config", recipe, "--checkpoint", start_from, "--train-data",
        f"{start_from}/train.jsonl", "--eval-data", f"{start_from}/eval.jsonl", "--no-chat", "--reward", "running_sum",
        "--max-prompt", 7, "--max-response", 22, "--prompts", 8, "--group-size", 8, "--updates", 4, "--lr", 3e-4,
        "--rollout-precision", "bf16", "--token-budget", 2000, ranks=4))
    assert code == 0, err
    rows = metrics(folder, "qwen3_30b_a3b")
    assert len(rows) == 4 and all(row["grad_norm"] > 0 and row["mismatch_kl"] < 1e-3 for row in rows)
    assert rows[0]["staleness_kl"] < 1e-4 < rows[3]["staleness_kl"]


def test_a_nano_checkpoint_exports_to_the_same_policy(tmp_path):
    c = nano.Config(experts=8, expert_width=24, layers=2)
    model = nano.Model(c)
    export_nano(model, tmp_path / "hf")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(len(nano.VOCABULARY), (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(twin(tokens).logits, model(tokens)[0], atol=1e-5, rtol=0)
    assert twin.config.eos_token_id == nano.EOS


# ------------------------------------------------------------------------------------ Bad input
OPTIONS = [  # refused before the ranks meet
    ("--replay R9", "--replay R9: give none or R2 or R3"),
    ("--lr fast", "--lr"),
    ("--relay R3", "--relay"),
    ("--updates 6", "--updates 6: give a multiple of 4"),
    ("--group-size 1", "--group-size 1: give 2 or more"),
    ("--token-budget 20", "--token-budget 20: give 29 or more"),
    ("--tensor-parallel 2", "--tensor-parallel 2: give a divisor of the 1 processes"),
    ("--gpu-memory 1.5", "--gpu-memory 1.5: give a share below 1"),
    ("--eval-top-p 1.5", "--eval-top-p 1.5: give at most 1"),
    ("--name a/b", "--name a/b: give one without /"),
    ("--name taken", "--name taken: is taken; give another, or remove runs/taken: it has no checkpoint"),
    ("--name done --lr 0.5 --resume", "--resume: lr differ from runs/done/config.json; only updates can change"),
    ("--resume", "--resume: runs/laptop has no checkpoint"),
    ("--config nowhere.toml", "--config nowhere.toml: there is no such file"),
    ("--config wrong.toml", "--config wrong.toml: colour is no option"),
    ("--config broken.toml", "--config broken.toml: is not TOML"),
    ("--checkpoint=", "--checkpoint : give the folder"),
]


@pytest.mark.parametrize("argv, line", OPTIONS, ids=[row[0] for row in OPTIONS])
def test_options_are_refused_in_one_line(tmp_path, monkeypatch, capsys, argv, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/taken").mkdir(parents=True)
    (tmp_path / "runs/taken/config.json").touch()
    (tmp_path / "runs/done/update-000004").mkdir(parents=True)
    saved = asdict(read_config(LAPTOP, {"name": "done", "updates": 4}))
    (tmp_path / "runs/done/config.json").write_text(json.dumps(saved))
    (tmp_path / "wrong.toml").write_text("colour = 1")
    (tmp_path / "broken.toml").write_text("colour")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        train.main(["--config", LAPTOP, *argv.split()])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and line in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_batch_that_processes_do_not_divide_is_refused():
    c = Config(checkpoint="c", train_data="d", prompts=6, group_size=3)
    c.check_processes(2), c.check_processes(6)
    with pytest.raises(ValueError, match="--prompts 6: give with 4 processes .* a multiple of 4"):
        c.check_processes(4)
    with pytest.raises(ValueError, match="--group-size 3: give .* a multiple of 12"):
        Config(checkpoint="c", train_data="d", prompts=6, group_size=3, tensor_parallel=2,
               ).check_processes(12)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Checkpoints and data that a run cannot use, and a good one of each."""
    folder = tmp_path_factory.mktemp("material")
    export_nano(nano.Model(nano.Config(layers=1, experts=4)), folder / "good")
    dense = LlamaConfig(vocab_size=13, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                        num_attention_heads=1, num_key_value_heads=1)
    LlamaForCausalLM(dense).save_pretrained(folder / "dense")
    nano_tokenizer().save_pretrained(folder / "dense")
    export_nano(nano.Model(nano.Config(layers=1, experts=4)), folder / "endless")
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / "endless" / file
        values = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("eos")}
        path.write_text(json.dumps(values))
    (folder / "good.jsonl").write_text('{"prompt": "314=", "answer": "8"}\n')
    (folder / "empty.jsonl").touch()
    (folder / "column.jsonl").write_text('{"question": "314="}\n')
    (folder / "long.jsonl").write_text('{"prompt": "3141592=", "answer": "8"}\n')
    return folder


REFUSED = [  # refused when checkpoint and data are read
    (dict(checkpoint="nowhere"), "--checkpoint nowhere: has no config.json"),
    (dict(checkpoint="dense"), "'llama'"),
    (dict(checkpoint="endless"), "no end-of-sequence token"),
    (dict(train_data="nowhere.jsonl"), "nowhere.jsonl does not exist"),
    (dict(train_data="empty.jsonl"), "empty.jsonl is empty"),
    (dict(train_data="column.jsonl"), "no column 'prompt', only question"),
    (dict(train_data="long.jsonl"), "long.jsonl:0 has 8 tokens"),
    (dict(chat=True), "no chat template"),
    (dict(max_response=23), "exceeds the checkpoint's context of 29 tokens"),
    (dict(nano_cold_start=True), "is not the cold start of --seed 0"),
    (dict(reward="os:nothing"), "os has no function nothing"),
    (dict(rollout_precision="fp8"), "rollout precision fp8"),  # no AMX, or 64 is no multiple of 128
]


@pytest.mark.parametrize("changes, line", REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_checkpoints_and_data_are_refused(group, material, monkeypatch, changes, line):
    monkeypatch.chdir(material)
    options = dict(checkpoint="good", train_data="good.jsonl", chat=False, reward="running_sum",
                   max_prompt=7, max_response=22, prompts=2, group_size=2)
    with pytest.raises(ValueError, match=line.replace("(", r"\(")):
        Run(Config(**options | changes), False)
    assert not (material / "runs").exists()


def test_vllm_of_another_version_is_refused(group, material, monkeypatch):
    monkeypatch.chdir(material)
    monkeypatch.setattr("scaled.vllm_internals.VLLM", "0.31.0")
    with pytest.raises(ValueError, match=r"vllm 0\.30\.0\S*: scaled needs 0\.31\.0; install"):
        Run(Config(checkpoint="good", train_data="good.jsonl"), False)


def test_a_rank_that_fails_ends_all_with_its_line(tmp_path):
    """Rank 1 fails in the middle of a run, rank 0 waits for it in a collective."""
    (tmp_path / "picky.py").write_text("""import os
def reward(prompts, texts, tokens):
    training = prompts[0].id.startswith("train.jsonl")  # not the score before it
    return [float("nan") if training and os.environ["RANK"] == "1" else 1.0 for _ in texts]
""")
    process = start(tmp_path, "scaled.train", "--config", LAPTOP, "--reward", "picky:reward", "--updates", 4)
    code, out, err = finish(process)
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("scaled: ")]
    assert len(lines) == 1 and "rank 1 at update 0: " in lines[0] and "train.jsonl:" in lines[0]


@pytest.mark.parametrize("launcher", ["torchrun", "none"])
def test_a_port_in_use_ends_at_once(tmp_path, launcher):
    """torchrun meets it before there is a rank, and says so itself; without it rank 0 does."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", port]
        process = subprocess.Popen(
            [sys.executable, *(torchrun if launcher == "torchrun" else []), "-m", "scaled.train", "--config",
             LAPTOP], cwd=tmp_path, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | dict(PYTHONPATH=str(ROOT)) | (dict(
                RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) if launcher == "none" else {}))
        code, out, err = finish(process, 60)
    assert code != 0 and not (tmp_path / "runs").exists()
    if launcher == "torchrun":
        assert "EADDRINUSE" in err
    else:
        lines = [line for line in err.splitlines() if line.startswith("scaled: ")]
        assert code == 2 and len(lines) == 1 and f"127.0.0.1:{port}" in lines[0]
