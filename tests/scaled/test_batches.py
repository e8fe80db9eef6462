"""Micro-batches by a token budget, and parts of a rollout."""
from dataclasses import fields, replace
from itertools import combinations, pairwise

import pytest
import torch
import torch.distributed as dist

import nano_moe_rl as nano
from processes import join_group, run_ranks
from scaled import batches
from scaled.batches import (AXES, PADDING, PASS, equal_passes, micro_batches, prompts_of_engine, rows_of_rank,
                            shared_prefixes, take)

LENGTHS = [3, 11, 4, 4, 9, 2, 11, 5]


def share_padded(lengths, passes):
    """By counting the positions of each row of each pass; the last token of a row is not fed."""
    wide = [max(lengths[i] for i in rows) - 1 for rows in passes for _ in rows]
    return 1 - sum(n - 1 for n in lengths) / sum(wide)


@pytest.mark.parametrize("budget", [1, 8, 11, 12, 22, 23, 40, 1000])
def test_batches_are_a_partition_within_the_budget(budget, monkeypatch):
    for least in (PASS, 1):
        monkeypatch.setattr(batches, "PASS", least)
        passes = micro_batches(LENGTHS, budget)
        assert sorted(sum(passes, [])) == list(range(len(LENGTHS)))
        for rows in passes:
            longest = max(LENGTHS[i] for i in rows)
            assert len(rows) == 1 or len(rows) * longest <= budget
        for a, b in combinations(passes, 2):  # sorted: no batch pads its rows to another's length
            assert min(LENGTHS[i] for i in a) >= max(LENGTHS[i] for i in b)
        if least == 1:
            assert share_padded(LENGTHS, passes) <= PADDING
            continue
        for a, b in zip(passes, passes[1:]):  # full: the next row would not have fitted
            assert (len(a) + 1) * max(LENGTHS[i] for i in a) > budget


def test_known_packing(monkeypatch):
    assert micro_batches(LENGTHS, 22) == [[1, 6], [4, 7], [2, 3, 0, 5]]
    assert micro_batches([30, 2], 22) == [[0], [1]]  # above the budget: alone, not refused
    assert micro_batches([], 22) == []
    monkeypatch.setattr(batches, "PASS", 1)  # 48 positions for 41, and after a cut in each of the last two 42
    assert micro_batches(LENGTHS, 22) == [[1, 6], [4], [7], [2, 3, 0], [5]]
    assert micro_batches([9, 9, 9], 100, [8, 8, 1]) == [[0, 1], [2]]  # by what is fed, not by what the longest has


def test_a_cut_saves_as_much_as_a_pass_costs():
    rows = [PASS + 3, PASS + 3, 2]
    assert micro_batches(rows, 10**6) == [[0, 1], [2]]  # 1,025 of 3,075 positions
    assert micro_batches([n - 2 for n in rows[:2]] + [2], 10**6) == [[0, 1, 2]]  # 1,023
    assert micro_batches(rows[:2] + [int(PASS * 0.9)], 10**6) == [[0, 1, 2]]  # 3 %


def test_cuts_are_about_as_few_as_can_be(monkeypatch):
    """Against every way to cut the sorted rows. A cut where it saves most need not be one of the fewest."""
    monkeypatch.setattr(batches, "PASS", 1)
    generator, more = torch.Generator().manual_seed(0), []
    for _ in range(60):
        lengths = torch.randint(2, 30, (9,), generator=generator).sort(descending=True).values.tolist()
        fewest = next(n for n in range(10) for places in combinations(range(1, 9), n)
                      if share_padded(lengths, [range(a, b) for a, b in pairwise((0, *places, 9))]) <= PADDING)
        more.append(len(micro_batches(lengths, 10**6)) - 1 - fewest)
    assert min(more) >= 0 and max(more) <= 1


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="token_budget 0"):
        micro_batches(LENGTHS, 0)


OF_RANKS = [[50, 49, 48, 20], [45, 9, 44, 43], [44, 11, 43, 43]]


def passes_of_a_rank(rank, world, folder):
    join_group(rank, world, folder)
    batches.PASS = 1
    found = [equal_passes(OF_RANKS[rank], budget, "cpu") for budget in (50, 120, 1000)]
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_a_pass_has_as_many_rows_on_every_rank(tmp_path):
    assert equal_passes([50, 49], 50, "cpu") == [[0], [1]]  # without a process group
    run_ranks(passes_of_a_rank, 3, tmp_path, seconds=60)
    found = [torch.load(tmp_path / str(rank)) for rank in range(3)]
    for n, budget in enumerate((50, 120, 1000)):
        own = [of[n] for of in found]
        assert len({tuple(map(len, passes)) for passes in own}) == 1
        computed = fed = 0
        for lengths, passes in zip(OF_RANKS, own):
            assert [lengths[i] for rows in passes for i in rows] == sorted(lengths, reverse=True)
            assert sorted(sum(passes, [])) == [0, 1, 2, 3]
            assert all(len(rows) * max(lengths[i] for i in rows) <= budget for rows in passes)
            computed += sum(len(rows) * (max(lengths[i] for i in rows) - 1) for rows in passes)
            fed += sum(lengths) - len(lengths)
        assert fed >= (1 - PADDING) * computed
    assert found[0] == [[[0], [1], [2], [3]], [[0, 1], [2], [3]], [[0, 1, 2], [3]]]
    assert found[1] == [[[0], [2], [3], [1]], [[0, 2], [3], [1]], [[0, 2, 3], [1]]]


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


def test_prefixes_in_whole_blocks():
    """Against every prefix, one token at a time."""
    def slow(a, b, block):
        return max(n for n in range(0, len(b), block) if n <= len(a) and a[:n] == b[:n])

    generator = torch.Generator().manual_seed(0)
    prompts = [[7] * n + torch.randint(2, (m,), generator=generator).tolist()
               for n, m in torch.randint(0, 14, (40, 2), generator=generator).tolist() if n + m]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    for block in (1, 3, 4):
        found = shared_prefixes(prompts, block)
        assert found == [0] + [slow(a, b, block) for a, b in zip(prompts, prompts[1:])]
        assert any(found[1::2]) and any(found[2::2])
    assert shared_prefixes(prompts, 0) == [0] * len(prompts) and shared_prefixes([], 4) == []
