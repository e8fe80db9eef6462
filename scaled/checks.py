"""What options, checkpoint and data can be wrong about, found before anything is loaded."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from scaled.config import Config
from scaled.data import Prompt, end_tokens, load_prompts
from scaled.replay import route_shape
from scaled.rewards import Score, load_reward
from scaled.rollout import check_vllm


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
    tokenizer = read_tokenizer(c)
    reward = load_reward(c.reward)
    columns = dict(prompt_column=c.prompt_column, answer_column=c.answer_column, chat=c.chat,
                   max_prompt=c.max_prompt, system=c.system)
    prompts = load_prompts(c.train_data, tokenizer, split=c.train_split, **columns)
    held_out = load_prompts(
        c.eval_data, tokenizer, split=c.eval_split, **columns) if c.eval_data else []
    return Material(tokenizer, prompts, held_out, reward)


def read_tokenizer(c: Config) -> PreTrainedTokenizerBase:
    """The checkpoint's, after its configuration has been found fit for the options."""
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
    tokenizer = AutoTokenizer.from_pretrained(c.checkpoint, **trust)
    end_tokens(c.checkpoint, c.trust_remote_code)
    return tokenizer
