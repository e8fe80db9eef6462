"""How old the weights are that sampled a response, in updates, and what is too old to train on.

A batch of an engine that samples on while weights change has a version for each response. Nothing
else in the train step asks for it: μ is that of each response's own weights, so π_θ/μ covers their
age, and π_old is of the trainer's weights when the batch is prepared."""

from dataclasses import replace

import torch
from torch import Tensor

from nano_moe_rl import Rollout
from scaled.engine import EngineError
from scaled.metrics import Sums


def versions(rollout: Rollout) -> Tensor:
    """(B,) int64, of an int for all responses, or of a tensor with one for each. EngineError if it
    is neither."""
    rows, version = len(rollout.tokens), rollout.version
    if type(version) is int:
        return torch.full((rows,), version)
    if not isinstance(version, Tensor) or version.shape != (rows,) or version.is_floating_point():
        what = tuple(version.shape) if isinstance(version, Tensor) else repr(version)
        raise EngineError(f"version of a rollout: {what}, expected an int or {rows} whole numbers")
    return version.long()


def staleness(rollout: Rollout, version: int) -> Tensor:
    """Updates that the trainer's weights, of this version, have seen and a response's have not: (B,)
    int64. EngineError for a response from weights that the trainer has not made."""
    ages = version - versions(rollout)
    if (ages < 0).any() or (versions(rollout) < 0).any():
        wrong = versions(rollout)[(ages < 0) | (ages > version)]
        raise EngineError(f"{len(wrong)} of {len(ages)} responses are of policy version "
                          f"{wrong[0]}: the trainer is at {version}")
    return ages


def without_stale(rollout: Rollout, ages: Tensor, bound: int) -> Rollout:
    """Responses older than `bound` updates, if it is not 0, become prompt: no gradient, and no part in
    what is measured of tokens. As what a mask of objectives.py takes out they still count as
    responses in the denominator, and in the mean reward of their group."""
    stale = (ages > bound) & (bound > 0)
    prompt = rollout.lengths.where(stale.to(rollout.lengths.device), rollout.prompt_lengths)
    return replace(rollout, prompt_lengths=prompt)


def staleness_metrics(ages: Tensor, bound: int) -> dict:
    """staleness: a mean over responses, in updates; stale_responses: how many are left out. Of all
    ranks; a collective."""
    sums = Sums()
    sums.add("staleness", ages.double().mean(), len(ages))
    sums.count("stale_responses", int(((ages > bound) & (bound > 0)).sum()))
    return sums.over_ranks()
