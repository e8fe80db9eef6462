"""How long a run takes: seconds an update, phase by phase, from stated rates. A measured run
replaces them (rates.py). Each phase is a formula; the rates are those of Machine, and none of
the efficiencies among them has been measured.

p and r are the mean tokens of a prompt and of a response, n the responses of a rollout batch that
one engine samples, W the number of ranks, s the itemsize of train_precision."""

from dataclasses import dataclass, field
from math import ceil
from types import MappingProxyType

from scaled.config import Config
from scaled.machine import Machine
from scaled.memory import Memory
from scaled.sizes import Sizes, count, shard

# vLLM's share of time for capturing routes, which scaled does in every mode: 3 to 3.5 % (R3 paper,
# arXiv 2510.11370)
CAPTURE = 1.035


@dataclass(frozen=True)
class Seconds:
    c: Config
    m: Machine
    s: Sizes
    factors: dict = field(default_factory=dict)  # measured / stated, by phase

    like = MappingProxyType({"old": "train", "score": "rollout"})

    memory = property(lambda t: Memory(t.c, t.m, t.s))
    host = property(lambda t: t.m.facts.host_gb_s * 1e9 * t.m.link_efficiency)  # bytes a second
    rows = property(lambda t: t.c.prompts * t.c.group_size)  # of an update
    tokens = property(lambda t: t.rows * sum(t.memory.lengths))  # of an update

    # -------------------------------------------------------------------------------- training
    @property
    def forward_flops(t) -> float:
        """Of one token: 2 for each active parameter but the embedding's (at most: in training the
        head is asked for response tokens only), and 4 · width of the
        queries · (p + r) / 2 in each layer for attention, which looks half of a row back (both:
        arXiv 2001.08361, section 2.1)."""
        context = sum(t.memory.lengths) / 2
        return (2 * (t.s.active - t.s.vocabulary * t.s.width)
                + 4 * context * sum(layer.queries for layer in t.s.layers))

    @property
    def passes(t) -> int:
        """Forward passes of a rank in an update: as many mean rows as token_budget holds in each
        (batches.py)."""
        rows = t.rows // t.m.gpus
        return ceil(rows / max(1, int(t.c.token_budget // sum(t.memory.lengths))))

    def computing(t, forwards: float) -> float:
        """tokens · flops · forwards / (W · rate · train_efficiency)."""
        rate = t.m.peak(t.c.train_precision) * t.m.train_efficiency
        return t.tokens * t.forward_flops * forwards / (t.m.gpus * rate)

    def gathering(t, itemsizes: int) -> float:
        """passes · itemsizes · parameters, padded, · (W - 1) / W / link."""
        padded = shard(t.s.shapes, t.m.gpus) * (t.m.gpus - 1)
        return t.passes * itemsizes * padded / t.m.link

    def over_host(t, itemsizes: int) -> float:
        """With cpu_offload, passes · itemsizes · a shard / link to the host; not overlapped."""
        own = shard(t.s.shapes, t.m.gpus) if t.c.cpu_offload else 0
        return t.passes * itemsizes * own / t.host

    def old(t) -> float:
        """A forward pass, unless N = 1: the slower of computing and of gathering s bytes a
        parameter; with cpu_offload also 4 bytes of each shard to the GPU."""
        if t.c.mini_batches == 1:
            return 0.0
        s = t.memory.itemsize
        return max(t.computing(1), t.gathering(s)) + t.over_host(4)

    def train(t) -> float:
        """The slower of computing, 3 forwards, 4 where layers are recomputed, and of gathering
        weights twice and reducing fp32 gradients, 2 · s + 4 bytes a parameter. With cpu_offload
        also 12 bytes of each shard over the link to the host. Then AdamW: it reads 16 bytes a
        parameter and writes 12, in the memory where they are."""
        s, own = t.memory.itemsize, shard(t.s.shapes, t.m.gpus)
        forwards = 4 if t.c.gradient_checkpointing else 3
        adam = 28 * own / (t.host if t.c.cpu_offload else t.m.facts.hbm_tb_s * 1e12)
        return max(t.computing(forwards), t.gathering(2 * s + 4)) + t.over_host(12) + adam

    # -------------------------------------------------------------------------------- sampling
    def step(t, running: float) -> float:
        """One token for each of `running` responses of an engine: the slower of reading weights
        and cache and of multiplying; with tensor_parallel two all-reduces a layer, reduce_us and
        the bytes of D bf16 numbers a token over NVLink, twice; and step_ms. A layer reads
        E · (1 - (1 - A / E)^running) of its experts, if tokens are spread evenly."""
        c, m, s, (p, r) = t.c, t.m, t.s, t.memory.lengths
        experts = count(s.experts)
        hit = 1 - (1 - s.top_k / s.n_experts) ** running
        rest = s.total - experts - s.vocabulary * s.width  # of the embedding a row is read
        read = s.bytes_in(c.rollout_precision, experts * hit, rest)
        read += running * (p + r / 2) * s.cache_bytes
        work = running * t.forward_flops
        gpu = max(read / (m.facts.hbm_tb_s * 1e12), work / m.peak(c.rollout_precision))
        reduced = 2 * 2 * running * s.width / (m.facts.nvlink_gb_s * 1e9 * m.link_efficiency)
        between = 2 * len(s.layers) * (m.reduce_us / 1e6 + reduced) * (c.tensor_parallel > 1)
        return gpu / (c.tensor_parallel * m.rollout_efficiency) + between + m.step_ms / 1e3

    def running(t, sequences: float) -> float:
        """Responses of an engine at once: vLLM's default of 1024, 256 on an A100 or below 70 GiB
        (vllm, EngineArgs.get_batch_defaults), or as many of mean length as its cache holds."""
        most = 256 if t.m.gpu == "a100" or t.m.facts.gib < 70 else 1024
        return max(1.0, min(sequences, most, t.memory.cached_tokens / sum(t.memory.lengths)))

    def sampling(t, sequences: float, groups: float) -> float:
        """Prompts once a group, 2 flops for each active parameter; then steps: r · n / running
        for those that run, and max_response - r until the longest response, which runs to the
        limit, has ended. In a step n · r / steps responses run on average."""
        if not sequences:
            return 0.0
        c, m, (p, r) = t.c, t.m, t.memory.lengths
        rate = m.peak(c.rollout_precision) * m.rollout_efficiency * c.tensor_parallel
        prompts = groups * p * t.forward_flops / rate
        steps = r * sequences / t.running(sequences) + c.max_response - r
        return CAPTURE * (prompts + steps * t.step(sequences * r / steps))

    def rollout(t) -> float:
        """sampling of n responses, for N updates."""
        n = t.memory.sequences
        return t.sampling(n, n / t.c.group_size) / t.c.mini_batches

    def reward(t) -> float:
        """n · reward_ms: one rank of an engine grades for all, one response after the other."""
        return t.memory.sequences * t.m.reward_ms / 1e3 / t.c.mini_batches

    def sync(t) -> float:
        """For N updates: all parameters in fp32 to each GPU, 4 bytes · (W - 1) / W over the link;
        tensor_ms for each tensor of the checkpoint; 24 bytes of each shard over the link to the
        host, there and back, or with cpu_offload 4."""
        m, own = t.m, shard(t.s.shapes, t.m.gpus)
        gathered = 4 * own * (m.gpus - 1) / m.link
        moved = (4 if t.c.cpu_offload else 24) * own / t.host
        return (gathered + t.s.published_tensors * m.tensor_ms / 1e3 + moved) / t.c.mini_batches

    # ------------------------------------------------------------------------------ now and then
    def score(t) -> float:
        """sampling for eval_prompts · eval_samples, every eval_every updates."""
        n = (t.m.eval_prompts if t.c.eval_data else 0) * t.c.tensor_parallel / t.m.gpus
        return t.sampling(n * t.c.eval_samples, n) / t.c.eval_every

    def save(t) -> float:
        """12 bytes a parameter, written and read again for their SHA-256, by all nodes at
        disk_gb_s each, every checkpoint_every updates."""
        return 24 * t.s.total / (t.m.nodes * t.m.disk_gb_s * 1e9) / t.c.checkpoint_every

    # ---------------------------------------------------------------------------------- answers
    def phases(t) -> dict[str, float]:
        """Seconds an update: stated ones times what a run took for each stated second of the same
        phase, or of the one that is like it, if one was measured."""
        return {name: getattr(t, name)() * t.factors.get(
            name, t.factors.get(t.like.get(name), 1.0)) for name in PHASES}

    @property
    def total(t) -> float:
        return sum(t.phases().values())

    @property
    def gpu_hours(t) -> float:
        """Of the whole run, without its start."""
        return t.c.updates * t.total * t.m.gpus / 3600

    @property
    def cost(t) -> float:
        return t.gpu_hours * t.m.facts.price


PHASES = ("rollout", "reward", "old", "train", "sync", "score", "save")
