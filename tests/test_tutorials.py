"""Every Python block of every tutorial page runs, in order, and what it prints is what the page says."""

import ast
import json
import os
import re
import shlex
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT
from figures import outcomes, pairs
from scipy import stats

import nano_moe_rl as nano
import pages
from scaled.config import Config, read_config

TUTORIALS = ROOT / "tutorials"
PAGES = sorted(TUTORIALS.glob("[0-9][0-9]_*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a page may make runs
    pages.run(page)
    printed = " ".join(capsys.readouterr().out.split())
    for line in re.findall(r"^ *print\(.*?\) +# (.+)$", page.read_text(), re.MULTILINE):
        for value in re.findall(r"-?\d+\.\d+", line):
            assert value in printed, f"the page says {value}"
    for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page.read_text()):
        assert (TUTORIALS / path).stat().st_size > 0


def test_what_pages_quote_is_the_source():
    lines = [line.strip() for line in (ROOT / "nano_moe_rl.py").read_text().splitlines()]
    quotes = [quote for page in PAGES for _, quote in pages.blocks(page, "source")]
    assert len(quotes) >= 3
    for quote in quotes:
        wanted = [line.strip() for line in quote.splitlines()]
        assert any(lines[i : i + len(wanted)] == wanted for i in range(len(lines))), quote


SHELL = [(page, source) for page in PAGES for _, source in pages.blocks(page, "bash")]


@pytest.mark.parametrize("page, source", SHELL, ids=lambda x: getattr(x, "stem", ""))
def test_shell_block(page, source, tmp_path):
    """Runs it beside the sources; of one that needs more, the options are those that there are."""
    if not source.startswith("# needs "):
        for name in ("nano_moe_rl.py", "scaled", "tutorials"):
            (tmp_path / name).symlink_to(ROOT / name)
        path = os.path.dirname(sys.executable) + ":" + os.environ["PATH"]
        subprocess.run(["bash", "-euo", "pipefail", "-c", source], cwd=tmp_path, check=True, timeout=120,
                       env=os.environ | {"PATH": path})
        return
    subprocess.run(["bash", "-n", "-c", source], check=True)
    commands = [shlex.split(line, comments=True) for line in source.splitlines()]
    trained = [words for words in commands if "scaled.train" in words]
    assert trained
    for words in trained:
        parser = nano.command_line(Config, "")
        parser.add_argument("--config")
        given = vars(parser.parse_args(words[words.index("scaled.train") + 1:]))
        c = read_config(str(ROOT / given.pop("config")), given)
        c.check_processes(int(words[words.index("--nproc-per-node") + 1]))


def test_an_error_names_the_page_and_its_line(tmp_path):
    page = tmp_path / "99_wrong.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\nmore\n\n```python\nassert x == 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        pages.run(page)
    last = error.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 11)


def indented(page, start):
    """Lines of an indented block that begin so."""
    lines = (TUTORIALS / f"{page}.md").read_text().splitlines()
    return [line.strip() for line in lines if line.startswith(f"    {start}")]


@pytest.mark.parametrize("page", pairs.PAIRS)
def test_two_commands_differ_in_one_flag_and_end_as_the_runs_do(page):
    """The commands through the shell and the file's own parser; the ends once more from the runs."""
    rows = [json.loads(line) for line in (TUTORIALS / "results/core.jsonl").read_text().splitlines()]
    assert pairs.text(page, outcomes.Runs({(row["cell"], row["seed"]): row for row in rows})) in (
        TUTORIALS / f"{page}.md").read_text()
    script = "\n".join(indented(page, "recipe=") + indented(page, "same=") + [
        "printf '%s\\n' " + " ".join(f'"{line}"' for line in indented(page, "python nano_moe_rl.py"))])
    lines = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout.splitlines()
    parser = nano.command_line(nano.Config, "")
    configs = [nano.Config(**vars(parser.parse_args(line.split()[2:]))) for line in lines]
    first, second = map(vars, configs)
    assert len([name for name in first if first[name] != second[name]]) == 1
    ends = []
    for cell, config in zip(pairs.PAIRS[page], configs):
        theirs = cell.config(config.seed)
        assert nano.replace(config, eval_every=1, name="") == nano.replace(theirs, eval_every=1, name="")
        start, = {row["start_steps"] for row in rows if (row["seed"], row["cell"].split(" | ")[0]) == (
            config.seed, cell.regime) and "start_steps" in row}
        assert start == config.cold_start_steps
        ends.append({row["seed"]: row["engine_score"][-1][1] for row in rows if row["cell"] == cell.key})
    both = sorted(ends[0].keys() & ends[1].keys())
    told = (TUTORIALS / f"{page}.md").read_text().split("`engine_score` ends at")[1]
    numbers = [float(x) for x in re.findall(r"[-+]?\d\.\d+", told)][:9]
    test = stats.ttest_rel(*([of[seed] for seed in both] for of in reversed(ends)))
    wanted = [of[configs[0].seed] for of in ends]
    wanted += [f([of[seed] for seed in both]) for of in ends for f in (statistics.mean, statistics.stdev)]
    wanted += [statistics.mean(ends[1][seed] - ends[0][seed] for seed in both), *test.confidence_interval(0.95)]
    assert numbers == pytest.approx(wanted, abs=6e-4) and f"Over {len(both)} seeds" in told


def emptied(source, name):
    """The single file without the body of a function, whose docstring stays."""
    function = next(x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.FunctionDef) and x.name == name)
    lines = source.splitlines(keepends=True)
    return "".join([*lines[: function.body[1].lineno - 1], "    pass\n", *lines[function.end_lineno:]])


@pytest.mark.parametrize("page, spoil", [
    ("05_importance", lambda source: emptied(source, "importance_weights")),
    ("06_off_policy", lambda source: emptied(source, "clip_gate")),
    ("08_replay", lambda source: source.replace(first_quoted("08_replay"), "experts = live"))])
def test_the_judge_of_an_exercise_finds_the_line_that_is_missing(page, spoil, tmp_path):
    source = (ROOT / "nano_moe_rl.py").read_text()
    assert spoil(source) != source
    (tmp_path / "nano_moe_rl.py").write_text(spoil(source))
    (tmp_path / "tests").mkdir()
    for path in (ROOT / "tests").glob("*.py"):
        (tmp_path / "tests" / path.name).write_text(path.read_text())
    for name in ("scaled", "tutorials"):
        (tmp_path / name).symlink_to(ROOT / name)
    judge, = indented(page, "python -m pytest")
    done = subprocess.run([sys.executable, *shlex.split(judge)[1:], "-p", "no:cacheprovider"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout + done.stderr  # 5: no test was chosen


def first_quoted(page):
    """The first line of the first quote of a page."""
    return pages.blocks(TUTORIALS / f"{page}.md", "source")[0][1].splitlines()[0].strip()
