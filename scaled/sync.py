"""The trainer's weights enter the running engine, and a check that they did.

What knows the inside of vLLM 0.30's reload stands here; the rest of the engine is rollout.py.
"""
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from nano_moe_rl import DEVICE

# Mean |difference| of log-probabilities, in nats, of two engines with the same weights and routes.
NOISE = 1e-5  # below this the fp32 sums differ in order only: no threshold goes lower
BROKEN = 0.5  # above this not even the first sync can be right; 4-bit engines stay below 0.1


def published_names(config) -> Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]:
    """transformers' own conversion, backwards: a function from one parameter of the model that
    `config` describes to the published ones, such as a matrix for each expert. ValueError if a
    family needs several parameters at once for that: they are streamed one by one."""
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange, WeightConverter, revert_weight_conversion)

    with torch.device("meta"):  # names and shapes, no memory
        model = AutoModelForCausalLM.from_config(config)
    model._weight_conversions = [conversion for conversion
                                 in get_model_conversion_mapping(model, add_legacy=False)
                                 if not isinstance(conversion, PrefixChange)]
    for conversion in model._weight_conversions:
        if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1:
            raise ValueError(f"{config.model_type}: {conversion.target_patterns} can only be "
                             "published together, and weights are streamed one by one")
    return lambda name, tensor: iter(revert_weight_conversion(model, {name: tensor}).items())


@cache
def repack_experts_on_reload():
    """On a CPU, vLLM 0.30 packs unquantised experts for its kernel at the first load only. A reload
    then copies raw weights over packed ones of the same size, without an error, and the engine
    samples from nonsense. Here packing follows every load; quantised experts do it themselves."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod)

    setup = UnquantizedFusedMoEMethod._setup_kernel

    def setup_and_pack(self, layer, *args, **kwargs):
        reload = self.moe_kernel is not None
        setup(self, layer, *args, **kwargs)
        if reload:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = setup_and_pack


# Families that vLLM 0.30 serves wrongly on a CPU, without an error of its own.
CPU_FAULTS = {
    "ernie4_5_moe": "its router for CPUs ignores the correction bias",
    "dots1": "it runs transformers' own class, and patches it for the trainer in this process too"}


@cache
def mend_rotary():
    """On a CPU, vLLM 0.30's kernel for rotary positions is wrong for several heads in the layout
    that DeepSeek's attention has, by whole units. Its version in torch is right."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native


class WorkerSync:
    """Mixed into vLLM's worker by its option worker_extension_cls."""

    @torch.no_grad()
    def sync_weights(self, weights: Iterable[tuple[str, Tensor]]):
        """New values for every weight, streamed: at most one layer's tensors are held back until
        the layer is whole. ValueError if a weight of the engine got none: the engine is then of no
        use, because it has old and new ones."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload, initialize_layerwise_reload)
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            repack_experts_on_reload()
        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):  # what model_runner.reload_weights does,
            initialize_layerwise_reload(model)
            model.load_weights(weights)
            tied = self.model_config.hf_text_config.tie_word_embeddings
            missing = incomplete_layers(model, tied)  # for these it only has a line of log
            finalize_layerwise_reload(model, self.model_config)
        if missing:
            raise ValueError(f"the sync left {len(missing)} layers of the engine without all of "
                             f"their weights: {', '.join(missing[:3])}")


def incomplete_layers(model: torch.nn.Module, tied: bool) -> list[str]:
    """Modules that wait for more weights, before the reload is finished. Elements that pad a
    vocabulary or experts never come, nor those of an output head tied to the embedding."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead, VocabParallelEmbedding)
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    waiting = []
    for name, layer in model.named_modules():
        info, weights = get_layerwise_info(layer), dict(layer.named_parameters(recurse=False))
        head = tied and isinstance(layer, ParallelLMHead)
        if head or not (info.can_load() and weights):
            continue  # whole, or nothing to load: rotary tables, scales of the KV cache
        absent = weights.keys() - {loaded for loaded, _ in info.loaded_weights}
        elements = sum(weight.numel() for weight in weights.values())
        c = layer.moe_config if isinstance(layer, RoutedExperts) else None
        padded = isinstance(layer, VocabParallelEmbedding) or c is not None and (
            c.hidden_dim, c.intermediate_size_per_partition) != (
            c.hidden_dim_unpadded, c.intermediate_size_per_partition_unpadded)
        if absent or (info.load_numel < elements and not padded):
            waiting.append(f"{name} ({info.load_numel} of {elements} elements)")
    return waiting


class SyncCheck:
    """Does the engine have the trainer's weights? The first call sets the measure: before any sync,
    when both have the weights of the same folder. Later ones are made after a sync."""

    def __init__(self):
        self.first = None

    def __call__(self, engine, logprobs_of: Callable, sequences: list[list[int]],
                 scored: tuple[Tensor, Tensor] | None = None) -> float:
        """Mean |log π - log μ| of fixed tokens at temperature 1, over all ranks, in nats.
        logprobs_of(tokens (B, T + 1), lengths (B,), routing (B, T, L, A)) -> (B, T) is the
        trainer's forward with the engine's routes replayed, so that a flip of experts by rounding
        does not hide broken weights. scored: what engine.score said of them, if it was asked before.
        RuntimeError above three times the first value."""
        logprobs, routing = scored or engine.score(sequences)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], True)
        fed = torch.arange(1, tokens.shape[1]) < lengths[:, None]
        other = logprobs_of(tokens, lengths, routing).detach().cpu()
        difference = (other - logprobs)[fed].double().abs()
        total = torch.stack([difference.sum(), fed.sum()]).to(DEVICE)
        if dist.is_initialized():  # every rank stops, or none
            dist.all_reduce(total)
        mean = (total[0] / total[1]).item()
        bound = BROKEN if self.first is None else max(3 * self.first, NOISE)
        if not mean <= bound:  # NaN too
            raise RuntimeError(
                f"weight sync broken at policy version {engine.version}: engine and trainer differ "
                f"by {mean:.2e} nats a token, {bound:.2e} is allowed" + (
                    "" if self.first is None else f" (3 x {self.first:.2e} of the first check)"))
        if self.first is None:
            self.first = mean
        return mean
