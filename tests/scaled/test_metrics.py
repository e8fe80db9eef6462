"""What a mini-batch and a rollout batch say beside the metrics of the single file, against slow versions."""
import math
from types import SimpleNamespace

import pytest
import torch
from processes import join_group, run_ranks

from scaled.metrics import batch_metrics, equal_groups, weight_truncated_fraction

# log π_θ, log π_old and log μ of two responses, of two and of three tokens; 0.0 is padding
PI = torch.tensor([[-0.2, -0.1, 0.0], [-0.3, -0.5, -1.0]])
OLD = torch.tensor([[-1.9, -0.1, 0.0], [-2.0, -0.9, -0.6]])
MU = torch.tensor([[-1.7, -1.8, -9.0], [-1.0, -0.6, -0.3]])
MASK = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize("kind, cap", [("token", 5), ("staleness", 5), ("sequence", 2)])
def test_weights_that_a_cap_made_smaller(kind, cap):
    """In double precision, token by token: of a sequence all tokens have one weight."""
    expected = []
    for row in range(2):
        columns = [t for t in range(3) if MASK[row, t]]
        logs = [(PI - (OLD if kind == "staleness" else MU))[row, t].item() for t in columns]
        weights = [math.exp(sum(logs))] * len(logs) if kind == "sequence" else [math.exp(x) for x in logs]
        expected += [weight > cap for weight in weights]
    assert 0 < sum(expected) < 5
    got = weight_truncated_fraction(PI, OLD, MU, MASK, kind)
    assert got.item() == pytest.approx(sum(expected) / 5)


@pytest.mark.parametrize("factor, share", [(1 - 1e-4, 0.0), (1 + 1e-4, 1.0)])
@pytest.mark.parametrize("kind, cap", [("token", 5), ("staleness", 5), ("sequence", 2)])
def test_the_cap_from_both_sides(kind, cap, factor, share):
    zero = torch.zeros(1, 1)
    logprobs = torch.tensor([[math.log(cap * factor)]])
    assert weight_truncated_fraction(logprobs, zero, zero, zero == 0, kind) == share
    huge = torch.full((1, 1), 1e4)  # whose weight is no number without a cap
    assert weight_truncated_fraction(huge, zero, zero, zero == 0, kind) == 1.0


def test_groups_whose_rewards_are_all_equal():
    rewards = torch.tensor([0.0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 0.5, 0.5, 0.5])
    slow = [len(set(rewards[i:i + 3].tolist())) == 1 for i in range(0, 15, 3)]
    assert equal_groups(rewards, 3) == sum(slow) / 5 == 3 / 5
    # the mean of three equal rewards can differ from each of them
    assert equal_groups(torch.full((6,), 0.1), 3) == 1


def rows(n, cut):
    """A batch of n responses of three tokens to one token, of which `cut` have no end token, 7."""
    tokens = torch.tensor([[1, 2, 3, 4 if i < cut else 7] for i in range(n)])
    lengths = torch.full((n,), 4)
    return SimpleNamespace(tokens=tokens, lengths=lengths, prompt_lengths=lengths - 3, routing=None)


def batch_of_a_rank(rank, world, folder):
    """Two engines of one rank each."""
    join_group(rank, world, folder)
    equal = [[0.25, 0.0], [0.75, 1.0]][rank]  # of two mini-batches
    got = batch_metrics(rows(3, rank), 3, [7], {"errors": rank}, equal)
    assert got["equal_groups"] == pytest.approx([0.5, 0.5]) and got["truncation_rate"] == pytest.approx(1 / 6)
    assert got["reward_errors"] == 1 and got["tokens"] == 24


def test_a_rollout_batch_over_ranks(tmp_path):
    run_ranks(batch_of_a_rank, 2, str(tmp_path))
    assert len([*tmp_path.glob("group-*")]) == 1  # that of the two ranks


def test_a_response_that_ends_at_the_limit_is_not_cut():
    assert batch_metrics(rows(4, 1), 3, [7], {}, torch.tensor([True]))["truncation_rate"] == 0.25
    assert batch_metrics(rows(4, 1), 4, [7], {}, torch.tensor([True]))["truncation_rate"] == 0.0
