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
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from nano_moe_rl import DEVICE, Rollout, adamw, command_line, group_advantages
from scaled import checkpoint
from scaled.batches import prompts_of_engine, rows_of_rank, take
from scaled.config import Config, read_config
from scaled.metrics import Phases, Sums, missing_routes, peak_memory
from scaled.ranks import RANK, WORLD, Ranks, refuse

HEADER = "update score reward entropy KL(μ‖π) staleness clipped agreed rollout train sync"
ROW = ("{update:6} {score:>5} {reward:6.3f} {entropy:7.3f} {mismatch_kl:7.1e} {staleness_kl:9.1e} "
       "{clip_fraction:7.4f} {agreed:6.3f} {rollout_seconds:7.1f} {train_seconds:5.1f} "
       "{sync_seconds:4.1f}")  # seconds an update


class Run:
    """What a run needs, made once. ValueError for what the options, the data and the checkpoint do
    not permit, before anything is written but the checkpoint of a cold start."""

    def __init__(self, c: Config, resume: bool):
        from transformers import AutoConfig, AutoTokenizer
        from scaled.data import PromptOrder, end_tokens, load_prompts
        from scaled.policy import load_policy
        from scaled.replay import route_shape
        from scaled.rewards import load_reward
        from scaled.rollout import Engine, check_vllm
        from scaled.sync import SyncCheck

        check_vllm()
        self.c, self.folder, self.engine_index = c, Path("runs", c.name), RANK // c.tensor_parallel
        if c.nano_cold_start and not Path(c.checkpoint).exists():
            if RANK == 0:
                from scaled.export import export_cold_start
                export_cold_start(Path(c.checkpoint), c.seed)
            dist.barrier()
        if not Path(c.checkpoint, "config.json").is_file():
            raise ValueError(f"--checkpoint {c.checkpoint}: has no config.json; give the folder of "
                             "a Hugging Face checkpoint")
        trust = dict(trust_remote_code=c.trust_remote_code)
        route_shape(AutoConfig.from_pretrained(c.checkpoint, **trust))  # refuses what cannot replay
        self.tokenizer = AutoTokenizer.from_pretrained(c.checkpoint, **trust)
        end_tokens(c.checkpoint, c.trust_remote_code)
        self.reward = load_reward(c.reward)
        if c.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("--tensorboard: the package is missing; pip install tensorboard")
        columns = dict(prompt_column=c.prompt_column, answer_column=c.answer_column, chat=c.chat,
                       max_prompt=c.max_prompt)
        self.prompts = load_prompts(c.train_data, self.tokenizer, **columns)
        self.held_out = load_prompts(c.eval_data, self.tokenizer, **columns) if c.eval_data else []
        self.order = PromptOrder(len(self.prompts), c.seed)
        self.engine = Engine(
            c.checkpoint, precision=c.rollout_precision, tensor_parallel=c.tensor_parallel,
            max_length=c.max_length, temperature=c.temperature, seed=c.seed,
            gpu_memory=c.gpu_memory, **trust)
        self.engine.sleep()
        self.policy = load_policy(
            c.checkpoint, precision=c.train_precision, logits_bytes=c.logits_mib * 2**20,
            gradient_checkpointing=c.gradient_checkpointing, cpu_offload=c.cpu_offload,
            device=DEVICE, **trust)
        self.optimizer = adamw(self.policy, c.lr, c.weight_decay)
        self.version, self.check = 0, SyncCheck()
        if resume:
            self.version = checkpoint.load(checkpoint.checkpoints(self.folder)[-1], self.policy,
                                           self.optimizer)
        self.checks_left = c.check_sync

    def sync(self):
        """The trainer's weights into the engine, which is awake and at this version afterwards."""
        from scaled.policy import named_weights

        self.engine.wake_up("weights")
        self.engine.load_weights(named_weights(self.policy), self.version)
        self.engine.wake_up("kv_cache")
        if self.checks_left:
            self.checks_left -= 1
            self.check(self.engine, self.logprobs_of,
                       [prompt.tokens for prompt in self.prompts[:8] if len(prompt.tokens) > 1])

    @torch.no_grad()
    def logprobs_of(self, tokens, lengths, routing):
        """log π (B, T) of given tokens at temperature 1, by the engine's experts."""
        from scaled.replay import RoutingReplay

        fixed = Rollout(tokens.to(DEVICE), lengths, lengths.to(DEVICE), replay=routing.to(DEVICE))
        with RoutingReplay(self.policy.model, fixed.replay, fixed.fed):
            return self.policy(fixed.tokens, fixed.fed, 1.0)[0]

    def generate(self, prompts: list, group_size: int, seed: int, top_p: float = 1.0) -> Rollout:
        """Graded responses of this rank's engine."""
        from scaled.rewards import grade

        rollout = self.engine.generate([prompt.tokens for prompt in prompts], group_size,
                                       self.c.max_response, seed, self.version, top_p)
        responses = [row[start:end].tolist() for row, start, end in
                     zip(rollout.tokens, rollout.prompt_lengths, rollout.lengths)]
        with self.phases("reward"):
            texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
            asked = [prompt for prompt in prompts for _ in range(group_size)]
            rewards = grade(self.reward, asked, texts, responses)
        return replace(rollout, rewards=torch.tensor(rewards))

    def evaluate(self) -> float:
        """Mean reward of k responses to each held-out prompt, the same samples at every score. They
        come from the engine, with seeds that training never uses."""
        c, sums = self.c, Sums()
        mine = self.held_out[self.engine_index::WORLD // c.tensor_parallel]
        sums.add("score", 0.0, 0)
        if mine:
            rollout = self.generate(mine, c.eval_samples, 2**61, c.eval_top_p)
            sums.add("score", rollout.rewards.mean(), len(rollout.rewards))
        return sums.means()["score"]

    def batch(self) -> list[dict]:
        """One rollout batch and its N updates -> N rows of metrics. prompts → rollout → reward →
        advantage → routing → log-probabilities → loss → step; the caller syncs the weights."""
        from scaled.rewards import take_counts
        from scaled.trainer import prepare_batch, train_step

        c, n_prompts, phases = self.c, self.c.prompts * self.c.mini_batches, self.phases
        taken = self.order.take(self.version * c.prompts, n_prompts)
        mine = prompts_of_engine(n_prompts, c.prompts, WORLD // c.tensor_parallel, self.engine_index)
        prompts = [self.prompts[taken[i]] for i in mine]
        with phases("rollout"):
            rollout = self.generate(prompts, c.group_size, self.version)
        self.engine.sleep()
        batch = replace(rollout, advantages=group_advantages(rollout.rewards, c.group_size))
        batch = take(batch, rows_of_rank(len(batch.tokens), c.mini_batches, c.tensor_parallel,
                                         RANK % c.tensor_parallel))
        counted = Sums()
        cut = batch.lengths - batch.prompt_lengths == c.max_response
        ended = batch.tokens.gather(1, batch.lengths[:, None] - 1)[:, 0]
        cut &= ~torch.isin(ended, torch.tensor(self.engine.eos))
        counted.add("truncation_rate", cut.double().mean(), len(cut))
        counted.add("tokens", batch.lengths.double().mean(), len(cut))
        counted.add("missing_routes", missing_routes(batch), 1)
        for name, count in take_counts(self.reward).items():
            counted.add(f"reward_{name}", count, 1)
        with phases("old"):
            batch = prepare_batch(self.policy, batch, c)
        rows = []
        for part in batch.split(len(batch.tokens) // c.mini_batches):
            lr = c.lr * min(1, (self.version + 1) / c.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            with phases("train"):
                metrics = train_step(self.policy, self.optimizer, part, c)
            self.version += 1
            rows.append({"update": self.version, "score": None, "lr": lr} | metrics)
            phases.bar.update()
        shared = counted.means()
        self.tokens = shared.pop("tokens") * c.group_size * n_prompts
        for name in ("missing_routes", "reward_errors", "reward_timeouts"):
            shared[name] = int(round(shared[name] * WORLD))
        return [row | shared for row in rows]

    def learn(self):
        """RL until `updates`. Yields the rows of each rollout batch; weights are in the engine."""
        c = self.c
        self.phases = Phases(c.updates, self.version, silent=RANK > 0)
        with self.phases("sync"):
            self.sync()
        while self.version < c.updates:
            rows = self.batch()
            with self.phases("sync"):
                self.sync()
            seconds, self.phases.seconds = self.phases.seconds, {}
            seconds["rollout"] -= seconds["reward"]  # which is inside it
            total, memory = sum(seconds.values()), peak_memory()
            for row in rows:
                row["seconds"] = total / c.mini_batches
                row["tokens_per_second_per_device"] = self.tokens / total / WORLD
                row["peak_memory_gib"] = memory
                row |= {f"{name}_seconds": s / c.mini_batches for name, s in seconds.items()}
            if self.held_out and (self.version % c.eval_every < c.mini_batches
                                  or self.version == c.updates):
                rows[-1]["score"] = self.evaluate()
                self.phases.seconds = {}
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
        print(HEADER, flush=True)
    saved = run.version
    for rows in run.learn():
        if RANK == 0:
            with open(log, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            for row in rows:
                text = {"score": "" if row["score"] is None else f"{row['score']:.3f}",
                        "agreed": sum(row["routing_agreement"]) / len(row["routing_agreement"])}
                run.phases.bar.write(ROW.format(**row | text))
                for name, value in row.items() if writer else ():
                    if isinstance(value, (int, float)):
                        writer.add_scalar(name, value, row["update"])
        if run.version - saved >= c.checkpoint_every or run.version == c.updates:
            checkpoint.save(folder, run.policy, run.optimizer, run.version, c.keep)
            saved = run.version
    run.phases.bar.close()
    if writer:
        writer.close()


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
        folder = Path("runs", c.name)
        if resume and not checkpoint.checkpoints(folder):
            raise ValueError(f"--resume: {folder} has no checkpoint; start without it")
        if not resume and (folder / "metrics.jsonl").exists():
            raise ValueError(f"--name {c.name}: is taken; give another, or --resume")
    except ValueError as error:
        refuse(str(error))
    ranks = Ranks()
    try:
        run = Run(c, resume)
    except ValueError as error:
        ranks.fail(str(error), code=2)
    try:
        train(run, resume)
    except (ValueError, FloatingPointError, RuntimeError) as error:
        traceback.print_exc()
        ranks.fail(f"rank {RANK} at update {run.version}: {error}", code=1)
    if RANK == 0:
        print(f"runs/{c.name}/metrics.jsonl has the numbers; python -m scaled.export runs/{c.name} "
              "DIR makes a Hugging Face folder of the policy")
    ranks.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
