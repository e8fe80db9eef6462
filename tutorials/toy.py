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
from scaled import study  # noqa: E402


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


def first_order_gaps(distance: float, top_p: float = 1.0, kept: bool = True) -> tuple[float, float, float]:
    """|J_seq - surrogate|, the norm of the difference of their gradients and that of J_seq's gradient,
    with π_θ at `distance` along a random direction from μ in the table of logits. μ samples from the
    nucleus of top_p, over which π_θ is normalised too, unless not `kept`. J_seq = Σ_y π_θ(y) R(y)."""
    generator = torch.Generator().manual_seed(1)
    mu = torch.randn(len(PREFIXES), VOCABULARY, dtype=torch.float64, generator=generator)
    direction = torch.randn(mu.shape, dtype=torch.float64, generator=generator)
    theta = (mu + distance * direction).requires_grad_()
    others = ~study.nucleus(mu, top_p)
    rollout_logprobs, mask = response_logprobs(mu.masked_fill(others, study.NEVER))
    logprobs, _ = response_logprobs(theta.masked_fill(others, study.NEVER) if kept else theta)
    j_seq = (logprobs.sum(1).exp() * REWARDS).sum()  # of all responses, μ has those or not
    gradient, = torch.autograd.grad(j_seq, theta, retain_graph=True)

    probability = rollout_logprobs.sum(1).exp()
    seen = probability > 0
    weighted, logprobs, rollout_logprobs, mask = (
        x[seen] for x in (probability * REWARDS, logprobs, rollout_logprobs, mask))
    ratio = (logprobs - rollout_logprobs).exp() * mask
    j_token = (weighted * (ratio.sum(1) + 1 - mask.sum(1))).sum()

    # an expectation over μ: the advantage of a response times its probability, and one "sequence"
    loss, _ = nano.minirl_loss(logprobs, rollout_logprobs, rollout_logprobs, weighted, mask,
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
        model = moved(c, distance)
        native = sequence_logprobs(model, batch, None)
        for mode, replay in routes.items():
            replayed = sequence_logprobs(model, batch, replay)
            bias[mode].append((replayed.exp() * (replayed - native)).sum().item())
    return bias


@torch.no_grad()
def moved(c: nano.Config, distance: float) -> nano.Model:
    """A fresh model whose every weight has moved by `distance` of its norm in a random direction."""
    model, generator = nano.Model(c), torch.Generator().manual_seed(c.seed + 1)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight += distance * weight.norm() / noise.norm() * noise
    return model


def sequence_logprobs(model: nano.Model, batch: nano.Rollout, replay: Tensor | None) -> Tensor:
    """log π(y | x) of every response, (B,), fp64."""
    logprobs, _, _ = nano.policy(model, nano.replace(batch, replay=replay))
    return (logprobs.double() * batch.mask).sum(1)


def coarse_router(model: nano.Model) -> nano.InferenceEngine:
    """An engine with nothing coarse but its routers' weights, in int4: other scores, and so some other experts."""
    engine = nano.InferenceEngine(model, "fp32")
    for gate in study.gates(engine.model):
        gate.weight.copy_(nano.quantise(gate.weight, "int4"))
    return engine


def replay_table(engine_of, distance: float = 0.0, seed: int = 0) -> dict[str, dict[str, float]]:
    """What each replay keeps and gives up, for a random MoE whose weights have moved by `distance` since the
    rollout; all are sums over every response to a prompt. engine_of(model): the inference engine. Name -> numbers:

    gap       KL(μ‖π), π as it is trained
    target    KL(π ‖ π with its own experts): another policy is trained than the one that will be used
    cosine    of MiniRL's expected gradient and that of J = Σ_y π(y) R(y), own experts
    router    length of that gradient in the routers, relative to that of J's
    """
    c = nano.Config(seed=seed)
    old, model = nano.Model(c), moved(c, distance)
    tokens, lengths = enumerated(old)
    batch = study.scored(engine_of(old), nano.Rollout(tokens, torch.full_like(lengths, 2), lengths))
    with torch.no_grad():
        routes = {"none": None, "R2": nano.policy(old, batch)[2], "R3": batch.routing}
    routes |= {"R3, its weights": routes["R3"], "none, frozen router": None}
    mu = (batch.rollout_logprobs.double() * batch.mask).sum(1)
    rewards = torch.randn(len(mu), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rewards -= mu.exp() @ rewards  # the mean of a large group
    parameters = dict(model.named_parameters())
    routers = torch.cat([torch.full((p.numel(),), ".gate." in name) for name, p in parameters.items()])

    def gradient(objective):
        found = torch.autograd.grad(objective, parameters.values(), allow_unused=True, retain_graph=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double()
                          for p, g in zip(parameters.values(), found)])

    def trained(mode):
        replayed = nano.replace(batch, replay=routes[mode])
        return study.policy(model, replayed, gate_weights="weights" in mode)[0]
    own = (trained("none").double() * batch.mask).sum(1)
    exact, rows = gradient((own.exp() * rewards).sum()), {}
    for mode in routes:
        logprobs = trained(mode)
        loss, _ = nano.minirl_loss(logprobs, logprobs.detach(), batch.rollout_logprobs, mu.exp() * rewards, batch.mask,
                                   n_sequences=1, n_tokens=1, clip=False)
        steps = gradient(-loss) * ~(routers & ("frozen" in mode))
        pi = (logprobs.detach().double() * batch.mask).sum(1)
        rows[mode] = dict(gap=(mu.exp() * (mu - pi)).sum().item(), target=(pi.exp() * (pi - own.detach())).sum().item(),
                          cosine=torch.cosine_similarity(steps, exact, 0).item(),
                          router=(steps[routers].norm() / exact[routers].norm()).item())
    return rows
