"""Objectives beside MiniRL, with the signature of nano_moe_rl.minirl_loss, to pass to its train step.

Each takes logprobs, old_logprobs, rollout_logprobs (B, T), advantages (B,), mask (B, T), and returns
the loss () and the gate (B, T), True where a token has a gradient. Formulas of GRPO and CISPO:
arXiv 2512.01374, appendix A; GSPO: arXiv 2507.18071; DPPO: arXiv 2602.04879. Ratios are π_θ/π_old but where μ is named.
"""
import torch
from einops import rearrange
from torch import Tensor

from nano_moe_rl import clip_gate, importance_weights, minirl_loss

LOW, HIGH = 0.2, 0.27  # clip_gate's thresholds, for all objectives that clip a token's ratio


def standardised_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO's: (reward - mean) / standard deviation of its group. (B,), groups adjacent -> (B,)."""
    groups = rearrange(rewards, "(p g) -> p g", g=group_size)
    spread = groups.std(1, keepdim=True, correction=0) + 1e-6  # a group of equal rewards stays 0
    return ((groups - groups.mean(1, keepdim=True)) / spread).flatten()


def without_padding(mask: Tensor, *logprobs: Tensor) -> list[Tensor]:
    return [x.masked_fill(~mask, 0.0) for x in logprobs]


def grpo_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens):
    """1/G Σ_i 1/|y_i| Σ_t min(r Â, clip(r) Â), with standardised_advantages. μ plays no part."""
    logprobs, old_logprobs = without_padding(mask, logprobs, old_logprobs)
    ratio, advantage = (logprobs - old_logprobs).exp(), advantages[:, None]
    objective = (ratio * advantage).minimum(ratio.clamp(1 - LOW, 1 + HIGH) * advantage) * mask
    per_response = objective.sum(1) / mask.sum(1).clamp(min=1)
    return -per_response.sum() / n_sequences, clip_gate(logprobs, old_logprobs, advantages)


def cispo_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens):
    """1/Σ|y| Σ_i Σ_t sg[clip(r)] Â log π_θ, with standardised_advantages: no token loses its gradient."""
    logprobs, old_logprobs = without_padding(mask, logprobs, old_logprobs)
    weights = (logprobs - old_logprobs).detach().exp().clamp(1 - LOW, 1 + HIGH)
    return -(weights * advantages[:, None] * logprobs * mask).sum() / n_tokens, mask.new_ones(mask.shape)


def gspo_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens,
              low=3e-4, high=4e-4):
    """min(s Â, clip(s) Â) with s = (π_θ(y)/π_old(y))^(1/|y|), one ratio for the whole response."""
    logprobs, old_logprobs = without_padding(mask, logprobs, old_logprobs)
    log_ratio = (logprobs - old_logprobs).sum(1) / mask.sum(1).clamp(min=1)
    ratio = log_ratio.exp()
    objective = (ratio * advantages).minimum(ratio.clamp(1 - low, 1 + high) * advantages)
    gate = clip_gate(log_ratio[:, None], log_ratio.new_zeros(len(mask), 1), advantages, low, high)
    return -objective.sum() / n_sequences, gate.expand_as(mask)


def dppo_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens,
              threshold=0.15):
    """MiniRL with DPPO's mask: a token is dropped where its probability already lies `threshold`
    away from μ, on the side to which its advantage pushes. Anchored on μ, not on π_old."""
    logprobs, old_logprobs, rollout_logprobs = without_padding(mask, logprobs, old_logprobs, rollout_logprobs)
    moved = (logprobs.exp() - rollout_logprobs.exp()).detach() * advantages.sign()[:, None]
    gate = moved <= threshold
    weights = importance_weights(logprobs, old_logprobs, rollout_logprobs, mask)
    return -(weights * gate * advantages[:, None] * logprobs).sum() / n_sequences, gate


def random_drop_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens):
    """A control, not a method: MiniRL which drops as many tokens as the clip gate would, but random ones."""
    n_dropped = (~clip_gate(logprobs, old_logprobs, advantages) & mask).sum()
    order = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2).flatten().argsort()
    gate = mask.new_ones(mask.numel()).index_fill(0, order[:n_dropped], False).view_as(mask)
    loss, _ = minirl_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask & gate,
                          n_sequences=n_sequences, n_tokens=n_tokens, clip=False)
    return loss, gate


def icepop_loss(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens,
                low=0.5, high=5.0, clip=True):
    """MiniRL with IcePop's weight of the engines' gap: π_old/μ_old where it lies within [low, high], else 0."""
    logprobs, old_logprobs, rollout_logprobs = without_padding(mask, logprobs, old_logprobs, rollout_logprobs)
    gap = (old_logprobs - rollout_logprobs).detach().exp()
    gate = (gap >= low) & (gap <= high)
    if clip:
        gate &= clip_gate(logprobs, old_logprobs, advantages, LOW, HIGH)
    weights = importance_weights(logprobs, old_logprobs, old_logprobs, mask) * gap
    return -(weights * gate * advantages[:, None] * logprobs).sum() / n_sequences, gate
