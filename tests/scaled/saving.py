"""A tiny trainer to save, and a run's folder with two checkpoints of it."""
import json
import shutil

import pytest
import torch

import nano_moe_rl as nano
from scaled import checkpoint
from scaled.export import export_nano
from scaled.policy import load_policy

TINY = nano.Config(layers=1, experts=4, expert_width=8, width=32, heads=1)


def trainer(folder):
    policy = load_policy(folder, precision="fp32", logits_bytes=10**5, device="cpu",
                         gradient_checkpointing=False, cpu_offload=False)
    return policy, nano.adamw(policy, 1e-3)


def change(policy, optimizer, by):
    """A step with made-up gradients, so that weights and both moments are of this step alone."""
    for i, p in enumerate(policy.parameters()):
        p.grad = torch.full_like(p, by * (i + 1))
    optimizer.step()


def values(policy, optimizer):
    states = [x for state in optimizer.state.values() for x in state.values()]
    return [x.full_tensor().clone() if hasattr(x, "full_tensor") else x.clone()
            for x in [*policy.parameters(), *states]]


def texts(version):
    return {"config.json": json.dumps({"name": "run", "lr": 1.0}), "metrics.jsonl": '{"update": 1}\n' * version}


def plant(path, name, data):
    """As somebody would who can write to the folder: with the digest that fits."""
    (path / name).write_bytes(data)
    digests = json.loads((path / "files.json").read_text())
    digests[name] = checkpoint.digest(path / name)
    (path / "files.json").write_text(json.dumps(digests))


@pytest.fixture(scope="module")
def saved(group, tmp_path_factory):
    """A run's folder with checkpoints of updates 4 and 8, and what they hold."""
    folder = tmp_path_factory.mktemp("saved")
    export_nano(nano.Model(TINY), folder / "hf")
    policy, optimizer = trainer(folder / "hf")
    held, run = {}, folder / "run"
    run.mkdir()
    for version in (4, 8):
        change(policy, optimizer, version)
        checkpoint.save(run, policy, optimizer, version, 2, texts(version))
        held[version] = values(policy, optimizer)
    return folder, held


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved[0] / "run", tmp_path / "run")
    return tmp_path / "run"
