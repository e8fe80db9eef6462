"""What a run measured, in place of the stated rates: seconds of each phase, lengths of texts."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from scaled.config import Config
from scaled.machine import Machine
from scaled.seconds import Seconds
from scaled.sizes import Sizes

MEASURED = ("rollout", "reward", "old", "train", "sync")
NEEDED = [f"{phase}_seconds" for phase in MEASURED] + [
    "seconds", "response_length", "tokens_per_second_per_device"]
# Options that say nothing about how long an update takes
SILENT = {"name", "seed", "updates", "checkpoint_every", "keep", "tensorboard", "lr", "warmup",
          "weight_decay", "gradient_norm", "clip", "clip_low", "clip_high", "temperature",
          "importance_sampling", "length_norm", "objective", "lr_by", "max_staleness", "top_p",
          "eval_every", "eval_samples",
          "eval_top_p", "watch", "watch_rules", "watch_change", "watch_times"}


@dataclass(frozen=True)
class Rates:
    factors: dict  # phase -> measured / stated seconds of that run
    mean_prompt: float
    mean_response: float
    updates: int  # that were measured
    unlike: tuple[str, ...]  # options that the plan has otherwise


def read_rates(c: Config, m: Machine, s: Sizes) -> Rates:
    """From m.metrics, the metrics.jsonl of a run, and config.json beside it, which says what was
    measured. The first rollout batch, in which kernels are compiled, counts only if there is no
    other. ValueError if the files are not those of a run, or of another model."""
    path = Path(m.metrics)
    run, rows = read_run(path), read_rows(path)
    if Path(run.checkpoint).name != s.name:
        raise ValueError(f"--metrics {path}: its run is of {Path(run.checkpoint).name!r}, the plan "
                         f"of {s.name!r}; give a run of the same model")
    rows = rows[run.mini_batches:] or rows
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in NEEDED}
    gpus, response = m.metrics_gpus or m.gpus, mean["response_length"]
    tokens = gpus * sum(row["tokens_per_second_per_device"] * row["seconds"]
                        for row in rows) / len(rows)  # of an update
    prompt = tokens / (run.prompts * run.group_size) - response
    if not 0.5 <= prompt <= run.max_prompt + 0.5:
        raise ValueError(f"--metrics-gpus {gpus}: with so many processes that run's prompts would "
                         f"have {prompt:.1f} tokens on average, of 1 to {run.max_prompt}; give the "
                         "number that it had")
    then = replace(m, gpus=gpus, mean_prompt=prompt, mean_response=response)
    stated = Seconds(run, then, s).phases()
    factors = {phase: mean[f"{phase}_seconds"] / stated[phase]
               for phase in MEASURED if stated[phase] > 0}
    unlike = tuple(f.name for f in fields(Config) if f.name not in SILENT
                   and getattr(run, f.name) != getattr(c, f.name))
    return Rates(factors, prompt, response, len(rows), unlike)


def read_run(path: Path) -> Config:
    """The options of the run whose metrics these are. ValueError if they are not there."""
    beside = path.with_name("config.json")
    try:
        return Config(**json.loads(beside.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = ascii(getattr(error, "strerror", None) or str(error))[1:-1][:200]
        raise ValueError(f"--metrics {path}: {beside} does not say what was run ({reason}); give "
                         "metrics.jsonl in the folder of a run") from None


def read_rows(path: Path) -> list[dict]:
    """One for each update. ValueError names the line that is none."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"--metrics {path}: cannot be read ({error}); give metrics.jsonl of a "
                         "run") from None
    rows = []
    for number, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
            if row["update"] == 0:  # the score before the first
                continue
            fine = all(0 <= row[key] <= 1e12 for key in NEEDED)
            fine = fine and row["seconds"] > 0 < row["train_seconds"]
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            fine = False
        if not fine:
            raise ValueError(f"--metrics {path}: line {number} lacks a number of an update; give "
                             "metrics.jsonl as scaled.train writes it")
        rows.append(row)
    if not rows:
        raise ValueError(f"--metrics {path}: has no update yet; wait for the first rollout batch")
    return rows
