"""The train step of nano_moe_rl.py on a sharded policy: same maths, micro-batches by length."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nano_moe_rl import DEVICE, Rollout
from scaled.batches import equal_passes, take
from scaled.config import Config
from scaled.metrics import Sums
from scaled.ranks import RANK
from scaled.replay import routed
from scaled.terminal import bar

if TYPE_CHECKING:  # imports transformers, for which --help should not wait
    from scaled.policy import Policy


def passes(batch: Rollout, c: Config) -> Iterator[tuple[list[int], Rollout]]:
    """The rows of each forward pass, and these rows on the device. As many passes on every rank."""
    for rows in bar(equal_passes(batch.lengths.tolist(), c.token_budget, DEVICE), "passes",
                    delay=2, disable=True if RANK else None):
        part = take(batch, rows)  # routes stay narrow, here and on the device
        yield rows, replace(part, **{name: x.to(DEVICE) for name, x in vars(part).items()
                                     if isinstance(x, Tensor)})


def move(policy: "Policy", optimizer: torch.optim.Optimizer, device: str):
    """Weights, buffers and optimiser state to a device, in place: off a GPU while the engine
    samples, and back. Gradients have to be gone. Frees what torch has cached on the GPU."""
    policy.to(device)  # the parameters stay the objects that FSDP and the optimiser hold
    for state in optimizer.state.values():
        state |= {name: x.to(device) for name, x in state.items() if isinstance(x, Tensor)}
    torch.cuda.empty_cache()  # without a GPU: nothing


@torch.no_grad()
def score(policy: "Policy", tokens: Tensor, lengths: Tensor, replay: Tensor | None,
          head: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """log π (B, T) of given tokens (B, T + 1) at temperature 1, and the experts (B, T, L, A) that
    its routers choose, whether or not replay (B, T, L, A) gives them others; None for a family whose
    routers are not known. lengths (B,). head: as in Policy.forward. A collective."""
    replay = None if replay is None else replay.to(DEVICE)
    fixed = Rollout(tokens.to(DEVICE), lengths, lengths.to(DEVICE), replay=replay)
    with routed(policy.model, fixed.replay, fixed.fed) as routes:
        logprobs, _ = policy(fixed.tokens, fixed.fed, 1.0, head)
    return logprobs, routes.routing


def logprobs_of(policy: "Policy", tokens: Tensor, lengths: Tensor, routing: Tensor | None,
                head: Tensor | None = None) -> Tensor:
    """log π (B, T) by the engine's experts, if it has any; as in score."""
    return score(policy, tokens, lengths, routing, head)[0]


def prepare_batch(policy: "Policy", rollout: Rollout, c: Config) -> Rollout:
    """π_old and the routing to replay, for this rank's rows of a rollout batch, on the CPU; rewards
    and advantages are there already. ValueError if a real token has no route to replay."""
    batch = replace(rollout)
    if c.replay == "R3":
        batch.replay = rollout.routing  # π_old and π_θ use the experts of μ_old
    if c.mini_batches == 1:  # the training forward is π_old and π_θ at once
        return batch
    old_logprobs = torch.zeros_like(rollout.rollout_logprobs)
    if c.replay == "R2":
        batch.replay = torch.zeros_like(rollout.routing)  # π_θ will use the experts of π_old
    for rows, part in passes(batch, c):
        given = part.replay if c.replay == "R3" else None
        with torch.no_grad(), routed(policy.model, given, part.fed) as routes:
            logprobs, _ = policy(part.tokens, part.fed, c.temperature, mask=part.mask)
        columns = logprobs.shape[1]
        old_logprobs[rows, :columns] = logprobs.cpu()
        if c.replay == "R2":
            batch.replay[rows, :columns] = routes.routing.to(batch.replay)
    batch.old_logprobs = old_logprobs
    return batch


def train_step(policy: "Policy", optimizer: torch.optim.Optimizer, batch: Rollout, c: Config,
               loss_fn: Callable) -> dict:
    """One update from one mini-batch, of which every rank has its rows -> metrics, all of them from
    before the update, and the learning rate that it had. c.lr_by scales that of the optimizer, which
    is set anew before each update. loss_fn: as in objectives.py. On every rank, weights kept,
    FloatingPointError if it is not finite, RuntimeError if no response is left."""
    counts = torch.stack([torch.tensor(len(batch.tokens)), batch.mask.sum()]).to(DEVICE)
    if dist.is_initialized():
        dist.all_reduce(counts)
    n_sequences, n_tokens = counts.tolist()  # of the whole mini-batch: one denominator
    if not n_tokens:
        raise RuntimeError(f"none of {n_sequences} responses is left to train on: all are older "
                           f"than --max-staleness {c.max_staleness}")
    sums, loss_sum = Sums(), torch.zeros((), device=DEVICE)
    for rows, part in passes(batch, c):
        with routed(policy.model, part.replay, part.fed) as routes:
            logprobs, entropies = policy(part.tokens, part.fed, c.temperature, mask=part.mask)
            old = logprobs.detach() if part.old_logprobs is None else part.old_logprobs
            loss, gate = loss_fn(
                logprobs, old, part.rollout_logprobs, part.advantages, part.mask,
                n_sequences=n_sequences, n_tokens=n_tokens)
            loss.backward()  # inside: a checkpointed layer is routed again here
        loss_sum += loss.detach()
        sums.add_pass(part, logprobs.detach(), old, entropies, routes.routing, gate,
                      c.importance_sampling)
    if dist.is_initialized():
        dist.all_reduce(loss_sum)
    norm = nn.utils.clip_grad_norm_(policy.parameters(), c.gradient_norm)
    norm = getattr(norm, "full_tensor", lambda: norm)()
    if not (loss_sum.isfinite() and norm.isfinite()):  # the same on every rank
        raise FloatingPointError(f"loss {loss_sum:.3g}, gradient norm {norm:.3g}")
    means = sums.over_ranks()
    slow_down(optimizer, means, c.lr_by)
    optimizer.step()
    optimizer.zero_grad()  # here, so that no gradients take up memory during the next rollout
    return means | {"loss": loss_sum.item(), "grad_norm": norm.item(),
                    "lr": optimizer.param_groups[0]["lr"]}


def slow_down(optimizer: torch.optim.Optimizer, metrics: dict, by: str):
    """The learning rate times √(ESS / n), of n tokens or of n responses with weights Π π_θ/μ, which are
    not truncated: the second is VCPO's rule for AdamW (arXiv 2602.17616, and its code)."""
    name = {"token": "effective_sample_size", "response": "response_sample_size"}.get(by)
    for group in optimizer.param_groups if name else ():
        group["lr"] *= metrics[name] ** 0.5
