"""The command line: what it refuses, and how it ends."""

import fcntl
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import RUN_FILES, SCRIPT, TINY, arguments, assert_identical, checkpoint, metrics, untimed

import nano_moe_rl as nano

pytestmark = pytest.mark.usefixtures("no_pictures")


# argv after the tiny options, the flag at fault, and what the line has to offer instead
REFUSALS = [
    ("--replay R9", "--replay", "give none or R2 or R3"),
    ("--rollout-precision fp4", "--rollout-precision", "give .*int4"),
    ("--relay R3", "--relay", "unrecognized"),
    ("--lr fast", "--lr", "float"),
    ("--updates 1.5", "--updates", "int"),
    ("--updates 0", "--updates", "give 1 to 1000000000"),
    ("--mini-batch 0", "--mini-batch", "give 1 to 1048576"),
    ("--lr nan", "--lr", "give 1e-09 to 1$"),
    ("--lr inf", "--lr", "give 1e-09 to 1$"),
    ("--lr 0", "--lr", "give 1e-09 to 1$"),
    ("--router-noise -1", "--router-noise", "give 0 to"),
    ("--clip-low 1", "--clip-low", "give 0 to 0.99"),
    ("--importance-sampling none", "--importance-sampling", "give token or sequence or staleness"),
    ("--layers 100000", "--layers", "give 1 to 64"),
    ("--layers 64 --width 4096 --heads 64 --expert-width 4096", "--layers", "give sizes .* 1e9 parameters"),
    ("--max-digits 9", "--max-digits", "give 1 to 8"),
    ("--group-size 3", "--group-size", "give .*16"),
    ("--top-k 5", "--top-k", "give .*--experts 4"),
    ("--width 64 --heads 3", "--width", "give .*--heads 3"),
    ("--width 128 --heads 1", "--width", r"give 32 or 64 times --heads 1"),
    ("--width 32 --heads 2", "--width", r"give 32 or 64 times --heads 2"),
    ("--width 48", "--width", "give .*32"),
    ("--width 96 --heads 3 --kv-heads 2", "--kv-heads", "give .*--heads 3"),
    ("--expert-width 12", "--expert-width", "give .*8"),
    ("--min-digits 5", "--max-digits", "give .*5"),
    ("--max-response 0", "--max-response", "give "),
    ("--name a/b", "--name", "give one without /"),
    ("--name ..", "--name", "give one without /"),
    ("--name done", "--name", "give .*--resume done"),
    ("--resume nobody", "--resume", "start a run"),
    ("--resume done --lr 0.25", "--resume", "only --updates"),
    ("--resume done --no-clip", "--resume", "only --updates"),
    ("--resume done --updates 2", "--resume", "only --updates, 4 or more"),
    ("--resume done --updates 5", "--updates", "give a multiple of 2"),
]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")}


@pytest.mark.parametrize("line, at_fault, remedy", REFUSALS, ids=[row[0] for row in REFUSALS])
def test_refused_in_one_line_that_leaves_no_trace(finished, monkeypatch, capsys, line, at_fault, remedy):
    monkeypatch.chdir(finished)
    before = files(finished)
    argv = line.split() if "--resume" in line else arguments() + line.split()  # the last one counts
    with pytest.raises(SystemExit) as end:
        nano.main(argv)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    assert re.search(r"--[a-z-]+", err)[0] == at_fault  # named first, before any option of the remedy
    assert re.search(remedy, err)
    assert files(finished) == before


def test_ctrl_c_leaves_a_checkpoint_a_picture_and_no_traceback(folder):
    log = Path("runs/a/metrics.jsonl")
    argv = arguments(name="a", updates=100_000, eval_every=100_000)
    run = subprocess.Popen([sys.executable, SCRIPT, *argv], cwd=folder,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                           # a shell's background jobs ignore Ctrl-C, and so would their children
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        deadline = time.monotonic() + 180
        while not (log.exists() and log.read_text().count("\n") >= 4):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 130
    assert re.fullmatch(r"stopped by Ctrl-C; --resume a goes on from runs/a/checkpoint.pt\n", err.split("\r")[-1])
    update = len(checkpoint("a")["rows"]) - 1
    assert update >= 3 and update % TINY["mini_batches"] == 0  # whole rollout batches
    assert [row["update"] for row in metrics("a")] == list(range(update + 1))
    assert {path.name for path in Path("runs/a").iterdir()} == RUN_FILES
    assert nano.main(["--resume", "a", "--updates", str(update + 2)]) == 0
    assert [row["update"] for row in metrics("a")] == list(range(update + 3))


def test_a_bug_in_training_is_no_refusal(folder, monkeypatch):
    """Exit code 2 is for what was asked; a missing route in a run keeps its traceback."""
    def stale(*_):
        raise ValueError("stale")

    monkeypatch.setattr(nano, "prepare_batch", stale)
    with pytest.raises(ValueError, match="stale"):
        nano.main(arguments(name="a"))


def spoiled(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) // 2:]
    elif how == "empty":
        data.clear()
    elif how == "one byte":
        data[len(data) // 2] ^= 1
    elif how == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
        return
    elif how == "text":
        data = b"not a checkpoint"
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "one byte", "foreign", "text"])
def test_a_damaged_checkpoint_is_refused_by_name(finished, tmp_path, monkeypatch, capsys, how):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    spoiled(Path("runs/done/checkpoint.pt"), how)
    before = files(tmp_path)
    with pytest.raises(SystemExit) as end:
        nano.main(["--resume", "done", "--updates", "6"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "runs/done/checkpoint.pt" in err
    assert files(tmp_path) == before


def test_two_processes_cannot_write_one_run(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    with open("runs/done/.lock", "w") as lock:  # as the other process holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as end:
            nano.main(["--resume", "done", "--updates", "6"])
    assert end.value.code == 2 and "--resume done: another process" in capsys.readouterr().err
    assert files(tmp_path) == before
    assert nano.main(["--resume", "done", "--updates", "6"]) == 0


def test_a_full_disk_is_one_line_and_leaves_no_half_file(folder):
    """No file may grow beyond 20 kB: the checkpoint does not fit."""
    run = subprocess.run([sys.executable, SCRIPT, *arguments(name="a")], cwd=folder, capture_output=True, text=True,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)), timeout=180)
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if "cold start:" not in line]
    assert len(lines) == 1 and lines[0].startswith("stopped by [Errno 27] File too large")
    assert {path.name for path in Path("runs/a").iterdir()} <= {"config.json", ".lock"}
    assert nano.main(arguments(name="a")) == 0  # the name is not blocked


def test_a_run_that_was_stopped_in_its_cold_start_can_start_again(folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nano, "cold_start", interrupted)
        assert nano.main(arguments(name="a")) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C; nothing is saved yet\n"
    assert nano.main(arguments(name="a")) == 0


def test_killed_at_any_moment_it_resumes_bit_for_bit(folder):
    """SIGKILL three times, at moments that differ from run to run, against a run in one go."""
    argv = arguments(name="whole", updates=40)
    assert nano.main(argv) == 0
    argv[argv.index("whole")] = "killed"
    log, kills = Path("runs/killed/metrics.jsonl"), 0
    while kills < 3:
        run = subprocess.Popen([sys.executable, SCRIPT, *argv], cwd=folder, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
        rows = len(metrics("killed")) if log.exists() else 0
        while run.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > rows):
            time.sleep(0.01)
        time.sleep(random.random() * 0.05)
        run.kill()
        kills += run.wait() == -signal.SIGKILL
        argv = ["--resume", "killed"]
        if run.returncode == 0:
            break
    assert kills and nano.main(argv) == 0
    assert untimed(metrics("killed")) == untimed(metrics("whole"))
    for part in ("model", "optimizer"):
        assert_identical(checkpoint("killed")[part], checkpoint("whole")[part])
