"""Checkpoints of a run: sharded weights and optimiser state, whole or not there at all."""

import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from scaled.policy import Policy


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; one that is being written has another name."""
    return sorted(path for path in folder.glob("update-*") if re.fullmatch(r"update-\d+", path.name))


def save(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, version: int, keep: int):
    """Writes folder/update-VERSION aside and renames it when all ranks are done, then removes all
    but the newest `keep`. A collective. The version is all the state there is beside weights and
    optimiser: prompts, samples and the learning rate follow from it and the seed."""
    model, optim = get_state_dict(policy, optimizer)
    target = folder / f"update-{version:06}"
    aside = folder / f".{target.name}"
    dcp.save({"model": model, "optimizer": optim, "version": version}, checkpoint_id=aside)
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load(path: Path, policy: Policy, optimizer: torch.optim.Optimizer | None) -> int:
    """Weights and, unless None, optimiser state, in place -> policy version. A collective."""
    model, optim = get_state_dict(policy, optimizer or [])
    state = {"model": model, "version": 0} | ({"optimizer": optim} if optimizer else {})
    dcp.load(state, checkpoint_id=path)
    set_state_dict(policy, optimizer or [], model_state_dict=state["model"],
                   optim_state_dict=state.get("optimizer", {}))
    return state["version"]
