"""Top-p with its kept tokens, replay with gate weights, frozen routers, old rollouts, learning rates by sample size."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_run import TINY, arguments, assert_identical, untimed

import nano_moe_rl as nano
import toy
from scaled import study
from scaled.study import Study


def learned(c, options=Study(), **functions):
    """Rows, weights and optimiser after nano.learn."""
    model = nano.Model(c)
    if options.frozen_router:
        study.freeze_routers(model)
    optimizer, rows = nano.adamw(model, c.lr), [{"update": 0}]
    with options.around(c):
        nano.learn(model, optimizer, rows, **functions)
    return rows, model.state_dict(), optimizer


@pytest.fixture
def tiny(rewarded):
    return nano.Config(**TINY | dict(lr=1e-3, warmup=1))


# ----------------------------------------------------------------------------------- kept tokens
def slow_nucleus(probability, top_p):
    kept, mass = set(), 0.0
    for token in sorted(range(len(probability)), key=lambda token: -probability[token]):
        if mass < top_p:
            kept.add(token)
            mass += probability[token]
    return kept


def test_the_nucleus_below_at_and_above_its_threshold():
    logits = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64).log()
    for top_p, kept in ((0.01, {1}), (0.5, {1}), (0.5001, {1, 2}), (0.75, {1, 2}), (1.0, {0, 1, 2, 3})):
        assert set(study.nucleus(logits, top_p).nonzero()[:, 0].tolist()) == kept
    drawn = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0))
    for row, kept in zip(drawn.flatten(0, 1), study.nucleus(drawn, 0.7).flatten(0, 1)):
        assert slow_nucleus(row.softmax(0).tolist(), 0.7) == set(kept.nonzero()[:, 0].tolist())


@torch.no_grad()
def test_kept_tokens_travel_and_both_policies_are_normalised_over_them(model):
    engine = nano.InferenceEngine(model, "fp32")
    rollout = study.sample(engine, 6, 4, seed=0, top_p=0.6)
    assert rollout.kept.shape == (*rollout.mask.shape, len(nano.VOCABULARY))
    (pi, entropies, _), (whole, *_) = study.policy(model, rollout), nano.policy(model, rollout)
    logits = model(rollout.tokens[:, :-1], None, rollout.fed)[0]
    for b, t in rollout.mask.nonzero().tolist():
        p = logits[b, t].softmax(0).tolist()
        kept, token = slow_nucleus(p, 0.6), int(rollout.tokens[b, t + 1])
        assert token in kept == set(rollout.kept[b, t].nonzero()[:, 0].tolist())
        mass = sum(p[token] for token in kept)
        wanted = math.log(p[token] / mass)
        assert rollout.rollout_logprobs[b, t].item() == pytest.approx(wanted, abs=1e-4)
        assert pi[b, t].item() == pytest.approx(wanted, abs=1e-4)
        assert whole[b, t].item() == pytest.approx(wanted + math.log(mass), abs=1e-4)
        entropy = -sum(p[i] / mass * math.log(p[i] / mass) for i in kept)
        assert entropies[b, t].item() == pytest.approx(entropy, abs=1e-4)
    part = rollout.split(12)[1]  # as a mini-batch
    assert torch.equal(part.kept, rollout.kept[12:])
    assert study.sample(engine, 6, 4, seed=0).kept is None


def test_what_was_not_kept_has_no_gradient(model):
    rollout = study.sample(nano.InferenceEngine(model, "fp8"), 6, 4, seed=0, top_p=0.6)
    seen = []
    with study.hooked((model, lambda output: seen.append(output[0]) or output)):  # before the tokens are taken out
        logprobs, *_ = study.policy(model, rollout)
    seen[0].retain_grad()
    logprobs[rollout.mask].sum().backward()
    assert seen[0].grad[~rollout.kept].abs().max() == 0 < seen[0].grad[rollout.kept].abs().max()


def test_the_first_order_claim_holds_on_the_kept_set_and_fails_without():
    distances = np.logspace(-4, -2, 5)
    objective, gradient, _ = zip(*(toy.first_order_gaps(d, top_p=0.8) for d in distances))
    slope = lambda errors: np.polyfit(np.log(distances), np.log(errors), 1)[0]  # noqa: E731
    assert slope(objective) == pytest.approx(2, abs=0.05)
    assert slope(gradient) == pytest.approx(1, abs=0.05)
    assert toy.first_order_gaps(0.0, top_p=0.8)[1] < 1e-14
    _, error, scale = toy.first_order_gaps(0.0, top_p=0.8, kept=False)  # equal weights, and still
    assert error > 0.2 * scale


# ---------------------------------------------------------------------------------- gate weights
def test_gate_weights_are_constants_that_make_a_coarse_router_the_trainers():
    """Nothing else is coarse in that engine: with its experts and their weights π is μ, with its experts alone not."""
    for seed in (0, 1):
        table = toy.replay_table(toy.coarse_router, seed=seed)
        assert abs(table["R3, its weights"]["gap"]) < 1e-6 < 1e-4 < table["R3"]["gap"] < 0.1 * table["none"]["gap"]
        for mode, row in table.items():
            assert (row["router"] == 0) == (mode in ("R3, its weights", "none, frozen router"))


def test_a_table_of_replay_agrees_with_sums_that_are_made_elsewhere():
    def engine_of(model):
        return nano.InferenceEngine(model, "int4")
    bias = toy.replay_bias("int4", [0.0, 0.05])
    for i, distance in enumerate((0.0, 0.05)):
        table = toy.replay_table(engine_of, distance)
        for mode in ("R2", "R3"):
            assert table[mode]["target"] == pytest.approx(bias[mode][i], abs=1e-5)
        assert table["none"]["target"] == table["none, frozen router"]["target"] == 0
    # fp32 engines: π is μ, and MiniRL's gradient that of J but for its sum over tokens, which is exact here
    table = toy.replay_table(lambda model: nano.InferenceEngine(model, "fp32"))
    for mode, row in table.items():
        assert abs(row["gap"]) < 1e-6 and abs(row["target"]) < 1e-6
        if mode in ("none", "R2", "R3"):
            assert row["cosine"] == pytest.approx(1, abs=1e-5) and row["router"] == pytest.approx(1, abs=1e-3)


def test_gate_weights_travel_and_routers_keep_saying_what_they_would_choose(model):
    rollout = study.sample(nano.InferenceEngine(model, "fp32"), 6, 4, seed=0)
    torch.testing.assert_close(rollout.gate_weights.sum(-1), torch.ones(rollout.routing.shape[:3]))
    assert (rollout.gate_weights[rollout.routing < 0] == 0.5).all() and rollout.gate_weights[rollout.fed].std() > 0.1
    batch = nano.replace(rollout, replay=rollout.routing)
    (logprobs, _, routing), (own, _, routed) = study.policy(model, batch, gate_weights=True), nano.policy(model, batch)
    torch.testing.assert_close(logprobs, own, atol=1e-5, rtol=0)
    assert torch.equal(routing, routed)
    logprobs[batch.mask].sum().backward()
    assert all(gate.weight.grad is None for gate in study.gates(model)) and model.embed_tokens.weight.grad.norm() > 0
    with pytest.raises(ValueError, match="gate_weights: the rollout has none"):
        study.policy(model, nano.replace(batch, gate_weights=None), gate_weights=True)


def test_routers_without_a_gradient_keep_their_weights(tiny):
    before = nano.Model(tiny).state_dict()
    for options, kept in ((Study(), False), (Study(frozen_router=True), True), (Study(gate_weights=True), True)):
        _, after, _ = learned(tiny, options)
        for name, weight in after.items():
            assert torch.equal(weight, before[name]) == (kept and ".gate." in name), name


# ------------------------------------------------------------------------ old rollouts, and steps
def test_without_an_option_nothing_changes(tiny):
    rows, model = [{"update": 0}], nano.Model(tiny)
    optimizer = nano.adamw(model, tiny.lr)
    nano.learn(model, optimizer, rows)
    others, weights, other = learned(tiny)
    assert_identical((untimed(rows), model.state_dict(), optimizer.state_dict()),
                     (untimed(others), weights, other.state_dict()))
    assert nano.sample is study.SAMPLE and nano.policy is study.POLICY and nano.train_step is study.TRAIN_STEP


@pytest.mark.parametrize("K, N", [(0, 1), (1, 2), (3, 1)])
def test_a_lag_of_k_samples_with_the_weights_of_k_batches_ago(tiny, monkeypatch, K, N):
    c = nano.replace(tiny, mini_batches=N, updates=5 * N, eval_every=N)
    saved, trained, prepare = [], [], nano.prepare_batch

    def prepare_batch(model, rollout):
        saved.append({name: x.clone() for name, x in model.state_dict().items()})
        trained.append(rollout)
        return prepare(model, rollout)
    monkeypatch.setattr(nano, "prepare_batch", prepare_batch)
    rows, *_ = learned(c, Study(lag=K))
    assert len(saved) == 5 and sum("score" in row for row in rows) == 5
    for j, rollout in enumerate(trained):
        old = nano.Model(c)
        old.load_state_dict(saved[max(0, j - K)])
        engine = nano.InferenceEngine(old, c.rollout_precision, c.router_noise)
        again = nano.sample(engine, N * c.mini_batch // c.group_size, c.group_size, seed=c.seed * 10**9 + j * N)
        assert torch.equal(rollout.tokens, again.tokens) and rollout.version == N * max(0, j - K)
        torch.testing.assert_close(rollout.rollout_logprobs, again.rollout_logprobs)


@pytest.mark.parametrize("kind", ["token", "response"])
def test_the_learning_rate_is_scaled_by_the_root_of_the_sample_size(tiny, monkeypatch, kind):
    c, seen = nano.replace(tiny, replay="none", rollout_precision="int4", warmup=3), []

    def loss_fn(logprobs, old, mu, advantages, mask, **counts):
        ratios = [[math.exp(x) for x in row[m]] for row, m in zip((logprobs - mu).detach().double(), mask)]
        weights = [math.prod(row) for row in ratios] if kind == "response" else sum(ratios, [])
        seen.append(sum(weights)**2 / len(weights) / sum(w * w for w in weights))
        return nano.minirl_loss(logprobs, old, mu, advantages, mask, **counts)
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]) or step(optimizer))
    learned(c, Study(lr_by=kind), loss_fn=loss_fn)
    assert len(seen) == c.updates and max(seen) <= 1 and min(seen) < 0.99
    assert rates == pytest.approx([c.lr * min(1, (i + 1) / 3) * math.sqrt(x) for i, x in enumerate(seen)], rel=1e-4)


def test_a_sample_size_of_equal_weights_and_of_one_that_has_everything():
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    mu = torch.zeros(3, 2)
    for kind, n in (("token", 5), ("response", 3)):
        assert study.sample_size(mu - 0.5 * (kind == "token"), mu, mask, kind).item() == 1
        far = mu.clone()
        far[1, 0] = 2000.0  # exp overflows
        assert study.sample_size(far, mu, mask, kind).item() == pytest.approx(1 / n)
        assert study.sample_size(far.masked_fill(~mask, math.nan), mu, mask, kind).item() == pytest.approx(1 / n)


# --------------------------------------------------------------------------------------- command
def test_a_run_of_everything_leaves_its_options_and_no_checkpoint(folder, no_pictures, rewarded, capsys):
    own = ["--top-p", "0.9", "--gate-weights", "--frozen-router", "--lag", "1", "--lr-by", "response"]
    study.main(arguments(name="all") + own)
    rows = [json.loads(line) for line in (folder / "runs/all/metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(5)) and "score" in rows[-1]
    options = json.loads((folder / "runs/all/config.json").read_text())
    assert options["top_p"] == 0.9 and options["lag"] == 1 and options["updates"] == 4
    assert not list(folder.rglob("checkpoint.pt")) and "runs/all has metrics.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("argv, line", [
    ("--top-p 0", "--top-p 0.0: give more than 0, up to 1"), ("--top-p 1.1", "--top-p 1.1: give"),
    ("--top-p nan", "--top-p nan: give"),
    ("--lag -1", "--lag -1: give 0 to 64"), ("--lag 65", "--lag 65: give 0 to 64"),
    ("--gate-weights --replay none", "--gate-weights True: give --replay R3"),
    ("--gate-weights --replay R2", "--gate-weights True: give --replay R3"),
    ("--lr-by tokens", "--lr-by tokens: give none or token or response"),
    ("--name there", "--name there: give one that runs/ does not have yet"),
    ("--updates 5", "--updates 5: give a multiple"),
    ("--resume there", "unrecognized arguments: --resume"), ("--name ..", "--name ..: give one without /")])
def test_refusals(folder, capsys, argv, line):
    (folder / "runs/there").mkdir(parents=True)
    with pytest.raises(SystemExit) as refused:
        study.main(arguments(name="new") + argv.split())
    assert refused.value.code == 2 and line in capsys.readouterr().err
    assert [path.name for path in (folder / "runs").iterdir()] == ["there"]
