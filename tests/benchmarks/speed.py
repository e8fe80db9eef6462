"""How long one update takes: a rollout, training on it, and weight synchronisation.

    python tests/benchmarks/speed.py                 # fp32, bf16, fp8 rollouts with fp32 training
    python tests/benchmarks/speed.py --trl           # and TRL's GRPOTrainer, in turn with ours
    python tests/benchmarks/speed.py --trl PYTHON    # with an interpreter that has PACKAGES
    python tests/benchmarks/speed.py --gains         # other ways beside the file's; torch.compile needs g++

256 responses an update, 16 each to 16 prompts: 9 tokens of prompt, 11 of response, on-policy.
Without PYTHON, --trl first installs PACKAGES into .venv-trl/. No time is asserted.
"""
import argparse, subprocess, venv  # noqa: E401
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import timing
import torch
from timing import ROOT, clock
from tqdm import tqdm

from nano_moe_rl import (DEVICE, RUNNING_SUM, VOCABULARY, Config, InferenceEngine, Model, adamw,
                         group_advantages, make_prompts, prepare_batch, train_step)

PACKAGES = ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0")
PROMPTS, GROUP, DIGITS, RESPONSE = 16, 16, 8, 11  # trl_step.py has the same shape
SEQUENCES, TOKENS = PROMPTS * GROUP, DIGITS + 1 + RESPONSE
ROUNDS, UPDATES, WARM_UP = 5, 10, 2  # trl_step.py leaves out the same two updates
ENDLESS = replace(RUNNING_SUM, eos=-1)  # which no token is: every response has its full length
SETTINGS = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "fp8 rollouts": ("fp32", "fp8")}

def benchmark_config(train: str = "fp32", rollout: str = "fp32") -> Config:
    return Config(width=128, layers=4, heads=4, kv_heads=2, experts=16, top_k=2, expert_width=64,
                  min_digits=DIGITS, max_digits=DIGITS, max_response=RESPONSE, mini_batch=SEQUENCES,
                  mini_batches=1, group_size=GROUP, train_precision=train, rollout_precision=rollout)

def update_gflop(c: Config) -> float:
    """Arithmetic of one update, as if every token of every sequence were fed once in the rollout
    and once in training. In fact a group's prompt is prefilled once, and the last token not fed."""
    attention = c.width * c.head_dim * (c.heads + 2 * c.kv_heads + c.heads)  # q, k and v, o
    moe = c.width * c.experts + c.top_k * 3 * c.width * c.expert_width  # router; gate, up, down
    scores = 2 * c.width * (TOKENS + 1) / 2  # a token sees half of its sequence on average
    multiplications = c.layers * (attention + moe + scores) + c.width * len(VOCABULARY)
    forwards = 1 + 3  # rollout; training, where the backward pass costs two forward passes
    return 2 * multiplications * SEQUENCES * TOKENS * forwards / 1e9

def matrix_rate() -> float:
    """GFLOP/s of an fp32 product as large as one projection of a whole batch, at its best."""
    x, w = torch.randn(SEQUENCES * TOKENS, 128, device=DEVICE), torch.randn(128, 128, device=DEVICE)
    best = float("inf")
    for _ in range(500):
        began = clock()
        x @ w
        best = min(best, clock() - began)
    return 2 * x.numel() * 128 / best / 1e9

def our_updates(train: str, rollout: str) -> list[list[float]]:
    """Seconds of rollout, training and synchronisation, for each update after the warm-up."""
    c, times = benchmark_config(train, rollout), []
    model = Model(c, ENDLESS)
    engine, optimizer = InferenceEngine(model, rollout), adamw(model, 1e-3)
    prompts, samples = torch.Generator().manual_seed(1), torch.Generator(DEVICE).manual_seed(2)
    for _ in range(WARM_UP + UPDATES):
        marks = [clock()]
        batch = engine.generate(*make_prompts(PROMPTS, c, prompts), GROUP, samples)
        marks.append(clock())
        batch.rewards = (batch.tokens[:, -1] < 5).float()
        batch.advantages = group_advantages(batch.rewards, GROUP)
        train_step(model, optimizer, prepare_batch(model, batch))
        marks.append(clock())
        engine = InferenceEngine(model, rollout)
        marks.append(clock())
        assert batch.tokens.shape == (SEQUENCES, TOKENS) and (batch.lengths == TOKENS).all()
        times.append([end - start for start, end in zip(marks, marks[1:])])
    return times[WARM_UP:]

def shared_positions(c: Config) -> str:
    """What a train step that computed equal pasts once would save, on a first batch: tokens of a
    group that have begun alike have the same keys and values up to there."""
    batch = InferenceEngine(Model(c, ENDLESS), c.rollout_precision).generate(
        *make_prompts(PROMPTS, c, torch.Generator().manual_seed(1)), GROUP,
        torch.Generator(DEVICE).manual_seed(2))
    pasts = {tuple(row[:t + 1]) for row in batch.tokens[:, :-1].tolist() for t in range(len(row))}
    return f"{len(pasts)} of {batch.fed.sum()} fed positions have a past of their own"

def blocks_in_a_loop(x, weight, offs):
    """F.grouped_mm, a product for each expert."""
    starts = [0, *offs.tolist()]
    return torch.cat([x[start:end] @ w for start, end, w in zip(starts, starts[1:], weight)])

def gains(rounds: int = 15) -> str:
    """What a reader could gain, or has gained: each other way beside the file's, in turn; and where a
    train step's time goes. Compiled is attention alone: dynamo of torch 2.13 cannot trace F.grouped_mm
    in fp32."""
    c = benchmark_config()
    model, compiled = Model(c, ENDLESS), Model(c, ENDLESS)
    for layer in compiled.layers:
        layer.self_attn.compile(dynamic=True)
    engine = InferenceEngine(model, "fp32")
    prompts, lengths = make_prompts(PROMPTS, c, torch.Generator().manual_seed(1))
    every = prompts.repeat_interleave(GROUP, 0), lengths.repeat_interleave(GROUP)

    def generate(prompts, lengths, group):
        return engine.generate(prompts, lengths, group, torch.Generator(DEVICE).manual_seed(2))

    batch = generate(prompts, lengths, GROUP)
    batch.rewards = (batch.tokens[:, -1] < 5).float()
    batch.advantages = group_advantages(batch.rewards, GROUP)

    def step(model, optimizer, around=nullcontext):
        with around():
            return timing.seconds(train_step, model, optimizer, batch)

    one = partial(step, model, adamw(model, 1e-6))
    found = timing.turns({
        "step": one, "compiled": partial(step, compiled, adamw(compiled, 1e-6)),
        "loop": partial(one, partial(patch.object, torch.nn.functional, "grouped_mm", blocks_in_a_loop)),
        "rollout": lambda: timing.seconds(generate, prompts, lengths, GROUP),
        "each": lambda: timing.seconds(generate, *every, 1)}, rounds, WARM_UP)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_cpu_time_total)
    whole = sum(row.self_cpu_time_total for row in rows)
    return "\n".join([
        f"{title:51} {timing.shown(timing.ratio(found[other], found[ours]))}" for title, other, ours in (
            ("train step, attention compiled / not", "compiled", "step"),
            ("train step, experts one after the other / grouped", "loop", "step"),
            ("rollout, a prompt for each response / for its group", "each", "rollout"))] + [
        "a train step by torch's profiler, own time of operators"] + [
        f"  {row.self_cpu_time_total / whole:6.1%}  {row.count:5} calls  {row.key}" for row in rows[:8]])

def trl_python(python: str) -> str:
    """The interpreter given, or one in .venv-trl/: TRL's packages stay out of this environment."""
    folder = ROOT / ".venv-trl"
    if not python:
        python = str(folder / "bin" / "python")
        if not Path(python).exists():
            venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python

def trl_updates(python: str, precision: str) -> list[float]:
    """Seconds of each of TRL's updates after its warm-up, from a process of its own."""
    script = str(Path(__file__).with_name("trl_step.py"))
    setting = dict(precision=precision, steps=WARM_UP + UPDATES)
    return timing.in_process(script, setting, python=python)["seconds"]

def measure(python: str | None) -> tuple[dict, dict, float]:
    """Seconds of our updates and of TRL's by setting, and the matrix rate. They take turns: a while
    of other work on the machine then slows down both sides, and does not hide the best rate."""
    ours, trl, rate = defaultdict(list), defaultdict(list), 0.0
    with tqdm(total=ROUNDS * len(SETTINGS), disable=None, leave=False) as bar:
        for name, precisions in list(SETTINGS.items()) * ROUNDS:
            bar.set_description(name)
            rate = max(rate, matrix_rate())
            if python and name in ("fp32", "bf16"):  # the precisions of trl_step.py
                trl[name] += trl_updates(python, name)
            ours[name] += our_updates(*precisions)
            bar.update()
    return ours, trl, rate

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl", nargs="?", const="", metavar="PYTHON", help="compare with TRL")
    parser.add_argument("--gains", action="store_true", help="what other ways of computing would give")
    given, c = parser.parse_args(), benchmark_config()
    python = None if given.trl is None else trl_python(given.trl)
    print(timing.machine())
    if given.gains:
        return print(gains())
    parameters = sum(p.numel() for p in Model(c).parameters())
    gflop = update_gflop(c)
    print(f"{parameters / 1e6:.2f} M parameters, {gflop:.1f} GFLOP an update")
    print(shared_positions(c))
    ours, theirs, rate = measure(python)

    print(f"\nms, medians of {ROUNDS * UPDATES} updates; matrix rate {rate:.0f} GFLOP/s in fp32\n"
          "precision     rollout    train     sync      sum   tokens/s  of matrix rate")
    totals = {}
    for name, times in ours.items():
        phases = [median(phase) for phase in zip(*times)]
        totals[name] = total = sum(phases)
        print(f"{name:12}", *(f"{1e3 * seconds:8.1f}" for seconds in (*phases, total)),
              f"{SEQUENCES * TOKENS / total:10.0f}  {gflop / total / rate:14.1%}")
    if theirs:
        print("\nprecision         TRL     ours   TRL / ours [all rounds]")
    for name, times in theirs.items():
        rounds = [[median(x[i:i + UPDATES]) for i in range(0, len(x), UPDATES)]
                  for x in (times, [sum(phases) for phases in ours[name]])]
        print(f"{name:12} {1e3 * median(times):8.1f} {1e3 * totals[name]:8.1f}"
              f"   {timing.shown(timing.ratio(*rounds), 2)}")

if __name__ == "__main__":
    main()
