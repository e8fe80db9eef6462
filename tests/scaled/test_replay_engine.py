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

from scaled.families import moe_layers, routers  # noqa: E402
from scaled.replay import RoutingReplay  # noqa: E402
from scaled.vllm_internals import FAULTS, options_for  # noqa: E402

FORWARD_CPU = RotaryEmbedding.forward_cpu  # vLLM's own

# ERNIE is refused in a run, since it is right without a correction bias only; so is dots1, which is right, but
# vLLM runs transformers' own class and patches it for that: in the same process, models made before miss an
# attribute in forward, and none can be made after.
SERVED = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "glm4_moe", "granitemoe", "deepseek_v2", "deepseek_v3",
          "ernie4_5_moe", "dots1"]

PROMPTS = [torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)).tolist()
           for n in (11, 7, 9, 17)]


def test_all_that_can_be_served_is():
    refused = {family for family, config in CONFIGS.items() if config.model_type in FAULTS}
    assert set(SERVED) == CONFIGS.keys() - refused | {"ernie4_5_moe", "dots1"}


def sample(model, folder):
    """Four responses of 12 tokens -> pairs of prompt and vLLM's output. What vLLM may have changed
    in the class of the model's body is put back."""
    model.save_pretrained(folder)
    body = type(model.model)
    bases, attributes = body.__bases__, dict(vars(body))
    try:
        engine = LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=64,
                     enable_return_routed_experts=True, enforce_eager=True, max_num_seqs=8,
                     **options_for(model.config))
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


@pytest.mark.parametrize("family", SERVED)
def test_captured_routes_are_the_models_own(family, tmp_path):
    model = build(CONFIGS[family])
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


def test_the_faults_are_still_there():
    """When one is mended, its family is no longer to be refused, or mended by us."""
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(64, 128, is_neox_style=False, dtype=torch.float32,
                          rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    positions, query, key = torch.arange(5), torch.randn(5, 2, 64), torch.randn(5, 1, 64)
    expected, _ = rotary.forward_native(positions, query.clone(), key.clone())
    rotated, _ = FORWARD_CPU(rotary, positions, query.clone(), key.clone())
    assert (rotated - expected).abs().max() > 1

    bias = torch.tensor([0.0] * 7 + [100.0] * 3)
    _, experts = CPURouter(3, 10, e_score_correction_bias=bias)._compute_routing(
        None, -torch.arange(10.0)[None], None)
    assert experts.sort(-1).values.tolist() == [[0, 1, 2]]
    with pytest.raises(AssertionError):
        CPURouter(3, 10, scoring_func="sigmoid")._compute_routing(None, torch.zeros(1, 10), None)
