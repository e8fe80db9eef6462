"""Rewards. A reward is f(prompts, texts, tokens) -> list of float: one call a rollout batch, one
prompt, response text and list of response token ids for each response."""
import importlib
import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from scaled.answers import last_box
from scaled.data import Prompt
from scaled.worker import Ended, Worker

Score = Callable[[list[Prompt], list[str], list[list[int]]], list[float]]
SECONDS = 5.0  # for one answer to be judged


def load_reward(name: str, seconds: float = 600.0) -> Score:
    """math, exact_match, running_sum, or any "module:function", which has `seconds` for a call.
    ValueError if there is no such function."""
    if name == "math":
        return Math()
    if name in (ours := {"exact_match": exact_match, "running_sum": running_sum}):
        return ours[name]
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"reward {name!r}: give math, exact_match, running_sum, or "
                         "module:function")
    reward = Own(name, seconds)
    try:
        reward([], [], [])
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return reward


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
    if (box := last_box(text)) is not None:
        return (box.strip(),) if box else ()  # () for a box that never closes: cut off
    return (text.strip().splitlines() or [""])[-1].strip(), text.strip()


# --------------------------------------------------------------------------------- running_sum
def running_sum(prompts: list[Prompt], texts: list[str], tokens: list[list[int]]) -> list[float]:
    """The task of nano_moe_rl.py by its own grade, for a tokenizer with its vocabulary. ValueError
    for a prompt that is not digits and "="."""
    import torch  # not at the top: the processes of rewards do without
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


# ---------------------------------------------------------------------------------------- math
class Math:
    """1.0 where the final answer is the reference, as `judge.py` understands both. An exception in
    it and an answer that takes more than `seconds` give 0.0, counted in `errors` and `timeouts`."""
    __name__ = "math"

    def __init__(self, seconds: float = SECONDS, workers: int | None = None):
        if not seconds > 0:
            raise ValueError(f"math: a time limit of {seconds} seconds; give more than 0")
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's: they share the cores
        self.size = workers or min(8, max(1, len(os.sched_getaffinity(0)) // ranks))
        self.seconds, self.errors, self.timeouts = seconds, 0, 0
        self.workers = queue.LifoQueue()  # idle ones; None is one yet to be started
        for _ in range(self.size):
            self.workers.put(None)

    def __call__(self, prompts: list[Prompt], texts: list[str],
                 tokens: list[list[int]]) -> list[float]:
        """ValueError for a reference that is missing."""
        with ThreadPoolExecutor(self.size) as threads:
            verdicts = list(threads.map(self.judge, map(require_reference, prompts), texts))
        self.errors += verdicts.count("error")
        self.timeouts += verdicts.count("timeout")
        return [float(verdict == "right") for verdict in verdicts]

    def judge_references(self, prompts: list[Prompt], *_) -> list[float]:
        """Rewards of the references themselves, each in a box."""
        return self(prompts, [None] * len(prompts), [[]] * len(prompts))

    def judge(self, reference: str, text: str | None) -> str:
        """right, wrong, error or timeout."""
        worker = self.workers.get()
        try:
            for _ in range(2):  # again if the process died, perhaps while it was idle
                worker = worker or Worker("scaled.judge:verdict", seconds=self.seconds)
                try:
                    return worker.ask(reference, text)
                except Ended as end:
                    worker = None
                    if end.timeout:
                        return "timeout"
            return "error"
        finally:
            self.workers.put(worker)

    def close(self):
        """Ends the processes. Not needed: they end with this program."""
        for worker in [self.workers.get() for _ in range(self.size)]:
            if worker:
                worker.close()
            self.workers.put(None)


# --------------------------------------------------------------------------------- one's own
class Own:
    """A function module:function in a process of its own, which may take `seconds` for a call."""

    def __init__(self, name: str, seconds: float):
        self.__name__, self.seconds, self.worker = name, seconds, None
        self.errors = self.timeouts = 0

    def __call__(self, prompts: list[Prompt], texts: list[str],
                 tokens: list[list[int]]) -> list[float]:
        """RuntimeError if the function raises, returns no rewards, hangs or ends its process."""
        asked = [(prompt.id, prompt.tokens, prompt.answer) for prompt in prompts]
        first = f" for {len(asked)} responses, the first to prompt {asked[0][0]}" if asked else ""
        if self.worker and self.worker.process.poll() is not None:  # died while it was idle
            self.worker.close()
            self.worker = None
        try:
            self.worker = self.worker or Worker("scaled.rewards:call_own", self.__name__,
                                                seconds=self.seconds)
            rewards, counts = self.worker.ask(asked, texts, tokens)
        except Ended as end:
            self.worker = None
            raise RuntimeError(f"reward {self.__name__}: {end}{first}" + (
                "; raise reward_seconds if it needs more" if end.timeout else "")) from end
        except RuntimeError as error:
            raise RuntimeError(f"reward {self.__name__}: {error}") from error
        self.errors += counts["errors"]
        self.timeouts += counts["timeouts"]
        return rewards


def call_own(name: str, prompts: list, texts: list[str], tokens: list) -> tuple[list, dict]:
    """In the worker: rewards and counts. No prompts: only looks for the function."""
    function = find(name)
    if not prompts:
        return [], {"errors": 0, "timeouts": 0}
    rewards = grade(function, [Prompt(*prompt) for prompt in prompts], texts, tokens)
    return rewards, take_counts(function)


@lru_cache
def find(name: str) -> Score:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # an import runs code, which can raise anything
        raise ImportError(f"{module} cannot be imported: {error}") from error
    if not callable(found):
        raise ImportError(f"{module} has no function {function}")
    return found
