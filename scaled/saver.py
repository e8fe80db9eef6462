"""Checkpoints that are written while training goes on, one at a time."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from scaled import checkpoint
from scaled.ranks import TIMEOUT

if TYPE_CHECKING:
    from scaled.policy import Policy


class Saver:
    """Of all ranks. In the background save returns as soon as weights and optimiser state are
    copied to host memory, and a thread writes the copy: the checkpoint gets its name when all ranks
    have written, and until then it is not there. The thread has a process group of its own, since
    its collectives come at any time between those of training."""

    def __init__(self, folder: Path, keep: int, background: bool):
        self.folder, self.keep = folder, keep
        self.pending: Future | None = None
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if background else None
        self.thread = ThreadPoolExecutor(1, "checkpoint") if background else None

    def save(self, policy: "Policy", optimizer: torch.optim.Optimizer, version: int,
             texts: dict[str, str]):
        """As checkpoint.save; what goes wrong in the background is raised by a later call of any
        method. A collective."""
        self.wait()
        if not self.thread:
            return checkpoint.save(self.folder, policy, optimizer, version, self.keep, texts)
        target = self.folder / f"update-{version:06}"
        aside = checkpoint.prepare(target)
        written = dcp.async_save(checkpoint.state_of(policy, optimizer, version),
                                 checkpoint_id=aside, process_group=self.group)
        self.pending = self.thread.submit(
            checkpoint.publish, target, written.result, self.keep, texts, self.group)

    def look(self):
        """OSError if a checkpoint could not be written. Does not wait."""
        if self.pending and self.pending.done():
            self.wait()

    def wait(self):
        """Until there is no checkpoint that is being written; OSError if one could not be."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()
