"""What a run consists of, made once: data, reward, inference engine, policy, optimiser."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist

from nano_moe_rl import DEVICE, Rollout, adamw
from scaled import checkpoint
from scaled.batches import prompts_of_engine, responses
from scaled.checks import read_material
from scaled.config import Config
from scaled.data import PromptOrder
from scaled.export import export_cold_start
from scaled.huggingface import named_weights
from scaled.metrics import Phases, Sums
from scaled.policy import Policy, load_policy
from scaled.ranks import RANK, TIMEOUT, WORLD
from scaled.rewards import grade, take_counts
from scaled.rollout import Engine
from scaled.samples import COUNT, samples
from scaled.sync import SyncCheck
from scaled.terminal import err, say
from scaled.trainer import logprobs_of, move


def make_engine(c: Config, routes: bool = True) -> Engine:
    """Needs a process group, and on a GPU that nothing else has memory yet: vLLM takes a share."""
    return Engine(
        c.checkpoint, precision=c.rollout_precision, tensor_parallel=c.tensor_parallel,
        max_length=c.max_length, temperature=c.temperature, seed=c.seed,
        gpu_memory=c.gpu_memory, trust_remote_code=c.trust_remote_code, routes=routes)


def make_policy(c: Config) -> Policy:
    """Needs a process group, and on a GPU an engine that sleeps."""
    return load_policy(
        c.checkpoint, precision=c.train_precision, logits_bytes=c.logits_mib * 2**20,
        gradient_checkpointing=c.gradient_checkpointing, cpu_offload=c.cpu_offload, device=DEVICE,
        trust_remote_code=c.trust_remote_code)


class Run:
    """What a run needs, in the order in which it can be made:

    1. the checkpoint to resume from and the material: refusals come before anything is loaded;
    2. the engine, while the GPU is empty, and what it says of fixed tokens;
    3. the trainer, while the engine sleeps, and the check of one against the other: the measure for
       all syncs, for which both need the weights of the folder;
    4. that checkpoint, over the trainer's weights; the first sync takes them to the engine.

    ValueError for what options, data and checkpoint do not permit; nothing is written but the
    checkpoint of a cold start."""

    def __init__(self, c: Config, resume: bool):
        self.c, self.folder, self.engine_index = c, Path("runs", c.name), RANK // c.tensor_parallel
        self.phases = Phases(silent=RANK > 0)
        if resume:
            self.phases.starting("looking for the newest whole checkpoint")
            newest, line = checkpoint.newest_whole(
                checkpoint.checkpoints(self.folder))
            if line and RANK == 0:
                say(f"scaled: {line}", err())
            if checkpoint.version_of(newest) >= c.updates:
                raise ValueError(f"--updates {c.updates}: {newest} has them already; give more")

        def cold_start():
            if c.nano_cold_start:
                self.phases.starting("making the cold start, if it is not there yet")
                if RANK == 0:
                    export_cold_start(Path(c.checkpoint), c.seed)
            dist.barrier()
            self.phases.starting("reading checkpoint and data")
        material = read_material(c, cold_start)
        self.tokenizer, self.reward = material.tokenizer, material.reward
        self.prompts, self.held_out = material.prompts, material.held_out
        self.advantages = material.objective.advantages
        self.loss_fn = partial(material.objective.loss, **material.objective.options(c))
        self.order = PromptOrder(len(self.prompts), c.seed)
        if ":" in c.reward and RANK == 0:
            say(f"reward {c.reward} was tried on {material.tried} of "
                f"{len(self.prompts + self.held_out)} rows")

        self.phases.starting("loading the inference engine")
        self.engine = make_engine(c)
        self.fixed = [p.tokens for p in self.prompts[:8] if len(p.tokens) > 1]
        scored = self.engine.score(self.fixed) if c.check_sync else None
        self.engine.sleep()
        self.engine_bytes = torch.cuda.memory_allocated()  # torch still counts them; 0 on a CPU

        self.phases.starting("loading the training engine")
        self.policy = make_policy(c)
        self.optimizer = adamw(self.policy, c.lr, c.weight_decay)
        self.logprobs_of = partial(logprobs_of, self.policy)
        self.check = SyncCheck(c.check_sync, c.check_sync_every)
        if scored:
            self.phases.starting("checking the weights of one engine against the other's")
            self.check(self.engine, self.logprobs_of, self.fixed, scored)

        self.version, self.lines = 0, ""  # of metrics.jsonl
        self.samples: list[dict] = []  # of rank 0, until somebody takes them
        if resume:
            self.phases.starting(f"loading {newest}")
            self.restore(newest)
        # the ranks of one engine have the same responses: the first grades them for all
        self.peers, _ = dist.new_subgroups(c.tensor_parallel, backend="gloo", timeout=TIMEOUT)

    def restore(self, path: Path):
        """Weights, optimiser state, version and rows are those of a checkpoint. A collective."""
        self.version = checkpoint.load(path, self.policy, self.optimizer)
        self.lines = (path / checkpoint.ROWS).read_text()

    def move_trainer(self, device: str):
        """From the engine's way, or back; with cpu_offload FSDP keeps it in host memory itself."""
        if not self.c.cpu_offload:
            move(self.policy, self.optimizer, device)

    def sync(self) -> float | None:
        """The trainer's weights into the engine, which is awake and at this version afterwards; the
        trainer has left the GPU then. How far the two differ, in nats, if that was due."""
        torch.cuda.empty_cache()  # of the train step: vLLM takes its memory past torch
        self.engine.wake_up("weights")
        self.engine.load_weights(named_weights(self.policy), self.version)
        if not (due := self.check.due()):
            self.move_trainer("cpu")
        self.engine.wake_up("kv_cache")
        if not due:
            return None
        difference = self.check(self.engine, self.logprobs_of, self.fixed)
        self.move_trainer("cpu")
        return difference

    def rollout(self) -> Rollout:
        """Graded responses of this rank's engine to its share of the next N mini-batches' prompts.
        Afterwards the engine sleeps, and the trainer is on the GPU."""
        c, n_prompts = self.c, self.c.prompts * self.c.mini_batches
        taken = self.order.take(self.version * c.prompts, n_prompts)
        mine = prompts_of_engine(
            n_prompts, c.prompts, WORLD // c.tensor_parallel, self.engine_index)
        asked = [self.prompts[taken[i]] for i in mine]
        with self.phases("rollout"):
            batch = self.generate(asked, c.group_size, self.version)
            self.engine.sleep()
            self.move_trainer(DEVICE)
        if self.samples_due():
            last = batch.split(len(batch.tokens) // c.mini_batches)[-1]
            self.sample(last, asked[-(len(asked) // c.mini_batches):], "training",
                        1 if self.held_out else COUNT)
        return batch

    def samples_due(self) -> bool:
        """Whether samples are written of the rollout batch that comes next, or is being trained."""
        return not self.version or self.c.scored(self.version + self.c.mini_batches)

    def sample(self, rollout: Rollout, asked: list, source: str, count: int):
        if RANK == 0:
            self.samples += samples(rollout, asked, self.tokenizer, source, count, self.engine.eos,
                                    self.c.max_response)

    def take_samples(self) -> list[dict]:
        taken, self.samples = self.samples, []
        return taken

    def generate(self, prompts: list, group_size: int, seed: int, top_p: float = 1.0) -> Rollout:
        """Graded responses of this rank's engine."""
        rollout = self.engine.generate([prompt.tokens for prompt in prompts], group_size,
                                       self.c.max_response, seed, self.version, top_p)
        sampled = responses(rollout)
        with self.phases("reward"):
            first = RANK - RANK % self.c.tensor_parallel
            same = crc32(rollout.tokens.numpy().tobytes())
            rewards = torch.tensor([0.0] * len(sampled) + [same], dtype=torch.float64)
            if RANK == first:
                texts = self.tokenizer.batch_decode(sampled, skip_special_tokens=True)
                asked = [prompt for prompt in prompts for _ in range(group_size)]
                rewards[:-1] = torch.tensor(grade(self.reward, asked, texts, sampled))
            dist.broadcast(rewards, first, group=self.peers)
            if rewards[-1] != same:
                raise RuntimeError(
                    f"ranks {first} and {RANK}, one engine, sampled different tokens")
        return replace(rollout, rewards=rewards[:-1].float())

    def evaluate(self) -> dict:
        """Mean reward of k responses to each held-out prompt, with the same seeds at every score,
        that training never uses, and how many got 0 for an exception or a time limit; None without
        held-out prompts."""
        if not self.held_out:
            return {"score": None, "score_errors": None}
        c, sums = self.c, Sums()
        mine = self.held_out[self.engine_index::WORLD // c.tensor_parallel]
        sums.add("score", 0.0, 0)
        if mine:
            rollout = self.generate(mine, c.eval_samples, 2**61, c.eval_top_p)
            sums.add("score", rollout.rewards.mean(), len(rollout.rewards))
            self.sample(rollout, mine, "held out", COUNT)
        sums.count("score_errors", sum(take_counts(self.reward).values()))
        return sums.over_ranks()
