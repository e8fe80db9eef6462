"""The RL maths against slow, obvious versions."""

import math

import pytest
import torch

import nano_moe_rl as nano

B, T, V, G = 6, 5, 7, 3


@pytest.fixture
def case():
    """logprobs, old_logprobs, rollout_logprobs, advantages, mask: policies that lie clearly apart."""
    generator = torch.Generator().manual_seed(0)
    logprobs, old, rollout = (-2 * torch.rand(B, T, generator=generator) for _ in range(3))
    mask = torch.arange(T) < torch.tensor([5, 3, 1, 4, 0, 2])[:, None]
    return logprobs.requires_grad_(), old, rollout, torch.randn(B, generator=generator), mask


def slow_minirl(logprobs, old, rollout, advantages, mask, *, clip, kind, length_norm):
    """Equation 7, a token at a time -> loss, gradient in logprobs."""
    loss, gradient = 0.0, torch.zeros(B, T)
    for i in range(B):
        tokens = [t for t in range(T) if mask[i, t]]
        product = math.prod(math.exp(logprobs[i, t] - rollout[i, t]) for t in tokens)
        for t in tokens:
            ratio = math.exp(logprobs[i, t] - old[i, t])
            if clip and (advantages[i] > 0 and ratio > 1.27 or advantages[i] < 0 and ratio < 0.8):
                continue
            weight = {"token": min(math.exp(logprobs[i, t] - rollout[i, t]), 5), "staleness": min(ratio, 5),
                      "sequence": min(product, 2)}[kind]
            gradient[i, t] = -weight * advantages[i] / B / (len(tokens) if length_norm else 1)
            loss += gradient[i, t] * logprobs[i, t]
    return loss, gradient


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", ["token", "sequence", "staleness"])
@pytest.mark.parametrize("length_norm", [True, False])
def test_minirl_is_equation_7(case, clip, kind, length_norm):
    logprobs, _, _, _, mask = case
    loss, gate = nano.minirl_loss(*case, n_sequences=B, n_tokens=int(mask.sum()), clip=clip,
                                  importance_sampling=kind, length_norm=length_norm)
    loss.backward()
    detached = [x.detach() for x in case]
    expected, gradient = slow_minirl(*detached, clip=clip, kind=kind, length_norm=length_norm)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(logprobs.grad, gradient)
    assert gate.shape == mask.shape and (clip or gate.all())
    if clip:
        assert not gate[mask].all(), "the case needs clipped tokens"


def test_masked_tokens_have_no_influence(case):
    logprobs, old, rollout, advantages, mask = case
    kwargs = dict(n_sequences=B, n_tokens=int(mask.sum()))
    clean, _ = nano.minirl_loss(*case, **kwargs)
    clean_gradient, = torch.autograd.grad(clean, logprobs)
    for poison in (math.nan, math.inf, -math.inf, 1e30):
        spoiled = [x.detach().masked_fill(~mask, poison) for x in (logprobs, old, rollout)]
        spoiled[0].requires_grad_()
        loss, _ = nano.minirl_loss(*spoiled, advantages, mask, **kwargs)
        gradient, = torch.autograd.grad(loss, spoiled[0])
        assert torch.equal(loss, clean) and torch.equal(gradient, clean_gradient)
        assert gradient[~mask].abs().max() == 0


def test_the_denominator_is_an_argument(case):
    kwargs = dict(n_tokens=1)
    whole, _ = nano.minirl_loss(*case, n_sequences=B, **kwargs)
    parts = [nano.minirl_loss(*(x[i : i + 2] for x in case), n_sequences=B, **kwargs)[0] for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("advantage, log_ratio, kept", [
    # at, below and above each threshold, for each sign; one fp32 step away from it
    (1, math.log(1.27), True), (1, math.log(1.27) - 1e-6, True), (1, math.log(1.27) + 1e-6, False),
    (1, math.log(0.8) - 1e-6, True), (1, -20.0, True), (1, 20.0, False),
    (-1, math.log(0.8), True), (-1, math.log(0.8) + 1e-6, True), (-1, math.log(0.8) - 1e-6, False),
    (-1, math.log(1.27) + 1e-6, True), (-1, 20.0, True), (-1, -20.0, False),
    (0, 20.0, True), (0, -20.0, True)])
def test_clip_gate_truth_table(advantage, log_ratio, kept):
    gate = nano.clip_gate(torch.tensor([[log_ratio]]), torch.zeros(1, 1), torch.tensor([float(advantage)]))
    assert gate.tolist() == [[kept]]


@pytest.mark.parametrize("low, high", [(0.1, 0.5), (0.5, 0.1), (0.0, 0.0), (0.99, 9.0)])
def test_the_thresholds_are_options(case, low, high):
    """Other ε than the defaults, in the gate and through the loss, against the definition."""
    logprobs, old, _, advantages, mask = case
    expected = [[not (a > 0 and math.exp(x) > 1 + high or a < 0 and math.exp(x) < 1 - low) for x in row]
                for row, a in zip((logprobs - old).tolist(), advantages.tolist())]
    assert nano.clip_gate(logprobs, old, advantages, low, high).tolist() == expected
    _, gate = nano.minirl_loss(*case, n_sequences=B, n_tokens=1, clip_low=low, clip_high=high)
    assert torch.equal(gate[mask], torch.tensor(expected)[mask])


@pytest.mark.parametrize("kind, cap, columns", [("token", 5.0, 1), ("staleness", 5.0, 1), ("sequence", 2.0, 4)])
def test_weights_are_capped(kind, cap, columns):
    """Below, at and above the bound; a sequence reaches it by the product of its tokens."""
    for factor, expected in ((0.5, 0.5 * cap), (1 - 1e-4, (1 - 1e-4) * cap), (1.0, cap), (1.01, cap), (1e30, cap)):
        log_ratio = torch.full((1, columns), math.log(factor * cap) / columns)
        zero, mask = torch.zeros(1, columns), torch.ones(1, columns, dtype=torch.bool)
        weights = nano.importance_weights(log_ratio, zero, zero, mask, kind)
        torch.testing.assert_close(weights, torch.full((1, columns), expected), rtol=1e-5, atol=0)


def test_sequence_weight_is_the_exponential_of_the_sum():
    ratios = torch.tensor([[0.9, 1.1, 0.7, 100.0]])
    mask = torch.tensor([[True, True, True, False]])
    weights = nano.importance_weights(ratios.log(), ratios.log(), torch.zeros(1, 4), mask, "sequence")
    torch.testing.assert_close(weights, torch.tensor([[0.693, 0.693, 0.693, 0.0]]))
    assert nano.importance_weights(ratios.log() * 1e3, ratios, torch.zeros(1, 4), mask, "sequence").isfinite().all()


def test_staleness_drops_only_the_discrepancy(case):
    logprobs, old, rollout, _, mask = case
    token = nano.importance_weights(logprobs, old, rollout, mask, "token")
    staleness = nano.importance_weights(logprobs, old, rollout, mask, "staleness")
    uncapped = mask & (token < 5) & (staleness < 5)
    torch.testing.assert_close(token[uncapped], (staleness * (old - rollout).exp())[uncapped])
    on_policy = nano.importance_weights(old, old, rollout, mask, "staleness")
    assert (on_policy[mask] == 1).all() and (on_policy[~mask] == 0).all()


def test_weights_carry_no_gradient(case):
    for kind in ("token", "sequence", "staleness"):
        assert not nano.importance_weights(*case[:3], case[4], kind).requires_grad


def test_group_advantages():
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1])
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    torch.testing.assert_close(nano.group_advantages(rewards, 3), expected)
    torch.testing.assert_close(nano.group_advantages(rewards, 2).sum(), torch.tensor(0.0))


def test_logprobs_and_entropy_against_torch_distributions():
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    for temperature in (0.5, 1.0, 3.0):
        expected = torch.distributions.Categorical(logits=logits / temperature)
        torch.testing.assert_close(nano.token_logprobs(logits, targets, temperature), expected.log_prob(targets))
        torch.testing.assert_close(nano.entropy(logits, temperature), expected.entropy())


def test_k3_finds_the_kl_of_two_distributions():
    p, q = (torch.randn(V, generator=torch.Generator().manual_seed(seed)).log_softmax(0) for seed in (0, 1))
    exact = (p.exp() * (p - q)).sum().double()
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(1, len(tokens), dtype=torch.bool)
    torch.testing.assert_close(nano.kl_k3(p[tokens][None], q[tokens][None], mask), exact, rtol=0.02, atol=0)


def test_k3_keeps_its_digits_where_engines_nearly_agree():
    sampled, mask = torch.full((1, 2), -1.0, dtype=torch.float64), torch.tensor([[True, False]])
    for x in (1e-3, 1e-6, 1e-9):
        other = torch.tensor([[-1.0 + x, math.nan]], dtype=torch.float64)
        gap = other[0, 0] + 1.0  # what is left of x in the sum
        expected = gap**2 / 2 + gap**3 / 6
        torch.testing.assert_close(nano.kl_k3(sampled, other, mask), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ratio, extreme", [(2.0, 0), (2.01, 1), (1.99, 0), (0.5, 0), (0.499, 1), (0.51, 0), (1.0, 0)])
def test_extreme_token_fraction(ratio, extreme):
    old = torch.tensor([[math.log(ratio), 0.0, 50.0]])
    mask = torch.tensor([[True, True, False]])
    assert nano.extreme_token_fraction(old, torch.zeros(1, 3), mask) == extreme / 2


def test_effective_sample_size():
    log_weights = torch.randn(B, T, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.6
    w = [math.exp(x) for x in log_weights[mask].tolist()]
    expected = sum(w) ** 2 / (len(w) * sum(x * x for x in w))
    assert nano.effective_sample_size(log_weights, mask).item() == pytest.approx(expected, rel=1e-6)
    assert nano.effective_sample_size(log_weights + 500, mask).item() == pytest.approx(expected, rel=1e-4)
    assert nano.effective_sample_size(torch.full((B, T), 3.0), mask) == 1
    alone = torch.zeros(B, T).index_put((mask.nonzero()[0][None, :1][0], mask.nonzero()[0][1:]), torch.tensor(900.0))
    assert nano.effective_sample_size(alone, mask).item() == pytest.approx(1 / len(w))


def test_routing_agreement_counts_sets():
    routing = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:3] for i in range(B * T * 2)])
    routing = routing.view(B, T, 2, 3).to(torch.int16)
    other = routing.flip(-1).clone()  # other columns, same sets
    other[0, :, 1, 0] = (routing[0, :, 1].sum(-1) + 7).to(torch.int16)  # another set, in layer 1 only
    mask = torch.arange(T).expand(B, T) < 3
    same = [[set(routing[b, t, i].tolist()) == set(other[b, t, i].tolist()) for b in range(B) for t in range(3)]
            for i in range(2)]
    expected = torch.tensor(same).double().mean(1)
    assert expected[0] == 1 and expected[1] == 1 - 1 / B
    torch.testing.assert_close(nano.routing_agreement(routing, other, mask), expected)
