"""scaled beside TRL's GRPOTrainer: whole updates and their phases, on one checkpoint.

    OMP_NUM_THREADS=1 python tests/benchmarks/scaled_trl.py            # makes .venv-trl/ first, as speed.py does
    OMP_NUM_THREADS=1 python tests/benchmarks/scaled_trl.py --trl PYTHON

Both get the same random weights, the same number and lengths of prompts and responses, fp32, one update a
rollout batch, all rows in one pass, AdamW and one thread; each runs in its own environment, in turn. On a CPU
TRL generates with transformers, for its own vLLM fails there at the first weight sync; scaled samples with
vLLM, captures routes and replays them (R3), which TRL does not.
"""
import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import timing
from speed import WARM_UP, trl_python
from timing import SIZES, clock, ratio, shown, turns

SHAPE = dict(prompts=16, group=4, prompt=64, response=64, updates=5, rounds=3)


def ours(c: dict) -> dict:
    """Seconds of each update after the warm-up, and of its rollout, training and sync."""
    import torch
    from nano_moe_rl import adamw, group_advantages, minirl_loss
    from scaled.config import Config
    from scaled.huggingface import named_weights
    from scaled.trainer import prepare_batch, train_step

    found, P, G = dict(seconds=[], rollout=[], train=[], sync=[]), c["prompts_a_step"], c["group"]
    options = Config(checkpoint="-", train_data="-", mini_batches=1, prompts=P, group_size=G, max_prompt=c["prompt"],
                     max_response=c["response"], token_budget=P * G * (c["prompt"] + c["response"]),
                     train_precision="fp32", updates=1)
    with timing.group():
        engine, policy = timing.engine(c["folder"], options.max_length), timing.policy(c["folder"])
        optimizer, loss = adamw(policy, 1e-3), partial(minirl_loss, clip=True)
        for step in range(c["steps"]):
            marks = [clock()]
            batch = engine.generate(c["prompts"][P * step:P * (step + 1)], G, c["response"], step, step)
            assert (batch.lengths == c["prompt"] + c["response"]).all() and len(batch.lengths) == P * G
            marks.append(clock())
            batch.rewards = (batch.tokens[:, -1] < c["vocabulary"] / 2).float()
            batch.advantages = group_advantages(batch.rewards, G)
            train_step(policy, optimizer, prepare_batch(policy, batch, options), options, loss)
            marks.append(clock())
            with torch.no_grad():
                engine.load_weights(named_weights(policy), step + 1)
            marks.append(clock())
            if step >= WARM_UP:
                for name, begin, end in zip(("rollout", "train", "sync"), marks, marks[1:]):
                    found[name].append(end - begin)
                found["seconds"].append(marks[-1] - marks[0])
    return found


def measure(c: dict, python: str) -> dict[str, list[dict]]:
    """What the processes of both sides say, a round each."""
    here, steps = Path(__file__), WARM_UP + c["updates"]
    with tempfile.TemporaryDirectory() as folder:
        cell = c | dict(
            folder=timing.checkpoint(Path(folder), **{name: c[name] for name in SIZES}), precision="fp32",
            steps=steps, prompts_a_step=c["prompts"],
            prompts=timing.prompts(c["prompts"] * steps, c["prompt"], c["vocabulary"]))
        return turns({"TRL": lambda: timing.in_process(str(here.with_name("trl_step.py")), cell, python=python),
                      "scaled": lambda: timing.in_process(__file__, cell)}, c["rounds"], warm_up=0)


def table(c: dict, found: dict[str, list[dict]]) -> str:
    def of(side: str, phase: str) -> list[float]:
        """Medians of a round's updates."""
        if phase == "train" and side == "TRL":
            return [median(a - b for a, b in zip(x["seconds"], x["rollout"])) for x in found[side]]
        return [median(x[phase]) for x in found[side]]

    tokens = c["prompts"] * c["group"] * (c["prompt"] + c["response"])
    lines = [f"seconds, medians of {c['updates']} updates in each of {c['rounds']} processes",
             "phase        TRL   scaled  TRL / scaled [all rounds]"]
    for phase, title in (("rollout", "rollout"), ("train", "training"), ("seconds", "update")):
        theirs, mine = of("TRL", phase), of("scaled", phase)
        lines.append(f"{title:9}{median(theirs):7.2f}  {median(mine):7.2f}  {shown(ratio(theirs, mine), 2)}"
                     + ("   bound 1.5" if phase == "seconds" else ""))
    lines.insert(-1, f"sync           -  {median(of('scaled', 'sync')):7.2f}")
    return "\n".join(lines + [f"tokens a second: TRL {tokens / median(of('TRL', 'seconds')):.0f}, "
                              f"scaled {tokens / median(of('scaled', 'seconds')):.0f}"])


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (SIZES | SHAPE).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--trl", default="", metavar="PYTHON", help="an interpreter that has TRL")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    c = vars(parser.parse_args(argv))
    if cell := c.pop("cell"):
        timing.cell(ours, json.loads(cell))
        return
    python = trl_python(c.pop("trl"))
    print(timing.machine())
    print(", ".join(f"{name} {value}" for name, value in c.items()) + "\n")
    print(table(c, measure(c, python)))


if __name__ == "__main__":
    sys.exit(main())
