"""runs/NAME: one run at a time, files that are whole or not there, and what a run resumes with."""

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from scaled import checkpoint
from scaled.config import Config, check_name

LOCK = ".lock"
LOG = "log.txt"  # what libraries print
SAMPLES, CURVES, EVENTS = "samples.jsonl", "curves.png", "events.jsonl"
CHANGES = ("replay", "mini_batches", "lr", "watch_times")  # what going back can have changed


def write_aside(path: Path, text: str):
    """The file has the old text or the new one, whatever cuts this short."""
    aside = path.with_name(f".{path.name}")
    with naming(path):
        aside.write_text(text)
        os.replace(aside, path)


def append(path: Path, rows: list[dict]):
    """A JSON object a line, at the end of a file. OSError names the file."""
    with naming(path), open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def cut_back(path: Path, version: int):
    """Leaves the rows of a file, if there is one, up to this update: those of later ones are made
    again. Half a row at the end goes, too."""
    def stays(line: str) -> bool:
        try:
            return json.loads(line)["update"] <= version
        except (ValueError, TypeError, KeyError, RecursionError):
            return False

    if path.exists():
        lines = path.read_text(errors="replace").split("\n")
        write_aside(path, "".join(f"{line}\n" for line in lines if stays(line)))


@contextmanager
def naming(path: Path):
    """An OSError names the file: that of a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from error


def check_folder(folder: Path, resume: bool):
    """ValueError if a folder cannot take a new run, or has nothing to resume."""
    saved = checkpoint.checkpoints(folder)
    if resume and not saved:
        raise ValueError(f"--resume {folder.name}: {folder} has no checkpoint; start a run with "
                         "--config")
    if not resume and (folder.is_symlink() or folder.exists()):
        if not folder.is_dir() or {path.name for path in folder.iterdir()} - {LOCK, LOG}:
            raise ValueError(f"--name {folder.name}: is taken; give another, or " + (
                f"--resume {folder.name}" if saved else f"remove {folder}: it has no checkpoint"))


class Claim:
    """runs/NAME belongs to this process until it ends, however it ends. ValueError if another has
    it, also one that came between the check and this."""

    def __init__(self, folder: Path, resume: bool):
        self.folder = folder
        check_folder(folder, resume)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / LOCK, "w")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--name {folder.name}: a run that has not ended is in {folder}; give "
                             "another name, or end that run") from None
        except OSError as error:
            raise ValueError(f"--name {folder.name}: {folder} cannot be locked for this run: "
                             f"{error.strerror}") from error
        try:
            check_folder(folder, resume)  # again, now that nobody else can change it
        except ValueError:
            self.give_up()
            raise

    def give_up(self, code: int = 0):
        """Nothing is left of a claim that is given up before the run has written anything, but what
        libraries said where it failed: code is the process's, and 1 for that."""
        (self.folder / LOCK).unlink(missing_ok=True)
        self.file.close()
        try:
            if code != 1 and {path.name for path in self.folder.iterdir()} == {LOG}:
                (self.folder / LOG).unlink()
            self.folder.rmdir()
            self.folder.parent.rmdir()
        except OSError:  # not empty: there was something before, or is now
            pass


def resumed_config(name: str, given: dict) -> Config:
    """The options of runs/NAME, and over them those of the command line that are free to change.
    ValueError for others, and without a checkpoint."""
    folder = Path("runs", check_name(name))
    check_folder(folder, resume=True)
    saved, version = checkpoint.options(folder)
    saved |= changes(folder, version)
    known = {f.name: f.type for f in fields(Config)}
    if saved.keys() != known.keys():
        raise ValueError(f"--resume {name}: its options are not those of this version: "
                         f"{', '.join(sorted(saved.keys() ^ known.keys())):.200}")
    if wrong := sorted(key for key in known if type(saved[key]) is not known[key]):
        raise ValueError(f"--resume {name}: its options are damaged: {wrong[0]} = "
                         f"{saved[wrong[0]]!r:.40} is no {known[wrong[0]].__name__}")
    if fixed := sorted(key for key in given.keys() - Config.free if given[key] != saved[key]):
        raise ValueError(f"--resume {name}: {', '.join(fixed)} cannot change; what can: "
                         f"{', '.join(sorted(Config.free))}")
    return Config(**saved | given | {"name": name})


def changes(folder: Path, version: int) -> dict:
    """Options that a run changed when it went back, and that its checkpoint of this version does
    not have yet. ValueError if events.jsonl cannot be read."""
    found, path = {}, folder / EVENTS
    kinds = {f.name: f.type for f in fields(Config) if f.name in CHANGES}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
            if row.get("act") == "back" and row["to"] >= version:
                found |= row["change"]
            assert all(type(value) is kinds[name] for name, value in found.items())
        except (ValueError, TypeError, AttributeError, KeyError, AssertionError, RecursionError):
            raise ValueError(f"--resume {folder.name}: {path}: line {number} is no event; remove "
                             "that line") from None
    return found
