"""The command line: what it refuses, and how it ends."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import RUN_FILES, SCRIPT, TINY, arguments, checkpoint, metrics

import nano_moe_rl as nano

pytestmark = pytest.mark.usefixtures("no_pictures")


# argv after the tiny options, the flag at fault, and what the line has to offer instead
REFUSALS = [
    ("--replay R9", "--replay", "give none or R2 or R3"),
    ("--rollout-precision fp4", "--rollout-precision", "give .*int4"),
    ("--relay R3", "--relay", "unrecognized"),
    ("--lr fast", "--lr", "float"),
    ("--updates 1.5", "--updates", "int"),
    ("--updates 0", "--updates", "give 1 or more"),
    ("--micro-batch 0", "--micro-batch", "give 1 or more"),
    ("--lr nan", "--lr", "give 1e-09 or more"),
    ("--lr inf", "--lr", "give 1e-09 or more"),
    ("--lr 0", "--lr", "give 1e-09 or more"),
    ("--group-size 3", "--group-size", "give .*16"),
    ("--top-k 5", "--top-k", "give .*--experts 4"),
    ("--width 64 --heads 3", "--width", "give .*--heads 3"),
    ("--width 128 --heads 1", "--width", r"give 32 or 64 times --heads 1"),
    ("--width 32 --heads 2", "--width", r"give 32 or 64 times --heads 2"),
    ("--width 48", "--width", "give .*32"),
    ("--width 96 --heads 3 --kv-heads 2", "--kv-heads", "give .*--heads 3"),
    ("--expert-width 12", "--expert-width", "give .*8"),
    ("--min-digits 5", "--max-digits", "give .*5"),
    ("--max-digits 11 --max-response 99", "--max-digits", "give .*10"),
    ("--max-response 0", "--max-response", "give "),
    ("--name a/b", "--name", "give one without /"),
    ("--name ..", "--name", "give one without /"),
    ("--name done", "--name", "give .*--resume done"),
    ("--resume nobody", "--resume", "start a run"),
    ("--resume done --lr 0.25", "--resume", "only --updates can change"),
    ("--resume done --no-clip", "--resume", "only --updates can change"),
    ("--resume done --updates 0", "--updates", "give 1 or more"),
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
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 130
    assert "--resume a" in err and "Traceback" not in err
    update = len(checkpoint("a")["rows"])
    assert update >= 3 and update % TINY["mini_batches"] == 0  # whole rollout batches
    assert [row["update"] for row in metrics("a")] == list(range(1, update + 1))
    assert {path.name for path in Path("runs/a").iterdir()} == RUN_FILES
    assert nano.main(["--resume", "a", "--updates", str(update + 2)]) == 0
    assert [row["update"] for row in metrics("a")] == list(range(1, update + 3))


def test_a_bug_in_training_is_no_refusal(folder, monkeypatch):
    """Exit code 2 is for what was asked; a missing route in a run keeps its traceback."""
    def stale(*_):
        raise ValueError("stale")

    monkeypatch.setattr(nano, "prepare_batch", stale)
    with pytest.raises(ValueError, match="stale"):
        nano.main(arguments(name="a"))
