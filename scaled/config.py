"""Every dial of a scaled run: a flat TOML file, and the command line made from the same fields."""

import argparse
import json
import os
import re
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nano_moe_rl import check, check_options, command_line, option
from scaled.rules import NAMES, window_of

WATCH = ("log", "save", "stop", "back")


@dataclass(frozen=True)
class Config:
    """ValueError, in one line, if an option is refused. What needs the data, the checkpoint or the
    number of processes to be judged is checked by those who have them."""
    # the run
    name: str = option("", "folder under runs/; left out, the name of the configuration file")
    seed: int = option(0, "decides the order of prompts and every sample", low=0)
    updates: int = option(100, "gradient updates")
    checkpoint_every: int = option(20, "updates between checkpoints")
    keep: int = option(2, "newest checkpoints kept, and beside them the one with the best score")
    save_in_background: bool = option(
        False, "train on while a checkpoint is written: a second copy of it in host memory")
    tensorboard: bool = option(False, "write event files beside metrics.jsonl")
    wandb: bool = option(False, "send the rows to Weights & Biases too, as its settings say")

    # the model
    checkpoint: str = option("", "Hugging Face folder to start from")
    nano_cold_start: bool = option(False, "make it, with data, by nano_moe_rl's cold start")
    trust_remote_code: bool = option(False, "run Python code that comes with a checkpoint")

    # data and rewards
    train_data: str = option("", "JSON, CSV or Parquet file, save_to_disk folder, or hub name")
    eval_data: str = option("", "the same, held out; left out, no score")
    train_split: str = option("train", "of a data set that has splits")
    eval_split: str = option("test", "of a data set that has splits")
    prompt_column: str = option("prompt", "text, or a list of chat messages; a.b is b in a")
    answer_column: str = option("answer", "what the reward compares with; \"\" if there is none")
    chat: bool = option(True, "wrap prompts in the tokenizer's chat template")
    system: str = option("", "system message put before every prompt")
    reward: str = option("math", "math, exact_match, running_sum, or module:function")
    reward_seconds: float = option(600.0, "that a module:function may take for one call", low=0.1)
    max_prompt: int = option(1024, "tokens; a longer prompt is refused")
    max_response: int = option(8192, "tokens, after which a response is cut off")

    # reinforcement learning, as in nano_moe_rl
    prompts: int = option(64, "P, prompts an update")
    group_size: int = option(16, "G, responses to one prompt", low=2)
    mini_batches: int = option(4, "N, updates per rollout batch: how far off-policy")
    replay: str = option("R3", "whose experts π_old and π_θ use", "none", "R2", "R3")
    clip: bool = option(True, "drop tokens that π_θ/π_old puts outside the trust region")
    clip_low: float = option(0.2, "how far π_θ/π_old may fall below 1", low=0, high=0.99)
    clip_high: float = option(0.27, "how far it may rise above 1", low=0)
    objective: str = option("MiniRL", "GRPO, MIS, … (objectives.py), or module:function")
    importance_sampling: str = option("token", "in the loss", "token", "sequence", "staleness")
    length_norm: bool = option(False, "divide a response's loss by its length")
    max_staleness: int = option(
        0, "updates; responses of older weights are left out, and counted; 0: no bound", low=0)
    # vLLM samples at .01 whatever is below, and refuses what is above 2
    temperature: float = option(
        1.0, "of the distribution that is sampled, and of π", low=0.01, high=2)
    top_p: float = option(1.0, "nucleus of training; only 1 for now", low=0.01, high=1)

    # the training engine
    lr: float = option(1e-6, "learning rate", low=1e-12, high=1)
    warmup: int = option(10, "updates in which it rises to that")
    lr_by: str = option("none", "also times the root of the effective sample size of tokens, or "
                        "of responses as VCPO has it", "none", "token", "response")
    weight_decay: float = option(0.0, "of AdamW", low=0)
    gradient_norm: float = option(1.0, "bound of the gradient's norm", low=1e-9)
    train_precision: str = option("bf16", "of π; the master weights are fp32", "bf16", "fp32")
    token_budget: int = option(16384, "tokens, padding included, in one forward pass of a rank")
    logits_mib: int = option(512, "MiB of fp32 logits in a chunk; about four such exist at once")
    gradient_checkpointing: bool = option(True, "recompute layers in the backward pass")
    cpu_offload: bool = option(False, "weights and optimiser state in host memory, in training too")

    # the inference engine
    rollout_precision: str = option("bf16", "of μ", "fp32", "bf16", "fp8", "int8")
    tensor_parallel: int = option(1, "processes that serve one copy of the model")
    gpu_memory: float = option(
        0.6, "share of a GPU's memory for the engine, awake", low=0.01, high=0.99)
    check_sync: int = option(3, "weight syncs that are checked, from the first; 0: none", low=0)
    check_sync_every: int = option(20, "weight syncs between later checks")

    # evaluation
    eval_every: int = option(20, "updates between scores")
    eval_samples: int = option(1, "responses to a held-out prompt; their mean is its score")
    eval_top_p: float = option(
        1.0, "nucleus of evaluation; training always samples from all", low=0.01, high=1)

    # what watches over the metrics
    watch: str = option("log", "what is done when a rule begins to hold", *WATCH)
    watch_rules: str = option("", "rules that do so, a,b,c; left out, all; the others only log")
    watch_change: str = option("none", "of going back", "none", "R3", "N/2", "lr/2")
    watch_times: int = option(1, "how often watch may save or go back; counts down", low=0)

    def __post_init__(c):
        check_options(c)
        for name, fine, remedy in (
                ("checkpoint", c.checkpoint, "the folder of a Hugging Face checkpoint"),
                ("train_data", c.train_data, "a file, a folder, or a name on the hub"),
                ("updates", c.updates % c.mini_batches == 0, f"a multiple of {c.mini_batches}"),
                ("token_budget", c.token_budget >= c.max_length,
                 f"{c.max_length} or more, a whole row"),
                ("max_staleness", not 0 < c.max_staleness < c.mini_batches - 1,
                 f"0, or {c.mini_batches - 1} or more: so old is the last of a rollout batch's "
                 f"--mini-batches {c.mini_batches}"),
                # return_sampling_mask of vLLM 0.30 is Model Runner V2's alone, and wants a top-k
                ("top_p", c.top_p == 1, "1: which tokens it keeps the engine does not say, so π "
                 "cannot be normalised over them; --eval-top-p is for scores")):
            check(c, name, bool(fine), remedy)
        if c.watch == "back" and c.watch_times:
            check_way_back(c)
        for name in filter(None, c.watch_rules.split(",")):
            check(c, "watch_rules", name in NAMES, f"some of {', '.join(NAMES)}")
        if c.name:  # a configuration can do without one, a run cannot
            check_name(c.name)

    # what a resumed run may have otherwise: the maths does not depend on it
    free = frozenset((
        "updates", "checkpoint_every", "keep", "save_in_background", "tensorboard", "wandb",
        "reward_seconds", "token_budget", "logits_mib", "gradient_checkpointing", "cpu_offload",
        "gpu_memory", "check_sync", "check_sync_every", "eval_every", "watch", "watch_rules",
        "watch_change", "watch_times"))

    max_length = property(lambda c: c.max_prompt + c.max_response)

    def acts_on(c, rule: str) -> bool:
        return not c.watch_rules or rule in c.watch_rules.split(",")

    def scored(c, version: int) -> bool:
        """Whether a score is due after the rollout batch that ends with this update."""
        return version % c.eval_every < c.mini_batches or version >= c.updates

    def check_processes(c, world_size: int):
        """ValueError if the batch cannot be shared out over this many processes."""
        engines = world_size // c.tensor_parallel
        share = f"with {world_size} processes and --tensor-parallel {c.tensor_parallel}, "
        for name, fine, remedy in (
                ("tensor_parallel", world_size % c.tensor_parallel == 0,
                 f"a divisor of the {world_size} processes"),
                ("prompts", engines and c.prompts % engines == 0,
                 f"{share}a multiple of {engines}"),
                ("group_size", c.prompts * c.group_size % world_size == 0,
                 f"{share}one that makes prompts x group_size a multiple of {world_size}")):
            check(c, name, bool(fine), remedy)


def check_way_back(c: Config):
    """ValueError if the change that is stated cannot be made so often, or if no checkpoint would be
    left from before what a rule has seen."""
    times, scored = c.watch_times, c.eval_every if c.eval_data else 0
    seen = max(2 * window_of(c.mini_batches), scored)  # updates
    for name, fine, remedy in (
            ("watch_change", c.watch_change != "none",
             "R3 or N/2 or lr/2: without a change the same happens again"),
            ("watch_change", c.watch_change != "R3" or c.replay != "R3",
             "N/2 or lr/2: the run replays R3 already"),
            ("watch_times", c.watch_change != "R3" or times == 1, "1: R3 can be changed to once"),
            ("watch_change", c.watch_change != "N/2" or c.mini_batches % 2 ** min(times, 60) == 0,
             f"R3 or lr/2: --mini-batches {c.mini_batches} cannot be halved {times} x"),
            ("watch_change", c.watch_change != "lr/2" or c.lr / 2 ** min(times, 60) >= 1e-12,
             f"R3 or N/2: --lr {c.lr} cannot be halved {times} x"),
            ("keep", (c.keep - 1) * c.checkpoint_every >= seen,
             f"more, or a --checkpoint-every above {c.checkpoint_every}: together less than the "
             f"{seen} updates that a rule looks back on")):
        check(c, name, fine, remedy)


def options_text(c: Config) -> str:
    """What config.json has."""
    return json.dumps(asdict(c), indent=2)


# The first option of each section above, and its title in --help.
SECTIONS = {"name": "the run", "checkpoint": "the model", "train_data": "data and rewards",
            "prompts": "reinforcement learning, as in nano_moe_rl", "lr": "the training engine",
            "rollout_precision": "the inference engine", "eval_every": "evaluation",
            "watch": "what watches over the metrics"}


def parser(description: str) -> argparse.ArgumentParser:
    """A flag for each option, under the title of its section."""
    made = command_line(Config, description)
    flags = made._optionals._group_actions  # argparse has no other way to put flags elsewhere
    for flag in flags[1:]:  # the first is --help; the others are in the order of the fields
        if flag.dest in SECTIONS:
            group = made.add_argument_group(SECTIONS[flag.dest])
        group._group_actions.append(flag)
    del flags[1:]
    return made


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: 'text in quotes'}


def read_config(path: str, given: dict) -> Config:
    """The file's options, and over them those of the command line. ValueError names what is
    wrong."""
    known = {f.name: f.type for f in fields(Config)}
    if not os.path.isfile(path):
        raise ValueError(f"--config {path}: there is no such file; scaled/configs has examples")
    try:
        options = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:  # the first: not readable
        raise ValueError(f"--config {path}: is not TOML: {error}") from None
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"--config {path}: {name} is no option; --help lists them")
        if known[name] is float and type(value) is int and abs(value) < 1e9:
            options[name] = value = float(value)
        if type(value) is not known[name]:
            raise ValueError(f"--config {path}: {name} = {str(value):.40} is of type "
                             f"{type(value).__name__}; give {KINDS[known[name]]}")
    options = {"name": Path(path).stem} | options | given
    check_name(options["name"])
    return Config(**options)


def check_name(name: str) -> str:
    """ValueError for what is no name of a folder under runs/."""
    if not re.fullmatch(r"[\w.+=,-]{1,60}", name) or not name.strip(".") or name == "cold_start":
        raise ValueError(f"--name {name:.60}: give up to 60 letters, digits and signs of . + = , - "
                         "_, but not cold_start")
    return name
