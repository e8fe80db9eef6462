"""Objectives beside MiniRL, for the single file's train(loss_fn=…) and for --objective of scaled.

Each takes logprobs, old_logprobs, rollout_logprobs (B, T), advantages (B,), mask (B, T), of the
whole mini-batch n_sequences and n_tokens, and its options by name -> loss (), gate (B, T), True
where a token has a gradient. Outside the mask nothing has influence. r is π_θ/π_old; ρ is
π_old/μ_old, the gap between the engines. At N = 1 π_old is π_θ.

    name           what it does to a token's weight, or to the objective        from
    GRPO           min(r Â, clip(r) Â), mean over a response                    arXiv 2402.03300
    CISPO          clip(r) as a constant, mean over tokens                      arXiv 2506.13585
    GSPO           one ratio a response, (Π r)^(1/|y|), clipped                 arXiv 2507.18071
    DPPO           0 where |π_θ - μ| > .15 on the side it is pushed to          arXiv 2602.04879
    IcePop         ρ where .5 ≤ ρ ≤ 5, else 0                                   arXiv 2510.18855
    MIS-token      0 where ρ < .5 or ρ > 2                                      verl's documents
    MIS            0 for a response with Π ρ > 2                                verl's documents
    MIS-geometric  0 for a response with (Π ρ)^(1/|y|) outside [.99, 1.001]     verl's documents
    OPSM           0 for a response with Â < 0 and mean log μ/π_θ > .1          arXiv 2512.02556
    veto           0 for a response with a token of ρ < 1e-4                    verl's documents

The last five are MiniRL but for that; the δ of OPSM is not published, .05 to .2 was found to work.
"""
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from einops import rearrange
from torch import Tensor

from nano_moe_rl import clip_gate, group_advantages, importance_weights, minirl_loss

OPTIONS = ("clip", "clip_low", "clip_high", "importance_sampling", "length_norm")


def standardised_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO's: (reward - mean) / standard deviation of its group. (B,), groups adjacent -> (B,)."""
    groups = rearrange(rewards, "(p g) -> p g", g=group_size)
    spread = groups.std(1, keepdim=True, correction=0) + 1e-6  # a group of equal rewards stays 0
    return ((groups - groups.mean(1, keepdim=True)) / spread).flatten()


def without_padding(mask: Tensor, *logprobs: Tensor) -> list[Tensor]:
    return [x.masked_fill(~mask, 0.0) for x in logprobs]


def mean_of_response(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T), 0 outside the mask -> (B,)."""
    return x.sum(1) / mask.sum(1).clamp(min=1)


def grpo_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens,
              clip_low=0.2, clip_high=0.27):
    """1/G Σ_i 1/|y_i| Σ_t min(r Â, clip(r) Â), with standardised_advantages. μ plays no part."""
    logprobs, old_logprobs = without_padding(mask, logprobs, old_logprobs)
    ratio, advantage = (logprobs - old_logprobs).exp(), advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    objective = (ratio * advantage).minimum(clipped) * mask
    gate = clip_gate(logprobs, old_logprobs, advantages, clip_low, clip_high)
    return -mean_of_response(objective, mask).sum() / n_sequences, gate


def cispo_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens,
               clip_low=0.2, clip_high=0.27):
    """1/Σ|y| Σ_i Σ_t sg[clip(r)] Â log π_θ, with standardised_advantages: no token loses its
    gradient."""
    logprobs, old_logprobs = without_padding(mask, logprobs, old_logprobs)
    weights = (logprobs - old_logprobs).detach().exp().clamp(1 - clip_low, 1 + clip_high)
    objective = weights * advantages[:, None] * logprobs * mask
    return -objective.sum() / n_tokens, torch.ones_like(mask)


def gspo_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens,
              low=3e-4, high=4e-4):
    """min(s Â, clip(s) Â) with s = (π_θ(y)/π_old(y))^(1/|y|), one ratio for the whole response."""
    logprobs, old_logprobs = without_padding(mask, logprobs, old_logprobs)
    log_ratio = mean_of_response(logprobs - old_logprobs, mask)
    ratio = log_ratio.exp()
    objective = (ratio * advantages).minimum(ratio.clamp(1 - low, 1 + high) * advantages)
    gate = clip_gate(log_ratio[:, None], log_ratio.new_zeros(len(mask), 1), advantages, low, high)
    return -objective.sum() / n_sequences, gate.expand_as(mask)


def dppo_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens,
              threshold=0.15):
    """MiniRL with DPPO's mask: a token is dropped where its probability already lies `threshold`
    away from μ, on the side to which its advantage pushes. Anchored on μ, not on π_old."""
    logprobs, old_logprobs, rollout_logprobs = without_padding(
        mask, logprobs, old_logprobs, rollout_logprobs)
    moved = (logprobs.exp() - rollout_logprobs.exp()).detach() * advantages.sign()[:, None]
    gate = moved <= threshold
    weights = importance_weights(logprobs, old_logprobs, rollout_logprobs, mask)
    return -(weights * gate * advantages[:, None] * logprobs).sum() / n_sequences, gate


def icepop_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences,
                n_tokens, low=0.5, high=5.0, clip=True, clip_low=0.2, clip_high=0.27):
    """MiniRL with IcePop's weight of the engines' gap: ρ where it lies within [low, high], else 0;
    that of staleness, min(r, 5), is MiniRL's."""
    logprobs, old_logprobs, rollout_logprobs = without_padding(
        mask, logprobs, old_logprobs, rollout_logprobs)
    gap = (old_logprobs - rollout_logprobs).detach().exp()
    gate = (gap >= low) & (gap <= high)
    gate &= clip_gate(logprobs, old_logprobs, advantages, clip_low, clip_high) | (not clip)
    weights = importance_weights(logprobs, old_logprobs, rollout_logprobs, mask, "staleness") * gap
    return -(weights * gate * advantages[:, None] * logprobs).sum() / n_sequences, gate


# ------------------------------------- which tokens, or whole responses, are taken out: (B, T) bool
def within_token(logprobs, old_logprobs, rollout_logprobs, advantages, mask, low=0.5, high=2.0):
    log_gap = old_logprobs - rollout_logprobs
    return (log_gap.exp() >= low) & (log_gap.exp() <= high)


def within_sequence(logprobs, old_logprobs, rollout_logprobs, advantages, mask, cap=2.0):
    log_gap = (old_logprobs - rollout_logprobs).double().sum(1, keepdim=True)
    return (log_gap.exp() <= cap).expand_as(mask)


def within_geometric(logprobs, old_logprobs, rollout_logprobs, advantages, mask, low=0.99,
                     high=1.001):
    mean = mean_of_response((old_logprobs - rollout_logprobs).double(), mask).exp()[:, None]
    return ((mean >= low) & (mean <= high)).expand_as(mask)


def not_both_stale_and_bad(logprobs, old_logprobs, rollout_logprobs, advantages, mask, delta=0.1):
    far = mean_of_response(rollout_logprobs - logprobs, mask) > delta
    return ~(far & (advantages < 0))[:, None].expand_as(mask)


def no_extreme_token(logprobs, old_logprobs, rollout_logprobs, advantages, mask, low=1e-4):
    extreme = (old_logprobs - rollout_logprobs).double().exp() < low
    return ~extreme.any(1, keepdim=True).expand_as(mask)


def rejecting(keep: Callable, doc: str) -> Callable:
    """MiniRL on what `keep` keeps; what it takes out still counts in the denominator."""
    def loss_fn(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences,
                n_tokens, clip=True, clip_low=0.2, clip_high=0.27):
        tensors = without_padding(mask, logprobs, old_logprobs, rollout_logprobs)
        kept = keep(*[x.detach() for x in tensors], advantages, mask)
        loss, gate = minirl_loss(*tensors, advantages, mask & kept, n_sequences=n_sequences,
                                 n_tokens=n_tokens, clip=clip, clip_low=clip_low,
                                 clip_high=clip_high)
        return loss, gate & kept
    loss_fn.__doc__ = doc
    return loss_fn


@dataclass(frozen=True)
class Objective:
    loss: Callable
    advantages: Callable = group_advantages  # (B,) rewards, group_size -> (B,)

    def options(self, c) -> dict:
        """Those of OPTIONS that the loss takes, by a configuration. ValueError for one that is not
        at its default and that the loss would ignore."""
        takes = inspect.signature(self.loss).parameters
        for name in OPTIONS:
            value = getattr(c, name)
            if name not in takes and value != type(c).__dataclass_fields__[name].default:
                raise ValueError(f"--{name.replace('_', '-')} {value}: --objective {c.objective} "
                                 "would ignore it; leave it out")
        return {name: getattr(c, name) for name in OPTIONS if name in takes}


OBJECTIVES = {
    "MiniRL": Objective(minirl_loss),
    "GRPO": Objective(grpo_loss, standardised_advantages),
    "CISPO": Objective(cispo_loss, standardised_advantages),
    "GSPO": Objective(gspo_loss, standardised_advantages), "DPPO": Objective(dppo_loss),
    "IcePop": Objective(icepop_loss),
    "MIS-token": Objective(rejecting(within_token, "Tokens with ρ outside [.5, 2] are dropped.")),
    "MIS": Objective(rejecting(within_sequence, "Responses with Π ρ > 2 are dropped.")),
    "MIS-geometric": Objective(rejecting(
        within_geometric, "Responses with a mean ρ, geometric, outside [.99, 1.001] are dropped.")),
    "OPSM": Objective(rejecting(
        not_both_stale_and_bad, "Responses with Â < 0 far from μ are dropped: mean log μ/π > .1.")),
    "veto": Objective(rejecting(no_extreme_token, "Responses with a token of ρ < 1e-4 go.")),
}


def load_objective(name: str) -> Objective:
    """One of OBJECTIVES, or module:function, a loss of your own, with MiniRL's advantages.
    ValueError if there is none."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"--objective {name}: give {' or '.join(OBJECTIVES)} or module:function")
    try:
        loss = getattr(import_module(module), function)
        missing = {"n_sequences", "n_tokens"} - inspect.signature(loss).parameters.keys()
    except Exception as error:  # whatever a user's module raises when it is imported
        raise ValueError(f"--objective {name}: {type(error).__name__}: {error}") from error
    if missing:
        raise ValueError(f"--objective {name}: takes no {' and no '.join(sorted(missing))}; give "
                         "it the signature of nano_moe_rl.minirl_loss")
    return Objective(loss)


def random_drop_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences,
                     n_tokens):
    """A control, not a method: MiniRL which drops as many tokens as the clip gate would, but random
    ones."""
    n_dropped = (~clip_gate(logprobs, old_logprobs, advantages) & mask).sum()
    order = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2).flatten().argsort()
    gate = mask.new_ones(mask.numel()).index_fill(0, order[:n_dropped], False).view_as(mask)
    loss, _ = minirl_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask & gate,
                          n_sequences=n_sequences, n_tokens=n_tokens, clip=False)
    return loss, gate
