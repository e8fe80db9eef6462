"""How seconds and peak memory grow: with lengths, vocabulary, experts, layers, responses and ranks.

    OMP_NUM_THREADS=1 python tests/benchmarks/growth.py --rows rows.jsonl --picture growth.svg
    OMP_NUM_THREADS=1 python tests/benchmarks/growth.py --rows rows.jsonl --only train --axis vocabulary

Each cell is a process of its own: one update of scaled's trainer, one rollout of its engine, the laptop
recipe over many rollout batches, or one update of the single file. Memory is the peak of the process
(getrusage) above what it held before, with weights, optimiser state and a first small step: first as if
every block went back when it is freed, then as it is.
"""
import argparse
import gc
import json
import math
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import timing
from timing import MIB, SIZES, seconds

from scaled.vllm_internals import set_environment

BASE = dict(layers=4, width=128, experts=16, top_k=2, expert_width=64, vocabulary=1024, prompt=16, response=256,
            responses=16, ranks=0, budget=4096, logits=16)  # logits: MiB of a chunk
NANO = dict(batch=128, length=16, experts=16)
# what is turned -> its values, and what arithmetic expects of seconds and of memory
TRAIN = {
    "response": ((128, 256, 512, 1024, 2048, 4096), "linear, attention's square on top",
                 "flat: a pass has at most 4,096 tokens, or a row"),
    "vocabulary": ((1024, 8192, 50_257, 151_936), "linear on top of the layers", "flat: logits come in chunks"),
    "experts": ((8, 16, 32, 64, 128), "flat: top-2 of however many", "flat"),
    "layers": ((2, 4, 8), "linear", "linear"),
    "responses": ((16, 32, 64), "linear", "flat: more passes"),
    "budget": ((1024, 2048, 4096), "flat", "linear until one pass has all"),
    "ranks": ((1, 2), "half, and what ranks say to each other", "half: fewer rows than a pass holds")}
ROLLOUT = {
    "response": ((128, 256, 512, 1024, 2048, 4096), "linear, attention's square on top",
                 "flat: the cache is there from the start"),
    "vocabulary": ((1024, 8192, 50_257, 151_936), "linear on top of the layers", "logits of one step: 3 to 9 MiB"),
    "experts": ((8, 16, 32, 64, 128), "linear until a step reads all", "flat"),
    "layers": ((2, 4, 8), "linear", "flat"),
    "responses": ((16, 32, 64), "less than linear: they share a step", "linear: what is returned")}
SINGLE = {
    "batch": ((64, 128, 256), "linear", "linear"),
    "length": ((16, 32, 64), "linear, attention's square on top", "linear, that square on top"),
    "experts": ((8, 16, 32), "flat", "flat")}
KINDS = {"train": (TRAIN, BASE), "rollout": (ROLLOUT, BASE), "single": (SINGLE, NANO)}
BATCHES = "batches"  # an axis of its own: one run, looked at as it goes


# ------------------------------------------------------------------------------- a cell, its process
def held() -> float:
    """MiB that this process occupies now."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def timed(step, rounds: int) -> dict:
    """mib: what was alive at once, in one step; process: the peak after the steps that are timed, with
    what the allocator keeps. Both above what was held before."""
    timing.allocate(None)
    gc.collect()
    before = held()
    step()
    alive = timing.peak_mib() - before
    timing.allocate(32)  # where glibc's own threshold ends up
    took = [seconds(step) for _ in range(rounds)]
    return dict(seconds=median(took), mib=alive, process=timing.peak_mib() - before)


def train(c: dict) -> dict:
    """An update by scaled's train step, R3, of random responses."""
    from functools import partial as bound

    from nano_moe_rl import adamw, minirl_loss
    from scaled.config import Config
    from scaled.trainer import prepare_batch, train_step

    ranks = max(c["ranks"], 1)
    with timing.group():
        policy = timing.policy(c["folder"], c["logits"])
        optimizer, n = adamw(policy, 1e-6), c["responses"] // ranks
        options = Config(checkpoint="-", train_data="-", mini_batches=1, prompts=max(1, n // 4), group_size=4,
                         max_prompt=c["prompt"], max_response=c["response"], train_precision="fp32", updates=1,
                         token_budget=max(c["budget"], c["prompt"] + c["response"]))

        def step(batch):
            train_step(policy, optimizer, prepare_batch(policy, batch, options), options,
                       bound(minirl_loss, clip=True))

        step(timing.random_rollout(4, 4, 2, 3, c))
        batch = timing.random_rollout(n, 4, c["prompt"], c["response"], c)
        found = timed(partial(step, batch), c["rounds"])
        own = sum(p.to_local().numel() for p in policy.parameters())
    return found | dict(gradients=own * 4 / MIB)


def rollout(c: dict) -> dict:
    """Responses of scaled's engine, 4 to a prompt, with routes."""
    engine = timing.engine(c["folder"], c["prompt"] + c["response"])
    asked = timing.prompts(c["responses"] // 4, c["prompt"], c["vocabulary"])
    return timed(lambda: engine.generate(asked, 4, c["response"], 0, 0), c["rounds"]) | dict(gradients=0.0)


def single(c: dict) -> dict:
    """An update of the single file: rollout, routes, train step, a new engine. length: of responses."""
    import nano_moe_rl as nano
    import torch

    config = nano.Config(width=128, layers=4, heads=4, kv_heads=2, experts=c["experts"], top_k=2, expert_width=64,
                         max_response=c["length"], mini_batch=c["batch"], mini_batches=1, group_size=8)
    model = nano.Model(config, nano.replace(nano.RUNNING_SUM, eos=-1))  # every response has its full length
    optimizer, generator = nano.adamw(model, 1e-6), torch.Generator(nano.DEVICE).manual_seed(0)

    def step(groups=c["batch"] // 8):
        prompts = torch.randint(10, (groups, 9), generator=torch.Generator().manual_seed(0))
        batch = nano.InferenceEngine(model, "fp32").generate(prompts, torch.full((groups,), 9), 8, generator)
        batch.rewards = (batch.tokens[:, -1] < 5).float()
        batch.advantages = nano.group_advantages(batch.rewards, 8)
        nano.train_step(model, optimizer, nano.prepare_batch(model, batch))

    step(1)
    return timed(step, c["rounds"]) | dict(gradients=sum(p.numel() for p in model.parameters()) * 4 / MIB)


# ------------------------------------------------------------------------------------------ report
PRELOAD = {"train": ("transformers.models.qwen3_moe.modeling_qwen3_moe", "scaled.trainer", "scaled.policy"),
           "rollout": ("scaled.rollout", "vllm.entrypoints.llm"), "single": ("nano_moe_rl",)}


def cells(kind: str, axes: dict, base: dict, rounds: int, folder: Path) -> dict[str, list[dict]]:
    """Axis -> a row for each of its values: value, seconds, mib, gradients."""
    set_environment()  # before a process imports vLLM for all that come after
    with timing.apart(*PRELOAD[kind]) as call:
        return cells_of(kind, axes, base, rounds, folder, call)


def cells_of(kind: str, axes: dict, base: dict, rounds: int, folder: Path, call) -> dict[str, list[dict]]:
    found = {}
    for axis, (values, *_) in axes.items():
        found[axis] = []
        for value in values:
            c = base | {axis: value, "rounds": rounds, "kind": kind}
            if kind != "single":
                sizes = {name: c[name] for name in SIZES}
                where = folder / "-".join(map(str, sizes.values()))
                if not where.exists():
                    call(timing.checkpoint, where, *sizes.values())
                c["folder"] = str(where)
            ranks = c.get("ranks", 0)
            row = timing.in_process(__file__, c, ranks) if ranks else call(globals()[kind], c)
            found[axis].append(dict(value=value) | row)
            print(".", end="", file=sys.stderr, flush=True)
    return found


def exponent(rows: list[dict], name: str) -> tuple[float, float]:
    """By which power of what is turned a number grows, over all values and at the last of them."""
    def slope(first, last):
        if min(first[name], last[name]) <= 0:
            return math.nan
        return math.log(last[name] / first[name]) / math.log(last["value"] / first["value"])

    return slope(rows[0], rows[-1]), slope(rows[-2], rows[-1])


def table(kind: str, axes: dict, found: dict[str, list[dict]]) -> str:
    lines = []
    for axis, rows in found.items():
        lines += [f"\n{kind}: {axis}", f"{'':>10}  seconds   MiB alive  but gradients  of the process"]
        for row in rows:
            row["rest"] = row["mib"] - row["gradients"]
            lines.append(f"{row['value']:10,}  {row['seconds']:7.3f}  {row['mib']:10.1f}  {row['rest']:13.1f}"
                         f"  {row['process']:14.1f}")
        _, of_seconds, of_memory = axes[axis]
        for name, key, expected in (("seconds", "seconds", of_seconds), ("memory", "rest", of_memory)):
            whole, last = exponent(rows, key)
            lines.append(f"  {name}: expected {expected}; measured power {whole:.2f}, at the end {last:.2f}")
    return "\n".join(lines)


def batches(options: dict, count: int) -> tuple[str, list[tuple[int, float]]]:
    """Peak memory of the laptop recipe after so many rollout batches, as its own metrics have it."""
    shown = [n for n in (2, 4, 8, 16, 32, 64, 128) if n <= count]
    with tempfile.TemporaryDirectory() as folder:
        run = timing.in_process(str(Path(__file__).with_name("step.py")), dict(
            kind="idle", folder=folder, rounds=count, ranks=0, options=options))
    peaks = [(n, 1024 * run["peaks"][n - 1]) for n in shown]
    lines = ["\nlaptop recipe, one rank: peak MiB of the process after so many rollout batches"]
    lines += [f"{n:10,}  {peak:9.1f}" for n, peak in peaks]
    grown = (peaks[-1][1] - peaks[0][1]) / (peaks[-1][0] - peaks[0][0])
    return "\n".join(lines + [f"  memory: expected flat; measured {grown:+.2f} MiB a batch"]), peaks


def draw(found: dict[str, dict], path: Path):
    """Seconds and memory relative to an axis' first value, a line for each axis, a panel for each kind."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 9,
                                "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(3.4 * len(found), 5.6), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False, sharex=True, sharey="row")
    for column, (kind, axes) in enumerate(found.items()):
        for panel, key, title in zip(panels[:, column], ("seconds", "rest"), ("seconds", "MiB alive but gradients")):
            for (axis, rows), colour, marker in zip(axes.items(), COLOURS, "os^vD<>"):
                x = [row["value"] / rows[0]["value"] for row in rows]
                y = [max(row[key], 1e-3) / max(rows[0][key], 1e-3) for row in rows]
                panel.plot(x, y, color=colour, marker=marker, label=axis, linewidth=1.3, markersize=4)
            panel.plot((1, 8), (1, 8), color="#777777", linewidth=0.8, linestyle="--")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.set_title(f"{kind}: {title}")
            panel.grid(alpha=0.25)
        panels[0, column].legend(fontsize=7)
        panels[1, column].set_xlabel("what is turned, relative")
    figure.savefig(path, metadata={"Date": None})


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=(*KINDS, BATCHES), help="of the four kinds of a cell")
    parser.add_argument("--axis", help="only what is turned by this name")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions in a cell, of which the median counts")
    parser.add_argument("--count", type=int, default=32, help="rollout batches of the laptop recipe")
    parser.add_argument("--rows", type=Path, help="JSON lines, to which each cell adds its own")
    parser.add_argument("--picture", type=Path, help="draws what --rows has by then")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cell:
        c = json.loads(args.cell)
        timing.cell(globals()[c["kind"]], c)
        return
    print(timing.machine(), flush=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, (axes, base) in KINDS.items():
            if args.only in (kind, None):
                axes = {axis: of for axis, of in axes.items() if args.axis in (axis, None)}
                found[kind] = cells(kind, axes, base, args.rounds, Path(folder))
                print(table(kind, axes, found[kind]), flush=True)
                if args.rows:
                    with args.rows.open("a") as f:
                        f.writelines(json.dumps(dict(kind=kind, axis=axis) | row) + "\n"
                                     for axis, rows in found[kind].items() for row in rows)
    if args.only in (BATCHES, None):
        print(batches({}, args.count)[0])
    if args.picture:
        draw(read(args.rows) if args.rows else found, args.picture)


def read(path: Path) -> dict[str, dict[str, list[dict]]]:
    """What cells have added: of several runs of an axis the last one."""
    found = {}
    for row in map(json.loads, path.read_text().splitlines()):
        of = found.setdefault(row["kind"], {}).setdefault(row["axis"], {})
        of[row["value"]] = row
    return {kind: {axis: [of[value] for value in sorted(of)] for axis, of in axes.items()}
            for kind, axes in found.items()}


if __name__ == "__main__":
    sys.exit(main())
