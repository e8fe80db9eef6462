"""What two engines say about the same tokens: how far apart, which fault explains it, what to do.

Tensors in, numbers and words out. (B, T): B responses, T positions; `mask` is True where a response
token is predicted, `fed` where a token is fed. Routes (B, T, L, A) are ids of A experts in each of
L layers; columns have no order.
"""
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_moe_rl import (
    effective_sample_size, extreme_token_fraction, importance_weights, kl_k3, routing_agreement)
from scaled.sync import BROKEN, NOISE

EDGES = [10.0**power for power in range(-7, 2)]  # nats, of the histogram of |Δ log p|
BUCKETS = [0.01, 0.1, 0.5, 0.9]  # upper edges of the sampled token's probability under μ
POSITIONS = [4**power for power in range(1, 9)]  # upper edges of positions, with agreement in each
CAP = 5.0  # of importance weights, arXiv 2512.01374


@dataclass
class Observation:
    """The same tokens in both engines, at the temperature of sampling."""
    fed: Tensor  # (B, T) bool
    mask: Tensor  # (B, T) bool
    rollout_logprobs: Tensor  # (B, T) log μ
    own_logprobs: Tensor  # (B, T) log π with the trainer's own experts
    untempered_logprobs: Tensor  # (B, T) the same at temperature 1
    routing: Tensor | None = None  # (B, T, L, A) the experts of μ; None: a family without replay
    own_routing: Tensor | None = None  # (B, T, L, A) the trainer's
    replayed_logprobs: Tensor | None = None  # (B, T) log π with the experts of μ


def together(parts: list[Observation]) -> Observation:
    """Those of all ranks, padded to one length."""
    T = max(part.fed.shape[1] for part in parts)

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, T - x.shape[1]))
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Observation)}
    return Observation(**{name: None if column[0] is None else torch.cat([*map(pad, column)])
                          for name, column in columns.items()})


def distances(rollout_logprobs: Tensor, logprobs: Tensor, mask: Tensor) -> dict:
    """How far π is from μ on tokens that μ sampled, in nats. k1 and k3: joschu.net/blog/kl-approx;
    F(2): share of tokens with max(ρ, 1/ρ) > 2, arXiv 2510.11370; the effective sample size is that
    of the weights π/μ, of which those above CAP are truncated."""
    difference = (logprobs.double() - rollout_logprobs.double())[mask]
    sizes = difference.abs()
    probability = rollout_logprobs[mask].exp()
    bucket = torch.bucketize(probability, torch.tensor(BUCKETS))
    weights = importance_weights(logprobs, logprobs, rollout_logprobs, mask, token_cap=CAP)
    return {
        "mean": sizes.mean().item(), "p99": sizes.quantile(0.99).item(), "max": sizes.max().item(),
        "equal_bits": (sizes == 0).double().mean().item(),
        "histogram": torch.bucketize(sizes, torch.tensor(EDGES).double()).bincount(
            minlength=len(EDGES) + 1).tolist(),
        "by_probability": [
            {"tokens": int(n), "mean": sizes[bucket == i].mean().item() if n else None}
            for i, n in enumerate(bucket.bincount(minlength=len(BUCKETS) + 1))],
        "k1": -difference.mean().item(), "k3": kl_k3(rollout_logprobs, logprobs, mask).item(),
        "extreme_token_fraction": extreme_token_fraction(logprobs, rollout_logprobs, mask).item(),
        "effective_sample_size": effective_sample_size(logprobs - rollout_logprobs, mask).item(),
        "truncated_fraction": (weights[mask] >= CAP).double().mean().item()}


def same_experts(routing: Tensor, other: Tensor) -> Tensor:
    """(B, T, L, A) twice -> (B, T, L) bool."""
    return (routing.short().sort(-1).values == other.short().sort(-1).values).all(-1)


def routes_apart(seen: Observation) -> dict:
    """Where the engines choose other experts: agreement by layer and by position, the share of
    tokens in which each layer is the first to differ, and routing_share, what part of KL(μ‖π)
    replay closes (None where there is no gap)."""
    same = same_experts(seen.routing, seen.own_routing)
    tokens = same[seen.fed]  # (tokens, L)
    first = torch.where(tokens.all(1), tokens.shape[1], tokens.long().argmin(1))
    place = torch.arange(same.shape[1]).expand(seen.fed.shape)[seen.fed]
    bins = torch.bucketize(place, torch.tensor(POSITIONS), right=True)
    by_token = tokens.double().mean(1)
    own, replayed = (kl_k3(seen.rollout_logprobs, x, seen.mask).item()
                     for x in (seen.own_logprobs, seen.replayed_logprobs))
    return {
        "agreement_by_layer": routing_agreement(seen.routing, seen.own_routing, seen.fed).tolist(),
        "agreement_by_position": [
            {"from": ([0] + POSITIONS)[i], "tokens": int(n),
             "agreement": by_token[bins == i].mean().item()}
            for i, n in enumerate(bins.bincount()) if n],
        "first_layer_that_differs": (first.bincount(minlength=tokens.shape[1] + 1)[:-1]
                                     / len(first)).tolist(),
        "routing_share": 1 - replayed / own if own > 1e-8 else None}


# A fault is named where another explanation fits much better than that all is as it should be.

def route_fault(seen: Observation) -> str:
    """What is wrong with the engine's routes: constant, shifted by positions, a layer off, those of
    other responses, or of other weights. "" if nothing is."""
    routing, own, fed, mask = seen.routing, seen.own_routing, seen.fed, seen.mask

    def agreement(one, other, where) -> float:
        return same_experts(one, other)[where].double().mean().item() if where.any() else 0.0

    right = agreement(routing, own, fed)
    if right < 1 and len(routing[fed]) > 1 and (routing[fed] == routing[fed][0]).all():
        return f"constant routes: all tokens have the same experts, {right:.0%} the trainer's"
    T, (B, _, L, _) = slice(None), routing.shape
    others = {}
    for by in (1, 2):
        late, early = slice(by, None), slice(None, -by)
        others[f"shifted routes: a token has those of {by} position(s) before"] = agreement(
            routing[T, late], own[T, early], fed[T, late])
        others[f"shifted routes: a token has those of {by} position(s) after"] = agreement(
            routing[T, early], own[T, late], fed[T, late])
        if by < L:
            others[f"layer offset: a layer has the routes of {by} layer(s) before"] = agreement(
                routing[T, T, late], own[T, T, early], fed)
            others[f"layer offset: a layer has the routes of {by} layer(s) after"] = agreement(
                routing[T, T, early], own[T, T, late], fed)
    for by in range(1, B):  # on responses: a group shares its prompt
        others["foreign routes: a response has those of another"] = max(
            others.get("foreign routes: a response has those of another", 0.0),
            agreement(routing, own.roll(by, 0), mask & mask.roll(by, 0)))
    name, best = max(others.items(), key=lambda pair: pair[1])
    if best > right + 0.2:
        return f"{name}: so {best:.0%} agree with the trainer's, as they stand {right:.0%}"
    own_kl, replayed_kl = (kl_k3(seen.rollout_logprobs, x, mask).item()
                           for x in (seen.own_logprobs, seen.replayed_logprobs))
    if replayed_kl > max(1.5 * own_kl, 1e-6):
        return (f"stale routes: with them KL(μ‖π) is {replayed_kl:.1e}, with the trainer's own "
                f"{own_kl:.1e}; they were not made by the weights that sampled")
    return ""


def logprob_fault(seen: Observation) -> str:
    """Whether the engine's log-probabilities are of another temperature, or of other weights."""
    def apart(logprobs) -> float:
        return (logprobs - seen.rollout_logprobs)[seen.mask].abs().mean().item()

    # routes that are wrong must not hide behind this, nor this behind them
    right, untempered = apart(seen.own_logprobs), apart(seen.untempered_logprobs)
    if 3 * untempered < right and right > NOISE:
        return (f"temperature left out: the engine's log-probabilities are those of temperature 1 "
                f"({untempered:.1e} nats apart), not of the one that it samples at ({right:.1e})")
    return f"other weights: the engines are {right:.2f} nats apart" if not right <= BROKEN else ""


def sync_fault(scored: Tensor, candidates: dict[str, Tensor], fed: Tensor) -> str:
    """Which of the trainer's weights the engine has, from its log μ (B, T) of fixed tokens and what
    the trainer says with each candidate, the right one first. "" if it has that."""
    apart = {name: (x - scored)[fed].abs().mean().item() for name, x in candidates.items()}
    (right, *_), best = apart, min(apart, key=apart.get)
    if best != right and 3 * apart[best] < apart[right] and apart[right] > NOISE:
        return (f"{best}: {apart[best]:.1e} nats from the engine, the new weights "
                f"{apart[right]:.1e}")
    if not apart[right] <= BROKEN:
        return f"no known weights: the engine is {apart[right]:.2f} nats from the new ones"
    return ""


# What was published, of Qwen3-30B-A3B: F(2) above 0.1 marks a run that collapses, below 1e-4 is
# what R3 leaves of the gap (arXiv 2510.11370). In arXiv 2512.01374 the best was: at N = 1 no
# replay, at N = 2 R2, at N = 4 and 8 R3, all but the first with clipping.
COLLAPSE, CLOSED = 0.1, 1e-4
SHARE = 0.5  # of the gap, from which on replay is worth its price: our judgement


def recommend(gap: dict, precision: str, faults: list[str]) -> dict:
    """Replay, N and the engine's precision, and the figures that they rest on."""
    if faults:
        return {"replay": None, "mini_batches": None, "precision": None,
                "because": ["nothing of this is a gap to train with: mend the fault first"]}
    share, because = gap.get("routing_share"), []
    F2 = gap["own"]["extreme_token_fraction"]
    closes = share is not None and share >= SHARE
    left = gap["replayed"]["extreme_token_fraction"] if closes else F2
    finer = {"fp8": "bf16", "int8": "bf16", "bf16": "fp32"}.get(precision)
    keep = left < COLLAPSE or finer is None
    because.append(f"F(2) is {F2:.1e} with the trainer's own experts")
    if "replayed" in gap:
        because[0] += f", {gap['replayed']['extreme_token_fraction']:.1e} with those of μ"
    if left >= COLLAPSE:
        because.append(f"published runs with an F(2) above {COLLAPSE} collapsed")
    if share is not None:
        because.append(f"replay closes {share:.0%} of KL(μ‖π): " + (
            "most of the gap is one of routing" if closes else "most of it is not one of routing"))
    if F2 < CLOSED and not closes:
        replay, n = ("R3" if share is not None else "none"), 8
        because.append(f"the gap is as small as R3 leaves it elsewhere (below {CLOSED}): on-policy "
                       "none is enough, R3 at N of 4 and 8 as published, against staleness")
    elif closes:
        replay, n = "R3", 8 if left < CLOSED else 4
        because.append("R3 held N up to 8 in the published runs")
    else:
        replay, n = ("R2" if share is not None else "none"), 2
        because.append("replay leaves the gap: keep N small; R2 at N = 2 was best as published")
    if not keep:
        n = 1
    return {"replay": replay, "mini_batches": n, "precision": precision if keep else finer,
            "because": because}
