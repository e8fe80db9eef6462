"""Checkpoints that are damaged, planted or another model's: passed over or refused by name, never executed."""
import io
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from saving import plant, run, saved, trainer, values  # noqa: F401

import nano_moe_rl as nano
from scaled import checkpoint
from scaled.export import export_nano


def cut(path, part=0.5):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * part)])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = [  # a newest checkpoint, and what is said of it
    ("shard-cut", lambda p: cut(p / "__0_0.distcp"), "__0_0.distcp is not as it was written"),
    ("shard-empty", lambda p: cut(p / "__0_0.distcp", 0), "__0_0.distcp is not as it was written"),
    ("shard-one-bit", lambda p: flip(p / "__0_0.distcp"), "__0_0.distcp is not as it was written"),
    ("shard-gone", lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp: No such file"),
    ("contents-cut", lambda p: cut(p / ".metadata"), ".metadata is not as it was written"),
    ("contents-gone", lambda p: (p / ".metadata").unlink(), ".metadata: No such file"),
    ("contents-folder", lambda p: ((p / ".metadata").unlink(), (p / ".metadata").mkdir()),
     ".metadata: Is a directory"),
    ("options-edited", lambda p: (p / "config.json").write_text("{}"), "config.json is not as it was"),
    ("rows-gone", lambda p: (p / "metrics.jsonl").unlink(), "metrics.jsonl: No such file"),
    ("digests-gone", lambda p: (p / "files.json").unlink(), "files.json: No such file"),
    ("digests-cut", lambda p: cut(p / "files.json"), "files.json is not JSON"),
    ("digests-list", lambda p: (p / "files.json").write_text("[1]"), "files.json does not list"),
    ("empty-folder", lambda p: (shutil.rmtree(p), p.mkdir()), "files.json: No such file"),
    ("a-file", lambda p: (shutil.rmtree(p), p.touch()), "files.json: Not a directory"),
]


@pytest.mark.parametrize("damage, reason", [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(saved, run, damage, reason):
    older, newest = checkpoint.checkpoints(run)
    damage(newest)
    path, line = checkpoint.newest_whole(checkpoint.checkpoints(run))
    assert path == older and line.count("\n") == 0
    assert line.startswith(f"{newest} is damaged ({reason}") and line.endswith(f": going on from {older}")
    policy, optimizer = trainer(saved[0] / "hf")
    assert checkpoint.load(path, policy, optimizer) == 4
    assert all(map(torch.equal, values(policy, optimizer), saved[1][4]))
    assert checkpoint.options(run)[0] == {"name": "run", "lr": 1.0}
    checkpoint.set_aside(run, 4)
    assert checkpoint.checkpoints(run) == [older] and (run / "damaged-update-000008").exists()


def test_no_checkpoint_that_is_whole_is_refused_with_all_reasons(run):
    cut(run / "update-000004/__0_0.distcp")
    (run / "update-000008/config.json").unlink()
    with pytest.raises(ValueError, match="000008 is damaged .*; .*000004 is damaged .*") as refusal:
        checkpoint.newest_whole(checkpoint.checkpoints(run))
    assert "\n" not in str(refusal.value)


class Planted:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_planted_table_of_contents_is_not_executed(saved, run, tmp_path):
    newest, mark = run / "update-000008", tmp_path / "mark"
    plant(newest, ".metadata", pickle.dumps(Planted(mark)))
    path, line = checkpoint.newest_whole(checkpoint.checkpoints(run))
    assert path.name == "update-000004" and "names posix.mkdir, which no checkpoint of a run has" in line
    policy, optimizer = trainer(saved[0] / "hf")
    with pytest.raises(ValueError, match="cannot be loaded"):
        checkpoint.load(newest, policy, optimizer)
    assert not mark.exists()
    with pytest.raises(Exception):  # the plant is a working one: torch itself would have executed it
        dcp.FileSystemReader(newest).read_metadata()
    assert mark.exists()


def test_a_planted_value_among_the_weights_is_not_executed(saved, run, tmp_path):
    """What is not a tensor stands between the tensors as a pickle of its own."""
    newest, mark = run / "update-000008", tmp_path / "mark"
    policy, optimizer = trainer(saved[0] / "hf")
    contents = checkpoint.Reader(newest).read_metadata()
    where = next(info for index, info in contents.storage_data.items() if index.fqn == "version")
    stream = io.BytesIO()
    torch.save(Planted(mark), stream)
    data = (newest / where.relative_path).read_bytes()
    where.offset, where.length = len(data), stream.tell()
    plant(newest, where.relative_path, data + stream.getvalue())
    plant(newest, ".metadata", pickle.dumps(contents))
    with pytest.raises(ValueError, match="cannot be loaded: .*: version is not a plain value"):
        checkpoint.load(newest, policy, optimizer)
    assert not mark.exists()
    dcp.load({"version": 0}, checkpoint_id=newest)  # it works, too
    assert mark.exists()


def test_another_models_checkpoint_is_refused(saved, run, tmp_path):
    export_nano(nano.Model(nano.Config(layers=2, experts=4, expert_width=8, width=32, heads=1)), tmp_path / "two")
    policy, optimizer = trainer(tmp_path / "two")
    with pytest.raises(ValueError, match="update-000008 cannot be loaded: .*layers.1"):
        checkpoint.load(run / "update-000008", policy, optimizer)
