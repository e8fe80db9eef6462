"""What the rules say of runs that are over: of scaled, of nano_moe_rl.py, of the experiments.

    python -m scaled.watch runs/laptop                                    # its events, and a table
    python -m scaled.watch runs/run-1 runs/run-2 --json                   # for machines
    python -m scaled.watch runs/laptop --picture rules.png
    python -m scaled.watch --recorded tutorials/results/core.jsonl        # do they warn in time?
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from scaled.pictures import check_picture, draw_watched
from scaled.rules import NAMES, RULES, events, unjudged


def read_run(folder: Path) -> tuple[list[dict], int, list[dict]]:
    """Rows of a run by the names of scaled, its N, and what it did about events itself. ValueError,
    in one line, for what is no run."""
    path = folder / "metrics.jsonl"
    rows = read_lines(path, "runs/NAME, the folder of a run")
    for number, row in enumerate(rows, 1):
        if "engine_score" in row:  # of the single file, whose score is that of the other engine
            row["score"] = row["engine_score"]
        check_row(row, f"{path}: line {number}")
    if any(row["update"] >= after["update"] for row, after in zip(rows, rows[1:])):
        raise ValueError(f"{path}: its updates are not in order; give the file as a run left it")
    try:
        N = json.loads((folder / "config.json").read_text())["mini_batches"]
        assert type(N) is int and 1 <= N <= 10**6
    except Exception:
        raise ValueError(f"{folder}/config.json: has no mini_batches; give the folder of a run as "
                         "it left it") from None
    written = folder / "events.jsonl"
    acts = [row for row in (read_lines(written, "the file as a run left it")
                            if written.exists() else ()) if "act" in row]
    for row in acts:
        if row["act"] not in ("save", "stop", "back") or type(row.get("update")) is not int or (
                row["act"] == "back" and (type(row.get("to")) is not int or "change" not in row)):
            raise ValueError(f"{written}: an act is not as runs write it; give the file as a run "
                             "left it")
    return rows, N, acts


def read_lines(path: Path, remedy: str) -> list[dict]:
    """ValueError, in one line, for what is no file of objects."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise ValueError(f"{path}: {reason}; give {remedy}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            assert isinstance(rows[-1], dict)
        except (ValueError, AssertionError, RecursionError):
            raise ValueError(f"{path}: line {number} is no JSON object; give {remedy}") from None
    return rows


def check_row(row: dict, where: str):
    """ValueError if a metric that some rule looks at has another type than runs write."""
    if type(row.get("update")) is not int or not 0 <= row["update"] <= 10**9:
        raise ValueError(f"{where} has no update; give the file as a run left it")
    for name in {rule.metric for rule in RULES} & row.keys():
        values = row[name] if isinstance(row[name], list) else [row[name]]
        if row[name] is not None and any(type(x) not in (int, float) or abs(x) > sys.float_info.max
                                         for x in values):
            raise ValueError(f"{where}: {name} is no number; give the file as a run left it")


def watch(rows: list[dict], N: int, acts: list[dict]) -> dict:
    """Of what read_run gives: the events of a run, what it did about some of them, and of each rule
    how many there were, the update of the first, and why it could not be applied."""
    found, reasons = events(rows, N), unjudged(rows, N)
    updates = {name: [event.update for event in found if event.rule == name] for name in NAMES}
    return {"events": [asdict(event) | {"text": str(event)} for event in found], "acts": acts,
            "rules": {name: {"events": len(of), "first": of[0] if of else None,
                             "not_applied": reasons.get(name)} for name, of in updates.items()}}


def text(watched: dict) -> str:
    """Within 80 columns: a line an event, a line an act, a line a rule."""
    lines = []
    for act in watched["acts"]:  # of updates that can be gone: they come first
        lines.append(f"update {act['update']}: {act['act']}")
        if act["act"] == "back":
            lines[-1] += f" to {act['to']} with {json.dumps(act['change'])}"
    lines += [event["text"] for event in watched["events"]]
    lines.append(f"{'rule':20}{'events':>7}{'first':>7}  holds if it is")
    for rule in RULES:
        of = watched["rules"][rule.name]
        lines.append(f"{rule.name:20}" + (
            f"{'':14}  not applied: {of['not_applied']}" if of["not_applied"] else
            f"{of['events']:7}{'-' if of['first'] is None else of['first']:>7}  {rule.default}"))
    return "\n".join(lines)


def rules_table() -> str:
    """Every rule, its default and where that is from, in Markdown."""
    rows = [f"| `{rule.name}` | `{rule.metric}` | {rule.default} | {rule.source} |"
            for rule in RULES]
    return "\n".join(["| rule | metric | holds if it is | source |", "|---|---|---|---|", *rows])


def rules_json() -> str:
    return json.dumps([{"rule": rule.name, "metric": rule.metric, "holds": rule.default,
                        "source": rule.source} for rule in RULES], indent=1)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 for what cannot be read."""
    def refuse(message: str):
        from scaled.ranks import refuse  # slow to import: --help does not wait for it
        refuse(message)

    parser = argparse.ArgumentParser("python -m scaled.watch", allow_abbrev=False,
                                     description=__doc__.split("\n")[0])
    parser.error = refuse
    parser.add_argument("runs", nargs="*", type=Path, metavar="runs/NAME", help="folders of runs")
    parser.add_argument("--recorded", type=Path, metavar="FILE",
                        help="runs of tutorials/figures: failures warned of, and false alarms")
    parser.add_argument("--rules", action="store_true", help="the rules and their sources")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--picture", metavar="FILE.png", help="draw when which rule began to hold")
    given = parser.parse_args(argv)
    if bool(given.runs) + bool(given.recorded) + given.rules != 1:
        refuse("give folders of runs, or --recorded FILE, or --rules")
    try:
        check_picture(given.picture)
        if given.picture and not given.runs:
            raise ValueError(f"--picture {given.picture}: is of runs; give their folders")
        if given.rules:
            said = rules_json() if given.json else rules_table()
        elif given.recorded:
            from scaled.recorded import report
            said = report(given.recorded, given.json)
        else:
            runs = {str(folder): read_run(folder) for folder in given.runs}
            watched = {folder: watch(*run) for folder, run in runs.items()}
            said = json.dumps(watched, indent=1) if given.json else "\n\n".join(
                f"{folder}\n{text(found)}" for folder, found in watched.items())
            if given.picture:
                draw_watched({folder: (run[0], watched[folder]) for folder, run in runs.items()},
                             given.picture)
    except ValueError as error:
        refuse(str(error))
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
