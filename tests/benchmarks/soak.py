"""Does a run survive to be killed at any moment? SIGKILL for all of its processes, again and again.

    python tests/benchmarks/soak.py --kills 100

The smallest run, of two ranks of a CPU, with a checkpoint after each rollout batch. Each start goes
on from the newest checkpoint and is killed at a moment drawn by the seed: while it starts, trains
or writes. Afterwards it comes to an end, and so does a run that nobody interrupts: the metrics of
every update have to be equal, to the last bit, and so have the files of weights and moments.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/scaled")]

from processes import finish, kill, prepare, start  # noqa: E402
from scaled import checkpoint  # noqa: E402

TIMED = ("seconds", "gib", "device")
TITLE = "kill  seconds  starting  updates made  checkpoint  attempt left"
ROW = "{kill:4}  {seconds:7.2f}  {starting!s:>8}  {updates:12}  {version:10}  {attempt!s:>12}"


def begin(folder: Path, name: str, *options):
    """The run, from its newest checkpoint if it has one. What is left of one that was killed before
    it had any is removed, as its refusal advises."""
    path = folder / "runs" / name
    if checkpoint.checkpoints(path):
        return start(folder, "scaled.train", "--resume", name, *options)
    shutil.rmtree(path, ignore_errors=True)
    return start(folder, "scaled.train", "--config", "options.toml", "--name", name, *options)


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_once(folder: Path, name: str, seconds: float, from_start: bool) -> dict:
    """Starts the run and kills all of its processes so many seconds after its start, or after the
    moment at which training begins -> what was there then. AssertionError if it ended by itself."""
    rows = folder / "runs" / name / "metrics.jsonl"
    process = begin(folder, name)
    before, until = stamp(rows), time.monotonic() + 300
    while not from_start and stamp(rows) <= before:  # which is written anew when training begins
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)
    time.sleep(seconds)
    assert process.poll() is None, process.communicate()
    kill(process)
    _, _, err = finish(process, 30)
    assert "is damaged" not in err, err  # the checkpoint that this start went on from
    saved = checkpoint.checkpoints(rows.parent)
    return {"seconds": seconds, "starting": from_start,
            "updates": max(len(rows.read_text().splitlines()) - 1, 0) if rows.exists() else 0,
            "version": checkpoint.version_of(saved[-1]) if saved else 0,
            "attempt": any(rows.parent.glob(".update-*"))}


def complete(folder: Path, name: str, updates: int) -> tuple[list[dict], dict]:
    """The run to its end -> its rows without times, and the digests of its last checkpoint."""
    code, _, err = finish(begin(folder, name, "--updates", str(updates)), 600)
    assert code == 0 and "is damaged" not in err, err
    rows = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    newest = checkpoint.checkpoints(folder / "runs" / name)[-1]
    return ([{key: x for key, x in row.items() if not key.endswith(TIMED)} for row in rows],
            {key: x for key, x in checkpoint.read_digests(newest).items() if key.endswith("distcp")})


def soak(folder: Path, kills: int, seed: int, say=print) -> list[dict]:
    """A row for each kill. AssertionError if what comes of it is not what it would have been. One
    kill of five is within 8 s of the start, the others within 3 s of the first rollout."""
    prepare(folder, updates=100_000, checkpoint_every=2, save_in_background=True)
    drawn, found = random.Random(seed), []
    say(TITLE)
    for number in range(1, kills + 1):
        early = drawn.random() < 0.2
        moment = drawn.uniform(0, 8 if early else 3)
        found.append({"kill": number} | kill_once(folder, "killed", moment, early))
        say(ROW.format(**found[-1]))
    updates = found[-1]["version"] + 4
    killed, whole = (complete(folder, name, updates) for name in ("killed", "whole"))
    made = [[row["update"] for row in rows] for rows, _ in (killed, whole)]
    assert made[0] == made[1] and made[0][-1] == updates, made  # the first row is of update 0
    differ = [(a["update"], key, a.get(key), b.get(key)) for a, b in zip(killed[0], whole[0])
              for key in sorted(a.keys() | b.keys()) if repr(a.get(key)) != repr(b.get(key))]
    assert not differ, f"update, metric, with kills, without: {differ[:9]}"  # NaN is equal to NaN
    assert killed[1] == whole[1], "weights or moments differ"
    say(f"{kills} kills, {sum(row['attempt'] for row in found)} of them while a checkpoint was "
        f"written; {updates} updates, all metrics and the last checkpoint equal to those of a run "
        "without a kill")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), args.kills, args.seed, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
