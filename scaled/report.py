"""One page about one or several runs, of the single file or of scaled, without a server.

    python -m scaled.report runs/laptop                       # writes runs/laptop/report.html
    python -m scaled.report runs/a runs/b --out compare.html
    python -m scaled.report runs/a runs/b --json              # the numbers of its first table
"""

import argparse
import json
import sys
from pathlib import Path

from scaled.charts import curves, grid
from scaled.folder import write_aside
from scaled.page import DASHES, MARK, page, table, visible
from scaled.ranks import refuse
from scaled.readback import NANO_CHECKPOINT, Recorded, number, read_run
from scaled.routemap import TITLES, RouteMap, maps_of_sample, maps_of_single
from scaled.terminal import width


def summary(run: Recorded) -> dict:
    """The numbers of a run in a line."""
    scores = run.points(("engine_score", "score"))
    rewards, seconds = run.points("reward"), [x for _, x in run.points("seconds")]
    return {"run": run.name, "kind": "single" if run.single else "scaled",
            "updates": run.rows[-1]["update"],
            "first_score": scores[0][1] if scores else None,
            "last_score": scores[-1][1] if scores else None,
            "last_reward": rewards[-1][1] if rewards else None,
            "seconds_per_update": sum(seconds) / len(seconds) if seconds else None,
            "updates_without_gradient": sum(x == 1 for _, x in run.points("equal_groups")),
            "events": len(run.events)}


HEADS = {"run": "run", "kind": "kind", "updates": "updates", "first_score": "before",
         "last_score": "after", "last_reward": "reward", "seconds_per_update": "s/update",
         "updates_without_gradient": "no grad", "events": "events"}


def cell(value) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def differences(runs: list[Recorded]) -> list[tuple[str, list]]:
    """Options that all runs have and that are not the same in all, with the value in each."""
    shared = [name for name in runs[0].options if all(name in run.options for run in runs)]
    values = [(name, [run.options[name] for run in runs]) for name in shared if name != "name"]
    return [(name, row) for name, row in values
            if len({json.dumps(value, sort_keys=True) for value in row}) > 1]


def configuration(runs: list[Recorded]) -> str:
    html = ""
    if len(runs) > 1:
        rows = [[visible(name), *map(visible, values)] for name, values in differences(runs)]
        heads = ["option", *(visible(run.name) for run in runs)]
        html = table(heads, rows) if rows else "<p>Options that all have are equal.</p>"
    for run in runs:
        rows = [[visible(name), visible(value)] for name, value in run.options.items()]
        html += (f"<details><summary>all options of {visible(run.name)}</summary>"
                 f"{table(['option', 'value'], rows)}</details>\n")
    return html


def events(run: Recorded) -> str:
    """As guard.py writes them: a rule that began to hold, or what the run did about one."""
    rows = []
    for event in run.events:
        value, limit = number(event.get("value")), number(event.get("limit"))
        told = "" if limit is None else f"limit {limit:.3g}, it was " + (
            "not a number" if value is None else f"{value:.3g}")
        if "act" in event:
            told = str(event["act"])
            if "to" in event:
                told += f" to {event['to']} with {json.dumps(event.get('change'))}"
        rows.append([visible(event["update"]), visible(event.get("rule", "")), visible(told)])
    return table(["update", "rule", "what"], rows)


def response(sample: dict) -> str:
    reward = number(sample.get("reward"))
    told = ("" if reward is None else f"reward {reward:g}") + (
        ", cut off" if sample.get("truncated") is True else "")
    return f'{visible(sample.get("response", ""))}\n<span class="dim">{told}</span>'


def responses(samples: list[dict]) -> str:
    """Those to held-out prompts, at the first score and at the last; without such all there are."""
    held_out = [sample for sample in samples if sample.get("source") == "held out"]
    if not held_out:
        rows = [[visible(sample["update"]), visible(sample.get("prompt", "")), response(sample)]
                for sample in samples]
        return table(["update", "prompt", "response"], rows, "stack")
    first, last = held_out[0]["update"], held_out[-1]["update"]
    before, after = ({str(sample.get("prompt_id")): sample for sample in held_out
                      if sample["update"] == update} for update in (first, last))
    rows = [[visible(sample.get("prompt", "")), response(sample), response(after[prompt])]
            for prompt, sample in before.items() if prompt in after]
    return table(["prompt", f"update {first}", f"update {last}"], rows, "stack")


KEY = """<p>A row is a token, a column a layer; grey tokens are the prompt's. A coloured cell has
the number of experts that training used and the engine had not; a ring stands where the router
chose others than replay gave it. Point at a cell to see the experts.</p>\n"""
FROM_CHECKPOINT = """<p>Sampled from checkpoint.pt for this page, on new prompts. The map of experts
below is of the last update that this rollout batch would make.</p>\n"""
RECORDED = """Recorded in training: a response of a rollout batch's last mini-batch, which before
that update went through π_θ alone, once under each mode."""


def shares(groups: list[list[RouteMap]]) -> list[dict]:
    return [{"mode": one.mode, "update": one.update, "pairs": len(one.pairs),
             "other_experts": sum(one.others(*pair) > 0 for pair in one.pairs),
             "router_overruled": sum(one.overruled(*pair) for pair in one.pairs)}
            for maps in groups for one in maps]


def routes(run: Recorded, groups: list[list[RouteMap]]) -> str:
    """The maps of a group are of one sequence."""
    told = [] if run.single or len(groups[-1]) == 1 else [RECORDED]
    told += [f"The run itself trains under {mode}." for mode in TITLES
             if mode == run.options.get("replay")]
    if run.options.get("mini_batches") == 1:
        told.append("With N = 1 π_old is π_θ, and R2 the same as none.")
    rows = [[str(x["update"]), TITLES[x["mode"]], f"{x['other_experts']} of {x['pairs']}",
             f"{x['router_overruled']} of {x['pairs']}"] for x in shares(groups)]
    pictures = "".join(f'<div class="scroll"><h3>update {group[0].update}</h3>{grid(group)}</div>\n'
                       for group in groups)
    heads = ["update", "experts of π_θ", "other than the engine's", "router overruled"]
    return (f"{KEY}<p>{' '.join(told)}</p>\n{table(heads, rows)}"
            f'<div class="maps">{pictures}</div>')


def legend(place: int) -> str:
    return ('<span class="key"><svg viewBox="0 0 32 10"><path class="line '
            f'run{place}" d="M0 5H32"/></svg></span>&#160;')


def build(runs: list[Recorded]) -> tuple[str, dict]:
    """The page, and the numbers of its tables. ValueError for a checkpoint or a sample that is
    damaged."""
    numbers = [summary(run) for run in runs]
    rows = [[(legend(i) if name == "run" else "") + visible(cell(row[name])) for name in HEADS]
            for i, row in enumerate(numbers)]
    panels = "".join(f"<figure><figcaption>{title}</figcaption>{svg}</figure>\n"
                     for title, svg in curves(runs))
    sections = [("Runs", table([*HEADS.values()], rows)),
                ("Curves", f'<div class="panels">{panels}</div>'),
                ("Configuration", configuration(runs))]
    for run, row in zip(runs, numbers):
        of, groups, samples = (f" of {run.name}" if len(runs) > 1 else ""), [], run.samples
        if run.events:
            sections.append((f"Events{of}", events(run)))
        if run.single and (run.folder / NANO_CHECKPOINT).exists():
            maps, samples = maps_of_single(run)
            groups = [maps]
        elif not run.single:
            groups = [maps for sample in samples if (maps := maps_of_sample(run, sample))]
            groups = groups[:1] + groups[1:][-1:]  # the first and the last
        if samples:
            made = FROM_CHECKPOINT if run.single else ""
            sections.append((f"Responses{of}", made + responses(samples)))
        if groups:
            sections.append((f"Experts of both engines{of}", routes(run, groups)))
        row["routes"] = shares(groups)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return page(title, sections), numbers


def lines(numbers: list[dict]) -> list[str]:
    """The first table for a terminal: the names of runs lose their beginnings where there is no
    room."""
    rows = [[*HEADS.values()]] + [[cell(row[name]) for name in HEADS] for row in numbers]
    rest = [max(len(row[i]) for row in rows) for i in range(1, len(HEADS))]
    room = max(8, width() - sum(rest) - len(rest))
    names = [row[0] if len(row[0]) <= room else "…" + row[0][1 - room:] for row in rows]
    wide = max(map(len, names))
    return [" ".join([f"{name:{wide}}", *(f"{x:>{w}}" for x, w in zip(row[1:], rest))])
            for name, row in zip(names, rows)]


def check_out(out: Path):
    """ValueError for a file that cannot be the report, or that is something else."""
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.exists() and not (out.is_file() and out.read_bytes().startswith(MARK.encode())):
        raise ValueError(f"--out {out}: exists and is no report; give another file")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; SystemExit 2, and nothing written, for what was refused."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                    usage=argparse.SUPPRESS)
    flags.error = refuse
    flags.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, runs/NAME")
    flags.add_argument("--out", metavar="FILE", help="the page [report.html in the first folder]")
    flags.add_argument("--json", action="store_true", help="print the numbers of the tables so")
    given = flags.parse_args(argv)
    out = Path(given.out if given.out is not None else Path(given.runs[0], "report.html"))
    try:
        if len(given.runs) > len(DASHES):
            raise ValueError(f"{len(given.runs)} runs: give at most {len(DASHES)}")
        runs = [read_run(path) for path in given.runs]
        check_out(out)
        html, numbers = build(runs)
        write_aside(out, html)
    except (ValueError, OSError) as error:
        refuse(str(error))
    if given.json:
        print(json.dumps({"page": str(out), "runs": numbers}, indent=2))
    else:
        print("\n".join([*lines(numbers), f"{out}: open it in a browser"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
