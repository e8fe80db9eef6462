"""The command line of the figures: see __init__."""
import argparse, json, os, sys  # noqa: E401
from pathlib import Path

TUTORIALS = Path(__file__).resolve().parents[1]
sys.path[0] = str(TUTORIALS)  # instead of this folder, which python puts there
sys.path.insert(1, str(TUTORIALS.parent))

import figures  # noqa: E402
import nano_moe_rl as nano  # noqa: E402
from figures import claims, drawing, grid, mechanism, moving, outcomes, pairs, runner  # noqa: E402


def plan(blocks: list[grid.Block], path: Path) -> str:
    """Each block: runs done, runs in all, and core-minutes of what is left."""
    done, lines, counted = runner.load(path), [], set()
    for block in blocks:
        runs = [(cell, seed) for seed in block.seeds for cell in block.cells]
        todo = [(cell, seed) for cell, seed in runs if (cell.key, seed) not in done.keys() | counted]
        counted |= {(cell.key, seed) for cell, seed in todo}
        minutes = sum(grid.minutes(cell) for cell, _ in todo)
        lines.append(f"{block.name:34} {len(runs) - len(todo):3} of {len(runs):3} done, {minutes:4.0f} min left: "
                     f"{block.why}")
    return "\n".join(lines)


def report(results: Path):
    runs = outcomes.Runs(runner.load(results / "core.jsonl"))
    revisions = sorted({row["revision"] for of in runs.cells.values() for row in of.values()})
    made = f"{sum(map(len, runs.cells.values()))} runs, made with nano_moe_rl.py as of git blob {', '.join(revisions)}"
    text = f"# Verdicts\n\n{made}. {claims.table(runs)}\n# Outcomes of every cell\n\n{outcomes.table(runs)}"
    (results / "verdicts.md").write_text(text)
    print(text)
    gradients = read(results / "mechanism.json")
    captions = [draw(runs, results) for draw in drawing.PICTURES] + [drawing.mechanism(gradients, results)]
    print(*filter(None, captions), sep="\n")
    for page in pairs.PAIRS:
        try:
            print(f"\nfor {page}.md:\n\n{pairs.text(page, runs)}")
        except outcomes.NotRun as missing:
            print(f"\nfor {page}.md: no run yet of {missing.args[0]}")
    try:
        print(f"\nfor README.md:\n\n{pairs.table(runs)}")
    except outcomes.NotRun as missing:
        print(f"\nfor README.md: no run yet of {missing.args[0]}")


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def main():
    parser = argparse.ArgumentParser("python tutorials/figures", description=figures.__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name, text in (("plan", "what is run in which order, what is done, what the rest costs"),
                       ("core", "make the runs that are not done yet; resumes"),
                       ("corrections", "runs of the corrections that no claim asks for; resumes; their outcomes"),
                       ("mechanism", "gradients of the estimators, no training; resumes"),
                       ("report", "verdicts and pictures from what there is"),
                       ("all", "core, mechanism and report"),
                       ("moving", "pictures/routes.html, and with Chromium its still"),
                       ("again", "one run once more: does the single file still give its numbers?")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--results", type=Path, default=TUTORIALS / "results", metavar="DIR")
        command.add_argument("--quick", action="store_true", help="one seed, tiny runs: does it work at all?")
        if name in ("core", "corrections", "all"):
            command.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side, a thread each")
        if name in ("core", "all"):
            command.add_argument("--blocks", type=int, default=len(grid.BLOCKS), help="only the first of them")
        if name == "again":
            command.add_argument("cell", help="such as 'router | N=1 | R3'")
            command.add_argument("seed", type=int)
    given = parser.parse_args()
    results = given.results
    if given.what in ("core", "corrections", "mechanism", "report", "all"):
        results.mkdir(parents=True, exist_ok=True)
    if given.what == "plan":
        print(plan(grid.BLOCKS, results / "core.jsonl"))
        print("\nby `corrections`:\n" + plan(grid.CORRECTIONS, results / "corrections.jsonl"))
    if given.what == "moving":
        print(*moving.write(TUTORIALS / "pictures"), sep="\n")
    if given.what == "again":
        sys.exit(not runner.again(given.cell, given.seed, results / "core.jsonl", given.quick))
    if given.what in ("core", "all"):
        runner.run_blocks(grid.BLOCKS[:given.blocks], results / "core.jsonl", given.jobs, given.quick)
    if given.what == "corrections":
        runner.run_blocks(grid.CORRECTIONS, results / "corrections.jsonl", given.jobs, given.quick)
        print(outcomes.table(outcomes.Runs(runner.load(results / "corrections.jsonl"))))
    if given.what in ("mechanism", "all"):
        path = results / "mechanism.json"
        mechanism.measure(given.quick, read(path), lambda rows: nano.save(path, json.dumps(rows, indent=1).encode()))
    if given.what in ("report", "all"):
        report(results)


if __name__ == "__main__":
    main()
