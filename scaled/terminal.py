"""The terminal belongs to the run: its rows, its bar, its refusals. What libraries print goes to a
file, also what C++ prints past Python's streams."""

import os
import sys
import traceback
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_ours: list[TextIO] = []  # stdout and stderr as they were, once they have been given away


def out() -> TextIO:
    return _ours[0] if _ours else sys.stdout


def err() -> TextIO:
    return _ours[1] if _ours else sys.stderr


def give_away(log: Path):
    """File descriptors 1 and 2 of this process, and of those that it starts, append to a file from
    now on; out() and err() are still the terminal. OSError if there is no such folder."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for fd, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        # a character that the terminal cannot show is no reason to end a run
        _ours.append(open(os.dup(fd), "w", 1, stream.encoding, "backslashreplace"))
        os.dup2(file, fd)
        stream.reconfigure(line_buffering=True)  # a process can end without a chance to flush
    os.close(file)
    sys.excepthook = lambda *error: traceback.print_exception(*error, file=err())


def say(text: str, stream: TextIO | None = None):
    """A line, above the bars if there are any; of stdout unless said otherwise."""
    with tqdm.external_write_mode(err()):
        print(text, file=stream or out(), flush=True)


def bar(*args, **options) -> tqdm:
    """A progress bar on the terminal, without a trace afterwards; nothing where there is none."""
    return tqdm(*args, **dict(file=err(), dynamic_ncols=True, leave=False, disable=None) | options)


def width() -> int:
    """Columns of the terminal, or what COLUMNS says; 80 where there is neither."""
    try:  # shutil.get_terminal_size asks the stdout that has been given away
        return int(os.environ.get("COLUMNS") or os.get_terminal_size(out().fileno()).columns) or 80
    except (ValueError, OSError):
        return 80
