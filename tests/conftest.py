import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorials")]

import nano_moe_rl as nano  # noqa: E402
from tiny_run import arguments  # noqa: E402


@pytest.fixture
def config():
    """Distinct sizes everywhere, so that swapped axes cannot pass."""
    return nano.Config(width=64, layers=3, heads=2, kv_heads=1, experts=8, top_k=2, expert_width=24,
                       mini_batch=12, group_size=4, mini_batches=2, eval_prompts=7)


@pytest.fixture
def model(config):
    return nano.Model(config)


@pytest.fixture
def rollout(config, model):
    """Graded rollout of 6 prompts with 4 responses each, of uneven lengths, fp8 against fp32."""
    return sample_rollout(model, "fp8")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of one, as torchrun makes larger ones."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def no_pictures():
    """A picture takes a second and decides nothing: only runs in a process of their own draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "draw", lambda rows, path: None)
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, no_pictures):
    """A directory with one finished run, runs/done."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert nano.main(arguments(name="done")) == 0
    return folder


@pytest.fixture
def rewarded(monkeypatch):
    """So small a model is never right. Rewards from its tokens give it something to learn."""
    def grade(tokens, prompt_lengths, lengths):
        return (tokens.gather(1, lengths[:, None] - 2)[:, 0] % 2).float()

    monkeypatch.setattr(nano.RUNNING_SUM, "grade", grade)


def sample_rollout(model, precision, n_prompts=6, seed=0, router_noise=0.0):
    c = model.config
    engine = nano.InferenceEngine(model, precision, router_noise)
    rollout = nano.sample(engine, n_prompts, c.group_size, seed)
    # an untrained policy is never right: rewards that differ in every group
    rollout.rewards = (torch.arange(len(rollout.tokens)) % 3 == 0).float()
    rollout.advantages = nano.group_advantages(rollout.rewards, c.group_size)
    return rollout
