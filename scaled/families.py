"""What is known about model families in transformers: their routers, and where one departs from the
rest. What vLLM makes of them is in vllm_internals.py."""
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import nn


def every_layer(config) -> list[int]:
    return list(range(config.num_hidden_layers))

def after_dense(config) -> list[int]:
    return every_layer(config)[config.first_k_dense_replace:]

def sparse_step(config) -> list[int]:
    return [i for i in every_layer(config) if (i + 1) % config.decoder_sparse_step == 0
            and i not in config.mlp_only_layers and config.num_experts > 0]

def interval(config) -> list[int]:
    inside = range(config.moe_layer_start_index, config.moe_layer_end_index + 1)
    return [i for i in every_layer(config)
            if (i + 1) % config.moe_layer_interval == 0 and i in inside]


@dataclass(frozen=True)
class Family:
    title: str  # as people write it
    router: str  # the class of its routers, whose forward has one top-k over the experts
    experts: str  # the config's name of E
    layers: Callable[[object], list[int]]  # the decoder layers that have a router


# The allow-list, by config.model_type.
FAMILIES = {
    "qwen2_moe": Family("Qwen2-MoE", "Qwen2MoeTopKRouter", "num_experts", sparse_step),
    "qwen3_moe": Family("Qwen3-MoE", "Qwen3MoeTopKRouter", "num_experts", sparse_step),
    "qwen3_next": Family("Qwen3-Next", "Qwen3NextTopKRouter", "num_experts", sparse_step),
    "qwen3_5_moe_text": Family(
        "Qwen3.5-MoE (its text model)", "Qwen3_5MoeTopKRouter", "num_experts", every_layer),
    "mixtral": Family("Mixtral", "MixtralTopKRouter", "num_local_experts", every_layer),
    "olmoe": Family("OLMoE", "OlmoeTopKRouter", "num_experts", every_layer),
    "deepseek_v2": Family(
        "DeepSeek-V2", "DeepseekV2TopkRouter", "n_routed_experts", after_dense),
    "deepseek_v3": Family(
        "DeepSeek-V3", "DeepseekV3TopkRouter", "n_routed_experts", after_dense),
    "glm4_moe": Family("GLM-4-MoE", "Glm4MoeTopkRouter", "n_routed_experts", after_dense),
    "gpt_oss": Family("gpt-oss", "GptOssTopKRouter", "num_local_experts", every_layer),
    "granitemoe": Family("Granite-MoE", "GraniteMoeTopKRouter", "num_local_experts", every_layer),
    "minimax_m2": Family("MiniMax-M2", "MiniMaxM2TopKRouter", "num_local_experts", every_layer),
    "ernie4_5_moe": Family(
        "ERNIE-4.5-MoE", "Ernie4_5_MoeTopKRouter", "moe_num_experts", interval),
    "dots1": Family("dots1", "Dots1TopkRouter", "n_routed_experts", after_dense),
}


def knows(config) -> bool:
    """Whether the routers of this model can be watched and replayed."""
    return config.get_text_config().model_type in FAMILIES

def family_of(config) -> tuple[Family, object]:
    """The family, and the part of the config that describes the language model. ValueError for one
    that is not listed."""
    config = config.get_text_config()
    if config.model_type not in FAMILIES:
        raise ValueError(f"routing replay does not know model_type {config.model_type!r}; it knows "
                         f"{', '.join(FAMILIES)}; give --replay none to train without")
    return FAMILIES[config.model_type], config

def moe_layers(config) -> list[int]:
    """Decoder layers that have a router, ascending. ValueError: unknown family, or none has."""
    family, config = family_of(config)
    if not (layers := family.layers(config)):
        raise ValueError(f"routing replay: this {config.model_type} config has no MoE layer")
    return layers

def route_shape(config) -> tuple[int, int, int]:
    """(L, A, E): MoE layers, experts a token, experts. ValueError as in moe_layers."""
    layers, (family, config) = moe_layers(config), family_of(config)
    return len(layers), config.num_experts_per_tok, getattr(config, family.experts)

def routers(model: nn.Module) -> dict[int, nn.Module]:
    """Index of the decoder layer -> its router, ascending; dense layers have none. ValueError as in
    moe_layers, or if the modules are not those that the config promises."""
    layers, (family, config) = moe_layers(model.config), family_of(model.config)
    package = config.model_type.removesuffix("_text")
    modeling = import_module(f"transformers.models.{package}.modeling_{package}")
    kind = getattr(modeling, family.router)
    # by the name, never by counting; wrappers may add components to it, fully_shard a subclass
    found = [(int(re.findall(r"\blayers\.(\d+)\.", name)[-1]), module)
             for name, module in model.named_modules() if isinstance(module, kind)]
    if [layer for layer, _ in found] != layers:
        raise ValueError(f"routing replay: this {config.model_type} has a {kind.__name__} in layers"
                         f" {[layer for layer, _ in found]}, its config says {layers}; load it with"
                         " transformers' own class")
    return dict(found)

def logits_scale(config) -> float:
    """What the head's products are multiplied with: Granite divides its logits."""
    return 1 / getattr(config, "logits_scaling", 1.0)
