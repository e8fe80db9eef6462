"""The README says what the source does."""

import inspect
import json
import re
import statistics
from itertools import permutations, product
from pathlib import Path

import pytest
from figures import claims, outcomes, pairs, runner
from scipy import stats

import nano_moe_rl as nano

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
T_975 = {n: stats.t.ppf(0.975, n - 1) for n in range(2, 17)}


def test_the_quoted_loss_is_the_source():
    quoted = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert quoted == inspect.getsource(nano.minirl_loss)


def test_every_file_of_the_tree_exists_and_every_test_file_is_in_it():
    tree = re.search(r"## Files\n\n(.*?)\n\n## ", README, re.DOTALL)[1]
    listed = [line.split()[0] for line in tree.splitlines()]
    assert all((ROOT / name).exists() for name in listed)
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py")}
    assert tests <= set(listed)


def test_every_dial_it_names_is_an_option():
    dials = set(re.findall(r"(?<!-)--([a-z][a-z-]+)", re.search(r"## Dials\n(.*?)\n## ", README, re.DOTALL)[1]))
    options = {field.name.replace("_", "-") for field in nano.fields(nano.Config)}
    assert len(dials) > 6 and dials - {"help", "resume", "no-clip"} <= options


def test_pictures_exist():
    paths = re.findall(r"!\[[^]]*\]\(([^)]*)\)", README)
    assert len(paths) == 4
    for path in paths:
        assert (ROOT / path).read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_the_tutorials_have_the_verdicts_of_the_runs():
    runs = outcomes.Runs(runner.load(ROOT / "tutorials/results/core.jsonl"))
    short = claims.short_table(runs)
    assert short in (ROOT / "tutorials/README.md").read_text()
    assert claims.table(runs) in (ROOT / "tutorials/results/verdicts.md").read_text()
    assert short.count("\n") == 2 + len(claims.CLAIMS) == 22


def test_what_it_says_of_the_grid_is_in_the_runs():
    """Differences of paired seeds and their intervals, computed once more from the runs."""
    rows = [json.loads(line) for line in (ROOT / "tutorials/results/core.jsonl").read_text().splitlines()]
    ends = {(row["cell"], row["seed"]): row["engine_score"][-1][1] for row in rows}
    for N in (1, 8):
        replayed, none = ({seed: end for (cell, seed), end in ends.items() if cell == f"router | N={N} | {method}"}
                          for method in ("R3", "none"))
        test = stats.ttest_rel(*zip(*((replayed[seed], none[seed]) for seed in sorted(replayed.keys() & none.keys()))))
        interval = test.confidence_interval(0.95)
        mean = sum(replayed[seed] - none[seed] for seed in replayed.keys() & none.keys()) / (test.df + 1)
        text = f"{mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
        assert README.count(text) == 2, text
        assert f"{test.df + 1} of 16 seeds" in README or f"{test.df + 1} seeds" in README, N
    failed = [row for row in rows if row["cell"] == "fp32 | N=1 | none"]
    assert len(failed) == 8 and "0 of 8 seeds" in (ROOT / "tutorials/results/verdicts.md").read_text()


def test_every_interval_it_quotes_is_one_of_two_cells_of_the_runs():
    """On this page and on page 13: a difference of ends, paired by seed, with the 95 % interval of Student's t."""
    of_runs = set()
    for results, score in product(("core", "corrections"), ("engine_score", "score")):
        ends = {}
        for row in map(json.loads, (ROOT / f"tutorials/results/{results}.jsonl").read_text().splitlines()):
            ends.setdefault(row["cell"], {})[row["seed"]] = row[score][-1][1]
        for one, other in permutations(ends.values(), 2):
            difference = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
            if len(difference) > 1:
                mean, n = statistics.mean(difference), len(difference)
                half = T_975[n] * statistics.stdev(difference) / n**0.5
                of_runs.add(f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]")
    quoted = re.compile(r"[+-]\d\.\d{3} \[[+-]\d\.\d{3}, [+-]\d\.\d{3}\]")
    for page, least in ((README, 30), ((ROOT / "tutorials/13_corrections.md").read_text(), 5)):
        found = quoted.findall(" ".join(page.split()))
        assert len(found) >= least and not set(found) - of_runs


def test_the_cosines_it_quotes_are_those_of_the_mechanism():
    rows = json.loads((ROOT / "tutorials/results/mechanism.json").read_text())
    for key in ("router noise .8 | token weight", "router noise .8 | no IS", "router noise .8 | R3",
                "int4 | token weight", "int4 | no IS"):
        mean, low, high = (f"{x:.2f}".removeprefix("0") for x in rows[key]["deployed"])
        assert f"{mean} [{low}, {high}]" in README, key


def test_runs_to_compare_with_are_those_of_the_results():
    """The table, and its means and deviations once more from the runs."""
    rows = [json.loads(line) for line in (ROOT / "tutorials/results/core.jsonl").read_text().splitlines()]
    table = pairs.table(outcomes.Runs({(row["cell"], row["seed"]): row for row in rows}))
    assert table in README
    ends = re.findall(r"\d\.\d{3}", re.search(r"`engine_score` ends at .+? second\.", README, re.DOTALL)[0])
    assert ends == [f"{row['engine_score'][-1][1]:.3f}" for mode in ("none", "R3") for row in rows
                    if (row["cell"], row["seed"]) == (f"router | N=8 | {mode}", pairs.SEED)]
    assert pairs.commands("08_replay")[1] in README and README.count(f"--seed {pairs.SEED}") == 2
    for line in table.splitlines()[2:]:
        cell = f"router | N=8 | {re.search('--replay (.+?)`', line)[1]}"
        of = [row for row in rows if row["cell"] == cell]
        numbers = [float(x) for x in re.findall(r"\d\.\d{3}", line)]
        wanted = [f([row[name][-1][1] for row in of]) for name in ("engine_score", "score")
                  for f in (statistics.mean, statistics.stdev)]
        assert numbers == pytest.approx(wanted, abs=6e-4)
        seeds = sorted(row["seed"] for row in of)
        assert f"| {seeds[0]} to {seeds[-1]} |" in line and seeds == list(range(seeds[0], seeds[-1] + 1))
