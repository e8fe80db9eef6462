"""The training engine: against transformers, under replay, with padding."""

import pytest
import torch
from conftest import sample_rollout
from scaled.export import transformers_twin

import nano_moe_rl as nano


@pytest.mark.parametrize("shape", [dict(width=64, heads=2, kv_heads=1), dict(width=128, heads=4, kv_heads=2),
                                   dict(width=128, heads=2, kv_heads=2, top_k=3)])
def test_logits_and_experts_are_those_of_transformers(config, shape):
    model = nano.Model(nano.replace(config, **shape))
    for name, parameter in model.named_parameters():  # norms start at 1, which would hide a mix-up
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokens = torch.randint(len(nano.VOCABULARY), (5, 17), generator=torch.Generator().manual_seed(3))
    twin, experts = transformers_twin(model), []
    for layer in twin.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: experts.append(output[2]))
    with torch.no_grad():
        logits, routing = model(tokens)
        expected = twin(tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    expected = torch.stack(experts, 1).unflatten(0, tokens.shape)
    assert torch.equal(routing.long().sort(-1).values, expected.sort(-1).values)


def test_replaying_its_own_routing_is_bitwise_the_native_forward(model, rollout):
    native, routing = model(rollout.tokens[:, :-1], None, rollout.fed)
    replayed, live = model(rollout.tokens[:, :-1], routing, rollout.fed)
    assert torch.equal(native, replayed) and torch.equal(routing, live)


def foreign_routing(routing, experts):
    """For every real token, other experts than the live ones."""
    scores = torch.rand(*routing.shape[:-1], experts, generator=torch.Generator().manual_seed(1))
    scores = scores.scatter(-1, routing.long().clamp(min=0), -1.0)
    return scores.topk(routing.shape[-1]).indices.to(torch.int16).where(routing >= 0, routing)


def test_foreign_routing_is_obeyed_and_reported_routing_stays_live(config, model, rollout):
    tokens, fed = rollout.tokens[:, :-1], rollout.fed
    native, live = model(tokens, None, fed)
    replay = foreign_routing(live, config.experts)
    replayed, live_under_replay = model(tokens, replay, fed)
    assert (replayed - native).abs()[fed].min(-1).values.max() > 1e-2
    assert not torch.equal(live_under_replay, replay)
    # layer 0 sees the same input either way, so its live choice is the same
    assert torch.equal(live_under_replay[:, :, 0], live[:, :, 0])
    # the slow way: only experts on replayed routes have any gradient
    model.zero_grad()
    one = torch.zeros_like(fed).index_fill(1, torch.tensor([0]), True)
    model(tokens, replay.where(one[..., None, None], -1), one)[0][one].sum().backward()
    for i, layer in enumerate(model.layers):
        used = set(replay[:, 0, i].flatten().tolist())
        gradient = layer.mlp.experts["down_proj"].grad.abs().sum((1, 2))
        assert {e for e in range(config.experts) if gradient[e] > 0} == used


def test_a_replayed_expert_outside_the_live_top_k_has_a_router_gradient(config, model):
    tokens = torch.tensor([[3, 1, 4]])
    _, live = model(tokens)
    replay = foreign_routing(live, config.experts)
    model(tokens, replay)[0].logsumexp(-1).sum().backward()
    for i, layer in enumerate(model.layers):
        gradient = layer.mlp.gate.weight.grad.abs().sum(1)
        for expert in replay[0, :, i].unique().tolist():
            assert gradient[expert] > 0
        silent = set(range(config.experts)) - set(replay[0, :, i].flatten().tolist())
        assert all(gradient[expert] == 0 for expert in silent)


def test_one_expert_a_token_leaves_the_router_without_gradient(config):
    model = nano.Model(nano.replace(config, top_k=1))
    model(torch.tensor([[3, 1, 4]]))[0].logsumexp(-1).sum().backward()
    assert all(layer.mlp.gate.weight.grad.abs().max() == 0 for layer in model.layers)


def test_padding_changes_nothing_and_meets_no_expert(config, model, rollout):
    tokens, fed = rollout.tokens[:, :-1], rollout.fed
    assert not fed.all(), "the case needs padding"
    logits, routing = model(tokens, None, fed)
    assert (routing[~fed] == -1).all() and (routing[fed] >= 0).all()
    for row in range(len(tokens)):  # each sequence alone, without padding
        n = int(rollout.lengths[row]) - 1
        alone, alone_routing = model(tokens[row, None, :n])
        torch.testing.assert_close(logits[row, :n], alone[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(routing[row, :n], alone_routing[0])
    rows_of_experts = []

    class Counting(nano.Numerics):
        def linear(self, x, weight, ends=None):
            if ends is not None:
                rows_of_experts.append((len(x), int(ends[-1])))
            return super().linear(x, weight, ends)

    model(tokens, None, fed, numerics=Counting("fp32"))
    assert set(rows_of_experts) == {(int(fed.sum()) * config.top_k,) * 2}


def test_the_mixture_is_a_plain_loop_over_tokens(config, model, rollout):
    """A replayed route on half of the tokens, −1 on the rest: each expert alone, one token at a time."""
    layer, fed = model.layers[0].mlp, rollout.fed
    x = torch.randn(*fed.shape, config.width, generator=torch.Generator().manual_seed(0))
    replay = foreign_routing(rollout.routing, config.experts)[:, :, 0].long()
    y, _ = layer(x, fed, replay, nano.Numerics("fp32"))
    for b, t in fed.nonzero()[::7].tolist():
        scores = layer.gate(x[b, t])[replay[b, t]].softmax(-1)
        expected = 0
        for weight, e in zip(scores, replay[b, t]):
            gate, up = (layer.experts["gate_up_proj"][e] @ x[b, t]).chunk(2)
            expected += weight * layer.experts["down_proj"][e] @ (torch.nn.functional.silu(gate) * up)
        torch.testing.assert_close(y[b, t], expected, atol=1e-5, rtol=1e-4)
    assert (y[~fed] == 0).all()


def test_experts_that_nobody_chose_do_no_work(config, model):
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    replay = torch.tensor([6, 2], dtype=torch.int16).expand(1, 5, config.layers, 2)
    poisoned = nano.Model(config)
    poisoned.load_state_dict(model.state_dict())
    for layer in poisoned.layers:
        unused = [e for e in range(config.experts) if e not in (2, 6)]
        layer.mlp.experts["down_proj"].data[unused] = torch.nan
    assert torch.equal(model(tokens, replay)[0], poisoned(tokens, replay)[0])


@pytest.mark.parametrize("spoil, message", [
    (lambda r: r[:, :, :-1], "24, 2[0-9], 2, 2"),
    (lambda r: r.index_fill(1, torch.tensor([0]), -1), "lacks a valid route for"),
    (lambda r: r.where(r != 0, 99), "lacks a valid route for"),
    (lambda r: r[..., :1].expand_as(r), "lacks a valid route for"),
])
def test_routes_that_cannot_be_replayed_are_refused(model, rollout, spoil, message):
    with pytest.raises(ValueError, match=message):
        model(rollout.tokens[:, :-1], spoil(rollout.routing), rollout.fed)


def test_missing_routes_are_counted(config, model):
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    _, routing = model(tokens)
    routing[0, 2] = -1
    with pytest.raises(ValueError, match=f"for {config.layers} of {5 * config.layers} "):
        model(tokens, routing)


def test_bf16_training_rounds_products_and_keeps_fp32_weights(config):
    model = nano.Model(nano.replace(config, train_precision="bf16"))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    weight = model.layers[0].self_attn.q_proj.weight
    y = model.numerics.linear(x, weight)
    assert torch.equal(y, y.bfloat16().float())
    slow = x.bfloat16().double() @ weight.bfloat16().double().T
    torch.testing.assert_close(y.double(), slow, atol=0, rtol=2**-8)
    rollout = sample_rollout(model, "bf16")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batch = nano.prepare_batch(model, rollout)
    before = weight.detach().clone()
    metrics = nano.train_step(model, optimizer, batch.split(config.mini_batch)[0])
    assert weight.dtype == torch.float32 and not torch.equal(before, weight)
    assert metrics["staleness_kl"] == 0 and 0 < metrics["mismatch_kl"] < 0.1
