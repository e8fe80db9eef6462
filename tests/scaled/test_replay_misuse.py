"""Everything that replay refuses: bad routes and masks, and passes that are not one forward with its backward."""
import copy

import pytest
import torch
import transformers as tf
from families import CONFIGS, build
from replaying import B, MASK, T, TOKENS, backward, every_family, foreign_routes, run
from torch.utils.checkpoint import CheckpointError

from scaled.families import route_shape
from scaled.replay import RoutingReplay, routed


@every_family
def test_bad_routes_are_refused_with_their_number(family):
    model, replay = build(CONFIGS[family]), foreign_routes(CONFIGS[family])
    L, A, E = route_shape(model.config)
    assert not MASK[1, 8]  # its 255 is no fault
    for bad in (E, 255):
        broken = replay.clone()
        broken[0, 4, L - 1, 1], broken[2, 8, 0, A - 1] = bad, bad
        broken[2, 3, 0, 0] = broken[2, 3, 0, 1]  # twice the same expert
        with pytest.raises(ValueError, match=f"valid route for 3 of {27 * L} "):
            RoutingReplay(model, broken, MASK)
    missing = replay.to(torch.int16).masked_fill(~MASK[..., None, None], 0)
    missing[0] = -1
    with pytest.raises(ValueError, match=f"valid route for {11 * L} of {27 * L} "):
        RoutingReplay(model, missing, MASK)
    for wrong in (replay[:, :, 1:], replay[..., 1:], replay[:, 1:], replay[1:]):
        with pytest.raises(ValueError, match="replay has shape"):
            RoutingReplay(model, wrong, MASK)


@every_family
def test_backward_outside_is_refused_when_it_would_recompute(family):
    model = build(CONFIGS[family]).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with RoutingReplay(model, foreign_routes(model.config), MASK):
        logits = model(TOKENS).logits
    with pytest.raises(CheckpointError, match="number of tensors"):
        backward(model, logits)


def test_routers_that_do_not_fire_once():
    model = build(CONFIGS["qwen3_moe"])  # routers in layers 0, 2 and 3
    with pytest.raises(RuntimeError, match=r"0 of 3 routers fired, not .* \[0, 2, 3\]"):
        with RoutingReplay(model, None, MASK):
            pass
    with pytest.raises(RuntimeError, match=r"1 of 3 routers fired, not .* \[0, 3\]"):
        with RoutingReplay(model, None, MASK):
            model.model.layers[2].mlp(torch.randn(B, T, 64))
    with pytest.raises(RuntimeError, match="layer 0 .*ran twice"):
        with RoutingReplay(model, None, MASK):
            model(TOKENS)
            model(TOKENS)
    with pytest.raises(RuntimeError, match="ran on 30 tokens"):
        with RoutingReplay(model, None, MASK):
            model(TOKENS[:, 1:])
    routes = RoutingReplay(model, None, MASK)
    with pytest.raises(RuntimeError, match="0 of 3"):
        routes.routing


def test_a_forward_from_before_is_not_recomputed_inside():
    model = build(CONFIGS["qwen3_moe"]).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    logits = model(TOKENS).logits
    with pytest.raises(RuntimeError, match="recomputed without a forward"):
        with RoutingReplay(model, foreign_routes(model.config), MASK):
            backward(model, logits)


def test_nesting_and_copies_are_refused():
    model = build(CONFIGS["qwen3_moe"])
    with torch.no_grad(), RoutingReplay(model, None, MASK):
        with pytest.raises(RuntimeError, match="layer 0 already has a replaced forward"):
            RoutingReplay(model, foreign_routes(model.config), MASK).__enter__()
        with pytest.raises(RuntimeError, match="copy it before"):
            copy.deepcopy(model)
        model(TOKENS)


def test_a_router_that_hides_its_selection_is_refused(monkeypatch):
    """As a fused kernel would that takes the place of the class's forward."""
    model = build(CONFIGS["mixtral"])
    fused = model.model.layers[2].mlp.gate
    answer = fused(torch.randn(B * T, 64))
    monkeypatch.setattr(type(fused), "forward", lambda router, hidden: answer)
    with pytest.raises(RuntimeError, match="layer 0 took 0 top-2 of 7 experts"):
        run(model, None)


def test_without_replay_an_unknown_family_is_left_alone():
    small = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=61, num_hidden_layers=2,
                 num_key_value_heads=1, num_local_experts=4)
    model = build(tf.PhimoeConfig(**small))
    expected = model(TOKENS).logits
    with routed(model, None, MASK) as routes:
        assert torch.equal(model(TOKENS).logits, expected) and routes.routing is None
    with pytest.raises(ValueError, match="does not know model_type 'phimoe'"):
        routed(model, torch.zeros(B, T, 2, 2, dtype=torch.uint8), MASK)
    known = build(CONFIGS["mixtral"])
    with torch.no_grad(), routed(known, None, MASK) as routes:
        known(TOKENS)
    assert routes.routing.shape[:2] == MASK.shape


def test_masks_that_are_no_masks_are_refused():
    model = build(CONFIGS["mixtral"])
    for mask in (MASK.long(), MASK[0]):
        with pytest.raises(ValueError, match="give bool"):
            RoutingReplay(model, None, mask)
