"""Micro-batches by a token budget, and parts of a rollout."""
from dataclasses import fields, replace
from itertools import combinations

import pytest
import torch
import torch.distributed as dist

import nano_moe_rl as nano
from processes import join_group, run_ranks
from scaled.batches import (AXES, equal_passes, micro_batches, prompts_of_engine, rows_of_rank,
                            take)

LENGTHS = [3, 11, 4, 4, 9, 2, 11, 5]


@pytest.mark.parametrize("budget", [1, 8, 11, 12, 22, 23, 40, 1000])
def test_batches_are_a_partition_within_the_budget(budget):
    batches = micro_batches(LENGTHS, budget)
    assert sorted(sum(batches, [])) == list(range(len(LENGTHS)))
    for rows in batches:
        longest = max(LENGTHS[i] for i in rows)
        assert len(rows) == 1 or len(rows) * longest <= budget
    for a, b in combinations(batches, 2):  # sorted: no batch pads its rows to another's length
        assert min(LENGTHS[i] for i in a) >= max(LENGTHS[i] for i in b)
    for a, b in zip(batches, batches[1:]):  # full: the next row would not have fitted
        assert (len(a) + 1) * max(LENGTHS[i] for i in a) > budget


def test_known_packing():
    assert micro_batches(LENGTHS, 22) == [[1, 6], [4, 7], [2, 3, 0, 5]]
    assert micro_batches(LENGTHS, 22, 5) == [[1, 6], [4, 7], [2, 3, 0, 5], [], []]
    assert micro_batches([30, 2], 22) == [[0], [1]]  # above the budget: alone, not refused
    assert micro_batches([], 22, 2) == [[], []]


@pytest.mark.parametrize("arguments, message", [((LENGTHS, 0), "token_budget 0"),
                                                ((LENGTHS, 22, 2), "n_passes 2: 8 rows need 3")])
def test_impossible_packing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        micro_batches(*arguments)


def passes_of_a_rank(rank, world, folder):
    join_group(rank, world, folder)
    lengths = [[50, 49, 48, 47], [3, 2], []][rank]
    torch.save(equal_passes(lengths, 50, "cpu"), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_every_rank_gets_as_many_passes(tmp_path):
    assert equal_passes([50, 49], 50, "cpu") == [[0], [1]]  # without a process group
    run_ranks(passes_of_a_rank, 3, tmp_path, seconds=60)
    got = [torch.load(tmp_path / str(rank)) for rank in range(3)]
    assert got == [[[0], [1], [2], [3]], [[0, 1], [], [], []], [[]] * 4]


@pytest.fixture
def rollout():
    """Rows of uneven lengths in which every number is unique."""
    B, T, L, A = 5, 9, 3, 2
    def numbered(*shape):
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float).view(shape)
    return nano.Rollout(
        tokens=torch.arange(B * (T + 1)).view(B, T + 1),
        prompt_lengths=torch.tensor([2, 3, 1, 4, 2]), lengths=torch.tensor([4, 10, 6, 5, 7]),
        rollout_logprobs=numbered(B, T), version=7,
        routing=torch.arange(B * T * L * A, dtype=torch.int16).view(B, T, L, A),
        rewards=numbered(B), advantages=numbered(B) + 0.5)


def test_every_tensor_of_a_rollout_has_its_axes(rollout):
    sizes = {"B": 5, "T+1": 10, "T": 9, "L": 3, "A": 2}
    assert AXES.keys() == {field.name for field in fields(nano.Rollout)}
    full = replace(rollout, old_logprobs=rollout.rollout_logprobs, replay=rollout.routing, version=torch.arange(5))
    for name, axes in AXES.items():
        assert getattr(full, name).shape == tuple(sizes[axis] for axis in axes.split()), name


@pytest.mark.parametrize("rows", [[3], [4, 0], [2, 3, 4], [1, 0, 2, 3, 4]])
def test_take_cuts_to_the_longest_row(rollout, rows):
    part, longest = take(rollout, rows), max(rollout.lengths[i].item() for i in rows)
    assert part.version == 7 and part.old_logprobs is None and part.replay is None
    assert part.routing.dtype == torch.int16
    for name in ("prompt_lengths", "lengths", "rewards", "advantages"):
        assert getattr(part, name).tolist() == [getattr(rollout, name)[i].item() for i in rows]
    for name in ("tokens", "rollout_logprobs", "routing"):
        whole, columns = getattr(rollout, name), longest - (name != "tokens")
        assert torch.equal(getattr(part, name), torch.stack([whole[i, :columns] for i in rows]))
    assert torch.equal(part.mask, rollout.mask[rows][:, : longest - 1])
    assert int(part.mask.sum()) == sum(int(rollout.mask[i].sum()) for i in rows)  # nothing is lost


def test_no_rows_are_a_stand_in_that_feeds_a_token_and_learns_nothing(rollout):
    before = {name: x.clone() for name, x in vars(rollout).items() if isinstance(x, torch.Tensor)}
    part = take(rollout, [])
    assert part.fed.tolist() == [[True]] and part.mask.tolist() == [[False]]
    assert part.tokens.tolist() == rollout.tokens[:1, :2].tolist()
    assert torch.equal(part.routing, rollout.routing[:1, :1])  # valid for what it feeds
    logprobs = torch.tensor([[-1.5]], requires_grad=True)
    loss, _ = nano.minirl_loss(logprobs, logprobs.detach(), part.rollout_logprobs, part.advantages,
                               part.mask, n_sequences=5, n_tokens=21)
    loss.backward()
    assert loss == 0 and logprobs.grad.abs().max() == 0
    assert all(torch.equal(x, getattr(rollout, name)) for name, x in before.items())


@pytest.mark.parametrize("engines, ranks", [(1, 1), (2, 1), (3, 2), (1, 6), (6, 1)])
def test_each_mini_batch_has_its_own_prompts_and_every_row_one_rank(engines, ranks):
    """N = 3 mini-batches of 6 prompts with 4 responses, whoever samples and trains them."""
    N, P, G = 3, 6, 4
    trained = [[] for _ in range(N)]
    for engine in range(engines):
        prompts = prompts_of_engine(N * P, P, engines, engine)
        responses = [(prompt, g) for prompt in prompts for g in range(G)]  # as the engine returns them
        for rank in range(ranks):
            rows = rows_of_rank(len(responses), N, ranks, rank)
            size = len(rows) // N
            for n in range(N):  # as Rollout.split cuts them
                trained[n] += [responses[row] for row in rows[n * size : (n + 1) * size]]
    for n in range(N):
        assert sorted(trained[n]) == [(p, g) for p in range(n * P, (n + 1) * P) for g in range(G)]
