"""What a run needs of its inference engine, and nothing else; rollout.py has vLLM's.

An engine samples for one copy of the policy. It is made from the checkpoint's folder, whose weights
are version 0, and is then at the version of the last load_weights."""
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from nano_moe_rl import Rollout


class EngineError(RuntimeError):
    """The engine failed, or breaks its contract. What a user got wrong is a ValueError instead."""


@contextmanager
def engine_called(engine: str, when: str):
    """What the libraries of an engine raise, also their ValueErrors, is a failure of the engine."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())
        raise EngineError(f"{engine} failed {when}: {type(error).__name__}: {line}") from error


class RolloutEngine(Protocol):
    version: int | None  # updates that the weights have seen; None: of no version, cannot sample
    eos: list[int]  # ids that end a response

    def generate(self, prompts: list[list[int]], group_size: int, max_response: int, seed: int,
                 version: int, top_p: float = 1.0) -> Rollout:
        """G responses to each of P prompts, row p·G + g, on the CPU; they end with one of self.eos
        or at max_response tokens. rollout_logprobs (B, T) is log μ of what was sampled from.
        routing (B, T, L, A): the experts, uint8 up to 256 and else int16, on padding spread valid
        ids; None for a family that families.py does not list. The same seed and weights give the
        same samples, where the kernels give the same logits: bf16 products can depend on what else
        is in a batch. torch's random state stays as it is. version: that of the trainer. The
        rollout's is the same, or, of an engine that samples on while weights change, (B,) integers:
        of each response the oldest weights that sampled a token of it. top_p below 1 is for
        evaluation: it takes support from μ, and which is not told.
        ValueError for prompts that do not fit. EngineError if the engine sleeps or has weights of
        another version, or a log-probability or route is missing."""

    def score(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """log μ at temperature 1 of given tokens: logprobs (B, T), 0 on padding, and routing as in
        generate. ValueError for a sequence that is too long, or has a single token."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int):
        """Every weight of the trainer under transformers' name, one at a time: each is used before
        the next decoder layer's are asked for. Nothing that was computed with old weights remains.
        Ranks iterate in step. EngineError if a weight did not come; the version is None then."""

    def sleep(self):
        """The device's memory is the trainer's; weights and cache are lost. May do nothing."""

    def wake_up(self, *tags: str):
        """Memory back for "weights", "kv_cache", or both if none is named; then load_weights."""

    def close(self):
        """The end: memory is given back, and another engine can be made."""
