"""The inference engine: vLLM 0.30 inside this very process, for checkpoints in a folder.

Environment that vLLM gets, unless it is set already (the first: always):
    VLLM_ENABLE_V1_MULTIPROCESSING=0   the engine runs in this process, so weights need no transport
    VLLM_USE_V2_MODEL_RUNNER=0         the runner that all of this was tried with, on GPUs too
    VLLM_LOGGING_LEVEL=ERROR           the console belongs to the training run
    VLLM_NO_USAGE_STATS=1
    VLLM_CPU_OMP_THREADS_BIND=nobind, VLLM_CPU_KVCACHE_SPACE=1 (GiB)   on a CPU
"""
import gc
import os
import random
import sys
from collections.abc import Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, version as installed_version

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from nano_moe_rl import DEVICE, Rollout
from scaled.data import end_tokens
from scaled.quantisation import quantisation
from scaled.replay import check_routes, moe_layers, route_shape
from scaled.sync import CPU_FAULTS, mend_rotary, published_names

VLLM = "0.30.0"  # the last one whose first model runner captures routed experts


def check_vllm() -> str:
    """The installed version of vLLM; ValueError if there is none, or one that was never tried."""
    found = []
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found.append(installed_version(distribution))
        except PackageNotFoundError:
            continue
    if not found or found[0].partition("+")[0] != VLLM:
        raise ValueError(f"vllm {found[0] if found else 'is not installed'}: scaled needs {VLLM}; "
                         "install scaled/requirements.txt, on a CPU as scaled/README.md says")
    return found[0]


def set_environment():
    """What vLLM reads when it is imported; see the top of this file."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if DEVICE == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def normalise_routes(routed: np.ndarray | None, *, rows: int, layers: list[int],
                     n_hidden_layers: int, top_k: int, n_experts: int) -> Tensor:
    """What vLLM says about one sequence -> routes (rows, L, A) of its MoE layers, uint8 up to 256
    experts and int16 above. `rows` tokens were fed: one more row, of a last token that was fed
    too, is cut off. routed is integer (rows or rows + 1, n_hidden_layers, A), zero in dense layers.
    ValueError on all else, with the count of what is missing."""
    if routed is None or len(routed) < rows:
        have = 0 if routed is None else len(routed)
        raise ValueError(f"routed_experts: {rows - have} of {rows} rows are missing")
    if routed.shape[1:] != (n_hidden_layers, top_k) or len(routed) > rows + 1:
        raise ValueError(f"routed_experts: shape {routed.shape}, expected {rows} or {rows + 1} "
                         f"rows of {(n_hidden_layers, top_k)}")
    if not np.issubdtype(routed.dtype, np.integer):
        raise ValueError(f"routed_experts: dtype {routed.dtype}, expected integers")
    routed = routed[:rows]
    dense = [layer for layer in range(n_hidden_layers) if layer not in layers]
    if filled := int(routed[:, dense].any((0, 2)).sum()):
        raise ValueError(f"routed_experts: {filled} of {len(dense)} dense layers have routes, so "
                         "the layer axis is not that of the model")
    routes = routed[:, layers]
    if routes.size and not 0 <= routes.min() <= routes.max() < n_experts:  # before it can wrap
        bad = int(((routes < 0) | (routes >= n_experts)).sum())
        raise ValueError(f"routed_experts: {bad} of {routes.size} ids are not below {n_experts}")
    routes = torch.from_numpy(routes.astype(np.uint8 if n_experts <= 256 else np.int16))
    check_routes(routes[None], torch.ones(1, rows, dtype=torch.bool),
                 (1, rows, len(layers), top_k), n_experts)  # different experts in each row
    return routes


class Engine:
    """vLLM with the weights of one policy version. Under torchrun `tensor_parallel` consecutive
    ranks are one engine and make the same calls, with the same prompts; other ranks are others."""

    def __init__(self, folder: str, *, precision: str, tensor_parallel: int, max_length: int,
                 temperature: float, seed: int, gpu_memory: float = 0.5,
                 trust_remote_code: bool = False):
        """folder: a Hugging Face checkpoint, policy version 0. precision: bf16, fp32, fp8 or int8.
        max_length: tokens of prompt and response. gpu_memory: share of the device for weights and
        KV cache. ValueError if vLLM, the device or the shapes do not permit it."""
        self.vllm_version = check_vllm()
        set_environment()
        from transformers import AutoConfig
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.external = dist.is_initialized()
        text, ranks = config.get_text_config(), dist.get_world_size() if self.external else 1
        if tensor_parallel < 1 or ranks % tensor_parallel:
            raise ValueError(f"tensor_parallel {tensor_parallel}: give a divisor of the {ranks} "
                             "processes, and start them with torchrun")
        options = quantisation(precision, text, tensor_parallel)
        self.layers, shape = moe_layers(config), route_shape(config)
        self.contract = dict(layers=self.layers, n_hidden_layers=text.num_hidden_layers,
                             top_k=shape[1], n_experts=shape[2])
        self.eos, self.vocabulary = end_tokens(folder, trust_remote_code), text.vocab_size
        self.max_length, self.temperature = max_length, temperature
        replica = dist.get_rank() // tensor_parallel if self.external else 0
        self.seed, self.version, self.asleep = f"{seed}/{replica}", 0, set()
        first = not dist.is_initialized() or dist.get_rank() == 0
        self.progress = partial(tqdm, leave=False) if first and sys.stderr.isatty() else False
        self.published = published_names(config)

        import vllm
        self.vllm = vllm
        if DEVICE == "cpu" and text.model_type in CPU_FAULTS:
            raise ValueError(f"vllm {self.vllm_version} does not serve {text.model_type} on a CPU: "
                             f"{CPU_FAULTS[text.model_type]}; use a GPU")
        if DEVICE == "cpu" and text.model_type.startswith("deepseek"):
            mend_rotary()
        if self.external:  # for tensor_parallel 1 too: else vLLM would start a group of its own
            options["distributed_executor_backend"] = "external_launcher"
        with kept_random_state():  # vLLM seeds torch
            self.llm = vllm.LLM(
                folder, skip_tokenizer_init=True, trust_remote_code=trust_remote_code,
                dtype="float32" if precision == "fp32" else "bfloat16", max_model_len=max_length,
                tensor_parallel_size=tensor_parallel, seed=seed + replica,
                gpu_memory_utilization=gpu_memory, enable_prefix_caching=True,
                enable_return_routed_experts=True, logprobs_mode="processed_logprobs",
                generation_config="vllm",  # its defaults would change the distribution
                worker_extension_cls="scaled.sync.WorkerSync",
                disable_log_stats=True, use_tqdm_on_load=False,
                enable_sleep_mode=DEVICE == "cuda", enforce_eager=DEVICE == "cpu", **options)
        self.probe()

    def probe(self):
        """Samples a few tokens. ValueError if this vLLM does not keep what this file relies on."""
        prompts = [[(p + t) % self.vocabulary for t in range(3)] for p in range(2)]
        try:
            rollout = self.generate(prompts, 2, min(4, self.max_length - 3), 0, 0)
            if not rollout.routing[rollout.fed].any():
                raise ValueError("routed_experts: all zero")
            logprobs = rollout.rollout_logprobs[rollout.mask]
            if (logprobs > 0).any():
                raise ValueError("log-probabilities are above 0")
        except ValueError as fact:
            raise ValueError(f"vllm {self.vllm_version} does not keep its contract with "
                             f"scaled/rollout.py: {fact}") from fact

    def generate(self, prompts: list[list[int]], group_size: int, max_response: int, seed: int,
                 version: int, top_p: float = 1.0) -> Rollout:
        """G responses to each of P prompts, row p·G + g, on the CPU; they end with one of self.eos
        or at max_response tokens. rollout_logprobs (B, T) is log μ at the engine's temperature.
        routing (B, T, L, A) is uint8 up to 256 experts, else int16; padding has spread valid ids.
        The same seed and weights give the same samples, where the kernels give the same logits: bf16
        products can depend on what else is in a batch. torch's random state stays as it is.
        version: that of the trainer. top_p below 1 is for evaluation: it takes support from μ.
        ValueError if the engine sleeps or has other weights, or a route is missing."""
        if self.asleep:
            raise ValueError(f"the engine sleeps: wake_up({', '.join(sorted(self.asleep))}) first")
        if version != self.version:
            raise ValueError(f"the engine has weights of policy version {self.version}, not "
                             f"{version}: call load_weights before generate")
        self.check_lengths(prompts, max_response)
        prompts = [prompt for prompt in prompts for _ in range(group_size)]
        # A seed for each response: what is drawn does not depend on which others are in a batch.
        seeds = random.Random(f"{self.seed}/{seed}")
        outputs = self.run(prompts, [self.vllm.SamplingParams(
            temperature=self.temperature, top_p=top_p, max_tokens=max_response, logprobs=0,
            stop_token_ids=self.eos, seed=seeds.getrandbits(62), flat_logprobs=True,
            detokenize=False) for _ in prompts])
        rows, logprobs, routes = [], [], []
        for i, (prompt, output) in enumerate(zip(prompts, outputs)):
            answer = output.outputs[0]
            sampled = list(answer.token_ids)
            if not sampled or answer.logprobs.token_ids != sampled:
                raise ValueError(f"response {i}: {len(answer.logprobs.token_ids)} log-probabilities"
                                 f" for {len(sampled)} sampled tokens")
            if not np.isfinite(answer.logprobs.logprobs).all():
                raise ValueError(f"response {i}: log-probabilities are not finite")
            rows.append(torch.tensor(prompt + sampled))
            logprobs.append(torch.tensor([0.0] * (len(prompt) - 1) + answer.logprobs.logprobs))
            routes.append(self.routes(answer.routed_experts, len(rows[-1]) - 1, f"response {i}"))
        return Rollout(pad_sequence(rows, True), torch.tensor([len(prompt) for prompt in prompts]),
                       torch.tensor([len(row) for row in rows]), pad_sequence(logprobs, True),
                       self.pad(routes), self.version)

    def score(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        """log μ of the tokens of given sequences at temperature 1, by one prefill: logprobs (B, T),
        0 on padding, and routing (B, T, L, A). ValueError if one is shorter than 2 tokens, or
        leaves no room for the one token that vLLM always samples."""
        self.check_lengths(sequences, 1)
        if min(map(len, sequences)) < 2:
            raise ValueError("a sequence of one token has nothing to score")
        outputs = self.run(sequences, self.vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False))
        logprobs, routes = [], []
        for i, (sequence, output) in enumerate(zip(sequences, outputs)):
            if output.prompt_logprobs.token_ids != sequence[1:]:
                raise ValueError(f"sequence {i}: no log-probability for some of its tokens")
            logprobs.append(torch.tensor(output.prompt_logprobs.logprobs))
            routed = output.outputs[0].routed_experts
            routes.append(self.routes(routed, len(sequence) - 1, f"sequence {i}"))
        return pad_sequence(logprobs, True), self.pad(routes)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int):
        """The trainer's weights, under transformers' names, one at a time; a tensor must keep its
        values until the next layer's come. Then the engine is at `version`, without old prefixes.
        With several ranks all of them iterate in step. ValueError if a weight did not come."""
        self.version = None  # of no version until all is in
        weights = (pair for name, tensor in named_tensors
                   for pair in self.published(name, tensor.detach()))
        with kept_random_state():
            self.llm.collective_rpc("sync_weights", args=(weights,))
        if not self.llm.reset_prefix_cache():
            raise ValueError("the prefix cache keeps values of old weights: requests are running")
        self.version = version

    def sleep(self):
        """CUDA: weights and KV cache leave the device for the trainer's sake, the weights for good:
        wake_up("weights"), load_weights, wake_up("kv_cache") brings the engine back. CPU: no-op."""
        if DEVICE == "cuda":
            self.llm.sleep(level=2)
            self.version, self.asleep = None, {"weights", "kv_cache"}

    def wake_up(self, *tags: str):
        """Memory for "weights", for "kv_cache", or for both if neither is named."""
        if wanted := (set(tags) or {"weights", "kv_cache"}) & self.asleep:
            self.llm.wake_up(sorted(wanted))
            self.asleep -= wanted

    def close(self):
        """Gives memory back; a process group from before the engine stays. Another engine can be
        made then."""
        from vllm.distributed import parallel_state
        from vllm.v1.engine import core

        cleanup = core.cleanup_dist_env_and_memory
        if self.external:  # else vLLM would destroy the trainer's process group with its own
            core.cleanup_dist_env_and_memory = parallel_state.destroy_model_parallel
        try:
            self.llm.llm_engine.engine_core.shutdown()
        finally:
            core.cleanup_dist_env_and_memory = cleanup
        self.llm = None
        gc.collect()

    def run(self, prompts: list[list[int]], params) -> list:
        """vLLM's outputs, in the order of the prompts."""
        with kept_random_state():
            return self.llm.generate([self.vllm.TokensPrompt(prompt_token_ids=prompt)
                                      for prompt in prompts], params, use_tqdm=self.progress)

    def routes(self, routed: np.ndarray | None, rows: int, name: str) -> Tensor:
        try:
            return normalise_routes(routed, rows=rows, **self.contract)
        except ValueError as fact:
            raise ValueError(f"{name}: {fact}") from None

    def pad(self, routes: list[Tensor]) -> Tensor:
        """Routes (rows, L, A) -> (B, T, L, A); on padding all experts take turns, since a single
        one would be overloaded."""
        A, E = self.contract["top_k"], self.contract["n_experts"]
        T = max(map(len, routes))
        turns = (torch.arange(T * A) % E).view(T, 1, A).to(routes[0].dtype)
        batch = turns.expand(T, len(self.layers), A).repeat(len(routes), 1, 1, 1)
        for row, route in zip(batch, routes):
            row[: len(route)] = route
        return batch

    def check_lengths(self, prompts: list[list[int]], response: int):
        longest = max(map(len, prompts))
        if longest + response > self.max_length:
            raise ValueError(f"a prompt of {longest} and a response of {response} tokens exceed "
                             f"max_length {self.max_length}")


def kept_random_state():
    """vLLM draws from and seeds torch's global generators; the trainer's stay as they were."""
    return torch.random.fork_rng([torch.cuda.current_device()] if DEVICE == "cuda" else [])
