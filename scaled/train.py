"""Reinforcement learning on a real MoE checkpoint: the loop of nano_moe_rl.py over many processes.

    torchrun --nproc-per-node 2 -m scaled.train --config scaled/configs/laptop.toml
    torchrun --nproc-per-node 2 -m scaled.train --config scaled/configs/laptop.toml --resume

Every process is a rank of FSDP2, which trains, and of a vLLM engine, which samples. Options on the
command line go over those of the file.
"""

import json
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from nano_moe_rl import Rollout, command_line, group_advantages
from scaled import checkpoint
from scaled.batches import rows_of_rank, take
from scaled.config import Config, read_config
from scaled.log import Log
from scaled.metrics import batch_metrics, peak_memory
from scaled.ranks import RANK, WORLD, Ranks, refuse
from scaled.rewards import take_counts
from scaled.run import Run
from scaled.trainer import prepare_batch, train_step


def train_batch(run: Run) -> list[dict]:
    """One rollout batch and its N updates -> N rows of metrics. prompts → rollout → reward →
    advantage → routing → log-probabilities → loss → step; the caller syncs the weights."""
    c = run.c
    batch = run.rollout()
    batch = replace(batch, advantages=group_advantages(batch.rewards, c.group_size))
    batch = take(batch, rows_of_rank(len(batch.tokens), c.mini_batches, c.tensor_parallel,
                                     RANK % c.tensor_parallel))
    shared = batch_metrics(batch, c.max_response, run.engine.eos, take_counts(run.reward))
    with run.phases("old"):
        batch = prepare_batch(run.policy, batch, c)
    return [update(run, part) | shared for part in batch.split(len(batch.tokens) // c.mini_batches)]


def update(run: Run, part: Rollout) -> dict:
    """One update at the learning rate of its turn -> a row of metrics."""
    c, lr = run.c, run.c.lr * min(1, (run.version + 1) / run.c.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    with run.phases("train"):
        metrics = train_step(run.policy, run.optimizer, part, c)
    run.version += 1
    run.phases.bar.update()
    return {"update": run.version, "score": None, "score_errors": None, "lr": lr} | metrics


def learn(run: Run):
    """RL until `updates`, from weights that the engine has. Yields the rows of each rollout batch."""
    c = run.c
    while run.version < c.updates:
        rows = train_batch(run)
        with run.phases("sync"):
            run.sync()
        spent = cost(run)
        for row in rows:
            row |= spent | {"tokens_per_second_per_device": row.pop("tokens") / WORLD / (
                spent["seconds"] * c.mini_batches)}
        if run.version % c.eval_every < c.mini_batches or run.version >= c.updates:
            rows[-1] |= run.evaluate()
            run.phases.seconds = {}
        yield rows


def cost(run: Run) -> dict:
    """Seconds an update of the rollout batch that ends here, by phase, and memory."""
    seconds, run.phases.seconds = run.phases.seconds, {}
    seconds["rollout"] -= seconds["reward"]  # which is inside it
    return {"seconds": sum(seconds.values()) / run.c.mini_batches,
            "peak_memory_gib": peak_memory(run.engine_bytes)} | {
        f"{name}_seconds": s / run.c.mini_batches for name, s in seconds.items()}


def train(run: Run, resume: bool):
    """A run in runs/NAME: config.json, metrics.jsonl, checkpoints, and event files if asked for."""
    c, folder, rows = run.c, run.folder, []
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(c), indent=2))
        if resume:  # what the checkpoint has seen
            rows = (folder / "metrics.jsonl").read_text().splitlines()[:run.version]
    log = Log(folder, run.phases.bar, rows=rows, tensorboard=c.tensorboard, silent=RANK > 0)
    run.sync()
    log.begin(run.version, run.evaluate()["score"])
    run.phases.seconds = {}
    saved = run.version
    for rows in learn(run):
        log.add(rows)
        if run.version - saved >= c.checkpoint_every or run.version >= c.updates:
            checkpoint.save(folder, run.policy, run.optimizer, run.version, c.keep)
            saved = run.version
    log.close()


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
