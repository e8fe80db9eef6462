"""New weights in a running engine, at sync 1, 2 and 3, and what the check makes of broken ones."""
import pytest
import torch
from syncing import SEQUENCES, logprobs_of
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from scaled.engine import EngineError
from scaled.huggingface import published_names
from scaled.rollout import Engine
from scaled.sync import SyncCheck

E, F, D = 8, 96, 64
PRECISIONS = {"fp32": 1e-5, "bf16": 0.04, "int8": 0.04}  # largest mean difference, nats a token


@pytest.fixture(scope="module", params=PRECISIONS)
def running(request, tmp_path_factory):
    """An engine and the model whose weights it has, with tied embeddings in one of the cases."""
    config = Qwen3MoeConfig(
        vocab_size=53, hidden_size=D, num_hidden_layers=3, num_experts=E, num_experts_per_tok=2,
        moe_intermediate_size=F, intermediate_size=160, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, norm_topk_prob=True,
        mlp_only_layers=[1], eos_token_id=7, bos_token_id=None, initializer_range=0.15,
        tie_word_embeddings=request.param == "bf16")
    torch.manual_seed(3)
    model = Qwen3MoeForCausalLM(config).eval()
    folder = str(tmp_path_factory.mktemp(request.param))
    model.save_pretrained(folder)
    engine = Engine(folder, precision=request.param, tensor_parallel=1, max_length=320,
                    temperature=1.0, seed=0)
    engine.precision, engine.trainer, engine.syncs = request.param, model, 0
    yield engine
    engine.close()


@pytest.fixture
def engine(running):
    """Every test begins with the weights of the folder in trainer and engine."""
    start = {name: tensor.clone() for name, tensor in running.trainer.state_dict().items()}
    yield running
    running.trainer.load_state_dict(start)
    sync(running)


@torch.no_grad()
def train(model, seed, size=0.2):
    """Every weight moves by a fifth of its deviation."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += size * (parameter.std() if parameter.std() > 0 else 0.5) * noise


def sync(engine, weights=None):
    engine.syncs += 1
    weights = engine.trainer.state_dict() if weights is None else weights
    engine.load_weights(weights.items(), engine.syncs)


def test_syncs_1_2_and_3(engine):
    """Each with other weights, far from the last. What the engine samples and scores follows."""
    assert engine.version == 0  # the first test of this file: no sync has been
    check, before = SyncCheck(), engine.score(SEQUENCES)[0]
    differences = [check(engine, logprobs_of(engine.trainer), SEQUENCES)]
    for i in range(3):
        train(engine.trainer, seed=i)
        sync(engine)
        after = engine.score(SEQUENCES)[0]
        assert (after - before).abs().mean() > 0.2  # the weights did change
        before = after
        differences.append(check(engine, logprobs_of(engine.trainer), SEQUENCES))
        rollout = engine.generate([[1, 2, 3], [4, 5]], 6, 12, 0, engine.syncs)
        own = logprobs_of(engine.trainer)(rollout.tokens, rollout.lengths, rollout.routing)
        sampled = (own - rollout.rollout_logprobs)[rollout.mask].abs().mean()
        assert sampled < PRECISIONS[engine.precision]
    assert max(differences) < PRECISIONS[engine.precision]
    if engine.precision != "fp32":  # neither is the engine secretly a fp32 one
        assert min(differences) > 1e-3


def test_stale_weights_are_caught(engine):
    """The trainer moved on, the sync was forgotten and the version forged."""
    sync(engine)
    check = SyncCheck()
    check(engine, logprobs_of(engine.trainer), SEQUENCES)
    train(engine.trainer, seed=10)
    engine.syncs = engine.version = engine.version + 1
    message = rf"version {engine.version}: .* \(3 x {check.first:.2e}"
    with pytest.raises(EngineError, match=message):
        check(engine, logprobs_of(engine.trainer), SEQUENCES)
    sync(engine)
    check(engine, logprobs_of(engine.trainer), SEQUENCES)


def two_experts_swapped(weights):
    weights["model.layers.2.mlp.experts.down_proj"][[1, 2]] = (
        weights["model.layers.2.mlp.experts.down_proj"][[2, 1]])


def gate_for_up(weights):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weights[name] = weights[name].roll(F, 1)


def queries_reversed(weights):
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = weights[name].flip(0)


@pytest.mark.parametrize("scramble", [two_experts_swapped, gate_for_up, queries_reversed])
def test_scrambled_weights_are_caught(engine, scramble):
    sync(engine)
    check = SyncCheck()
    check(engine, logprobs_of(engine.trainer), SEQUENCES)
    weights = {name: tensor.clone() for name, tensor in engine.trainer.state_dict().items()}
    scramble(weights)
    sync(engine, weights)
    with pytest.raises(EngineError, match="engine and trainer differ"):
        check(engine, logprobs_of(engine.trainer), SEQUENCES)
    sync(engine)
    check(engine, logprobs_of(engine.trainer), SEQUENCES)


def test_no_old_prefix_after_a_sync(engine):
    """Two blocks of a prompt are in the cache; after the sync none of them serves."""
    sync(engine)
    prompt = [(11 * i) % 53 for i in range(300)]
    engine.generate([prompt], 2, 3, 0, engine.syncs)
    hits = engine.run([prompt], engine.vllm.SamplingParams(max_tokens=1, detokenize=False))
    assert hits[0].num_cached_tokens >= 256
    train(engine.trainer, seed=20)
    sync(engine)
    fresh = engine.generate([prompt], 1, 3, 0, engine.syncs)
    own = logprobs_of(engine.trainer)(fresh.tokens, fresh.lengths, fresh.routing)
    difference = (own - fresh.rollout_logprobs)[fresh.mask].abs().mean()
    assert difference < 2 * PRECISIONS[engine.precision]


def test_weights_stream(engine):
    """What was handed over before is not kept: at most the tensors of one layer are alive."""
    import weakref

    alive, most = [], 0

    def stream():
        nonlocal most
        for name, tensor in engine.trainer.state_dict().items():
            copy = tensor.clone()
            alive.append(weakref.ref(copy))
            yield name, copy
            del copy
            most = max(most, sum(ref() is not None for ref in alive))

    engine.syncs += 1
    engine.load_weights(stream(), engine.syncs)
    assert len(alive) > 30 and most <= 12
    SyncCheck()(engine, logprobs_of(engine.trainer), SEQUENCES)


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.0.mlp.experts.down_proj",
                                  "model.layers.2.self_attn.k_proj.weight"])
def test_a_weight_that_does_not_come_is_an_error(engine, lost):
    weights = {name: tensor for name, tensor in engine.trainer.state_dict().items() if name != lost}
    with pytest.raises(EngineError, match="the sync left 1 layers.* without all of their weights"):
        sync(engine, weights)
    with pytest.raises(EngineError, match="policy version None, not"):  # neither old nor new
        engine.generate([[1]], 1, 1, 0, engine.syncs)
    sync(engine)
    SyncCheck()(engine, logprobs_of(engine.trainer), SEQUENCES)


def test_sync_leaves_the_random_state_and_takes_gradients(engine):
    state = torch.get_rng_state()
    train(engine.trainer, seed=30)
    engine.syncs += 1
    engine.load_weights(engine.trainer.named_parameters(), engine.syncs)  # tied: without lm_head
    SyncCheck()(engine, logprobs_of(engine.trainer), SEQUENCES)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------- without an engine
class Scores:
    """An engine that scores 2 sequences of 3 and 5 tokens as it is told."""
    version = 7

    def __init__(self, value):
        self.value = value

    def score(self, sequences):
        longest = max(map(len, sequences)) - 1
        return torch.full((len(sequences), longest), self.value), torch.zeros(2, longest, 1, 1)


def check_of(check, difference):
    def run(tokens, lengths, routing):
        assert torch.equal(tokens, pad_sequence([torch.arange(3), torch.arange(5)], True))
        assert lengths.tolist() == [3, 5] and routing.shape == (2, 4, 1, 1)
        other = torch.full((2, 4), -1.0 + difference)
        other[0, 2:] = torch.nan  # padding
        return other.requires_grad_()
    return check(Scores(-1.0), run, [[0, 1, 2], [0, 1, 2, 3, 4]])


def test_the_threshold_of_the_check():
    check = SyncCheck()
    assert check_of(check, 0.01) == pytest.approx(0.01, rel=1e-4)
    assert check_of(check, -0.0299) == pytest.approx(0.0299, rel=1e-4)
    assert check.first == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(EngineError, match=r"3.01e-02 nats a token, 3.00e-02 is allowed \(3 x 1"):
        check_of(check, 0.0301)
    with pytest.raises(EngineError, match="nan nats"):
        check_of(check, float("nan"))


def test_the_first_check_has_a_bound_of_its_own_and_zero_is_no_measure():
    with pytest.raises(EngineError, match="5.10e-01 nats a token, 5.00e-01 is allowed"):
        check_of(SyncCheck(), 0.51)
    check = SyncCheck()
    assert check_of(check, 0.0) == 0
    check_of(check, 9e-6)
    with pytest.raises(EngineError, match="1.10e-05 nats a token, 1.00e-05 is allowed"):
        check_of(check, 1.1e-5)


def test_a_fault_that_grows_with_the_weights_is_seen_later():
    """An engine that keeps a part of its first weights: each sync moves the policy by a little, which the
    first checks cannot tell from rounding."""
    check, seen = SyncCheck(syncs=3, every=5), []
    check_of(check, 0.01)
    with pytest.raises(EngineError, match="differ by 4.00e-02"):
        for sync in range(1, 100):
            if check.due():
                seen.append(sync)
                check_of(check, 0.01 + 0.002 * sync)
    assert seen == [1, 2, 3, 5, 10, 15]
    never = SyncCheck(syncs=0, every=5)
    assert not any(never.due() for _ in range(30))


@pytest.mark.parametrize("family, name, shape, first, count", [
    ("qwen3_moe", "model.layers.1.mlp.experts.gate_up_proj", (3, 10, 4),
     "model.layers.1.mlp.experts.0.gate_proj.weight", 6),
    ("mixtral", "model.layers.1.mlp.experts.down_proj", (3, 4, 5),
     "model.layers.1.block_sparse_moe.experts.0.w2.weight", 3),
    ("mixtral", "model.layers.1.mlp.gate.weight", (3, 4),
     "model.layers.1.block_sparse_moe.gate.weight", 1),
    ("granitemoe", "model.layers.1.block_sparse_moe.experts.down_proj", (3, 4, 5),
     "model.layers.1.block_sparse_moe.output_linear.weight", 1),
    ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", (3, 4, 10),
     "model.layers.1.mlp.experts.gate_up_proj", 1)])
def test_published_names(family, name, shape, first, count):
    config = AutoConfig.for_model(family, num_hidden_layers=2)
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    pairs = list(published_names(config)(name, tensor))
    assert len(pairs) == count and pairs[0][0] == first
    assert sum(part.numel() for _, part in pairs) == tensor.numel()
    if count == 6:
        by_name = dict(pairs)
        assert torch.equal(by_name["model.layers.1.mlp.experts.2.up_proj.weight"], tensor[2, 5:])
    elif count == 3:
        assert torch.equal(pairs[2][1], tensor[2])
