"""What is evaluated, and how: Hugging Face folders and checkpoints of runs, and their options."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from nano_moe_rl import check, check_options, option
from scaled.config import KINDS, Config


def of_a_run(name: str, text: str = ""):
    """An option of a run, as config.py defines it."""
    f = Config.__dataclass_fields__[name]
    return field(default=f.default, metadata=f.metadata | ({"text": text} if text else {}))


@dataclass(frozen=True)
class Options:
    """ValueError, in one line, for a value that is refused."""
    data: str = of_a_run("eval_data", "problems, as --train-data of a run takes them")
    split: str = of_a_run("eval_split")
    prompt_column: str = of_a_run("prompt_column")
    answer_column: str = of_a_run("answer_column")
    chat: bool = of_a_run("chat")
    system: str = of_a_run("system")
    reward: str = of_a_run("reward")
    reward_seconds: float = of_a_run("reward_seconds")
    threshold: float = option(1.0, "reward from which on a response passes", low=-1e9)
    samples: int = option(32, "responses to a problem", high=10_000)
    seed: int = of_a_run("seed", "of the samples; all models get the same")
    temperature: float = of_a_run("temperature", "of the distribution that is sampled")
    top_p: float = of_a_run("eval_top_p", "nucleus that is sampled")
    max_prompt: int = of_a_run("max_prompt")
    max_response: int = of_a_run("max_response")
    rollout_precision: str = of_a_run("rollout_precision", "of the engine")
    tensor_parallel: int = of_a_run("tensor_parallel")
    gpu_memory: float = of_a_run("gpu_memory")
    trust_remote_code: bool = of_a_run("trust_remote_code")

    def __post_init__(self):
        check_options(self)


NAMES = {"data": "eval_data", "split": "eval_split", "top_p": "eval_top_p"}  # here, and in Config
OWN = ("samples", "threshold", "seed")  # never those of a run: two seeds of it are to be compared


@dataclass(frozen=True)
class Model:
    """One that is evaluated, and what its run says."""
    name: str
    kind: str  # folder, run, or single for one of nano_moe_rl.py
    found: tuple[Path, ...] = ()  # checkpoints of a run, oldest first
    options: dict = field(default_factory=dict)  # by their names here
    base: str = ""  # Hugging Face folder that it began from


def find(name: str) -> Model:
    """ValueError for what is no model."""
    from scaled import checkpoint
    from scaled.export import find_checkpoints, read_nano

    if os.path.isfile(name):
        c = read_nano(name)[0].config
        return Model(name, "single", options=dict(
            chat=False, reward="running_sum", temperature=c.temperature,
            max_prompt=c.max_digits + 1, max_response=c.max_response,
            rollout_precision=c.train_precision))
    try:
        found = tuple(find_checkpoints(name))
    except ValueError as error:
        config, rows = (os.path.isfile(Path(name, file)) for file in (
            checkpoint.OPTIONS, checkpoint.ROWS))
        if config and not rows:  # a run has both, and here no checkpoint yet
            return Model(name, "folder", base=name)
        raise ValueError(f"--model {error}; or a Hugging Face folder") from None
    saved, _ = checkpoint.options(found[-1].parent)
    if not isinstance(saved.get("checkpoint"), str):
        raise ValueError(f"--model {name}: {checkpoint.OPTIONS} of its run does not say from which "
                         "checkpoint it began")
    own = {f.name: saved[NAMES.get(f.name, f.name)] for f in fields(Options)
           if f.name not in OWN and NAMES.get(f.name, f.name) in saved}
    for f in fields(Options):
        if type(own.get(f.name, f.default)) is not f.type:
            raise ValueError(f"--model {name}: {checkpoint.OPTIONS} of its run has for {f.name} "
                             f"{own[f.name]!r:.60}; it should be {KINDS[f.type]}")
    return Model(name, "run", found, own, saved["checkpoint"])


def options_of(models: list[Model], given: dict) -> Options:
    """What was given, else what the runs say. ValueError if they say different things: what was
    not sampled in the same way cannot be compared."""
    chosen = dict(given)
    for name in dict.fromkeys(name for model in models for name in model.options):
        if name in given or name == "trust_remote_code":  # of each run, and of that one only
            continue
        said = {model.name: model.options[name] for model in models if name in model.options}
        (first, value), *others = said.items()
        if different := [other for other in others if other[1] != value]:
            other, its = different[0]
            raise ValueError(f"--model {other}: its run has {name} {its!r:.60}, that of {first} "
                             f"{value!r:.60}: give --{name.replace('_', '-')} for both")
        chosen[name] = value
    o = Options(**chosen)
    check(o, "data", bool(o.data), "a file, a folder, or a name on the hub")
    return o


def config_of(model: Model, o: Options, trust: bool | None) -> Config:
    """As options of a run, of which an evaluation uses some."""
    known, length = Config.__dataclass_fields__, o.max_prompt + o.max_response
    shared = {NAMES.get(name, name): value for name, value in asdict(o).items()}
    if trust is None:
        shared["trust_remote_code"] = model.options.get("trust_remote_code", False)
    return Config(**{name: value for name, value in shared.items() if name in known},
                  checkpoint=model.base or model.name, train_data=o.data, replay="none",
                  token_budget=max(length, Config.token_budget))


def read_problems(model: Model, c: Config) -> tuple:
    """Its tokenizer and the prompts in its tokens. ValueError for what cannot be used."""
    from scaled.checks import read_checkpoint, read_prompts
    from scaled.export import nano_tokenizer

    if model.kind == "single":
        tokenizer = nano_tokenizer()
        vocabulary = len(tokenizer)
    else:
        try:
            config, tokenizer = read_checkpoint(c)
        except ValueError as error:
            whose = f"--model {model.name}:" + (
                f" the checkpoint {c.checkpoint}, from which it began," if model.found else "")
            raise ValueError(str(error).replace(f"--checkpoint {c.checkpoint}:", whose)) from error
        vocabulary = config.get_text_config().vocab_size
    return tokenizer, read_prompts(c, c.eval_data, c.eval_split, tokenizer, vocabulary)


@contextmanager
def as_folder(model: Model, ranks) -> Iterator[tuple[str, int | None]]:
    """A model's Hugging Face folder, and the update that it is of. That of a run is made beside it,
    where all nodes see it, and removed, also when `ranks` end this process."""
    import torch
    import torch.distributed as dist
    from scaled.export import export_nano, export_scaled, read_nano
    from scaled.ranks import RANK

    if model.kind == "folder":
        yield model.name, None
        return
    run = model.found[-1].parent if model.found else Path(model.name).parent
    place = [tempfile.mkdtemp(prefix=".evaluate-", dir=run.parent) if RANK == 0 else None]
    if RANK == 0:
        ranks.leave = lambda code: shutil.rmtree(place[0], ignore_errors=True)
    dist.broadcast_object_list(place)
    try:
        if model.kind == "run":
            update = export_scaled(list(model.found), Path(place[0]))
        else:
            policy, update = read_nano(model.name)
            if RANK == 0:
                export_nano(policy, Path(place[0]))
            dist.barrier()
        gc.collect()  # the modules of FSDP refer to each other
        torch.cuda.empty_cache()  # vLLM takes its memory past torch
        yield place[0], update
    finally:
        ranks.leave(0)
        ranks.leave = lambda code: None
