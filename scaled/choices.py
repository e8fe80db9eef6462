"""Other options than those of a plan: which would make it fit, and what each costs and returns."""

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import combinations, product

from scaled.config import Config
from scaled.facts import GPUS, OUTCOMES
from scaled.machine import Machine
from scaled.seconds import Seconds

OF_CONFIG = {f.name for f in fields(Config)}
REPLAYS, MINI_BATCHES, ROLLOUTS = ("none", "R2", "R3"), (1, 2, 4, 8), ("fp8", "bf16")


def varied(plan: Seconds, change: dict) -> Seconds:
    """The plan with some options changed, of the run or of the machine. ValueError if they cannot
    be had together, or on this model."""
    c = {name: value for name, value in change.items() if name in OF_CONFIG}
    m = {name: value for name, value in change.items() if name not in OF_CONFIG}
    other = replace(plan, c=replace(plan.c, **c), m=replace(plan.m, **m))
    other.m.check_run(other.c, plan.s.heads)
    return other


def changes(c: Config, m: Machine) -> Iterator[dict]:
    """Single options with other values: those that move memory or time."""
    yield dict(cpu_offload=not c.cpu_offload)
    yield dict(gradient_checkpointing=not c.gradient_checkpointing)
    yield from (dict(token_budget=c.max_length * rows) for rows in (1, 2, 4))
    yield dict(logits_mib=64)
    yield dict(rollout_precision="fp8")
    yield from (dict(gpu_memory=share / 10) for share in range(3, 10))
    yield from (dict(tensor_parallel=ranks) for ranks in (1, 2, 4, 8))
    yield from (dict(gpus=m.gpus * times) for times in (2, 4, 8))
    yield from (dict(gpu=gpu) for gpu in GPUS)


def fitting(plan: Seconds, pairs: bool = False) -> list[tuple[dict, Seconds]]:
    """The single changes, or pairs of them, with which it fits: those of the run before those of
    the machine, and then the cheapest first."""
    singles = [change for change in changes(plan.c, plan.m)
               if any(getattr(plan.c if name in OF_CONFIG else plan.m, name) != value
                      for name, value in change.items())]
    attempts = singles if not pairs else [
        one | other for one, other in combinations(singles, 2) if one.keys() != other.keys()]
    found = []
    for change in attempts:
        try:
            other = varied(plan, change)
        except ValueError:
            continue
        if not other.memory.faults():
            found.append((change, other))
    return sorted(found, key=lambda pair: (bool(pair[0].keys() - OF_CONFIG), pair[1].cost))


def remedies(plan: Seconds) -> list[tuple[dict, Seconds]]:
    """What makes a plan fit that does not: one option or, if none is enough, two."""
    return fitting(plan) or fitting(plan, pairs=True)


def savings(plan: Seconds) -> list[tuple[dict, Seconds]]:
    """Single options that cost at least 1 % less and fit, on the same GPUs with the same numerics:
    the maths of a run does not depend on them."""
    return [(change, other) for change, other in fitting(plan)
            if not change.keys() & {"gpus", "gpu", "rollout_precision"}
            and other.cost < 0.99 * plan.cost]


def compare(plan: Seconds, whole: bool = False) -> list[dict]:
    """Replay, N and rollout precision: each other value, the rest as in the plan, which comes
    first; or, if whole, all of their combinations. As many updates in each. What the paper saw of
    the same choice is beside it: a cost alone is no return."""
    c, values = plan.c, dict(replay=REPLAYS, mini_batches=MINI_BATCHES,
                             rollout_precision=ROLLOUTS)
    own = {name: getattr(c, name) for name in values}
    others = [dict(zip(values, choice)) for choice in product(*values.values())] if whole else [
        own | {name: value} for name in values for value in values[name]]
    rows = []
    for choice in [own] + [other for other in others if other != own]:
        n = choice["mini_batches"]
        try:
            other = varied(plan, choice | dict(updates=-(-c.updates // n) * n))
        except ValueError:  # as fp8 on a GPU without it
            continue
        rows.append(choice | dict(
            seconds=other.total, gpu_hours=other.total * c.updates * plan.m.gpus / 3600,
            cost=other.total * c.updates * plan.m.gpus / 3600 * plan.m.facts.price,
            change=other.total / plan.total - 1, fits=not other.memory.faults(),
            paper=OUTCOMES.get((n, choice["replay"], c.clip))))
    return rows
