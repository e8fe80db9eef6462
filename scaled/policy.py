"""The training engine: a Hugging Face MoE model under FSDP2.

Everything here is a collective, forward and backward too: all ranks of the default process group
call it, equally often and in the same order."""
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy,
                                    OffloadPolicy, fully_shard)
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from scaled.engine import engine_called
from scaled.families import logits_scale
from scaled.huggingface import (
    read_weights, reset_buffers, set_experts, stays_fp32, tensor_files)
from scaled.logprobs import head_logprobs

class Policy(nn.Module):
    """log π of a causal LM. The one module whose forward FSDP sees from outside: final norm and
    head belong to it, so the head's weight is gathered when it is used apart from it."""

    def __init__(self, model: PreTrainedModel, logits_bytes: int):
        super().__init__()
        self.model, self.logits_bytes = model, logits_bytes
        self.saved_dtype = torch.float32  # what save_pretrained writes

    def forward(self, tokens: Tensor, fed: Tensor, temperature: float, head: Tensor | None = None,
                mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, T + 1), fed (B, T) bool, True where a token is fed, padding on the right ->
        logprobs (B, T) of token t + 1, entropies (B, T), fp32. mask (B, T) bool: of which fed
        positions, None: of all; both are 0 elsewhere, for the head is not asked there. head (V, D):
        a weight in place of the output head's. ValueError if padding is not on the right."""
        # No attention mask: no token looks to its right, where the padding is, and without one
        # attention needs no (T, T) tensor (but where it is eager, as gpt-oss's can be). So padding
        # anywhere else is refused.
        if (fed[:, 1:] & ~fed[:, :-1]).any():
            raise ValueError("fed: padding has to be on the right of every row")
        hidden = self.model.base_model(  # padding may hold any id, also one that has no embedding
            input_ids=tokens[:, :-1].masked_fill(~fed, 0), use_cache=False).last_hidden_state
        output = self.model.get_output_embeddings()
        weight = output.weight if head is None else head.to(output.weight)
        mask = fed if mask is None else mask & fed
        logprobs, entropies = head_logprobs(
            hidden[mask][None], weight, tokens[:, 1:][mask][None], temperature,
            self.logits_bytes, logits_scale(self.model.config), output.bias)
        blank = torch.zeros(fed.shape, device=fed.device)
        return blank.masked_scatter(mask, logprobs), blank.masked_scatter(mask, entropies)

def load_policy(folder, *, precision: str = "bf16", logits_bytes: int,
                gradient_checkpointing: bool, cpu_offload: bool, experts: str = "grouped_mm",
                trust_remote_code: bool = False, device) -> Policy:
    """A Hugging Face folder, sharded over the default process group: fp32 weights, of which a rank
    reads one whole tensor at a time (experts are packed) and keeps its own part. Gradients are
    summed over ranks, not averaged: the loss divides by the global number of sequences.
    precision: fp32, or bf16 products and activations. experts: transformers'
    experts_implementation. The policy is in eval mode and stays so: π has no dropout.
    ValueError for a folder that is missing, incomplete, quantised or not MoE, for missing,
    left-over or misshapen weights, and for another precision; EngineError for what transformers or
    FSDP raise after that."""
    folder, device = Path(folder), torch.device(device)
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision {precision!r}: give bf16 or fp32")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give a Hugging Face checkpoint's folder")
    files = tensor_files(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} holds quantised weights: training needs them in bf16 or fp32")
    saved_dtype = config.dtype or torch.float32  # from_config overwrites it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32,
                                                 trust_remote_code=trust_remote_code)
    if not any(".experts." in name for name, _ in model.named_parameters()):
        raise ValueError(f"{folder} is no Mixture of Experts: model_type {config.model_type!r}")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    policy = Policy(model.eval(), logits_bytes)
    policy.saved_dtype = saved_dtype
    with engine_called("the training engine", "at its start"):
        set_experts(model, experts)
        _shard(policy, precision, gradient_checkpointing, cpu_offload, device)
        _materialise(policy, cpu_offload, device)
    with ExitStack() as stack:
        read_weights(model, folder, files, stack)
    return policy

def _shard(policy: Policy, precision: str, gradient_checkpointing: bool, cpu_offload: bool,
           device: torch.device):
    model, full = policy.model, MixedPrecisionPolicy()
    mixed = full if precision == "fp32" else MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard = partial(  # the root frees its whole weights after a forward, as the layers do: outside
        fully_shard, reshard_after_forward=True,  # of passes every parameter is a shard
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        offload_policy=CPUOffloadPolicy(device.type != "cpu") if cpu_offload else OffloadPolicy())
    if precision == "bf16":
        owners = [name.rpartition(".")[0] for name, _ in model.named_parameters()
                  if stays_fp32(model, name)]
        for owner in dict.fromkeys(owners):
            if not any(owner.startswith(other + ".") for other in owners):
                shard(model.get_submodule(owner), mp_policy=full)
    for layer in model.base_model.layers:
        if gradient_checkpointing:  # transformers' own switch needs train mode, and so dropout
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        shard(layer, mp_policy=mixed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:  # it need not be whole while the others are at work
        shard(embedding, mp_policy=mixed)
    shard(policy, mp_policy=mixed)
    for module in policy.modules():
        if isinstance(module, FSDPModule) and dist.get_world_size() > 1:
            module.set_gradient_divide_factor(1.0)  # of a single rank it would make a copy, by / 1
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

@torch.no_grad()
def _materialise(policy: Policy, cpu_offload: bool, device):
    """From the meta device to memory. Parameters and saved buffers hold anything until read."""
    policy.to_empty(device="cpu" if cpu_offload else device)
    policy.model.tie_weights()  # to_empty made two tensors of a tied one
    reset_buffers(policy.model, device)
