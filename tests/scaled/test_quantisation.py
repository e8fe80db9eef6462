"""Rollout precisions: which checkpoints and devices have them, and what vLLM makes of the options."""
import pytest
import torch
from transformers import Qwen3MoeConfig

from scaled.quantisation import quantisation, quantised_sizes

CONFIG = Qwen3MoeConfig(
    hidden_size=64, num_hidden_layers=3, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=96,
    intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=32, mlp_only_layers=[0])


def test_precisions_that_shapes_or_device_lack(monkeypatch):
    assert quantised_sizes(CONFIG, 1) == {
        "hidden_size": 64, "num_attention_heads * head_dim": 128,
        "num_key_value_heads * head_dim": 64, "moe_intermediate_size": 96, "intermediate_size": 160}
    assert quantised_sizes(CONFIG, 4)["num_key_value_heads * head_dim"] == 32
    with pytest.raises(ValueError, match="precision int4: give bf16 or fp32 or fp8 or int8"):
        quantisation("int4", CONFIG, 1)
    with pytest.raises(ValueError, match="int8: needs multiples of 32.*moe_intermediate_size 48"):
        quantisation("int8", CONFIG, 2)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(ValueError, match="fp8: this CPU lacks AMX"):
        quantisation("fp8", CONFIG, 1)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with pytest.raises(ValueError, match="multiples of 128 per rank.*hidden_size 64.*give bf16"):
        quantisation("fp8", CONFIG, 1)


def test_fp8_on_a_gpu_has_a_scale_for_each_token_and_leaves_routers_alone(monkeypatch):
    """By vLLM's own reading of the options, with the names of its Qwen3-MoE."""
    from vllm.config.quantization import resolve_quantization_config
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

    monkeypatch.setattr("scaled.quantisation.DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match="fp8: a card has no fp8 units; give bf16 or int8"):
        quantisation("fp8", CONFIG, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    options = quantisation("fp8", CONFIG, 1)
    read = resolve_quantization_config(options["quantization"], options["quantization_config"])
    for weights in (read.linear.weight, read.moe.weight):
        assert weights.scale.group_shape.is_per_channel() or weights.scale.group_shape.is_per_token()
    ignored = {name: should_ignore_layer(f"model.layers.0.{name}", read.ignore) for name in (
        "mlp.gate", "mlp.experts", "mlp.gate_up_proj", "self_attn.qkv_proj", "self_attn.o_proj")}
    assert [name for name, is_ignored in ignored.items() if is_ignored] == ["mlp.gate"]
