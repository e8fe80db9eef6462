"""Checkpoints: what they hold, which of them stay, and by how many ranks they are read."""
import json
import resource
import shutil

import torch
import torch.distributed as dist
from processes import join_group, run_ranks
from saving import change, plant, run, saved, texts, trainer, values  # noqa: F401

from scaled import checkpoint


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


# --------------------------------------------------------------------------- The best, and its score
def rows(*scores):
    return {"config.json": "{}", "metrics.jsonl": "".join(
        json.dumps({"update": at, "score": score}) + "\n" for at, score in enumerate(scores, 1))}


def test_the_best_by_score_is_kept_beside_the_newest(saved, tmp_path):
    """Its own update's score counts: update 2 has none in its rows, update 4 a low one after a high one."""
    policy, optimizer = trainer(saved[0] / "hf")
    scores = [0.9, None, 0.8, 0.2, 0.5, 0.8]
    kept = {1: [1], 2: [1, 2], 3: [1, 3], 4: [1, 4], 5: [1, 5], 6: [1, 6]}
    for version in range(1, 7):
        checkpoint.save(tmp_path, policy, optimizer, version, 1, rows(*scores[:version]))
        assert [checkpoint.version_of(path) for path in checkpoint.checkpoints(tmp_path)] == kept[version]
    first, last = checkpoint.checkpoints(tmp_path)
    assert checkpoint.best([first, last]) == first
    assert [checkpoint.score_of(path) for path in (first, last)] == [0.9, 0.8]
    plant(first, "metrics.jsonl", rows(0.8)["metrics.jsonl"].encode())
    plant(last, "metrics.jsonl", rows(*[0.1] * 5, 0.8)["metrics.jsonl"].encode())
    assert checkpoint.best([first, last]) == last  # of equal ones the newest
    (first / "metrics.jsonl").write_text(rows(0.95)["metrics.jsonl"])  # not as it was written
    assert checkpoint.best([first, last]) == last
    plant(last, "metrics.jsonl", b'{"update": 6, "score": NaN}')
    assert checkpoint.best([first, last]) is None
    plant(last, "metrics.jsonl", b'{"update": 5, "score": 0.9}')  # of another update
    for text in (b"", b"[]", b"3", b'{"update": 6, "score": "0.9"}', b'{"update": 6}', b"\xff"):
        assert checkpoint.best([last]) is None
        plant(last, "metrics.jsonl", text)


# ------------------------------------------------------------------------- Other numbers of processes
def write_and_read(rank, world, folder):
    """Saves its own, and reads what another number of ranks has saved, if there is any."""
    join_group(rank, world, folder)
    policy, optimizer = trainer(folder / "hf")
    for other in checkpoint.checkpoints(folder / "run"):
        assert checkpoint.newest_whole([other])[1] == ""
        version = checkpoint.load(other, policy, optimizer)
        got, held = values(policy, optimizer), torch.load(folder / f"held-{version}")
        assert len(got) == len(held) and all(map(torch.equal, got, held))
    change(policy, optimizer, world + 0.5)
    got = values(policy, optimizer)
    if rank == 0:
        torch.save(got, folder / f"held-{len(list(folder.glob('held-*'))) + 1}")
    dist.barrier()
    checkpoint.save(folder / "run", policy, optimizer, len(list(folder.glob("held-*"))), 9, texts(1))
    dist.destroy_process_group()


def test_a_checkpoint_is_read_by_another_number_of_ranks(saved, tmp_path):
    """Weights and both moments of 2 ranks by 1, and of 1 by 2, to the last bit."""
    shutil.copytree(saved[0] / "hf", tmp_path / "hf")
    (tmp_path / "run").mkdir()
    for world in (2, 1, 2):
        run_ranks(write_and_read, world, tmp_path)
    shards = [len({path.name.split("_")[2] for path in saved.glob("__*")})
              for saved in checkpoint.checkpoints(tmp_path / "run")]
    assert shards == [2, 1, 2]
