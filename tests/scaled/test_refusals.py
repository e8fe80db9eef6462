"""What is refused before a run begins: options, files, checkpoints, data, a port in use."""
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import nano_moe_rl as nano
from processes import finish, launch
from scaled import train
from scaled.run import Run
from scaled.config import Config, read_config
from scaled.checkpoint import digest
from scaled.export import export_nano, find_checkpoints, nano_tokenizer

ROOT = Path(nano.__file__).parent
LAPTOP = str(ROOT / "scaled/configs/laptop.toml")

OPTIONS = [  # refused before the ranks meet
    ("--replay R9", "--replay R9: give none or R2 or R3"),
    ("--lr fast", "--lr"),
    ("--relay R3", "--relay"),
    ("--updates 6", "--updates 6: give a multiple of 4"),
    ("--group-size 1", "--group-size 1: give 2 to 1000000000"),
    ("--token-budget 20", "--token-budget 20: give 28 or more"),
    ("--tensor-parallel 2", "--tensor-parallel 2: give a divisor of the 1 processes"),
    ("--gpu-memory 1.5", "--gpu-memory 1.5: give 0.01 to 0.99"),
    ("--eval-top-p 1.5", "--eval-top-p 1.5: give 0.01 to 1"),
    ("--temperature 2.5", "--temperature 2.5: give 0.01 to 2"),
    ("--lr 3", "--lr 3.0: give 1e-12 to 1"),
    ("--clip-low 1", "--clip-low 1.0: give 0 to 0.99"),
    ("--importance-sampling none", "--importance-sampling none: give token or sequence or staleness"),
    ("--name=", "--name : give up to 60 letters"),
    ("--name a/b", "--name a/b: give up to 60 letters"),
    ("--name ..", "--name ..: give up to 60 letters"),
    ("--name " + "a" * 300, f"--name {'a' * 60}: give up to 60 letters"),
    ("--name two\nlines", "--name two lines: give up to 60 letters"),
    ("--name \x1b[31m", r"--name \x1b[31m: give up to 60 letters"),
    ("--config \udcff.toml", r"--config \udcff.toml: there is no such file"),
    ("--name taken", "--name taken: is taken; give another, or remove runs/taken: it has no checkpoint"),
    ("--name done", "--name done: is taken; give another, or --resume done"),
    ("--name file", "--name file: is taken"),
    ("--resume done --lr 0.5 --updates 8", "--resume done: lr cannot change; what can: check_sync, "),
    ("--resume done --name other", "--resume done: name cannot change"),
    ("--resume done --updates 6", "--updates 6: give a multiple of 4"),
    ("--resume laptop", "--resume laptop: runs/laptop has no checkpoint; start a run with --config"),
    ("--resume ../done", "--name ../done: give up to 60 letters"),
    ("--resume rotten", "runs/rotten has no checkpoint that is whole (update-000004: No such file or directory)"),
    ("--resume older", "--resume older: its options are not those of this version: colour"),
    ("--resume texts", "--resume texts: its options are damaged: updates = '8' is no int"),
    ("--resume nulls", "--resume nulls: its options are damaged: lr = None is no float"),
    ("--resume done --config done.toml", "give --config FILE for a new run, or --resume NAME, which has its options"),
    ("--seed 1 --no-config", "give --config FILE for a new run, or --resume NAME, which has its options"),
    ("--config nowhere.toml", "--config nowhere.toml: there is no such file"),
    ("--config " + "a" * 300, "there is no such file"),
    ("--config wrong.toml", "--config wrong.toml: colour is no option"),
    ("--config broken.toml", "--config broken.toml: is not TOML"),
    ("--config bytes.toml", "--config bytes.toml: is not TOML"),
    ("--config deep.toml", "--config deep.toml: is not TOML"),
    ("--config string.toml", "--config string.toml: updates = 8 is of type str; give a whole number"),
    ("--config number.toml", "--config number.toml: reward = 3 is of type int; give text in quotes"),
    ("--config float.toml", "--config float.toml: prompts = 8.0 is of type float; give a whole number"),
    ("--config bool.toml", "--config bool.toml: lr = True is of type bool; give a number"),
    ("--config table.toml", "--config table.toml: clip = {'a': 1} is of type dict; give true or false"),
    ("--config huge.toml", "--config huge.toml: lr = 1000"),
    ("--config name.toml", "--name two lines: give up to 60 letters"),
    ("--checkpoint=", "--checkpoint : give the folder"),
]
FILES = {"wrong": "colour = 1", "broken": "colour", "deep": "a = " + "[" * 5000, "string": 'updates = "8"',
         "number": "reward = 3", "float": "prompts = 8.0", "bool": "lr = true", "table": "[clip]\na = 1",
         "huge": f"lr = 1{'0' * 400}", "name": 'name = "two\\nlines"', "done": ""}


def saved_run(folder, **changes):
    """A run whose options can be read, and nothing else."""
    checkpoint = folder / "update-000004"
    checkpoint.mkdir(parents=True)
    for name in (".metadata", "config.json", "metrics.jsonl"):
        (checkpoint / name).touch()
    options = asdict(read_config(LAPTOP, {"name": folder.name, "updates": 4})) | changes
    (checkpoint / "config.json").write_text(json.dumps(options))
    digests = {path.name: digest(path) for path in checkpoint.iterdir()}
    (checkpoint / "files.json").write_text(json.dumps(digests | {"__0_0.distcp": ""}))


@pytest.mark.parametrize("argv, line", OPTIONS, ids=[row[0][:40] for row in OPTIONS])
def test_options_are_refused_in_one_line(tmp_path, monkeypatch, capsys, argv, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/taken").mkdir(parents=True)
    (tmp_path / "runs/taken/config.json").touch()
    (tmp_path / "runs/file").touch()
    saved_run(tmp_path / "runs/done")
    saved_run(tmp_path / "runs/older", colour="red")
    saved_run(tmp_path / "runs/texts", updates="8")
    saved_run(tmp_path / "runs/nulls", lr=None)
    (tmp_path / "runs/rotten/update-000004").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / f"{name}.toml").write_text(text)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    argv = argv.split(" ")
    config = [] if {"--resume", "--no-config"} & {*argv} else ["--config", LAPTOP]
    with pytest.raises(SystemExit) as end:
        train.main([*config, *(x for x in argv if x != "--no-config")])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and line in err and len(err) < 400
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_help_has_the_sections_of_the_configuration_and_loads_little():
    """The comments of config.py, each before the same options. transformers and vLLM take seconds to import."""
    source = (ROOT / "scaled/config.py").read_text()
    comments = re.compile(r'(?:\n|""")\n    # (.+)|^    (\w+): \w+ = option', re.M)
    sections = {}
    for title, name in comments.findall(source.partition("def __post_init__")[0]):
        if title:
            latest = sections.setdefault(title, [])
        else:
            latest.append("--" + name.replace("_", "-"))
    code = ("import sys\nfrom scaled import train\ntry: train.main(['--help'])\nexcept SystemExit as end:\n"
            "    print(end.code, *sorted({'transformers', 'vllm', 'matplotlib'} & {*sys.modules}), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == "0\n"
    shown, flags = {}, re.compile(r"^(\S.*):$|^  (--[\w-]+)", re.M)
    for title, name in flags.findall(done.stdout):
        if title:
            latest = shown.setdefault(title, [])
        else:
            latest.append(name)
    assert shown.pop("options") == ["--config", "--resume"]
    assert shown == sections and len(shown) == 8


def test_the_names_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [Path("runs/a/update-000004"), Path("runs/a/update-000012"), Path("runs/b@4/update-000008")]
    for path in paths:
        path.mkdir(parents=True)
    for source, found in (("runs/a", paths[:2]), ("runs/a/", paths[:2]), ("runs/a@4", paths[:1]),
                          ("runs/a@12", paths[1:2]), ("runs/a/update-000012", paths[1:2]), ("runs/b@4", paths[2:])):
        assert find_checkpoints(source) == found, source
    for source, line in (("runs/a@8", "runs/a has no checkpoint of update 8, only of 4, 12"),
                         ("runs/c", "runs/c has no checkpoint: give"), ("runs", "runs has no checkpoint: give"),
                         ("runs/a@x", "runs/a@x has no checkpoint: give"), ("", " has no checkpoint: give")):
        with pytest.raises(ValueError, match=line):
            find_checkpoints(source)


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
    (dict(max_response=23), "exceeds the checkpoint's context of 28 tokens"),
    (dict(nano_cold_start=True), "is not the cold start of --seed 0"),
    (dict(reward="os:nothing"), "os has no function nothing"),
    (dict(reward="os:nothing", nano_cold_start=True, checkpoint="runs/absent"), "os has no function nothing"),
    (dict(objective="PPO"), "--objective PPO: give MiniRL or GRPO"),
    (dict(objective="GRPO", length_norm=True), "--length-norm True: --objective GRPO would ignore it"),
    (dict(rollout_precision="fp8"), "rollout precision fp8"),  # no AMX, or 64 is no multiple of 128
]


@pytest.mark.parametrize("changes, line", REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_checkpoints_and_data_are_refused(group, material, monkeypatch, changes, line):
    monkeypatch.chdir(material)
    options = dict(checkpoint="good", train_data="good.jsonl", chat=False, reward="running_sum",
                   max_prompt=6, max_response=22, prompts=2, group_size=2)
    with pytest.raises(ValueError, match=line.replace("(", r"\(")):
        Run(Config(**options | changes), False)
    assert not (material / "runs").exists()


def test_vllm_of_another_version_is_refused(group, material, monkeypatch):
    monkeypatch.chdir(material)
    monkeypatch.setattr("scaled.vllm_internals.VLLM", "0.31.0")
    with pytest.raises(ValueError, match=r"vllm 0\.30\.0\S*: scaled needs 0\.31\.0; install"):
        Run(Config(checkpoint="good", train_data="good.jsonl"), False)


@pytest.mark.parametrize("launcher", ["torchrun", "none"])
def test_a_port_in_use_ends_at_once(tmp_path, launcher):
    """torchrun meets it before there is a rank, and says so itself; without it rank 0 does."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", port]
        by_hand = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        process = launch(tmp_path, [*(torchrun if launcher == "torchrun" else []), "-m", "scaled.train", "--config",
                                    LAPTOP], **(by_hand if launcher == "none" else {}))
        code, out, err = finish(process, 60)
    assert code != 0 and not (tmp_path / "runs").exists()
    if launcher == "torchrun":
        assert "EADDRINUSE" in err
    else:
        lines = [line for line in err.splitlines() if line.startswith("scaled: ")]
        assert code == 2 and len(lines) == 1 and f"127.0.0.1:{port}" in lines[0]
