"""The README says what the source does."""

import inspect
import re
from pathlib import Path

import nano_moe_rl as nano

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


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
    assert len(paths) == 2
    for path in paths:
        assert (ROOT / path).read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_what_it_says_of_the_grid_is_in_the_verdicts():
    verdicts = (ROOT / "tutorials/results/verdicts.md").read_text().replace("-", "−")
    for text in ("0.48 [0.38, 0.62]", "19 against 9 of 24", "in 6 of 8 seeds"):
        assert text in verdicts
    assert "8 to 8" in verdicts and verdicts.count("**reproduced**") == 4 and verdicts.count("**undecided**") == 16
