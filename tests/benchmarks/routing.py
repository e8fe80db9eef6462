"""What routing costs in scaled: capture in the engine, replay in the trainer, and the way between.

    OMP_NUM_THREADS=1 python tests/benchmarks/routing.py
    OMP_NUM_THREADS=1 python tests/benchmarks/routing.py --rounds 11 --layers 48 --experts 128 --top-k 8 --width 64
    OMP_NUM_THREADS=1 python tests/benchmarks/routing.py --memory ...    # host memory of a rollout, and nothing else

Three engines sample the same prompts in turn, each in a process of its own: one captures routes, one does
and takes those of a shared prefix with every response, one captures none. Three kinds of a training pass
take turns in a fourth. What is compared are ratios of one turn.
"""
import argparse
import json
import math
import os
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from statistics import median

import timing
import torch
from timing import SIZES, clock, middle, ratio, seconds, shown, turns

from scaled.batches import shared_prefixes
from scaled.worker import Worker

SHAPE = dict(prompts=16, group=4, prompt=64, response=64, rounds=21)
PUBLISHED = (48, 8, 128, 32_768)  # L, A, E of Qwen3-30B-A3B, and the tokens of its longest row


# ---------------------------------------------------------------------------------------- sampling
@cache
def engine(folder: str, max_length: int, routes: bool, again: bool):
    """An engine whose own work on routes is timed, in `spent`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what vLLM says at its start
    made = timing.engine(folder, max_length, routes=routes)
    made.spent = {}
    if again:
        made.block = 0
    for name in ("run", "routes", "pad"):
        def timed(*args, name=name, method=getattr(made, name)):
            began = clock()
            result = method(*args)
            made.spent[name] = made.spent.get(name, 0.0) + clock() - began
            return result
        setattr(made, name, timed)
    return made


def sample(setting: str, seed: int) -> dict:
    """A rollout of one engine: seconds in all and by part, tokens fed, with memory the MiB that it took for a while, bytes of
    routes, how many of these came from vLLM, and of a prompt that its group has already: what is behind whole
    blocks. formula: MiB of routes alive at once by plan.py, if no prefix is shared: vLLM's arrays, ours, and
    the padded batch."""
    c = json.loads(setting)
    made = engine(c["folder"], c["prompt"] + c["response"], c["routes"], c["again"])
    made.spent.clear()
    began = clock()
    asked = timing.prompts(c["prompts"], c["prompt"], c["vocabulary"])
    with timing.grown() if c["memory"] else nullcontext([math.nan]) as mib:
        rollout = made.generate(asked, c["group"], c["response"], seed, 0)
    found = dict(seconds=clock() - began, tokens=int(rollout.fed.sum()), mib=mib[0], bytes=0, sent=0,
                 again=0) | made.spent
    if rollout.routing is not None:
        shared = shared_prefixes([prompt for prompt in asked for _ in range(c["group"])], made.block)
        again = sum(c["prompt"] - start for i, start in enumerate(shared) if i % c["group"])
        one = rollout.routing[0, 0].nbytes
        found |= dict(bytes=rollout.routing.nbytes, sent=rollout.routing.nbytes - sum(shared) * one, again=again * one,
                      formula=3 * rollout.routing.nbytes / timing.MIB)
    return found


# ---------------------------------------------------------------------------------------- training
def training(c: dict) -> dict:
    """Seconds of the kinds of a pass, forward, loss and backward, and of what is done with routes on the
    way: those that are replayed are the trainer's own, so that all kinds compute the same."""
    from scaled.batches import micro_batches, take
    from scaled.metrics import missing_routes
    from scaled.replay import check_routes, routed

    with timing.group():
        policy = timing.policy(c["folder"])
        n = c["group"] * max(1, c["prompts"] // 4)  # a quarter of a rollout: enough for a ratio
        batch = timing.random_rollout(n, c["group"], c["prompt"], c["response"], c)
        rows = micro_batches(batch.lengths.tolist(), c["budget"])
        parts = [take(batch, some) for some in rows]
        for part in parts:
            with torch.no_grad(), routed(policy.model, None, part.fed) as live:
                policy(part.tokens, part.fed, 1.0)
            part.replay = live.routing

        def one(kind: str):
            for part in parts:
                if kind == "bare":
                    policy(part.tokens, part.fed, 1.0)[0].sum().backward()
                    continue
                with routed(policy.model, part.replay if kind == "replayed" else None, part.fed):
                    policy(part.tokens, part.fed, 1.0)[0].sum().backward()

        def check():
            for part in parts:
                check_routes(part.replay, part.fed, tuple(part.replay.shape), c["experts"])

        ways = {"take": lambda: [take(batch, some) for some in rows],
                "take without": lambda: [take(replace(batch, routing=None), some) for some in rows],
                "check": check, "missing": lambda: missing_routes(batch)}
        found = turns({kind: lambda kind=kind: seconds(one, kind) for kind in ("bare", "recorded", "replayed")}
                      | {name: lambda way=way: seconds(way) for name, way in ways.items()}, c["rounds"])
        return found | dict(tokens=int(batch.fed.sum()))


def long_row(c: dict) -> dict:
    """One row of a published model, from the array that vLLM returns to the padded batch."""
    import numpy as np
    from scaled.rollout import Engine, normalise_routes

    L, A, E, rows = c["row"]
    drawn = np.random.default_rng(0)
    first, step = drawn.integers(E, size=(rows, L, 1)), drawn.integers(1, E // A + 1, size=(rows, L, 1))
    routed = ((first + step * np.arange(A)) % E).astype(np.uint8)  # all different: A · step <= E
    del first, step
    contract = dict(layers=list(range(L)), top_k=A, n_experts=E, n_hidden_layers=L)
    stub = Engine.__new__(Engine)  # its padding needs nothing else of it
    stub.contract, found = contract, {}

    def normalise():
        found["routes"] = normalise_routes(routed, rows=rows, **contract)

    spent = {"normalise": seconds(normalise)}
    spent["pad"] = seconds(lambda: found.update(batch=stub.pad([found["routes"]])))
    return dict(bytes=found["batch"].nbytes, formula=rows * L * A) | spent


# ------------------------------------------------------------------------------------------ report
def rollouts(c: dict) -> dict[str, list[dict]]:
    """What sample says of each engine, in turn."""
    arms = {"captured": (True, False), "captured again": (True, True), "not captured": (False, False)}
    workers = {name: Worker("routing:sample", json.dumps(c | dict(routes=routes, again=again)), seconds=1800)
               for name, (routes, again) in arms.items() if not (again and c["memory"])}
    try:
        return turns({name: lambda worker=worker, seeds=count(): worker.ask(next(seeds))
                      for name, worker in workers.items()}, c["rounds"])
    finally:
        for worker in workers.values():
            worker.end()


def measure(c: dict) -> dict:
    """All of it, for the sizes and the shape of c."""
    with tempfile.TemporaryDirectory() as folder:
        c = c | dict(folder=timing.checkpoint(Path(folder), **{name: c[name] for name in SIZES}))
        found = dict(rollout=rollouts(c))
        return found if c["memory"] else found | timing.in_process(__file__, c)


def memory(found: dict[str, list[dict]]) -> str:
    captured, plain = ([x["mib"] for x in found[name]] for name in ("captured", "not captured"))
    more = middle(a - b for a, b in zip(captured, plain))
    return (f"host memory of a rollout, MiB: {median(captured):.1f} with routes, {median(plain):.1f} without; more by "
            f"{shown(more, 1)}, by the formula {found['captured'][0]['formula']:.1f}")


def table(c: dict, found: dict) -> str:
    (with_routes, each, without), trained = (
        [found["rollout"][name] for name in ("captured", "captured again", "not captured")], found["training"])
    part = {name: [x.get(name, 0.0) for x in with_routes] for name in ("seconds", "run", "routes", "pad")}
    plain = {name: [x.get(name, 0.0) for x in without] for name in part}
    tokens, fed = with_routes[0]["tokens"], trained["tokens"]
    per_token = [x["bytes"] / x["tokens"] for x in with_routes]

    def micro(values, of=tokens):
        return f"{1e6 * median(values) / of:9.2f}"

    took = [a - b for a, b in zip(trained["take"], trained["take without"])]
    captured = [a - b for a, b in zip(part["run"], plain["run"])]
    replayed = [a - b for a, b in zip(trained["replayed"], trained["recorded"])]
    row, (L, A, E, T) = found["row"], c["row"]
    return f"""ratios, medians of {c["rounds"]} turns [95 % interval of the median]
rollout, routes captured / not       {shown(ratio(part["seconds"], plain["seconds"]))}   bound 1.03
  of it vLLM alone                   {shown(ratio(part["run"], plain["run"]))}
  those of a prefix once / each time {shown(ratio(part["seconds"], [x["seconds"] for x in each]))}
training pass, replayed / recorded   {shown(ratio(trained["replayed"], trained["recorded"]))}   bound 1.02
  recorded / model without a context {shown(ratio(trained["recorded"], trained["bare"]))}
  replayed / model without a context {shown(ratio(trained["replayed"], trained["bare"]))}

tokens a second: rollout {tokens / median(part["seconds"]):.0f} captured, {tokens / median(plain["seconds"]):.0f} not; \
training pass {fed / median(trained["replayed"]):.0f} replayed, {fed / median(trained["recorded"]):.0f} recorded

routes from engine to loss, microseconds a fed token
rollout without capture            {micro(plain["seconds"])}
captured by vLLM, the difference   {micro(captured)}
normalised and checked             {micro(part["routes"])}
padded to a batch                  {micro(part["pad"])}
counted for missing_routes         {micro(trained["missing"], fed)}
cut into passes                    {micro(took, fed)}
checked again in a pass            {micro(trained["check"], fed)}
replayed, that check included      {micro(replayed, fed)}
training pass, recorded            {micro(trained["recorded"], fed)}

bytes a token: {c["layers"] * c["top_k"]} by L · A, {middle(per_token)[0]:.1f} measured; \
{median(x["sent"] / x["bytes"] for x in with_routes):.1%} come from vLLM, \
{median(x["again"] / x["bytes"] for x in with_routes):.1%} are of a prompt that its group has already
a row of {T} tokens, {L} layers, {A} of {E} experts: {row["formula"] / 1e6:.2f} MB by L · A · T, \
{row["bytes"] / 1e6:.2f} MB measured; {row["normalise"]:.2f} s normalised and checked, {row["pad"]:.3f} s padded"""


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (SIZES | SHAPE | dict(budget=8192)).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--memory", action="store_true", help="host memory of a rollout, with routes and without")
    parser.add_argument("--row", type=int, nargs=4, default=PUBLISHED, metavar=("L", "A", "E", "T"))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    c = vars(parser.parse_args(argv))
    if cell := c.pop("cell"):
        timing.cell(lambda c: dict(row=long_row(c), training=training(c)), json.loads(cell))
        return
    print(timing.machine())
    print(", ".join(f"{name} {value}" for name, value in c.items()) + "\n")
    found = measure(c)
    print(memory(found["rollout"]) if c["memory"] else table(c, found))


if __name__ == "__main__":
    sys.exit(main())
