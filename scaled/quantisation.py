"""The precisions of rollouts as options of vLLM, and which checkpoints and devices have them."""
import torch

from nano_moe_rl import DEVICE
from scaled.families import knows, moe_layers
from scaled.vllm_faults import register_rounded_experts

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
        # whole batch: a token's μ would hang on its neighbours, and on padding that CUDA graphs
        # leave unwritten. This one has a scale a token. Triton: CUTLASS keeps tensors that sleep
        # discards.
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
    if not (hasattr(config, "moe_intermediate_size") and knows(config)
            and len(moe_layers(config)) == config.num_hidden_layers):  # experts', or dense layers'
        names.append("intermediate_size")
    for name in names:
        if size := getattr(config, name, None):
            sizes[name] = size // tensor_parallel
    return sizes
