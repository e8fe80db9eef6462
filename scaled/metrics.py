"""Sums and counts of a mini-batch, so that a mean over ranks is no mean of means; time; memory."""

import math
import resource
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from nano_moe_rl import (
    DEVICE, Rollout, extreme_token_fraction, importance_weights, kl_k3, routing_agreement)
from scaled.replay import repeated
from scaled.terminal import bar, err

BY_PLACE = ("routing_agreement", "equal_groups")  # a list, also of one: of layers, of mini-batches


class Sums:
    """Weighted sums and counts by name; `over_ranks` is the same on every rank."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}  # the sums, and last what to divide them by
        self.counted: set[str] = set()  # not divided

    def add(self, name: str, mean, count):
        """A mean, () or (n,), over `count` of something; of nothing it may be NaN."""
        mean = torch.as_tensor(mean, dtype=torch.float64).cpu().reshape(-1)
        mean = mean * count if count else torch.zeros_like(mean)
        row = torch.cat([mean, torch.tensor([count], dtype=torch.float64)])
        self.totals[name] = self.totals.get(name, 0) + row

    def count(self, name: str, number: int):
        """So many of something on this rank."""
        self.counted.add(name)
        self.add(name, number, 1)

    def add_pass(self, part: Rollout, logprobs, old_logprobs, entropies, routing, gate,
                 importance_sampling: str = "token"):
        """What one training forward says, before its update: the metrics of nano_moe_rl."""
        mask, mu = part.mask, part.rollout_logprobs
        tokens, fed, rows = int(mask.sum()), int(part.fed.sum()), len(mask)
        trained = mask.any(1)  # all but those that were too old
        lengths, responses = mask.sum(1)[trained].double(), int(trained.sum())
        log_weights = (logprobs - mu).double().masked_fill(~mask, 0.0)
        weights = log_weights[mask].exp()
        # bounded, so that a square is neither infinite nor 0
        products = log_weights.sum(1)[trained].clamp(-300, 300).exp()
        self.add("reward", part.rewards.mean(), rows)
        self.add("response_length", lengths.mean(), responses)
        self.add("entropy", entropies[mask].mean(), tokens)
        self.add("mismatch_kl", kl_k3(mu, old_logprobs, mask), tokens)
        self.add("staleness_kl", kl_k3(old_logprobs, logprobs, mask), tokens)
        self.add("extreme_token_fraction", extreme_token_fraction(old_logprobs, mu, mask), tokens)
        self.add("clip_fraction", 1 - gate[mask].double().mean(), tokens)
        self.add("dropped_responses", 1 - (gate & mask).any(1).double().mean(), rows)
        self.add("weight_truncated_fraction", weight_truncated_fraction(
            logprobs, old_logprobs, mu, mask, importance_sampling), tokens)
        if routing is not None:
            self.add("routing_agreement", routing_agreement(routing, part.routing, part.fed), fed)
        self.add("weight", weights.mean(), tokens)  # these two make the effective sample size
        self.add("squared_weight", weights.square().mean(), tokens)
        self.add("product", products.mean(), responses)  # and these that of responses
        self.add("squared_product", products.square().mean(), responses)

    def over_ranks(self) -> dict:
        """Name -> mean, a float or a list, or the number of what was counted, of all ranks. A
        collective: all ranks have the same names."""
        names = sorted(self.totals)
        flat = torch.cat([self.totals[name] for name in names]).to(DEVICE)
        if dist.is_initialized():
            dist.all_reduce(flat)
        parts = dict(zip(names, flat.cpu().split([len(self.totals[name]) for name in names])))
        counts = {name: round(parts.pop(name)[0].item()) for name in self.counted}
        means = {name: part[:-1] / part[-1] for name, part in parts.items()}
        if "weight" in means:
            means["effective_sample_size"] = means.pop("weight")**2 / means.pop("squared_weight")
            means["response_sample_size"] = means.pop("product")**2 / means.pop("squared_product")
        return counts | {
            name: x.tolist() if len(x) > 1 or name in BY_PLACE else x.item()
            for name, x in means.items()}


def weight_truncated_fraction(logprobs, old_logprobs, rollout_logprobs, mask, kind: str) -> Tensor:
    """Share of masked tokens whose importance weight is that of a cap, (). All (B, T); kind as in
    importance_weights, which knows the caps."""
    tensors = logprobs, old_logprobs, rollout_logprobs, mask, kind
    free = importance_weights(*tensors, token_cap=math.inf, sequence_cap=math.inf)
    return (importance_weights(*tensors) < free)[mask].double().mean()


def equal_groups(rewards: Tensor, group_size: int) -> float:
    """Share of groups whose rewards are all equal: their advantages are 0, and so is what they add
    to the gradient. rewards (B,), a group's one after another."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(1).double().mean().item()


def batch_metrics(batch: Rollout, max_response: int, ends: list[int], reward_counts: dict,
                  equal: list[float]) -> dict:
    """Of a rollout batch, of which every rank has its rows, whatever is trained on it. `ends` are
    the tokens that end a response; reward_counts: what the reward counted on this rank, by name;
    equal: equal_groups of each mini-batch, of this rank's engine."""
    sums, rows = Sums(), len(batch.tokens)
    sums.add("truncation_rate", truncated(batch, max_response, ends).double().mean(), rows)
    sums.add("equal_groups", torch.as_tensor(equal), rows)
    sums.count("tokens", int(batch.lengths.sum()))
    sums.count("missing_routes", missing_routes(batch))
    for name, number in reward_counts.items():
        sums.count(f"reward_{name}", number)
    return sums.over_ranks()


def truncated(batch: Rollout, max_response: int, ends: list[int]) -> Tensor:
    """Whether responses (B,) were cut off: none of the tokens that end one came in time."""
    last = batch.tokens.gather(1, batch.lengths[:, None] - 1)[:, 0]
    return (batch.lengths - batch.prompt_lengths == max_response) & ~torch.isin(
        last, torch.tensor(ends))


def missing_routes(rollout: Rollout) -> int:
    """(token, layer) pairs of fed tokens whose experts are not all different: no route came. 0
    unless something between the engine, which refuses them, and the trainer loses routes."""
    if rollout.routing is None:  # a family without replay
        return 0
    return sum(int(repeated(routes[fed].movedim(-1, 0).contiguous()).sum())  # a row at a time:
               for routes, fed in zip(rollout.routing, rollout.fed))  # a copy of all could be GBs


def peak_memory(engine: int = 0) -> float:
    """GiB: on a GPU the most that torch had allocated since the last call, without the bytes of the
    engine, which torch counts also while it sleeps; else the most that the process ever occupied.
    The largest of all ranks; a collective."""
    if DEVICE == "cuda":
        peak = (torch.cuda.max_memory_allocated() - engine) / 2**30
        torch.cuda.reset_peak_memory_stats()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = torch.tensor(peak, device=DEVICE)
    if dist.is_initialized():
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    return peak.item()


class Phases:
    """Seconds of each phase of a rollout batch on this rank. One line of the terminal says what a
    run is at: first the steps of its start, then a bar over updates, which names the phase."""

    def __init__(self, silent: bool):
        self.seconds: dict[str, float] = {}
        self.silent = silent
        self.bar = bar(desc="starting", bar_format="{desc} …", disable=True if silent else None)

    def starting(self, step: str):
        """Says what the start is at; where there is no terminal, each step has a line."""
        self.bar.set_description_str(step)
        if self.bar.disable and not self.silent:
            print(f"{step} …", file=err(), flush=True)

    def begin(self, total: int, done: int):
        """The start is over: from here on a bar."""
        self.bar.bar_format = None
        self.bar.set_description_str(refresh=False)
        self.bar.set_postfix_str(refresh=False)
        self.bar.reset(total)
        self.bar.n = self.bar.initial = done
        self.bar.refresh()

    @contextmanager
    def __call__(self, name: str):
        began = time.perf_counter()
        self.bar.set_postfix_str(name)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
