"""Every Python block of every tutorial page runs, in order, and what it prints is what the page says."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import nano_moe_rl as nano
import pages
from scaled.config import Config, read_config

TUTORIALS = ROOT / "tutorials"
PAGES = sorted(TUTORIALS.glob("[0-9][0-9]_*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, capsys, monkeypatch):
    monkeypatch.chdir(TUTORIALS)
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
