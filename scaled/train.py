"""Reinforcement learning on a real MoE checkpoint: the loop of nano_moe_rl.py over many processes.

    torchrun --nproc-per-node 2 -m scaled.train --config scaled/configs/laptop.toml
    torchrun --nproc-per-node 2 -m scaled.train --config scaled/configs/laptop.toml --resume

Every process is a rank of FSDP2, which trains, and of a vLLM engine, which samples. Options on the
command line go over those of the file.
"""

import json
import math
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch
from torch.distributed.checkpoint.api import CheckpointException

from nano_moe_rl import DEVICE, command_line, group_advantages
from scaled import checkpoint
from scaled.batches import prompts_of_engine, rows_of_rank, take
from scaled.config import Config, read_config
from scaled.metrics import Sums, missing_routes, peak_memory
from scaled.ranks import RANK, WORLD, Ranks, refuse
from scaled.rewards import take_counts
from scaled.run import Run
from scaled.trainer import prepare_batch, train_step

HEADER = "update score reward entropy KL(μ‖π) staleness clipped agreed rollout train sync"
ROW = ("{update:6} {score:>5} {reward:6.3f} {entropy:7.3f} {mismatch_kl:7.1e} {staleness_kl:9.1e} "
       "{clip_fraction:7.4f} {agreed:6.3f} {rollout_seconds:7.1f} {train_seconds:5.1f} "
       "{sync_seconds:4.1f}")  # seconds an update


def train_batch(run: Run) -> list[dict]:
    """One rollout batch and its N updates -> N rows of metrics. prompts → rollout → reward →
    advantage → routing → log-probabilities → loss → step; the caller syncs the weights."""
    c, n_prompts, phases = run.c, run.c.prompts * run.c.mini_batches, run.phases
    taken = run.order.take(run.version * c.prompts, n_prompts)
    mine = prompts_of_engine(n_prompts, c.prompts, WORLD // c.tensor_parallel, run.engine_index)
    prompts = [run.prompts[taken[i]] for i in mine]
    with phases("rollout"):
        batch = run.generate(prompts, c.group_size, run.version)
        run.engine.sleep()
        run.move_trainer(DEVICE)
    batch = replace(batch, advantages=group_advantages(batch.rewards, c.group_size))
    batch = take(batch, rows_of_rank(len(batch.tokens), c.mini_batches, c.tensor_parallel,
                                     RANK % c.tensor_parallel))
    counted = Sums()
    cut = batch.lengths - batch.prompt_lengths == c.max_response
    ended = batch.tokens.gather(1, batch.lengths[:, None] - 1)[:, 0]
    cut &= ~torch.isin(ended, torch.tensor(run.engine.eos))
    counted.add("truncation_rate", cut.double().mean(), len(cut))
    counted.add("tokens", batch.lengths.double().mean(), len(cut))
    counted.add("missing_routes", missing_routes(batch), 1)
    for name, count in take_counts(run.reward).items():
        counted.add(f"reward_{name}", count, 1)
    with phases("old"):
        batch = prepare_batch(run.policy, batch, c)
    rows = []
    for part in batch.split(len(batch.tokens) // c.mini_batches):
        lr = c.lr * min(1, (run.version + 1) / c.warmup)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        with phases("train"):
            metrics = train_step(run.policy, run.optimizer, part, c)
        run.version += 1
        rows.append({"update": run.version, "score": None, "score_errors": None, "lr": lr,
                     "routing_agreement": None} | metrics)
        phases.bar.update()
    shared = counted.means()
    run.tokens = shared.pop("tokens") * c.group_size * n_prompts
    for name in ("missing_routes", "reward_errors", "reward_timeouts"):
        shared[name] = int(round(shared[name] * WORLD))
    return [row | shared for row in rows]


def learn(run: Run):
    """RL until `updates`, from weights that the engine has. Yields the rows of each rollout batch."""
    c = run.c
    while run.version < c.updates:
        rows = train_batch(run)
        with run.phases("sync"):
            run.sync()
        seconds, run.phases.seconds = run.phases.seconds, {}
        seconds["rollout"] -= seconds["reward"]  # which is inside it
        total, memory = sum(seconds.values()), peak_memory(run.engine_bytes)
        for row in rows:
            row["seconds"] = total / c.mini_batches
            row["tokens_per_second_per_device"] = run.tokens / total / WORLD
            row["peak_memory_gib"] = memory
            row |= {f"{name}_seconds": s / c.mini_batches for name, s in seconds.items()}
        if run.version % c.eval_every < c.mini_batches or run.version >= c.updates:
            rows[-1] |= run.evaluate()
            run.phases.seconds = {}
        yield rows


def train(run: Run, resume: bool):
    """A run in runs/NAME: config.json, metrics.jsonl, checkpoints, and event files if asked for."""
    c = run.c
    folder, log = run.folder, run.folder / "metrics.jsonl"
    writer = None
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(c), indent=2))
        lines = log.read_text().splitlines()[:run.version] if resume else []
        log.write_text("".join(line + "\n" for line in lines))  # what the checkpoint has seen
        if c.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(folder)
    run.sync()
    score = run.evaluate()["score"]
    run.phases.seconds = {}
    if RANK == 0:
        before = "" if score is None else f": score {score:.3f} before update {run.version + 1}"
        print(f"{folder}{before}\n{HEADER}", flush=True)
    saved = run.version
    for rows in learn(run):
        if RANK == 0:
            with open(log, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            for row in rows:
                text = {"score": "" if row["score"] is None else f"{row['score']:.3f}",
                        "agreed": mean(row["routing_agreement"] or [math.nan])}
                run.phases.bar.write(ROW.format(**row | text))
                for name, value in row.items() if writer else ():
                    if isinstance(value, (int, float)):
                        writer.add_scalar(name, value, row["update"])
        if run.version - saved >= c.checkpoint_every or run.version >= c.updates:
            checkpoint.save(folder, run.policy, run.optimizer, run.version, c.keep)
            saved = run.version
    run.phases.bar.close()
    if writer:
        writer.close()


def check_folder(c: Config, resume: bool):
    """ValueError if runs/NAME cannot take a new run, or has nothing to resume with these options."""
    folder = Path("runs", c.name)
    saved = checkpoint.checkpoints(folder)
    if not resume and (folder / "config.json").exists():
        raise ValueError(f"--name {c.name}: is taken; give another, or " + (
            "--resume" if saved else f"remove {folder}: it has no checkpoint"))
    if resume and not saved:
        raise ValueError(f"--resume: {folder} has no checkpoint; start without it")
    if resume:
        before = json.loads((folder / "config.json").read_text())
        changed = [name for name, value in asdict(c).items()
                   if name != "updates" and before.get(name) != value]
        if changed:
            raise ValueError(f"--resume: {', '.join(changed)} differ from {folder}/config.json; "
                             "only updates can change")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 for a run that failed, 2 for one that was refused. torchrun makes both 1."""
    parser = command_line(Config, __doc__.split("\n")[0])
    parser.error = refuse
    parser.add_argument("--config", metavar="FILE", required=True, help="TOML file of options")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    given = vars(parser.parse_args(argv))
    path, resume = given.pop("config"), given.pop("resume", False)
    try:
        c = read_config(path, given)
        c.check_processes(WORLD)
        check_folder(c, resume)
    except ValueError as error:
        refuse(str(error))
    ranks = Ranks()
    try:
        run = Run(c, resume)
    except ValueError as error:  # of what was asked
        ranks.fail(str(error), code=2)
    except Exception as error:
        traceback.print_exc()
        ranks.fail(f"rank {RANK} at the start: {type(error).__name__}: {error}", code=1)
    try:
        train(run, resume)
    except KeyboardInterrupt:
        ranks.fail("stopped by Ctrl-C; --resume goes on from the newest checkpoint", code=130)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        traceback.print_exc()
        ranks.fail(f"rank {RANK} at update {run.version}: {type(error).__name__}: {error}", code=1)
    if RANK == 0:
        print(f"runs/{c.name}/metrics.jsonl has the numbers; python -m scaled.export runs/{c.name} "
              "DIR makes a Hugging Face folder of the policy")
    ranks.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
