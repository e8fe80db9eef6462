"""What each correction does to the gradient, without training: its bias, and its signal to noise.

At one trained policy θ the gradient of an estimator is taken from many independent batches, and so is
that of plain REINFORCE on-policy in fp32, the reference. From the inner products of batches, different
ones only, follow without the sampling noise: the cosine with the reference (1: no bias in direction),
the length relative to it, and how much of one batch is signal. Beside it stands the cosine with the
gradient of the policy that is deployed: REINFORCE on what θ samples in the inference engine, through
the experts that this chose (how θ moves the choice itself is in no estimator).
"""
from dataclasses import replace
from functools import partial

import numpy as np
import torch

import nano_moe_rl as nano
from figures import intervals
from figures.grid import BASE, LITTLE, QUICK
from figures.runner import REVISION, cold_start, start_config
from scaled import objectives

SEED, BATCHES, RESPONSES, UPDATES = 950, 24, 1024, 64
STALE = 16  # updates between rollout and θ, in the dial of staleness
DIALS = {"int4": dict(rollout_precision="int4"), "router noise .8": dict(rollout_precision="fp8", router_noise=0.8),
         "stale": dict(rollout_precision="fp8")}
TOKEN = partial(nano.minirl_loss, clip=False)
NO_IS, SEQUENCE = (partial(TOKEN, importance_sampling=weight) for weight in ("staleness", "sequence"))
ESTIMATORS = {  # name: (loss, replay)
    "token weight": (TOKEN, "none"), "no IS": (NO_IS, "none"), "sequence weight": (SEQUENCE, "none"),
    "IcePop": (partial(objectives.icepop_loss, clip=False), "none"),
    "R3": (TOKEN, "R3"), "R3, no IS": (NO_IS, "R3"), "R3, sequence weight": (SEQUENCE, "R3"),
}
OFF_POLICY = ESTIMATORS | {  # what matters only where weights are stale
    "token weight, clip": (nano.minirl_loss, "none"), "R2": (TOKEN, "R2"), "R2, clip": (nano.minirl_loss, "R2"),
    "R3, clip": (nano.minirl_loss, "R3")}


def trained(quick: bool) -> tuple[nano.Model, nano.Model]:
    """θ_old, after some updates of the base recipe, and θ, STALE unclipped updates later."""
    options = BASE | dict(replay="none", mini_batches=1, updates=UPDATES, eval_every=999)
    c = nano.Config(seed=SEED, name="figures", **options)
    if quick:
        c = replace(c, **QUICK | dict(updates=2))
    state, *_ = torch.load(cold_start(start_config(c), quick))
    old = nano.Model(c)
    old.load_state_dict(state)
    optimizer = nano.adamw(old, c.lr)
    nano.learn(old, optimizer, [{"update": 0}])
    new = nano.Model(replace(c, mini_batches=STALE, updates=STALE, clip=False, warmup=1))
    new.load_state_dict(old.state_dict())
    stale_optimizer = nano.adamw(new, c.lr)
    stale_optimizer.load_state_dict(optimizer.state_dict())
    nano.learn(new, stale_optimizer, [{"update": 0}])
    return old, new


def rollout(model: nano.Model, precision: str, noise: float, seed: int, responses: int) -> nano.Rollout:
    c = model.config
    batch = nano.sample(nano.InferenceEngine(model, precision, noise), responses // c.group_size, c.group_size, seed)
    batch.advantages = nano.group_advantages(batch.rewards, c.group_size)
    return batch


def prepared(old: nano.Model, batch: nano.Rollout, replay: str) -> nano.Rollout:
    """π_old and the experts to replay, as nano.prepare_batch has them at N > 1."""
    options = old.config
    old.config = replace(options, replay=replay, mini_batches=LITTLE, updates=LITTLE, mini_batch=len(batch.tokens))
    try:
        return nano.prepare_batch(old, batch)
    finally:
        old.config = options


def gradient(model: nano.Model, batch: nano.Rollout, loss_fn) -> torch.Tensor:
    logprobs = nano.policy(model, batch)[0]
    mask = batch.mask
    loss, _ = loss_fn(logprobs, batch.old_logprobs, batch.rollout_logprobs, batch.advantages, mask,
                      n_sequences=len(mask), n_tokens=int(mask.sum()))
    parameters = [p for p in model.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def between(gram: np.ndarray) -> float:
    """Mean inner product of different batches: the squared length of the expected gradient."""
    n = len(gram)
    return (gram.sum() - np.trace(gram)) / (n * (n - 1))


def statistics(gram: np.ndarray) -> np.ndarray:
    """gram (2, n, 2, n) of an estimator's and the reference's batches -> cosine, length, signal to noise."""
    own, reference = between(gram[0, :, 0]), between(gram[1, :, 1])
    noise = np.trace(gram[0, :, 0]) / gram.shape[1] - own
    own, reference, noise = (max(x, 1e-30) for x in (own, reference, noise))  # a length that noise made negative
    return np.array([gram[0, :, 1].mean() / (own * reference) ** 0.5, (own / reference) ** 0.5, (own / noise) ** 0.5])


def measured(gradients: torch.Tensor, reference: torch.Tensor) -> dict[str, list[float]]:
    """Each statistic with its interval, by the jackknife over batches."""
    both = torch.cat([gradients, reference]).double()
    n = len(gradients)
    gram = (both @ both.T).reshape(2, n, 2, n).numpy()
    without = [statistics(np.delete(np.delete(gram, k, 1), k, 3)) for k in range(n)]
    pseudo = n * statistics(gram) - (n - 1) * np.array(without)
    of = zip(("cosine", "length", "snr"), map(intervals.mean, pseudo.T))
    return {name: [float(f"{x:.4g}") for x in (i.mean, i.low, i.high)] for name, i in of}


def measure(quick: bool = False, done: dict | None = None, keep=lambda rows: None) -> dict:
    """Rows by (dial | estimator), those of done kept; keep is called after each dial."""
    torch.set_num_threads(1)
    n, responses = (3, 64) if quick else (BATCHES, RESPONSES)
    rows, (old, new) = dict(done or {}), trained(quick)
    for dial, options in DIALS.items():
        estimators = OFF_POLICY if dial == "stale" else ESTIMATORS
        if all(f"{dial} | {name}" in rows for name in estimators):
            continue
        theta = new if dial == "stale" else old
        engine = options["rollout_precision"], options.get("router_noise", 0.0)
        gradients = {name: [] for name in (*estimators, "reference", "again", "deployed")}
        for k in range(n):
            for name, seed in (("reference", 10**6 + k), ("again", 2 * 10**6 + k)):  # the second: the ceiling
                batch = rollout(theta, "fp32", 0.0, seed, responses)
                gradients[name].append(gradient(theta, prepared(theta, batch, "none"), TOKEN))
            batch = rollout(theta, *engine, 3 * 10**6 + k, responses)
            gradients["deployed"].append(gradient(theta, prepared(theta, batch, "R3"), NO_IS))
            batch = rollout(old, *engine, k, responses)
            for name, (loss_fn, replay) in estimators.items():
                gradients[name].append(gradient(theta, prepared(old, batch, replay), loss_fn))
        reference, deployed = (torch.stack(gradients.pop(name)) for name in ("reference", "deployed"))
        for name, of in gradients.items():
            key = f"{dial} | {'ceiling' if name == 'again' else name}"
            rows[key] = measured(of := torch.stack(of), reference) | {
                "deployed": measured(of, deployed)["cosine"], "batches": n, "responses": responses,
                "revision": REVISION}
        keep(rows)
    return rows
