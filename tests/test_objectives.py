"""The objectives beside MiniRL, token by token."""

import math

import pytest
import torch
from conftest import ROOT  # noqa: F401  puts the tutorials on the path

import nano_moe_rl as nano
from scaled import objectives
from scaled.config import Config

B, T, G = 6, 5, 3


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logprobs, old, rollout = (-2 * torch.rand(B, T, generator=generator) for _ in range(3))
    mask = torch.arange(T) < torch.tensor([5, 3, 1, 4, 2, 2])[:, None]
    return logprobs.requires_grad_(), old, rollout, torch.randn(B, generator=generator), mask


def clipped(ratio, advantage, low, high):
    """The objective min(r Â, clip(r) Â) and its derivative in log r."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    if ratio * advantage <= bounded * advantage:
        return ratio * advantage, ratio * advantage
    return bounded * advantage, 0.0


def slow(name, logprobs, old, rollout, advantages, mask):
    """Each objective, a token at a time -> loss, gradient in logprobs."""
    loss, gradient, n_tokens = 0.0, torch.zeros(B, T), int(mask.sum())
    for i in range(B):
        tokens, advantage = [t for t in range(T) if mask[i, t]], advantages[i].item()
        if name == "gspo":
            ratio = math.exp(sum((logprobs[i, t] - old[i, t]).item() for t in tokens) / len(tokens))
            value, slope = clipped(ratio, advantage, 3e-4, 4e-4)
            loss -= value / B
        for t in tokens:
            ratio = math.exp(logprobs[i, t] - old[i, t])
            if name == "grpo":
                value, slope = clipped(ratio, advantage, 0.2, 0.27)
                loss, gradient[i, t] = loss - value / len(tokens) / B, -slope / len(tokens) / B
            elif name == "cispo":
                gradient[i, t] = -min(max(ratio, 0.8), 1.27) * advantage / n_tokens
                loss += (gradient[i, t] * logprobs[i, t]).item()
            elif name == "gspo":
                gradient[i, t] = -slope / len(tokens) / B
            elif name == "icepop":
                gap = math.exp(old[i, t] - rollout[i, t])
                clip = advantage > 0 and ratio > 1.27 or advantage < 0 and ratio < 0.8
                if 0.5 <= gap <= 5 and not clip:
                    gradient[i, t] = -min(ratio, 5) * gap * advantage / B
                    loss += (gradient[i, t] * logprobs[i, t]).item()
            else:
                pi, mu = math.exp(logprobs[i, t]), math.exp(rollout[i, t])
                pushed_on = advantage > 0 and pi > mu or advantage < 0 and pi < mu
                if not (pushed_on and abs(pi - mu) > 0.15):
                    gradient[i, t] = -min(pi / mu, 5) * advantage / B
                    loss += (gradient[i, t] * logprobs[i, t]).item()
    return loss, gradient


@pytest.mark.parametrize("name", ["grpo", "cispo", "gspo", "dppo", "icepop"])
def test_objectives_against_a_token_at_a_time(case, name):
    logprobs, *_, mask = case
    loss, gate = getattr(objectives, f"{name}_loss")(*case, n_sequences=B, n_tokens=int(mask.sum()))
    loss.backward()
    expected, gradient = slow(name, *(x.detach() for x in case))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logprobs.grad, gradient)
    assert gate.shape == mask.shape and gate.dtype == torch.bool
    assert torch.equal(gate[mask], (gradient != 0)[mask])
    assert name == "cispo" or not gate[mask].all(), "the case needs tokens without gradient"


@pytest.mark.parametrize("name", ["grpo", "cispo", "gspo", "dppo", "icepop"])
def test_padding_has_no_influence_on_objectives(case, name):
    *_, advantages, mask = case
    loss_fn, kwargs = getattr(objectives, f"{name}_loss"), dict(n_sequences=B, n_tokens=int(mask.sum()))
    spoiled = [x.detach().masked_fill(~mask, math.nan) for x in case[:3]]
    spoiled[0].requires_grad_()
    loss, _ = loss_fn(*spoiled, advantages, mask, **kwargs)
    loss.backward()
    assert torch.equal(loss.detach(), loss_fn(*case, **kwargs)[0].detach())
    assert spoiled[0].grad[~mask].abs().max() == 0


def test_standardised_advantages():
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1])
    expected = [(1 - 1 / 3) / math.sqrt(2 / 9), *[-(1 / 3) / math.sqrt(2 / 9)] * 2, 0, 0, 0]
    advantages = objectives.standardised_advantages(rewards, G)
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=1e-4, atol=0)


# ------------------------------------------------------ masks: at, below and above each threshold
def minirl_of(kept, log_gap, advantage):
    """Gradient of MiniRL in log π, for one response of which `kept` tokens remain, of two responses in all."""
    return [-min(math.exp(x), 5) * advantage / 2 * keep for x, keep in zip(log_gap, kept)]


MASKS = [  # name, ρ of each token, advantage, which tokens stay
    ("MIS-token", [0.5, 0.49999, 2.0, 2.00001, 1.0], 1.0, [1, 0, 1, 0, 1]),
    ("MIS", [2.0, 1.0, 1.0, 1.0], 1.0, [1] * 4), ("MIS", [2.0, 1.0001, 1.0], 1.0, [0] * 3),
    ("MIS", [4.0, 0.5, 0.9], 1.0, [1] * 3), ("MIS", [1e-9, 1.0], 1.0, [1] * 2),
    ("MIS-geometric", [1.001, 1.00099], 1.0, [1] * 2), ("MIS-geometric", [1.0012, 1.0009], 1.0, [0] * 2),
    ("MIS-geometric", [0.9901, 0.9901, 0.9901], 1.0, [1] * 3), ("MIS-geometric", [0.98, 0.99], 1.0, [0] * 2),
    ("MIS-geometric", [2.0, 0.5], 1.0, [1] * 2),  # a mean hides what cancels
    ("OPSM", [math.exp(-0.0999)] * 3, -1.0, [1] * 3), ("OPSM", [math.exp(-0.1001)] * 3, -1.0, [0] * 3),
    ("OPSM", [math.exp(-0.5)] * 3, 1.0, [1] * 3), ("OPSM", [math.exp(0.5)] * 3, -1.0, [1] * 3),
    ("veto", [1.01e-4, 1.0, 3.0], 1.0, [1] * 3), ("veto", [0.99e-4, 1.0, 3.0], 1.0, [0] * 3),
    ("IcePop", [0.501, 0.499, 4.99, 5.01], 1.0, [1, 0, 1, 0]),
]


@pytest.mark.parametrize("name, gaps, advantage, kept", MASKS)
def test_masks_at_their_thresholds(name, gaps, advantage, kept):
    """On-policy: π_θ is π_old, so the gap of the engines is all there is. Another response stands beside, untouched."""
    n = len(gaps)
    log_gap = [math.log(gap) for gap in gaps]
    mask = torch.arange(n + 1) < torch.tensor([n, 1])[:, None]  # of padding nothing may be seen
    mu = torch.zeros(2, n + 1, dtype=torch.double).masked_fill(~mask, math.nan)
    old = mu.clone()
    old[0, :n] = torch.tensor(log_gap, dtype=torch.double)
    logprobs = old.clone().requires_grad_()
    loss, gate = objectives.OBJECTIVES[name].loss(
        logprobs, old, mu, torch.tensor([advantage, 1.0]), mask, n_sequences=2, n_tokens=n + 1)
    loss.backward()
    assert logprobs.grad[0, :n].tolist() == pytest.approx(minirl_of(kept, log_gap, advantage), rel=1e-6)
    assert logprobs.grad[1, 0].item() == pytest.approx(-0.5) and logprobs.grad[~mask].abs().max() == 0
    assert gate[0, :n].tolist() == [bool(keep) for keep in kept] and gate[1, 0]


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_trains_the_single_file_and_takes_options_or_refuses_them(name):
    c = nano.Config(width=32, heads=1, layers=2, experts=4, expert_width=8, max_digits=4, mini_batch=16, group_size=4,
                    mini_batches=2, updates=2, eval_prompts=8, eval_every=2)
    objective, model, rows = objectives.load_objective(name), nano.Model(c), [{"update": 0}]
    nano.learn(model, nano.adamw(model, 1e-3), rows, objective.loss, objective.advantages)
    assert len(rows) == 3 and all(0 <= row["dropped_responses"] <= 1 for row in rows[1:])
    s = Config(checkpoint="a", train_data="b", objective=name)
    assert objective.options(s).keys() <= set(objectives.OPTIONS)
    changed = Config(checkpoint="a", train_data="b", objective=name, length_norm=True)
    if name == "MiniRL":
        assert objective.options(changed)["length_norm"] is True
    else:
        with pytest.raises(ValueError, match=f"^--length-norm True: --objective {name} would ignore it; leave it out$"):
            objective.options(changed)


def test_an_objective_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def loss(*tensors, n_sequences, n_tokens): ...\ndef short(*tensors): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = objectives.load_objective("mine:loss")
    assert own.loss.__name__ == "loss" and own.advantages is nano.group_advantages
    for name, line in (("PPO", "give MiniRL or GRPO"), ("mine:nothing", "AttributeError"),
                       ("nowhere:loss", "No module"), ("mine:short", "takes no n_sequences and no n_tokens")):
        with pytest.raises(ValueError, match=f"--objective {name}.*{line}"):
            objectives.load_objective(name)


def test_random_drop_drops_as_many_tokens_as_the_gate_and_weighs_the_rest_as_minirl(case):
    logprobs, old, rollout, advantages, mask = case
    counts = dict(n_sequences=B, n_tokens=int(mask.sum()))
    wanted = (~nano.clip_gate(logprobs, old, advantages) & mask).sum()
    whole, _ = nano.minirl_loss(*case, **counts, clip=False)
    gradient, = torch.autograd.grad(whole, logprobs)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        loss, gate = objectives.random_drop_loss(*case, **counts)
        dropped = ~gate & mask
        assert dropped.sum() == wanted > 0
        seen.add(tuple(dropped.flatten().tolist()))
        torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], gradient * gate)
    assert len(seen) > 1
