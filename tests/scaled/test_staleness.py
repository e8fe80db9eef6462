"""Responses of several policy versions in one batch: their age, what is too old; the learning rate by sample size."""
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import sample_rollout
from processes import join_group, run_ranks

import nano_moe_rl as nano
from scaled import train
from scaled.batches import rows_of_rank, take
from scaled.config import Config
from scaled.engine import EngineError
from scaled.export import export_nano
from scaled.metrics import Phases
from scaled.policy import load_policy
from scaled.samples import samples
from scaled.staleness import staleness, versions, without_stale
from scaled.trainer import prepare_batch, train_step

TINY = nano.Config(layers=2, experts=4, expert_width=8, width=32, heads=1, group_size=4, max_digits=4, max_response=6,
                   mini_batch=16, mini_batches=2, updates=2, replay="R3")
OPTIONS = dict(checkpoint="there", train_data="there", train_precision="fp32", prompts=4, group_size=4, mini_batches=2,
               updates=2, max_prompt=6, max_response=6, token_budget=30, lr=0.3, warmup=1, gradient_checkpointing=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    export_nano(nano.Model(TINY), folder)
    return folder


def loaded(folder):
    return load_policy(folder, precision="fp32", logits_bytes=10**6, device="cpu", gradient_checkpointing=False,
                       cpu_offload=False)


def two_versions():
    """A batch of 32 responses, of the weights 8 and 9 in turns of three, with all the more unlike engines."""
    rollout = sample_rollout(nano.Model(TINY), "int4", 8)
    rollout.version = torch.tensor([8 + (i // 3) % 2 for i in range(len(rollout.tokens))])
    return rollout


def by_hand(model, batch, bound, version):
    """One response at a time -> gradients of the mini-batch's loss, and metrics, of those that are young enough."""
    model.zero_grad()
    kept, ages = [], []
    for i in range(len(batch.tokens)):
        one = take(batch, [i])
        age = version - int(batch.version[i])
        ages.append(age)
        if bound and age > bound:
            continue
        logprobs, *_ = nano.policy(model, one)
        loss, gate = nano.minirl_loss(logprobs, one.old_logprobs, one.rollout_logprobs, one.advantages, one.mask,
                                      n_sequences=len(batch.tokens), n_tokens=1)
        loss.backward()
        ratio = (logprobs - one.rollout_logprobs)[one.mask].exp().tolist()
        kept.append((loss.item(), int(one.mask.sum()), ratio, (gate & one.mask).any().item(),
                     nano.kl_k3(one.rollout_logprobs, one.old_logprobs, one.mask).item()))
    losses, lengths, ratios, gates, kls = zip(*kept)
    products = [math.prod(ratio) for ratio in ratios]
    return {name: p.grad.clone() for name, p in model.named_parameters()}, dict(
        loss=sum(losses), response_length=sum(lengths) / len(lengths), staleness=sum(ages) / len(ages),
        stale_responses=len(ages) - len(kept), dropped_responses=1 - sum(gates) / len(ages),
        mismatch_kl=sum(kl * n for kl, n in zip(kls, lengths)) / sum(lengths),
        response_sample_size=sum(products)**2 / len(products) / sum(x * x for x in products))


@pytest.mark.parametrize("bound, dropped", [(0, 0), (2, 0), (1, 8)])
def test_two_versions_in_a_batch_against_a_response_at_a_time(group, folder, bound, dropped):
    """Ages 1 and 2 at the second mini-batch, so that a bound of 1 leaves some of its responses out."""
    c, policy, model = Config(**OPTIONS, max_staleness=bound), loaded(folder), nano.Model(TINY)
    batch = prepare_batch(policy, two_versions(), c)
    part = batch.split(16)[1]
    gradients = {}
    optimizer = torch.optim.SGD(policy.parameters(), 1.0)
    optimizer.register_step_pre_hook(lambda *_: gradients.update(
        (name.removeprefix("model."), p.grad.full_tensor().clone()) for name, p in policy.model.named_parameters()))
    run = SimpleNamespace(c=c, version=10, optimizer=optimizer, policy=policy, loss_fn=nano.minirl_loss,
                          phases=Phases(silent=True))
    row = train.update(run, part)
    expected, metrics = by_hand(model, part, bound, 10)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert metrics["stale_responses"] == dropped and norm > 0.01 and row["update"] == run.version == 11
    for name, value in metrics.items():
        assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and row["lr"] == c.lr
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name] / max(1, norm), atol=1e-5, rtol=0, msg=name)


def test_ages_from_both_sides_of_the_bound():
    rollout = two_versions()
    ages = staleness(rollout, 10)
    assert set(ages.tolist()) == {1, 2}
    for bound, left in ((0, 32), (1, (ages == 1).sum()), (2, 32)):
        kept = without_stale(rollout, ages, bound)
        assert kept.mask.any(1).sum() == left
        assert torch.equal(kept.mask, rollout.mask & ((ages <= bound) | (bound == 0))[:, None])
        assert torch.equal(kept.fed, rollout.fed)  # routes are replayed as before
    one = replace(rollout, version=10)
    assert staleness(one, 10).tolist() == [0] * 32 and staleness(one, 13).tolist() == [3] * 32


@pytest.mark.parametrize("version, line", [
    (11, r"32 of 32 responses are of policy version 11: the trainer is at 10"),
    (torch.tensor([10] * 31 + [12]), "1 of 32 responses are of policy version 12: the trainer is at 10"),
    (torch.tensor([10] * 31 + [-1]), "1 of 32 responses are of policy version -1"),
    (torch.tensor([10] * 31), r"version of a rollout: \(31,\), expected an int or 32 whole numbers"),
    (torch.full((32, 1), 10), r"version of a rollout: \(32, 1\)"), (torch.full((32,), 10.0), "version of a rollout"),
    (None, "version of a rollout: None"), ("10", "version of a rollout: '10'")])
def test_a_version_that_cannot_be_is_an_error(version, line):
    with pytest.raises(EngineError, match=line):
        staleness(replace(two_versions(), version=version), 10)


def test_nothing_left_ends_the_run_and_keeps_the_weights(group, folder):
    c, policy = Config(**OPTIONS, max_staleness=1), loaded(folder)
    part = replace(prepare_batch(policy, two_versions(), c).split(16)[0], version=1)
    before = [p.full_tensor().clone() for p in policy.parameters()]
    with pytest.raises(RuntimeError, match="none of 16 responses is left .* older than --max-staleness 1"):
        train_step(policy, torch.optim.SGD(policy.parameters(), 0.1), without_stale(part, staleness(part, 10), 1), c,
                   nano.minirl_loss)
    assert all(torch.equal(p.full_tensor(), old) for p, old in zip(policy.parameters(), before))


def test_samples_say_the_version_of_each_response():
    rollout = replace(two_versions(), rewards=torch.zeros(32))
    asked = [SimpleNamespace(id=i, tokens=[3, 4], answer="7") for i in range(8)]
    tokenizer = SimpleNamespace(decode=lambda ids, **options: " ".join(map(str, ids)))
    rows = samples(rollout, asked, tokenizer, "training", 3, [nano.EOS], 6)
    assert [row["version"] for row in rows] == rollout.version[[0, 4, 8]].tolist()
    assert versions(rollout).tolist() == rollout.version.tolist()


# -------------------------------------------------------------- learning rate by effective sample size
@pytest.mark.parametrize("by", ["none", "token", "response"])
def test_the_learning_rate_of_an_update(group, folder, by):
    c, policy = Config(**OPTIONS, lr_by=by), loaded(folder)
    batch = prepare_batch(policy, two_versions(), c)
    optimizer = torch.optim.SGD(policy.parameters(), 0.3)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    run = SimpleNamespace(c=c, version=9, optimizer=optimizer, policy=policy, loss_fn=partial(nano.minirl_loss),
                          phases=Phases(silent=True))
    rows = [train.update(run, part) for part in batch.split(16)]
    for rate, row in zip(rates, rows, strict=True):
        share = {"none": 1, "token": row["effective_sample_size"], "response": row["response_sample_size"]}[by]
        assert rate == row["lr"] == pytest.approx(0.3 * math.sqrt(share))
        assert row["response_sample_size"] < row["effective_sample_size"] < 0.999


def two_ranks(rank, world, folder):
    """An update with both, by a world."""
    join_group(rank, world, folder)
    c, policy = Config(**OPTIONS, max_staleness=1, lr_by="response"), loaded(folder / "hf")
    optimizer = torch.optim.SGD(policy.parameters(), 0.3)
    batch = take(two_versions(), rows_of_rank(32, 2, world, rank))
    run = SimpleNamespace(c=c, version=9, optimizer=optimizer, policy=policy, loss_fn=nano.minirl_loss,
                          phases=Phases(silent=True))
    batch = prepare_batch(policy, batch, c)
    rows = [train.update(run, part) for part in batch.split(len(batch.tokens) // 2)]
    if rank == 0:
        torch.save(rows, folder / f"result-{world}")
    dist.destroy_process_group()


def test_two_ranks_are_one_process(folder, tmp_path):
    (tmp_path / "hf").symlink_to(folder)
    for world in (1, 2):
        run_ranks(two_ranks, world, tmp_path)
    alone, shared = (torch.load(tmp_path / f"result-{n}") for n in (1, 2))
    assert [row["stale_responses"] for row in alone] == [0, int((two_versions().version[16:] == 8).sum())]
    for one, two in zip(alone, shared, strict=True):
        assert one["lr"] < 0.29
        assert one.keys() == two.keys()
        for name in one.keys() - {"score", "score_errors", "sync_difference"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("changes, line", [
    (dict(mini_batches=4, updates=4, max_staleness=2), "--max-staleness 2: give 0, or 3 or more"),
    (dict(max_staleness=-1), "--max-staleness -1: give 0 to"),
    (dict(lr_by="tokens"), "--lr-by tokens: give none or token"),
    (dict(top_p=0.9), "--top-p 0.9: give 1: which tokens it keeps the engine does not say")])
def test_options_that_are_refused(changes, line):
    with pytest.raises(ValueError, match=line):
        Config(**OPTIONS | changes)
    assert Config(**OPTIONS | dict(mini_batches=4, updates=4, max_staleness=3)).max_staleness == 3
