"""Tokens, masks and routes for the tests of replay, and one pass with them."""
import pytest
import torch
from families import CONFIGS

from scaled.families import route_shape, routers
from scaled.replay import RoutingReplay

LENGTHS = torch.tensor([11, 7, 9])
B, T = len(LENGTHS), 11
MASK = torch.arange(T) < LENGTHS[:, None]
TOKENS = torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))
COTANGENT = torch.randn(B, T, 61, generator=torch.Generator().manual_seed(2))
every_family = pytest.mark.parametrize("family", CONFIGS)


def foreign_routes(config, seed=3):
    """Random valid routes for real tokens, on padding an id that no model has."""
    L, A, E = route_shape(config)
    shuffled = torch.rand(B, T, L, E, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return shuffled[..., :A].to(torch.uint8).masked_fill(~MASK[..., None, None], 255)


def spy(model):
    """Layer -> outputs of its router, appended at every call."""
    calls = {layer: [] for layer in routers(model)}
    for layer, router in routers(model).items():
        router.register_forward_hook(lambda _, __, out, layer=layer: calls[layer].append(out))
    return calls


def backward(model, logits):
    """Gradients of a sum over real tokens, by name."""
    model.zero_grad()
    (logits * COTANGENT)[MASK].sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run(model, replay, mask=MASK):
    """-> logits (B, T, V), gradients, live routing."""
    with RoutingReplay(model, replay, mask) as routes:
        logits = model(TOKENS).logits
        gradients = backward(model, logits)
    return logits.detach(), gradients, routes.routing


def error(value, expected):
    """Relative, in the 2-norm."""
    return (value - expected).norm() / expected.norm()


def assert_same(one, other):
    """Logits of real tokens and all gradients, bit for bit."""
    assert torch.equal(one[0][MASK], other[0][MASK])
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        assert torch.equal(one[1][name], other[1][name]), name
