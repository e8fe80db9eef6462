"""The routes that vLLM captures, against those of transformers, in fp32 on a CPU.

Every set of experts has to agree, without a threshold: the engines differ by 1e-6 in a score, and
the scores at the edge of a top-k by much more in these fixed random models."""
import os

os.environ |= dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
                   VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")

import pytest  # noqa: E402
import torch  # noqa: E402
from families import CONFIGS, build  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter  # noqa: E402
from vllm.model_executor.layers.rotary_embedding import get_rope  # noqa: E402
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402

from scaled.replay import RoutingReplay, moe_layers, routers  # noqa: E402
from scaled.rollout import Engine  # noqa: E402
from scaled.sync import CPU_FAULTS, mend_rotary  # noqa: E402

SERVED = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "glm4_moe", "granitemoe"]

# Served, once a fault of vLLM 0.30.0 on CPUs is worked around: test_the_faults_are_still_there
WORKED_AROUND = {
    "deepseek_v2": "the CPU's rotary kernel is wrong for (tokens, heads, size) with several heads",
    "deepseek_v3": "the same",
    "ernie4_5_moe": "the CPU's router ignores a correction bias if there are no groups",
    "dots1": "vLLM runs transformers' own class and patches it for that: in the same process, "
             "models made before miss an attribute in forward, and none can be made after",
}

# vLLM 0.30.0 has no fp32 on a CPU for these: what it lacks, and the error that says so. Nothing is skipped: a test asks
# for the error, and when it is gone the family moves to SERVED. Replay itself is tested for all of them.
REFUSED = {
    # attention with sinks takes bf16 only
    "gpt_oss": (RuntimeError, "BFloat16|bfloat16|sink"),
    # the kernel of its causal convolution takes bf16 only
    "qwen3_next": (RuntimeError, "conv1d|BFloat16|bfloat16"),
    # its class also reads images; where torchvision is installed, the kernel of Qwen3-Next is next
    "qwen3_5_moe": (Exception, "failed to be inspected|conv1d"),
    # the router for CPUs takes a sigmoid only with groups
    "minimax_m2": (AssertionError, "^$"),
}

PROMPTS = [torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)).tolist()
           for n in (11, 7, 9, 17)]


def test_every_family_is_in_one_of_the_tables():
    tables = [*SERVED, *WORKED_AROUND, *REFUSED]
    assert sorted(tables) == sorted(CONFIGS)


def sample(model, folder):
    """Four responses of 12 tokens -> pairs of prompt and vLLM's output. What vLLM may have changed
    in the class of the model's body is put back."""
    model.save_pretrained(folder)
    body = type(model.model)
    bases, attributes = body.__bases__, dict(vars(body))
    try:
        engine = LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=64,
                     enable_return_routed_experts=True, enforce_eager=True, max_num_seqs=8)
        sampling = SamplingParams(max_tokens=12, seed=1, detokenize=False, logprobs=0)
        outputs = engine.generate([dict(prompt_token_ids=prompt) for prompt in PROMPTS],
                                  sampling, use_tqdm=False)
        return [(prompt, output.outputs[0]) for prompt, output in zip(PROMPTS, outputs)]
    finally:
        engine = None
        cleanup_dist_env_and_memory()
        body.__bases__ = bases
        for name in vars(body).keys() - attributes.keys():
            delattr(body, name)
        for name, value in attributes.items():
            if vars(body)[name] is not value:
                setattr(body, name, value)


@pytest.mark.parametrize("family", [*SERVED, *WORKED_AROUND])
def test_captured_routes_are_the_models_own(family, tmp_path, monkeypatch):
    model = build(CONFIGS[family])
    if family.startswith("deepseek"):
        monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_cpu)  # put back
        mend_rotary.__wrapped__()
    if family == "ernie4_5_moe":
        for router in routers(model).values():
            router.moe_statics.e_score_correction_bias.data.zero_()
    layers = moe_layers(model.config)
    dense = sorted(set(range(model.config.num_hidden_layers)) - set(layers))
    for prompt, response in sample(model, tmp_path):
        tokens = torch.tensor([[*prompt, *response.token_ids]])
        captured = torch.from_numpy(response.routed_experts)
        fed, mask = tokens[:, :-1], torch.ones_like(tokens[:, :-1], dtype=torch.bool)
        with torch.no_grad(), RoutingReplay(model, None, mask) as routes:
            logprobs = model(fed).logits[0].log_softmax(-1)
        assert captured.shape[:2] == (fed.shape[1], model.config.num_hidden_layers)
        assert not captured[:, dense].any()
        assert torch.equal(captured[:, layers].sort(-1).values, routes.routing[0].sort(-1).values)
        own = logprobs.gather(1, tokens[0, 1:, None])[len(prompt) - 1:, 0]
        mu = [step[token].logprob for step, token in zip(response.logprobs, response.token_ids)]
        assert (own - torch.tensor(mu)).abs().max() < 2e-5  # and the whole model agrees


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_are_still_refused(family, tmp_path):
    kind, message = REFUSED[family]
    with pytest.raises(kind, match=message):
        sample(build(CONFIGS[family]), tmp_path)


@pytest.mark.parametrize("family", CPU_FAULTS)
def test_a_run_refuses_families_that_the_engine_serves_wrongly(family, tmp_path):
    model = build(CONFIGS[family])
    model.config.eos_token_id = model.generation_config.eos_token_id = 3
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"does not serve {family} on a CPU"):
        Engine(str(tmp_path), precision="fp32", tensor_parallel=1, max_length=32, temperature=1.0, seed=0)


def test_the_faults_are_still_there():
    """When one is mended, its family moves to SERVED."""
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(64, 128, is_neox_style=False, dtype=torch.float32,
                          rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    positions, query, key = torch.arange(5), torch.randn(5, 2, 64), torch.randn(5, 1, 64)
    expected, _ = rotary.forward_native(positions, query.clone(), key.clone())
    rotated, _ = rotary.forward_cpu(positions, query.clone(), key.clone())
    assert (rotated - expected).abs().max() > 1

    bias = torch.tensor([0.0] * 7 + [100.0] * 3)
    _, experts = CPURouter(3, 10, e_score_correction_bias=bias)._compute_routing(
        None, -torch.arange(10.0)[None], None)
    assert experts.sort(-1).values.tolist() == [[0, 1, 2]]
    with pytest.raises(AssertionError):
        CPURouter(3, 10, scoring_func="sigmoid")._compute_routing(None, torch.zeros(1, 10), None)
