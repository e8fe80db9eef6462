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


def prompts_of_engine(n_prompts: int, mini_batch: int, engines: int, engine: int) -> list[int]:
    """Which of a rollout batch's prompts one engine samples, in order. Each mini-batch of
    `mini_batch` prompts is shared out evenly: it has the same however many engines there are."""
    share = mini_batch // engines
    return [i for i in range(n_prompts) if i % mini_batch // share == engine]


def rows_of_rank(n_rows: int, mini_batches: int, ranks: int, rank: int) -> list[int]:
    """Which of an engine's responses one of its ranks trains on: the same number of each
    mini-batch, those of the first mini-batch first."""
    per_mini_batch = n_rows // mini_batches
    share = per_mini_batch // ranks
    return [row for row in range(n_rows) if row % per_mini_batch // share == rank]


def micro_batches(lengths: list[int], token_budget: int,
                  n_passes: int | None = None) -> list[list[int]]:
    """Row indices, longest rows first, in batches with rows · longest <= token_budget. A row above
    the budget is a batch of its own: it is a sample like any other, and whether the longest
    response fits in memory is decided by the run's maximum length, not here. With n_passes, empty
    lists fill up to that number. ValueError for a budget below 1 or for more batches than that."""
    if token_budget < 1:
        raise ValueError(f"token_budget {token_budget}: give 1 or more")
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # the costliest pass first
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    if n_passes is None:
        return batches
    if n_passes < len(batches):
        raise ValueError(f"n_passes {n_passes}: {len(lengths)} rows need {len(batches)} passes of "
                         f"{token_budget} tokens; give that or more")
    return batches + [[] for _ in range(n_passes - len(batches))]


def equal_passes(lengths: list[int], token_budget: int, device) -> list[list[int]]:
    """micro_batches, the same number on every rank of the default process group: a sharded model
    gathers its weights in every pass, and a rank with fewer would leave the others waiting.
    A collective; every rank calls it with its own rows. device is that of the group's backend."""
    batches = micro_batches(lengths, token_budget)
    if not dist.is_initialized():
        return batches
    n_passes = torch.tensor(len(batches), device=device)
    dist.all_reduce(n_passes, dist.ReduceOp.MAX)
    return micro_batches(lengths, token_budget, int(n_passes))


def take(rollout: Rollout, rows: list[int]) -> Rollout:
    """Some rows of a rollout, cut to the longest of them: tokens (B, longest), what belongs to
    positions (B, longest - 1, ...). No rows: a stand-in that costs next to nothing, of one fed
    token and with a mask that is False everywhere, so that its loss and gradients are 0."""
    if not rows:
        one = take(rollout, [0])
        short = replace(one, lengths=torch.full_like(one.lengths, 2))
        short.prompt_lengths = short.lengths  # all prompt: nothing to learn
        return _cut(short, 2)
    index = torch.tensor(rows)
    tensors = {name: x[index.to(x.device)] for name, x in vars(rollout).items()
               if isinstance(x, Tensor)}  # B is the first axis of all
    return _cut(replace(rollout, **tensors), int(tensors["lengths"].max()))


def responses(rollout: Rollout) -> list[list[int]]:
    """The tokens of each response."""
    return [row[start:end].tolist() for row, start, end in
            zip(rollout.tokens, rollout.prompt_lengths, rollout.lengths)]


def _cut(rollout: Rollout, longest: int) -> Rollout:
    columns = {"T": longest - 1, "T+1": longest}
    return replace(rollout, **{
        name: x[:, : columns[AXES[name].split()[1]]] for name, x in vars(rollout).items()
        if isinstance(x, Tensor) and AXES[name] != "B"})
