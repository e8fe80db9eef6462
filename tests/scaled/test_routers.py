"""Which routers a model has: the list of families, keyed by layer, and what is not on it."""
import pytest
import transformers as tf
from families import CONFIGS, build
from replaying import MASK, every_family

from scaled.families import FAMILIES, moe_layers, route_shape, routers
from scaled.replay import RoutingReplay


def test_every_family_of_the_table_is_tested():
    assert {config.model_type for config in CONFIGS.values()} == FAMILIES.keys()


@every_family
def test_routers_are_keyed_by_the_layer_index(family):
    model = build(CONFIGS[family])
    expected = {}
    for layer in model.model.layers:
        mixer = getattr(layer, "self_attn", None) or layer.linear_attn
        block = getattr(layer, "mlp", None) or layer.block_sparse_moe
        router = getattr(block, "gate", getattr(block, "router", None))
        if hasattr(block, "experts"):
            expected[mixer.layer_idx] = router
    assert routers(model) == expected and list(expected) == moe_layers(model.config)
    router = next(iter(expected.values()))
    assert route_shape(model.config) == (len(expected), router.top_k, len(router.weight))


def test_unknown_families_are_refused_by_name():
    for config in (tf.LlamaConfig(), tf.PhimoeConfig()):
        for ask in (route_shape, moe_layers):
            with pytest.raises(ValueError, match=f"does not know model_type '{config.model_type}'"):
                ask(config)
    small = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=61,
                 num_hidden_layers=2, num_key_value_heads=1)
    with pytest.raises(ValueError, match="model_type 'llama'"):
        RoutingReplay(build(tf.LlamaConfig(**small)), None, MASK)
    with pytest.raises(ValueError, match="qwen3_moe config has no MoE layer"):
        routers(build(tf.Qwen3MoeConfig(**small, mlp_only_layers=[0, 1])))


def test_routers_that_contradict_the_config_are_refused():
    model = build(CONFIGS["qwen3_moe"])
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(ValueError, match=r"in layers \[0, 3\], its config says \[0, 2, 3\]"):
        RoutingReplay(model, None, MASK)
