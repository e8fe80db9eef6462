"""Hugging Face folders: their tensors into a sharded model and out of it, piece by piece. What is
known about the inside of transformers' loading stands here.

What takes a policy is a collective: all ranks of the default process group call it."""
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange, WeightConverter, WeightRenaming, dot_natural_key, rename_source_key,
    revert_weight_conversion)
from transformers.utils.loading_report import LoadStateDictInfo

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5e9  # of one file that save_pretrained writes, and of what rank 0 holds for it

def stays_fp32(model: PreTrainedModel, name: str) -> bool:
    """Whether a family computes with this weight in fp32 also in bf16, as ERNIE's routers."""
    return any(re.search(pattern, name) for pattern in model._keep_in_fp32_modules_strict)

def set_experts(model: PreTrainedModel, implementation: str):
    """How the experts' products are computed, where a family leaves a choice."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation(implementation)

def tensor_files(folder: Path) -> dict[str, str]:
    """Name of every tensor -> its file. ValueError if there are no safetensors."""
    if (folder / INDEX).is_file():
        try:
            files = dict(json.loads((folder / INDEX).read_text())["weight_map"])
            if not all(Path(file).name == file for file in files.values()):  # TypeError: no text
                raise ValueError("a tensor is in no file of this folder")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({type(error).__name__}: {error}): copy "
                             "it again") from None
        if absent := sorted({f for f in files.values() if not (folder / f).is_file()}):
            raise ValueError(f"{folder}/{INDEX} names files that are not there: {_some(absent)}")
        return files
    if (folder / SINGLE).is_file():
        with ExitStack() as stack:
            tensors = open_files(folder, {"": SINGLE}, stack)[SINGLE]
            return dict.fromkeys(tensors.keys(), SINGLE)
    raise ValueError(f"{folder} has neither {INDEX} nor {SINGLE}: convert it to safetensors")

def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

def _own_part(whole: Tensor, target: Tensor) -> Tensor:
    """What this rank keeps of a whole tensor. FSDP cuts the first axis as torch.chunk does."""
    if not isinstance(target, DTensor):
        return whole
    chunks, rank = whole.chunk(target.device_mesh.size()), target.device_mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else whole[:0]

def open_files(folder: Path, files: dict[str, str], stack: ExitStack) -> dict:
    """Name of every file -> safetensors' reader. ValueError for one that is damaged: a header says
    where each tensor ends; and for an index that says otherwise than the headers."""
    opened = {}
    for file in sorted(set(files.values())):
        try:
            opened[file] = stack.enter_context(safe_open(folder / file, "pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / file} is damaged ({error}): copy it again") from None
        named = {name for name in files if files[name] == file} - {""}
        if absent := named - set(opened[file].keys()):
            raise ValueError(f"{folder / file} lacks tensors that {INDEX} says are in it: "
                             f"{_some(absent)}")
    return opened

@torch.no_grad()
def read_weights(model: PreTrainedModel, folder: Path, files: dict[str, str], stack: ExitStack):
    """Fills the model's parameters and saved buffers. transformers' conversion says which tensors
    of a checkpoint make which of the model's, as one per expert make the packed ones. A model on
    the meta device stays there: then only headers are read, and names and shapes checked."""
    opened = open_files(folder, files, stack)
    meta = next(model.parameters()).is_meta

    def tensor(source: str) -> Tensor:
        if meta:
            header = opened[files[source]].get_slice(source)
            dtype = torch.float32 if "F" in header.get_dtype() else torch.int64  # enough to tell
            return torch.empty(header.get_shape(), dtype=dtype, device="meta")
        return opened[files[source]].get_tensor(source)

    targets = model.state_dict(keep_vars=True)  # tied names share one tensor
    transforms = get_model_conversion_mapping(model)
    renamings = [x for x in transforms if isinstance(x, WeightRenaming)]
    converters = [x for x in transforms if isinstance(x, WeightConverter)]
    by_pattern = {pattern: x for x in converters for pattern in x.source_patterns}
    jobs, unexpected = {}, set()
    for source in sorted(files, key=dot_natural_key):  # expert 10 after expert 9
        rename = partial(rename_source_key, source, base_model_prefix=model.base_model_prefix,
                         meta_state_dict=targets)
        name, pattern = rename(weight_renamings=renamings, weight_converters=converters)
        if name not in targets and source in targets:  # is in the model's own format already
            name, pattern = rename(weight_renamings=[], weight_converters=[])
        if name not in targets:
            unexpected.add(source)
            continue
        if name not in jobs:
            jobs[name] = deepcopy(by_pattern[pattern]) if pattern else WeightRenaming(source, name)
        jobs[name].add_tensor(  # a callable, read only when its turn comes
            name, source, pattern or source, partial(tensor, source))
    filled = set()
    for first, job in jobs.items():
        try:
            wholes = job.convert(first, model=model, config=model.config)
        except RuntimeError as reason:  # as of torch.cat, when an expert is missing
            raise ValueError(f"{folder}: {first} cannot be made of what is there: {reason}")
        for name, whole in wholes.items():
            whole = whole[0] if isinstance(whole, list) else whole
            if whole.shape != (target := targets[name]).shape:
                raise ValueError(f"{folder}: {name} is {tuple(whole.shape)}, the model that its "
                                 f"config describes has {tuple(target.shape)}")
            if whole.is_floating_point() != target.is_floating_point():
                raise ValueError(f"{folder}: {name} is of type {whole.dtype}: quantised, or not of "
                                 "this model; training needs bf16 or fp32")
            mine = target.to_local() if isinstance(target, DTensor) else target
            part = _own_part(whole, target).to(mine)
            if id(target) in filled and not meta and not torch.equal(mine, part):
                raise ValueError(f"{folder}: {name} differs from the weight that its config ties "
                                 "it to; set tie_word_embeddings in config.json as it was trained")
            mine.copy_(part)
            filled.add(id(target))
            del whole, part
    info = LoadStateDictInfo({name for name, x in targets.items() if id(x) not in filled},
                             unexpected, set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)  # drops what is not its own, as MTP layers
    if info.missing_keys or info.unexpected_keys:
        raise ValueError(f"{folder} does not fit {type(model).__name__}: missing "
                         f"[{_some(info.missing_keys)}], left over [{_some(info.unexpected_keys)}]")

def check_weights(folder: Path, config, trust_remote_code: bool):
    """ValueError if files are damaged, or are not those of the model that a config describes, by
    their headers alone."""
    files = tensor_files(folder)
    with torch.device("meta"), ExitStack() as stack:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        read_weights(model, folder, files, stack)

def named_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight and saved buffer, whole, one at a time, by its name in transformers 5, where
    experts are packed; a tied weight once. fp32, on the device of the buffers and activations.
    Only to be read: a single rank gets the weight itself. Every rank takes all of them."""
    device, seen = next(policy.model.buffers()).device, set()
    for name, x in policy.model.state_dict(keep_vars=True).items():
        if id(x) not in seen:
            seen.add(id(x))
            x = x.detach().to(device)
            yield name, x.full_tensor() if isinstance(x, DTensor) else x

def save_pretrained(policy: nn.Module, folder, tokenizer):
    """A Hugging Face folder with the tensors as published, so one per expert where the family does
    it, in the precision that the loaded one had. Rank 0 writes, a decoder layer at a time; nobody
    returns before it is done. ValueError if there are weights already."""
    folder, model = Path(folder), policy.model
    if any(folder.glob("*.safetensors")):  # all ranks agree: none writes before all gather
        raise ValueError(f"{folder} has weights already: give another folder, or remove it")
    rank, shard, size, written, total = dist.get_rank(), {}, 0, [], 0
    parameters = {name for name, _ in model.named_parameters() if not stays_fp32(model, name)}
    layer = re.compile(r".*\blayers\.\d+\.")  # no published tensor is made of two layers
    config = deepcopy(model.config)
    config.dtype, config.architectures = policy.saved_dtype, [type(model).__name__]

    def flush():
        path = folder / f"part-{len(written)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        written.append((path, list(shard)))
        shard.clear()

    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    for _, group in groupby(named_weights(policy), lambda x: (layer.match(x[0]) or [""])[0]):
        whole = {}
        for name, x in group:
            if rank == 0:  # buffers, as correction biases, keep their precision
                whole[name] = x.to("cpu", policy.saved_dtype if name in parameters else x.dtype)
        for name, x in revert_weight_conversion(model, whole).items() if whole else ():
            shard[name] = x.contiguous().clone()  # an expert's tensor would keep the packed one
            size, total = size + x.nbytes, total + x.nbytes
        if size > SHARD_BYTES:
            flush()
            size = 0
    if rank == 0:
        if shard:
            flush()
        index = {"metadata": {"total_size": total}, "weight_map": {}}
        for i, (path, names) in enumerate(written, 1):
            file = f"model-{i:05}-of-{len(written):05}.safetensors" if len(written) > 1 else SINGLE
            os.replace(path, folder / file)
            index["weight_map"] |= dict.fromkeys(names, file)
        if len(written) > 1:
            (folder / INDEX).write_text(json.dumps(index, indent=2))
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    dist.barrier()

def published_names(config, trust_remote_code: bool = False) -> Callable:
    """transformers' own conversion, backwards: a function (name, tensor) -> iterator of pairs, from
    a parameter of the model that `config` describes to the published ones, such as a matrix for
    each expert. ValueError if a family needs several parameters at once for that: they are
    streamed one by one."""
    with torch.device("meta"):  # names and shapes, no memory
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model._weight_conversions = [conversion for conversion
                                 in get_model_conversion_mapping(model, add_legacy=False)
                                 if not isinstance(conversion, PrefixChange)]
    for conversion in model._weight_conversions:
        if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1:
            raise ValueError(f"{config.model_type}: {conversion.target_patterns} can only be "
                             "published together, and weights are streamed one by one")
    return lambda name, tensor: iter(revert_weight_conversion(model, {name: tensor}).items())

def reset_buffers(model: PreTrainedModel, device):
    """Buffers to the device, and those that are computed and never saved, as rotary frequencies,
    their values. ValueError if the family cannot compute them again."""
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer = buffer.to(device)
            if key in module._non_persistent_buffers_set:
                buffer.fill_(torch.nan)
        if module._non_persistent_buffers_set:
            model._init_weights(module)
            if any(b.isnan().any() for b in module.buffers(recurse=False)):
                raise ValueError(f"{name} has buffers that {type(model).__name__} cannot "
                                 "initialise again: this model cannot be loaded in shards")
