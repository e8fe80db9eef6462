"""What options, checkpoint and data can be wrong about, found before anything is loaded."""

import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transformers import (
    AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase)

from scaled.config import Config
from scaled.data import Prompt, end_tokens, load_prompts
from scaled.families import route_shape
from scaled.huggingface import check_weights
from scaled.objectives import Objective, load_objective
from scaled.ranks import RANK
from scaled.rewards import (
    Math, Own, Score, exact_match, grade, load_reward, require_reference, running_sum)
from scaled.vllm_internals import check_served, check_vllm

TRY_SECONDS = 60.0  # for one's own reward to be tried on all rows, before the first update
AT_ONCE = 64  # responses in a call of it then


@dataclass(frozen=True)
class Material:
    """What a run works on, read and checked."""
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    held_out: list[Prompt]
    reward: Score
    tried: int  # prompts that the reward was tried on, of both
    objective: Objective


def read_material(c: Config, make_checkpoint: Callable = lambda: None) -> Material:
    """Needs the options alone. ValueError, in one line, for what they, the data and the checkpoint
    do not permit; nothing is written but what make_checkpoint writes, which is called when all that
    needs no checkpoint is right."""
    check_vllm()
    if c.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: the package is missing; pip install tensorboard")
    if c.wandb:
        check_wandb()
    objective = load_objective(c.objective)
    objective.options(c)
    reward = load_reward(c.reward, c.reward_seconds)
    make_checkpoint()
    config, tokenizer = read_checkpoint(c)
    vocabulary = config.get_text_config().vocab_size
    prompts = read_prompts(c, c.train_data, c.train_split, tokenizer, vocabulary)
    held_out = read_prompts(c, c.eval_data, c.eval_split, tokenizer,
                            vocabulary) if c.eval_data else []
    tried = check_reward(reward, prompts + held_out)
    return Material(tokenizer, prompts, held_out, reward, tried, objective)


def check_reward(reward: Score, prompts: list[Prompt]) -> int:
    """How many of the prompts it was tried on: all, but for one's own function when that takes more
    than TRY_SECONDS. ValueError for the first prompt that it cannot judge."""
    if isinstance(reward, Own):
        return try_own(reward, prompts)
    if reward is running_sum:
        reward(prompts, [""] * len(prompts), [[0]] * len(prompts))
        return len(prompts)
    boxes = [f"\\boxed{{{require_reference(prompt)}}}" for prompt in prompts]
    judge = reward.judge_references if isinstance(reward, Math) else exact_match
    for prompt, right in zip(prompts, judge(prompts, boxes, [[]] * len(prompts))):
        if right != 1:
            raise ValueError(f"the reference {prompt.answer!r:.200} of prompt {prompt.id} in a "
                             "box would not get reward 1: correct it, or remove the row")
    return len(prompts)


def try_own(reward: Score, prompts: list[Prompt]) -> int:
    """Calls it with an empty response to each prompt, and begins no call after TRY_SECONDS."""
    began = time.monotonic()
    for start in range(0, len(prompts), AT_ONCE):
        if time.monotonic() - began > TRY_SECONDS:
            return start
        # the last call is as large as the others: one response alone is no call of training
        part = prompts[start:start + AT_ONCE] if start + AT_ONCE <= len(prompts) else (
            prompts[-AT_ONCE:])
        if fault := fault_of(reward, part):
            each = ((prompt.id, fault_of(reward, [prompt])) for prompt in part)
            row, fault = next((found for found in each if found[1]), (
                f"{part[0].id} to {part[-1].id}, all in one call", fault))
            raise ValueError(f"{fault:.600} (tried with an empty response to prompt {row}): "
                             "correct the function, or remove the row")
    return len(prompts)


def fault_of(reward: Score, prompts: list[Prompt]) -> str:
    """What it fails with on these prompts, "" if it does not."""
    try:
        grade(reward, prompts, [""] * len(prompts), [[0]] * len(prompts))
    except (RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""


def read_prompts(c: Config, source: str, split: str, tokenizer: PreTrainedTokenizerBase,
                 vocabulary: int) -> list[Prompt]:
    return load_prompts(
        source, tokenizer, split=split, prompt_column=c.prompt_column, chat=c.chat,
        answer_column=c.answer_column, max_prompt=c.max_prompt, system=c.system,
        vocabulary=vocabulary)


def check_wandb():
    """ValueError without the package, or if it has neither an account nor leave to stay offline."""
    if find_spec("wandb") is None:
        raise ValueError("--wandb: the package is missing; pip install wandb")
    import wandb
    if RANK == 0:
        with refusing("--wandb"):
            wandb.login()


def check_fit(c: Config, config: PreTrainedConfig):
    """ValueError for a model that cannot do what the options ask, here."""
    check_model(c, config)
    check_served(config, c.rollout_precision)


def check_model(c: Config, config: PreTrainedConfig):
    """ValueError for a model that cannot do what the options ask, whatever the device."""
    text = config.get_text_config()
    if c.replay != "none" or c.watch == "back" and c.watch_change == "R3":
        with refusing(f"--checkpoint {c.checkpoint}: its routes cannot be replayed"):
            _, A, E = route_shape(config)
            if not 1 <= A <= E:
                raise ValueError(f"its config.json says {A} of {E} experts a token: copy it again")
    if getattr(text, "quantization_config", None) or getattr(config, "quantization_config", None):
        raise ValueError(f"--checkpoint {c.checkpoint}: its config.json says that it is quantised, "
                         "and training needs bf16 or fp32: give the one it was made from")
    context = text.max_position_embeddings
    if c.max_length > context:
        raise ValueError(f"--max-response {c.max_response}: with --max-prompt {c.max_prompt} it "
                         f"exceeds the checkpoint's context of {context} tokens; give less")


def read_checkpoint(c: Config) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Its configuration and tokenizer, after all of its files have been found whole, of one model
    and fit for the options. Of the weights only headers are read: whether one is NaN the first
    rollout says."""
    folder, trust = Path(c.checkpoint), dict(trust_remote_code=c.trust_remote_code)
    if not os.path.isfile(folder / "config.json"):
        raise ValueError(f"--checkpoint {folder}: has no config.json; give the folder of a "
                         "Hugging Face checkpoint")
    with refusing(f"--checkpoint {folder}: its configuration cannot be used"):
        config = AutoConfig.from_pretrained(folder, **trust)
    check_fit(c, config)
    with refusing(f"--checkpoint {folder}: its weights cannot be used"):
        check_weights(folder, config, **trust)
    with refusing(f"--checkpoint {folder}: its tokenizer cannot be used"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what a class has by default
            raise ValueError("it has no vocabulary: its files are missing")
    with refusing(f"--checkpoint {folder}: its end tokens cannot be read"):
        vocabulary = config.get_text_config().vocab_size
        for token in end_tokens(c.checkpoint, c.trust_remote_code):
            if not (type(token) is int and 0 <= token < vocabulary):
                raise ValueError(f"{token} is not one of the model's {vocabulary} tokens; correct "
                                 "eos_token_id in generation_config.json")
    return config, tokenizer


@contextmanager
def refusing(what: str):
    """ValueError, one line, for whatever a library raises over a file that is damaged."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{what}: {text[:400] or type(error).__name__}") from error
