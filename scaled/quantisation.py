"""The precisions of rollouts, as options of vLLM 0.30, and which checkpoints and devices have them."""
from functools import cache

import torch

from nano_moe_rl import DEVICE
from scaled.replay import moe_layers

ROUTERS = r"re:.*\.(gate|router)$"  # never quantised
PRECISIONS = ("bf16", "fp32", "fp8", "int8")


def quantisation(precision: str, config, tensor_parallel: int) -> dict:
    """vLLM's options for the precision of rollouts. ValueError if shapes or device lack it."""
    if precision not in PRECISIONS:
        raise ValueError(f"rollout precision {precision}: give {' or '.join(PRECISIONS)}")
    ignore = {"quantization_config": {"ignore": [ROUTERS]}}
    if precision in ("bf16", "fp32"):
        return {}
    sizes = quantised_sizes(config, tensor_parallel)
    if precision == "int8":  # experts only, one scale an output channel
        unit, method = 32, {"quantization": "int8_per_channel_weight_only", **ignore}
        if DEVICE == "cpu":  # the same numbers on every CPU
            method = {"quantization": register_rounded_experts()}
        sizes = {name: size for name, size in sizes.items() if "head" not in name}
    elif DEVICE == "cuda":
        # vLLM's plain "fp8" quantises the router too, and has one scale for the activations of a
        # whole batch: a token's μ would hang on its neighbours, and on padding that CUDA graphs leave
        # unwritten. This one has a scale a token. Triton: CUTLASS keeps tensors that sleep discards.
        unit, method = 16, {"quantization": "fp8_per_channel", "moe_backend": "triton", **ignore}
        if torch.cuda.get_device_capability() < (8, 9):
            raise ValueError(f"rollout precision fp8: {torch.cuda.get_device_name()} has no fp8 "
                             "units; give bf16 or int8")
    else:
        unit, method = 128, {"quantization": "fp8_per_block", **ignore}
        if not torch.cpu._is_amx_tile_supported():
            raise ValueError("rollout precision fp8: this CPU lacks AMX; give bf16 or int8")
    if wrong := {name: size for name, size in sizes.items() if size % unit}:
        listed = ", ".join(f"{name} {size}" for name, size in wrong.items())
        raise ValueError(f"rollout precision {precision}: needs multiples of {unit} per rank, the "
                         f"checkpoint has {listed}; give bf16")
    return method


def quantised_sizes(config, tensor_parallel: int) -> dict[str, int]:
    """Widths of the matrices that are quantised, of one tensor-parallel rank."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    sizes = {"hidden_size": config.hidden_size}
    for heads in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, heads) * head_dim // tensor_parallel
        sizes[f"{heads} * head_dim"] = max(count, head_dim)  # key-value heads are repeated if few
    names = ["moe_intermediate_size", "shared_expert_intermediate_size"]
    if not hasattr(config, "moe_intermediate_size") or len(moe_layers(config)) < (
            config.num_hidden_layers):  # of the experts, or of dense layers between
        names.append("intermediate_size")
    for name in names:
        if size := getattr(config, name, None):
            sizes[name] = size // tensor_parallel
    return sizes


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
