"""What the benchmarks share: turns and their ratios, processes of their own, a random checkpoint.

No figure is of one run alone: arms take turns, and what is compared are the ratios of one turn."""
import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]
from nano_moe_rl import DEVICE, Rollout, group_advantages  # noqa: E402

MIB = 2**20


# ------------------------------------------------------------------------------------------ seconds
def clock() -> float:
    """Seconds. On a CPU with one thread those in which this process ran, which other work on the machine does
    not lengthen, and neither does waiting for a file or another rank."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if DEVICE == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def seconds(function: Callable, *args) -> float:
    began = clock()
    function(*args)
    return clock() - began


def turns(arms: dict[str, Callable], rounds: int, warm_up: int = 1) -> dict[str, list]:
    """What each arm returns, once a round, without the warm-up; every other round runs backwards.
    A while of other work on the machine slows all arms down, and ratios of a round stay."""
    found = defaultdict(list)
    for n in tqdm(range(warm_up + rounds), disable=None, leave=False):
        for name in list(arms)[::1 if n % 2 else -1]:
            result = arms[name]()
            if n >= warm_up:
                found[name].append(result)
    return dict(found)


def middle(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, and an interval for it of 95 % or more that assumes no distribution: the k-th
    smallest and k-th largest value, with the largest k that the binomial distribution permits.
    With fewer than 6 values all of them are inside, and it is no such interval."""
    from scipy.stats import binom

    ordered = sorted(values)
    k = max(int(binom.ppf(0.025, len(ordered), 0.5)) - 1, 0)
    return median(ordered), ordered[k], ordered[-1 - k]


def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """middle of the ratios of each round."""
    return middle(a / b for a, b in zip(above, below, strict=True))


def shown(of: tuple[float, float, float], digits: int = 3) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*of, d=digits)


# ------------------------------------------------------------------------------------------ machine
def machine() -> str:
    """Processor, threads and versions, in a line."""
    try:
        name = next(line.partition(":")[2].strip() for line in open("/proc/cpuinfo")
                    if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    card = f", {torch.cuda.get_device_name()}" if DEVICE == "cuda" else ", no GPU"
    return (f"{os.cpu_count()} cores, {name} ({torch.backends.cpu.get_cpu_capability()}){card}; "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}")


def peak_mib() -> float:
    """The most that this process ever occupied."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def allocate(mib: int | None):
    """From so many MiB on glibc gives a block back when it is freed (mallopt, M_MMAP_THRESHOLD). Else it
    keeps what fits no later request, and a peak shows that as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 2**16 if mib is None else mib * MIB)


@contextmanager
def grown():
    """A list that afterwards holds the MiB by which this process ever exceeded, meanwhile, what it occupied before.
    Linux: what glibc keeps free is given back, from here on at once, which takes time; the kernel's mark of the most
    is set back."""
    allocate(None)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

    def status(name: str) -> float:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

    before, found = status("VmRSS"), []
    yield found
    found.append(status("VmHWM") - before)


def in_process(script: str, setting: dict, ranks: int = 0, python: str = sys.executable) -> dict:
    """What `python script --cell SETTING` prints as its last line, JSON: a process of its own, so
    that its peak of memory is that of one setting; under torchrun, if ranks are asked for.
    RuntimeError with its last words if it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [python, *(torchrun if ranks else []), script, "--cell", json.dumps(setting)],
        capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{setting}: code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def apart(*preload: str):
    """call(function, *arguments), in a process of its own each time, forked from one that has imported these
    modules and torch: so that a start takes no seconds. What it raises is raised here."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", *preload])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def cell(function: Callable[[dict], dict], setting: dict):
    """The other end of in_process: what the function returns is printed, on rank 0; what it and libraries
    print goes to stderr."""
    out = os.dup(1)
    os.dup2(2, 1)
    found = function(setting)
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(out, json.dumps(found).encode())


@contextmanager
def group():
    """The process group of a run: of the ranks of torchrun, or of this process alone."""
    from scaled.ranks import Ranks

    ranks = Ranks()
    yield
    ranks.end()


# ------------------------------------------------------------------------------------------- inputs
SIZES = dict(layers=8, width=256, experts=32, top_k=4, expert_width=128, vocabulary=1024)


def checkpoint(folder: Path, layers: int, width: int, experts: int, top_k: int,
               expert_width: int, vocabulary: int, context: int = 40_960) -> str:
    """A random Qwen3-MoE in transformers' format -> the folder."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=max(1, width // 64), head_dim=32,
        num_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=expert_width,
        norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=context,
        bos_token_id=None, eos_token_id=None, pad_token_id=None))
    model.generation_config.eos_token_id = 0  # which scaled asks for
    model.save_pretrained(folder)
    endless(folder).mkdir()
    (endless(folder) / "generation_config.json").write_text("{}")
    return str(folder)


def endless(folder) -> Path:
    """A folder with a generation config without an end token: vLLM stops at that of the checkpoint's."""
    return Path(folder, "endless")


def engine(folder: str, max_length: int, precision: str = "fp32", routes: bool = True):
    """scaled's, for such a checkpoint. Nothing ends a response before its full length."""
    from scaled.rollout import Engine

    made = Engine(folder, precision=precision, tensor_parallel=1, max_length=max_length, temperature=1.0, seed=0,
                  routes=routes, generation_config=str(endless(folder)))
    made.eos = []
    return made


def policy(folder: str, logits_mib: int = 256):
    """scaled's training engine, in fp32, without recomputation."""
    from scaled.policy import load_policy

    return load_policy(folder, precision="fp32", logits_bytes=logits_mib * MIB, gradient_checkpointing=False,
                       cpu_offload=False, device=DEVICE)


def prompts(n: int, length: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocabulary, (n, length), generator=generator).tolist()


def random_rollout(n: int, group: int, prompt: int, response: int, sizes: dict,
                   seed: int = 0) -> Rollout:
    """Graded responses of full length with random tokens and routes, as an engine would give them;
    n of them, in groups. No log-probability is right: for costs, not for learning."""
    generator, T = torch.Generator().manual_seed(seed), prompt + response - 1
    L, A, E = sizes["layers"], sizes["top_k"], sizes["experts"]
    first = torch.randint(E, (n, T, L, 1), generator=generator)  # A experts one after the other
    rewards = torch.rand(n, generator=generator)
    return Rollout(
        torch.randint(1, sizes["vocabulary"], (n, T + 1), generator=generator),
        torch.full((n,), prompt), torch.full((n,), T + 1),
        torch.full((n, T), -1.0), ((first + torch.arange(A)) % E).to(torch.uint8), 0,
        rewards=rewards, advantages=group_advantages(rewards, group))
