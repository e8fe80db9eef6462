"""Sizes of configurations: published totals, transformers' own counts, gradients, and FSDP2's shards."""
import json
import re

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from families import CONFIGS, build
from torch.testing._internal.distributed.fake_pg import FakeStore

from scaled.config import Config
from scaled.facts import MODELS
from scaled.policy import Policy, _shard
from scaled.quantisation import ROUTERS
from scaled.replay import RoutingReplay
from scaled.sizes import count, measure, read_configuration, shard

C = Config(checkpoint="checkpoints/Qwen3-30B-A3B-Base", train_data="there")
OTHER_ATTENTION = {"qwen3_next", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"}
PLANNED = sorted(CONFIGS.keys() - OTHER_ATTENTION)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_published_models(name):
    """Cards print the active ones in billions with one or two digits, and Qwen's are cut, not rounded."""
    published, s = MODELS[name], measure(*read_configuration(C, name))
    assert s.total == published.total
    last_digit = 10.0 ** -len(published.active.partition(".")[2])
    assert abs(s.active / 1e9 - float(published.active)) < max(0.01 * float(published.active), last_digit)
    config = tf.AutoConfig.for_model(published.model_type, **published.config)
    with torch.device("meta"):
        assert s.total == tf.AutoModelForCausalLM.from_config(config).num_parameters()


def test_numbers_of_qwen3_30b_that_others_published():
    s = measure(*read_configuration(C, ""))  # by the beginning of the checkpoint's name
    assert (s.name, s.source) == ("Qwen3-30B-A3B-Base", "the published configuration")
    assert (s.active, s.cache_bytes, s.route_bytes) == (3_353_032_704, 98_304, 384)
    assert measure(*read_configuration(C, "Qwen3-235B-A22B")).published_tensors == 36_945


@pytest.mark.parametrize("family", PLANNED)
def test_sizes_of_a_family(family):
    """By what a real model of the family does with a token: gradients, a cache, routes, tensors on disk."""
    model = build(CONFIGS[family])
    s = measure(family, "", model.config)
    cache = model(torch.tensor([[5]]), use_cache=True).past_key_values
    assert s.cache_bytes == sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) // 2  # bf16
    with RoutingReplay(model, None, torch.ones(1, 1, dtype=torch.bool)) as routes:
        model(torch.tensor([[5]])).logits.sum().backward()
    assert s.route_bytes == routes.routing.nbytes
    met = 0
    for name, weight in model.named_parameters():
        rows = weight.grad.flatten(1).any(1).sum() if ".experts." in name else len(weight)
        met += int(rows) * weight[0].numel()
    assert s.active == met < s.total == model.num_parameters()
    assert sum(layer.matrices for layer in s.layers) == sum(
        module.weight.numel() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        and ".layers." in name and not re.fullmatch(ROUTERS.removeprefix("re:"), name))
    assert count(s.experts) == sum(x.numel() for name, x in model.named_parameters() if ".experts." in name)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_published_tensors_are_those_of_a_file(family, tmp_path):
    from safetensors.torch import load_file
    model = build(CONFIGS[family])
    model.save_pretrained(tmp_path)
    if family == "qwen3_moe":  # granite publishes packed experts; vLLM still takes one matrix at a time
        assert measure(family, "", model.config).published_tensors == len(load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("world", [2, 3, 8, 40])
def test_shards_are_those_of_fsdp2(world):
    """On the fullest rank, 0; more ranks than experts share nothing further, and pad what is gathered."""
    config = CONFIGS["qwen3_moe"]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with torch.device("meta"):
            policy = Policy(tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32), 1)
        whole = [tuple(p.shape) for p in policy.parameters()]
        _shard(policy, "fp32", False, False, torch.device("cpu"))
        local = [p.to_local() for p in policy.parameters()]
    finally:
        dist.destroy_process_group()
    assert [shard((shape,), world) for shape in whole] == [x.numel() for x in local]
    s = measure("", "", config)
    assert shard(s.shapes, world) == sum(x.numel() for x in local)
    assert shard(s.experts, 40) == shard(s.experts, 10) == count(s.experts) // 10
    assert sorted(s.shapes) == sorted(whole)


@pytest.mark.parametrize("family", sorted(OTHER_ATTENTION))
def test_attention_without_a_formula_is_refused(family):
    with pytest.raises(ValueError, match="attention of a kind"):
        measure(family, "", CONFIGS[family])


@pytest.mark.parametrize("content, line", [
    ("not JSON", "cannot be used"),
    ({"model_type": "qwen3_moe", "num_hidden_layers": 10**9}, "1000000000 layers; give one of 1 to 512"),
    ({"model_type": "qwen3_moe", "hidden_size": -4}, "cannot be built"),
    ({"model_type": "qwen3_moe", "num_experts_per_tok": 4, "num_experts": 2, "num_hidden_layers": 1},
     "impossible numbers"),
    ({"model_type": "llama", "num_hidden_layers": 1}, "no Mixture of Experts"),
    ({"model_type": "gpt2", "n_layer": 1}, "cannot be built|kind"),
    ({"model_type": "qwen3_moe", "quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
    ({"auto_map": {"AutoConfig": "own.Config"}, "model_type": "own"}, "cannot be used")], ids=str)
def test_a_configuration_that_is_none(tmp_path, content, line):
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=line) as refusal:
        measure(*read_configuration(C, str(tmp_path)))
    assert "\n" not in str(refusal.value)


def test_a_model_that_is_nowhere(tmp_path):
    with pytest.raises(ValueError, match=f"--model {tmp_path}: has no config.json; give --model .* Qwen3-30B-A3B"):
        read_configuration(C, str(tmp_path))
