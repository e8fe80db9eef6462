"""What options, checkpoint and data can be wrong about, found before anything is loaded."""

import os
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
from scaled.ranks import RANK
from scaled.rewards import Score, check_reward, load_reward
from scaled.vllm_internals import check_served, check_vllm


@dataclass(frozen=True)
class Material:
    """What a run works on, read and checked."""
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    held_out: list[Prompt]
    reward: Score


def read_material(c: Config) -> Material:
    """Needs the options alone. ValueError, in one line, for what they, the data and the checkpoint
    do not permit; nothing is written."""
    check_vllm()
    if c.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: the package is missing; pip install tensorboard")
    if c.wandb:
        check_wandb()
    config, tokenizer = read_checkpoint(c)
    reward = load_reward(c.reward, c.reward_seconds)
    columns = dict(prompt_column=c.prompt_column, answer_column=c.answer_column, chat=c.chat,
                   max_prompt=c.max_prompt, system=c.system,
                   vocabulary=config.get_text_config().vocab_size)
    prompts = load_prompts(c.train_data, tokenizer, split=c.train_split, **columns)
    held_out = load_prompts(
        c.eval_data, tokenizer, split=c.eval_split, **columns) if c.eval_data else []
    check_reward(reward, prompts + held_out)
    return Material(tokenizer, prompts, held_out, reward)


def check_wandb():
    """ValueError without the package, or if it has neither an account nor leave to stay offline."""
    if find_spec("wandb") is None:
        raise ValueError("--wandb: the package is missing; pip install wandb")
    import wandb
    if RANK == 0:
        with refusing("--wandb"):
            wandb.login()


def check_fit(c: Config, config: PreTrainedConfig):
    """ValueError for a model that cannot do what the options ask."""
    if c.replay != "none":
        route_shape(config)  # refuses what cannot replay
    check_served(config, c.rollout_precision)
    context = config.get_text_config().max_position_embeddings
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
        end_tokens(c.checkpoint, c.trust_remote_code)
    return config, tokenizer


@contextmanager
def refusing(what: str):
    """ValueError, one line, for whatever a library raises over a file that is damaged."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{what}: {text[:400] or type(error).__name__}") from error
