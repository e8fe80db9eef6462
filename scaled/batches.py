"""Who samples and trains what; rows of a rollout in forward passes by a token budget."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from nano_moe_rl import Rollout

# The axes of a rollout's tensors. Position t is fed token t, and the last token is never fed.
AXES = dict(tokens="B T+1", prompt_lengths="B", lengths="B", rollout_logprobs="B T",
            routing="B T L A", rewards="B", advantages="B", old_logprobs="B T", replay="B T L A",
            version="B")  # where it is no int
PADDING = 0.05  # share of the positions of an update's passes that may be computed for nothing
PASS = 1024  # positions that a further pass has to save: it gathers all weights anew


def prompts_of_engine(n_prompts: int, mini_batch: int, engines: int, engine: int) -> list[int]:
    """Which of a rollout batch's prompts one engine samples, in order. Each mini-batch of
    `mini_batch` prompts is shared out evenly: it has the same however many engines there are."""
    share = mini_batch // engines
    return [i for i in range(n_prompts) if i % mini_batch // share == engine]


def shared_prefixes(prompts: list[list[int]], block: int) -> list[int]:
    """How many tokens each prompt shares with the one before, in whole blocks of the prefix cache; its
    last token is always computed again. 0 for all if block is 0."""
    shared = [0] * len(prompts)
    for i, (before, prompt) in enumerate(zip(prompts, prompts[1:] if block else ()), 1):
        same = next((t for t, (a, b) in enumerate(zip(before, prompt)) if a != b),
                    min(len(before), len(prompt)))
        shared[i] = min(same, len(prompt) - 1) // block * block
    return shared


def rows_of_rank(n_rows: int, mini_batches: int, ranks: int, rank: int) -> list[int]:
    """Which of an engine's responses one of its ranks trains on: the same number of each
    mini-batch, those of the first mini-batch first."""
    per_mini_batch = n_rows // mini_batches
    share = per_mini_batch // ranks
    return [row for row in range(n_rows) if row % per_mini_batch // share == rank]


def micro_batches(lengths: list[int], token_budget: int, fed: list[float] | None = None
                  ) -> list[list[int]]:
    """Row indices, longest rows first, in batches with rows · longest <= token_budget. A row above
    the budget is a batch of its own: it is a sample like any other, and whether the longest
    response fits in memory is decided by the run's maximum length, not here. Where more than
    PADDING of all positions would be those of no token, batches are cut, each time where it saves
    most, unless that is less than PASS positions. fed: positions of a row, lengths - 1 without it.
    ValueError for a budget below 1."""
    if token_budget < 1:
        raise ValueError(f"token_budget {token_budget}: give 1 or more")
    fed, batches = fed or [n - 1 for n in lengths], []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the costliest pass first
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    while sum(fed) < (1 - PADDING) * sum(fed[rows[0]] * len(rows) for rows in batches):
        saved, n, k = max(((fed[rows[0]] - fed[rows[k]]) * (len(rows) - k), n, k)
                          for n, rows in enumerate(batches) for k in range(1, len(rows)))
        if saved < PASS:
            break
        batches[n : n + 1] = batches[n][:k], batches[n][k:]
    return batches


def equal_passes(lengths: list[int], token_budget: int, device) -> list[list[int]]:
    """micro_batches, with as many rows in each on every rank of the default process group: a sharded
    model gathers its weights in every pass, where all wait for the rank that computes most. In order
    of length, the n-th rows of all ranks are cut as one, by the longest of them for the budget and
    by their mean for the padding. A collective; every rank calls it with its own rows, of which all
    have as many. device is that of the group's backend."""
    if not dist.is_initialized():
        return micro_batches(lengths, token_budget)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest = torch.tensor([lengths[i] for i in order], device=device)
    fed = longest - 1
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    dist.all_reduce(fed)
    mean = fed / dist.get_world_size()
    return [[order[i] for i in places]
            for places in micro_batches(longest.tolist(), token_budget, mean.tolist())]


def take(rollout: Rollout, rows: list[int]) -> Rollout:
    """Some rows of a rollout, cut to the longest of them: tokens (B, longest), what belongs to
    positions (B, longest - 1, ...)."""
    index = torch.tensor(rows)
    tensors = {name: x[index.to(x.device)] for name, x in vars(rollout).items()
               if isinstance(x, Tensor)}  # B is the first axis of all
    longest = int(tensors["lengths"].max())
    columns = {"T": longest - 1, "T+1": longest}
    return replace(rollout, **{
        name: x if AXES[name] == "B" else x[:, : columns[AXES[name].split()[1]]]
        for name, x in tensors.items()})


def responses(rollout: Rollout) -> list[list[int]]:
    """The tokens of each response."""
    return [row[start:end].tolist() for row, start, end in
            zip(rollout.tokens, rollout.prompt_lengths, rollout.lengths)]
