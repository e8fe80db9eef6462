"""What a checkpoint in the background saves against one that training waits for.

    OMP_NUM_THREADS=1 python tests/benchmarks/saves.py

Three arms take turns in one process, or in several ranks: a save and so many train steps of a random
checkpoint, with the save in the background or not, and the same steps without a save. Seconds are
those of the clock on the wall, and what is not yet written after the steps is waited for.
"""
import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import timing
from timing import middle, shown, turns

SIZES = dict(layers=8, width=256, experts=32, top_k=4, expert_width=128, vocabulary=8000)
SHAPE = dict(responses=8, prompt=16, response=48)


def saves(c: dict) -> dict:
    """Of each arm, a row a round: seconds in which save() did not return, and those until all is done."""
    from nano_moe_rl import adamw, minirl_loss
    from scaled import checkpoint
    from scaled.config import Config
    from scaled.saver import Saver
    from scaled.trainer import prepare_batch, train_step

    with timing.group():
        policy, own = timing.policy(c["folder"]), c["responses"] // max(c["ranks"], 1)
        optimizer, versions = adamw(policy, 1e-6), iter(range(10**6))
        options = Config(checkpoint="-", train_data="-", mini_batches=1, prompts=own // 4, group_size=4,
                         max_prompt=c["prompt"], max_response=c["response"], train_precision="fp32", updates=1)
        batch = prepare_batch(policy, timing.random_rollout(own, 4, c["prompt"], c["response"], c), options)
        savers = {name: Saver(Path(c["folder"], name), 1, name == "background")
                  for name in ("foreground", "background")}

        def arm(saver: Saver | None) -> list[float]:
            began = time.perf_counter()
            if saver:
                saver.save(policy, optimizer, next(versions), {checkpoint.OPTIONS: "{}", checkpoint.ROWS: ""})
            saved = time.perf_counter()
            for _ in range(c["steps"]):
                train_step(policy, optimizer, batch, options, minirl_loss)
            if saver:
                saver.wait()
            return [saved - began, time.perf_counter() - began]

        found = turns({"none": partial(arm, None)} | {name: partial(arm, saver) for name, saver in savers.items()},
                      c["rounds"])
        last = checkpoint.checkpoints(savers["background"].folder)[-1]
        return found | dict(bytes=sum(path.stat().st_size for path in last.iterdir()))


def table(c: dict, found: dict) -> str:
    blocked = {name: [row[0] for row in found[name]] for name in ("foreground", "background")}
    more = {name: [row[1] - none[1] for row, none in zip(found[name], found["none"], strict=True)] for name in blocked}
    lines = [f"a checkpoint of {found['bytes'] / 1e6:.0f} MB, {max(c['ranks'], 1)} ranks, and {c['steps']} train steps "
             f"of {middle(row[1] for row in found['none'])[0]:.2f} s together; {len(found['none'])} rounds",
             f"{'':17}{'save() takes, s':23}more than the steps alone, s"]
    lines += [f"{name:15}  {shown(middle(blocked[name])):21}  {shown(middle(more[name]))}" for name in blocked]
    sooner, gained = (middle(a - b for a, b in zip(of["foreground"], of["background"])) for of in (blocked, more))
    return "\n".join(lines + [f"in the background save() returns {shown(sooner)} s sooner; saved until all is done: "
                              f"{shown(gained)} s"])


def measure(c: dict) -> str:
    with tempfile.TemporaryDirectory() as folder:
        where = timing.checkpoint(Path(folder, "hf"), **{name: c[name] for name in SIZES})
        return table(c, timing.in_process(__file__, c | dict(folder=where), c["ranks"]))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (SIZES | SHAPE | dict(rounds=11, steps=4, ranks=0)).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    c = vars(parser.parse_args(argv))
    if cell := c.pop("cell"):
        return timing.cell(saves, json.loads(cell))
    print(timing.machine(), measure(c), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
