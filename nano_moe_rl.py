"""Reinforcement learning on a Mixture-of-Experts language model, kept stable by routing replay.

    python nano_moe_rl.py                                           # cold start, RL, a picture
    python nano_moe_rl.py --replay none --rollout-precision int4    # turn a dial (--help) and look

The method is MiniRL ("Stabilizing Reinforcement Learning with LLMs", arXiv 2512.01374). A reward
is for a whole response, but what is trained is a first-order approximation, a sum over tokens. It
holds only while two gaps between policies are small:

    π_θ / μ_old  =  (π_old / μ_old: two engines)  ×  (π_θ / π_old: stale weights)

    rollout_logprobs   log μ_old   the inference engine, when it sampled the response
    old_logprobs       log π_old   the training engine, with the same weights
    logprobs           log π_θ     the training engine, with the weights of this very step

In an MoE both gaps hide a switch: other rounding or other weights send a token to other experts.
Routing replay fixes the experts in training, to those of π_old (mode R2) or those of μ_old (R3).

Dimensions: P prompts, G responses each, B = P·G sequences, T positions, N real tokens, V symbols,
D width, H heads, K key-value heads, L layers, E experts, A active ones, F their width. Rows have
T + 1 tokens; position t is fed token t and predicts token t + 1: everything else has T columns.
Routing is int16 (B, T, L, A), -1 on padding.
"""
import argparse, copy, hashlib, json, math, os, signal, sys, time  # noqa: E401
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Generator, Tensor, nn
from tqdm import tqdm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ----------------------------------------------------------------------------------- 1 Config

def option(default, text: str, *choices: str, low: int = 0):
    return field(default=default, metadata=dict(text=text, choices=choices, low=low))

@dataclass(frozen=True)
class Config:
    """Every dial of a run; the command line is made from it. ValueError, one line, if refused."""
    seed: int = option(0, "one seed is one cold start and one order of prompts")
    width: int = option(64, "D, a multiple of 32", low=32)
    layers: int = option(3, "L", low=1)
    heads: int = option(2, "H; width / heads has to be 32 or 64", low=1)
    kv_heads: int = option(1, "K", low=1)
    experts: int = option(16, "E", low=1)
    top_k: int = option(2, "A; a single weight is always 1: no gradient for the router", low=1)
    expert_width: int = option(64, "F, a multiple of 8", low=8)
    teacher: str = option("brief", "of the cold start", "brief", "equation", "restating")
    min_digits: int = option(3, "in the shortest prompt", low=1)
    max_digits: int = option(6, "in the longest prompt, at most 10", low=1)
    max_response: int = option(22, "tokens, after which a response is cut off", low=1)
    cold_start_steps: int = option(600, "supervised updates before RL")
    temperature: float = option(1.0, "of the distribution that is sampled, and of π")
    train_precision: str = option("fp32", "of π; the weights stay fp32", "fp32", "bf16")
    name: str = option("", "folder under runs/; left out, the next free run-N")
    updates: int = option(120, "gradient updates of RL", low=1)
    mini_batch: int = option(256, "responses an update", low=1)
    mini_batches: int = option(4, "N, updates a rollout batch: how far off-policy", low=1)
    group_size: int = option(8, "G, responses to one prompt", low=1)
    micro_batch: int = option(0, "responses a forward pass; 0: the whole mini-batch")
    lr: float = option(5e-4, "learning rate of RL")
    replay: str = option("R3", "whose experts π_old and π_θ use", "none", "R2", "R3")
    clip: bool = option(True, "drop tokens that π_θ/π_old puts outside the trust region")
    importance_sampling: str = option("token", "in the loss", "token", "sequence", "none")
    length_norm: bool = option(False, "divide a response's loss by its length")
    rollout_precision: str = option("fp8", "of μ", "fp32", "bf16", "fp8", "int4")
    eval_every: int = option(10, "updates between scores, and between checkpoints", low=1)
    eval_prompts: int = option(512, "held-out prompts in a score", low=1)

    def __post_init__(c):
        for f in fields(c):
            value, low, choices = getattr(c, f.name), f.metadata["low"], f.metadata["choices"]
            bound = f"{low} or more" if f.type is int else "a number above 0"
            fine = type(value) is f.type and (not choices or value in choices)
            if fine and f.type in (int, float):
                fine = (low <= value if f.type is int else 0 < value) and value < 1e9
            if not fine:
                raise ValueError(f"{flag(f.name)} {value}: give {' or '.join(choices) or bound}")
        longest = len(TEACHERS[c.teacher][1]) * c.max_digits + 3
        for name, refused, remedy in (
            ("width", c.width % 32, "a multiple of 32"),
            ("heads", c.width / c.heads not in (32, 64), f"--width {c.width} over 32 or over 64"),
            ("kv_heads", c.heads % c.kv_heads, f"a divisor of --heads {c.heads}"),
            ("top_k", c.top_k > c.experts, f"at most --experts {c.experts}"),
            ("expert_width", c.expert_width % 8, "a multiple of 8"),
            ("max_digits", not c.min_digits <= c.max_digits <= 10, f"{c.min_digits} to 10"),
            ("max_response", c.max_response < longest, f"{longest} or more"),
            ("updates", c.updates % c.mini_batches, f"a multiple of {c.mini_batches}"),
            ("group_size", c.mini_batch % c.group_size, f"a divisor of {c.mini_batch}"),
            ("micro_batch", c.mini_batch % c.per_pass, f"a divisor of {c.mini_batch}"),
            ("name", "/" in c.name or c.name in ("..", ".", "cold_start"), "one without folders"),
        ):
            if refused:
                raise ValueError(f"{flag(name)} {getattr(c, name)}: give {remedy}")

    head_dim = property(lambda c: c.width // c.heads)
    context = property(lambda c: c.max_digits + 1 + c.max_response)
    per_pass = property(lambda c: c.micro_batch or c.mini_batch)

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

# -------------------------------------------------------------------------------------- 2 Task
# "3 1 4 =" asks for the running sum modulo 10, step by step, and then the answer. A step names the
# next digit and writes the new sum: "3 3 1 4 4 8 : 8 $". Only the answer is graded, one 0 or 1.
# The digits of a prompt differ: a small model finds its place by looking up the one it named last.

VOCABULARY = "0123456789=:$"
ASK, ANSWER, EOS = (VOCABULARY.index(symbol) for symbol in "=:$")
TEACHERS = {  # name: (chance of a slip in a step, how a step is written)
    "brief": (0.22, "ds"),  # d the digit, s the new sum, p the sum before it
    "equation": (0.25, "d=s"),
    "restating": (0.28, "pds"),
}

def make_prompts(n: int, c: Config, generator: Generator) -> tuple[Tensor, Tensor]:
    """n prompts, right padded: tokens (n, max_digits + 1) and lengths (n,), on the CPU."""
    digits = F.pad(torch.rand(n, 10, generator=generator).argsort(1), (0, 1))[:, : c.max_digits + 1]
    count = torch.randint(c.min_digits, c.max_digits + 1, (n, 1), generator=generator)
    return digits.masked_fill(torch.arange(digits.shape[1]) >= count, ASK), count[:, 0] + 1

def demonstrations(n: int, c: Config, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Imperfect solutions, right padded: tokens (n, T + 1), prompt_lengths (n,), lengths (n,).
    A slip adds a wrong digit, and later steps build on the wrong sum."""
    slip_rate, step = TEACHERS[c.teacher]
    prompts, prompt_lengths = make_prompts(n, c, generator)
    slips = torch.randint(1, 10, prompts.shape, generator=generator)
    slips *= torch.rand(prompts.shape, generator=generator) < slip_rate
    rows = []
    for prompt, slip, length in zip(prompts.tolist(), slips.tolist(), prompt_lengths.tolist()):
        row, total = prompt[:length], 0
        for digit, wrong in zip(prompt[: length - 1], slip):
            before, total = total, (total + digit + wrong) % 10
            row += [{"d": digit, "s": total, "p": before, "=": ASK}[part] for part in step]
        rows.append(torch.tensor(row + [ANSWER, total, EOS]))
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, True, EOS), prompt_lengths, lengths

def grade(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Rewards (B,): 1.0 where the response ends in ANSWER, the right digit, EOS, else 0.0."""
    rows = zip(tokens.tolist(), prompt_lengths.tolist(), lengths.tolist())
    return torch.tensor([float(row[start:end][-3:] == [ANSWER, sum(row[: start - 1]) % 10, EOS])
                         for row, start, end in rows], device=tokens.device)

# ------------------------------------------------------------------------------------- 3 Model
# Architecture and parameter names are Qwen3-MoE's: transformers loads these weights as they are.
# In functions, w holds the weights of one layer by name, and product is the numerics of an engine.

# Without bf16 units a CPU multiplies bf16 ten times slower than fp32, where products are exact.
BF16_UNITS = DEVICE == "cuda" or torch.cpu._is_amx_tile_supported()

def product(x: Tensor, weight: Tensor, offsets: Tensor | None = None, bf16: bool = False) -> Tensor:
    """x (..., in), weight (out, in) -> (..., out). With offsets (E,) and weight (E, out, in),
    expert e has the rows of x (M, in) before offsets[e]. bf16: all rounded, but sums in fp32."""
    if bf16:
        x, weight = (y.bfloat16() if BF16_UNITS else y.bfloat16().float() for y in (x, weight))
    y = F.linear(x, weight) if offsets is None else F.grouped_mm(x, weight.mT, offs=offsets)
    return y.bfloat16().float() if bf16 else y

def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return x * (norm.square() / x.shape[-1] + 1e-6).rsqrt().to(x.dtype) * weight

def rotary_table(c: Config) -> Tensor:
    """cos and signed sin of position · 10000^(-2i / head_dim): (2, context, 1, head_dim)."""
    frequency = 1e4 ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
    angle = torch.arange(c.context)[:, None, None] * torch.cat([-frequency, frequency])
    return torch.stack([angle.cos(), angle.sin()]).to(DEVICE)

def attend(w: dict, x: Tensor, rotary: Tensor, product: Callable, cache: Tensor | None = None):
    """x (B, S, D) plus its causal grouped-query attention; rotary (2, S, 1, head_dim). The cache
    (2, B, K, T, head_dim) takes the keys and values of T positions, of which x is the last S."""
    d, (B, S, _) = rotary.shape[-1], x.shape
    q, k, v = (w[f"self_attn.{name}_proj.weight"] for name in "qkv")
    H, K = len(q) // d, len(k) // d
    heads = product(rms_norm(x, w["input_layernorm.weight"]), torch.cat([q, k, v]))
    qk, v = heads.view(B, S, H + 2 * K, d).split([H + K, K], 2)
    q_norm, k_norm = w["self_attn.q_norm.weight"], w["self_attn.k_norm.weight"]
    qk = rms_norm(qk, torch.cat([q_norm.expand(H, d), k_norm.expand(K, d)]))
    q, k = (qk * rotary[0] + qk.roll(d // 2, -1) * rotary[1]).split([H, K], 2)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if cache is not None:
        cache[0, :, :, -S:], cache[1, :, :, -S:] = k, v
        k, v = cache
    q, k, v = rearrange(q, "b s (k g) d -> (b k) (g s) d", k=K), k.flatten(0, 1), v.flatten(0, 1)
    scores = (q.float() @ k.float().mT * d**-0.5).unflatten(1, (H // K, S))  # (B·K, H/K, S, T)
    future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(k.shape[1] - S + 1)
    out = scores.masked_fill(future, -math.inf).softmax(-1).flatten(1, 2) @ v.float()
    out = rearrange(out, "(b k) (g s) d -> b s (k g d)", b=B, s=S).to(x.dtype)
    return x + product(out, w["self_attn.o_proj.weight"])

def moe(w: dict, x: Tensor, real: Tensor, A: int, replay: Tensor | None, product: Callable):
    """x (M, D) plus, in its rows `real` (N,), a mixture of SwiGLU experts -> (M, D), live top-k
    (N, A). Padding is left out before any choice: no expert ever sees it. replay (N, A) or None."""
    h = rms_norm(x, w["post_attention_layernorm.weight"])
    router_logits = F.linear(h.float(), w["mlp.gate.weight"]).to(h.dtype)  # never quantised
    router_logits = router_logits.float().index_select(0, real)
    live = router_logits.topk(A).indices

    # All of routing replay: the selection is given, the weights stay live. They come from unmasked
    # logits, so a replayed expert has its gradient where the router would no longer choose it.
    experts = live if replay is None else replay
    weights = router_logits.gather(-1, experts).softmax(-1)

    # A token is copied once for each of its experts and the copies are sorted by expert: each
    # expert works on one block of rows, and one that nobody chose costs nothing.
    gate_up, down = w["mlp.experts.gate_up_proj"], w["mlp.experts.down_proj"]
    order = experts.flatten().argsort(stable=True)
    rows = real[order // A]
    offsets = experts.flatten().bincount(minlength=len(down)).cumsum(0).to(torch.int32)
    gate, up = product(h.index_select(0, rows), gate_up, offsets).chunk(2, -1)
    hidden = F.silu(gate) * up * weights.to(h.dtype).flatten().index_select(0, order)[:, None]
    return x.index_add(0, rows, product(hidden, down, offsets).to(x.dtype)), live

def layer_parameters(c: Config) -> nn.ModuleDict:
    D, F, kv, norm = c.width, c.expert_width, c.kv_heads * c.head_dim, nn.RMSNorm
    linear = partial(nn.Linear, bias=False)
    return nn.ModuleDict({
        "input_layernorm": norm(D), "post_attention_layernorm": norm(D),
        "self_attn": nn.ModuleDict({
            "q_proj": linear(D, D), "k_proj": linear(D, kv), "v_proj": linear(D, kv),
            "o_proj": linear(D, D), "q_norm": norm(c.head_dim), "k_norm": norm(c.head_dim)}),
        "mlp": nn.ModuleDict({"gate": linear(D, c.experts), "experts": nn.ParameterDict({
            "gate_up_proj": torch.empty(c.experts, 2 * F, D),
            "down_proj": torch.empty(c.experts, D, F)})})})

class Model(nn.Module):
    """The training engine: one forward pass over whole sequences."""
    def __init__(self, c: Config):
        super().__init__()
        self.config, generator = c, Generator().manual_seed(c.seed)
        self.embed_tokens = nn.Embedding(len(VOCABULARY), c.width)
        self.layers = nn.ModuleList(layer_parameters(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width)
        self.lm_head = nn.Linear(c.width, len(VOCABULARY), bias=False)
        for matrix in (p for p in self.parameters() if p.dim() > 1):
            nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5, generator=generator)
        self.product = partial(product, bf16=c.train_precision == "bf16")
        self.rotary = rotary_table(c)
        self.to(DEVICE)

    def forward(self, tokens: Tensor, replay: Tensor | None = None, mask: Tensor | None = None):
        """tokens (B, T), replay (B, T, L, A) or None, mask (B, T), False on padding, which
        is on the right (None: no padding) -> logits (B, T, V), routing (B, T, L, A), always live.
        ValueError if replay has the wrong shape, or no valid route for a real token."""
        c, (B, T) = self.config, tokens.shape
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        real, x, routing = mask.flatten().nonzero().squeeze(1), self.embed_tokens(tokens), []
        if replay is not None:
            replay = check_routes(replay, mask, (B, T, c.layers, c.top_k), c.experts).unbind(1)
        for i, layer in enumerate(self.layers):
            w = dict(layer.named_parameters())
            x = attend(w, x, self.rotary[:, :T], self.product).flatten(0, 1)
            x, live = moe(w, x, real, c.top_k, None if replay is None else replay[i], self.product)
            x = x.view(B, T, -1)
            routing.append(live.to(torch.int16))
        live = torch.stack(routing, 1)  # (N, L, A)
        routing = live.new_full((B * T, c.layers, c.top_k), -1).index_copy(0, real, live)
        logits = self.product(rms_norm(x, self.norm.weight), self.lm_head.weight)
        return logits, routing.unflatten(0, (B, T))

def check_routes(routing: Tensor, mask: Tensor, shape: tuple, experts: int) -> Tensor:
    """The routes of real tokens, int64 (N, L, A). ValueError if they cannot be replayed."""
    if routing.shape != shape:
        raise ValueError(f"replay has shape {tuple(routing.shape)}, the model needs {shape}")
    routes = routing[mask].long()
    order = routes.sort(-1).values
    bad = (order[..., 0] < 0) | (order[..., -1] >= experts) | (order.diff() == 0).any(-1)
    if bad.any():
        raise ValueError(f"replay lacks a valid route for {int(bad.sum())} of {bad.numel()} "
                         f"(token, layer) pairs: {shape[-1]} different experts below {experts}")
    return routes

# ----------------------------------------------------------------------------------- 4 Rollout

@dataclass
class Rollout:
    """Sampled responses. What belongs together travels together."""
    tokens: Tensor  # (B, T + 1) prompt, response, then anything
    prompt_lengths: Tensor  # (B,)
    lengths: Tensor  # (B,) prompt and response
    rollout_logprobs: Tensor  # (B, T) log μ of token t + 1, 0 outside the response
    routing: Tensor  # (B, T, L, A) the experts of μ
    version: int  # updates that μ's weights had seen
    rewards: Tensor | None = None  # (B,) this and the next are filled in before training
    advantages: Tensor | None = None  # (B,)
    old_logprobs: Tensor | None = None  # (B, T) log π_old; None: what the training forward says
    replay: Tensor | None = None  # (B, T, L, A) the experts to train with; None: the live ones

    @property
    def fed(self) -> Tensor:
        """(B, T) True where a token is fed: all of a sequence but its last token."""
        column = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
        return column < self.lengths[:, None]

    @property
    def mask(self) -> Tensor:
        """(B, T) True where a token of the response is predicted."""
        return self.fed & (self.fed.cumsum(1) >= self.prompt_lengths[:, None])

    def split(self, size: int) -> list["Rollout"]:
        """Parts of `size` sequences, in order."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return [replace(self, **{name: value[i : i + size] for name, value in tensors.items()})
                for i in range(0, len(self.tokens), size)]

def quantise(x: Tensor, precision: str) -> Tensor:
    """fp32 x on a grid with one scale a row of the last axis: a token of an activation (..., in),
    an output channel of a weight (..., out, in). Stays fp32. bf16 needs no scale."""
    if precision in ("fp32", "bf16"):
        return x if precision == "fp32" else x.bfloat16().float()
    largest = 448 if precision == "fp8" else 7  # of float8 e4m3; of int4, used symmetrically
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    grid = x / scale
    return scale * (grid.to(torch.float8_e4m3fn).float() if precision == "fp8" else grid.round())

class InferenceEngine:
    """The same policy in other numerics: token by token, with a KV cache, on rounded weights. It
    models the numbers of a quantised engine, not its speed. In projections and experts, weights and
    activations are quantised and products summed in fp32, as W8A8 kernels do; router, embedding and
    output head are only rounded to bf16. Results are stored in bf16 (precision fp32: in fp32)."""
    def __init__(self, c: Config, precision: str):
        self.config, self.precision, self.version = c, precision, -1
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.rotary = rotary_table(c).to(self.dtype)

    @torch.no_grad()
    def load_weights(self, model: Model, version: int):
        """Weight synchronisation: a rounded copy of every weight, matrices held in fp32."""
        self.version, self.model = version, copy.deepcopy(model).requires_grad_(False)
        for name, weight in self.model.named_parameters():
            stored = weight.data.to(self.dtype)
            weight.data = (stored if "norm" in name else stored.float() if "_proj" not in name
                           else quantise(weight.data, self.precision))
        self.layers = [dict(layer.named_parameters()) for layer in self.model.layers]

    def product(self, x: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
        return product(quantise(x.float(), self.precision), weight, offsets).to(self.dtype)

    def forward(self, tokens: Tensor, start: int, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Feeds tokens (B, S) at positions start, start + 1, …; their keys and values go into cache
        (L, 2, B, K, context, head_dim) -> logits (B, V) of the last one, routing (B, S, L, A)."""
        (B, S), routing = tokens.shape, []
        real, rotary = torch.arange(B * S, device=DEVICE), self.rotary[:, start : start + S]
        x = self.model.embed_tokens(tokens).to(self.dtype)
        for w, kv in zip(self.layers, cache[..., : start + S, :]):
            x = attend(w, x, rotary, self.product, kv).flatten(0, 1)
            x, live = moe(w, x, real, self.config.top_k, None, self.product)
            x = x.view(B, S, -1)
            routing.append(live.to(torch.int16))
        last = rms_norm(x[:, -1], self.model.norm.weight).float()
        logits = self.model.lm_head(last).to(self.dtype).float()
        return logits, torch.stack(routing, 1).unflatten(0, (B, S))

    @torch.no_grad()
    def generate(self, prompts: Tensor, prompt_lengths: Tensor, group_size: int,
                 generator: Generator, eos: int = EOS) -> Rollout:
        """Samples G responses to each of P right-padded prompts (P, columns), prompt_lengths (P,).
        Column t of a sequence is its position t. The columns that all prompts fill are fed at once,
        one row a prompt; from there column by column, G rows a prompt: the prompt's own token while
        it lasts, then a sample. FloatingPointError if the weights give no distribution."""
        c, start, T = self.config, int(prompt_lengths.min()), self.config.context - 1
        cache = torch.zeros(c.layers, 2, len(prompts), c.kv_heads, c.context, c.head_dim,
                            device=DEVICE, dtype=self.dtype)
        logits, routes = self.forward(prompts[:, :start].to(DEVICE), 0, cache)
        cache = cache.repeat_interleave(group_size, 2)
        logits, routes, prompts, prompt_lengths = (
            x.to(DEVICE).repeat_interleave(group_size, 0)
            for x in (logits, routes, prompts, prompt_lengths))
        tokens = F.pad(prompts, (0, T + 1 - prompts.shape[1]), value=EOS)
        rollout_logprobs = torch.zeros(len(tokens), T, device=DEVICE)
        routing = routes.new_full((len(tokens), T, c.layers, c.top_k), -1)
        routing[:, :start] = routes
        lengths = prompt_lengths + c.max_response  # cut off there, unless EOS comes first
        live = torch.arange(len(tokens), device=DEVICE)  # unfinished: the rows of logits and cache
        for t in range(start, T + 1):
            logprobs = (logits / c.temperature).log_softmax(-1)  # the distribution that is sampled
            if not logprobs.isfinite().all():
                raise FloatingPointError("log-probabilities of the rollout are not finite")
            sampled = torch.multinomial(logprobs.exp(), 1, generator=generator)
            chosen, sampled = logprobs.gather(1, sampled)[:, 0], sampled[:, 0]
            in_prompt = t < prompt_lengths[live]
            rollout_logprobs[live, t - 1] = chosen.masked_fill(in_prompt, 0)
            tokens[live, t] = tokens[live, t].where(in_prompt, sampled)
            lengths[live[~in_prompt & (sampled == eos)]] = t + 1
            going = lengths[live] > t + 1
            if not going.all():  # finished sequences leave: no padding is ever decoded
                live, cache = live[going], cache[:, :, going]
            if len(live) == 0:
                break
            logits, routes = self.forward(tokens[live, t, None], t, cache)
            routing[live, t] = routes[:, 0]
        T = int(lengths.max()) - 1
        return Rollout(tokens[:, : T + 1], prompt_lengths, lengths, rollout_logprobs[:, :T],
                       routing[:, :T], self.version)

# ---------------------------------------------------------------------------------- 5 RL maths
# Tensors in, tensors out. Shapes are (B, T) unless said otherwise; mask is True on response tokens.

def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log π of the targets (B, T) under logits (B, T, V), at the temperature of sampling."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets[..., None]).squeeze(-1)

def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy over the full vocabulary, in nats. logits (B, T, V) -> (B, T)."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)

def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the mean of the G responses to its prompt, not divided by their deviation.
    rewards (B,), groups adjacent -> (B,). Being in its own mean leaves 1 - 1/G of the gradient."""
    means = reduce(rewards, "(p g) -> p", "mean", g=group_size)
    return rewards - repeat(means, "p -> (p g)", g=group_size)

TOKEN_CAP = 5.0  # arXiv 2512.01374, section 4
SEQUENCE_CAP = 2.0  # the usual bound of sequence-level truncation

def importance_weights(logprobs: Tensor, old_logprobs: Tensor, rollout_logprobs: Tensor,
                       mask: Tensor, kind: str = "token") -> Tensor:
    """The constant that weighs each token's gradient, (B, T), 0 outside the mask.
    token     min(π_θ/μ_old, 5)
    sequence  min(Π_t π_θ/μ_old, 2), the product over the response, on each of its tokens
    none      min(π_θ/π_old, 5): only the discrepancy π_old/μ_old is dropped; 1 on-policy"""
    anchor = old_logprobs if kind == "none" else rollout_logprobs
    log_weights = (logprobs - anchor).detach().masked_fill(~mask, 0.0)
    if kind == "sequence":  # exp of the sum, bounded before it can overflow
        return log_weights.sum(1, keepdim=True).clamp(max=math.log(SEQUENCE_CAP)).exp() * mask
    return log_weights.clamp(max=math.log(TOKEN_CAP)).exp() * mask

def clip_gate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2,
              clip_high: float = 0.27) -> Tensor:
    """False where an update would push a token further out of the trust region. advantages (B,).
    With r = π_θ/π_old:  Â > 0 and r > 1 + ε_high,  or  Â < 0 and r < 1 - ε_low."""
    log_ratio = (logprobs - old_logprobs).detach()  # π_old, not μ_old: staleness only
    too_high = (advantages[:, None] > 0) & (log_ratio > math.log1p(clip_high))
    too_low = (advantages[:, None] < 0) & (log_ratio < math.log1p(-clip_low))
    return ~(too_high | too_low)

def minirl_loss(logprobs: Tensor, old_logprobs: Tensor, rollout_logprobs: Tensor,
                advantages: Tensor, mask: Tensor, *, n_sequences: int, n_tokens: int,
                clip: bool = True, importance_sampling: str = "token", length_norm: bool = False):
    """MiniRL (arXiv 2512.01374, equation 7): sum over tokens, mean over responses. advantages (B,).
    n_sequences and n_tokens count the whole mini-batch, of which this may be a part; MiniRL divides
    by the first, objectives that average over tokens by the second. -> loss (), gate (B, T)."""
    logprobs, old_logprobs, rollout_logprobs = (  # outside the mask even NaN has no influence
        x.masked_fill(~mask, 0.0) for x in (logprobs, old_logprobs, rollout_logprobs))
    weights = importance_weights(
        logprobs, old_logprobs, rollout_logprobs, mask, importance_sampling)
    gate = clip_gate(logprobs, old_logprobs, advantages) if clip else torch.ones_like(mask)
    objective = weights * gate * advantages[:, None] * logprobs
    if length_norm:
        objective = objective / mask.sum(1, keepdim=True).clamp(min=1)
    return -objective.sum() / n_sequences, gate

def kl_k1(sampled: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """KL(p‖q) a token, from log p and log q of tokens sampled from p: the mean of log p - log q."""
    return (sampled.double() - other.double())[mask].mean()

def kl_k3(sampled: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """The same by q/p - 1 - log q/p, never negative; fp64 expm1 keeps the digits near zero."""
    x = (other.double() - sampled.double())[mask]
    return (x.expm1() - x).mean()

def extreme_token_fraction(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor,
                           tau: float = 2.0) -> Tensor:
    """F(τ) of arXiv 2510.11370: share of tokens with max(ρ, 1/ρ) > τ, where ρ = π_old/μ_old."""
    return ((old_logprobs - rollout_logprobs)[mask].abs() > math.log(tau)).double().mean()

def effective_sample_size(log_weights: Tensor, mask: Tensor) -> Tensor:
    """(Σw)² / (n Σw²) of masked tokens: 1 if all weights are equal, 1/n if one has everything."""
    x = log_weights.double()[mask]
    w = (x - x.max()).exp()
    return w.sum().square() / (len(w) * w.square().sum())

def routing_agreement(routing: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Share of masked tokens where both chose one set of experts. (B, T, L, A) twice -> (L,)."""
    same = (routing.sort(-1).values == other.sort(-1).values).all(-1)  # columns have no order
    return same[mask].double().mean(0)

# -------------------------------------------------------------------------------- 6 Train step

def policy(model: Model, batch: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """π on a batch -> logprobs (B, T), entropies (B, T), live routing (B, T, L, A)."""
    logits, routing = model(batch.tokens[:, :-1], batch.replay, batch.fed)
    logprobs = token_logprobs(logits, batch.tokens[:, 1:], model.config.temperature)
    return logprobs, entropy(logits.detach(), model.config.temperature), routing

def prepare_batch(model: Model, rollout: Rollout, version: int,
                  advantage_fn: Callable = group_advantages) -> Rollout:
    """Advantages, π_old and the routing to replay, for a rollout batch before it is split.
    ValueError if it was sampled with other weights than those of policy `version`."""
    c = model.config
    if rollout.version != version:
        raise ValueError(f"rollout of policy version {rollout.version}, but the trainer is at "
                         f"{version}: call engine.load_weights before engine.generate")
    batch = replace(rollout, advantages=advantage_fn(rollout.rewards, c.group_size))
    if c.replay == "R3":
        batch.replay = rollout.routing  # π_old and π_θ use the experts of μ_old
    if c.mini_batches > 1:  # with N = 1, the training forward is π_old and π_θ at once
        with torch.no_grad():
            old = [policy(model, part) for part in batch.split(c.per_pass)]
        batch.old_logprobs = torch.cat([logprobs for logprobs, _, _ in old])
        if c.replay == "R2":
            batch.replay = torch.cat([routing for _, _, routing in old])  # π_θ uses those of π_old
    return batch

def train_step(model: Model, optimizer: torch.optim.Optimizer, batch: Rollout,
               loss_fn: Callable = minirl_loss) -> dict:
    """One update from one mini-batch -> metrics, all of them from before the update.
    FloatingPointError, weights untouched, if the loss or its gradient is not finite."""
    optimizer.zero_grad()
    mask, mu, passes = batch.mask, batch.rollout_logprobs, []
    for part in batch.split(model.config.per_pass):
        logprobs, entropies, routing = policy(model, part)
        old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        loss, gate = loss_fn(logprobs, old, part.rollout_logprobs, part.advantages, part.mask,
                             n_sequences=len(mask), n_tokens=int(mask.sum()))
        loss.backward()
        passes.append((loss.detach()[None], logprobs.detach(), old, entropies, routing, gate))
    losses, logprobs, old, entropies, routing, gate = map(torch.cat, zip(*passes))
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not (losses.isfinite().all() and grad_norm.isfinite()):
        raise FloatingPointError(f"loss {losses.sum():.3g}, gradient norm {grad_norm:.3g}")
    optimizer.step()
    metrics = {
        "reward": batch.rewards.mean(),
        "entropy": entropies[mask].mean(),
        "mismatch_kl": kl_k3(mu, old, mask),
        "staleness_kl": kl_k3(old, logprobs, mask),
        "extreme_token_fraction": extreme_token_fraction(old, mu, mask),
        "effective_sample_size": effective_sample_size(logprobs - mu, mask),
        "routing_agreement": routing_agreement(routing, batch.routing, batch.fed),
        "clip_fraction": 1 - gate[mask].double().mean(),
        "response_length": (batch.lengths - batch.prompt_lengths).double().mean(),
        "grad_norm": grad_norm,
    }
    return {name: value.tolist() for name, value in metrics.items()}

# -------------------------------------------------------------------------------------- 7 Main

def write_aside(path: Path, write: Callable[[Path], object]):
    """A file appears whole or not at all, whatever runs beside this or cuts it short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    write(aside)
    os.replace(aside, path)

def cold_start(c: Config) -> Model:
    """Supervised learning from imperfect demonstrations, without a load-balancing loss, as in RL.
    Kept under runs/, keyed by this file and by all options before `name`, which decide it."""
    model, generator = Model(c), Generator().manual_seed(c.seed)
    options = str(asdict(c)).partition("'name'")[0]
    key = "\n".join([options, DEVICE, torch.__version__, Path(__file__).read_text()])
    path = Path("runs/cold_start", hashlib.sha256(key.encode()).hexdigest()[:16] + ".pt")
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=DEVICE))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), 0, (0.9, 0.95), weight_decay=0.1, fused=True)
    for step in (bar := tqdm(range(c.cold_start_steps), "cold start", disable=None, leave=False)):
        rise_and_fall = min(1, (step + 1) / 20, 2.5 * (1 - step / c.cold_start_steps))
        optimizer.param_groups[0]["lr"] = 4e-3 * rise_and_fall
        demos = (x.to(DEVICE) for x in demonstrations(64, c, generator))
        batch = Rollout(*demos, rollout_logprobs=None, routing=None, version=0)
        loss = -policy(model, batch)[0][batch.mask].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    write_aside(path, lambda aside: torch.save(model.state_dict(), aside))
    return model

def sample(engine: InferenceEngine, n: int, G: int, prompts: Generator, samples: Generator):
    """A graded rollout of n new prompts."""
    rollout = engine.generate(*make_prompts(n, engine.config, prompts), G, samples)
    return replace(rollout, rewards=grade(rollout.tokens, rollout.prompt_lengths, rollout.lengths))

def evaluate(model: Model) -> Rollout:
    """A response to each held-out prompt, at training precision, with native routing. Its random
    numbers are its own: scores do not disturb training, and all of them have the same prompts."""
    c, engine = model.config, InferenceEngine(model.config, model.config.train_precision)
    engine.load_weights(model, 0)
    prompts, samples = (Generator(device).manual_seed(2**40) for device in ("cpu", DEVICE))
    return sample(engine, c.eval_prompts, 1, prompts, samples)

PANELS = {"score": "score on held-out prompts", "mismatch_kl": "training-inference KL(μ_old‖π_old)",
          "reward": "training reward", "entropy": "entropy of π_θ, nats",
          "staleness_kl": "staleness KL(π_old‖π_θ)", "routing_agreement": "same experts: π_θ and μ"}

def draw(rows: list[dict], first_score: float, path: Path):
    """The six curves of a run."""
    from matplotlib.figure import Figure  # slow to import: no refusal should wait for it
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        points, kl = [(0, first_score)] if name == "score" else [], name.endswith("kl")
        points += [(row["update"], row[name]) for row in rows  # a log axis has no place for 0
                   if row[name] is not None and not (kl and row[name] == 0)]
        axes.plot(*zip(*points), marker="." if name == "score" or kl else "")
        axes.set(title=title, xlabel="update", yscale="log" if kl else "linear")
        axes.grid(alpha=0.3)
    axes.legend([f"layer {i}" for i in range(len(rows[0][name]))])
    write_aside(path, lambda aside: figure.savefig(aside, format="png", dpi=100))

def train(c: Config, resume: bool = False, loss_fn: Callable | None = None,
          advantage_fn: Callable = group_advantages):
    """A run in runs/NAME, new or on from its checkpoint. loss_fn and advantage_fn replace MiniRL's.
    Ctrl-C is obeyed after the rollout batch, and raised when everything is on disk."""
    loss_fn = loss_fn or partial(minirl_loss, clip=c.clip, length_norm=c.length_norm,
                                 importance_sampling=c.importance_sampling)
    model, folder = cold_start(c), Path("runs", c.name)
    engine = InferenceEngine(c, c.rollout_precision)
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, weight_decay=0.0, fused=True)
    prompts = Generator().manual_seed(c.seed + 1)
    samples = Generator(DEVICE).manual_seed(c.seed + 2)
    update, rows, stop, before = 0, [], [], evaluate(model)
    after = before
    if resume:
        state = torch.load(folder / "checkpoint.pt", map_location="cpu")
        update, rows = state["update"], state["rows"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        prompts.set_state(state["prompts"])
        samples.set_state(state["samples"])
    folder.mkdir(parents=True, exist_ok=resume)

    def save():
        state = {"config": asdict(c), "update": update, "rows": rows, "model": model.state_dict(),
                 "optimizer": optimizer.state_dict(), "prompts": prompts.get_state(),
                 "samples": samples.get_state()}
        write_aside(folder / "checkpoint.pt", lambda aside: torch.save(state, aside))

    save()
    (folder / "config.json").write_text(json.dumps(asdict(c), indent=2))
    log = open(folder / "metrics.jsonl", "w", buffering=1)  # a line at a time
    log.writelines(json.dumps(row) + "\n" for row in rows)  # what is done again now is left out
    print(f"{folder}: score {before.rewards.mean():.3f} before RL\n"
          "update  score  reward  entropy  KL(μ‖π)  staleness  agreement  clipped  seconds")
    bar = tqdm(total=c.updates, initial=update, disable=None, leave=False)
    default = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        while update < c.updates and not stop:
            began, n_prompts = time.perf_counter(), c.mini_batches * c.mini_batch // c.group_size
            engine.load_weights(model, update)
            rollout = sample(engine, n_prompts, c.group_size, prompts, samples)
            batch = prepare_batch(model, rollout, update, advantage_fn)
            shared = (time.perf_counter() - began) / c.mini_batches
            for part in batch.split(c.mini_batch):
                began, update = time.perf_counter(), update + 1
                metrics = train_step(model, optimizer, part, loss_fn)
                row = {"update": update, "score": None, **metrics}
                row["seconds"] = shared + time.perf_counter() - began
                row["tokens_per_second"] = int(part.lengths.sum()) / row["seconds"]
                live = "{reward:7.3f} {entropy:8.3f} {mismatch_kl:8.1e} {staleness_kl:10.1e}"
                live, agreement = live.format(**row), min(row["routing_agreement"])
                if update % c.eval_every == 0 or update == c.updates:
                    after = evaluate(model)
                    row["score"] = after.rewards.mean().item()
                    bar.write(f"{update:6} {row['score']:6.3f} {live} {agreement:10.3f} "
                              f"{row['clip_fraction']:8.4f} {row['seconds']:8.2f}")
                rows.append(row)
                log.write(json.dumps(row) + "\n")
                bar.set_postfix_str(live)
                bar.update()
            if any(row["score"] is not None for row in rows[-c.mini_batches :]):
                save()
    finally:
        signal.signal(signal.SIGINT, default)
        bar.close()
        log.close()
        if rows:
            draw(rows, before.rewards.mean().item(), folder / "curves.png")
    if stop:
        save()
    for i in range(min(3, c.eval_prompts)):
        for when, rollout in (("before", before), ("after", after)):
            text = " ".join(VOCABULARY[token] for token in rollout.tokens[i, : rollout.lengths[i]])
            print(f"{when:6} RL, reward {rollout.rewards[i]:.0f}: {text}")
    if stop:
        raise KeyboardInterrupt

def parse(argv: list[str] | None) -> tuple[Config, bool]:
    """What a command line asks for: configuration, and whether to resume. ValueError if refused."""
    def refuse(message: str):
        raise ValueError(f"{message}; --help lists the options")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--resume", metavar="NAME", help="continue runs/NAME from its checkpoint")
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "metavar": "|".join(f.metadata["choices"]) or f.type.__name__}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, **kind,
                            help=f"{f.metadata['text']} [{f.default}]")
    given = vars(parser.parse_args(argv))
    if (name := given.pop("resume")) is None:
        config = Config(**given)
        numbered = (f"run-{i}" for i in range(1, 10**6) if not Path(f"runs/run-{i}").exists())
        name = config.name or next(numbered)
        if Path("runs", name).exists():
            raise ValueError(f"--name {name}: runs/{name} exists; give another, or --resume {name}")
        return replace(config, name=name), False
    path = Path("runs", Path(name).name, "checkpoint.pt")
    if not path.exists():
        raise ValueError(f"--resume {name}: there is no {path}; start a run with --name")
    saved = torch.load(path, map_location="cpu")["config"] | {"name": path.parent.name}
    for name, value in given.items():
        if name != "updates" and value != saved[name]:
            raise ValueError(f"{flag(name)} {value}: {path} has {saved[name]}; leave that out")
    return Config(**saved | given), True

def main(argv: list[str] | None = None) -> int:
    try:
        config, resume = parse(argv)
    except ValueError as refusal:
        print(f"nano_moe_rl.py: {refusal}", file=sys.stderr)
        return 2
    run = f"runs/{config.name}"
    try:
        train(config, resume)
    except FileExistsError:
        print(f"nano_moe_rl.py: {run} was taken meanwhile; give another --name", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"stopped: {error}; the last good checkpoint is {run}/checkpoint.pt", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; if {run} exists, --resume {config.name} goes on", file=sys.stderr)
        return 130
    print(f"{run}/curves.png has the curves, {run}/metrics.jsonl the numbers")
    return 0

if __name__ == "__main__":
    sys.exit(main())
