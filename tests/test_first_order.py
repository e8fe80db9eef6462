"""The first-order claim and what replay does to the policy, with every response enumerated."""

import itertools

import numpy as np
import pytest
import torch

import nano_moe_rl as nano
import toy


def test_the_responses_are_all_there_are():
    theta = torch.randn(len(toy.PREFIXES), toy.VOCABULARY, dtype=torch.float64)
    logprobs, mask = toy.response_logprobs(theta)
    assert logprobs.sum(1).exp().sum().item() == pytest.approx(1)
    assert mask.sum(1).tolist() == [len(y) for y in toy.RESPONSES]


def test_equal_policies_have_equal_gradients():
    objective_gap, gradient_gap, scale = toy.first_order_gaps(0.0)
    assert objective_gap < 1e-15 and gradient_gap < 1e-14 and scale > 0.1


def test_objective_error_has_slope_two_and_gradient_error_slope_one():
    distances = np.logspace(-4, -2, 5)
    objective, gradient, _ = zip(*(toy.first_order_gaps(d) for d in distances))
    slope = lambda errors: np.polyfit(np.log(distances), np.log(errors), 1)[0]  # noqa: E731
    assert slope(objective) == pytest.approx(2, abs=0.05)
    assert slope(gradient) == pytest.approx(1, abs=0.05)


def test_a_group_mean_scales_the_expected_gradient_by_one_minus_one_over_g():
    """All groups of two responses, enumerated, with their probabilities."""
    theta = torch.randn(len(toy.PREFIXES), toy.VOCABULARY, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(1))
    theta.requires_grad_()
    logprobs, mask = toy.response_logprobs(theta)
    probability, rewards = logprobs.detach().sum(1).exp(), toy.REWARDS
    gradient, = torch.autograd.grad((probability * rewards) @ logprobs.sum(1), theta, retain_graph=True)
    first, second = (torch.tensor(i) for i in zip(*itertools.product(range(len(toy.RESPONSES)), repeat=2)))
    pairs = torch.stack([first, second], 1).flatten()
    advantages = nano.group_advantages(rewards[pairs], 2)
    weight = (probability[first] * probability[second]).repeat_interleave(2) / 2
    with_baseline, = torch.autograd.grad((weight * advantages * logprobs.sum(1)[pairs]).sum(), theta)
    torch.testing.assert_close(with_baseline, gradient * (1 - 1 / 2))


@torch.no_grad()
def test_a_replayed_policy_is_still_a_distribution():
    """Routes depend on the past alone, so probabilities over all responses still sum to one."""
    c = nano.Config()
    model = nano.Model(c)
    engine = nano.InferenceEngine(model, "int4")
    tokens, lengths = toy.enumerated(model)
    batch = nano.Rollout(tokens, torch.full_like(lengths, 2), lengths)
    _, routes = engine.model(tokens[:, :-1], None, batch.fed, numerics=engine.numerics)
    for replay in (None, routes):
        assert toy.sequence_logprobs(model, batch, replay).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_which_mini_batches_each_replay_mode_biases():
    """The table of the README: R2 alters later mini-batches only, R3 the first one too."""
    bias = toy.replay_bias("int4", [0.0, 0.05])
    assert bias["R2"][0] == 0 and bias["R2"][1] > 1e-6
    assert bias["R3"][0] > 1e-6 and bias["R3"][1] > 1e-6
    assert toy.replay_bias("fp32", [0.0])["R3"][0] < 1e-9
