"""Choices for study that the single file does without: they are put around its functions, from outside.

    python -m scaled.study --name lag --lag 4 --mini-batches 1     # every option of nano_moe_rl.py, and these:

    --top-p P          μ samples from the likeliest tokens that have P together; which they were travels with the
                       rollout, and π is normalised over the same ones ("keep sampling mask", arXiv 2512.02556, 3.1)
    --gate-weights     R3 replays the experts of μ and their weights too, as constants: the router gets no gradient
    --frozen-router    the routers keep the weights of the cold start
    --lag K            rollouts are K rollout batches old: trained on while newer ones are sampled, as it were
    --lr-by KIND       lr · √(effective sample size / samples), of token weights, or of response weights Π π_θ/μ as in
                       VCPO (arXiv 2602.17616, and its code: min(1, ·), weights not truncated)

Scores are those of the single file, which sample from everything. Such a run leaves no checkpoint: what it is
made of would not be in it, and resuming would go on without.
"""
import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

import nano_moe_rl as nano

NEVER = -1e9  # a logit of probability 0, of which the logarithm is still a number: 0 · -inf would be none


@dataclass
class Rollout(nano.Rollout):
    kept: Tensor | None = None  # (B, T, V) bool, the tokens that position t could be followed by
    gate_weights: Tensor | None = None  # (B, T, L, A) of the experts in routing, of μ; 1/A on padding


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens that have a probability of top_p together. logits (..., V) -> (..., V) bool."""
    probability, ids = logits.softmax(-1).sort(-1, descending=True)
    before = probability.cumsum(-1) - probability  # what likelier tokens have: 0 for the first, which stays
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, before < top_p)


@contextmanager
def hooked(*pairs: tuple[torch.nn.Module, Callable]) -> Iterator[None]:
    """While it lasts, each module's output is hook(output)."""
    with ExitStack() as stack:
        for module, hook in pairs:
            handle = module.register_forward_hook(lambda module, given, output, hook=hook: hook(output))
            stack.callback(handle.remove)
        yield


def gates(model: nano.Model) -> list[torch.nn.Module]:
    return [layer.mlp.gate for layer in model.layers]


def freeze_routers(model: nano.Model):
    for gate in gates(model):
        gate.requires_grad_(False)


def weights_of(scores: list[Tensor], routing: Tensor) -> Tensor:
    """A router's logits (B, T, E) for each layer, and routing (B, T, L, A) -> the weights of those
    experts, (B, T, L, A); 1/A on padding."""
    chosen = torch.stack(scores, 2).gather(-1, routing.long().clamp(min=0)).softmax(-1)
    return chosen.where(routing >= 0, 1 / chosen.shape[-1])


def sample(engine: nano.InferenceEngine, n: int, G: int, seed: int, top_p: float = 1.0) -> Rollout:
    """nano.sample, whose rollout has the kept tokens, if top_p is below 1, and the gate weights of μ."""
    temperature = engine.model.config.temperature
    kept, scores = [], [[] for _ in engine.model.layers]  # a tensor each forward, of the positions that it fed

    def keep(output):
        logits, routing = output
        kept.append(nucleus(logits / temperature, top_p))
        return logits.masked_fill(~kept[-1], NEVER), routing

    hooks = [*zip(gates(engine.model), [record.append for record in scores])]
    with hooked(*hooks + [(engine.model, keep)] * (top_p < 1)):
        rollout = SAMPLE(engine, n, G, seed)

    def joined(record):  # the first forward is of the prompts, once for all responses to each
        return torch.cat([record[0].repeat_interleave(G, 0), *record[1:]], 1)
    return Rollout(**vars(rollout), kept=None if top_p == 1 else joined(kept),
                   gate_weights=weights_of([joined(record) for record in scores], rollout.routing))


@torch.no_grad()
def scored(engine: nano.InferenceEngine, batch: nano.Rollout) -> Rollout:
    """The batch as if the engine had sampled its tokens, each response with probability μ."""
    scores, model = [], engine.model
    with hooked(*((gate, scores.append) for gate in gates(model))):
        logits, routing = model(batch.tokens[:, :-1], None, batch.fed, numerics=engine.numerics)
    logprobs = nano.token_logprobs(logits, batch.tokens[:, 1:], model.config.temperature) * batch.mask
    return Rollout(**vars(batch) | dict(rollout_logprobs=logprobs, routing=routing,
                                        gate_weights=weights_of(scores, routing)))


def policy(model: nano.Model, batch: nano.Rollout, gate_weights: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """nano.policy; of a Rollout of this file normalised over its kept tokens, if it has them, and with
    gate_weights by those of μ, where experts are replayed. ValueError if it has none."""
    if not isinstance(batch, Rollout):
        return POLICY(model, batch)
    live, pairs = [], []
    if batch.kept is not None:
        pairs.append((model, lambda output: (output[0].masked_fill(~batch.kept, NEVER), output[1])))
    if gate_weights and batch.replay is not None:
        if batch.gate_weights is None:
            raise ValueError("gate_weights: the rollout has none; take it from study.sample")
        ids, logs = batch.replay.long().clamp(min=0), batch.gate_weights.log()  # of which softmax is the weights

        def constant(layer):
            def hook(logits):
                live.append(logits.topk(ids.shape[-1]).indices)  # before it is told
                return torch.full_like(logits, NEVER).scatter(-1, ids[:, :, layer], logs[:, :, layer])
            return hook
        pairs += [(gate, constant(layer)) for layer, gate in enumerate(gates(model))]
    with hooked(*pairs):
        logprobs, entropies, routing = POLICY(model, batch)
    if live:
        routing = torch.stack(live, 2).masked_fill(~batch.fed[..., None, None], -1).to(routing.dtype)
    return logprobs, entropies, routing


class Lag:
    """As a sampler that is K rollout batches behind: call j samples with the weights of call j - K, the first K with
    those of call 0. Prompts and random numbers are those of call j."""

    def __init__(self, K: int):
        self.engines, self.calls = deque(maxlen=K + 1), 0

    def __call__(self, engine: nano.InferenceEngine) -> tuple[nano.InferenceEngine, int]:
        """The engine of the newest weights -> the one to sample with, the updates that its weights had seen."""
        self.engines.append(engine)
        self.calls += 1
        return self.engines[0], (self.calls - len(self.engines)) * engine.model.config.mini_batches


def sample_size(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, kind: str) -> Tensor:
    """(Σw)² / (n Σw²), (), of the n tokens' π_θ/μ (kind token) or of the n responses' product of them (response)."""
    log_weights = (logprobs - rollout_logprobs).detach().masked_fill(~mask, 0.0)
    if kind == "token":
        return nano.effective_sample_size(log_weights, mask)
    return nano.effective_sample_size(log_weights.double().sum(1), mask.any(1))


def slowed(optimizer: torch.optim.Optimizer, loss_fn: Callable, kind: str) -> Callable:
    """loss_fn, which also multiplies the learning rate by √sample_size: for one update, since nano.learn sets it anew
    before each."""
    def loss_of(logprobs, old_logprobs, rollout_logprobs, advantages, mask, **counts):
        factor = sample_size(logprobs, rollout_logprobs, mask, kind).sqrt().item()
        for group in optimizer.param_groups:
            group["lr"] *= factor
        return loss_fn(logprobs, old_logprobs, rollout_logprobs, advantages, mask, **counts)
    return loss_of


SAMPLE, POLICY, TRAIN_STEP = nano.sample, nano.policy, nano.train_step  # as they are


@dataclass(frozen=True)
class Study:
    """What a run has beside its nano.Config. ValueError, in one line, if an option is refused."""
    top_p: float = 1.0
    gate_weights: bool = False
    frozen_router: bool = False
    lag: int = 0
    lr_by: str = "none"

    def check(self, c: nano.Config):
        for name, fine, remedy in (
                ("top_p", 0 < self.top_p <= 1, "more than 0, up to 1"),
                ("gate_weights", not self.gate_weights or c.replay == "R3",
                 "--replay R3: they are those of its experts"),
                ("lag", 0 <= self.lag <= 64, "0 to 64, each a copy of the weights"),
                ("lr_by", self.lr_by in ("none", "token", "response"), "none or token or response")):
            if not fine:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {remedy}")

    @contextmanager
    def around(self, c: nano.Config) -> Iterator[None]:
        """While it lasts, nano.learn has these options. The routers are for freeze_routers."""
        self.check(c)
        lag = Lag(self.lag)

        def sampled(engine, n, G, seed):
            if G == 1:  # a score; in training a group has two responses or more
                return SAMPLE(engine, n, G, seed)
            engine, version = lag(engine)
            return replace(sample(engine, n, G, seed, self.top_p), version=version)

        def train_step(model, optimizer, batch, loss_fn=nano.minirl_loss):
            return TRAIN_STEP(model, optimizer, batch,
                              loss_fn if self.lr_by == "none" else slowed(optimizer, loss_fn, self.lr_by))

        def of_policy(model, batch):
            return policy(model, batch, self.gate_weights)
        with (patch.object(nano, "sample", sampled), patch.object(nano, "policy", of_policy),
              patch.object(nano, "train_step", train_step)):
            yield


def run(c: nano.Config, study: Study):
    """A run in runs/NAME: config.json with all options, metrics.jsonl, curves.png."""
    folder = Path("runs", c.name)
    model = nano.cold_start(c)
    if study.frozen_router:
        freeze_routers(model)
    rows = [{"update": 0} | nano.evaluate(model)[0]]
    folder.mkdir(parents=True)
    nano.save(folder / "config.json", json.dumps(asdict(c) | asdict(study), indent=2).encode())

    def after_batch():
        nano.save(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    with study.around(c):
        nano.learn(model, nano.adamw(model, c.lr), rows, after_batch=after_batch)
    nano.draw(rows, folder / "curves.png")
    print(f"score {rows[0]['score']:.3f} before RL, {rows[-1]['score']:.3f} after; {folder} has metrics.jsonl")


def main(argv: list[str] | None = None):
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                    formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    for f in (*fields(Study), *fields(nano.Config)):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        flags.add_argument("--" + f.name.replace("_", "-"), **kind, required=f.name == "name" or f.default is MISSING)
    given = vars(flags.parse_args(argv))
    own = {f.name: given.pop(f.name) for f in fields(Study) if f.name in given}
    try:
        c, study = nano.Config(**given), Study(**own)
        study.check(c)
        if not c.name or Path("runs", c.name).exists():
            raise ValueError(f"--name {c.name}: give one that runs/ does not have yet")
    except ValueError as refusal:
        flags.error(str(refusal))
    run(c, study)


if __name__ == "__main__":
    sys.exit(main())
