"""Did the trainer's weights arrive in the running engine? Asked of any engine."""
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from nano_moe_rl import DEVICE
from scaled.engine import EngineError, RolloutEngine

# Mean |difference| of log-probabilities, in nats, of two engines with the same weights and routes.
NOISE = 1e-5  # below this the fp32 sums differ in order only: no threshold goes lower
BROKEN = 0.5  # above this not even the first sync can be right; 4-bit engines stay below 0.1


class SyncCheck:
    """Does the engine have the trainer's weights? The first call sets the measure: before any sync,
    when both have the weights of the same folder. Later ones are made after a sync that is due."""

    def __init__(self, syncs: int = 3, every: int = 20):
        """Due are the first `syncs` synchronisations, and then every so many. syncs 0: none."""
        self.first, self.syncs, self.every, self.count = None, syncs, every, 0

    def due(self) -> bool:
        """Whether the next sync is to be checked; called once for each. Not the first alone: what
        an engine keeps of its first weights is wrong by as much as training has moved them."""
        self.count += 1
        return self.syncs > 0 and (self.count <= self.syncs or self.count % self.every == 0)

    def __call__(self, engine: RolloutEngine, logprobs_of: Callable, sequences: list[list[int]],
                 scored: tuple[Tensor, Tensor] | None = None) -> float:
        """Mean |log π - log μ| of fixed tokens at temperature 1, over all ranks, in nats.
        logprobs_of(tokens (B, T + 1), lengths (B,), routing (B, T, L, A)) -> (B, T) is the
        trainer's forward with the engine's routes replayed, if it has any, so that a flip of
        experts by rounding does not hide broken weights. scored: what engine.score said of them,
        if it was asked before. EngineError above three times the first value."""
        logprobs, routing = scored or engine.score(sequences)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], True)
        fed = torch.arange(1, tokens.shape[1]) < lengths[:, None]
        other = logprobs_of(tokens, lengths, routing).detach().cpu()
        difference = (other - logprobs)[fed].double().abs()
        total = torch.stack([difference.sum(), fed.sum()]).to(DEVICE)
        if dist.is_initialized():  # every rank stops, or none
            dist.all_reduce(total)
        mean = (total[0] / total[1]).item()
        bound = BROKEN if self.first is None else max(3 * self.first, NOISE)
        if not mean <= bound:  # NaN too
            raise EngineError(
                f"weight sync broken at policy version {engine.version}: engine and trainer differ "
                f"by {mean:.2e} nats a token, {bound:.2e} is allowed" + (
                    "" if self.first is None else f" (3 x {self.first:.2e} of the first check)"))
        if self.first is None:
            self.first = mean
        return mean
