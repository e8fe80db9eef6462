"""What libraries print goes to a file, whoever prints it and how; what is ours reaches the terminal."""
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from scaled import terminal

ROOT = Path(terminal.__file__).parents[1]
LOUD = """
import ctypes, logging, os, subprocess, sys, warnings
before = logging.StreamHandler()  # of a library that has found stderr earlier
from pathlib import Path
from scaled.terminal import bar, err, give_away, out, say
say("ours 1"); say("ours 2", err())
give_away(Path("log.txt"))
print("theirs print"); print("theirs print to stderr", file=sys.stderr)
warnings.warn("theirs warning")
before.emit(logging.makeLogRecord({"msg": "theirs logged"}))
os.write(1, b"theirs fd 1\\n"); os.write(2, b"theirs fd 2\\n")
libc = ctypes.CDLL(None); libc.puts(b"theirs puts"); libc.fflush(None)
subprocess.run(["sh", "-c", "echo theirs child; echo theirs child to stderr >&2"])
with bar(total=3, desc="ours bar") as shown:
    shown.update(1); say("ours 3"); shown.update(1); say("ours 4", err())
raise KeyError("ours error")
"""
THEIRS = ["print", "print to stderr", "warning", "logged", "fd 1", "fd 2", "puts", "child", "child to stderr"]


def loud(folder, **streams):
    return subprocess.Popen([sys.executable, "-c", LOUD], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
                            **streams)


def test_libraries_write_to_the_file_and_we_to_the_pipes(tmp_path):
    (tmp_path / "log.txt").write_text("of an earlier start\n")
    process = loud(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.split() == "ours 1 ours 3".split()
    assert err.startswith("ours 2\nours 4\nTraceback") and err.endswith("KeyError: 'ours error'\n")
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("of an earlier start\n") and "ours" not in log.replace("ours error", "")
    for what in THEIRS:
        assert f"theirs {what}\n" in log, what


def test_on_a_terminal_rows_stand_above_the_bar(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    process = loud(tmp_path, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 4096)
        except OSError:  # Linux: nobody has the other side open
            break
    assert process.wait(60) == 1 and b"theirs" not in seen
    screen, at = [""], 0  # what carriage returns and newlines make of it
    for sign in seen.decode():
        if sign in "\r\n":
            at, screen = 0, screen + [""] * (sign == "\n")
        else:
            screen[-1] = screen[-1][:at].ljust(at) + sign + screen[-1][at + 1:]
            at += 1
    lines = [line.rstrip() for line in screen]
    assert lines[:5] == ["ours 1", "ours 2", "ours 3", "ours 4", "Traceback (most recent call last):"]
    assert b"ours bar:  33%" in seen and b"ours bar:  67%" in seen
    assert max(map(len, lines[:4])) <= 60


@pytest.mark.parametrize("columns, width", [("120", 120), ("", 80), ("many", 80), ("0", 80)])
def test_the_width_is_that_of_columns_or_80(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    with open(os.devnull, "w") as nothing:
        monkeypatch.setattr(terminal, "_ours", [nothing, nothing])
        assert terminal.width() == width
