"""Reinforcement learning on a Mixture-of-Experts language model, kept stable by routing replay.

    python nano_moe_rl.py                                           # cold start, RL, a picture
    python nano_moe_rl.py --replay none --rollout-precision int4    # turn a dial (--help) and look

The method is MiniRL (arXiv 2512.01374). A reward is for a whole response; what is trained is a
first-order approximation, a sum over tokens, that holds while two gaps between policies are small:

    π_θ / μ_old  =  (π_old / μ_old: two engines)  ×  (π_θ / π_old: stale weights)

    rollout_logprobs   log μ_old   the inference engine, when it sampled the response
    old_logprobs       log π_old   the training engine, with the same weights
    logprobs           log π_θ     the training engine, with the weights of this very step

In an MoE both gaps hide a switch: other rounding or other weights send a token to other experts.
Routing replay fixes the experts in training, to those of π_old (mode R2) or those of μ_old (R3).

Dimensions: P prompts, G responses each, B = P·G sequences, T positions, N real tokens, V symbols,
D width, H heads, K key-value heads, L layers, E experts, A active ones, F their width. Rows have
T + 1 tokens; position t is fed token t and predicts token t + 1, so all else has T columns.
"""
import argparse, copy, hashlib, json, math, os, sys, time  # noqa: E401
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
def option(default, text: str, *choices: str, low: float = 1):
    return field(default=default, metadata=dict(text=text, choices=choices, low=low))

def check(c, name: str, fine: bool, remedy: str):
    """ValueError, in one line, if the value of an option is not fine."""
    if not fine:
        raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: give {remedy}")

def check_options(c):
    """Type, choices and lowest value of every option."""
    for f in fields(c):
        value, choices, low = getattr(c, f.name), f.metadata["choices"], f.metadata["low"]
        fine = value in choices if choices else f.type in (str, bool) or low <= value < 1e9
        check(c, f.name, type(value) is f.type and fine, " or ".join(choices) or f"{low} or more")

@dataclass(frozen=True)
class Config:
    """Every dial of a run; the command line is made from it. ValueError, one line, if refused."""
    seed: int = option(0, "one seed is one cold start and one order of prompts", low=0)
    width: int = option(64, "D, 32 or 64 times the heads")
    layers: int = option(3, "L")
    heads: int = option(2, "H")
    kv_heads: int = option(1, "K")
    experts: int = option(16, "E")
    top_k: int = option(2, "A; a single weight is always 1: no gradient for the router")
    expert_width: int = option(64, "F, a multiple of 8")
    teacher: str = option("brief", "of the cold start", "brief", "equation", "restating")
    min_digits: int = option(3, "in the shortest prompt")
    max_digits: int = option(6, "in the longest prompt, at most 10")
    max_response: int = option(22, "tokens, after which a response is cut off")
    cold_start_steps: int = option(600, "supervised updates before RL", low=0)
    temperature: float = option(1.0, "of the distribution that is sampled, and of π", low=1e-5)
    train_precision: str = option("fp32", "of π; the weights stay fp32", "fp32", "bf16")
    name: str = option("", "folder under runs/; left out, the next free run-N")
    updates: int = option(300, "gradient updates of RL")
    mini_batch: int = option(256, "responses an update")
    mini_batches: int = option(4, "N, updates a rollout batch: how far off-policy")
    group_size: int = option(8, "G, responses to one prompt")
    micro_batch: int = option(256, "responses a forward pass in training, at most")
    lr: float = option(3e-4, "learning rate of RL", low=1e-9)
    warmup: int = option(20, "updates in which it rises to that")
    replay: str = option("R3", "whose experts π_old and π_θ use", "none", "R2", "R3")
    clip: bool = option(True, "drop tokens that π_θ/π_old puts outside the trust region")
    importance_sampling: str = option("token", "in the loss", "token", "sequence", "none")
    length_norm: bool = option(False, "divide a response's loss by its length")
    rollout_precision: str = option("fp8", "of μ", "fp32", "bf16", "fp8", "int4")
    eval_every: int = option(20, "updates between scores")
    eval_prompts: int = option(512, "held-out prompts in a score")

    def __post_init__(c):
        check_options(c)
        for name, fine, remedy in (
                ("width", c.width / c.heads in (32, 64), f"32 or 64 times --heads {c.heads}"),
                ("kv_heads", c.heads % c.kv_heads == 0, f"a divisor of --heads {c.heads}"),
                ("top_k", c.top_k <= c.experts, f"at most --experts {c.experts}"),
                ("expert_width", c.expert_width % 8 == 0, "a multiple of 8"),
                ("max_digits", c.min_digits <= c.max_digits <= 10, f"{c.min_digits} to 10"),
                ("updates", c.updates % c.mini_batches == 0, f"a multiple of {c.mini_batches}"),
                ("group_size", c.mini_batch % c.group_size == 0, f"a divisor of {c.mini_batch}"),
                ("name", Path(c.name).name == c.name not in ("..", "cold_start"), "one without /")):
            check(c, name, fine, remedy)

    head_dim = property(lambda c: c.width // c.heads)
    context = property(lambda c: c.max_digits + 1 + c.max_response)

# -------------------------------------------------------------------------------------- 2 Task
# "3 1 4 =" asks for the running sum modulo 10, step by step, and then the answer. A step names the
# next digit and writes the new sum: "3 3 1 4 4 8 : 8 $". Only the answer is graded, one 0 or 1.
# The digits of a prompt differ: a small model finds its place by looking up the one it named last.
VOCABULARY = "0123456789=:$"
ASK, ANSWER, EOS = (VOCABULARY.index(symbol) for symbol in "=:$")
TEACHERS = {  # name: (chance of a slip, how a step is written: digit, new sum, previous sum)
    "brief": (0.22, "ds"),
    "equation": (0.25, "d=s"),
    "restating": (0.28, "pds")}

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
    sums = (prompts + slips).cumsum(1)
    parts = {"d": prompts, "s": sums % 10, "p": (sums - prompts - slips) % 10, "=": 0 * sums + ASK}
    steps = torch.stack([parts[part] for part in step], 2)  # (n, digits, symbols of a step)
    rows = [torch.cat([prompts[i, :m], steps[i, :m - 1].flatten(),
                       torch.tensor([ANSWER, sums[i, m - 2] % 10, EOS])])[: m + c.max_response]
            for i, m in enumerate(prompt_lengths.tolist())]
    return nn.utils.rnn.pad_sequence(rows, True), prompt_lengths, torch.tensor([*map(len, rows)])

def grade(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Rewards (B,): 1.0 where the response ends in ANSWER, the right digit, EOS, else 0.0."""
    rows = zip(tokens.tolist(), prompt_lengths.tolist(), lengths.tolist())
    return torch.tensor([float(row[start:end][-3:] == [ANSWER, sum(row[: start - 1]) % 10, EOS])
                         for row, start, end in rows], device=tokens.device)

# ------------------------------------------------------------------------------------- 3 Model
# Architecture and parameter names are Qwen3-MoE's: transformers loads these weights as they are.
# p holds the parameters of one layer; product is what engines do differently, the numerics.

def product(x, weight, offsets=None, bf16=False):
    """x (..., in), weight (out, in) -> (..., out). With offsets (E,) and weight (E, out, in),
    expert e has the rows of x (M, in) before offsets[e]. bf16: all rounded, but sums in fp32."""
    if bf16:  # a CPU is faster with the same numbers in fp32, where their products are exact
        unit = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        x, weight = x.bfloat16().to(unit), weight.bfloat16().to(unit)
    y = F.linear(x, weight) if offsets is None else F.grouped_mm(x, weight.mT, offs=offsets)
    return y.bfloat16().float() if bf16 else y

def rms_norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * weight.to(x.dtype)

def distinct(tokens, mask, replay=None, start=0):
    """Real tokens with the same tokens and replayed routes up to and with their own are one
    computation, such as a group's prompt. Rows with a past of start > 0 tokens share nothing.
    -> first (N,), where each is among B·T positions; place (B, T), which of the N a position is."""
    columns = torch.cat([tokens[..., None]] + ([] if replay is None else [replay.flatten(2)]), 2)
    factors = torch.randint(2**62, columns.shape[1:], generator=Generator().manual_seed(0))
    own = torch.arange(len(tokens), device=DEVICE)[:, None] * (start > 0)
    pasts = own + ((columns + 1) * factors.to(DEVICE)).sum(2).cumsum(1)  # 62-bit fingerprints
    _, ids, counts = pasts[mask].unique(return_inverse=True, return_counts=True)
    first = mask.flatten().nonzero()[ids.argsort(stable=True)[counts.cumsum(0) - counts], 0]
    first, order = first.sort()  # not by fingerprint: sums should not depend on it
    return first, torch.zeros_like(tokens).masked_scatter(mask, order.argsort()[ids])

def attend(p, x, first, place, rotary, cache, product):
    """x (N, D) plus its causal grouped-query attention; rotary (2, N, 1, head_dim). A cache
    (2, B, K, T, head_dim) takes keys and values of T positions, of which x has the last S."""
    (B, S), d, flat = place.shape, rotary.shape[-1], place.flatten()
    h, p = rms_norm(x, p.input_layernorm.weight), p.self_attn
    q, k, v = (product(h, w.weight).unflatten(1, (-1, d)) for w in (p.q_proj, p.k_proj, p.v_proj))
    q, k = rms_norm(q, p.q_norm.weight), rms_norm(k, p.k_norm.weight)
    q, k = (torch.addcmul(y * rotary[0], y.roll(d // 2, -1), rotary[1]) for y in (q, k))
    q, k, v = (y.index_select(0, flat).view(B, S, -1, d).transpose(1, 2) for y in (q, k, v))
    if cache is not None:
        cache[0, :, :, -S:], cache[1, :, :, -S:] = k, v
        k, v = cache
    q, k, v = q.float(), k.float(), v.float()  # S > 1 is never fed onto a past
    out = F.scaled_dot_product_attention(q, k, v, is_causal=S > 1, enable_gqa=True)
    out = rearrange(out, "b h s d -> (b s) (h d)").index_select(0, first)
    return x + product(out.to(x.dtype), p.o_proj.weight)

def moe(p, x, A, replay, product):
    """x (N, D) plus its mixture of SwiGLU experts -> (N, D), live top-k (N, A). replay (N, A)."""
    h = rms_norm(x, p.post_attention_layernorm.weight)
    router_logits = p.mlp.gate(h.float())  # never quantised
    live = router_logits.topk(A).indices
    # All of routing replay: the selection is given, the weights stay live. They come from unmasked
    # logits, so a replayed expert has its gradient where the router would no longer choose it.
    experts = live if replay is None else replay
    weights = router_logits.gather(-1, experts).softmax(-1)
    # A token is copied once for each of its experts and the copies are sorted by expert: each
    # expert works on one block of rows, and one that nobody chose costs nothing.
    order = experts.flatten().argsort(stable=True)
    rows = order // A
    offsets = experts.flatten().bincount(minlength=router_logits.shape[1]).cumsum(0).to(torch.int32)
    gate, up = product(h.index_select(0, rows), p.mlp.experts.gate_up_proj, offsets).chunk(2, -1)
    hidden = F.silu(gate) * (up * weights.to(x.dtype).flatten().index_select(0, order)[:, None])
    return x.index_add(0, rows, product(hidden, p.mlp.experts.down_proj, offsets)), live

class Model(nn.Module):
    """The network of both engines. As it is, without a cache, it is the training engine."""
    def __init__(self, c: Config):
        super().__init__()
        self.config, self.dtype = c, torch.float32  # of what passes between products
        self.product = partial(product, bf16=c.train_precision == "bf16")
        D, F, d, norm, blank = c.width, c.expert_width, c.head_dim, nn.RMSNorm, nn.utils.skip_init
        linear = partial(blank, nn.Linear, bias=False)  # leaves the global random state alone
        self.embed_tokens, self.norm = blank(nn.Embedding, len(VOCABULARY), D), norm(D)
        self.lm_head = linear(D, len(VOCABULARY))
        self.layers = nn.ModuleList(nn.ModuleDict({
            "input_layernorm": norm(D), "post_attention_layernorm": norm(D),
            "self_attn": nn.ModuleDict({
                "q_proj": linear(D, D), "k_proj": linear(D, c.kv_heads * d), "q_norm": norm(d),
                "o_proj": linear(D, D), "v_proj": linear(D, c.kv_heads * d), "k_norm": norm(d)}),
            "mlp": nn.ModuleDict({"gate": linear(D, c.experts), "experts": nn.ParameterDict({
                "gate_up_proj": torch.empty(c.experts, 2 * F, D),
                "down_proj": torch.empty(c.experts, D, F)})})}) for _ in range(c.layers))
        generator = Generator().manual_seed(c.seed)
        for matrix in (p for p in self.parameters() if p.dim() > 1):
            nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5, generator=generator)
        frequency = 1e4 ** (-torch.arange(0, d, 2) / d)  # of rotary positions; the sin is signed
        angle = torch.arange(c.context)[:, None, None] * torch.cat([-frequency, frequency])
        self.rotary = torch.stack([angle.cos(), angle.sin()]).to(DEVICE)
        self.to(DEVICE)

    def forward(self, tokens, replay=None, mask=None, cache=None):
        """tokens (B, T), replay (B, T, L, A), mask (B, T) or (B, 1), False on padding at the right
        -> logits (B, T, V), routing (B, T, L, A), always live. Tokens are all positions of a cache
        (L, 2, B, K, positions, head_dim), or its last. ValueError if a route is missing."""
        c, (B, T), routing, routes = self.config, tokens.shape, [], [None] * self.config.layers
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.expand(B, T)
        start, cache = (0, [None] * c.layers) if cache is None else (cache.shape[-2] - T, cache)
        assert start == 0 or T == 1, "attention has no mask for several tokens after a past"
        first, place = distinct(tokens, mask, replay, start)
        rotary = self.rotary[:, start + first % T].to(self.dtype)
        if replay is not None:
            twice = (replay.sort(-1).values.diff() == 0).any(-1)
            bad = (twice | ((replay < 0) | (replay >= c.experts)).any(-1))[mask]
            if bad.any() or replay.shape != (B, T, c.layers, c.top_k):
                raise ValueError(f"replay of shape {tuple(replay.shape)} lacks a valid route for "
                                 f"{bad.sum()} of {bad.numel()} (token, layer) pairs")
            routes = replay.flatten(0, 1)[first].long().unbind(1)
        x = self.embed_tokens(tokens.flatten()[first]).to(self.dtype)
        for i, p in enumerate(self.layers):
            x = attend(p, x, first, place, rotary, cache[i], self.product)
            x, live = moe(p, x, c.top_k, routes[i], self.product)
            routing.append(live.to(torch.int16))
        logits = self.lm_head(rms_norm(x, self.norm.weight).float()).to(self.dtype).float()
        routing = torch.stack(routing, 1)[place].masked_fill(~mask[..., None, None], -1)
        return logits.index_select(0, place.flatten()).view(B, T, -1), routing

# ----------------------------------------------------------------------------------- 4 Rollout
@dataclass
class Rollout:
    """Sampled responses. What belongs together travels together."""
    tokens: Tensor  # (B, T + 1) prompt, response, then anything
    prompt_lengths: Tensor  # (B,)
    lengths: Tensor  # (B,) prompt and response
    rollout_logprobs: Tensor | None = None  # (B, T) log μ of token t + 1, 0 outside the response
    routing: Tensor | None = None  # (B, T, L, A) the experts of μ
    version: int = 0  # updates that μ's weights had seen, where an engine can lag: in scaled/
    rewards: Tensor | None = None  # (B,)
    advantages: Tensor | None = None  # (B,) this and the next two come from prepare_batch
    old_logprobs: Tensor | None = None  # (B, T) log π_old; None: what the training forward says
    replay: Tensor | None = None  # (B, T, L, A) the experts to train with; None: the live ones
    # (B, T) masks: where a token is fed, all but a sequence's last; where a response's is predicted
    fed = property(lambda r: torch.arange(1, r.tokens.shape[1]).to(r.lengths) < r.lengths[:, None])
    mask = property(lambda r: r.fed & (r.fed.cumsum(1) >= r.prompt_lengths[:, None]))

    def split(self, size: int) -> list["Rollout"]:
        """Parts of `size` sequences, in order."""
        parts = {name: x.split(size) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return [replace(self, **dict(zip(parts, part))) for part in zip(*parts.values())]

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
    """The same policy in other numerics, token by token, with a KV cache, on a rounded copy of the
    weights as they are now: a synchronisation is a new engine. It models the numbers of a quantised
    engine, not its speed. Projections and experts quantise weights and activations, and sum in fp32
    (W8A8); router, embedding, head and all results are only rounded to bf16 (fp32: nothing is)."""
    def __init__(self, model: Model, precision: str):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.dtype = dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.model.product = lambda x, *w: product(quantise(x.float(), precision), *w).to(x.dtype)
        for name, weight in self.model.named_parameters():
            weight.copy_(quantise(weight, precision) if "_proj" in name else weight.to(dtype))

    def generate(self, prompts, prompt_lengths, G, generator, eos=EOS) -> Rollout:
        """Samples G responses to each of P right-padded prompts (P, columns), prompt_lengths (P,).
        The columns that all prompts fill are fed at once, then one by one: the prompt's own token
        while it lasts, then a sample. FloatingPointError if the weights give no distribution."""
        c, fed, t = self.model.config, 0, int(prompt_lengths.min())
        tokens = F.pad(prompts.to(DEVICE), (0, c.max_response)).repeat_interleave(G, 0)
        prompt_lengths = prompt_lengths.to(DEVICE).repeat_interleave(G)
        lengths = prompt_lengths + c.max_response  # cut off there, unless EOS comes first
        cache = torch.zeros(c.layers, 2, len(tokens), c.kv_heads, c.context, c.head_dim,
                            device=DEVICE, dtype=self.model.dtype)
        rollout_logprobs, routing = [cache.new_zeros(len(tokens), t - 1).float()], []
        while (going := t < lengths).any():  # what is finished is padding, which meets no expert
            logits, routes = self.model(tokens[:, fed:t], None, going[:, None], cache[..., :t, :])
            logprobs = (logits[:, -1] / c.temperature).log_softmax(-1)  # what is sampled from
            if not logprobs.isfinite().all():
                raise FloatingPointError("log-probabilities of the rollout are not finite")
            sampled = torch.multinomial(logprobs.exp(), 1, generator=generator)
            sampling = going & (prompt_lengths <= t)
            tokens[:, t] = sampled[:, 0].where(sampling, tokens[:, t])
            lengths[sampling & (tokens[:, t] == eos)] = t + 1
            rollout_logprobs.append(logprobs.gather(1, sampled) * sampling[:, None])
            routing.append(routes)
            fed, t = t, t + 1
        return Rollout(tokens[:, :t], prompt_lengths, lengths,
                       torch.cat(rollout_logprobs, 1), torch.cat(routing, 1))

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
    Being in its own mean leaves a response 1 - 1/G of its gradient."""
    means = reduce(rewards, "(p g) -> p", "mean", g=group_size)
    return rewards - means.repeat_interleave(group_size)

def importance_weights(logprobs, old_logprobs, rollout_logprobs, mask, kind="token",
                       token_cap=5.0, sequence_cap=2.0):
    """The constant that weighs each token's gradient, (B, T), 0 outside the mask.
    token     min(π_θ/μ_old, 5), the cap of arXiv 2512.01374
    sequence  min(Π_t π_θ/μ_old, 2), the product over the response; 2 is the usual cap
    none      min(π_θ/π_old, 5): only the discrepancy π_old/μ_old is dropped; 1 on-policy"""
    anchor = old_logprobs if kind == "none" else rollout_logprobs
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
                n_tokens, clip=True, importance_sampling="token", length_norm=False):
    """MiniRL (arXiv 2512.01374, equation 7): sum over tokens, mean over responses. advantages (B,).
    n_sequences and n_tokens count the whole mini-batch, of which this may be a part; MiniRL divides
    by the first, objectives that average over tokens by the second. -> loss (), gate (B, T)."""
    logprobs, old_logprobs, rollout_logprobs = (  # outside the mask even NaN has no influence
        x.masked_fill(~mask, 0.0) for x in (logprobs, old_logprobs, rollout_logprobs))
    weight = importance_weights(logprobs, old_logprobs, rollout_logprobs, mask, importance_sampling)
    gate = clip_gate(logprobs, old_logprobs, advantages) if clip else torch.ones_like(mask)
    objective = weight * gate * advantages[:, None] * logprobs
    if length_norm:
        objective = objective / mask.sum(1, keepdim=True).clamp(min=1)
    return -objective.sum() / n_sequences, gate

def kl_k1(sampled, other, mask):
    """KL(p‖q) a token, from log p and log q of tokens sampled from p: the mean of log p - log q."""
    return (sampled.double() - other.double())[mask].mean()

def kl_k3(sampled, other, mask):
    """The same by q/p - 1 - log q/p, never negative; fp64 expm1 keeps the digits near zero."""
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

# -------------------------------------------------------------------------------- 6 Train step
def policy(model, batch: Rollout):
    """π on a batch -> logprobs (B, T), entropies (B, T), live routing (B, T, L, A)."""
    logits, routing = model(batch.tokens[:, :-1], batch.replay, batch.fed)
    logprobs = token_logprobs(logits, batch.tokens[:, 1:], model.config.temperature)
    return logprobs, entropy(logits.detach(), model.config.temperature), routing

def prepare_batch(model, rollout: Rollout, advantage_fn=group_advantages) -> Rollout:
    """Advantages, π_old and the routing to replay, of a whole rollout batch before its updates."""
    c = model.config
    batch = replace(rollout, advantages=advantage_fn(rollout.rewards, c.group_size))
    if c.replay == "R3":
        batch.replay = rollout.routing  # π_old and π_θ use the experts of μ_old
    if c.mini_batches > 1:  # with N = 1, the training forward is π_old and π_θ at once
        with torch.no_grad():
            old = [policy(model, part) for mini_batch in batch.split(c.mini_batch)
                   for part in mini_batch.split(c.micro_batch)]  # the same parts as in train_step
        batch.old_logprobs = torch.cat([logprobs for logprobs, _, _ in old])
        if c.replay == "R2":
            batch.replay = torch.cat([routing for _, _, routing in old])  # π_θ uses those of π_old
    return batch

def adamw(model: Model, lr: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), 1e-8, weight_decay, fused=True)

def train_step(model, optimizer, batch: Rollout, loss_fn=minirl_loss) -> dict:
    """One update from one mini-batch -> metrics, all of them from before the update.
    FloatingPointError, weights kept, if loss or gradient is not finite."""
    mask, mu, passes = batch.mask, batch.rollout_logprobs, []
    optimizer.zero_grad()
    for part in batch.split(model.config.micro_batch):
        logprobs, entropies, routing = policy(model, part)
        old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        loss, gate = loss_fn(logprobs, old, part.rollout_logprobs, part.advantages, part.mask,
                             n_sequences=len(mask), n_tokens=int(mask.sum()))
        loss.backward()
        passes.append((loss.detach()[None], logprobs.detach(), old, entropies, routing, gate))
    losses, logprobs, old, entropies, routing, gate = map(torch.cat, zip(*passes))
    loss, norm = losses.sum(), nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not (loss.isfinite() and norm.isfinite()):
        raise FloatingPointError(f"loss {loss:.3g}, gradient norm {norm:.3g}")
    optimizer.step()
    metrics = dict(
        reward=batch.rewards.mean(), extreme_token_fraction=extreme_token_fraction(old, mu, mask),
        mismatch_kl=kl_k3(mu, old, mask), staleness_kl=kl_k3(old, logprobs, mask),
        effective_sample_size=effective_sample_size(logprobs - mu, mask),
        routing_agreement=routing_agreement(routing, batch.routing, batch.fed),
        clip_fraction=1 - gate[mask].double().mean(), entropy=entropies[mask].mean(),
        response_length=(batch.lengths - batch.prompt_lengths).double().mean(), grad_norm=norm)
    return {name: value.tolist() for name, value in metrics.items()}

# -------------------------------------------------------------------------------------- 7 Main
def write_aside(path: Path, write):
    """A file appears whole or not at all, whatever runs beside this or cuts it short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    write(aside)
    os.replace(aside, path)

def cold_start(c: Config) -> Model:
    """Supervised learning from imperfect demonstrations, without a load-balancing loss, as in RL.
    Kept under runs/, keyed by this file and by all options before `name`, which decide it."""
    model, generator, n = Model(c), Generator().manual_seed(c.seed), c.cold_start_steps
    options, source = str(asdict(c)).partition("'name'")[0], Path(__file__).read_text()
    key = hashlib.sha256((options + DEVICE + torch.__version__ + source).encode()).hexdigest()[:16]
    path, optimizer = Path("runs/cold_start", key + ".pt"), adamw(model, 4e-3, weight_decay=0.1)
    if not path.exists():
        for step in tqdm(range(n), "cold start", disable=None, leave=False):
            optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20, 2.5 * (1 - step / n))
            batch = Rollout(*(x.to(DEVICE) for x in demonstrations(64, c, generator)))
            loss = -policy(model, batch)[0][batch.mask].mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
        write_aside(path, partial(torch.save, model.state_dict()))
    model.load_state_dict(torch.load(path, map_location=DEVICE))
    return model

def sample(engine: InferenceEngine, n: int, G: int, seed: int) -> Rollout:
    """A graded rollout of n prompts. Prompts and samples have streams of random numbers that the
    seed decides alone: methods get the same prompts, and a resumed run has nothing to restore."""
    prompts = make_prompts(n, engine.model.config, Generator().manual_seed(2 * seed))
    rollout = engine.generate(*prompts, G, Generator(DEVICE).manual_seed(2 * seed + 1))
    return replace(rollout, rewards=grade(rollout.tokens, rollout.prompt_lengths, rollout.lengths))

def evaluate(model: Model) -> Rollout:
    """A response to each of the held-out prompts, at training precision and by native routing."""
    engine = InferenceEngine(model, model.config.train_precision)
    return sample(engine, model.config.eval_prompts, 1, seed=2**61)

def draw(rows: list[dict], folder: Path):
    """The six curves of a run."""
    names = "score", "mismatch_kl", "reward", "entropy", "staleness_kl", "routing_agreement"
    titles = ("score on held-out prompts", "training-inference KL(μ_old‖π_old)", "training reward",
              "entropy of π_θ, nats", "staleness KL(π_old‖π_θ)", "same experts: π_θ and μ")
    from matplotlib.figure import Figure  # slow to import: no refusal should wait for it
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, name, title in zip(figure.subplots(2, 3).flat, names, titles):
        kl = name.endswith("kl")  # a log axis has no place for 0, the first mini-batch's staleness
        points = [(row["update"], row[name]) for row in rows
                  if row.get(name) not in (None, 0 if kl else None)]
        axes.plot(*zip(*points), marker="." if name == "score" else "")
        axes.set(title=title, xlabel="update", yscale="log" if kl else "linear")
        axes.grid(alpha=0.3)
    axes.legend([f"layer {i}" for i in range(len(points[0][1]))])
    write_aside(folder / "curves.png", partial(figure.savefig, format="png", dpi=100))

def learn(model, optimizer, rows: list[dict], loss_fn=None, advantage_fn=group_advantages):
    """RL from len(rows) updates on, a rollout batch at a time: appends a row of metrics for each
    update; yields {} first, then the last row after a batch. The two functions replace MiniRL's."""
    c = model.config
    loss_fn = loss_fn or partial(minirl_loss, clip=c.clip, length_norm=c.length_norm,
                                 importance_sampling=c.importance_sampling)
    n_prompts = c.mini_batches * c.mini_batch // c.group_size
    yield {}
    while len(rows) < c.updates:
        began, start = time.perf_counter(), len(rows)
        engine = InferenceEngine(model, c.rollout_precision)  # weight synchronisation
        rollout = sample(engine, n_prompts, c.group_size, seed=c.seed * 10**9 + start)
        batch = prepare_batch(model, rollout, advantage_fn)
        for part in batch.split(c.mini_batch):
            optimizer.param_groups[0]["lr"] = c.lr * min(1, (len(rows) + 1) / c.warmup)
            metrics = train_step(model, optimizer, part, loss_fn)
            rows.append({"update": len(rows) + 1, "score": None} | metrics)
        seconds, tokens = time.perf_counter() - began, int(batch.lengths.sum())
        for row in rows[start:]:
            row |= {"seconds": seconds / c.mini_batches, "tokens_per_second": tokens / seconds}
        if len(rows) % c.eval_every < c.mini_batches or len(rows) == c.updates:
            rows[-1]["score"] = evaluate(model).rewards.mean().item()
        yield rows[-1]

def train(c: Config, **functions):
    """A run in runs/NAME, new or resumed, saved after each rollout batch; functions go to learn."""
    folder, rows, text = Path("runs", c.name), [], json.dumps(asdict(c), indent=2)
    write_aside(folder / "config.json", partial(Path.write_text, data=text))
    model = cold_start(c)
    optimizer, before = adamw(model, c.lr), evaluate(model)
    if (folder / "checkpoint.pt").exists():
        state = torch.load(folder / "checkpoint.pt", map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rows = state["rows"]
    try:
        with tqdm(total=c.updates, initial=len(rows), disable=None, leave=False) as bar:
            for row in learn(model, optimizer, rows, **functions):
                state = {"config": asdict(c), "rows": rows, "model": model.state_dict(),
                         "optimizer": optimizer.state_dict()}
                write_aside(folder / "checkpoint.pt", partial(torch.save, state))
                text = "".join(json.dumps(row) + "\n" for row in rows)
                write_aside(folder / "metrics.jsonl", partial(Path.write_text, data=text))
                bar.set_postfix({k: row[k] for k in ("reward", "mismatch_kl") if row})
                bar.update(len(rows) - bar.n)
    finally:
        if rows:
            draw([{"update": 0, "score": before.rewards.mean().item()}] + rows, folder)
    for when, rollout in (("before", before), ("after", evaluate(model))):
        print(f"score {rollout.rewards.mean():.3f} {when} RL on held-out prompts, such as:")
        for tokens, n, reward in list(zip(rollout.tokens, rollout.lengths, rollout.rewards))[:3]:
            print(f"  reward {reward:.0f}: {' '.join(VOCABULARY[token] for token in tokens[:n])}")
    print(f"{folder}/curves.png has the curves, metrics.jsonl beside it the numbers")

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
    """Exit code 0, or 1 for a run that failed; SystemExit 2 for one that was refused."""
    parser = command_line(Config, __doc__.split("\n")[0])
    parser.add_argument("--resume", metavar="NAME", help="continue runs/NAME from its checkpoint")
    given = vars(parser.parse_args(argv))
    try:
        if (resume := given.pop("resume", None)) is not None:
            path = Path("runs", resume, "checkpoint.pt")
            if not path.exists() or given.keys() - {"updates"}:
                raise ValueError(f"--resume: needs {path} and takes all options from it, of which "
                                 "only --updates can change; start a run with --name")
            given = torch.load(path, map_location="cpu")["config"] | given | {"name": resume}
        c, names = Config(**given), (f"run-{i}" for i in range(1, 10**6))
        c = c if c.name else replace(c, name=next(n for n in names if not Path("runs", n).exists()))
        if Path("runs", c.name).exists() and resume is None:
            raise ValueError(f"--name {c.name}: is taken; give another, or --resume {c.name}")
    except ValueError as refusal:
        parser.error(str(refusal))
    try:  # a ValueError from here on is a bug, and shows where it is
        train(c)
    except (FloatingPointError, KeyboardInterrupt) as reason:
        print(f"stopped by {reason or 'Ctrl-C'}; --resume {c.name} goes on from the last good "
              f"checkpoint, runs/{c.name}/checkpoint.pt (none before RL)", file=sys.stderr)
        return 130 if isinstance(reason, KeyboardInterrupt) else 1
    return 0

if __name__ == "__main__":
    sys.exit(main())
