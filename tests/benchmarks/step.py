"""What a step of scaled spends on anything but sampling and training: sync, padding, idle time.

    OMP_NUM_THREADS=1 python tests/benchmarks/step.py                  # all four
    OMP_NUM_THREADS=1 python tests/benchmarks/step.py --only sync --ranks 2

Sync: seconds against those of one copy of the same bytes. Padding: positions that are computed for
nothing, and ranks that wait, by the lengths of the recipes; no model is needed. Cut: seconds of an
update in the laptop recipe's shape, with its padding, and in passes without. Idle: that recipe as it
is, from one step's begin to the next.
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import timing
from timing import ROOT, ratio, seconds, shown, turns

SIZES = dict(layers=8, width=512, experts=32, top_k=4, expert_width=256, vocabulary=32_000)
RECIPES = [("laptop", 1), ("granite_3_1b_a400m", 1), ("granite_3_1b_a400m", 16), ("olmoe_1b_7b", 1),
           ("qwen3_30b_a3b", 1)]  # and how many times its budget
RANKS = {"laptop": 2, "qwen3_30b_a3b": 8}  # of a recipe; 1 of the others
PARTS = ("sync", "padding", "cut", "idle")
MOST = 8  # functions of the profile


# -------------------------------------------------------------------------------------------- sync
def sync(c: dict) -> dict:
    """Seconds of a weight sync as a run makes it, of its parts, and of a copy; the profile of one."""
    import torch
    from scaled.huggingface import named_weights

    with timing.group():
        engine, policy = timing.engine(c["folder"], 64, c["precision"]), timing.policy(c["folder"])
        sources = [x.clone() for _, x in named_weights(policy)]
        targets, wall = [torch.empty_like(x) for x in sources], []

        def copy():
            for target, source in zip(targets, sources):
                target.copy_(source)

        def publish():
            for name, x in named_weights(policy):
                list(engine.published(name, x))

        def take():
            began = time.perf_counter()
            engine.load_weights(named_weights(policy), 1)
            wall.append(time.perf_counter() - began)

        def packed():  # this family's loader takes experts as transformers has them, too
            engine.llm.collective_rpc("sync_weights", args=(named_weights(policy),))

        arms = dict(copy=copy, gather=lambda: [None for _ in named_weights(policy)], publish=publish, packed=packed,
                    sync=take)
        found = turns({name: partial(seconds, arm) for name, arm in arms.items()}, c["rounds"])
        found["wall"] = wall[1:]
        profile = cProfile.Profile(timing.clock)
        profile.runcall(take)
        stats = pstats.Stats(profile).stats
        top = sorted(((own, calls, f"{Path(file).name}:{name}") for (file, _, name), (_, calls, own, *_)
                      in stats.items()), reverse=True)[:MOST]
        found |= dict(bytes=sum(x.nbytes for x in sources), top=top, all=sum(x[2] for x in stats.values()),
                      published=sum(1 for name, x in named_weights(policy) for _ in engine.published(name, x)))
    return found


def sync_beside(c: dict) -> tuple[dict, str]:
    """sync on so many ranks, and one line: its seconds beside those on one rank, in processes that take
    turns; "" for one rank."""
    def cells(rounds: int, *ranks: int) -> list[dict]:
        return [timing.in_process(__file__, c | dict(kind="sync", rounds=rounds), n) for n in ranks]

    if c["ranks"] < 2:
        return *cells(c["rounds"], c["ranks"]), ""
    pairs = [cells(c["rounds"] // 2, *order)[:: 1 if order[0] == 1 else -1]
             for order in ((1, c["ranks"]), (c["ranks"], 1))]
    names = ("copy", "gather", "publish", "packed", "sync", "wall")
    one, several = ({name: found[0][name] + found[1][name] for name in names} for found in zip(*pairs))
    own, wall, gather = (shown(ratio(several[name], one[name])) for name in ("sync", "wall", "gather"))
    return pairs[0][1] | several, (f"\n{c['ranks']} ranks / 1 rank: rank 0's own time {own}, the wall's clock {wall}; "
                                   f"gathered alone, own {gather}")


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
             f"packed experts / published  {shown(ratio(found['packed'], found['sync']))}",
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

    places = list(zip(*(sorted(rows, reverse=True) for rows in lengths), strict=True))
    passes = micro_batches([max(same) for same in places], budget,  # as equal_passes does
                           [sum(same) / len(same) - 1 for same in places])
    computed = [[(n - 1) * len(part) for n in places[part[0]]] for part in passes]  # of a pass, each rank
    fed, all_of = sum(map(sum, lengths)) - sum(map(len, lengths)), sum(map(sum, computed))
    slowest = sum(map(max, computed))
    return dict(padding=1 - fed / all_of, waiting=1 - all_of / (slowest * len(lengths)), passes=len(passes))


def padding_table(c: dict) -> str:
    from scaled.config import read_config

    lines = ["recipe              budget  ranks  lengths   passes  for nothing  waiting, by positions   (bound 5 %)"]
    for recipe, times in RECIPES:
        config = read_config(str(ROOT / f"scaled/configs/{recipe}.toml"), {})
        ranks, rows = RANKS.get(recipe, 1), config.prompts * config.group_size
        for kind in ("equal", "uniform", "skewed"):
            found = []
            for seed in range(c["rounds"]):
                lengths = [config.max_prompt // 2 + x for x in drawn(kind, rows, config.max_response, seed)]
                found.append(padding([lengths[rank::ranks] for rank in range(ranks)],
                                     times * config.token_budget))
            of = {name: median(x[name] for x in found) for name in found[0]}
            lines.append(f"{recipe:20}{f'x {times}':>6}{ranks:7}  {kind:8}{of['passes']:8.0f}  {of['padding']:11.1%}"
                         f"  {of['waiting']:21.1%}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- cut
def cut(c: dict) -> dict:
    """Seconds of an update of 128 rows a rank, by the wall's clock and by its own, in one pass, and cut
    for the sake of padding; lengths as in the laptop recipe: short of 28 by 2.1 tokens on average."""
    import torch
    from nano_moe_rl import adamw, minirl_loss
    from scaled import batches
    from scaled.config import Config
    from scaled.ranks import RANK
    from scaled.trainer import prepare_batch, train_step

    sizes = dict(layers=4, experts=16, top_k=2, vocabulary=64)  # as the checkpoint's
    with timing.group():
        policy = timing.policy(c["folder"])
        optimizer, generator = adamw(policy, 1e-6), torch.Generator().manual_seed(RANK)
        options = Config(checkpoint="-", train_data="-", mini_batches=1, prompts=32, group_size=4, max_prompt=6,
                         max_response=22, token_budget=8192, train_precision="fp32", updates=1)
        short = torch.empty(128).exponential_(1 / 2.6, generator=generator).long()
        batch = replace(timing.random_rollout(128, 4, 6, 22, sizes), lengths=(28 - short).clamp(10))

        def update(least: int) -> tuple[float, float]:
            batches.PASS = least
            began, wall = timing.clock(), time.perf_counter()
            train_step(policy, optimizer, prepare_batch(policy, batch, options), options,
                       partial(minirl_loss, clip=True))
            return time.perf_counter() - wall, timing.clock() - began

        found = turns(dict(whole=partial(update, 10**9), cut=partial(update, 1)), c["rounds"])
        return found | dict(padding=1 - (int(batch.lengths.sum()) - 128) / (128 * (int(batch.lengths.max()) - 1)))


def cut_table(c: dict, found: dict) -> str:
    wall, own = (ratio([x[i] for x in found["cut"]], [x[i] for x in found["whole"]]) for i in (0, 1))
    return (f"an update of 128 rows a rank, {max(c['ranks'], 1)} ranks, {found['padding']:.1%} padding in one pass\n"
            f"cut for 5 % / in one pass  {shown(wall)} by the wall's clock, {shown(own)} by rank 0's own")


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
        computed[0] += sum(len(part) * (max(lengths[i] for i in part) - 1) for part in parts)
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
            found, beside = sync_beside(c | dict(folder=where))
            text["sync"] = sync_table(c, found) + beside
        if "padding" in asked:
            text["padding"] = padding_table(c)
        if "cut" in asked:
            where = timing.checkpoint(Path(folder, "cut"), layers=4, width=128, experts=16, top_k=2,
                                      expert_width=64, vocabulary=64)
            text["cut"] = cut_table(c, timing.in_process(__file__, c | dict(kind="cut", folder=where), c["ranks"]))
        if "idle" in asked:
            text["idle"] = idle_table(c, timing.in_process(
                __file__, c | dict(kind="idle", folder=folder), c["ranks"]))
    return text


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="one of the four")
    for name, value in (SIZES | dict(rounds=11, ranks=0)).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--precision", default="bf16", help="of the engine that is synced")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--token-budget", type=int, default=8192, help="of the laptop recipe")
    c = vars(parser.parse_args(argv))
    c["options"] = dict(token_budget=c.pop("token_budget"))
    if cell := c.pop("cell"):
        c = json.loads(cell)
        timing.cell({"sync": sync, "cut": cut, "idle": idle}[c["kind"]], c)
        return
    print(timing.machine(), *measure(c).values(), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
