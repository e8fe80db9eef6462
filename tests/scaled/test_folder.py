"""One run at a time in a folder, and nothing left of a run that was refused."""
import time
from multiprocessing import get_context

import pytest

from scaled.folder import Claim, write_aside


def claim(folder, answer):
    try:
        claimed = Claim(folder, resume=False)  # noqa: F841  belongs to whoever holds it
        answer.put("mine")
    except ValueError as refusal:
        answer.put(str(refusal))
    time.sleep(60)


def test_of_several_that_come_at_once_one_gets_the_folder_until_it_ends(tmp_path):
    fork = get_context("fork")
    for _ in range(2):  # the second time a lock of nobody is there
        answers = fork.Queue()
        processes = [fork.Process(target=claim, args=(tmp_path / "runs/a", answers)) for _ in range(3)]
        for process in processes:
            process.start()
        lines = [answers.get(timeout=30) for _ in processes]
        assert lines.count("mine") == 1, lines
        taken = f"a run that has not ended is in {tmp_path}/runs/a; give another name"
        assert sum(taken in line for line in lines) == 2, lines
        for process in processes:
            process.kill()
            process.join()
        assert [path.name for path in (tmp_path / "runs/a").iterdir()] == [".lock"]


def test_a_claim_that_is_given_up_leaves_nothing_but_what_was_there(tmp_path):
    Claim(tmp_path / "runs/a", resume=False).give_up()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs/b/update-000004").mkdir(parents=True)
    Claim(tmp_path / "runs/b", resume=True).give_up()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "b", "update-000004"]
    with pytest.raises(ValueError, match="--name b: is taken; give another, or --resume b"):
        Claim(tmp_path / "runs/b", resume=False)
    with pytest.raises(ValueError, match="--resume a: .* has no checkpoint"):
        Claim(tmp_path / "runs/a", resume=True)
    (tmp_path / "runs/b/log.txt").touch()
    Claim(tmp_path / "runs/b", resume=True).give_up()
    assert (tmp_path / "runs/b/log.txt").exists()
    (tmp_path / "runs/b/log.txt").unlink()
    for code in (2, 143, 1):  # refused, stopped, failed: only the last has something to tell
        claimed = Claim(tmp_path / "runs/d", resume=False)
        (tmp_path / "runs/d/log.txt").touch()
        claimed.give_up(code)
        assert (tmp_path / "runs/d/log.txt").exists() == (code == 1)
    Claim(tmp_path / "runs/d", resume=False).give_up()  # which stands in nobody's way
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--name c: .*/file/c cannot be locked for this run: Not a directory"):
        Claim(tmp_path / "file/c", resume=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "file", "runs", "update-000004"]


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")
    (tmp_path / ".config.json").mkdir()  # what is aside cannot be written
    with pytest.raises(OSError):
        write_aside(path, "new")
    assert path.read_text() == "old"
    (tmp_path / ".config.json").rmdir()
    write_aside(path, "new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1
