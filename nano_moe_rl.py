"""Reinforcement learning on a tiny Mixture-of-Experts language model, with routing replay.

    python nano_moe_rl.py                                     # cold start, RL, a picture
    python nano_moe_rl.py --router-noise 0.8 --replay none    # turn a dial (--help) and look

A response has one reward. MiniRL (arXiv 2512.01374) trains a sum over its tokens instead, a first-
order approximation that holds while two gaps between policies are small: between the engine that
samples (inference: fast, coarse) and the one that trains, and between old and new weights.

    π_θ / μ_old  =  (π_old / μ_old)  ×  (π_θ / π_old)      in the code by their logarithms:
    μ_old   rollout_logprobs   of the inference engine, when it sampled the response
    π_old   old_logprobs       of the training engine, with the same weights
    π_θ     logprobs           of the training engine, with the weights of this very step

In an MoE each gap can also send a token to other experts: a jump, where rounding is a small error.
Routing replay fixes the experts in training, to those of π_old (mode R2) or those of μ_old (R3).
Letters: P prompts, G responses each, B = P·G, T positions, V symbols, D width, L layers, E experts,
of which a token meets A in each layer. Position t is fed token t and predicts token t + 1.
"""
import argparse, copy, fcntl, io, json, math, os, sys, time, zipfile  # noqa: E401
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Generator, Tensor, nn
from tqdm import tqdm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ----------------------------------------------------------------------------------- 1 Config
def option(default, text: str, *choices: str, low: float = 1, high: float = 10**9):
    return field(default=default, metadata=dict(text=text, choices=choices, low=low, high=high))

@dataclass(frozen=True)
class Config:
    """Every dial of a run. The command line is made from it; the last section checks it."""
    seed: int = option(0, "one seed is one cold start and one order of prompts", low=0)
    width: int = option(64, "D, 32 or 64 times the heads", high=4096)
    layers: int = option(3, "L", high=64)
    heads: int = option(2, "of attention", high=64)
    kv_heads: int = option(1, "heads of keys and values", high=64)
    experts: int = option(16, "E", high=512)
    top_k: int = option(2, "A, experts of a token; with one the router has no gradient", high=512)
    expert_width: int = option(64, "hidden width of an expert, a multiple of 8", high=4096)
    teacher: str = option("brief", "of the cold start", "brief", "equation", "restating")
    slip_rate: float = option(0.22, "share of the teacher's sums that are wrong", low=0, high=1)
    min_digits: int = option(3, "in the shortest prompt", high=8)
    max_digits: int = option(5, "in the longest; they differ, and all ten sum to 45", high=8)
    max_response: int = option(22, "tokens, after which a response is cut off", high=1000)
    cold_start_steps: int = option(600, "supervised updates before RL", low=0)
    temperature: float = option(1.0, "of the distribution that is sampled, and of π", low=1e-5)
    train_precision: str = option("fp32", "of π; the weights stay fp32", "fp32", "bf16")
    name: str = option("", "folder under runs/; left out, the next free run-N")
    updates: int = option(320, "gradient updates of RL")
    mini_batch: int = option(256, "responses an update", high=2**20)
    mini_batches: int = option(4, "N, updates per rollout batch: how far off-policy", high=1024)
    group_size: int = option(8, "G, responses to one prompt", low=2, high=2**20)
    lr: float = option(3e-4, "learning rate of RL", low=1e-9, high=1)
    warmup: int = option(20, "updates in which it rises to that")
    replay: str = option("R3", "whose experts π_old and π_θ use", "none", "R2", "R3")
    clip: bool = option(True, "drop tokens that π_θ/π_old puts outside the trust region")
    clip_low: float = option(0.2, "how far π_θ/π_old may fall below 1", low=0, high=0.99)
    clip_high: float = option(0.27, "how far it may rise above 1", low=0)
    importance_sampling: str = option("token", "in the loss", "token", "sequence", "staleness")
    length_norm: bool = option(False, "divide a response's loss by its length")
    rollout_precision: str = option("fp8", "of μ", "fp32", "bf16", "fp8", "int6", "int5", "int4")
    router_noise: float = option(0.0, "s: μ chooses experts by logits with N(0, s²) added", low=0)
    eval_every: int = option(40, "updates between scores")
    eval_prompts: int = option(512, "prompts in a score, the same each time", high=2**20)
    head_dim = property(lambda c: c.width // c.heads)

    def __post_init__(self):
        check_config(self)

# -------------------------------------------------------------------------------------- 2 Task
# "3 1 4 =" asks for the running sum modulo 10, step by step, and then the answer. A step names the
# next digit and writes the new sum: "3 3 1 4 4 8 : 8 $". Only the answer is graded, one 0 or 1.
# The digits of a prompt differ: a small model finds its place by looking up the one it named last.
VOCABULARY = "0123456789=:$"
ASK, ANSWER, EOS = (VOCABULARY.index(symbol) for symbol in "=:$")

def make_prompts(n: int, c: Config, generator: Generator) -> tuple[Tensor, Tensor]:
    """n prompts on the CPU, right padded with "=": tokens (n, max_digits + 1), lengths (n,)."""
    digits = torch.rand(n, 10, generator=generator).argsort(1)[:, :c.max_digits]
    counts = torch.randint(c.min_digits, c.max_digits + 1, (n, 1), generator=generator)
    tokens = F.pad(digits, (0, 1)).masked_fill(torch.arange(c.max_digits + 1) >= counts, ASK)
    return tokens, counts[:, 0] + 1

def demonstrations(n: int, c: Config, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Solutions with slips, wrong digits that later steps build on, right padded: tokens
    (n, T + 1), prompt_lengths (n,), lengths (n,)."""
    prompts, prompt_lengths = make_prompts(n, c, generator)
    slips = torch.randint(1, 10, prompts.shape, generator=generator)
    slips *= torch.rand(prompts.shape, generator=generator) < c.slip_rate
    rows = []
    for prompt, slip, length in zip(prompts.tolist(), slips.tolist(), prompt_lengths.tolist()):
        row, total = prompt[:length], 0
        for digit, wrong in zip(prompt[:length - 1], slip):
            before, total = total, (total + digit + wrong) % 10
            row += {"brief": [digit, total], "equation": [digit, ASK, total],
                    "restating": [before, digit, total]}[c.teacher]
        rows.append(torch.tensor((row + [ANSWER, total, EOS])[:length + c.max_response]))
    return nn.utils.rnn.pad_sequence(rows, True), prompt_lengths, torch.tensor([*map(len, rows)])

def grade(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Rewards (B,): 1.0 where the response ends in ANSWER, the right digit, EOS, else 0.0."""
    rows = zip(tokens.tolist(), prompt_lengths.tolist(), lengths.tolist())
    return torch.tensor([float(row[start:end][-3:] == [ANSWER, sum(row[:start - 1]) % 10, EOS])
                         for row, start, end in rows], device=tokens.device)

@dataclass
class Task:
    """What is learnt. Another one: replace(RUNNING_SUM, grade=…), or five parts of its own."""
    vocabulary: str  # a symbol a token
    eos: int  # the token that ends a response
    make_prompts: Callable
    demonstrations: Callable
    grade: Callable

RUNNING_SUM = Task(VOCABULARY, EOS, make_prompts, demonstrations, grade)

# ------------------------------------------------------------------------------------- 3 Model
# Architecture, modules and names are Qwen3-MoE's: transformers loads these weights as they are.

def quantise(x: Tensor, precision: str) -> Tensor:
    """x on the grid of a precision, still in fp32. fp8 and int have one scale a row of the last
    axis: a token of an activation (..., in), an output channel of a weight (..., out, in)."""
    if precision in ("fp32", "bf16"):
        return x if precision == "fp32" else x.bfloat16().float()
    largest = 448 if precision == "fp8" else 2 ** (int(precision[3:]) - 1) - 1  # int4: 7
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    grid = x / scale
    return scale * (grid.to(torch.float8_e4m3fn).float() if precision == "fp8" else grid.round())

@dataclass
class Numerics:
    """How an engine computes: all in which two of them differ, but for the weights that they hold.
    Of a precision the numbers are modelled, not the speed: products and sums are fp32."""
    precision: str  # of projections and experts
    router_noise: float = 0.0
    generator: Generator | None = None  # of the noise

    def linear(self, x, weight, ends=None):
        """x (..., in), weight (out, in) -> (..., out). With weight (E, out, in) the rows of x are
        sorted by expert: those of expert e end before row ends[e]."""
        if self.precision == "bf16":  # for training; an inference engine's weights are rounded
            weight = quantise(weight, "bf16")
        x = quantise(x, self.precision)
        y = F.linear(x, weight) if ends is None else F.grouped_mm(x, weight.mT, offs=ends)
        return y if self.precision == "fp32" else quantise(y, "bf16")

    def choose_experts(self, router_logits, top_k):
        """(B, T, E) -> ids (B, T, A). Noise stands for other kernels, another precision or another
        order of sums in the router. It changes the choice alone: the weights have none of it."""
        if self.router_noise:
            noise = torch.randn(router_logits.shape, generator=self.generator, device=DEVICE)
            router_logits = router_logits + self.router_noise * noise
        return router_logits.topk(top_k).indices

def rotate(x, angles):
    """Rotary positions turn pairs of numbers. x (B, T, heads, d), angles (T, 1, d / 2)."""
    (a, b), cos, sin = x.chunk(2, -1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

Norm, Linear = partial(nn.RMSNorm, eps=1e-6), partial(nn.Linear, bias=False)

class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.q_proj, self.o_proj = Linear(c.width, c.width), Linear(c.width, c.width)
        self.k_proj, self.v_proj = (Linear(c.width, c.kv_heads * c.head_dim) for _ in "kv")
        self.q_norm, self.k_norm, self.head_dim = Norm(c.head_dim), Norm(c.head_dim), c.head_dim

    def forward(self, x, angles, cache, numerics):
        """x (B, T, D) -> (B, T, D), causal: padding at the right needs no mask. x may be the last T
        of all positions in a cache of keys and values (2, B, kv_heads, positions, head_dim)."""
        q, k, v = (numerics.linear(x, proj.weight).unflatten(-1, (-1, self.head_dim))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, heads, head_dim)
        q, k = rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if cache is not None:
            cache[:, :, :, -x.shape[1]:] = torch.stack([k, v])
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, enable_gqa=True)
        return numerics.linear(rearrange(y, "b h t d -> b t (h d)"), self.o_proj.weight)

class MoE(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.top_k, self.gate = c.top_k, Linear(c.width, c.experts)  # Qwen's name of the router
        self.experts = nn.ParameterDict({  # E SwiGLU networks
            "gate_up_proj": torch.empty(c.experts, 2 * c.expert_width, c.width),
            "down_proj": torch.empty(c.experts, c.width, c.expert_width)})

    def forward(self, x, fed, replay, numerics):
        """x (B, T, D), fed (B, T), replay (B, T, A) -> (B, T, D), live choice of experts (B, T, A).
        Expert −1 is none: a position that is not fed meets no expert."""
        router_logits = self.gate(x)
        live = numerics.choose_experts(router_logits, self.top_k).masked_fill(~fed[..., None], -1)
        # All of routing replay: the experts are given, their weights are not. These are the softmax
        # of the A experts' own logits, and the router's only gradient: it keeps learning, also
        # about a replayed expert that it would no longer choose.
        experts = live if replay is None else replay
        weights = router_logits.gather(-1, experts.clamp(min=0)).softmax(-1)
        # The pairs (token, expert), sorted by expert, so that each expert has one block of rows.
        counts = (experts + 1).flatten().bincount(minlength=router_logits.shape[-1] + 1)
        pairs = experts.flatten().argsort(stable=True)[counts[0]:]  # first come those of −1: none
        ends, token = counts[1:].cumsum(0).to(torch.int32), pairs // self.top_k
        h = x.flatten(0, 1).index_select(0, token)  # (pairs, D)
        a, b = numerics.linear(h, self.experts.gate_up_proj, ends).chunk(2, -1)
        h = F.silu(a) * (b * weights.flatten().index_select(0, pairs)[:, None])
        h = numerics.linear(h, self.experts.down_proj, ends)
        return torch.zeros_like(x).flatten(0, 1).index_add(0, token, h).view_as(x), live

class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm, self.self_attn = Norm(c.width), Attention(c)
        self.post_attention_layernorm, self.mlp = Norm(c.width), MoE(c)

    def forward(self, x, fed, replay, angles, cache, numerics):
        x = x + self.self_attn(self.input_layernorm(x), angles, cache, numerics)
        y, live = self.mlp(self.post_attention_layernorm(x), fed, replay, numerics)
        return x + y, live

class Model(nn.Module):
    """The network of both engines. Called without numerics it is the training engine."""
    def __init__(self, c: Config, task: Task = RUNNING_SUM):
        super().__init__()
        self.config, self.task, self.numerics = c, task, Numerics(c.train_precision)
        self.embed_tokens = nn.Embedding(len(task.vocabulary), c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm, self.lm_head = Norm(c.width), Linear(c.width, len(task.vocabulary))
        generator = Generator().manual_seed(c.seed)
        for matrix in (p for p in self.parameters() if p.dim() > 1):
            nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5, generator=generator)
        self.to(DEVICE)

    def forward(self, tokens, replay=None, fed=None, cache=None, numerics=None):
        """tokens (B, T), replay (B, T, L, A), fed (B, T), False on padding at the right -> logits
        (B, T, V), routing (B, T, L, A): the live choice, −1 on padding. With a cache (L, 2, B,
        kv_heads, positions, head_dim) tokens are all positions or the last one. ValueError if
        replay has not A different experts for each fed token and layer."""
        c, T, routing, routes = self.config, tokens.shape[1], [], [None] * self.config.layers
        fed = torch.ones_like(tokens, dtype=torch.bool) if fed is None else fed
        if replay is not None:
            ids = replay[fed].sort(-1).values  # (fed tokens, L, A)
            bad = (ids[..., 0] < 0) | (ids[..., -1] >= c.experts) | (ids.diff() == 0).any(-1)
            if bad.any() or ids.shape[1:] != (c.layers, c.top_k):
                raise ValueError(f"replay of shape {tuple(replay.shape)} lacks a valid route for "
                                 f"{bad.sum()} of {bad.numel()} (token, layer) pairs")
            routes = replay.long().unbind(2)
        start, cache = (0, [None] * c.layers) if cache is None else (cache.shape[-2] - T, cache)
        positions = torch.arange(start, start + T, device=DEVICE)[:, None, None]
        angles = positions * 1e4 ** (-torch.arange(0, c.head_dim, 2, device=DEVICE) / c.head_dim)
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            x, live = layer(x, fed, routes[i], angles, cache[i], numerics or self.numerics)
            routing.append(live.to(torch.int16))
        return self.lm_head(self.norm(x)), torch.stack(routing, 2)

# ----------------------------------------------------------------------------------- 4 Rollout
@dataclass
class Rollout:
    """Sampled responses. What belongs together travels together."""
    tokens: Tensor  # (B, T + 1) prompt, response, then anything
    prompt_lengths: Tensor  # (B,)
    lengths: Tensor  # (B,) prompt and response
    rollout_logprobs: Tensor | None = None  # (B, T) log μ of token t + 1, 0 outside the response
    routing: Tensor | None = None  # (B, T, L, A) the experts of μ, −1 on padding
    version: int = 0  # or (B,): updates that the weights of μ had seen; for scaled/, where they lag
    rewards: Tensor | None = None  # (B,)
    advantages: Tensor | None = None  # (B,)
    old_logprobs: Tensor | None = None  # (B, T) log π_old; None: π_θ is π_old, with N = 1
    replay: Tensor | None = None  # (B, T, L, A) the experts to train with; None: the live ones
    next_position = property(lambda r: torch.arange(1, r.tokens.shape[1]).to(r.lengths.device))
    # (B, T) masks: where a token is fed, all but a sequence's last; where a response's is predicted
    fed = property(lambda r: r.next_position < r.lengths[:, None])
    mask = property(lambda r: r.fed & (r.next_position >= r.prompt_lengths[:, None]))

    def split(self, size: int) -> list["Rollout"]:
        """Parts of `size` sequences, in order."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return [replace(self, **{name: x[i:i + size] for name, x in tensors.items()})
                for i in range(0, len(self.tokens), size)]

class InferenceEngine:
    """The policy as it is sampled: token by token, with a KV cache, numerics of its own, and a copy
    of the weights as they are now: a weight synchronisation is a new engine. Those of projections
    and experts are quantised, all others rounded to bf16 (fp32: nothing is)."""
    def __init__(self, model: Model, precision: str, router_noise: float = 0.0):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.numerics = self.model.numerics = Numerics(precision, router_noise)
        other = "fp32" if precision == "fp32" else "bf16"
        for name, weight in self.model.named_parameters():
            weight.copy_(quantise(weight, precision if "_proj" in name else other))

    @torch.no_grad()
    def generate(self, prompts, prompt_lengths, G, generator) -> Rollout:
        """G responses to each of P right-padded prompts (P, columns), prompt_lengths (P,).
        FloatingPointError if the weights give no distribution."""
        c, numerics = self.model.config, replace(self.numerics, generator=generator)
        tokens = F.pad(prompts.to(DEVICE), (0, c.max_response))
        cache = torch.zeros(c.layers, 2, len(tokens), c.kv_heads, tokens.shape[1], c.head_dim)
        cache, t = cache.to(DEVICE), int(prompt_lengths.min())  # column t is the next to be known
        # Prefill: the columns that all prompts fill, at once, and once for the group of a prompt.
        logits, routes = self.model(tokens[:, :t], cache=cache[..., :t, :], numerics=numerics)
        tokens, prompt_lengths, logits, routes = (
            x.repeat_interleave(G, 0) for x in (tokens, prompt_lengths.to(DEVICE), logits, routes))
        cache, lengths = cache.repeat_interleave(G, 2), prompt_lengths + c.max_response
        rollout_logprobs, routing = [torch.zeros(len(tokens), t - 1, device=DEVICE)], [routes]
        while True:
            logprobs = (logits[:, -1] / c.temperature).log_softmax(-1)  # what is sampled from
            if not logprobs.isfinite().all():
                raise FloatingPointError("log-probabilities of the rollout are not finite")
            sampled = torch.multinomial(logprobs.exp(), 1, generator=generator)
            responding = (prompt_lengths <= t) & (t < lengths)  # else a longer prompt goes on
            tokens[:, t] = sampled[:, 0].where(responding, tokens[:, t])
            rollout_logprobs.append(logprobs.gather(1, sampled) * responding[:, None])
            lengths[responding & (tokens[:, t] == self.model.task.eos)] = t + 1
            t += 1
            going = t < lengths
            if not going.any():
                return Rollout(tokens[:, :t], prompt_lengths, lengths,
                               torch.cat(rollout_logprobs, 1), torch.cat(routing, 1))
            # Decode: one column. What has ended is padding from here on and meets no expert.
            logits, routes = self.model(tokens[:, t - 1:t], fed=going[:, None],
                                        cache=cache[..., :t, :], numerics=numerics)
            routing.append(routes)

# ---------------------------------------------------------------------------------- 5 RL maths
# Tensors in, tensors out. Shapes are (B, T) unless said otherwise; mask is True on response tokens.

def token_logprobs(logits, targets, temperature=1.0):
    """log π of the targets (B, T) under logits (B, T, V), at the temperature of sampling."""
    return (logits.float() / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]

def entropy(logits, temperature=1.0):
    """Entropy over the full vocabulary, in nats. logits (B, T, V) -> (B, T)."""
    return torch.special.entr((logits.float() / temperature).softmax(-1)).sum(-1)  # -x log x

def group_advantages(rewards, group_size):
    """Reward minus the mean of its group of G, not divided by their deviation: (B,) -> (B,).
    The mean includes the response itself, which shrinks its gradient by 1 - 1/G."""
    means = reduce(rewards, "(p g) -> p", "mean", g=group_size)
    return rewards - means.repeat_interleave(group_size)

def importance_weights(logprobs, old_logprobs, rollout_logprobs, mask, kind="token",
                       token_cap=5.0, sequence_cap=2.0):
    """The constant that weighs each token's gradient, (B, T), 0 outside the mask.
    token      min(π_θ/μ_old, 5), the cap of arXiv 2512.01374
    sequence   min(Π_t π_θ/μ_old, 2), the product over the response; 2 is the usual cap
    staleness  min(π_θ/π_old, 5): π_old/μ_old is left out, so it is 1 on-policy"""
    anchor = old_logprobs if kind == "staleness" else rollout_logprobs
    log_weights = (logprobs - anchor).detach().masked_fill(~mask, 0.0)
    if kind == "sequence":  # exp of the sum, bounded before it can overflow
        return log_weights.sum(1, keepdim=True).clamp(max=math.log(sequence_cap)).exp() * mask
    return log_weights.clamp(max=math.log(token_cap)).exp() * mask

def clip_gate(logprobs, old_logprobs, advantages, clip_low=0.2, clip_high=0.27):
    """False where an update would push a token further out of the trust region. advantages (B,).
    With r = π_θ/π_old:  Â > 0 and r > 1 + ε_high,  or  Â < 0 and r < 1 - ε_low."""
    log_ratio = (logprobs - old_logprobs).detach()  # π_old, not μ_old: staleness only
    too_high = (advantages[:, None] > 0) & (log_ratio > math.log1p(clip_high))
    too_low = (advantages[:, None] < 0) & (log_ratio < math.log1p(-clip_low))
    return ~(too_high | too_low)

def minirl_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences,
                n_tokens, clip=True, clip_low=0.2, clip_high=0.27, importance_sampling="token",
                length_norm=False):
    """MiniRL (arXiv 2512.01374, equation 7): sum over tokens, mean over responses. advantages (B,).
    n_sequences and n_tokens count the whole mini-batch, of which this may be a part; MiniRL divides
    by the first, objectives that average over tokens by the second. -> loss (), gate (B, T)."""
    logprobs, old_logprobs, rollout_logprobs = (  # outside the mask even NaN has no influence
        x.masked_fill(~mask, 0.0) for x in (logprobs, old_logprobs, rollout_logprobs))
    weight = importance_weights(logprobs, old_logprobs, rollout_logprobs, mask, importance_sampling)
    gate = clip_gate(logprobs, old_logprobs, advantages, clip_low, clip_high) | (not clip)
    objective = weight * gate * advantages[:, None] * logprobs
    if length_norm:
        objective = objective / mask.sum(1, keepdim=True).clamp(min=1)
    return -objective.sum() / n_sequences, gate

def kl_k3(sampled, other, mask):
    """KL(p‖q) a token from log p and log q of tokens sampled from p: q/p - 1 - log q/p on average,
    never negative. expm1 in fp64 keeps the digits where p and q nearly agree."""
    x = (other.double() - sampled.double())[mask]
    return (x.expm1() - x).mean()

def extreme_token_fraction(old_logprobs, rollout_logprobs, mask, tau=2.0):
    """F(τ) of arXiv 2510.11370: share of tokens with max(ρ, 1/ρ) > τ, where ρ = π_old/μ_old."""
    return ((old_logprobs - rollout_logprobs)[mask].abs() > math.log(tau)).double().mean()

def effective_sample_size(log_weights, mask):
    """(Σw)² / (n Σw²) of masked tokens: 1 if all weights are equal, 1/n if one has everything."""
    w = (log_weights[mask] - log_weights[mask].max()).double().exp()
    return w.sum().square() / (len(w) * w.square().sum())

def routing_agreement(routing, other, mask):
    """Share of masked tokens where both chose one set of experts. (B, T, L, A) twice -> (L,)."""
    same = (routing.sort(-1).values == other.sort(-1).values).all(-1)  # columns have no order
    return same[mask].double().mean(0)

# --------------------------------------------------------------------------------- 6 Training
def policy(model, batch: Rollout):
    """π on a batch -> logprobs (B, T), entropies (B, T), routing (B, T, L, A): what each layer
    would choose, under replay on top of layers that were told."""
    logits, routing = model(batch.tokens[:, :-1], batch.replay, batch.fed)
    logprobs = token_logprobs(logits, batch.tokens[:, 1:], model.config.temperature)
    return logprobs, entropy(logits.detach(), model.config.temperature), routing

@torch.no_grad()
def prepare_batch(model, batch: Rollout) -> Rollout:
    """π_old and the experts to replay, of a whole rollout batch before its first update."""
    c = model.config
    if c.replay == "R3":  # the prompt's too: responses attend to keys that its experts made
        batch = replace(batch, replay=batch.routing)
    if c.mini_batches == 1:  # π_θ will be π_old, and R2 is none: both use their own experts
        return batch
    # π_old is the training engine's: the clip gate shall see only what updates changed. It is made
    # one mini-batch at a time, as π_θ will be: in another shape rounding could flip an expert.
    parts = [policy(model, mini_batch) for mini_batch in batch.split(c.mini_batch)]
    logprobs, _, routing = (torch.cat(part) for part in zip(*parts))
    batch = replace(batch, old_logprobs=logprobs)
    return replace(batch, replay=routing) if c.replay == "R2" else batch

def descend(model, optimizer, loss) -> Tensor:
    """One step of the optimizer -> norm of the gradient before it is cut to 1. FloatingPointError,
    weights kept, if loss or gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not (loss.isfinite() and grad_norm.isfinite()):
        raise FloatingPointError(f"loss {loss:.3g}, gradient norm {grad_norm:.3g}")
    optimizer.step()
    return grad_norm

def train_step(model, optimizer, batch: Rollout, loss_fn=minirl_loss) -> dict:
    """One update from one mini-batch -> metrics, all of them from before the update."""
    mask, mu = batch.mask, batch.rollout_logprobs
    logprobs, entropies, routing = policy(model, batch)
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    loss, gate = loss_fn(logprobs, old, mu, batch.advantages, mask,
                         n_sequences=len(mask), n_tokens=int(mask.sum()))
    metrics = dict(
        grad_norm=descend(model, optimizer, loss), reward=batch.rewards.mean(),
        mismatch_kl=kl_k3(mu, old, mask), staleness_kl=kl_k3(old, logprobs, mask),
        extreme_token_fraction=extreme_token_fraction(old, mu, mask),
        effective_sample_size=effective_sample_size(logprobs - mu, mask),
        routing_agreement=routing_agreement(routing, batch.routing, batch.fed),
        clip_fraction=1 - gate[mask].double().mean(), entropy=entropies[mask].mean(),
        dropped_responses=1 - (gate & mask).any(1).double().mean(),  # no token has a gradient
        response_length=(batch.lengths - batch.prompt_lengths).double().mean())
    return {name: value.tolist() for name, value in metrics.items()}

def sample(engine: InferenceEngine, n: int, G: int, seed: int) -> Rollout:
    """A graded rollout of n prompts. Prompts and samples have streams of random numbers that the
    seed decides alone: methods get the same prompts, and a resumed run has nothing to restore."""
    task, generator = engine.model.task, Generator(DEVICE).manual_seed(2 * seed + 1)
    prompts = task.make_prompts(n, engine.model.config, Generator().manual_seed(2 * seed))
    rollout = engine.generate(*prompts, G, generator)
    rewards = task.grade(rollout.tokens, rollout.prompt_lengths, rollout.lengths)
    return replace(rollout, rewards=rewards)

@torch.no_grad()
def evaluate(model: Model) -> tuple[dict, Rollout]:
    """One response to each of a fixed set of prompts -> metrics, the inference engine's responses.
    score: in training precision. engine_score: of the inference engine, which is deployed.
    routing_share: what part of their gap replay can close, 1 - KL(μ‖π with the experts of μ) /
    KL(μ‖π with its own); None where there is no gap."""
    c = model.config
    trained = sample(InferenceEngine(model, c.train_precision), c.eval_prompts, 1, seed=2**61)
    engine = InferenceEngine(model, c.rollout_precision, c.router_noise)
    deployed = sample(engine, c.eval_prompts, 1, seed=2**61)
    own, replayed = (kl_k3(deployed.rollout_logprobs, policy(model, batch)[0], deployed.mask).item()
                     for batch in (deployed, replace(deployed, replay=deployed.routing)))
    return dict(score=trained.rewards.mean().item(), engine_score=deployed.rewards.mean().item(),
                routing_share=1 - replayed / own if own > 1e-8 else None), deployed

def adamw(model: Model, lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), 1e-8, weight_decay, fused=True)

def cold_start(c: Config, task: Task = RUNNING_SUM) -> Model:
    """Supervised learning from imperfect demonstrations. No load-balancing loss, as in RL."""
    model, generator, n = Model(c, task), Generator().manual_seed(c.seed), c.cold_start_steps
    optimizer = adamw(model, 3e-3, weight_decay=0.1)
    for step in tqdm(range(n), "cold start", disable=None, leave=False):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20, 2.5 * (1 - step / n))
        batch = Rollout(*(x.to(DEVICE) for x in task.demonstrations(64, c, generator)))
        descend(model, optimizer, -policy(model, batch)[0][batch.mask].mean())
    return model

def learn(model, optimizer, rows: list[dict], loss_fn=None, advantage_fn=group_advantages,
          after_batch=lambda: None):
    """RL until c.updates, one rollout batch at a time; rows, of which there is the one of update 0,
    gets one an update. loss_fn and advantage_fn replace MiniRL's."""
    c = model.config
    loss_fn = loss_fn or partial(
        minirl_loss, clip=c.clip, clip_low=c.clip_low, clip_high=c.clip_high,
        importance_sampling=c.importance_sampling, length_norm=c.length_norm)
    n_prompts = c.mini_batches * c.mini_batch // c.group_size
    while (done := rows[-1]["update"]) < c.updates:
        began = time.perf_counter()
        engine = InferenceEngine(model, c.rollout_precision, c.router_noise)  # weights are synced
        rollout = sample(engine, n_prompts, c.group_size, seed=c.seed * 10**9 + done)
        rollout.advantages = advantage_fn(rollout.rewards, c.group_size)
        batch = prepare_batch(model, rollout)  # π_old and the experts to replay
        for mini_batch in batch.split(c.mini_batch):  # N updates
            update = rows[-1]["update"] + 1
            optimizer.param_groups[0]["lr"] = c.lr * min(1, update / c.warmup)
            rows.append({"update": update} | train_step(model, optimizer, mini_batch, loss_fn))
        for row in rows[-c.mini_batches:]:
            row["seconds"] = (time.perf_counter() - began) / c.mini_batches
        if update % c.eval_every < c.mini_batches or update == c.updates:
            rows[-1] |= evaluate(model)[0]
        after_batch()

# ------------------ 7 Bookkeeping, to skip on first reading: files, checks, the command line
def save(path: Path, data: bytes):
    """The file appears whole or not at all, whatever cuts this short or writes it beside us."""
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)

def load(path: Path) -> dict:
    """A checkpoint. ValueError if it is missing, foreign or damaged, if only in one byte."""
    try:
        assert zipfile.ZipFile(path).testzip() is None  # torch does not look at the checksums
        state = torch.load(path, map_location=DEVICE)
        Config(**state["config"]), state["rows"][-1]["update"], state["model"], state["optimizer"]
        return state
    except Exception as error:
        raise ValueError(f"--resume: {path} is missing, damaged or foreign; start a run") from error

def draw(rows: list[dict], path: Path):
    """The curves of a run."""
    from matplotlib.figure import Figure  # slow to import: no refusal should wait for it
    figure, buffer = Figure(figsize=(12, 6), layout="constrained"), io.BytesIO()
    panels = {"score on fixed prompts": ("score", "engine_score"), "training reward": ("reward",),
              "KL(μ_old‖π_old), between engines": ("mismatch_kl",), "entropy of π_θ": ("entropy",),
              "KL(π_old‖π_θ), stale weights": ("staleness_kl",),
              "same experts in π_θ and μ, by layer": ("routing_agreement",)}
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, panels.items()):
        for name in names:
            points = [(row["update"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points), marker="." if "score" in name else "", label=name)
        if name.endswith("kl") and any(y > 0 for _, y in points):
            axes.set_yscale("log", nonpositive="mask")  # the staleness of a first update is 0
        axes.set(title=title, xlabel="update")
        axes.grid(alpha=0.3)
    if figure.axes[0].lines:  # scaled/ can be without a score
        figure.axes[0].legend()
    if points and len(points[0][1]) <= 12:  # layers; for more there is no room
        axes.legend(range(len(points[0][1])))
    figure.savefig(buffer, format="png", dpi=100)
    save(path, buffer.getvalue())

def train(c: Config, state: dict | None = None, task: Task = RUNNING_SUM, **functions):
    """A run in runs/NAME, from the state of a checkpoint if there is one; functions: of learn."""
    folder, model = Path("runs", c.name), Model(c, task) if state else cold_start(c, task)
    optimizer = adamw(model, c.lr)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    rows = state["rows"] if state else [{"update": 0} | evaluate(model)[0]]
    bar = tqdm(total=c.updates, initial=rows[-1]["update"], disable=None, leave=False)
    def after_batch():
        buffer = io.BytesIO()  # torch's own writer makes pages of traceback of a full disk
        torch.save({"config": asdict(c), "rows": rows, "model": model.state_dict(),
                    "optimizer": optimizer.state_dict()}, buffer)
        save(folder / "checkpoint.pt", buffer.getvalue())
        save(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        bar.update(rows[-1]["update"] - bar.n)
        bar.set_postfix({k: rows[-1][k] for k in ("reward", "mismatch_kl") if k in rows[-1]})
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "config.json", json.dumps(asdict(c), indent=2).encode())
    try:
        after_batch()  # from now on there is something to resume
        learn(model, optimizer, rows, after_batch=after_batch, **functions)
    finally:
        bar.close()
        draw(rows, folder / "curves.png")
    scores, samples = evaluate(model)
    for tokens, n, reward in list(zip(samples.tokens, samples.lengths, samples.rewards))[:3]:
        print(f"reward {reward:.0f}: {' '.join(task.vocabulary[i] for i in tokens[:n])}")
    for when, row in ("before", rows[0]), ("after", scores):
        print(f"{when} RL: score {row['score']:.3f} in training precision, "
              f"{row['engine_score']:.3f} of the inference engine")
    print(f"{folder}/curves.png has the curves, metrics.jsonl beside it the numbers")

def check(c, name: str, fine: bool, remedy: str):
    """ValueError, in one line, if the value of an option is not fine."""
    if not fine:
        raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: give {remedy}")

def check_options(c):
    """Type, choices and bounds of every option."""
    for f in fields(c):
        value, (_, choices, low, high) = getattr(c, f.name), f.metadata.values()
        fine = value in choices if choices else f.type in (str, bool) or low <= value <= high
        remedy = " or ".join(choices) or f"{low} to {high}"
        check(c, f.name, type(value) is f.type and fine, remedy)

def check_config(c: Config):
    check_options(c)
    size = 3 * c.layers * c.experts * c.expert_width * c.width
    for name, fine, remedy in (
            ("width", c.width / c.heads in (32, 64), f"32 or 64 times --heads {c.heads}"),
            ("kv_heads", c.heads % c.kv_heads == 0, f"a divisor of --heads {c.heads}"),
            ("top_k", c.top_k <= c.experts, f"at most --experts {c.experts}"),
            ("expert_width", c.expert_width % 8 == 0, "a multiple of 8"),
            ("layers", size <= 1e9, f"sizes with at most 1e9 parameters: these have {size:.1g}"),
            ("max_digits", c.min_digits <= c.max_digits, f"--min-digits {c.min_digits} to 8"),
            ("updates", c.updates % c.mini_batches == 0, f"a multiple of {c.mini_batches}"),
            ("group_size", c.mini_batch % c.group_size == 0, f"a divisor of {c.mini_batch}"),
            ("name", Path(c.name).name == c.name != "..", "one without /")):
        check(c, name, fine, remedy)

def command_line(config: type, description: str) -> argparse.ArgumentParser:
    """A parser with a flag for each field of a Config; what was not given is not in its answer."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS)
    for f in fields(config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "metavar": "|".join(f.metadata["choices"]) or f.type.__name__}
        parser.add_argument("--" + f.name.replace("_", "-"), **kind,
                            help=f"{f.metadata['text']} [{f.default}]")
    return parser

def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 for a run that failed, 130 after Ctrl-C; SystemExit 2 for what was refused."""
    parser, state = command_line(Config, __doc__.split("\n")[0]), None
    parser.add_argument("--resume", metavar="NAME", help="go on with runs/NAME, or to --updates")
    given = vars(parser.parse_args(argv))
    try:
        if (name := given.pop("resume", None)) is not None:
            state = load(Path("runs", name, "checkpoint.pt"))
            done = state["rows"][-1]["update"]
            if given.keys() - {"updates"} or given.get("updates", done) < done:
                raise ValueError(f"--resume {name}: takes only --updates, {done} or more")
            given = state["config"] | given | {"name": name}
        c, n = Config(**given), 1
        while not c.name and Path("runs", f"run-{n}").exists():
            n += 1
        c = replace(c, name=c.name or f"run-{n}")
        folder = Path("runs", c.name)
        if (folder / "checkpoint.pt").exists() and not state:
            raise ValueError(f"--name {c.name}: is taken; give another, or --resume {c.name}")
    except ValueError as refusal:
        parser.error(str(refusal))
    try:  # a ValueError from here on is a bug, and shows where it is
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            train(c, state)
    except BlockingIOError:
        flag = "--resume" if state else "--name"
        parser.error(f"{flag} {c.name}: another process is at it; wait until it ends")
    except (FloatingPointError, OSError, KeyboardInterrupt) as error:
        saved = (folder / "checkpoint.pt").exists()
        print(f"stopped by {str(error) or 'Ctrl-C'}; " + (f"--resume {c.name} goes on from {folder}"
              "/checkpoint.pt" if saved else "nothing is saved yet"), file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0

if __name__ == "__main__":
    sys.exit(main())
