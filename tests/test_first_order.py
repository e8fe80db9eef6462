"""The first-order claim, on a policy small enough to enumerate every response.

J_seq(θ)   = E_μ[ Π_t π_θ/μ · R ]        the true objective
J_token(θ) = E_μ[ Σ_t π_θ/μ · R ]        the surrogate, whose gradient minirl_loss computes
J_seq and J_token + E_μ[(1 - |y|) R] differ in the second order of the policies' distance, their
gradients in the first (arXiv 2512.01374, section 2).
"""

import itertools

import numpy as np
import pytest
import torch

import nano_moe_rl as nano

VOCABULARY, LENGTH, STOP = 4, 3, 0  # token 0 ends a response early


def all_responses():
    """Every response: those that end by STOP, and those cut off at LENGTH."""
    for length in range(1, LENGTH + 1):
        for y in itertools.product(range(VOCABULARY), repeat=length):
            if STOP not in y[:-1] and (y[-1] == STOP or length == LENGTH):
                yield y


RESPONSES = list(all_responses())
PREFIXES = sorted({y[:t] for y in RESPONSES for t in range(len(y))})
REWARDS = torch.randn(len(RESPONSES), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def response_logprobs(theta):
    """theta (prefixes, V) -> log π of every token of every response (responses, LENGTH), mask likewise."""
    logprobs = theta.log_softmax(-1)
    table = [[logprobs[PREFIXES.index(y[:t]), y[t]] if t < len(y) else logprobs.new_zeros(()) for t in range(LENGTH)]
             for y in RESPONSES]
    mask = torch.tensor([[t < len(y) for t in range(LENGTH)] for y in RESPONSES])
    return torch.stack([torch.stack(row) for row in table]), mask


def gaps(distance):
    """Objective and gradient of J_seq against those of the surrogate, at a distance of the policies."""
    generator = torch.Generator().manual_seed(1)
    mu = torch.randn(len(PREFIXES), VOCABULARY, dtype=torch.float64, generator=generator)
    direction = torch.randn(mu.shape, dtype=torch.float64, generator=generator)
    theta = (mu + distance * direction).requires_grad_()
    rollout_logprobs, mask = response_logprobs(mu)
    logprobs, _ = response_logprobs(theta)
    probability = rollout_logprobs.sum(1).exp()
    assert probability.sum().item() == pytest.approx(1)

    ratio = (logprobs - rollout_logprobs).exp() * mask
    j_seq = (probability * REWARDS * (logprobs - rollout_logprobs).sum(1).exp()).sum()
    j_token = (probability * REWARDS * (ratio.sum(1) + 1 - mask.sum(1))).sum()
    gradient, = torch.autograd.grad(j_seq, theta, retain_graph=True)

    # an expectation over μ: the advantage of a response times its probability, and one "sequence"
    loss, _ = nano.minirl_loss(logprobs, rollout_logprobs, rollout_logprobs, probability * REWARDS, mask,
                               n_sequences=1, n_tokens=1, clip=False)
    surrogate, = torch.autograd.grad(-loss, theta)
    return (j_seq - j_token).abs().item(), (gradient - surrogate).norm().item(), gradient.norm().item()


def test_equal_policies_have_equal_gradients():
    objective_gap, gradient_gap, scale = gaps(0.0)
    assert objective_gap < 1e-15 and gradient_gap < 1e-14 and scale > 0.1


def test_objective_error_has_slope_two_and_gradient_error_slope_one():
    distances = np.logspace(-4, -2, 5)
    objective, gradient, _ = zip(*(gaps(d) for d in distances))
    slope = lambda errors: np.polyfit(np.log(distances), np.log(errors), 1)[0]  # noqa: E731
    assert slope(objective) == pytest.approx(2, abs=0.05)
    assert slope(gradient) == pytest.approx(1, abs=0.05)


def test_a_group_mean_scales_the_expected_gradient_by_one_minus_one_over_g():
    """All groups of two responses, enumerated, with their probabilities."""
    theta = torch.randn(len(PREFIXES), VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta.requires_grad_()
    logprobs, mask = response_logprobs(theta)
    probability = logprobs.detach().sum(1).exp()
    gradient, = torch.autograd.grad((probability * REWARDS) @ logprobs.sum(1), theta, retain_graph=True)
    first, second = (torch.tensor(i) for i in zip(*itertools.product(range(len(RESPONSES)), repeat=2)))
    pairs = torch.stack([first, second], 1).flatten()
    advantages = nano.group_advantages(REWARDS[pairs], 2)
    weight = (probability[first] * probability[second]).repeat_interleave(2) / 2
    with_baseline, = torch.autograd.grad((weight * advantages * logprobs.sum(1)[pairs]).sum(), theta)
    torch.testing.assert_close(with_baseline, gradient * (1 - 1 / 2))
