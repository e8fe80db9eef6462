"""The train step: what each replay mode does to which policy, and what must not matter."""

import pytest
import torch
from conftest import sample_rollout

import nano_moe_rl as nano


def parts(model, **changes):
    """A model with the same weights and another configuration, and its optimizer."""
    other = nano.Model(nano.replace(model.config, **changes))
    other.load_state_dict(model.state_dict())
    return other, torch.optim.SGD(other.parameters(), 0.1)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_old_policy_of_each_mode(model, rollout):
    """none and R2: π_old chooses for itself; R3: it uses the experts of μ."""
    native, _, live = nano.policy(model, rollout)
    forced, _, _ = nano.policy(model, nano.replace(rollout, replay=rollout.routing))
    assert not torch.equal(native, forced), "the case needs routers that flip"
    for mode, old, replay in (("none", native, None), ("R2", native, live), ("R3", forced, rollout.routing)):
        batch = nano.prepare_batch(parts(model, replay=mode)[0], rollout)
        torch.testing.assert_close(batch.old_logprobs[rollout.mask], old.detach()[rollout.mask])
        assert batch.replay is None if replay is None else torch.equal(batch.replay, replay)


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_r2_is_a_no_op_on_the_first_mini_batch(model, rollout, mini_batches):
    """The first update is bitwise that of no replay; the second, off-policy, is not."""
    if mini_batches == 1:
        rollout = rollout.split(12)[0]
    results = {}
    for mode in ("none", "R2"):
        trained, optimizer = parts(model, replay=mode, mini_batches=mini_batches)
        optimizer.param_groups[0]["lr"] = 30.0  # far enough that routers flip
        batch = nano.prepare_batch(trained, rollout)
        steps = []
        for mini_batch in batch.split(12):
            metrics = nano.train_step(trained, optimizer, mini_batch)
            steps.append((metrics, gradients(trained)))
        results[mode] = steps
    (none, none_gradient), (r2, r2_gradient) = results["none"][0], results["R2"][0]
    assert none == r2 and torch.equal(none_gradient, r2_gradient) and none["staleness_kl"] == 0
    if mini_batches == 2:
        assert not torch.equal(results["none"][1][1], results["R2"][1][1])
        assert results["R2"][1][0]["staleness_kl"] > 0


def test_r3_equals_none_when_the_engines_agree(model):
    rollout = sample_rollout(model, "fp32")
    seen = {}
    for mode in ("none", "R3"):
        trained, optimizer = parts(model, replay=mode)
        batch = nano.prepare_batch(trained, rollout)
        nano.train_step(trained, optimizer, batch.split(12)[0])
        seen[mode] = gradients(trained)
    torch.testing.assert_close(seen["none"], seen["R3"], atol=1e-6, rtol=1e-4)


def test_r3_closes_the_gap_to_the_rollout(model):
    rollout = sample_rollout(model, "int4", n_prompts=60)
    gap = {}
    for mode in ("none", "R2", "R3"):
        trained, _ = parts(model, replay=mode)
        batch = nano.prepare_batch(trained, rollout)
        gap[mode] = nano.kl_k3(rollout.rollout_logprobs, batch.old_logprobs, rollout.mask)
    assert gap["R2"] == gap["none"] and gap["R3"] < 0.8 * gap["none"]


@pytest.mark.parametrize("mode", ["none", "R2", "R3"])
@pytest.mark.parametrize("mini_batches", [1, 2])
def test_first_gradient_with_equal_engines_is_plain_reinforce(model, mode, mini_batches):
    rollout = sample_rollout(model, "fp32", n_prompts=3 * mini_batches)
    trained, optimizer = parts(model, replay=mode, mini_batches=mini_batches)
    batch = nano.prepare_batch(trained, rollout).split(12)[0]
    metrics = nano.train_step(trained, optimizer, batch)

    model.zero_grad()  # the slow way: one response at a time, without padding, masks or weights
    for row in range(12):
        n, start = int(rollout.lengths[row]), int(rollout.prompt_lengths[row])
        group = rollout.rewards[row // 4 * 4 :][:4]
        logits, _ = model(rollout.tokens[row, None, : n - 1])
        logprobs = logits[0].log_softmax(-1)
        for t in range(start, n):
            advantage = rollout.rewards[row] - group.mean()
            (-advantage * logprobs[t - 1, rollout.tokens[row, t]] / 12).backward(retain_graph=True)
    norm = gradients(model).norm()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    torch.testing.assert_close(gradients(trained), gradients(model) / max(norm, 1), atol=1e-6, rtol=1e-3)


def test_tokens_outside_the_response_have_no_influence(model, rollout):
    """Padding tokens, and values that stand where no token of the response is."""
    trained, optimizer = parts(model)
    nano.train_step(trained, optimizer, nano.prepare_batch(trained, rollout).split(12)[0])
    clean = gradients(trained)
    spoiled = nano.replace(rollout, tokens=rollout.tokens.clone(), rollout_logprobs=rollout.rollout_logprobs.clone())
    column = torch.arange(rollout.tokens.shape[1])
    spoiled.tokens[column >= rollout.lengths[:, None]] = 5
    spoiled.rollout_logprobs[~rollout.mask] = torch.nan
    trained, optimizer = parts(model)
    nano.train_step(trained, optimizer, nano.prepare_batch(trained, spoiled).split(12)[0])
    assert torch.equal(gradients(trained), clean)


def test_a_batch_is_split_between_groups(config, model):
    """Advantages come from whole groups, before the split: in each mini-batch those of a group sum to 0."""
    trained, optimizer = parts(model, updates=2)
    trained.task = nano.replace(
        nano.RUNNING_SUM, grade=lambda tokens, _, lengths: tokens.gather(1, lengths[:, None] - 1)[:, 0].float())
    seen = []

    def keep(logprobs, old, rollout_logprobs, advantages, mask, **_):
        seen.append(advantages)
        return (logprobs * 0).sum(), mask

    nano.learn(trained, optimizer, [{"update": 0}], keep)
    for advantages in seen:
        assert advantages.abs().max() > 0
        torch.testing.assert_close(advantages.view(-1, config.group_size).sum(1), torch.zeros(3), atol=1e-5, rtol=0)


def test_only_the_routes_of_the_response_leave_a_gap(model):
    """Why the prompt is replayed too: response tokens attend to keys and values that other experts made."""
    rollout = sample_rollout(model, "fp8", n_prompts=60, router_noise=0.5)
    with torch.no_grad():
        native = nano.policy(model, rollout)[2]
        half = rollout.routing.where((rollout.mask | (rollout.routing[..., 0, 0] < 0))[..., None, None], native)
        gaps = [nano.kl_k3(rollout.rollout_logprobs, nano.policy(model, nano.replace(rollout, replay=replay))[0],
                           rollout.mask).item() for replay in (rollout.routing, half, None)]
    assert gaps == sorted(gaps) and gaps[0] < 0.8 * gaps[1]


def test_metrics_use_the_old_logprobs_of_the_loss(model, rollout):
    for mode in ("none", "R3"):
        trained, optimizer = parts(model, replay=mode)
        batch = nano.prepare_batch(trained, rollout)
        first, second = batch.split(12)
        nano.train_step(trained, optimizer, first)
        logprobs = nano.policy(trained, second)[0].detach()
        metrics = nano.train_step(trained, optimizer, second)
        tokens = second.mask
        x = (second.old_logprobs - second.rollout_logprobs)[tokens].double()
        assert metrics["mismatch_kl"] == pytest.approx((x.exp() - 1 - x).mean().item(), rel=1e-4)
        x = (logprobs - second.old_logprobs)[tokens].double()
        assert metrics["staleness_kl"] == pytest.approx((x.exp() - 1 - x).mean().item(), rel=1e-3)
        assert metrics["staleness_kl"] > 0


def test_another_objective_takes_the_place_of_minirl(model, rollout):
    seen = []

    def token_mean(logprobs, old_logprobs, rollout_logprobs, advantages, mask, *, n_sequences, n_tokens):
        seen.append((len(logprobs), n_sequences, n_tokens))
        return -(advantages[:, None] * logprobs * mask).sum() / n_tokens, torch.zeros_like(mask)

    trained, optimizer = parts(model, mini_batches=1)
    batch = nano.prepare_batch(trained, rollout.split(12)[0])
    metrics = nano.train_step(trained, optimizer, batch, token_mean)
    n_tokens = int((batch.lengths - batch.prompt_lengths).sum())
    assert seen == [(12, 12, n_tokens)] and metrics["clip_fraction"] == 1


def test_a_missing_route_is_refused_under_r3_only(model, rollout):
    rollout.routing[3, 1] = -1
    with pytest.raises(ValueError, match="lacks a valid route for 3 of"):
        nano.prepare_batch(parts(model, replay="R3")[0], rollout)
    nano.prepare_batch(parts(model, replay="R2")[0], rollout)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(model, rollout, bad):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    batch = nano.prepare_batch(model, rollout).split(12)[0]

    def broken(logprobs, *args, **kwargs):
        return logprobs.sum() * bad, torch.ones_like(args[-1])

    with pytest.raises(FloatingPointError):
        nano.train_step(model, optimizer, batch, broken)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_the_learning_rate_rises_in_the_first_updates_and_rows_are_whole(model):
    trained, optimizer = parts(model, updates=6, mini_batches=2, warmup=5, lr=0.01, eval_every=4)
    rows, seen = [{"update": 0}], []
    nano.learn(trained, optimizer, rows,
               after_batch=lambda: seen.append((rows[-1]["update"], optimizer.param_groups[0]["lr"])))
    assert seen == [(2, pytest.approx(0.004)), (4, pytest.approx(0.008)), (6, pytest.approx(0.01))]
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert ["score" in row for row in rows[1:]] == [False, False, False, True, False, True]
    assert len({frozenset(row) for row in rows[1:]}) == 2


def test_the_functions_given_to_learn_replace_minirl(config, model):
    trained, optimizer = parts(model, updates=2)
    before, seen = {name: weight.clone() for name, weight in trained.state_dict().items()}, []

    def loss_fn(logprobs, old, mu, advantages, mask, **_):
        seen.append(advantages)
        return (logprobs * 0).sum(), mask

    nano.learn(trained, optimizer, [{"update": 0}], loss_fn, lambda rewards, G: torch.full_like(rewards, 7.0))
    assert len(seen) == 2 and all((advantages == 7).all() for advantages in seen)
    assert all(torch.equal(before[name], weight) for name, weight in trained.state_dict().items())


def test_the_scores_of_both_engines(config, model):
    """evaluate against its parts: score by the training engine, engine_score and the share by the noisy one."""
    noisy = parts(model, router_noise=1.0, eval_prompts=200)[0]
    scores, rollout = nano.evaluate(noisy)
    clean = nano.sample(nano.InferenceEngine(noisy, "fp32"), 200, 1, 2**61)
    assert scores["score"] == clean.rewards.mean() and scores["engine_score"] == rollout.rewards.mean()
    with torch.no_grad():
        own, replayed = (nano.policy(noisy, nano.replace(rollout, replay=replay))[0]
                         for replay in (None, rollout.routing))
    x, y = ((logprobs - rollout.rollout_logprobs)[rollout.mask].double() for logprobs in (own, replayed))
    share = 1 - (y.exp() - 1 - y).mean() / (x.exp() - 1 - x).mean()
    assert scores["routing_share"] == pytest.approx(share.item(), abs=1e-4) and share > 0.8
    assert nano.evaluate(parts(model, rollout_precision="fp32")[0])[0]["routing_share"] is None
