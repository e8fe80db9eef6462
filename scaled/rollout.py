"""The inference engine: vLLM inside this very process, for checkpoints in a folder."""
import gc
import random
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nano_moe_rl import DEVICE, Rollout
from scaled.batches import shared_prefixes
from scaled.data import end_tokens
from scaled.engine import EngineError, engine_called
from scaled.families import knows, moe_layers, route_shape
from scaled.huggingface import published_names
from scaled.quantisation import quantisation
from scaled.replay import check_routes
from scaled.terminal import bar, err, say
from scaled.vllm_internals import (
    VLLM, block_of_cache, check_served, check_vllm, options_for, set_environment, shut_down)

# without vLLM's figures of speed, which are longer than a line
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


def normalise_routes(routed: np.ndarray | None, *, rows: int, layers: list[int],
                     n_hidden_layers: int, top_k: int, n_experts: int) -> Tensor:
    """What vLLM says about one sequence -> routes (rows, L, A) of its MoE layers, uint8 up to 256
    experts and int16 above. `rows` tokens were fed: one more row, of a last token that was fed
    too, is cut off. routed is integer (rows or rows + 1, n_hidden_layers, A), zero in dense layers.
    EngineError on all else, with the count of what is missing."""
    if routed is None or len(routed) < rows:
        have = 0 if routed is None else len(routed)
        raise EngineError(f"routed_experts: {rows - have} of {rows} rows are missing")
    if routed.shape[1:] != (n_hidden_layers, top_k) or len(routed) > rows + 1:
        raise EngineError(f"routed_experts: shape {routed.shape}, expected {rows} or {rows + 1} "
                         f"rows of {(n_hidden_layers, top_k)}")
    if not np.issubdtype(routed.dtype, np.integer):
        raise EngineError(f"routed_experts: dtype {routed.dtype}, expected integers")
    routed = routed[:rows]
    dense = [layer for layer in range(n_hidden_layers) if layer not in layers]
    if filled := int(routed[:, dense].any((0, 2)).sum()):
        raise EngineError(f"routed_experts: {filled} of {len(dense)} dense layers have routes, so "
                         "the layer axis is not that of the model")
    routes = routed[:, layers]
    if routes.size and not 0 <= routes.min() <= routes.max() < n_experts:  # before it can wrap
        bad = int(((routes < 0) | (routes >= n_experts)).sum())
        raise EngineError(f"routed_experts: {bad} of {routes.size} ids are not below {n_experts}")
    routes = torch.from_numpy(routes.astype(np.uint8 if n_experts <= 256 else np.int16))
    try:
        check_routes(routes[None], torch.ones(1, rows, dtype=torch.bool),
                     (1, rows, len(layers), top_k), n_experts)  # different experts in each row
    except ValueError as fact:
        raise EngineError(str(fact)) from None
    return routes


class Engine:
    """A RolloutEngine, and what its methods promise stands there: vLLM. Under torchrun
    `tensor_parallel` consecutive ranks are one engine and make the same calls, with the same
    prompts; other ranks are others."""

    def __init__(self, folder: str, *, precision: str, tensor_parallel: int, max_length: int,
                 temperature: float, seed: int, gpu_memory: float = 0.5,
                 trust_remote_code: bool = False, routes: bool = True, **vllm_options):
        """folder: a Hugging Face checkpoint, policy version 0. precision: bf16, fp32, fp8 or int8.
        max_length: tokens of prompt and response. gpu_memory: share of the device for weights and
        KV cache. routes: False for evaluation: a long rollout has gigabytes of them.
        vllm_options go over ours. ValueError if the family, the device, the shapes or the
        installed vLLM do not permit it, before anything is loaded."""
        self.vllm_version = check_vllm()
        set_environment()
        from transformers import AutoConfig
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.external = dist.is_initialized()
        text, ranks = config.get_text_config(), dist.get_world_size() if self.external else 1
        if tensor_parallel < 1 or ranks % tensor_parallel:
            raise ValueError(f"tensor_parallel {tensor_parallel}: give a divisor of the {ranks} "
                             "processes, and start them with torchrun")
        check_served(config, precision)
        options = quantisation(precision, text, tensor_parallel)
        self.contract = None  # of a family whose routes nobody could read
        if routes and knows(config):
            _, A, E = route_shape(config)
            self.contract = dict(layers=moe_layers(config), top_k=A, n_experts=E,
                                 n_hidden_layers=text.num_hidden_layers)
        self.eos, self.vocabulary = end_tokens(folder, trust_remote_code), text.vocab_size
        self.max_length, self.temperature = max_length, temperature
        replica = dist.get_rank() // tensor_parallel if self.external else 0
        self.seed, self.version, self.asleep = f"{seed}/{replica}", 0, set()
        first = not dist.is_initialized() or dist.get_rank() == 0
        self.progress = partial(bar, bar_format=BAR) if first and err().isatty() else False
        self.published = published_names(config, trust_remote_code)
        if self.external:  # for tensor_parallel 1 too: else vLLM would start a group of its own
            options["distributed_executor_backend"] = "external_launcher"
        ours = dict(
            skip_tokenizer_init=True, trust_remote_code=trust_remote_code,
            dtype="float32" if precision == "fp32" else "bfloat16", max_model_len=max_length,
            tensor_parallel_size=tensor_parallel, seed=seed + replica,
            gpu_memory_utilization=gpu_memory, enable_prefix_caching=True,
            enable_return_routed_experts=self.contract is not None,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # its defaults would change the distribution
            worker_extension_cls="scaled.vllm_internals.WorkerSync",
            disable_log_stats=True, use_tqdm_on_load=False,
            enable_sleep_mode=DEVICE == "cuda", enforce_eager=DEVICE == "cpu",
        )
        with vllm_called("at its start"):
            import vllm
            options |= options_for(config)
            self.vllm, self.llm = vllm, vllm.LLM(folder, **ours | options | vllm_options)
        self.block = block_of_cache(self.llm) if self.contract else 0
        self.probe()

    def probe(self):
        """Samples a few tokens. EngineError if this vLLM does not keep what this file relies on."""
        prompts = [[(p + t) % self.vocabulary for t in range(3)] for p in range(2)]
        try:
            rollout = self.generate(prompts, 2, min(4, self.max_length - 3), 0, 0)
            if rollout.routing is not None and not rollout.routing[rollout.fed].any():
                raise EngineError("routed_experts: all zero")
            logprobs = rollout.rollout_logprobs[rollout.mask]
            if (logprobs > 0).any():
                raise EngineError("log-probabilities are above 0")
        except EngineError as fact:
            raise EngineError(f"vllm {self.vllm_version} does not keep its contract with "
                              f"scaled/rollout.py: {fact}") from fact

    def generate(self, prompts: list[list[int]], group_size: int, max_response: int, seed: int,
                 version: int, top_p: float = 1.0) -> Rollout:
        if self.asleep:
            raise EngineError(f"the engine sleeps: wake_up({', '.join(sorted(self.asleep))}) first")
        if version != self.version:
            raise EngineError(f"the engine has weights of policy version {self.version}, not "
                              f"{version}: call load_weights before generate")
        self.check_lengths(prompts, max_response)
        prompts = [prompt for prompt in prompts for _ in range(group_size)]
        # A seed for each response: what is drawn does not depend on which others are in a batch.
        seeds = random.Random(f"{self.seed}/{seed}")
        shared = shared_prefixes(prompts, self.block)  # computed once, so their routes come once
        outputs = self.run(prompts, [self.vllm.SamplingParams(
            temperature=self.temperature, top_p=top_p, max_tokens=max_response, logprobs=0,
            stop_token_ids=self.eos, seed=seeds.getrandbits(62), flat_logprobs=True,
            detokenize=False, routed_experts_prompt_start=start) for start in shared])
        if again := sum(output.num_cached_tokens < n for output, n in zip(outputs, shared)):
            self.block = 0
            say(f"{again} of {len(prompts)} times the engine computed a shared prefix anew: those routes"
                " are of the first time; from now on every response brings all of its own", err())
        rows, logprobs, routes = [], [], []
        for i, (prompt, output) in enumerate(zip(prompts, outputs)):
            answer = output.outputs[0]
            sampled = list(answer.token_ids)
            if not sampled or answer.logprobs.token_ids != sampled:
                raise EngineError(f"response {i}: {len(answer.logprobs.token_ids)} log-"
                                  f"probabilities for {len(sampled)} sampled tokens")
            if not np.isfinite(answer.logprobs.logprobs).all():
                raise EngineError(f"response {i}: log-probabilities are not finite")
            rows.append(torch.tensor(prompt + sampled))
            logprobs.append(torch.tensor([0.0] * (len(prompt) - 1) + answer.logprobs.logprobs))
            routes.append(self.routes(
                answer.routed_experts, len(rows[-1]) - 1 - shared[i], f"response {i}"))
        return Rollout(pad_sequence(rows, True), torch.tensor([len(prompt) for prompt in prompts]),
                       torch.tensor([len(row) for row in rows]), pad_sequence(logprobs, True),
                       self.pad(routes, shared), self.version)

    def score(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        self.check_lengths(sequences, 1)  # the token that vLLM always samples
        if min(map(len, sequences)) < 2:
            raise ValueError("a sequence of one token has nothing to score")
        outputs = self.run(sequences, self.vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False))
        logprobs, routes = [], []
        for i, (sequence, output) in enumerate(zip(sequences, outputs)):
            if output.prompt_logprobs.token_ids != sequence[1:]:
                raise EngineError(f"sequence {i}: no log-probability for some of its tokens")
            logprobs.append(torch.tensor(output.prompt_logprobs.logprobs))
            routed = output.outputs[0].routed_experts
            routes.append(self.routes(routed, len(sequence) - 1, f"sequence {i}"))
        return pad_sequence(logprobs, True), self.pad(routes)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int):
        self.version = None  # of no version until all is in
        weights = (pair for name, tensor in named_tensors
                   for pair in self.published(name, tensor.detach()))
        with vllm_called("while it took new weights"):
            self.llm.collective_rpc("sync_weights", args=(weights,))
        if not self.llm.reset_prefix_cache():
            raise EngineError("the prefix cache keeps values of old weights: requests are running")
        self.version = version

    def sleep(self):
        """CUDA: weights and KV cache leave the device for the trainer's sake, the weights for good:
        wake_up("weights"), load_weights, wake_up("kv_cache") brings the engine back. CPU: no-op."""
        if DEVICE == "cuda":
            self.llm.sleep(level=2)
            self.version, self.asleep = None, {"weights", "kv_cache"}

    def wake_up(self, *tags: str):
        if wanted := (set(tags) or {"weights", "kv_cache"}) & self.asleep:
            self.llm.wake_up(sorted(wanted))
            self.asleep -= wanted

    def close(self):
        shut_down(self.llm, keep_group=self.external)
        self.llm = None
        gc.collect()

    def run(self, prompts: list[list[int]], params) -> list:
        """vLLM's outputs, in the order of the prompts."""
        with vllm_called("while it sampled"):
            return self.llm.generate([self.vllm.TokensPrompt(prompt_token_ids=prompt)
                                      for prompt in prompts], params, use_tqdm=self.progress)

    def routes(self, routed: np.ndarray | None, rows: int, name: str) -> Tensor | None:
        if self.contract is None:
            return None
        try:
            return normalise_routes(routed, rows=rows, **self.contract)
        except EngineError as fact:
            raise EngineError(f"{name}: {fact}") from None

    def pad(self, routes: list[Tensor | None], shared: list[int] | None = None) -> Tensor | None:
        """Routes (rows, L, A) -> (B, T, L, A). The first `shared` of a row are those of the row before.
        On padding all experts take turns, since a single one would be overloaded."""
        if self.contract is None:
            return None
        A, E = self.contract["top_k"], self.contract["n_experts"]
        shared = shared or [0] * len(routes)
        T = max(start + len(route) for start, route in zip(shared, routes))
        turns = (torch.arange(T * A) % E).view(T, 1, A).to(routes[0].dtype)
        batch = turns.expand(T, len(self.contract["layers"]), A).repeat(len(routes), 1, 1, 1)
        for i, (start, route) in enumerate(zip(shared, routes)):
            batch[i, :start] = batch[i - 1, :start]
            batch[i, start : start + len(route)] = route
        return batch

    def check_lengths(self, prompts: list[list[int]], response: int):
        longest = max(map(len, prompts))
        if longest + response > self.max_length:
            raise ValueError(f"a prompt of {longest} and a response of {response} tokens exceed "
                             f"max_length {self.max_length}")


@contextmanager
def vllm_called(when: str):
    """vLLM draws from and seeds torch's global generators; the trainer's stay as they were."""
    devices = [torch.cuda.current_device()] if DEVICE == "cuda" else []
    with engine_called(f"vllm {VLLM}", when), torch.random.fork_rng(devices):
        yield
