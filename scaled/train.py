"""Reinforcement learning on a real MoE checkpoint: the loop of nano_moe_rl.py over many processes.

    torchrun --nproc-per-node 2 -m scaled.train --config scaled/configs/laptop.toml
    torchrun --nproc-per-node 2 -m scaled.train --resume laptop

Every process is a rank of FSDP2, which trains, and of a vLLM engine, which samples. Options on the
command line go over those of the file, or of the run that is resumed.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from nano_moe_rl import Rollout
from scaled import checkpoint
from scaled.batches import rows_of_rank, take
from scaled.config import options_text, parser, read_config
from scaled.folder import CURVES, LOG, SAMPLES, Claim, check_folder, resumed_config, write_aside
from scaled.guard import Guard
from scaled.log import Log
from scaled.metrics import batch_metrics, equal_groups, peak_memory
from scaled.ranks import RANK, WORLD, Ranks, refuse
from scaled.rewards import take_counts
from scaled.samples import replays, routes_of
from scaled.saver import Saver
from scaled.staleness import staleness, staleness_metrics, without_stale
from scaled.terminal import give_away, say
from scaled.trainer import prepare_batch, score, train_step

if TYPE_CHECKING:
    from scaled.run import Run


def train_batch(run: "Run") -> list[dict]:
    """One rollout batch and its N updates -> N rows of metrics. prompts → rollout → reward →
    advantage → routing → log-probabilities → loss → step; the caller syncs the weights."""
    c = run.c
    batch = run.rollout()
    batch = replace(batch, advantages=run.advantages(batch.rewards, c.group_size))
    equal = [equal_groups(rewards, c.group_size) for rewards in batch.rewards.chunk(c.mini_batches)]
    batch = take(batch, rows_of_rank(len(batch.tokens), c.mini_batches, c.tensor_parallel,
                                     RANK % c.tensor_parallel))
    shared = batch_metrics(
        batch, c.max_response, run.engine.eos, take_counts(run.reward), equal)
    with run.phases("old"):
        batch = prepare_batch(run.policy, batch, c)
    return [row | shared | {"equal_groups": share}
            for row, share in zip(updates(run, batch), shared["equal_groups"], strict=True)]


def updates(run: "Run", batch: Rollout) -> list[dict]:
    """N updates from a rollout batch. Where samples are due, the first one gets its routes: π_old's
    before the first update, and those of π_θ under each mode before the last. Every rank takes part
    with a response of its own; like scores, these passes are not in the seconds."""
    *earlier, last = batch.split(len(batch.tokens) // run.c.mini_batches)
    shown = run.samples_due() and batch.routing is not None  # the same on every rank
    row = take(last, [0])
    old = score(run.policy, row.tokens, row.lengths, None)[1] if shown else None
    rows = [update(run, part) for part in earlier]
    if shown:
        live = {mode: score(run.policy, row.tokens, row.lengths, replay)[1]
                for mode, replay in replays(old, row.routing).items()}
        if RANK == 0:
            run.samples[0] |= routes_of(row, old, live, run.tokenizer)
    return rows + [update(run, last)]


def update(run: "Run", part: Rollout) -> dict:
    """One update at the learning rate of its turn, from responses that are not too old by then -> a
    row of metrics."""
    c, ages = run.c, staleness(part, run.version)
    for group in run.optimizer.param_groups:
        group["lr"] = c.lr * min(1, (run.version + 1) / c.warmup)
    with run.phases("train"):
        metrics = staleness_metrics(ages, c.max_staleness) | train_step(
            run.policy, run.optimizer, without_stale(part, ages, c.max_staleness), c, run.loss_fn)
    run.version += 1
    run.phases.bar.update()
    return {"update": run.version, "score": None, "score_errors": None,
            "sync_difference": None, "routing_agreement": None} | metrics


def learn(run: "Run", stop: Callable[[], bool]) -> Iterator[list[dict]]:
    """RL until `updates` or a stop, from weights that the engine has. Yields the rows of each
    rollout batch. stop is a collective."""
    while run.version < run.c.updates and not stop():
        c, rows = run.c, train_batch(run)
        with run.phases("sync"):
            rows[-1]["sync_difference"] = run.sync()
        spent = cost(run)
        for row in rows:
            row |= spent | {"tokens_per_second_per_device": row.pop("tokens") / WORLD / (
                spent["seconds"] * c.mini_batches)}
        if c.scored(run.version):
            with run.phases("score"):
                rows[-1] |= run.evaluate()
            run.phases.seconds = {}
        yield rows


def cost(run: "Run") -> dict:
    """Seconds an update of the rollout batch that ends here, by phase, and memory."""
    seconds, run.phases.seconds = run.phases.seconds, {}
    seconds["rollout"] -= seconds["reward"]  # which is inside it
    return {"seconds": sum(seconds.values()) / run.c.mini_batches,
            "peak_memory_gib": peak_memory(run.engine_bytes)} | {
        f"{name}_seconds": s / run.c.mini_batches for name, s in seconds.items()}


def train(run: "Run", stop: Callable[[], bool]) -> str:
    """A run in runs/NAME: config.json, metrics.jsonl, samples.jsonl, events.jsonl, curves.png,
    checkpoints, and event files if asked for. One that is stopped is saved -> by what, "" if it
    came to its end."""
    c, folder = run.c, run.folder
    if RANK == 0:
        write_aside(folder / checkpoint.OPTIONS, options_text(c))
        checkpoint.set_aside(folder, run.version)
    log = Log(c, folder, run.lines, run.version, silent=RANK > 0)
    run.phases.starting("giving the inference engine the trainer's weights")
    difference = run.sync()
    if run.held_out:
        run.phases.starting(f"first score, of {len(run.held_out)} prompts")
    scores = run.evaluate() | {"sync_difference": difference}
    run.phases.begin(c.updates, run.version)
    log.begin(scores, run.version, run.take_samples())
    run.phases.seconds = {}
    saver = Saver(folder, c.keep, c.save_in_background)
    saved, guard = run.version, Guard(run, log, saver.wait)

    def save():
        saver.save(run.policy, run.optimizer, run.version, {
            checkpoint.OPTIONS: options_text(run.c), checkpoint.ROWS: log.lines})

    if c.watch == "back" and not run.version:
        save()  # there is always something to go back to
    for rows in learn(run, lambda: stop() or guard.stopped):
        saver.look()
        log.add(rows, run.take_samples())
        act, due = guard.look(rows), run.version - saved >= c.checkpoint_every
        if act == "back":
            saved = run.version
        elif act == "save" or due or run.version >= c.updates:
            save()
            saved = run.version
        log.draw()
    if saved < run.version or not run.version:  # stopped, perhaps before the first update
        save()
    saver.wait()
    run.phases.bar.close()
    log.close()
    return "" if run.version >= c.updates else guard.reason if guard.stopped else "SIGTERM"


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 for a run that failed, 2 for one that was refused, 130 after Ctrl-C, 143 for a
    SIGTERM before there is anything to save. torchrun makes them all 1."""
    flags = parser(__doc__.split("\n")[0])
    flags.error = refuse
    flags.add_argument("--config", metavar="FILE", help="TOML file of options, for a new run")
    flags.add_argument("--resume", metavar="NAME", help="go on from runs/NAME's newest checkpoint")
    given = vars(flags.parse_args(argv))
    path, resume = given.pop("config", None), given.pop("resume", None)
    try:
        if (path is None) == (resume is None):
            raise ValueError("give --config FILE for a new run, or --resume NAME, which has its "
                             "options already")
        c = read_config(path, given) if path is not None else resumed_config(resume, given)
        c.check_processes(WORLD)
        check_folder(folder := Path("runs", c.name), resume is not None)
    except ValueError as error:
        refuse(str(error))
    ranks = Ranks(f"; --resume {c.name} goes on from its newest checkpoint, if it has one")
    try:
        if RANK == 0:
            ranks.leave = Claim(folder, resume is not None).give_up
        dist.barrier()  # the folder is there
        give_away(folder / LOG)
        ranks.log = f"; {folder / LOG} has what libraries said"
        from scaled.run import Run  # transformers and vLLM: only for a run that can start
        run = Run(c, resume is not None)
    except ValueError as error:  # of what was asked
        ranks.fail(str(error), code=2)
    except BaseException as error:  # also SystemExit, of a checkpoint's code
        what = f"{type(error).__name__}: {error}{ranks.log}"
        ranks.fail(f"rank {RANK} at the start: {what}", 1, error)
    try:
        ranks.patient = True
        stopped = train(run, ranks.stop_asked)
    except (OSError, FloatingPointError) as error:  # say it themselves: a full disk, a loss of NaN
        ranks.fail(f"rank {RANK} at update {run.version}: {error}{ranks.remedy}", 1)
    except BaseException as error:
        what = f"{type(error).__name__}: {error}{ranks.log}"
        ranks.fail(f"rank {RANK} at update {run.version}: {what}", 1, error)
    if RANK == 0:
        if stopped:
            say(f"stopped by {stopped} after update {run.version} of {c.updates}; "
                f"--resume {c.name} goes on")
        say(f"{folder} has {CURVES}, {checkpoint.ROWS}, {SAMPLES}\n"
            f"a page about it: python -m scaled.report {folder}\n"
            f"a Hugging Face folder of the policy: python -m scaled.export {folder} DIR")
    ranks.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
