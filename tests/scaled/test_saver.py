"""Checkpoints that are written while training goes on."""
import resource
import shutil

import pytest
import torch
import torch.distributed as dist
from processes import join_group, run_ranks
from saving import change, saved, texts, trainer, values  # noqa: F401

from scaled import checkpoint
from scaled.saver import Saver


def train_on(rank, world, folder):
    """Weights and moments change, with collectives, while a checkpoint of what they were is written."""
    join_group(rank, world, folder)
    policy, optimizer = trainer(folder / "hf")
    saver = Saver(folder / "run", 2, background=True)
    held = {}
    for version in range(5):  # 0: before there is any optimiser state
        held[version] = values(policy, optimizer)
        saver.save(policy, optimizer, version, texts(version))
        for _ in range(3):
            change(policy, optimizer, version + 1.0)
            values(policy, optimizer)  # gathers
        saver.look()
    saver.wait()
    saved = checkpoint.checkpoints(folder / "run")
    assert [checkpoint.version_of(path) for path in saved] == [3, 4]
    for path in saved:
        assert checkpoint.newest_whole([path])[1] == ""
        version = checkpoint.load(path, policy, optimizer)
        assert all(map(torch.equal, values(policy, optimizer), held[version]))
    dist.barrier()
    # the second rank's disk is full: all hear of it, and it is as if nothing had been tried
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    saver.save(policy, optimizer, 8, texts(8))
    with pytest.raises(OSError, match="update-000008 could not be saved: OSError: .*File too large"):
        saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    assert checkpoint.checkpoints(folder / "run") == saved and not list((folder / "run").glob(".update*"))
    saver.wait()  # said once
    saver.save(policy, optimizer, 8, texts(8))
    saver.wait()
    assert checkpoint.version_of(checkpoint.checkpoints(folder / "run")[-1]) == 8
    dist.destroy_process_group()


def test_training_goes_on_while_a_checkpoint_is_written(saved, tmp_path):
    shutil.copytree(saved[0] / "hf", tmp_path / "hf")
    (tmp_path / "run").mkdir()
    run_ranks(train_on, 2, tmp_path)
