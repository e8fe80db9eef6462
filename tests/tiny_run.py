"""A tiny run of nano_moe_rl.py: its options, and what it leaves behind."""

import json
from pathlib import Path

import torch

import nano_moe_rl as nano

# So small that a run takes a second, yet right often enough for advantages, and so gradients, to exist.
TINY = dict(width=32, heads=1, layers=2, experts=4, expert_width=8, max_digits=4, cold_start_steps=30,
            updates=4, mini_batch=16, group_size=4, mini_batches=2, eval_every=2, eval_prompts=8)
SCRIPT = str(Path(nano.__file__).resolve())
METRICS = {"update", "reward", "entropy", "mismatch_kl", "staleness_kl", "extreme_token_fraction",
           "effective_sample_size", "routing_agreement", "clip_fraction", "dropped_responses",
           "response_length", "grad_norm", "seconds"}
SCORES = {"score", "engine_score", "routing_share"}
RUN_FILES = {"config.json", "metrics.jsonl", "checkpoint.pt", "curves.png", ".lock"}


def arguments(**changes):
    return [text for name, value in (TINY | changes).items() for text in ("--" + name.replace("_", "-"), str(value))]


def metrics(name):
    """The rows of runs/NAME/metrics.jsonl; json.loads raises at half a line."""
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


def checkpoint(name):
    return torch.load(Path("runs", name, "checkpoint.pt"))


def untimed(rows):
    """Metrics but for the one that no seed decides."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def leaves(tree, path=""):
    """The tensors and values of nested dicts and lists, by path."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: leaf for key, value in items for name, leaf in leaves(value, f"{path}/{key}").items()}
    return {path: tree}


def assert_identical(tree, other):
    tree, other = leaves(tree), leaves(other)
    assert tree.keys() == other.keys()
    for path, leaf in tree.items():
        same = torch.equal(leaf, other[path]) if isinstance(leaf, torch.Tensor) else leaf == other[path]
        assert same, path
