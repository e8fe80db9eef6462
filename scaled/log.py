"""What a run says while it trains: rows of metrics for files and for people, samples, a picture."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from nano_moe_rl import draw
from scaled import checkpoint
from scaled.config import Config
from scaled.console import Table
from scaled.folder import CURVES, SAMPLES, append, cut_back, naming, write_aside
from scaled.terminal import say, width

PAUSE = 20.0  # seconds at least between two pictures, of which each takes about one
ROUNDING = 1e-12  # nats: a KL below is 0, and a logarithmic axis should not reach down to it


def scalars(row: dict) -> dict:
    """Numbers of a row by name; those of a list, as routing_agreement's a layer, by place too."""
    numbers = {}
    for name, value in row.items():
        parts = {name: value}
        if isinstance(value, list):
            parts = {f"{name}/{place}": x for place, x in enumerate(value)}
        numbers |= {key: x for key, x in parts.items() if isinstance(x, (int, float))}
    return numbers


def drawable(rows: list[dict]) -> list[dict]:
    """Rows as those of the single file, for its `draw`: what was not measured has no name."""
    def value(name, x):
        return 0.0 if name.endswith("_kl") and x < ROUNDING else x

    return [{name: value(name, x) for name, x in row.items() if x is not None} for row in rows]


class Log:
    """Of rank 0; on the others it does nothing. `lines` are those of a checkpoint: what came after
    it in metrics.jsonl was of updates that are made again."""

    def __init__(self, c: Config, folder: Path, lines: str, version: int, silent: bool):
        self.c, self.folder, self.silent, self.lines, self.writers = c, folder, silent, "", []
        self.path, self.drawn = folder / checkpoint.ROWS, time.monotonic()
        self.table = None if silent else Table(width())
        self.rewind(lines, version)

    def rewind(self, lines: str, version: int, rest: str = ""):
        """The rows are these, up to this update, and what comes next follows them. The lines that
        go, and of which these are the beginning, are put into a file of the name `rest`, if one is
        given."""
        if self.silent:
            return
        if rest:
            write_aside(self.folder / rest, self.lines.removeprefix(lines))
        self.lines = lines
        write_aside(self.path, lines)
        cut_back(self.folder / SAMPLES, version)
        for writer in self.writers:
            writer.close()
        self.writers = [EventFiles(self.folder, version)] if self.c.tensorboard else []
        if self.c.wandb:
            self.writers.append(WeightsAndBiases(self.c, self.folder, self.rows()))

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.lines.splitlines()]

    def begin(self, scores: dict, version: int, samples: list[dict]):
        """The policy before the first update is row 0; that of a resumed run has its row."""
        if self.silent:
            return
        score = "" if scores["score"] is None else (
            f": score {scores['score']:.3f} before update {version + 1}")
        say(f"{self.folder}{score}\n{self.table.header()}")
        if not self.lines:
            self.write([{"update": 0} | scores], samples)

    def add(self, rows: list[dict], samples: list[dict]):
        if not self.silent:
            self.write(rows, samples)
            for row in rows:
                say("\n".join(self.table.lines(row)))

    def write(self, rows: list[dict], samples: list[dict]):
        self.lines += "".join(json.dumps(row) + "\n" for row in rows)
        if self.path.exists():
            append(self.path, rows)
        else:  # somebody removed it
            write_aside(self.path, self.lines)
        append(self.folder / SAMPLES, [{"update": rows[-1]["update"]} | row for row in samples])
        for writer in self.writers:
            for row in rows:
                writer.write(scalars(row), row["update"])

    def draw(self, last: bool = False):
        """The curves so far; seldom enough to cost little, unless it is the last time."""
        if self.silent or not last and time.monotonic() < self.drawn + PAUSE:
            return
        with naming(self.folder / CURVES):
            draw(drawable(self.rows()), self.folder / CURVES)
        self.drawn = time.monotonic()

    def say(self, line: str):
        if not self.silent:
            say(line)

    def close(self):
        self.draw(last=True)
        for writer in self.writers:
            writer.close()


class EventFiles:
    """TensorBoard's, beside metrics.jsonl."""

    def __init__(self, folder: Path, version: int):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder, purge_step=version + 1)

    def write(self, numbers: dict, update: int):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, update)
        self.writer.flush()  # a run can end without a chance to

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """Project, account and mode are those of W&B's own settings and WANDB_… variables. A run that
    is resumed becomes a new one there, which gets the earlier rows, too."""

    def __init__(self, c: Config, folder: Path, rows: list[dict]):
        import wandb
        self.run = wandb.init(name=c.name, dir=folder, config=asdict(c),
                              settings=wandb.Settings(console="off"))
        for row in rows:
            self.write(scalars(row), row["update"])

    def write(self, numbers: dict, update: int):
        self.run.log(numbers, step=update)

    def close(self):
        self.run.finish()
