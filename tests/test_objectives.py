"""The objectives beside MiniRL, token by token."""

import math

import pytest
import torch
from conftest import ROOT  # noqa: F401  puts the tutorials on the path

import nano_moe_rl as nano
import objectives

B, T, G = 6, 5, 3


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logprobs, old, rollout = (-2 * torch.rand(B, T, generator=generator) for _ in range(3))
    mask = torch.arange(T) < torch.tensor([5, 3, 1, 4, 2, 2])[:, None]
    return logprobs.requires_grad_(), old, rollout, torch.randn(B, generator=generator), mask


def clipped(ratio, advantage, low, high):
    """The objective min(r Â, clip(r) Â) and its derivative in log r."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    if ratio * advantage <= bounded * advantage:
        return ratio * advantage, ratio * advantage
    return bounded * advantage, 0.0


def slow(name, logprobs, old, rollout, advantages, mask):
    """Each objective, a token at a time -> loss, gradient in logprobs."""
    loss, gradient, n_tokens = 0.0, torch.zeros(B, T), int(mask.sum())
    for i in range(B):
        tokens, advantage = [t for t in range(T) if mask[i, t]], advantages[i].item()
        if name == "gspo":
            ratio = math.exp(sum((logprobs[i, t] - old[i, t]).item() for t in tokens) / len(tokens))
            value, slope = clipped(ratio, advantage, 3e-4, 4e-4)
            loss -= value / B
        for t in tokens:
            ratio = math.exp(logprobs[i, t] - old[i, t])
            if name == "grpo":
                value, slope = clipped(ratio, advantage, 0.2, 0.27)
                loss, gradient[i, t] = loss - value / len(tokens) / B, -slope / len(tokens) / B
            elif name == "cispo":
                gradient[i, t] = -min(max(ratio, 0.8), 1.27) * advantage / n_tokens
                loss += (gradient[i, t] * logprobs[i, t]).item()
            elif name == "gspo":
                gradient[i, t] = -slope / len(tokens) / B
            elif name == "icepop":
                gap = math.exp(old[i, t] - rollout[i, t])
                clip = advantage > 0 and ratio > 1.27 or advantage < 0 and ratio < 0.8
                if 0.5 <= gap <= 5 and not clip:
                    gradient[i, t] = -min(ratio, 5) * gap * advantage / B
                    loss += (gradient[i, t] * logprobs[i, t]).item()
            else:
                pi, mu = math.exp(logprobs[i, t]), math.exp(rollout[i, t])
                pushed_on = advantage > 0 and pi > mu or advantage < 0 and pi < mu
                if not (pushed_on and abs(pi - mu) > 0.15):
                    gradient[i, t] = -min(pi / mu, 5) * advantage / B
                    loss += (gradient[i, t] * logprobs[i, t]).item()
    return loss, gradient


@pytest.mark.parametrize("name", ["grpo", "cispo", "gspo", "dppo", "icepop"])
def test_objectives_against_a_token_at_a_time(case, name):
    logprobs, *_, mask = case
    loss, gate = getattr(objectives, f"{name}_loss")(*case, n_sequences=B, n_tokens=int(mask.sum()))
    loss.backward()
    expected, gradient = slow(name, *(x.detach() for x in case))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logprobs.grad, gradient)
    assert gate.shape == mask.shape and gate.dtype == torch.bool
    assert torch.equal(gate[mask], (gradient != 0)[mask])
    assert name == "cispo" or not gate[mask].all(), "the case needs tokens without gradient"


@pytest.mark.parametrize("name", ["grpo", "cispo", "gspo", "dppo", "icepop"])
def test_padding_has_no_influence_on_objectives(case, name):
    *_, advantages, mask = case
    loss_fn, kwargs = getattr(objectives, f"{name}_loss"), dict(n_sequences=B, n_tokens=int(mask.sum()))
    spoiled = [x.detach().masked_fill(~mask, math.nan) for x in case[:3]]
    spoiled[0].requires_grad_()
    loss, _ = loss_fn(*spoiled, advantages, mask, **kwargs)
    loss.backward()
    assert torch.equal(loss.detach(), loss_fn(*case, **kwargs)[0].detach())
    assert spoiled[0].grad[~mask].abs().max() == 0


def test_standardised_advantages():
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1])
    expected = [(1 - 1 / 3) / math.sqrt(2 / 9), *[-(1 / 3) / math.sqrt(2 / 9)] * 2, 0, 0, 0]
    torch.testing.assert_close(objectives.standardised_advantages(rewards, G), torch.tensor(expected), rtol=1e-4, atol=0)




def test_random_drop_drops_as_many_tokens_as_the_gate_and_weighs_the_rest_as_minirl(case):
    logprobs, old, rollout, advantages, mask = case
    counts = dict(n_sequences=B, n_tokens=int(mask.sum()))
    wanted = (~nano.clip_gate(logprobs, old, advantages) & mask).sum()
    whole, _ = nano.minirl_loss(*case, **counts, clip=False)
    gradient, = torch.autograd.grad(whole, logprobs)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        loss, gate = objectives.random_drop_loss(*case, **counts)
        dropped = ~gate & mask
        assert dropped.sum() == wanted > 0
        seen.add(tuple(dropped.flatten().tolist()))
        torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], gradient * gate)
    assert len(seen) > 1
