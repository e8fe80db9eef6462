"""What a run says of single responses, in samples.jsonl: the text, its reward, some of its routes.

Each object has `update`, the updates made when it was written, and `version`, those that the
weights of the engine had seen; `source`: held out, always the same prompts, or training."""

from torch import Tensor

from nano_moe_rl import Rollout
from scaled.data import Prompt
from scaled.metrics import truncated
from scaled.staleness import versions

COUNT = 4  # responses at a time
TEXT = 4000  # characters of a prompt or a response; what is longer lacks its middle
BEFORE, TOKENS = 8, 48  # a map of routes has so many tokens, the first so many of the prompt


def samples(rollout: Rollout, asked: list[Prompt], tokenizer, source: str, count: int, ends,
            max_response: int) -> list[dict]:
    """The first response to each of the first prompts. rollout: rewarded, of as many responses to
    each prompt that was asked. ends: tokens that end a response."""
    each, cut = len(rollout.tokens) // len(asked), truncated(rollout, max_response, ends)
    of = versions(rollout).tolist()
    rows = []
    for i, prompt in enumerate(asked[:count]):
        row = i * each
        response = rollout.tokens[row, rollout.prompt_lengths[row]:rollout.lengths[row]].tolist()
        rows.append({
            "version": of[row], "source": source, "prompt_id": prompt.id,
            "prompt": shorten(tokenizer.decode(prompt.tokens)), "reference": prompt.answer,
            "response": shorten(tokenizer.decode(response, skip_special_tokens=True)),
            "reward": rollout.rewards[row].item(), "truncated": bool(cut[row])})
    return rows


def replays(old: Tensor, engine: Tensor) -> dict[str, Tensor | None]:
    """The experts that each mode gives to π_θ, of those of π_old and μ_old; None: its own."""
    return {"none": None, "R2": old, "R3": engine}


def routes_of(row: Rollout, old: Tensor, live: dict[str, Tensor], tokenizer) -> dict:
    """For a map of routes: the last tokens of the prompt and the first of the response, and for each
    the experts by layer to which μ_old and π_old sent it, and which the routers of π_θ choose under
    each mode. row: a rollout of one response; old and live (1, T, L, A)."""
    start = max(0, int(row.prompt_lengths[0]) - BEFORE)
    part = slice(start, min(start + TOKENS, int(row.lengths[0]) - 1))  # the last is never fed
    return {"tokens": [tokenizer.decode([token]) for token in row.tokens[0, part].tolist()],
            "response_from": int(row.prompt_lengths[0]) - start,
            "engine_experts": row.routing[0, part].tolist(), "old_experts": old[0, part].tolist(),
            "live_experts": {mode: chosen[0, part].tolist() for mode, chosen in live.items()}}


def shorten(text: str) -> str:
    if len(text) <= TEXT:
        return text
    return f"{text[:TEXT // 2]} [… {len(text) - TEXT} characters …] {text[-TEXT // 2:]}"
