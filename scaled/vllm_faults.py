"""Faults of vLLM 0.30 on CPUs, each with its mend, called before an engine starts."""
from functools import cache
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist


@cache
def repack_experts_on_reload():
    """On a CPU, vLLM packs unquantised experts for its kernel at the first load only. A reload then
    copies raw weights over packed ones of the same size, without an error, and the engine samples
    from nonsense. Here packing follows every load; quantised experts do it themselves."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod)

    setup = UnquantizedFusedMoEMethod._setup_kernel

    def setup_and_pack(self, layer, *args, **kwargs):
        reload = self.moe_kernel is not None
        setup(self, layer, *args, **kwargs)
        if reload:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = setup_and_pack


@cache
def name_shared_memory():
    """On a CPU, the ranks of an engine meet in files of shared memory whose names are the same in every run
    under torchrun: another run at the same time, or what a killed one left, and no engine starts. Here each
    meeting has a name of its own, drawn by its first rank, and once all are there no name at all: what is
    left of a killed run goes with its processes."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Shared

    meet = Shared._init_cpu_shm

    def meet_and_forget(self):
        names, group = [uuid4().hex], self.communicator
        dist.broadcast_object_list(names, group.ranks[0], group.cpu_group)
        self.group_name = names[0]
        handle = meet(self)  # ends with a barrier: all have opened all files
        for path in Path("/dev/shm").glob(f"{names[0]}*"):
            path.unlink(missing_ok=True)
        return handle

    Shared._init_cpu_shm = meet_and_forget


@cache
def mend_rotary():
    """On a CPU, vLLM's kernel for rotary positions is wrong for several heads in the layout that
    DeepSeek's attention has, by whole units. Its version in torch is right."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native


@cache
def rewind_generators():
    """A request with a seed has a generator of its own. vLLM samples a token after each part of a
    prompt, drops all but the last, and takes back what the generator gave for them by its offset,
    which one on a CPU does not have: an error as soon as prompts fill more than one step. Here the
    generator's state is kept and put back."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # the CPU's is derived from it

    sample, keep_books = GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync

    def unfinished(runner) -> dict:
        mask = runner.discard_request_mask.np
        return {i: generator for i, generator in runner.input_batch.generators.items() if mask[i]}

    def sample_and_rewind(self, *args, **kwargs):
        states = [(generator, generator.get_state()) for generator in unfinished(self).values()]
        sampled = sample(self, *args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return sampled

    def keep_books_of_the_others(self, *args, **kwargs):
        generators, aside = self.input_batch.generators, unfinished(self)
        self.input_batch.generators = {
            i: generator for i, generator in generators.items() if i not in aside}
        try:
            return keep_books(self, *args, **kwargs)
        finally:
            self.input_batch.generators = generators

    GPUModelRunner._sample = sample_and_rewind
    GPUModelRunner._bookkeeping_sync = keep_books_of_the_others


@cache
def register_rounded_experts() -> str:
    """int8 for CPUs, on which vLLM has int8 kernels only with AMX -> the name of the method. The
    experts' weights are rounded to vLLM's int8 grid, one scale an output channel, at every load,
    and then multiplied as bf16: the numbers of int8 weights, not their speed."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod)
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import amax_for_moe_weight_quant

    class RoundedExperts(UnquantizedFusedMoEMethod):
        def process_weights_after_loading(self, layer):
            for weight, shards in ((layer.w13_weight, 1), (layer.w2_weight, self.moe.tp_size)):
                largest = weight.abs().amax(-1)  # (E, out); w2 has a slice of each row on a rank
                scale = (amax_for_moe_weight_quant(largest, shards) / 127)[..., None]
                grid = (weight / scale.clamp(min=1e-12)).round().clamp(-127, 127)
                weight.data.copy_(grid * scale)
            super().process_weights_after_loading(layer)

    @register_quantization_config("rounded_int8_experts")
    class RoundedExpertsConfig(QuantizationConfig):
        get_name = staticmethod(lambda: "rounded_int8_experts")
        get_supported_act_dtypes = staticmethod(lambda: [torch.bfloat16])
        get_min_capability = staticmethod(lambda: 0)
        get_config_filenames = staticmethod(list)
        from_config = classmethod(lambda cls, config: cls())

        def get_quant_method(self, layer, prefix):
            if isinstance(layer, RoutedExperts):
                return RoundedExperts(layer.moe_config)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    return "rounded_int8_experts"
