"""Where training and inference send a token to other experts: one sequence, token by layer."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch

import nano_moe_rl as nano
from scaled.readback import NANO_CHECKPOINT, Recorded
from scaled.samples import replays

TITLES = {"none": "none: its own", "R2": "R2: those of π_old", "R3": "R3: those of μ_old"}
PROMPTS = 4  # whose first response a report shows


@dataclass(frozen=True)
class RouteMap:
    """T tokens of a sequence, L layers; experts are lists of ids by token and layer."""
    mode: str
    update: int  # that π_θ makes
    tokens: list[str]
    response_from: int  # the first token of the response
    engine: list[list[list[int]]]  # those of μ_old
    used: list[list[list[int]]]  # with which π_θ was computed: its own, or replayed
    live: list[list[list[int]]]  # those that the routers of π_θ chose, replay or not

    pairs = property(lambda self: [(t, layer) for t in range(len(self.used))
                                   for layer in range(len(self.used[t]))])

    def others(self, t: int, layer: int) -> int:
        """How many experts training used and the engine did not."""
        return len({*self.used[t][layer]} - {*self.engine[t][layer]})

    def overruled(self, t: int, layer: int) -> bool:
        """Whether the router chose others than those that were replayed."""
        return {*self.live[t][layer]} != {*self.used[t][layer]}


@torch.no_grad()
def maps_of_single(run: Recorded) -> tuple[list[RouteMap], list[dict]]:
    """From its checkpoint by the functions of the single file: a rollout batch is sampled, all of
    its updates but the last are made as in the run, and a response of the last one goes through π_θ
    under each mode -> a map for each, and some of the responses that were sampled. ValueError if
    the checkpoint is damaged or foreign."""
    path = run.folder / NANO_CHECKPOINT
    try:
        state = nano.load(path)
        c = nano.Config(**state["config"])
        model = nano.Model(c)
        model.load_state_dict(state["model"])
        optimizer = nano.adamw(model, c.lr)
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # whatever torch says of weights that are not of this model
        raise ValueError(f"{path}: is damaged or foreign; without it the report has no map of "
                         "routes") from error
    engine = nano.InferenceEngine(model, c.rollout_precision, c.router_noise)
    rollout = nano.sample(engine, c.mini_batches * c.mini_batch // c.group_size, c.group_size,
                          seed=2**61 + 1)  # prompts of no training and of no score
    rollout.advantages = nano.group_advantages(rollout.rewards, c.group_size)
    old, last = to_last_update(model, optimizer, rollout)
    update = state["rows"][-1]["update"]
    maps = maps_of_row(old, model, last.split(1)[0], update + c.mini_batches)
    firsts = range(0, PROMPTS * c.group_size, c.group_size)
    return maps, [{"update": update} | sample_of(rollout, i) for i in firsts
                  if i < len(rollout.tokens)]


@torch.enable_grad()
def to_last_update(model, optimizer, rollout: nano.Rollout) -> tuple[nano.Model, nano.Rollout]:
    """Makes all updates of a rollout batch with advantages but the last one, as a run does: model
    becomes π_θ of that update -> the model that is π_old, the mini-batch that the update is from."""
    c, old = model.config, deepcopy(model)
    loss = partial(nano.minirl_loss, clip=c.clip, clip_low=c.clip_low, clip_high=c.clip_high,
                   importance_sampling=c.importance_sampling, length_norm=c.length_norm)
    *earlier, last = nano.prepare_batch(model, rollout).split(c.mini_batch)
    for batch in earlier:
        nano.train_step(model, optimizer, batch, loss)
    return old, last


@torch.no_grad()
def maps_of_row(old, model, row: nano.Rollout, update: int) -> list[RouteMap]:
    """A rollout of one response through π_θ, the model, under each mode; old is π_old's model."""
    maps = []
    own = nano.policy(old, replace(row, replay=None))[2]
    for mode, replay in replays(own, row.routing).items():
        live = nano.policy(model, replace(row, replay=replay))[2]
        maps.append(map_of_row(mode, update, row, live if replay is None else replay, live))
    return maps


def words(tokens: torch.Tensor) -> list[str]:
    return [nano.VOCABULARY[token] for token in tokens.tolist()]


def map_of_row(mode: str, update: int, row: nano.Rollout, used, live) -> RouteMap:
    """Of a rollout of one response; used and live (1, T, L, A)."""
    fed = slice(int(row.lengths[0]) - 1)  # the last token is never fed
    return RouteMap(mode, update, words(row.tokens[0, fed]), int(row.prompt_lengths[0]),
                    *(x[0, fed].tolist() for x in (row.routing, used, live)))


def sample_of(rollout: nano.Rollout, i: int) -> dict:
    start, end = int(rollout.prompt_lengths[i]), int(rollout.lengths[i])
    prompt, response = words(rollout.tokens[i, :start]), words(rollout.tokens[i, start:end])
    return {"prompt_id": f"prompt {i}", "prompt": " ".join(prompt), "response": " ".join(response),
            "reward": rollout.rewards[i].item()}


def maps_of_sample(run: Recorded, sample: dict) -> list[RouteMap]:
    """From a response of samples.jsonl: a map for each mode, none if it has no routes. ValueError if
    they are not of one shape."""
    engine, old, live = (sample.get(f"{name}_experts") for name in ("engine", "old", "live"))
    if engine is None:
        return []
    modes = [*TITLES]
    if live is None:  # of an earlier version: the run's own mode alone, at the first update of a
        # rollout batch, where π_θ is π_old
        modes = [mode for mode in modes if mode == run.options.get("replay")] or modes[:1]
        old = sample.get("trainer_experts")
        live = {modes[0]: old}
    shape, tokens, start = shape_of(engine), sample.get("tokens"), sample.get("response_from")
    fine = shape is not None and isinstance(live, dict) and {*live} == {*modes} and all(
        shape_of(experts) == shape for experts in (old, *live.values()))
    if not (fine and isinstance(tokens, list) and len(tokens) == shape[0]
            and type(start) is int and 0 <= start <= shape[0]):
        raise ValueError(f"{run.folder}: a sample of update {sample['update']} has no experts for "
                         "each of its tokens and layers; remove that line of samples.jsonl")
    given = replays(old, engine)
    return [RouteMap(mode, sample["update"], [*map(str, tokens)], start, engine,
                     live[mode] if given[mode] is None else given[mode], live[mode])
            for mode in modes]


def shape_of(experts) -> tuple[int, int, int] | None:
    """(T, L, A) of nested lists of ids; None if they are anything else."""
    if not (isinstance(experts, list) and experts and isinstance(experts[0], list) and experts[0]
            and isinstance(experts[0][0], list)):
        return None
    shape = len(experts), len(experts[0]), len(experts[0][0])
    fine = all(isinstance(layers, list) and len(layers) == shape[1] and all(
        isinstance(ids, list) and len(ids) == shape[2] and all(type(x) is int for x in ids)
        for ids in layers) for layers in experts)
    return shape if fine else None
