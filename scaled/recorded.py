"""Do the rules warn of the failures that the experiments recorded, and how often for nothing?

A failure, and the update at which it begins, is what tutorials/figures/outcomes.py says. A rule has
warned if its first event comes before that; on a run that stays well any event is a false alarm.
The curves have a mean of 8 updates a point, so that a window of 8 is one point.
"""

import json
import math
import re
import sys
from pathlib import Path
from statistics import median

from scaled.rules import NAMES, RULES, events, unjudged

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"
ANY = "any of them"


def curves(run: dict, where: str, step: int) -> tuple[list[dict], int]:
    """Rows of a recorded run, a row a point, and its N. ValueError, in one line, if it is not as
    tutorials/figures/runner.py writes it."""
    try:
        N = int(re.search(r"\| N=(\d{1,6}) \|", run["cell"])[1])
        points = len(run["reward"])
        rows = [{"update": step * (i + 1)} for i in range(points)]
        for name in {rule.metric for rule in RULES} & run.keys() - {"score"}:
            for row, value in zip(rows, run[name], strict=True):
                row[name] = number(value)
        for update, score in run["engine_score"]:  # of the policy that is deployed
            if update % step == 0 and 1 <= update // step <= points:
                rows[update // step - 1]["score"] = number(score)
        assert N > 0 and run["stopped"] is None or isinstance(run["stopped"], str)
        assert all(math.isfinite(row["reward"]) for row in rows)
        return rows, N
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, IndexError) as error:
        raise ValueError(f"{where} is no recorded run ({type(error).__name__}: "
                         f"{str(error)[:60]}); give a core.jsonl of tutorials/figures") from None


def number(value) -> float:
    """TypeError for what is none."""
    if type(value) not in (int, float):
        raise TypeError(f"{value!r:.30} is no number")
    return float(value)


def first_events(path: Path) -> tuple[list[tuple[int | None, dict[str, int]]], dict[str, str]]:
    """Of each recorded run the update at which it fails, or None, and that of each rule's first
    event; and why some rules could not be applied to any run. ValueError for a file of others."""
    sys.path[:0] = [str(TUTORIALS), str(TUTORIALS.parent)]
    from figures import outcomes, runner

    if not path.is_file():
        raise ValueError(f"--recorded {path}: there is no such file; give a core.jsonl of "
                         "tutorials/figures")
    try:
        loaded = runner.load(path)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"--recorded {path}: is no file of recorded runs "
                         f"({type(error).__name__}); give a core.jsonl") from None
    if not loaded:
        raise ValueError(f"--recorded {path}: has no runs; give a core.jsonl of tutorials/figures")
    runs, silent = [], []
    for place, run in enumerate(loaded.values(), 1):
        rows, N = curves(run, f"--recorded {path}: run {place}", runner.STEP)
        first = {}
        for event in events(rows, N, runner.STEP):
            first.setdefault(event.rule, event.update)
        runs.append((outcomes.updates_until_failure(run), first))
        silent.append(unjudged(rows, N, runner.STEP))
    reasons = {name: silent[0][name] for name in NAMES if all(name in each for each in silent)}
    return runs, reasons


def summary(path: Path) -> list[dict]:
    """A row a rule, and one for any of them: failures, warned, updates between the first event and
    the failure, runs that stay well, false alarms, with Clopper-Pearson intervals of 95 %."""
    runs, reasons = first_events(path)
    from figures.intervals import share

    table = []
    for name in (*NAMES, ANY):
        if name in reasons:
            table.append({"rule": name, "not_applied": reasons[name]})
            continue
        ahead, failures, alarms, well = [], 0, 0, 0
        for failed, first in runs:
            at = min(first.values(), default=None) if name == ANY else first.get(name)
            if failed is None:
                well, alarms = well + 1, alarms + (at is not None)
            else:
                failures += 1
                ahead += [failed - at] if at is not None and at < failed else []
        row = {"rule": name, "failures": failures, "warned": len(ahead), "updates_before": ahead,
               "median_updates_before": median(ahead) if ahead else None, "well": well,
               "false_alarms": alarms}
        for counted, n in (("warned", failures), ("false_alarms", well)):
            of = share(row[counted], n) if n else None
            row[f"{counted}_interval"] = of and [of.low, of.high]
        table.append(row)
    return table


def text(table: list[dict]) -> str:
    """Within 80 columns."""
    lines = [f"{'rule':20}{'failures warned of':>24}{'before':>8}{'false alarms':>26}"]
    for row in table:
        if "not_applied" in row:
            lines.append(f"{row['rule']:20}  not applied: {row['not_applied']}")
            continue
        cells = [f"{row[name]} of {row[of]}" + (" [{:.2f}, {:.2f}]".format(*between) if (
            between := row[f"{name}_interval"]) else "")
                 for name, of in (("warned", "failures"), ("false_alarms", "well"))]
        before = row["median_updates_before"]
        lines.append(f"{row['rule']:20}{cells[0]:>24}{'-' if before is None else f'{before:g}':>8}"
                     f"{cells[1]:>26}")
    return "\n".join(lines)


def report(path: Path, as_json: bool) -> str:
    table = summary(path)
    return json.dumps(table, indent=1) if as_json else text(table)
