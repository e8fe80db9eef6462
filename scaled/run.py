"""What a run consists of, made once: data, reward, inference engine, policy, optimiser."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

from nano_moe_rl import DEVICE, Rollout, adamw
from scaled import checkpoint
from scaled.config import Config
from scaled.data import PromptOrder, end_tokens, load_prompts
from scaled.export import export_cold_start
from scaled.huggingface import named_weights
from scaled.metrics import Phases, Sums
from scaled.policy import load_policy
from scaled.ranks import RANK, TIMEOUT, WORLD
from scaled.replay import RoutingReplay, route_shape
from scaled.rewards import check_reward, grade, load_reward, take_counts
from scaled.rollout import Engine, check_vllm
from scaled.sync import SyncCheck
from scaled.trainer import move


class Run:
    """What a run needs, made once. ValueError for what the options, the data and the checkpoint do
    not permit, before anything is written but the checkpoint of a cold start."""

    def __init__(self, c: Config, resume: bool):
        check_vllm()
        self.c, self.folder, self.engine_index = c, Path("runs", c.name), RANK // c.tensor_parallel
        if c.nano_cold_start:
            if RANK == 0:
                export_cold_start(Path(c.checkpoint), c.seed)
            dist.barrier()
        if not Path(c.checkpoint, "config.json").is_file():
            raise ValueError(f"--checkpoint {c.checkpoint}: has no config.json; give the folder of "
                             "a Hugging Face checkpoint")
        trust = dict(trust_remote_code=c.trust_remote_code)
        config = AutoConfig.from_pretrained(c.checkpoint, **trust)
        route_shape(config)  # refuses what cannot replay
        context = config.get_text_config().max_position_embeddings
        if c.max_length > context:
            raise ValueError(f"--max-response {c.max_response}: with --max-prompt {c.max_prompt} it "
                             f"exceeds the checkpoint's context of {context} tokens; give less")
        self.tokenizer = AutoTokenizer.from_pretrained(c.checkpoint, **trust)
        end_tokens(c.checkpoint, c.trust_remote_code)
        self.reward = load_reward(c.reward, c.reward_seconds)
        if c.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("--tensorboard: the package is missing; pip install tensorboard")
        columns = dict(prompt_column=c.prompt_column, answer_column=c.answer_column, chat=c.chat,
                       max_prompt=c.max_prompt, system=c.system,
                       vocabulary=config.get_text_config().vocab_size)
        self.prompts = load_prompts(c.train_data, self.tokenizer, split=c.train_split, **columns)
        self.held_out = load_prompts(
            c.eval_data, self.tokenizer, split=c.eval_split, **columns) if c.eval_data else []
        check_reward(self.reward, self.prompts + self.held_out)
        self.order = PromptOrder(len(self.prompts), c.seed)
        self.engine = Engine(
            c.checkpoint, precision=c.rollout_precision, tensor_parallel=c.tensor_parallel,
            max_length=c.max_length, temperature=c.temperature, seed=c.seed,
            gpu_memory=c.gpu_memory, **trust)
        self.fixed = [p.tokens for p in self.prompts[:8] if len(p.tokens) > 1]
        scored = self.engine.score(self.fixed) if c.check_sync else None
        self.engine.sleep()
        self.engine_bytes = torch.cuda.memory_allocated()  # torch still counts them; 0 on a CPU
        self.policy = load_policy(
            c.checkpoint, precision=c.train_precision, logits_bytes=c.logits_mib * 2**20,
            gradient_checkpointing=c.gradient_checkpointing, cpu_offload=c.cpu_offload,
            device=DEVICE, **trust)
        self.optimizer = adamw(self.policy, c.lr, c.weight_decay)
        self.version, self.check, self.checks_left = 0, SyncCheck(), c.check_sync
        if scored:  # both have the weights of the folder: the measure for all syncs
            self.check(self.engine, self.logprobs_of, self.fixed, scored)
        # the ranks of one engine have the same responses: the first grades them for all
        self.peers, _ = dist.new_subgroups(c.tensor_parallel, backend="gloo", timeout=TIMEOUT)
        if resume:
            newest = checkpoint.checkpoints(self.folder)[-1]
            self.version = checkpoint.load(newest, self.policy, self.optimizer)
        self.phases = Phases(c.updates, self.version, silent=RANK > 0)

    def move_trainer(self, device: str):
        """Out of the engine's way, or back; with cpu_offload FSDP itself keeps it in host memory."""
        if not self.c.cpu_offload:
            move(self.policy, self.optimizer, device)

    def sync(self):
        """The trainer's weights into the engine, which is awake and at this version afterwards; the
        trainer has left the GPU then."""
        torch.cuda.empty_cache()  # of the train step: vLLM takes its memory past torch
        self.engine.wake_up("weights")
        self.engine.load_weights(named_weights(self.policy), self.version)
        if not self.checks_left:
            self.move_trainer("cpu")
        self.engine.wake_up("kv_cache")
        if self.checks_left:
            self.checks_left -= 1
            self.check(self.engine, self.logprobs_of, self.fixed)
            self.move_trainer("cpu")

    @torch.no_grad()
    def logprobs_of(self, tokens, lengths, routing):
        """log π (B, T) of given tokens at temperature 1, by the engine's experts."""
        fixed = Rollout(tokens.to(DEVICE), lengths, lengths.to(DEVICE), replay=routing.to(DEVICE))
        with RoutingReplay(self.policy.model, fixed.replay, fixed.fed):
            return self.policy(fixed.tokens, fixed.fed, 1.0)[0]

    def generate(self, prompts: list, group_size: int, seed: int, top_p: float = 1.0) -> Rollout:
        """Graded responses of this rank's engine."""
        rollout = self.engine.generate([prompt.tokens for prompt in prompts], group_size,
                                       self.c.max_response, seed, self.version, top_p)
        responses = [row[start:end].tolist() for row, start, end in
                     zip(rollout.tokens, rollout.prompt_lengths, rollout.lengths)]
        with self.phases("reward"):
            first, same = RANK - RANK % self.c.tensor_parallel, crc32(rollout.tokens.numpy().tobytes())
            rewards = torch.tensor([0.0] * len(responses) + [same], dtype=torch.float64)
            if RANK == first:
                texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
                asked = [prompt for prompt in prompts for _ in range(group_size)]
                rewards[:-1] = torch.tensor(grade(self.reward, asked, texts, responses))
            dist.broadcast(rewards, first, group=self.peers)
            if rewards[-1] != same:
                raise RuntimeError(f"ranks {first} and {RANK}, one engine, sampled different tokens")
        return replace(rollout, rewards=rewards[:-1].float())

    def evaluate(self) -> dict:
        """Mean reward of k responses to each held-out prompt, with the same seeds at every score, that
        training never uses, and how many got 0 for an exception or a time limit; None without
        held-out prompts."""
        if not self.held_out:
            return {"score": None, "score_errors": None}
        c, sums = self.c, Sums()
        mine = self.held_out[self.engine_index::WORLD // c.tensor_parallel]
        sums.add("score", 0.0, 0)
        if mine:
            rollout = self.generate(mine, c.eval_samples, 2**61, c.eval_top_p)
            sums.add("score", rollout.rewards.mean(), len(rollout.rewards))
        sums.add("score_errors", sum(take_counts(self.reward).values()), 1)
        score = sums.means()
        return score | {"score_errors": round(score["score_errors"] * WORLD)}
