"""Where the memory of a run goes, on a GPU and in a node: each line is a formula, and says whose.

Moments of a rollout batch, the columns of the table:
rollout  the engine samples; the trainer is in host memory
head     backward of the output head, in a pass that adds to gradients of an earlier one
layer    backward of a decoder layer in such a pass
sync     the trainer's weights stream into the engine, which has no cache yet
check    a sync is checked: the engine has its cache, the trainer runs on at most eight prompts

In the formulas s is the itemsize of train_precision, 2 or 4, W the number of ranks, n the tokens of
a pass, padding included; P is the parameters of the widest layer. Parameters of a shard, and whole
ones padded to W equal shards, are counted as FSDP2 cuts them (sizes.shard)."""

from dataclasses import dataclass

from scaled.config import Config
from scaled.machine import Machine
from scaled.sizes import Layer, Shapes, Sizes, count, shard

MOMENTS = ("rollout", "head", "layer", "sync", "check")
GIB = 2**30


def line(label: str, *moments: str):
    """A method that answers bytes at these moments is a line of the table."""
    def mark(method):
        method.label, method.moments = label, moments
        return method
    return mark


@dataclass(frozen=True)
class Memory:
    c: Config
    m: Machine
    s: Sizes

    itemsize = property(lambda x: 4 if x.c.train_precision == "fp32" else 2)
    on_gpu = property(lambda x: 0 if x.c.cpu_offload else shard(x.s.shapes, x.m.gpus))
    prefetches = property(lambda x: x.m.gpus > 1)  # the next layer, while one is computed
    sequences = property(  # of a rollout batch, of one engine
        lambda x: x.c.prompts * x.c.group_size * x.c.mini_batches * x.c.tensor_parallel
        / x.m.gpus)

    @property
    def tokens(x) -> int:
        """n: token_budget, or all rows of a rank at their longest if these are fewer."""
        rows = x.c.prompts * x.c.group_size // x.m.gpus
        return min(x.c.token_budget, rows * x.c.max_length)

    def padded(x, shapes: Shapes) -> int:
        return shard(shapes, x.m.gpus) * x.m.gpus

    # ------------------------------------------------------------------------------ the trainer
    @line("weights, fp32", "head", "layer", "sync", "check")
    def weights(x, moment):
        """4 bytes for each parameter of a shard; 0 with cpu_offload. policy.py: the master weights
        are fp32, and outside of passes every parameter is a shard."""
        return 4 * x.on_gpu

    @line("gradients, fp32", "head", "layer")
    def gradients(x, moment):
        """4 bytes for each parameter of a shard; 0 with cpu_offload. reduce_dtype is fp32, and the
        train step drops them."""
        return 4 * x.on_gpu

    @line("Adam's moments, fp32", "head", "layer", "sync", "check")
    def moments(x, moment):
        """8 bytes for each parameter of a shard; 0 with cpu_offload. torch's AdamW keeps two."""
        return 8 * x.on_gpu

    @line("gathered layers", "head", "layer", "check")
    def gathered(x, moment):
        """s · P for the layer at work, and s · P for the next one, gathered ahead (torch,
        _fsdp_param_group.py); at the head only the latter."""
        ahead = x.itemsize * x.padded(x.s.widest.shapes) * x.prefetches
        return ahead if moment == "head" else ahead + x.itemsize * x.padded(x.s.widest.shapes)

    @line("gradients in reduction", "layer")
    def reduction(x, moment):
        """4 · P: fp32 input of the reduce-scatter of the layer before, kept until it is done;
        without gradient_checkpointing less what that layer had saved, and has freed."""
        freed = 0 if x.c.gradient_checkpointing else x.tokens * x.saved_by(x.s.layers[-1])
        return max(0, 4 * x.padded(x.s.widest.shapes) - freed)

    @line("head", "head", "layer", "check")
    def root(x, moment):
        """s bytes for each parameter of final norm and head, gathered for the whole pass, and the
        gradient of the head, V · D: 4 bytes while logprobs.py sums it over chunks, s bytes
        afterwards."""
        gradient = {"head": 4, "layer": x.itemsize, "check": 0}[moment]
        return (x.itemsize * x.padded(x.s.root)
                + gradient * x.s.vocabulary * x.s.width)

    @line("activations", "head", "layer")
    def activations(x, moment):
        """n · s · D for the input of each layer and, at a layer's backward, what the widest layer
        saves (saved_by); without gradient_checkpointing what all layers save. At the head also the
        final norm, its output twice, and the fp32 gradient of that: n · (8 + 3 s) · D, at most:
        two of these are of response tokens only."""
        if x.c.gradient_checkpointing:
            kept = len(x.s.layers) * x.itemsize * x.s.width
            kept += max(map(x.saved_by, x.s.layers)) if moment == "layer" else 0
        else:
            kept = sum(map(x.saved_by, x.s.layers))
        end = (8 + 3 * x.itemsize) * x.s.width if moment == "head" else 0
        return x.tokens * (kept + end)

    def saved_by(x, layer: Layer) -> int:
        """Bytes a token that a layer saves for its backward pass, by transformers' modules:
        a norm over w numbers its fp32 input and its normalised value, (4 + s) · w;
        two norms with their outputs, D each; queries, keys, values and the output of attention;
        softmax's normaliser and the router's probabilities in fp32; the routing in int64;
        for each of A experts its input and output, D each, and four of the hidden width I (gate
        and up, activation, product); as many of the width of a dense or shared network."""
        s, D = x.itemsize, x.s.width
        saved = 2 * ((4 + s) * D + s * D)
        saved += s * 2 * (layer.queries + layer.keys) + 4 * x.s.heads
        saved += (4 + s) * (layer.queries + layer.keys) if layer.normed else 0
        if layer.experts:
            saved += 4 * x.s.n_experts + 40 * x.s.top_k
            saved += x.s.top_k * s * (2 * D + 4 * layer.expert)
        return saved + 4 * s * layer.mlp

    @line("experts at work", "layer", "check")
    def working(x, moment):
        """The larger of n · 3 · A · D numbers, three gradients of the experts' weighted outputs
        (fp32 in families whose routing weights are), and s · P, the layer's gradients. In a
        forward pass n · 4 · A · D: inputs, outputs, weighted, in order."""
        itemsize = 4 if x.s.fp32_routing else x.itemsize
        outputs = max(itemsize * x.s.top_k * x.s.width if layer.experts else
                      x.itemsize * layer.mlp for layer in x.s.layers)
        if moment == "check":
            return 4 * 8 * x.c.max_prompt * outputs
        return max(3 * x.tokens * outputs, x.itemsize * count(x.s.widest.shapes))

    @line("logits chunk", "head", "check")
    def logits(x, moment):
        """logits_mib, or 4 · V for each token if that is less, times 3 + s / 4: the chunk, its
        log-softmax and two gradients of that (logprobs.py)."""
        tokens = 8 * x.c.max_prompt if moment == "check" else x.tokens
        row = 4 * x.s.vocabulary
        return row * min(tokens, x.c.logits_mib * 2**20 // row) * (3 + x.itemsize / 4)

    @line("routes", "head", "layer")
    def routes(x, moment):
        """n · L · A · itemsize, three times: of the rollout, to replay, and the live ones
        (trainer.py, replay.py). Two without replay."""
        return x.tokens * x.s.route_bytes * (2 if x.c.replay == "none" else 3)

    @line("layer in transit", "sync")
    def transit(x, moment):
        """4 · P, a layer's tensors whole and in fp32, which vLLM holds back until the layer is
        complete, and its own copy, 2 · P / tensor_parallel (vllm_internals.py)."""
        return (4 + 2 / x.c.tensor_parallel) * count(x.s.widest.shapes)

    @line("lost between blocks", "head", "layer", "sync", "check")
    def fragmentation(x, moment):
        """--fragmentation of what the trainer has. An assumption."""
        return x.m.fragmentation * sum(
            other(x, moment) for other in TRAINER if moment in other.moments)

    # ------------------------------------------------------------------------------- the engine
    @line("engine: weights", "rollout", "sync", "check")
    def engine_weights(x, moment=None):
        """All parameters in rollout_precision (sizes.bytes_in), over tensor_parallel GPUs."""
        experts = count(x.s.experts)
        return x.s.bytes_in(x.c.rollout_precision, experts, x.s.total - experts
                            ) / x.c.tensor_parallel

    @line("engine: activations", "rollout", "check")
    def engine_activations(x, moment=None):
        """--engine-gib: vLLM's largest batch, CUDA graphs and context. An assumption."""
        return x.m.engine_gib * GIB

    @line("engine: KV cache", "rollout", "check")
    def cache(x, moment=None):
        """What is left of gpu_memory, the engine's share of the GPU."""
        return (x.c.gpu_memory * x.m.facts.gib * GIB - x.engine_weights() - x.engine_activations())

    @line("context", "head", "layer", "sync")
    def context(x, moment):
        """--context-gib: CUDA, NCCL, what a sleeping engine keeps. An assumption."""
        return x.m.context_gib * GIB

    # ---------------------------------------------------------------------------------- answers
    def table(x) -> dict[str, dict[str, float]]:
        """Label -> moment -> bytes; a line has its moments only."""
        return {method.label: {moment: method(x, moment) for moment in method.moments}
                for method in LINES}

    def totals(x) -> dict[str, float]:
        """Moment -> bytes; no check if check_sync is 0."""
        table = x.table()
        return {moment: sum(row.get(moment, 0) for row in table.values()) for moment in MOMENTS
                if moment != "check" or x.c.check_sync}

    @property
    def cached_tokens(x) -> float:
        """That an engine's cache holds: keys and values are spread over as many of its GPUs as
        there are key-value heads."""
        return x.cache() / x.s.cache_bytes * min(x.c.tensor_parallel, x.s.kv_heads)

    def host(x) -> dict[str, float]:
        """Bytes of host memory of a node, by what they are for. The trainer's are weights and
        moments while the engine samples, 12 bytes a parameter, or with cpu_offload always, and
        gradients too: 16, of which torch pins 8, in blocks rounded up to powers of two. Routes of
        a rank: vLLM's arrays and ours at the mean length, and rows padded to the longest, of all
        sequences of its engine; or those and the rank's own rows, twice with R2. A process has
        --process-gib beside."""
        ranks = min(x.m.node_gpus, x.m.gpus)
        own = shard(x.s.shapes, x.m.gpus)
        pinned = [4 * shard((shape,), x.m.gpus) for shape in x.s.shapes if x.c.cpu_offload]
        mean, longest, n = sum(x.lengths), x.c.max_length, x.sequences
        rows = n / x.c.tensor_parallel * (2 if x.c.replay == "R2" else 1)
        return {"trainer": ranks * own * (16 if x.c.cpu_offload else 12),
                "pinned blocks, rounded": ranks * sum(2 * (2**(b - 1).bit_length() - b)
                                                      for b in pinned),
                "routes": ranks * x.s.route_bytes * max(
                    n * (2 * mean + longest), (n + rows) * longest),
                "processes": ranks * x.m.process_gib * GIB}

    @property
    def lengths(x) -> tuple[float, float]:
        """Mean tokens of a prompt and of a response: assumptions, if no run has been measured."""
        return (x.m.mean_prompt or x.c.max_prompt / 2, x.m.mean_response or x.c.max_response / 3)

    @property
    def checkpoints(x) -> float:
        """Bytes on disk: weights and moments, 12 bytes a parameter, of `keep`, the next, and with
        eval_data the one with the best score."""
        return 12 * x.s.total * (x.c.keep + 1 + bool(x.c.eval_data))

    def faults(x) -> list[str]:
        """Why the run does not fit, in words; [] if it does."""
        found = [f"{moment}: {total / GIB:.1f} of {x.m.facts.gib:.1f} GiB"
                 for moment, total in x.totals().items() if total > x.m.facts.gib * GIB]
        if x.cached_tokens < x.c.max_length:
            found.append(f"KV cache: {max(0, x.cached_tokens):.0f} tokens, a response may have "
                         f"{x.c.max_length}")
        if (total := sum(x.host().values())) > x.m.host_gib * GIB:
            found.append(f"host memory: {total / GIB:.0f} of {x.m.host_gib:.0f} GiB a node")
        return found


LINES = [method for method in vars(Memory).values() if hasattr(method, "label")]
TRAINER = LINES[:LINES.index(Memory.fragmentation)]
