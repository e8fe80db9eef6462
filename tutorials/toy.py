"""Two policies small enough to enumerate every response, so that expectations are sums, not samples.

A table of logits shows the first-order claim of arXiv 2512.01374, section 2:
    J_seq(θ)   = E_μ[ Π_t π_θ/μ · R ]        the true objective
    J_token(θ) = E_μ[ Σ_t π_θ/μ · R ]        the surrogate, whose gradient minirl_loss computes
J_seq and J_token + E_μ[(1 - |y|) R] differ in the second order of the policies' distance, their
gradients in the first. A tiny MoE shows what R2 and R3 do to the policy that is trained.
"""
import functools
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nano_moe_rl as nano  # noqa: E402


def untrained(c: nano.Config, n_prompts: int = 32) -> tuple[nano.Model, nano.Rollout]:
    """A fresh model of the single file and a rollout of it. Such a model solves no task, so for once a reward
    is 1 where the id of a response's last token is odd: something to learn."""
    model = nano.Model(c)
    engine = nano.InferenceEngine(model, c.rollout_precision, c.router_noise)
    rollout = nano.sample(engine, n_prompts, c.group_size, seed=0)
    rollout.rewards = (rollout.tokens.gather(1, rollout.lengths[:, None] - 1)[:, 0] % 2).float()
    rollout.advantages = nano.group_advantages(rollout.rewards, c.group_size)
    return model, rollout


@functools.cache
def trained() -> nano.Model:
    """A model of the single file after seconds of cold start, with sums of two or three digits, of which it gets some
    three in ten right. Pages share it: who trains it further trains a copy."""
    return nano.cold_start(nano.Config(min_digits=2, max_digits=3, max_response=10, cold_start_steps=150))


VOCABULARY, LENGTH, STOP = 4, 3, 0  # token 0 ends a response early


def all_responses(vocabulary: int, length: int, stop: int):
    """Every response: those that end by stop, and those cut off at length."""
    for n in range(1, length + 1):
        for y in itertools.product(range(vocabulary), repeat=n):
            if stop not in y[:-1] and (y[-1] == stop or n == length):
                yield y


RESPONSES = list(all_responses(VOCABULARY, LENGTH, STOP))
PREFIXES = sorted({y[:t] for y in RESPONSES for t in range(len(y))})
REWARDS = torch.randn(len(RESPONSES), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def response_logprobs(theta: Tensor) -> tuple[Tensor, Tensor]:
    """theta (prefixes, V) -> log π of every token of every response (responses, LENGTH), mask likewise."""
    logprobs = theta.log_softmax(-1)
    table = [[logprobs[PREFIXES.index(y[:t]), y[t]] if t < len(y) else logprobs.new_zeros(()) for t in range(LENGTH)]
             for y in RESPONSES]
    mask = torch.tensor([[t < len(y) for t in range(LENGTH)] for y in RESPONSES])
    return torch.stack([torch.stack(row) for row in table]), mask


def first_order_gaps(distance: float) -> tuple[float, float, float]:
    """|J_seq - surrogate|, the norm of the difference of their gradients and that of J_seq's gradient,
    with π_θ at `distance` along a random direction from μ in the table of logits."""
    generator = torch.Generator().manual_seed(1)
    mu = torch.randn(len(PREFIXES), VOCABULARY, dtype=torch.float64, generator=generator)
    direction = torch.randn(mu.shape, dtype=torch.float64, generator=generator)
    theta = (mu + distance * direction).requires_grad_()
    rollout_logprobs, mask = response_logprobs(mu)
    logprobs, _ = response_logprobs(theta)
    probability = rollout_logprobs.sum(1).exp()

    ratio = (logprobs - rollout_logprobs).exp() * mask
    j_seq = (probability * REWARDS * (logprobs - rollout_logprobs).sum(1).exp()).sum()
    j_token = (probability * REWARDS * (ratio.sum(1) + 1 - mask.sum(1))).sum()
    gradient, = torch.autograd.grad(j_seq, theta, retain_graph=True)

    # an expectation over μ: the advantage of a response times its probability, and one "sequence"
    loss, _ = nano.minirl_loss(logprobs, rollout_logprobs, rollout_logprobs, probability * REWARDS, mask,
                               n_sequences=1, n_tokens=1, clip=False)
    surrogate, = torch.autograd.grad(-loss, theta)
    return (j_seq - j_token).abs().item(), (gradient - surrogate).norm().item(), gradient.norm().item()


def enumerated(model: nano.Model, length: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens (B, 2 + length) of a fixed two-token prompt and every response, and lengths (B,)."""
    responses = list(all_responses(len(nano.VOCABULARY), length, nano.EOS))
    tokens = torch.full((len(responses), 2 + length), nano.EOS)
    tokens[:, :2] = torch.tensor([7, nano.ASK])
    for row, y in zip(tokens, responses):
        row[2 : 2 + len(y)] = torch.tensor(y)
    return tokens, torch.tensor([2 + len(y) for y in responses])


@torch.no_grad()
def replay_bias(precision: str, distances: list[float], seed: int = 0) -> dict[str, list[float]]:
    """KL(π_θ with replayed experts ‖ π_θ with its own), over all responses to a prompt, for a random
    MoE whose weights have moved by `distance` (relative to each matrix) since the rollout: distance 0
    is the first mini-batch, more are later ones. R2 replays the experts of π_old, R3 those of μ_old."""
    c = nano.Config(seed=seed, rollout_precision=precision)
    old = nano.Model(c)
    engine = nano.InferenceEngine(old, precision)
    tokens, lengths = enumerated(old)
    batch = nano.Rollout(tokens, torch.full_like(lengths, 2), lengths)
    routes = {"R2": old(tokens[:, :-1], None, batch.fed)[1],
              "R3": engine.model(tokens[:, :-1], None, batch.fed, numerics=engine.numerics)[1]}
    bias = {mode: [] for mode in routes}
    for distance in distances:
        model, generator = nano.Model(c), torch.Generator().manual_seed(seed + 1)
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += distance * weight.norm() / noise.norm() * noise
        native = sequence_logprobs(model, batch, None)
        for mode, replay in routes.items():
            replayed = sequence_logprobs(model, batch, replay)
            bias[mode].append((replayed.exp() * (replayed - native)).sum().item())
    return bias


def sequence_logprobs(model: nano.Model, batch: nano.Rollout, replay: Tensor | None) -> Tensor:
    """log π(y | x) of every response, (B,), fp64."""
    logprobs, _, _ = nano.policy(model, nano.replace(batch, replay=replay))
    return (logprobs.double() * batch.mask).sum(1)
