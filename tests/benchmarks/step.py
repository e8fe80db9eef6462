"""What a step of scaled spends on anything but sampling and training: sync, padding, idle time.

    OMP_NUM_THREADS=1 python tests/benchmarks/step.py                  # all three
    OMP_NUM_THREADS=1 python tests/benchmarks/step.py --only sync --ranks 2

Sync: seconds against those of one copy of the same bytes. Padding: positions that are computed for
nothing, and ranks that wait, by the lengths of the recipes; no model is needed. Idle: the laptop
recipe as it is, from one step's begin to the next.
"""
import argparse
import cProfile
import json
import os
import pstats
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import timing
from timing import ROOT, ratio, seconds, shown, turns

SIZES = dict(layers=8, width=512, experts=32, top_k=4, expert_width=256, vocabulary=32_000)
RECIPES = ("laptop", "granite_3_1b_a400m", "olmoe_1b_7b", "qwen3_30b_a3b")
RANKS = {"laptop": 2, "qwen3_30b_a3b": 8}  # of a recipe; 1 of the others
PARTS = ("sync", "padding", "idle")
MOST = 8  # functions of the profile


# -------------------------------------------------------------------------------------------- sync
def sync(c: dict) -> dict:
    """Seconds of a weight sync as a run makes it, of its parts, and of a copy; the profile of one."""
    import torch
    from scaled.huggingface import named_weights

    with timing.group():
        engine, policy = timing.engine(c["folder"], 64, c["precision"]), timing.policy(c["folder"])
        sources = [x.clone() for _, x in named_weights(policy)]
        targets = [torch.empty_like(x) for x in sources]

        def copy():
            for target, source in zip(targets, sources):
                target.copy_(source)

        def publish():
            for name, x in named_weights(policy):
                list(engine.published(name, x))

        def take():
            engine.load_weights(named_weights(policy), 1)

        arms = dict(copy=copy, gather=lambda: [None for _ in named_weights(policy)], publish=publish, sync=take)
        found = turns({name: partial(seconds, arm) for name, arm in arms.items()}, c["rounds"])
        profile = cProfile.Profile(timing.clock)
        profile.runcall(take)
        stats = pstats.Stats(profile).stats
        top = sorted(((own, calls, f"{Path(file).name}:{name}") for (file, _, name), (_, calls, own, *_)
                      in stats.items()), reverse=True)[:MOST]
        found |= dict(bytes=sum(x.nbytes for x in sources), top=top, all=sum(x[2] for x in stats.values()),
                      published=sum(1 for name, x in named_weights(policy) for _ in engine.published(name, x)))
    return found


def sync_table(c: dict, found: dict) -> str:
    best = {name: median(found[name]) for name in ("copy", "gather", "publish", "sync")}
    size = found["bytes"]
    lines = [f"sync of {size / 1e6:.0f} MB of fp32 weights, {found['published']} published tensors, into a "
             f"{c['precision']} engine, {max(c['ranks'], 1)} ranks",
             f"copy of the same bytes      {best['copy']:7.3f} s  {size / best['copy'] / 1e9:6.2f} GB/s",
             f"sync                        {best['sync']:7.3f} s  {size / best['sync'] / 1e9:6.2f} GB/s",
             f"share of the copy's rate    {shown(ratio(found['copy'], found['sync']))}   bound 0.5",
             f"  whole weights, gathered   {best['gather'] / best['sync']:7.1%} of the sync",
             f"  published names, more     {(best['publish'] - best['gather']) / best['sync']:7.1%}",
             f"  in vLLM, more             {1 - best['publish'] / best['sync']:7.1%}",
             f"own time of functions in one profiled sync of {found['all']:.3f} s"]
    lines += [f"  {own / found['all']:6.1%} {calls:6} calls  {name[:70]}" for own, calls, name in found["top"]]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- padding
def drawn(kind: str, n: int, longest: int, seed: int) -> list[int]:
    """Lengths of n responses. skewed: a logarithm with deviation 1, whose mean is a third of the
    longest, where the rest is cut off."""
    of = random.Random(seed)
    if kind == "equal":
        return [longest] * n
    if kind == "uniform":
        return [of.randint(1, longest) for _ in range(n)]
    return [min(longest, max(1, round(of.lognormvariate(0, 1) * longest / 3 / 1.35))) for _ in range(n)]


def padding(lengths: list[list[int]], budget: int) -> dict:
    """Of the rows of each rank, by their lengths: the share of positions that are computed and belong
    to no fed token, and of time in which ranks wait for one with more positions in the same pass."""
    from scaled.batches import micro_batches

    passes = max(len(micro_batches(rows, budget)) for rows in lengths)
    computed = [[max(rows[i] for i in part) * len(part) - len(part) if part else 1  # a stand-in
                 for part in micro_batches(rows, budget, passes)] for rows in lengths]
    fed, all_of = sum(map(sum, lengths)) - sum(map(len, lengths)), sum(map(sum, computed))
    slowest = sum(max(same) for same in zip(*computed))
    return dict(padding=1 - fed / all_of, waiting=1 - all_of / (slowest * len(lengths)), passes=passes)


def padding_table(c: dict) -> str:
    from scaled.config import read_config

    lines = ["recipe              ranks  lengths   passes  for nothing  waiting, by positions   (bound 5 %)"]
    for recipe in RECIPES:
        config = read_config(str(ROOT / f"scaled/configs/{recipe}.toml"), {})
        ranks, rows = RANKS.get(recipe, 1), config.prompts * config.group_size
        for kind in ("equal", "uniform", "skewed"):
            found = []
            for seed in range(c["rounds"]):
                lengths = [config.max_prompt // 2 + x for x in drawn(kind, rows, config.max_response, seed)]
                found.append(padding([lengths[rank::ranks] for rank in range(ranks)], config.token_budget))
            of = {name: median(x[name] for x in found) for name in found[0]}
            lines.append(f"{recipe:20}{ranks:5}  {kind:8}{of['passes']:8.0f}  {of['padding']:11.1%}"
                         f"  {of['waiting']:21.1%}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- idle
def idle(c: dict) -> dict:
    """Seconds from the begin of each step to the next, and of its phases on rank 0; positions that its
    passes computed, and those of fed tokens."""
    from scaled import trainer
    from scaled.config import read_config
    from scaled.ranks import RANK
    from scaled.run import Run
    from scaled.train import train

    os.chdir(c["folder"])
    N = c["options"].get("mini_batches", 4)
    config = read_config(str(ROOT / "scaled/configs/laptop.toml"), dict(  # the first and the last are left out
        updates=N * (c["rounds"] + 2), eval_every=10**6, checkpoint_every=10**6) | c["options"])
    path, marks = Path("runs", config.name), []
    if RANK == 0:
        path.mkdir(parents=True, exist_ok=True)

    def mark():  # a run asks before each rollout batch
        marks.append(time.perf_counter())  # as a run's phases
        return False

    computed, equal_passes = [0, 0], trainer.equal_passes

    def counted(lengths, *args):
        parts = equal_passes(lengths, *args)
        computed[0] += sum(len(part) * (max(lengths[i] for i in part) - 1) if part else 1 for part in parts)
        computed[1] += sum(lengths) - len(lengths)
        return parts

    trainer.equal_passes = counted
    with timing.group():
        train(Run(config, False), mark)
    rows = [json.loads(row) for row in (path / "metrics.jsonl").read_text().splitlines()][1::N]
    phases = [{name.removesuffix("_seconds"): x * N for name, x in row.items() if name.endswith("_seconds")}
              for row in rows]
    return dict(steps=[b - a for a, b in zip(marks, marks[1:])][1:], phases=phases[1:-1],
                padding=1 - computed[1] / computed[0], peaks=[row["peak_memory_gib"] for row in rows])


def idle_table(c: dict, found: dict) -> str:
    names = list(found["phases"][0])
    of = {name: median(phases[name] for phases in found["phases"]) for name in names}
    step = median(found["steps"])
    share = [1 - (phases["rollout"] + phases["old"] + phases["train"]) / step
             for phases, step in zip(found["phases"], found["steps"])]
    between = [step - sum(phases.values()) for phases, step in zip(found["phases"], found["steps"])]
    lines = [f"a step of the laptop recipe, {max(c['ranks'], 1)} ranks, median of {len(share)}: {step:.3f} s"]
    lines += [f"  {name:20} {x:7.3f} s {x / step:7.1%}" for name, x in of.items()]
    return "\n".join(lines + [f"  {'between phases':20} {median(between):7.3f} s {median(between) / step:7.1%}",
                              f"neither engine nor trainer {shown(timing.middle(share))}",
                              f"positions computed for nothing, rank 0: {found['padding']:.1%}   bound 5 %"])


# ------------------------------------------------------------------------------------------ report
def measure(c: dict) -> dict:
    """What is printed of each part that is asked for."""
    text, asked = {}, [c["only"]] if c["only"] else PARTS
    with tempfile.TemporaryDirectory() as folder:
        if "sync" in asked:
            where = timing.checkpoint(Path(folder, "hf"), **{name: c[name] for name in SIZES})
            text["sync"] = sync_table(c, timing.in_process(__file__, c | dict(kind="sync", folder=where), c["ranks"]))
        if "padding" in asked:
            text["padding"] = padding_table(c)
        if "idle" in asked:
            text["idle"] = idle_table(c, timing.in_process(
                __file__, c | dict(kind="idle", folder=folder), c["ranks"]))
    return text


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="one of the three")
    for name, value in (SIZES | dict(rounds=11, ranks=0)).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--precision", default="bf16", help="of the engine that is synced")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--token-budget", type=int, default=8192, help="of the laptop recipe")
    c = vars(parser.parse_args(argv))
    c["options"] = dict(token_budget=c.pop("token_budget"))
    if cell := c.pop("cell"):
        c = json.loads(cell)
        timing.cell({"sync": sync, "idle": idle}[c["kind"]], c)
        return
    print(timing.machine(), *measure(c).values(), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
