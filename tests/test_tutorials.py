"""Every Python block of every tutorial page runs, in order, and what it prints is what the page says."""

import re

import pytest
from conftest import ROOT

import pages

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


def test_an_error_names_the_page_and_its_line(tmp_path):
    page = tmp_path / "99_wrong.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\nmore\n\n```python\nassert x == 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        pages.run(page)
    last = error.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 11)
