"""What a run says while it trains: metrics.jsonl, a row an update on the console, event files."""

import json
import math
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from scaled import checkpoint
from scaled.folder import append, write_aside

HEADER = "update score reward entropy KL(μ‖π) staleness clipped agreed rollout train sync"
ROW = ("{update:6} {score:>5} {reward:6.3f} {entropy:7.3f} {mismatch_kl:7.1e} {staleness_kl:9.1e} "
       "{clip_fraction:7.4f} {agreed:6.3f} {rollout_seconds:7.1f} {train_seconds:5.1f} "
       "{sync_seconds:4.1f}")  # seconds an update


def scalars(row: dict) -> dict:
    """Numbers of a row by name; those of a list, as routing_agreement's a layer, by place too."""
    numbers = {}
    for name, value in row.items():
        parts = {name: value}
        if isinstance(value, list):
            parts = {f"{name}/{place}": x for place, x in enumerate(value)}
        numbers |= {key: x for key, x in parts.items() if isinstance(x, (int, float))}
    return numbers


class Log:
    """Of rank 0; on the others it does nothing. `lines` are those of a checkpoint: what came after
    it in metrics.jsonl was of updates that are made again."""

    def __init__(self, folder: Path, bar: tqdm, lines: str, tensorboard: bool, silent: bool):
        self.folder, self.bar, self.silent, self.writer = folder, bar, silent, None
        self.path, self.lines, self.tensorboard = folder / checkpoint.ROWS, "", tensorboard
        self.rewind(lines)

    def rewind(self, lines: str, rest: str = ""):
        """The rows are these, what comes next follows them. The lines that go, and of which these
        are the beginning, are put into a file of the name `rest`, if one is given."""
        if self.silent:
            return
        if rest:
            write_aside(self.folder / rest, self.lines.removeprefix(lines))
        self.lines = lines
        write_aside(self.path, lines)
        self.bar.n = len(lines.splitlines())
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            if self.writer:
                self.writer.close()
            self.writer = SummaryWriter(self.folder, purge_step=len(lines.splitlines()) + 1)

    def begin(self, version: int, score: float | None):
        if not self.silent:
            before = "" if score is None else f": score {score:.3f} before update {version + 1}"
            print(f"{self.folder}{before}\n{HEADER}", flush=True)

    def add(self, rows: list[dict]):
        if self.silent:
            return
        new = "".join(json.dumps(row) + "\n" for row in rows)
        self.lines += new
        if self.path.exists():
            append(self.path, new)
        else:  # somebody removed it
            write_aside(self.path, self.lines)
        for row in rows:
            text = {"score": "" if row["score"] is None else f"{row['score']:.3f}",
                    "agreed": mean(row["routing_agreement"] or [math.nan])}
            self.bar.write(ROW.format(**row | text))
            for name, value in scalars(row).items() if self.writer else ():
                self.writer.add_scalar(name, value, row["update"])
        if self.writer:
            self.writer.flush()  # a run can end without a chance to

    def say(self, line: str):
        if not self.silent:
            self.bar.write(line)

    def close(self):
        self.bar.close()
        if self.writer:
            self.writer.close()
