"""Rollouts that take more than one step of the engine: prompts in parts, requests that are thrown out and come
back, prefixes from the cache. What is sampled, its log-probabilities and routes do not depend on any of them."""
import copy
import inspect

import pytest
import torch
from families import CONFIGS, build

from scaled.config import Config
from scaled.engine import EngineError, RolloutEngine
from scaled.families import route_shape
from scaled.replay import RoutingReplay
from scaled.rollout import Engine

PROMPTS = [[(i * i * (p + 3) + p) % 61 for i in range(200)] for p in range(32)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = copy.deepcopy(CONFIGS["qwen3_moe"])
    config.max_position_embeddings, config.eos_token_id = 512, 3
    model = build(config)
    model.folder = str(tmp_path_factory.mktemp("checkpoint"))
    model.save_pretrained(model.folder)
    return model


def start(model, temperature=1.0, **vllm_options):
    return Engine(model.folder, precision="fp32", tensor_parallel=1, max_length=261, temperature=temperature, seed=0,
                  **vllm_options)


def sample(model, prompts=PROMPTS, G=2, max_response=60, **vllm_options):
    engine = start(model, **vllm_options)
    try:
        return engine.generate(prompts, G, max_response, 5, 0)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def in_one_step(model):
    """All prompts in one step, whole, each computed by itself."""
    return sample(model, max_num_batched_tokens=2**15, enable_prefix_caching=False)


def assert_same(rollout, other):
    assert torch.equal(rollout.lengths, other.lengths)
    rows = torch.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    assert torch.equal(rollout.tokens[rows], other.tokens[rows])
    torch.testing.assert_close(rollout.rollout_logprobs, other.rollout_logprobs, atol=2e-5, rtol=0)
    fed = rollout.fed
    assert torch.equal(rollout.routing[fed].long().sort().values, other.routing[fed].long().sort().values)


@torch.no_grad()
def test_one_step_is_the_model(model, in_one_step):
    for row, p, n in list(zip(in_one_step.tokens, in_one_step.prompt_lengths, in_one_step.lengths))[::9]:
        with RoutingReplay(model, None, torch.ones(1, n - 1, dtype=torch.bool)) as routes:
            logprobs = model(row[None, :n - 1]).logits.log_softmax(-1)
        b = [torch.equal(row, other) for other in in_one_step.tokens].index(True)
        own = logprobs[0, p - 1:].gather(1, row[p:n, None])[:, 0]
        torch.testing.assert_close(in_one_step.rollout_logprobs[b, p - 1:n - 1], own, atol=2e-5, rtol=0)
        assert torch.equal(in_one_step.routing[b, :n - 1].long().sort().values, routes.routing[0].long().sort().values)


@pytest.mark.parametrize("options", [
    dict(), dict(max_num_batched_tokens=96, max_num_seqs=7), dict(max_num_batched_tokens=300)], ids=str)
def test_prompts_in_parts(model, in_one_step, options):
    """By default too: 64 prompts of 200 tokens fill several steps. The second of a group has a cached prefix."""
    assert_same(sample(model, **options), in_one_step)


def test_requests_that_are_thrown_out_and_come_back(model, in_one_step, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    thrown_out, preempt = [], Scheduler._preempt_request

    def count(self, request, *args, **kwargs):
        thrown_out.append(request.num_output_tokens)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", count)
    # 18 blocks of 32 tokens: a prompt takes 7 at its start, and a response up to 2 more
    rollout = sample(model, block_size=32, num_gpu_blocks_override=18, max_num_batched_tokens=300)
    assert sum(n > 0 for n in thrown_out) > 10  # they had sampled some tokens
    assert_same(rollout, in_one_step)


def test_a_cached_prefix(model, in_one_step):
    engine = start(model)
    try:
        engine.generate(PROMPTS[:8], 1, 8, 1, 0)
        hits = engine.run(PROMPTS[:8], engine.vllm.SamplingParams(max_tokens=1, detokenize=False))
        assert min(hit.num_cached_tokens for hit in hits) >= 128
        scored, routing = engine.score([row[:n].tolist() for row, n in zip(
            in_one_step.tokens[:16], in_one_step.lengths)])
    finally:
        engine.close()
    mask, T = in_one_step.mask[:16], scored.shape[1]
    torch.testing.assert_close(scored[mask[:, :T]], in_one_step.rollout_logprobs[:16][mask], atol=2e-5, rtol=0)
    L, A, _ = route_shape(model.config)
    assert routing.shape == (16, T, L, A)


@pytest.mark.parametrize("temperature", [0.01, 0.0101, 2.0])
def test_the_bounds_of_the_temperature_are_vllms(model, temperature):
    """At them the distribution is still softmax(logits / T); the options permit nothing beyond."""
    Config(checkpoint="c", train_data="d", temperature=temperature)
    engine = start(model, temperature)
    try:
        rollout = engine.generate(PROMPTS[:4], 2, 6, 0, 0)
    finally:
        engine.close()
    with torch.no_grad():
        logprobs = (model(rollout.tokens[:, :-1]).logits / temperature).log_softmax(-1)
    own = logprobs.gather(-1, rollout.tokens[:, 1:, None])[..., 0]
    # an error of 1e-5 in a logit is one of 1e-3 at T = .01
    torch.testing.assert_close(own[rollout.mask], rollout.rollout_logprobs[rollout.mask],
                               atol=2e-5 / min(temperature, 1), rtol=0)


@pytest.mark.parametrize("temperature", [0.0099, 2.0001, 0.0, float("nan"), float("inf")])
def test_temperatures_that_vllm_changes_or_refuses(temperature):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingType

    with pytest.raises(ValueError, match="--temperature"):
        Config(checkpoint="c", train_data="d", temperature=temperature)
    if temperature < 0.01:
        params = SamplingParams(temperature=temperature)
        assert params.temperature == 0.01 or params.sampling_type == SamplingType.GREEDY
    else:
        with pytest.raises(VLLMValidationError):
            SamplingParams(temperature=temperature)


def test_the_engine_keeps_the_interface():
    for name, member in vars(RolloutEngine).items():
        if inspect.isfunction(member) and not name.startswith("_"):
            assert inspect.signature(getattr(Engine, name)) == inspect.signature(member), name


def test_a_failure_of_vllm_is_never_a_value_error(model):
    """vLLM's own errors are often ValueErrors, as pydantic's are."""
    with pytest.raises(EngineError, match="vllm 0.30.0 failed at its start: ValidationError: .* block_size") as failure:
        start(model, block_size="many")
    assert "\n" not in str(failure.value)


def test_why_training_samples_from_all(model):
    """The tokens that top-p keeps are told by a model runner that this engine does not use, and on a CPU there is none:
    it needs Triton. Once this fails, --top-p can have other values than 1."""
    with pytest.raises(EngineError, match="sampling distribution replay requires Model Runner V2"):
        start(model, return_sampling_mask=True)
