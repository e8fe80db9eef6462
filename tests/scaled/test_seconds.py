"""Seconds of a plan: operations as torch counts them, a simulated engine, and what a run measured."""
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import nano_moe_rl as nano
from scaled.config import read_config
from scaled.facts import MODELS
from scaled.machine import Machine
from scaled.rates import MEASURED, read_rates
from scaled.seconds import CAPTURE, PHASES, Seconds
from scaled.sizes import count, measure, read_configuration, shard

CONFIGURATIONS = Path(nano.__file__).parent / "scaled/configs"


def node(machine={}, **changes):
    """The recipe for a node, on H200s."""
    c = read_config(str(CONFIGURATIONS / "qwen3_30b_a3b.toml"), changes)
    return Seconds(c, Machine(**dict(gpu="h200") | machine), measure(*read_configuration(c, "")))


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "OLMoE-1B-7B", "Mixtral-8x7B", "Qwen1.5-MoE-A2.7B"])
def test_operations_of_a_token_as_torch_counts_them(name, monkeypatch):
    """torch counts attention over whole rows, of which a token on average sees half: rows of T here, and there
    prompt and response of T each."""
    published, T = MODELS[name], 96
    config = tf.AutoConfig.for_model(published.model_type, **published.config | dict(num_hidden_layers=2))
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None)  # asks values
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        model.set_experts_implementation("batched_mm")  # its kinds of product are those that torch counts,
        model.set_attn_implementation("eager")  # and so are this one's
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, T, dtype=torch.long), use_cache=False)
    c = read_config(str(CONFIGURATIONS / "qwen3_30b_a3b.toml"), {})
    plan = Seconds(c, Machine(mean_prompt=float(T), mean_response=float(T)), measure(name, "", config))
    assert plan.forward_flops * T == pytest.approx(counter.get_total_flops(), rel=1e-3)  # norms are no products


def test_training_is_bound_by_the_slower_of_two():
    plan = node(cpu_offload=False)
    tokens, rate = 64 * 16 * (512 + 32768 / 3), 989e12 * 0.2 * 8
    assert plan.computing(1) == pytest.approx(tokens * plan.forward_flops / rate)
    assert plan.passes == 128 // (33792 // (512 + 32768 / 3)) == 64
    assert plan.gathering(1) == pytest.approx(64 * 30.532e9 * 7 / 8 / (450e9 * 0.8), rel=1e-3)
    adam = 28 * shard(plan.s.shapes, 8) / 4.8e12
    assert plan.train() == pytest.approx(plan.computing(4) + adam) and plan.old() == pytest.approx(plan.computing(1))
    slow = node(dict(nvlink_gb_s=5.0), cpu_offload=False)
    assert slow.train() == pytest.approx(slow.gathering(8) + adam) and slow.old() == pytest.approx(slow.gathering(2))
    assert node(cpu_offload=False, gradient_checkpointing=False).train() == pytest.approx(plan.computing(3) + adam)
    assert node(cpu_offload=False, mini_batches=1).old() == 0
    host = 64e9 * 0.8
    own = shard(plan.s.shapes, 8)
    assert node().train() == pytest.approx(plan.computing(4) + (64 * 12 + 28) * own / host)
    assert node().old() == pytest.approx(plan.computing(1) + 64 * 4 * own / host)
    both = node(dict(gpus=16), cpu_offload=False)  # over two nodes eight adapters of 50 are less than NVLink
    assert both.m.link == pytest.approx(8 * 50e9 * 0.8)


def test_a_step_reads_the_experts_that_some_token_is_sent_to():
    """The expected share of experts that are hit, over all choices of two tokens."""
    silent = dict(step_ms=0.0, reduce_us=0.0, nvlink_gb_s=1e9)
    plan = node(silent)
    E, A, b = 5, 2, 2
    small = replace(plan, s=replace(plan.s, n_experts=E, top_k=A))
    pairs = list(itertools.product(itertools.combinations(range(E), A), repeat=b))
    share = sum(len(set().union(*pair)) for pair in pairs) / len(pairs) / E
    read = count(plan.s.experts) * share
    rest = plan.s.total - count(plan.s.experts) - 151936 * 2048
    matrices = sum(layer.matrices for layer in plan.s.layers)
    cache = b * (512 + 32768 / 6) * 98304
    assert small.step(b) == pytest.approx((read + 2 * rest - matrices + cache) / (4.8e12 * 2 * 0.5))
    bound = node(silent | dict(fp8_tflops=1.0, step_ms=7.0))  # by products instead
    assert bound.step(3) == pytest.approx(3 * bound.forward_flops / (1e12 * 2 * 0.5) + 0.007)
    # 96 all-reduces of b tokens of 2048 bf16 numbers, which pass each of two GPUs twice
    reduces = 96 * (15e-6 + 2 * b * 2048 * 2 / (450e9 * 0.8))
    assert node(dict(step_ms=0.0)).step(b) - plan.step(b) == pytest.approx(reduces, rel=1e-3)
    assert node(dict(step_ms=0.0), tensor_parallel=1).step(b) == pytest.approx(2 * plan.step(b), rel=1e-3)


def simulate(n, b, lengths):
    """Steps of an engine that runs b responses at once and starts the next when one ends."""
    waiting, running, steps, produced = list(lengths(n)), [], 0, 0
    while waiting or running:
        while waiting and len(running) < b:
            running.append(waiting.pop(0))
        steps += 1
        produced += len(running)
        running = [left - 1 for left in running if left > 1]
    return steps, produced / steps


@pytest.mark.parametrize("n, b", [(64, 64), (64, 16), (40, 8)])
def test_steps_are_those_of_an_engine_that_refills(n, b, monkeypatch):
    """All but the last response at the mean length, and the last at the limit."""
    r, limit = 20, 50
    steps, running = simulate(n, b, lambda n: [r] * (n - 1) + [limit])
    plan = node(dict(mean_response=float(r), mean_prompt=1e-9), max_response=limit)
    monkeypatch.setattr(Seconds, "running", lambda t, sequences: b)
    monkeypatch.setattr(Seconds, "step", lambda t, at_once: at_once)  # so that the product is all tokens
    assert r * n / b + limit - r == pytest.approx(steps, rel=0.06)
    assert plan.sampling(n, 0) / CAPTURE == pytest.approx(r * n) == pytest.approx(steps * running, rel=0.06)


def test_how_many_run_at_once():
    plan = node()
    mean = 512 + 32768 / 3
    assert plan.running(1e9) == pytest.approx(plan.memory.cached_tokens / mean)
    assert plan.running(3) == 3
    roomy = dict(mean_response=10.0, mean_prompt=10.0)
    assert node(roomy).running(1e9) == 1024
    assert node(roomy | dict(gpu="a100"), rollout_precision="bf16").running(1e9) == 256


def test_other_phases_and_the_sum():
    plan = node()
    own, host = shard(plan.s.shapes, 8), 64e9 * 0.8
    assert plan.reward() == pytest.approx(64 * 16 * 0.005 / 4)  # four engines grade at once
    assert plan.sync() == pytest.approx((28 * own / 360e9 + 18867 * 0.3e-3 + 4 * own / host) / 4)
    assert plan.save() == pytest.approx(24 * 30.532e9 / 2e9 / 20, rel=1e-3)
    assert node(eval_data="").score() == 0 < plan.score()
    assert plan.score() == pytest.approx(plan.sampling(90 / 4, 90 / 4) / 20)
    assert tuple(plan.phases()) == PHASES and plan.total == pytest.approx(sum(getattr(plan, x)() for x in PHASES))
    assert plan.gpu_hours == pytest.approx(200 * plan.total * 8 / 3600) and plan.cost == pytest.approx(
        plan.gpu_hours * 4)


# ---------------------------------------------------------------------------------- measured rates
@pytest.fixture
def run(tmp_path):
    """A run's folder, in which the second and third rollout batch took what `seconds` says."""
    c = node().c
    rows, seconds = [], dict(rollout=500.0, reward=2.0, old=60.0, train=400.0, sync=4.0)
    for update in range(12):
        first = update < 4  # slower: kernels are compiled
        row = {f"{name}_seconds": x * (3 if first else 1) for name, x in seconds.items()}
        row["seconds"] = sum(row.values())
        row |= dict(update=update + 1, response_length=14400.0 + 200 * (update % 2))
        tokens = 64 * 16 * (300 + 14500)
        rows.append(row | {"tokens_per_second_per_device": tokens / 8 / row["seconds"]})
    (tmp_path / "config.json").write_text(json.dumps(asdict(c)))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path, seconds


def measured(run, plan):
    rates = read_rates(plan.c, replace(plan.m, metrics=str(run / "metrics.jsonl")), plan.s)
    m = replace(plan.m, mean_prompt=rates.mean_prompt, mean_response=rates.mean_response)
    return rates, replace(plan, m=m, factors=rates.factors)


def test_a_plan_of_the_same_run_has_its_seconds(run):
    folder, seconds = run
    rates, plan = measured(folder, node())
    assert {name: plan.phases()[name] for name in MEASURED} == pytest.approx(seconds)
    assert (rates.mean_prompt, rates.mean_response) == (pytest.approx(300), 14500)
    assert rates.updates == 8 and rates.unlike == ()


def test_what_was_measured_scales_what_was_not(run):
    folder, seconds = run
    stated = node(dict(mean_prompt=300.0, mean_response=14500.0))
    rates, plan = measured(folder, node(prompts=128, mini_batches=1))
    other = node(dict(mean_prompt=300.0, mean_response=14500.0), prompts=128, mini_batches=1)
    assert rates.unlike == ("prompts", "mini_batches")
    for name in ("rollout", "train"):
        assert plan.phases()[name] == pytest.approx(
            seconds[name] * getattr(other, name)() / getattr(stated, name)())
    assert plan.phases()["score"] == pytest.approx(other.score() * seconds["rollout"] / stated.rollout())
    assert plan.phases()["save"] == other.save()


def test_a_phase_that_did_not_happen_is_like_another(run):
    """N = 1 has no old pass: its rate is that of training."""
    folder, seconds = run
    options = json.loads((folder / "config.json").read_text()) | {"mini_batches": 1}
    (folder / "config.json").write_text(json.dumps(options))
    lines = (folder / "metrics.jsonl").read_text().splitlines(True)
    (folder / "metrics.jsonl").write_text("".join(lines[3:]))
    rates, plan = measured(folder, node())
    assert "old" not in rates.factors
    assert plan.phases()["old"] == pytest.approx(plan.old() * rates.factors["train"])


@pytest.mark.parametrize("damage, line", [
    (lambda folder: (folder / "metrics.jsonl").unlink(), "cannot be read"),
    (lambda folder: (folder / "metrics.jsonl").write_text(""), "no update yet"),
    (lambda folder: (folder / "metrics.jsonl").open("a").write("[1]\n"), "line 13 lacks a number"),
    (lambda folder: (folder / "metrics.jsonl").open("a").write('{"update": 13, "seconds": "\x1b[31m"}\n'), "line 13"),
    (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe"), "cannot be read"),
    (lambda folder: (folder / "config.json").unlink(), "does not say what was run .No such file"),
    (lambda folder: (folder / "config.json").write_text("[" * 100_000), "does not say what was run"),
    (lambda folder: (folder / "config.json").write_text('{"\x1b[31m": 1}'), r"does not say what was run"),
    (lambda folder: (folder / "config.json").write_text(json.dumps(
        asdict(node().c) | {"checkpoint": "checkpoints/OLMoE-1B-7B"})), "'OLMoE-1B-7B', the plan of 'Qwen3-30B-A3B'"),
    (lambda folder: (folder / "config.json").write_text(json.dumps(
        asdict(node().c) | {"prompts": 512})), "--metrics-gpus 8: with so many processes")], ids=range(10))
def test_metrics_that_are_refused(run, damage, line):
    damage(run[0])
    with pytest.raises(ValueError, match=line) as refusal:
        measured(run[0], node())
    assert not set(str(refusal.value)) & set("\n\x1b")
