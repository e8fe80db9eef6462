"""The scaled train step against that of the single file: same rollouts, same weights, same numbers."""
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import sample_rollout
from processes import join_group, run_ranks
from torch.distributed.tensor import DTensor

import nano_moe_rl as nano
from scaled import batches, logprobs, metrics, objectives, run, trainer
from scaled.config import Config
from scaled.batches import rows_of_rank, take
from scaled.export import export_nano
from scaled.huggingface import named_weights
from scaled.objectives import OBJECTIVES, load_objective
from scaled.policy import load_policy
from scaled.trainer import move, prepare_batch, train_step

SHAPE = dict(width=64, layers=3, heads=2, kv_heads=1, experts=8, top_k=2, expert_width=24,
             mini_batch=12, group_size=4, eval_prompts=7, temperature=0.8)


def test_the_maths_is_that_of_the_single_file():
    for module, names in ((trainer, ["Rollout"]), (objectives, ["minirl_loss", "group_advantages", "clip_gate"]),
                          (run, ["Rollout", "adamw"]),
                          (batches, ["Rollout"]), (logprobs, ["token_logprobs", "entropy"]),
                          (metrics, ["kl_k3", "extreme_token_fraction", "routing_agreement"])):
        for name in names:
            assert getattr(module, name) is getattr(nano, name), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    export_nano(nano.Model(nano.Config(**SHAPE)), folder)
    return folder


def graded(model, n_prompts=6, precision="fp8"):
    """With rewards that differ within every group, so that every mini-batch has a gradient."""
    rollout = sample_rollout(model, precision, n_prompts)
    rewards = torch.rand(len(rollout.tokens), generator=torch.Generator().manual_seed(0))
    return replace(rollout, rewards=rewards, advantages=nano.group_advantages(rewards, model.config.group_size))


def options(c, **changes):
    names = ("replay", "clip", "clip_low", "clip_high", "importance_sampling", "length_norm", "temperature",
             "mini_batches", "group_size", "lr")
    return Config(**{name: getattr(c, name) for name in names} | dict(
        checkpoint="there", train_data="there", train_precision="fp32", prompts=3, max_prompt=10,
        max_response=30, updates=c.mini_batches, token_budget=100) | changes)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


CASES = [dict(), dict(replay="R2"), dict(replay="none", clip=False), dict(mini_batches=1),
         dict(importance_sampling="sequence"), dict(importance_sampling="staleness", length_norm=True),
         dict(clip_low=0.01, clip_high=0.004)]
# a middle term of each kind of formula; MIS-geometric drops whole responses here
OTHERS = ["GRPO", "GSPO", "CISPO", "IcePop", "MIS-geometric"]


@pytest.mark.parametrize("changes, objective", [(changes, "MiniRL") for changes in CASES]
                         + [({}, name) for name in OTHERS], ids=str)
def test_loss_gradient_and_metrics_are_those_of_the_single_file(group, folder, changes, objective):
    """N = 2 mini-batches with an update between them, so that the second is off-policy."""
    c = nano.Config(**SHAPE | dict(mini_batches=2, updates=2) | changes)
    model = nano.Model(c)
    rollout = graded(model, n_prompts=3 * c.mini_batches)
    policy = load_policy(folder, precision="fp32", logits_bytes=4 * 13 * 7, device="cpu",
                         gradient_checkpointing=False, cpu_offload=False)
    losses = []

    def loss_fn(*tensors, **counts):
        if objective == "MiniRL":
            loss, gate = nano.minirl_loss(
                *tensors, **counts, clip=c.clip, clip_low=c.clip_low, clip_high=c.clip_high,
                length_norm=c.length_norm, importance_sampling=c.importance_sampling)
        else:
            loss, gate = OBJECTIVES[objective].loss(*tensors, **counts)
        losses.append(loss.item())
        return loss, gate

    # SGD, whose step is the gradient: Adam would turn a difference of rounding into one of sign
    sgd = torch.optim.SGD(model.parameters(), 0.3), torch.optim.SGD(policy.parameters(), 0.3)
    gradients = {}  # as the step sees them: clipped
    sgd[1].register_step_pre_hook(lambda *_: gradients.update(
        (n.removeprefix("model."), whole(p.grad).clone()) for n, p in policy.model.named_parameters()))
    s = options(c, objective=objective)
    scaled_loss = partial(load_objective(objective).loss, **load_objective(objective).options(s))
    ours, theirs = prepare_batch(policy, rollout, s), nano.prepare_batch(model, rollout)
    for part, other in zip(ours.split(12), theirs.split(12), strict=True):
        got = train_step(policy, sgd[1], part, s, scaled_loss)
        expected = nano.train_step(model, sgd[0], other, loss_fn)
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert got["loss"] == pytest.approx(losses[-1], rel=1e-5, abs=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=0, msg=name)
        assert expected["grad_norm"] > 1e-3
    assert expected["staleness_kl"] > 1e-6 or c.mini_batches == 1
    if c.clip_high < 0.01:
        assert expected["clip_fraction"] > 0.01


def test_a_loss_that_is_not_finite_keeps_the_weights(group, folder):
    c = nano.Config(**SHAPE | dict(mini_batches=1, updates=1))
    policy = load_policy(folder, precision="fp32", logits_bytes=10**6, device="cpu",
                         gradient_checkpointing=False, cpu_offload=False)
    rollout = graded(nano.Model(c), n_prompts=3)
    rollout.rollout_logprobs[rollout.mask] = float("nan")
    batch = prepare_batch(policy, rollout, options(c))
    before = [whole(p).clone() for p in policy.parameters()]
    with pytest.raises(FloatingPointError, match="nan"):
        train_step(policy, torch.optim.SGD(policy.parameters(), 0.1), batch, options(c), nano.minirl_loss)
    assert all(torch.equal(whole(p), old) for p, old in zip(policy.parameters(), before))


def test_r3_without_a_route_for_every_token_is_an_error_with_the_count(group, folder):
    c = nano.Config(**SHAPE | dict(mini_batches=2, updates=2))
    policy = load_policy(folder, precision="fp32", logits_bytes=10**6, device="cpu",
                         gradient_checkpointing=False, cpu_offload=False)
    rollout = graded(nano.Model(c))
    rollout.routing[1, 2] = 0  # one token, all three layers
    assert metrics.missing_routes(rollout) == 3
    with pytest.raises(ValueError, match="3 of"):
        prepare_batch(policy, rollout, options(c, token_budget=10**5))


def test_sums_are_not_means_of_means():
    """Two passes of unlike size: the metrics are those of all tokens together."""
    c = nano.Config(**SHAPE | dict(mini_batches=1, updates=1))
    model = nano.Model(c)
    whole_batch = graded(model, precision="int4")
    generator = torch.Generator().manual_seed(0)
    shape = whole_batch.rollout_logprobs.shape
    logprobs = whole_batch.rollout_logprobs + 0.9 * torch.randn(shape, generator=generator)
    old = whole_batch.rollout_logprobs + 0.2 * torch.randn(shape, generator=generator)
    entropies, gate = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator) < 0.7
    routing = whole_batch.routing.roll(1, 0)
    sums = metrics.Sums()
    for rows in ([0, 1, 2, 3, 4], list(range(5, 24))):
        part = batches.take(whole_batch, rows)
        T = part.tokens.shape[1] - 1
        sums.add_pass(part, *(x[rows][:, :T] for x in (logprobs, old, entropies, routing, gate)))
    got, mask, mu = sums.over_ranks(), whole_batch.mask, whole_batch.rollout_logprobs
    fed = whole_batch.fed
    truncated = sum(math.exp(x - y) > 5 for x, y in zip(logprobs[mask].tolist(), mu[mask].tolist()))
    assert truncated > 3
    products = [math.prod(math.exp(x) for x in row[m].tolist()) for row, m in zip((logprobs - mu).double(), mask)]
    expected = dict(
        reward=whole_batch.rewards.mean(), entropy=entropies[mask].mean(),
        mismatch_kl=nano.kl_k3(mu, old, mask), staleness_kl=nano.kl_k3(old, logprobs, mask),
        extreme_token_fraction=nano.extreme_token_fraction(old, mu, mask),
        effective_sample_size=nano.effective_sample_size(logprobs - mu, mask),
        response_sample_size=torch.tensor(products).sum()**2 / 24 / torch.tensor(products).square().sum(),
        routing_agreement=nano.routing_agreement(routing, whole_batch.routing, fed),
        clip_fraction=1 - gate[mask].double().mean(),
        dropped_responses=1 - torch.tensor([g[m].any() for g, m in zip(gate, mask)]).double().mean(),
        weight_truncated_fraction=truncated / mask.sum(),
        response_length=(whole_batch.lengths - whole_batch.prompt_lengths).double().mean())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value.tolist(), rel=1e-6), name


def share(rank, world, path, N):
    """This rank's rows of a saved rollout batch, and options that make N mini-batches of it."""
    whole_batch = torch.load(path, weights_only=False)
    c = options(nano.Config(**SHAPE | dict(mini_batches=N, updates=N)), token_budget=60)
    return take(whole_batch, rows_of_rank(len(whole_batch.tokens), N, world, rank)), c


def two_batches(rank, world, folder):
    """Three updates by a world: N = 2 off-policy, then one on-policy, rows shared out to the ranks."""
    join_group(rank, world, folder)
    policy = load_policy(folder / "hf", precision="fp32", logits_bytes=10**5, device="cpu",
                         gradient_checkpointing=True, cpu_offload=False)
    # SGD as above; with AdamW test_policy.py compares the weights
    optimizer, history = torch.optim.SGD(policy.parameters(), 0.3), []
    for N, name in ((2, "off"), (1, "on")):
        part, c = share(rank, world, folder / name, N)
        batch = prepare_batch(policy, part, c)
        history += [train_step(policy, optimizer, mini, c, nano.minirl_loss)
                    for mini in batch.split(len(batch.tokens) // N)]
    weights = {name: x.clone() for name, x in named_weights(policy)}
    if rank == 0:
        torch.save((history, weights), folder / f"result-{world}")
    dist.destroy_process_group()


def test_two_ranks_are_one_process(folder, tmp_path):
    """Same metrics, loss, gradient norm and weights, with the long responses all on one rank."""
    (tmp_path / "hf").symlink_to(folder)
    for name, n in (("off", 6), ("on", 3)):
        rollout = graded(nano.Model(nano.Config(**SHAPE)), n_prompts=n)
        # within a mini-batch of 12 rows: first the long ones
        order = torch.cat([12 * i + rollout.lengths[12 * i:12 * i + 12].argsort(descending=True)
                           for i in range(n // 3)])
        torch.save(take(rollout, order.tolist()), tmp_path / name)
    for world in (1, 2):
        run_ranks(two_batches, world, tmp_path)
    (alone, weights), (shared, others) = (torch.load(tmp_path / f"result-{n}") for n in (1, 2))
    assert len(alone) == len(shared) == 3
    for one, two in zip(alone, shared):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert alone[1]["staleness_kl"] > 1e-7
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], atol=1e-5, rtol=0, msg=name)


def updates_between_moves(rank, world, folder, moved):
    """Three updates by AdamW, between which the trainer goes and comes back. There is one device here, so
    every copy to a device is made to be a copy."""
    join_group(rank, world, folder / moved)
    policy = load_policy(folder / "hf", precision="bf16", logits_bytes=10**5, device="cpu",
                         gradient_checkpointing=True, cpu_offload=False)
    optimizer, parameters, to = nano.adamw(policy, 1e-3), list(policy.parameters()), torch.Tensor.to
    part, c = share(rank, world, folder / "batch", 1)
    for _ in range(3):
        metrics = train_step(policy, optimizer, prepare_batch(policy, part, c), c, nano.minirl_loss)
        if moved == "moved":
            states = [x for state in optimizer.state.values() for x in state.values()]
            before = [x.to_local() if isinstance(x, DTensor) else x for x in parameters + states]
            torch.Tensor.to = lambda x, *args, **options: to(x, *args, **options | dict(copy=True))
            move(policy, optimizer, "cpu")
            torch.Tensor.to = to
            states = [x for state in optimizer.state.values() for x in state.values()]
            after = [x.to_local() if isinstance(x, DTensor) else x for x in parameters + states]
            assert len(after) == 4 * len(parameters)  # step and two moments for each
            assert all(x.data_ptr() != y.data_ptr() for x, y in zip(before, after) if x.numel())
    assert all(x is y for x, y in zip(parameters, policy.parameters()))
    weights = {name: x.clone() for name, x in named_weights(policy)}
    if rank == 0:
        torch.save((metrics, weights), folder / f"result-{moved}")
    dist.destroy_process_group()


def test_a_trainer_that_leaves_and_comes_back_is_the_same(folder, tmp_path):
    (tmp_path / "hf").symlink_to(folder)
    rollout = graded(nano.Model(nano.Config(**SHAPE)), n_prompts=3)
    torch.save(rollout, tmp_path / "batch")
    for moved in ("stayed", "moved"):
        (tmp_path / moved).mkdir()
        run_ranks(updates_between_moves, 2, tmp_path, moved)
    stayed, moved = (torch.load(tmp_path / f"result-{name}") for name in ("stayed", "moved"))
    assert stayed[0] == moved[0] and stayed[0]["grad_norm"] > 0
    for name, weight in stayed[1].items():
        assert torch.equal(weight, moved[1][name]), name
