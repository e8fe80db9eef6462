"""Runs the Python blocks of tutorial pages, in order, one namespace a page.

    python tutorials/pages.py                   # all pages
    python tutorials/pages.py 01_policy.md      # one page; it draws its picture into tutorials/pictures/
"""
import re
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PICTURES = FOLDER / "pictures"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]


def blocks(page: Path, language: str = "python") -> list[tuple[int, str]]:
    """(line number, source) of each block in a language, those in folded solutions too. A shell block
    (bash) that takes more than seconds on a CPU begins with "# needs", and what. "source" quotes the
    single file, line by line."""
    text = page.read_text()
    return [(text[: match.start(1)].count("\n"), match[1])
            for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def run(page: Path) -> dict:
    """The namespace after all blocks. An error shows the page and the line in it."""
    namespace = {"__name__": page.stem, "PICTURES": PICTURES}
    for line, source in blocks(page):
        exec(compile("\n" * line + source, str(page), "exec"), namespace)
    return namespace


def main():
    names = sys.argv[1:] or sorted(path.name for path in FOLDER.glob("[0-9][0-9]_*.md"))
    for name in names:
        began = time.perf_counter()
        run(FOLDER / name)
        print(f"{name}: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
