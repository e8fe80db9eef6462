"""Checkpoints: whole or passed over by name, never executed, and what was there survives a failure."""
import io
import json
import os
import pickle
import resource
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import join_group, run_ranks

import nano_moe_rl as nano
from scaled import checkpoint
from scaled.export import export_nano
from scaled.policy import load_policy

TINY = nano.Config(layers=1, experts=4, expert_width=8, width=32, heads=1)


def trainer(folder):
    policy = load_policy(folder, precision="fp32", logits_bytes=10**5, device="cpu",
                         gradient_checkpointing=False, cpu_offload=False)
    return policy, nano.adamw(policy, 1e-3)


def change(policy, optimizer, by):
    """A step with made-up gradients, so that weights and both moments are of this step alone."""
    for i, p in enumerate(policy.parameters()):
        p.grad = torch.full_like(p, by * (i + 1))
    optimizer.step()


def values(policy, optimizer):
    states = [x for state in optimizer.state.values() for x in state.values()]
    return [x.full_tensor().clone() if hasattr(x, "full_tensor") else x.clone()
            for x in [*policy.parameters(), *states]]


def texts(version):
    return {"config.json": json.dumps({"name": "run", "lr": 1.0}), "metrics.jsonl": '{"update": 1}\n' * version}


@pytest.fixture(scope="module")
def saved(group, tmp_path_factory):
    """A run's folder with checkpoints of updates 4 and 8, and what they hold."""
    folder = tmp_path_factory.mktemp("saved")
    export_nano(nano.Model(TINY), folder / "hf")
    policy, optimizer = trainer(folder / "hf")
    held, run = {}, folder / "run"
    run.mkdir()
    for version in (4, 8):
        change(policy, optimizer, version)
        checkpoint.save(run, policy, optimizer, version, 2, texts(version))
        held[version] = values(policy, optimizer)
    return folder, held


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_holds_weights_moments_options_and_rows(saved, run):
    policy, optimizer = trainer(saved[0] / "hf")
    for version, path in zip((4, 8), checkpoint.checkpoints(run), strict=True):
        assert checkpoint.load(path, policy, optimizer) == version == checkpoint.version_of(path)
        got = values(policy, optimizer)
        assert len(got) == 4 * len(list(policy.parameters()))  # step and two moments for each
        assert all(map(torch.equal, got, saved[1][version]))
        assert len((path / "metrics.jsonl").read_text().splitlines()) == version
    assert checkpoint.newest_whole(checkpoint.checkpoints(run)) == (run / "update-000008", "")
    assert checkpoint.options(run) == ({"name": "run", "lr": 1.0}, 8)


def test_a_checkpoint_before_the_first_update_is_no_update(saved, tmp_path):
    """torch makes Adam's state by a step of length 0, which its bias correction would count."""
    after = []
    for when in ("never", "saved", "loaded"):
        policy, optimizer = trainer(saved[0] / "hf")
        if when == "saved":
            checkpoint.save(tmp_path, policy, optimizer, 0, 2, texts(0))
        if when == "loaded":
            assert checkpoint.load(tmp_path / "update-000000", policy, optimizer) == 0
        change(policy, optimizer, 1.0)
        change(policy, optimizer, -3.0)
        after.append(values(policy, optimizer))
    for other in after[1:]:
        assert all(map(torch.equal, other, after[0]))


def test_old_checkpoints_go_and_an_attempt_that_was_cut_short_does_not_stay(saved, run):
    policy, optimizer = trainer(saved[0] / "hf")
    (run / ".update-000012").mkdir()
    (run / ".update-000012/__7_0.distcp").write_text("of a rank that is no more")
    change(policy, optimizer, 1)
    checkpoint.save(run, policy, optimizer, 12, 2, texts(12))
    assert [path.name for path in checkpoint.checkpoints(run)] == ["update-000008", "update-000012"]
    assert not (run / "update-000012/__7_0.distcp").exists()


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


def plant(path, name, data):
    """As somebody would who can write to the folder: with the digest that fits."""
    (path / name).write_bytes(data)
    digests = json.loads((path / "files.json").read_text())
    digests[name] = checkpoint.digest(path / name)
    (path / "files.json").write_text(json.dumps(digests))


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


def full_disk(rank, world, folder):
    """The second rank may not write files of more than some kilobytes, as on a disk that is full."""
    join_group(rank, world, folder)
    policy, optimizer = trainer(folder / "hf")
    change(policy, optimizer, 1.0)
    checkpoint.save(folder / "run", policy, optimizer, 4, 1, texts(4))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        checkpoint.save(folder / "run", policy, optimizer, 8, 1, texts(8))
    except OSError as error:
        text = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (folder / f"said-{rank}").write_text(text)
    dist.barrier()
    assert [path.name for path in (folder / "run").glob("*update*")] == ["update-000004"]
    dist.barrier()
    assert checkpoint.newest_whole(checkpoint.checkpoints(folder / "run"))[1] == ""
    checkpoint.save(folder / "run", policy, optimizer, 8, 1, texts(8))  # there is room again
    assert [path.name for path in (folder / "run").glob("*update*")] == ["update-000008"]
    assert checkpoint.newest_whole(checkpoint.checkpoints(folder / "run"))[1] == ""
    dist.destroy_process_group()


def test_a_full_disk_keeps_what_was_there(saved, tmp_path):
    shutil.copytree(saved[0] / "hf", tmp_path / "hf")
    (tmp_path / "run").mkdir()
    run_ranks(full_disk, 2, tmp_path)
    for rank in range(2):
        text = (tmp_path / f"said-{rank}").read_text()
        assert "\n" not in text and "update-000008 could not be saved: OSError: [Errno 27] File too large" in text
