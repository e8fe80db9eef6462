"""Rewards. A reward is f(prompts, texts, tokens) -> list of float: one call a rollout batch, one
prompt, response text and list of response token ids for each response."""
import importlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scaled.data import Prompt

Score = Callable[[list[Prompt], list[str], list[list[int]]], list[float]]


def load_reward(name: str, seconds: float = 5.0) -> Score:
    """math_verify (`seconds` is its time limit for an answer), exact_match, running_sum, or any
    "module:function". ValueError if there is no such function."""
    if name == "math_verify":
        return MathVerify(seconds)
    if name in (ours := {"exact_match": exact_match, "running_sum": running_sum}):
        return ours[name]
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"reward {name!r}: give math_verify, exact_match, running_sum, or "
                         "module:function")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # an import runs code, which can raise anything
        raise ValueError(f"reward {name}: {module} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"reward {name}: {module} has no function {function}")
    return found


def grade(reward: Score, prompts: list[Prompt], texts: list[str],
          tokens: list[list[int]]) -> list[float]:
    """Rewards of B responses to B prompts (a group repeats its prompt). A reward function returns
    a list or a vector, of numbers or bools. ValueError with the prompt's id for anything else,
    NaN and what float32 cannot hold included."""
    if not len(prompts) == len(texts) == len(tokens):
        raise ValueError(f"{len(prompts)} prompts, {len(texts)} texts and {len(tokens)} token "
                         "lists: give one of each for a response")
    values, name = reward(prompts, texts, tokens), getattr(reward, "__name__", "reward")
    if getattr(values, "ndim", None) == 1:  # torch or numpy
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
        got = f"{len(values)} rewards" if isinstance(values, (list, tuple)) else (
            f"a {type(values).__name__} of shape {tuple(getattr(values, 'shape', ()))}")
        raise ValueError(f"{name} returned {got} for {len(prompts)} responses, of which the first "
                         f"is to prompt {prompts[0].id}: return one number for each")
    rewards = []
    for prompt, value in zip(prompts, values):
        value = value.item() if getattr(value, "shape", None) == () else value
        if not isinstance(value, (int, float)) or not abs(value) <= 3e38:
            raise ValueError(f"{name} returned {value!r:.80} for a response to prompt {prompt.id}: "
                             "return a finite number")
        rewards.append(float(value))
    return rewards


def take_counts(reward: Score) -> dict[str, int]:
    """Answers that got reward 0 for an exception and for the time limit, since the last call. Both
    are 0 for a function that does not count them in attributes of these names."""
    counts = {name: getattr(reward, name, 0) for name in ("errors", "timeouts")}
    for name in counts:
        if hasattr(reward, name):
            setattr(reward, name, 0)
    return counts


def require_reference(prompt: Prompt) -> str:
    """ValueError for a prompt without a reference answer."""
    if not prompt.answer.strip():
        raise ValueError(f"prompt {prompt.id} has no reference answer; set answer_column")
    return prompt.answer.strip()


# --------------------------------------------------------------------------------- exact_match
def exact_match(prompts: list[Prompt], texts: list[str], tokens: list[list[int]]) -> list[float]:
    """1.0 where the final answer is the reference, character by character, without the blanks
    around both. Final is what the last \\boxed{...} has, else the last line, or the whole text."""
    return [float(require_reference(prompt) in final_answers(text))
            for prompt, text in zip(prompts, texts)]


def final_answers(text: str) -> tuple[str, ...]:
    lines = text.strip().splitlines() or [""]
    start, depth = text.rfind("\\boxed{") + len("\\boxed{"), 1
    if start < len("\\boxed{"):
        return lines[-1].strip(), text.strip()
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return (text[start:end].strip(),)
    return ()  # a box that never closes: cut off


# --------------------------------------------------------------------------------- running_sum
def running_sum(prompts: list[Prompt], texts: list[str], tokens: list[list[int]]) -> list[float]:
    """The task of nano_moe_rl.py by its own grade, for a tokenizer with its vocabulary. ValueError
    for a prompt that is not digits and "="."""
    import torch  # not at the top: the processes of math_verify do without
    import nano_moe_rl as nano
    for prompt in prompts:
        digits, end = prompt.tokens[:-1], prompt.tokens[-1:]
        if not digits or max(digits) > 9 or end != [nano.ASK]:
            raise ValueError(f"prompt {prompt.id} is not digits and '=' in the vocabulary of "
                             "nano_moe_rl.py: set chat = false and take the exported tokenizer")
    rows = [torch.tensor(prompt.tokens + response) for prompt, response in zip(prompts, tokens)]
    return nano.grade(torch.nn.utils.rnn.pad_sequence(rows, True, nano.EOS),
                      torch.tensor([len(prompt.tokens) for prompt in prompts]),
                      torch.tensor([len(row) for row in rows])).tolist()


# --------------------------------------------------------------------------------- math_verify
class MathVerify:
    """1.0 where math_verify finds the reference answer and the response equal. An exception in it
    and an answer that takes more than `seconds` give 0.0, counted in `errors` and `timeouts`.

    math_verify's own limit is a Python signal handler: main thread only, and never inside one
    long C call. Here the answer is judged in another process, which the kernel kills when its
    alarm rings. It is started by exec, so it is safe beside CUDA and threads; it knows neither
    torch nor this program's memory; and it ends with its input, however this program ends."""
    __name__ = "math_verify"

    def __init__(self, seconds: float = 5.0, workers: int | None = None):
        if not seconds > 0:
            raise ValueError(f"math_verify: a time limit of {seconds} seconds; give more than 0")
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward math_verify: the package math-verify is missing; pip install "
                             "-r scaled/requirements.txt")
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's: they share the cores
        self.size = workers or min(8, max(1, len(os.sched_getaffinity(0)) // ranks))
        self.seconds, self.errors, self.timeouts = seconds, 0, 0
        self.workers = queue.LifoQueue()  # idle ones; None is one yet to be started
        for _ in range(self.size):
            self.workers.put(None)

    def __call__(self, prompts: list[Prompt], texts: list[str],
                 tokens: list[list[int]]) -> list[float]:
        """ValueError for a reference that is missing or in which nothing can be found."""
        pairs = [(require_reference(prompt), text) for prompt, text in zip(prompts, texts)]
        with ThreadPoolExecutor(self.size) as threads:
            verdicts = list(threads.map(self.judge, pairs))
        for prompt, verdict in zip(prompts, verdicts):
            if verdict == "reference":
                raise ValueError(f"math_verify finds no answer in the reference {prompt.answer!r} "
                                 f"of prompt {prompt.id}: correct it, or use exact_match")
        self.errors += verdicts.count("error")
        self.timeouts += verdicts.count("timeout")
        return [float(verdict == "right") for verdict in verdicts]

    def judge(self, pair: tuple[str, str]) -> str:
        """right, wrong, reference, error or timeout."""
        worker = self.workers.get()
        try:
            worker = worker or self.start()
            try:
                worker.stdin.write(json.dumps(pair) + "\n")
                worker.stdin.flush()
                verdict = worker.stdout.readline().strip()
            except BrokenPipeError:  # it died while idle
                verdict = ""
            if not verdict:  # it has ended; the next answer starts another
                worker.communicate()
                verdict = "timeout" if worker.returncode == -signal.SIGALRM else "error"
                worker = None
            return verdict
        finally:
            self.workers.put(worker)

    def start(self) -> subprocess.Popen:
        worker = subprocess.Popen(
            [sys.executable, "-m", "scaled.judge", str(self.seconds)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        if worker.stdout.readline() != "ready\n":
            raise RuntimeError(f"a process of math_verify ended with {worker.wait()} at its start")
        return worker

    def close(self):
        """Ends the processes. Not needed: they end with this program."""
        for worker in [self.workers.get() for _ in range(self.size)]:
            if worker:
                worker.communicate()
            self.workers.put(None)
