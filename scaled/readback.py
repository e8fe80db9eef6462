"""What a run of the single file or of scaled has in its folder; nothing of it is trusted."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from scaled import checkpoint
from scaled.folder import EVENTS, SAMPLES

NANO_CHECKPOINT = "checkpoint.pt"
DEPTH = 6  # of lists and objects in a line; experts by token and layer have four


@dataclass(frozen=True)
class Recorded:
    folder: Path
    single: bool  # whether it is a run of the single file
    options: dict
    rows: list[dict]  # of metrics.jsonl, by update, from 0 if the run has that row
    samples: list[dict]
    events: list[dict]

    name = property(lambda self: str(self.folder))

    def points(self, names: str | tuple[str, str]) -> list[tuple[int, float]]:
        """Update and value of all rows that have one; of a list, its mean. Two names: that of the
        single file and that of scaled, "" where it has none."""
        name = names if isinstance(names, str) else names[not self.single]
        found = ((row["update"], number(row.get(name))) for row in self.rows)
        return [(update, value) for update, value in found if value is not None]


def number(value) -> float | None:
    """A finite number, or the mean of a list of such; None for anything else."""
    if isinstance(value, list) and value:
        parts = [number(x) if not isinstance(x, list) else None for x in value]
        return None if None in parts else math.fsum(parts) / len(parts)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < sys.float_info.max else None


def read_run(path: str) -> Recorded:
    """ValueError, one line, for what is no folder of a run, or has a file that is damaged."""
    folder = Path(path)
    if not (folder / checkpoint.OPTIONS).is_file() or not (folder / checkpoint.ROWS).is_file():
        raise ValueError(f"{path}: has no {checkpoint.OPTIONS} and {checkpoint.ROWS}; give the "
                         "folder of a run, runs/NAME")
    options = parse(folder / checkpoint.OPTIONS, read(folder / checkpoint.OPTIONS), "")
    if not {"cold_start_steps", "train_data"} & options.keys():
        raise ValueError(f"{folder / checkpoint.OPTIONS}: has neither the options of "
                         "nano_moe_rl.py nor those of scaled; give the folder of a run, runs/NAME")
    rows = read_rows(folder / checkpoint.ROWS)
    if not rows:
        raise ValueError(f"{folder / checkpoint.ROWS}: is empty; wait for the first update")
    return Recorded(folder, "cold_start_steps" in options, options, rows,
                    read_rows(folder / SAMPLES), read_rows(folder / EVENTS))


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def parse(path: Path, text: str, where: str) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}{where}: is not JSON ({str(error):.80})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}{where}: is no JSON object")
    if deeper_than(found, DEPTH):
        raise ValueError(f"{path}{where}: has lists in lists, deeper than any run writes")
    return found


def deeper_than(value, levels: int) -> bool:
    if not isinstance(value, (list, dict)):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return not levels or any(deeper_than(part, levels - 1) for part in parts)


def read_rows(path: Path) -> list[dict]:
    """Objects with an `update`, one a line; a last line that is being written does not count. []
    if there is no such file."""
    if not path.exists():
        return []
    rows = []
    for place, line in enumerate(read(path).split("\n")[:-1], 1):
        row = parse(path, line, f":{place}")
        if type(row.get("update")) is not int or not 0 <= row["update"] < 10**9:
            raise ValueError(f"{path}:{place}: has no update, a whole number from 0")
        rows.append(row)
    return rows
