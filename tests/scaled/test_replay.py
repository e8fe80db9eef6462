"""What replay does, on a tiny random checkpoint of every family, fp32."""
import copy

import pytest
import torch
import torch.distributed as dist
from families import CONFIGS, build
from replaying import (B, COTANGENT, LENGTHS, MASK, T, TOKENS, assert_same, backward, error, every_family,
                       foreign_routes, run, spy)
from torch import nn
from torch.distributed.fsdp import fully_shard

from scaled.families import route_shape, routers
from scaled.replay import RoutingReplay


@every_family
def test_recorded_routes_are_the_models_own(family):
    """Without padding to spread, nothing differs from the model as it is."""
    model, everything = build(CONFIGS[family]), torch.ones_like(MASK)
    calls = spy(model)
    logits = model(TOKENS).logits
    native = logits.detach(), backward(model, logits)
    own = torch.stack([out[0][2] for out in calls.values()], 1).unflatten(0, (B, T))
    recorded = run(model, None, everything)
    assert_same(native, recorded)
    assert recorded[2].dtype == torch.uint8 and torch.equal(recorded[2].long(), own)


@every_family
def test_replay_of_recorded_routes_is_exact(family):
    """Bit for bit, since the columns keep their order and so do all sums."""
    model = build(CONFIGS[family])
    native = run(model, None)
    replayed = run(model, native[2])
    assert_same(native, replayed)
    assert torch.equal(native[2], replayed[2])


@every_family
def test_columns_have_no_meaning(family):
    """Another order of the same experts: only additions change their order, so not to the bit."""
    model = build(CONFIGS[family])
    native = run(model, None)
    turned = run(model, native[2].roll(1, -1))
    assert error(turned[0][MASK], native[0][MASK]) < 1e-5


class SlowRouter(nn.Module):
    """The family's formulas, a token at a time, for experts (N, A) chosen by somebody else."""
    def __init__(self, family, config, router, bias, experts):
        super().__init__()
        self.family, self.config, self.experts, self.weight = family, config, experts, router.weight
        self.bias = bias

    def token(self, x, chosen):
        logits = self.weight @ x + (0 if self.bias is None else self.bias)
        scale = getattr(self.config, "routed_scaling_factor", 1.0)
        match self.family:
            case "gpt_oss" | "granitemoe":  # softmax of the chosen
                return logits, logits[chosen].softmax(0)
            case "minimax_m2" | "deepseek_v3" | "glm4_moe" | "dots1":  # sigmoid, to a sum of 1
                scores = 1 / (1 + (-logits[chosen]).exp())
                return logits, scores / scores.sum() * scale
            case "deepseek_v2" | "qwen2_moe" | "olmoe":  # softmax of all, kept as it is
                return logits, (logits - logits.logsumexp(0)).exp()[chosen] * scale
            case "qwen3_moe" | "qwen3_next" | "qwen3_5_moe" | "mixtral" | "ernie4_5_moe":
                chosen_probabilities = (logits - logits.logsumexp(0)).exp()[chosen]
                return logits, chosen_probabilities / chosen_probabilities.sum()

    def forward(self, hidden, *_):
        rows = zip(hidden.reshape(len(self.experts), -1), self.experts)
        logits, weights = zip(*(self.token(x, chosen) for x, chosen in rows))
        return torch.stack(logits), torch.stack(weights), self.experts


@every_family
def test_foreign_routes_are_obeyed(family):
    """Experts, weights, logits and gradients are those of a model with written-out routers."""
    model = build(CONFIGS[family])
    slow, replay = copy.deepcopy(model), foreign_routes(model.config)
    calls, names = spy(model), {module: name for name, module in slow.named_modules()}
    for column, router in enumerate(routers(slow).values()):
        experts = replay[:, :, column].long().where(MASK[..., None], torch.arange(replay.shape[-1]))
        stub = SlowRouter(family, model.config, router, getattr(router, "bias", None),
                          experts.flatten(0, 1))
        slow.set_submodule(names[router], stub)
    logits, gradients, live = run(model, replay)
    slow_logits = slow(TOKENS).logits
    slow_gradients = backward(slow, slow_logits)
    stubs = [module for module in slow.modules() if isinstance(module, SlowRouter)]
    assert (live[MASK].sort(-1).values != replay[MASK].sort(-1).values).any(-1).float().mean() > 0.9
    for column, (stub, (out,)) in enumerate(zip(stubs, calls.values(), strict=True)):
        used = out[2].view(B, T, -1)
        assert torch.equal(used[MASK], replay[:, :, column][MASK].long())
    assert error(logits[MASK], slow_logits[MASK]) < 1e-5
    assert gradients.keys() == slow_gradients.keys()
    for name, gradient in gradients.items():
        assert error(gradient, slow_gradients[name]) < 1e-5, name


@every_family
def test_live_routes_under_replay_are_what_the_router_would_choose(family):
    """The first MoE layer sees the same input whatever is replayed in it."""
    model = build(CONFIGS[family])
    native, replayed = run(model, None)[2], run(model, foreign_routes(model.config))[2]
    assert torch.equal(native[:, :, 0][MASK], replayed[:, :, 0][MASK])
    assert not torch.equal(native[:, :, -1][MASK], replayed[:, :, -1][MASK])


@every_family
def test_router_gradient_of_a_replayed_expert_outside_the_live_top_k(family):
    model, replay = build(CONFIGS[family]), foreign_routes(CONFIGS[family])
    calls = spy(model)
    with RoutingReplay(model, replay, MASK) as routes:
        logits = model(TOKENS).logits
        for (out,) in calls.values():
            out[0].retain_grad()
        (logits * COTANGENT)[MASK].sum().backward()
    for column, (out,) in enumerate(calls.values()):
        replayed, live = replay[:, :, column][MASK].long(), routes.routing[:, :, column][MASK]
        outside = (replayed[..., None] != live[..., None, :]).all(-1)
        gradient = out[0].grad.view(B, T, -1)[MASK].gather(-1, replayed)
        assert outside.sum() > 20 and gradient[outside].abs().min() > 0


def test_deepseek_v2_weights_outside_the_live_groups():
    """Its scores there are 0 before the top-k; a replayed expert must not get that weight."""
    model = build(CONFIGS["deepseek_v2"])
    groups, calls, replay = model.config.n_group, spy(model), foreign_routes(model.config)
    L, A, E = route_shape(model.config)
    with RoutingReplay(model, replay, MASK) as routes, torch.no_grad():
        model(TOKENS)
    for column, (out,) in enumerate(calls.values()):
        scores = out[0].softmax(-1)
        best = scores.view(-1, groups, E // groups).amax(-1).topk(model.config.topk_group).indices
        outside = (out[2][..., None] // (E // groups) != best[:, None]).all(-1)
        assert outside[MASK.flatten()].sum() > 10 and (out[1] > 1e-6).all()
        live = routes.routing[:, :, column].flatten(0, 1).long() // (E // groups)
        assert (live[..., None] == best[:, None]).any(-1).all()  # live routes do keep the groups


@every_family
def test_recompute_sees_the_same_routes(family):
    model, checkpointed = build(CONFIGS[family]), build(CONFIGS[family]).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    calls = spy(checkpointed)
    for replay in (None, foreign_routes(model.config)):
        for outputs in calls.values():
            outputs.clear()
        plain, recomputed = run(model, replay), run(checkpointed, replay)
        assert_same(plain, recomputed)
        assert torch.equal(plain[2], recomputed[2])
        for first, again in calls.values():  # exactly two
            assert torch.equal(first[2], again[2]) and torch.equal(first[1], again[1])


@every_family
def test_padding_has_no_influence(family):
    """Other padding tokens and routes: the same bits. Each row alone, without padding: 1e-5, since
    other rows share its matrix products."""
    model, replay = build(CONFIGS[family]), foreign_routes(CONFIGS[family])
    logits, gradients, _ = run(model, replay)
    with RoutingReplay(model, replay.where(MASK[..., None, None], 0), MASK):
        other_logits = model(TOKENS.where(MASK, 60)).logits
        other = other_logits, backward(model, other_logits)
    assert_same((logits, gradients), other)
    for row, length in enumerate(LENGTHS):
        part = slice(row, row + 1), slice(length)
        with RoutingReplay(model, replay[part], MASK[part]), torch.no_grad():
            alone = model(TOKENS[part]).logits
        assert error(alone, logits[part]) < 1e-5


@every_family
@pytest.mark.parametrize("mode", ["none", "replay"])
def test_padding_goes_to_experts_in_turn(family, mode):
    model = build(CONFIGS[family])
    calls = spy(model)
    run(model, foreign_routes(model.config) if mode == "replay" else None)
    L, A, E = route_shape(model.config)
    for (out,) in calls.values():
        padding = out[2].view(B, T, A)[~MASK]
        load = padding.flatten().bincount(minlength=E)
        assert load.max() - load.min() <= 1
        assert all(len(set(row)) == A for row in padding.tolist())


@every_family
def test_afterwards_the_model_is_native(family):
    model, reference = build(CONFIGS[family]), build(CONFIGS[family], seed=7)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        before, reference_before = model(TOKENS).logits, reference(TOKENS).logits
        with RoutingReplay(model, foreign_routes(model.config), MASK):
            inside = model(TOKENS).logits
            assert torch.equal(reference(TOKENS).logits, reference_before)  # a model next to it
        with pytest.raises(ZeroDivisionError):
            with RoutingReplay(model, foreign_routes(model.config), MASK):
                1 / 0
        assert torch.equal(model(TOKENS).logits, before) and not torch.equal(inside, before)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == state


def test_two_models_replay_their_own_routes():
    model, other = build(CONFIGS["qwen3_moe"]), build(CONFIGS["mixtral"])
    alone = run(other, foreign_routes(other.config, seed=5))
    with RoutingReplay(model, foreign_routes(model.config), MASK):
        model(TOKENS)
        beside = run(other, foreign_routes(other.config, seed=5))
    assert_same(alone, beside)


@pytest.mark.parametrize("E, dtype", [(256, torch.uint8), (257, torch.int16)])
def test_the_narrow_dtype_holds_every_id(E, dtype):
    config = copy.deepcopy(CONFIGS["qwen3_moe"])
    config.num_experts, config.moe_intermediate_size = E, 8
    model = build(config)
    replay = (torch.arange(B * T * 9) * 7 % E).view(B, T, 3, 3).to(dtype)
    assert replay[MASK].max() == E - 1  # the last expert, replayed
    calls = spy(model)
    live = run(model, replay)[2]
    assert live.dtype == dtype and live[MASK].max() > 200
    assert all(torch.equal(out[2].view(B, T, 3)[MASK], replay[:, :, i][MASK].long())
               for i, (out,) in enumerate(calls.values()))
    if E > 256:
        with pytest.raises(ValueError, match="uint8, in which ids of 257 experts wrap"):
            RoutingReplay(model, replay.to(torch.uint8), MASK)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_family
def test_under_fsdp(family, process_group):
    """Layers are wrapped and checkpointed; logits and gradients are those of the bare model."""
    model, sharded = build(CONFIGS[family]), build(CONFIGS[family]).train()
    sharded.activation_checkpointing_enable({"use_reentrant": False})
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    plain = run(model, foreign_routes(model.config))
    logits, gradients, live = run(sharded, foreign_routes(model.config))
    assert_same(plain, (logits, {name: g.full_tensor() for name, g in gradients.items()}))
    assert torch.equal(plain[2], live)
