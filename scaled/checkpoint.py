"""Checkpoints of a run: whole or not there at all, and nothing in them is executed.

    update-000040/
        .metadata, __0_0.distcp …    weights and optimiser state of every rank, in torch's format
        config.json, metrics.jsonl   the run's, up to this update
        files.json                   SHA-256 of all of these, made last
"""

import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

if TYPE_CHECKING:  # imports transformers, for which --help should not wait
    from scaled.policy import Policy

FILES = "files.json"
OPTIONS, ROWS = "config.json", "metrics.jsonl"
# torch keeps its table of contents as a pickle, a program that can call whatever it names. These
# are all that one of a run names; none does more than to hold values.
HARMLESS = {("torch.distributed.checkpoint.metadata", name) for name in (
    "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    "ChunkStorageMetadata", "BytesStorageMetadata", "MetadataIndex", "StorageMeta")} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"), ("torch", "Size"), ("pathlib", "PosixPath")} | {
    ("torch", name) for name, x in vars(torch).items() if isinstance(x, torch.dtype)}


class Contents(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint of a run has")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    def read_metadata(self) -> dcp.Metadata:  # takes no rank: there is no other place to look
        with open(Path(self.path, ".metadata"), "rb") as file:
            contents = Contents(file).load()
        if not isinstance(contents, dcp.Metadata):
            raise pickle.UnpicklingError(f"has a {type(contents).__name__}, not torch's Metadata")
        return contents


class Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item, value: io.BytesIO):
        """torch would unpickle what is not a tensor; this takes numbers, text and lists only."""
        plain, name = io.BytesIO(), read_item.dest_index.fqn
        try:
            torch.save(torch.load(value, weights_only=True), plain)
        except pickle.UnpicklingError:  # whose text gives advice that would execute it
            raise pickle.UnpicklingError(f"{name} is not a plain value") from None
        plain.seek(0)
        super().load_bytes(read_item, plain)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; one that is being written has another name."""
    return sorted(path for path in folder.glob("update-*")
                  if re.fullmatch(r"update-\d+", path.name))


def version_of(path: Path) -> int:
    return int(path.name.partition("-")[2])


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(policy: "Policy", optimizer: torch.optim.Optimizer, version: int) -> dict:
    """What a checkpoint has of this rank. The version is all the state there is beside weights and
    optimiser: prompts, samples and the learning rate follow from it and the seed."""
    fresh = not optimizer.state
    model, optim = get_state_dict(policy, optimizer)
    if fresh:  # torch has made a step of length 0, which Adam would count as its first
        optimizer.state.clear()
    return {"model": model, "optimizer": optim, "version": version}


def prepare(target: Path) -> Path:
    """Where a checkpoint is written before it gets its name. A collective."""
    aside = target.with_name(f".{target.name}")
    if dist.get_rank() == 0:  # of an attempt that was cut short, perhaps with other ranks
        shutil.rmtree(aside, ignore_errors=True)
    dist.barrier()
    return aside


def save(folder: Path, policy: "Policy", optimizer: torch.optim.Optimizer, version: int, keep: int,
         texts: dict[str, str]):
    """Writes folder/update-VERSION aside and renames it when all ranks are done, then removes all
    but the newest `keep` and the best. texts, of rank 0: what OPTIONS and ROWS have. A collective.
    OSError if it cannot be written: what was there before is still there, the attempt is not."""
    state, target = state_of(policy, optimizer, version), folder / f"update-{version:06}"
    aside = prepare(target)
    publish(target, lambda: dcp.save(state, checkpoint_id=aside), keep, texts)


def publish(target: Path, write: Callable, keep: int, texts: dict[str, str],
            group: dist.ProcessGroup | None = None):
    """The end of a save, after write() of all ranks, which a thread can do with its own group."""
    aside, rank = target.with_name(f".{target.name}"), dist.get_rank()
    try:
        try:
            write()
            mine = [*aside.glob(f"__{rank}_*")]
            if rank == 0:
                for name in (OPTIONS, ROWS):
                    (aside / name).write_text(texts[name])
                mine += [aside / name for name in (".metadata", OPTIONS, ROWS)]
            part = {path.name: digest(path) for path in mine}
        except OSError as error:
            part = cause(error)
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, part, group=group)
        said = [next((part for part in parts if isinstance(part, str)), "")]
        if rank == 0 and not said[0]:
            try:
                together = {name: value for part in parts for name, value in part.items()}
                (aside / FILES).write_text(json.dumps(together, indent=2))
                shutil.rmtree(target, ignore_errors=True)
                os.replace(aside, target)
                remove_old(target.parent, keep)
            except OSError as error:
                said = [cause(error)]
        dist.broadcast_object_list(said, 0, group=group)
    except CheckpointException as error:  # of all ranks at once, and no Exception
        said = [cause(error)]
    if said[0]:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)  # room for others, on a full disk
        raise OSError(f"{target} could not be saved: {said[0]}")


def remove_old(folder: Path, keep: int):
    """All but the newest `keep` and, beside them, the one with the best score."""
    saved = checkpoints(folder)
    for old in set(saved[:-keep]) - {best(saved)}:
        shutil.rmtree(old)


def score_of(path: Path) -> float | None:
    """The score that its own update has in the rows of a checkpoint; None if that update was not
    one with a score, or the rows are not as they were written."""
    try:
        if digest(path / ROWS) != read_digests(path)[ROWS]:
            return None
        row = json.loads((path / ROWS).read_text().splitlines()[-1])
        at, score = row["update"], row["score"]
    except (OSError, ValueError, LookupError, TypeError):  # no rows: before the first update
        return None
    return score if at == version_of(path) and isinstance(score, float) else None


def best(paths: list[Path]) -> Path | None:
    """The one with the highest score, of equal ones the newest; None if none has a score."""
    scored = [(score, version_of(path), path) for path in paths
              if (score := score_of(path)) is not None and math.isfinite(score)]
    return max(scored)[2] if scored else None


def cause(error: BaseException) -> str:
    """An error of torch's checkpoints in one line: that of the first rank which had one."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def fault(path: Path) -> str:
    """What is not as it was written in a checkpoint's folder; "" if all is. A collective: every
    rank reads its share of the files."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        digests, found = read_digests(path), ""
        for name in sorted(digests)[rank::ranks]:
            if digest(path / name) != digests[name]:
                found = found or f"{name} is not as it was written"
        if rank == 0 and not found:
            Reader(path).read_metadata()
    except OSError as error:
        found = f"{Path(error.filename or path).name}: {error.strerror}"
    except Exception as error:  # whatever a damaged pickle makes of classes that hold values
        found = f".metadata {cause(error)}" if not isinstance(error, ValueError) else str(error)
    faults = [None] * ranks
    dist.all_gather_object(faults, found)
    return next(filter(None, faults), "")


def read_digests(path: Path) -> dict[str, str]:
    """Name of every file of a checkpoint -> its SHA-256. OSError or ValueError without them."""
    try:
        digests = json.loads((path / FILES).read_text())
    except ValueError as error:
        raise ValueError(f"{FILES} is not JSON: {error}") from None
    if not isinstance(digests, dict) or not {".metadata", OPTIONS, ROWS} < digests.keys():
        raise ValueError(f"{FILES} does not list the files of a checkpoint")
    return digests


def newest_whole(paths: list[Path]) -> tuple[Path, str]:
    """The last of these checkpoints without a fault, and one line about those after it, "" if there
    are none. ValueError if all have one. A collective."""
    damaged = []
    for path in reversed(paths):
        if not (found := fault(path)):
            return path, f"{'; '.join(damaged)}: going on from {path}" if damaged else ""
        damaged.append(f"{path} is damaged ({found})")
    raise ValueError("; ".join(damaged))


def set_aside(folder: Path, version: int, why: str = "damaged"):
    """Gives checkpoints of later updates, such as damaged ones, another name: they are not to be
    counted among the newest, nor to be written over."""
    for path in checkpoints(folder):
        if version_of(path) > version:
            aside = path.with_name(f"{why}-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def options(folder: Path) -> tuple[dict, int]:
    """The options of a run, from the newest checkpoint whose config.json is as it was written, and
    its version. ValueError if there is none."""
    reasons = []
    for path in reversed(checkpoints(folder)):
        try:
            found = json.loads((path / OPTIONS).read_text())
            if digest(path / OPTIONS) == read_digests(path)[OPTIONS] and isinstance(found, dict):
                return found, version_of(path)
            reasons.append(f"{path.name}/{OPTIONS} is not as it was written")
        except (OSError, ValueError) as error:
            reasons.append(f"{path.name}: {getattr(error, 'strerror', None) or error}")
    raise ValueError(f"{folder} has no checkpoint that is whole ({'; '.join(reasons)})"
                     if reasons else f"{folder} has no checkpoint")


def load(path: Path, policy: "Policy", optimizer: torch.optim.Optimizer | None) -> int:
    """Weights and, unless None, optimiser state, in place -> policy version. A collective.
    ValueError if they are not of this model."""
    model, optim = get_state_dict(policy, optimizer or [])
    state = {"model": model, "version": 0} | ({"optimizer": optim} if optimizer else {})
    try:
        dcp.load(state, storage_reader=Reader(path), planner=Planner())
    except CheckpointException as error:
        raise ValueError(f"{path} cannot be loaded: {cause(error)}") from error
    set_state_dict(policy, optimizer or [], model_state_dict=state["model"],
                   optim_state_dict=state.get("optimizer", {}))
    if optimizer and not state["version"]:  # as above
        optimizer.state.clear()
    return state["version"]
