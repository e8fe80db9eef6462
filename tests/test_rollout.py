"""Task and inference engine."""

import pytest
import torch
from conftest import sample_rollout

import nano_moe_rl as nano


def response_logprobs(model, rollout, replay=None):
    return nano.policy(model, nano.replace(rollout, replay=replay))


def test_decoding_with_a_cache_is_the_full_forward(model):
    rollout = sample_rollout(model, "fp32")
    logprobs, _, routing = response_logprobs(model, rollout)
    mask = rollout.mask
    torch.testing.assert_close(rollout.rollout_logprobs[mask], logprobs[mask], atol=1e-5, rtol=0)
    assert (rollout.rollout_logprobs[~mask] == 0).all()
    assert torch.equal(rollout.routing.sort(-1).values, routing.sort(-1).values)


def test_a_route_for_every_fed_token_and_no_other(config, rollout):
    fed = rollout.fed
    assert rollout.routing.shape == (*fed.shape, config.layers, config.top_k)
    routes = rollout.routing[fed].long()
    assert routes.min() >= 0 and routes.max() < config.experts
    assert (routes.sort(-1).values.diff() > 0).all()
    assert (rollout.routing[~fed] == -1).all()
    assert len(routes.unique()) == config.experts
    expected = rollout.lengths - 1  # all but the last sampled token
    assert torch.equal(fed.sum(1), expected)


def test_masks_against_the_slow_way(rollout):
    for row in range(len(rollout.tokens)):
        start, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
        for t in range(rollout.tokens.shape[1] - 1):
            assert rollout.fed[row, t] == (t + 1 < end)
            assert rollout.mask[row, t] == (start <= t + 1 < end)


def test_responses_end_at_eos_or_at_the_limit(config, rollout):
    lengths = rollout.lengths - rollout.prompt_lengths
    assert len(lengths.unique()) > 2 and lengths.max() <= config.max_response
    for row in range(len(rollout.tokens)):
        response = rollout.tokens[row, rollout.prompt_lengths[row] : rollout.lengths[row]].tolist()
        assert nano.EOS not in response[:-1]
        assert response[-1] == nano.EOS or len(response) == config.max_response


def test_prompts_are_kept_and_groups_are_adjacent(config, model):
    prompts, lengths = nano.make_prompts(6, config, torch.Generator().manual_seed(0))
    rollout = sample_rollout(model, "fp8")
    for row in range(24):
        n = int(lengths[row // 4])
        assert torch.equal(rollout.tokens[row, :n], prompts[row // 4, :n])
        assert rollout.prompt_lengths[row] == n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_come_from_the_distribution_that_is_reported(config, temperature):
    """Frequencies of first response tokens against π at the same temperature."""
    model = nano.Model(nano.replace(config, temperature=temperature))
    engine = nano.InferenceEngine(model, "fp32")
    prompt, length = torch.tensor([[3, 1, 4, nano.ASK]]), torch.tensor([4])
    rollout = engine.generate(prompt, length, 4000, torch.Generator().manual_seed(0))
    expected = (model(prompt)[0][0, -1] / temperature).softmax(-1)
    seen = rollout.tokens[:, 4].bincount(minlength=len(expected)) / 4000
    assert (seen - expected).abs().max() < 4 * 0.5 / 4000**0.5  # four standard deviations
    torch.testing.assert_close(rollout.rollout_logprobs[:, 3].exp(), expected[rollout.tokens[:, 4]])


def test_generation_does_not_depend_on_neighbours(config, model):
    """A prompt's cache is its own: greedy continuations are the same alone and in a mixed batch."""
    cold = nano.Model(nano.replace(config, temperature=1e-4))
    engine = nano.InferenceEngine(cold, "fp32")
    prompts, lengths = nano.make_prompts(9, config, torch.Generator().manual_seed(5))
    together = engine.generate(prompts, lengths, 2, torch.Generator().manual_seed(0))
    for i in range(9):
        alone = engine.generate(prompts[i, None], lengths[i, None], 1, torch.Generator().manual_seed(1))
        n = int(alone.lengths[0])
        for row in (2 * i, 2 * i + 1):
            assert together.lengths[row] == n
            assert torch.equal(together.tokens[row, :n], alone.tokens[0, :n])


def test_precision_is_a_dial_of_discrepancy(model):
    """fp32 < bf16 < fp8 < int6 < int5 < int4, in KL and in routers that choose other experts."""
    kl, flips = [], []
    for precision in ("fp32", "bf16", "fp8", "int6", "int5", "int4"):
        rollout = sample_rollout(model, precision, n_prompts=40)
        logprobs, _, routing = response_logprobs(model, rollout)
        kl.append(nano.kl_k3(rollout.rollout_logprobs, logprobs, rollout.mask).item())
        flips.append(1 - nano.routing_agreement(routing, rollout.routing, rollout.fed).mean().item())
    assert kl == sorted(kl) and flips == sorted(flips)
    assert kl[0] < 1e-9 and flips[0] == 0 and flips[2] > 0.005 and kl[-1] > 10 * kl[1]


@pytest.mark.parametrize("precision", ["fp8", "int6", "int5", "int4"])
def test_quantised_values_lie_on_the_grid_of_their_row(precision):
    x = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 5)[:, None, None]
    y = nano.quantise(x, precision)
    for row, rounded in zip(x.flatten(0, 1), y.flatten(0, 1)):
        if precision == "fp8":  # e4m3: three bits after the leading one, below 2^-6 of 448 a fixed step
            scale = row.abs().max() / 448
            _, exponent = torch.frexp(rounded / scale)
            step = torch.ldexp(torch.ones(32), exponent.clamp(min=-5) - 4)
        else:
            scale = row.abs().max() / {"int6": 31, "int5": 15, "int4": 7}[precision]
            step = torch.ones(32)
        levels = rounded / scale / step
        torch.testing.assert_close(levels, levels.round(), atol=2e-3, rtol=0)
        assert ((row - rounded).abs() / scale <= step / 2 * 1.001).all()


def test_zero_rows_stay_zero():
    for precision in ("fp32", "bf16", "fp8", "int4"):
        assert (nano.quantise(torch.zeros(2, 8), precision) == 0).all()


def test_the_router_is_never_quantised(config, model):
    for precision in ("bf16", "fp8", "int4"):
        engine = nano.InferenceEngine(model, precision)
        for i, layer in enumerate(model.layers):
            router = layer.mlp.gate.weight.detach()
            assert torch.equal(engine.model.layers[i].mlp.gate.weight, router.bfloat16().float())


def test_the_engine_keeps_its_weights_when_the_model_moves_on(config, model):
    for precision in ("fp32", "bf16", "fp8", "int4"):
        engine = nano.InferenceEngine(model, precision)
        before = {name: weight.clone() for name, weight in engine.model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        assert all(torch.equal(before[name], weight) for name, weight in engine.model.state_dict().items())


def test_router_noise_changes_the_choice_and_nothing_else(config, model):
    """Under given experts the logits are bitwise the same; the choice is that of the same draws by hand."""
    tokens = torch.randint(10, (40, 9), generator=torch.Generator().manual_seed(0))
    quiet, own = model(tokens)
    noisy = nano.Numerics("fp32", 1.0, torch.Generator().manual_seed(1))
    _, routing = model(tokens, numerics=noisy)
    assert 0.2 < 1 - nano.routing_agreement(routing, own, torch.ones_like(tokens, dtype=torch.bool)).mean() < 0.9
    assert torch.equal(model(tokens, own, numerics=noisy)[0], quiet)  # gate weights have no noise
    # the slow way: in layer 0, where the input is the same, the same draws by hand
    generator, layer = torch.Generator().manual_seed(1), model.layers[0]
    x = model.embed_tokens(tokens)
    angles = torch.arange(9)[:, None, None] * 1e4 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    x = x + layer.self_attn(layer.input_layernorm(x), angles, None, model.numerics)
    logits = layer.mlp.gate(layer.post_attention_layernorm(x))
    logits = logits + torch.randn(logits.shape, generator=generator)
    expected = logits.argsort(-1, descending=True)[..., :config.top_k].sort(-1).values
    assert torch.equal(routing[:, :, 0].long().sort(-1).values, expected)


def test_replay_closes_the_gap_that_router_noise_opens(model):
    rollout = sample_rollout(model, "fp8", n_prompts=60, router_noise=1.0)
    gap = {mode: nano.kl_k3(rollout.rollout_logprobs, response_logprobs(model, rollout, replay)[0], rollout.mask)
           for mode, replay in (("none", None), ("R3", rollout.routing))}
    assert gap["R3"] < 0.1 * gap["none"]


def test_the_noise_comes_from_the_generator_of_the_rollout(model):
    first, again, other = (sample_rollout(model, "fp8", seed=seed, router_noise=0.5) for seed in (3, 3, 4))
    assert torch.equal(first.routing, again.routing) and torch.equal(first.tokens, again.tokens)
    assert first.routing.shape != other.routing.shape or not torch.equal(first.routing, other.routing)


def test_weights_without_a_distribution_are_an_error(config, model):
    model.lm_head.weight.data.fill_(torch.nan)
    engine = nano.InferenceEngine(model, "fp8")
    with pytest.raises(FloatingPointError):
        engine.generate(*nano.make_prompts(2, config, torch.Generator()), 2, torch.Generator())


def grade_slowly(text):
    prompt, response = text.split("=", 1)
    return float(response.endswith(f":{sum(map(int, prompt)) % 10}$"))


@pytest.mark.parametrize("text, reward", [
    ("314=3 3 1 4 4 8:8$", 1), ("314=:8$", 1), ("314=9:8$", 1), ("314=33144 8:7$", 0), ("314=3314488$", 0),
    ("314=3314 48:8", 0), ("314=8$", 0), ("314=$", 0), ("314=8:8:8$", 1), ("9=:9$", 1), ("95=:14$", 0)])
def test_grading(text, reward):
    text = text.replace(" ", "")
    tokens = torch.tensor([[nano.VOCABULARY.index(symbol) for symbol in text + "11"]])
    lengths = torch.tensor([text.index("=") + 1]), torch.tensor([len(text)])
    assert nano.grade(tokens, *lengths).tolist() == [reward] == [grade_slowly(text)]


@pytest.mark.parametrize("teacher, step", [("brief", "ds"), ("equation", "d=s"), ("restating", "pds")])
@pytest.mark.parametrize("slip_rate", [0.0, 0.15, 0.28, 1.0])
def test_demonstrations_follow_their_teacher(config, teacher, step, slip_rate):
    c = nano.replace(config, teacher=teacher, slip_rate=slip_rate)
    tokens, prompt_lengths, lengths = nano.demonstrations(2000, c, torch.Generator().manual_seed(0))
    slips = steps = 0
    for row, start, end in zip(tokens.tolist(), prompt_lengths.tolist(), lengths.tolist()):
        digits, response = row[: start - 1], row[start:end]
        assert len(set(digits)) == len(digits) and row[start - 1] == nano.ASK
        assert len(response) == len(step) * len(digits) + 3 <= c.max_response
        total = 0
        for i, digit in enumerate(digits):
            part = dict(zip(step, response[i * len(step) :]))
            assert part["d"] == digit and part.get("p", total) == total and part.get("=", nano.ASK) == nano.ASK
            slips += part["s"] != (total + digit) % 10
            steps += 1
            total = part["s"]
        assert response[-3:] == [nano.ANSWER, total, nano.EOS]
    assert abs(slips / steps - slip_rate) <= 4 * (slip_rate * (1 - slip_rate) / steps) ** 0.5
    assert {c.min_digits + 1, c.max_digits + 1} <= set(prompt_lengths.tolist())


def test_demonstrations_are_cut_off_where_responses_are(config):
    whole, prompt_lengths, _ = nano.demonstrations(50, config, torch.Generator().manual_seed(0))
    cut, same, lengths = nano.demonstrations(50, nano.replace(config, max_response=5), torch.Generator().manual_seed(0))
    assert torch.equal(same, prompt_lengths) and torch.equal(lengths, prompt_lengths + 5)
    for row, expected, n in zip(cut, whole, lengths):
        assert torch.equal(row[:n], expected[:n])
