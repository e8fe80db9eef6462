"""The benchmarks on the smallest settings: that a table has what it says. No time is asserted."""
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import growth  # noqa: E402
import on_paper  # noqa: E402
import routing  # noqa: E402
import saves  # noqa: E402
import scaled_trl  # noqa: E402
import soak  # noqa: E402
import speed  # noqa: E402
import step  # noqa: E402
import timing  # noqa: E402

TINY = dict(layers=2, width=64, experts=8, top_k=2, expert_width=32, vocabulary=61)
NUMBER = r"-?\d+\.\d+"


# ----------------------------------------------------------------------------------------- helpers
def test_the_interval_of_a_median_misses_it_in_one_of_twenty_at_most():
    """The median of a distribution lies below each of n values with probability 1/2: all cases."""
    for n in (6, 9, 12):
        values = range(n)
        _, low, high = timing.middle(values)
        inside = [low < below <= high for below in map(sum, itertools.product((0, 1), repeat=n))]
        assert sum(inside) / len(inside) >= 0.95  # `below` values are smaller than the median
        narrower = [low + 1 < below <= high - 1 for below in map(sum, itertools.product((0, 1), repeat=n))]
        assert sum(narrower) / len(narrower) < 0.95
    assert timing.middle([3, 1, 2]) == (2, 1, 3)


def test_turns_go_back_and_forth_and_ratios_are_those_of_a_turn():
    order, counts = [], itertools.count(1)
    arms = {name: lambda name=name: order.append(name) or next(counts) for name in "ab"}
    found = timing.turns(arms, rounds=3, warm_up=1)
    assert "".join(order) == "baabbaab"  # the warm-up is the first pair
    assert found == {"a": [3, 6, 7], "b": [4, 5, 8]}
    assert timing.ratio(found["b"], found["a"])[0] == 8 / 7


def test_a_cell_prints_its_result_and_says_why_it_failed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys, json\nsys.path.append({str(BENCHMARKS)!r})\nimport timing\n"
                      "def cell(c):\n    print('noise')\n    return dict(twice=2 * c['x'])\n"
                      "timing.cell(cell, json.loads(sys.argv[2]))\n")
    assert timing.in_process(str(script), dict(x=3)) == {"twice": 6}
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        timing.in_process(str(script), dict(y=3))


def test_random_rollouts_can_be_replayed():
    from scaled.replay import check_routes

    rollout = timing.random_rollout(8, 4, 3, 5, TINY)
    check_routes(rollout.routing, rollout.fed, (8, 7, TINY["layers"], TINY["top_k"]), TINY["experts"])
    assert rollout.mask.sum() == 8 * 5 and rollout.tokens.max() < TINY["vocabulary"]
    assert rollout.advantages.view(2, 4).sum(1).abs().max() < 1e-6


def test_the_single_file_makes_updates_of_the_shape_that_is_measured(monkeypatch):
    monkeypatch.setattr(speed, "UPDATES", 1)
    monkeypatch.setattr(speed, "WARM_UP", 0)
    (seconds,) = speed.our_updates("fp32", "fp8")  # which looks at the lengths itself
    assert len(seconds) == 3 and min(seconds) > 0
    found = re.fullmatch(r"(\d+) of (\d+) fed positions have a past of their own",
                         speed.shared_positions(speed.benchmark_config()))
    assert int(found[1]) < int(found[2]) == speed.SEQUENCES * (speed.TOKENS - 1)


# ----------------------------------------------------------------------------------------- routing
def test_what_routing_costs():
    c = TINY | dict(prompts=2, group=3, prompt=5, response=4, rounds=1, budget=40, row=(4, 2, 8, 33), memory=False)
    found = routing.measure(c)
    first, P, G, T = found["rollout"]["captured"][0], 2, 3, 5 + 4 - 1
    assert first["tokens"] == P * G * T and first["bytes"] == P * G * T * 2 * 2
    assert first["again"] == P * (G - 1) * 5 * 2 * 2  # the prompt, once for each response but the first
    assert first["seconds"] > first["run"] > 0 and first["routes"] > 0
    assert first["sent"] == first["bytes"] and found["rollout"]["not captured"][0]["bytes"] == 0
    assert found["rollout"]["captured again"][0]["again"] == first["again"]  # no prompt fills a block
    assert found["row"]["bytes"] == found["row"]["formula"] == 33 * 4 * 2
    text = routing.table(c, found)
    for line in ("routes captured / not", "those of a prefix once / each time", "replayed / recorded"):
        assert re.search(rf"{line} +{NUMBER} \[", text)
    assert f"bytes a token: 4 by L · A, 4.0 measured; 100.0% come from vLLM, {2 * 5 / 24:.1%} are of a prompt" in text
    assert "a row of 33 tokens, 4 layers, 2 of 8 experts: 0.00 MB" in text
    assert first["formula"] * 2**20 == 3 * P * G * T * 2 * 2
    taken = {name: [dict(mib=mib, formula=7.25)] for name, mib in (("captured", 9.5), ("not captured", 3.0))}
    assert routing.memory(taken) == ("host memory of a rollout, MiB: 9.5 with routes, 3.0 without; more by "
                                     "6.5 [6.5, 6.5], by the formula 7.2")


def test_memory_that_is_touched_and_given_back_is_seen():
    with timing.grown() as mib:
        torch.ones(40 * 2**18)  # 40 MiB
    assert 38 < mib[0] < 45  # the kernel counts pages a few at a time
    with timing.grown() as mib:
        pass
    assert mib[0] < 2


# -------------------------------------------------------------------------------------------- step
def slow_padding(lengths, sizes):
    """Positions of every row of every rank, one by one, in passes of so many rows, the longest first."""
    nothing = fed = waited = whole = 0
    left = [sorted(rows) for rows in lengths]
    for n in sizes:
        positions = []
        for rows in left:
            part = [rows.pop() - 1 for _ in range(n)]
            positions.append(sum(max(part) for _ in part))
            fed += sum(part)
            nothing += positions[-1] - sum(part)
        waited += sum(max(positions) - size for size in positions)
        whole += max(positions) * len(positions)
    assert not any(left)
    return nothing / (nothing + fed), waited / whole, len(sizes)


def test_padding_and_waiting_by_counting():
    for lengths, budget, sizes in (([[5, 5]], 10, [2]), ([[9, 2, 2], [3, 3, 3]], 9, [1, 2]),
                                   ([[9, 9, 2], [8, 3, 3]], 99, [3]), ([[30, 29, 9], [30, 28, 9]], 60, [2, 1]),
                                   ([[3000, 3000, 900], [2900, 2900, 9]], 10**5, [2, 1])):
        found = step.padding(lengths, budget)
        assert tuple(found.values()) == pytest.approx(slow_padding(lengths, sizes))
    assert step.padding([[5, 5]], 10) == dict(padding=0, waiting=0, passes=1)


def test_lengths_are_drawn_as_stated():
    assert step.drawn("equal", 3, 9, 0) == [9, 9, 9]
    skewed = step.drawn("skewed", 4000, 3000, 0)
    assert max(skewed) == 3000 and min(skewed) >= 1 and abs(sum(skewed) / 4000 - 1000) < 50


def test_a_step_by_its_parts(tmp_path):
    soak.prepare(tmp_path)
    options = dict(prompts=4, group_size=2, mini_batches=2, warmup=1, checkpoint=str(tmp_path / "hf"),
                   nano_cold_start=False, train_data=str(tmp_path / "train.jsonl"), eval_data="", max_prompt=7,
                   max_response=8)
    c = TINY | dict(rounds=1, ranks=0, precision="fp32", only=None, options=options)
    text = step.measure(c)
    assert list(text) == ["sync", "padding", "cut", "idle"]
    parameters = 2 * 61 * 64 + 64 + 2 * (2 * 64 + 2 * 32 + 64 * (64 + 2 * 32 + 64) + 8 * 64 + 8 * 3 * 64 * 32)
    assert f"sync of {4 * parameters / 1e6:.0f} MB of fp32 weights, {2 * (8 + 1 + 8 * 3) + 3} published" in text["sync"]
    shares = [float(x) for x in re.findall(rf"({NUMBER})%(?: of the sync)?$", text["sync"], re.MULTILINE)]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.2)
    assert re.search(rf"1 ranks, [678]\.\d% padding in one pass\n.* {NUMBER} \[.* {NUMBER} \[", text["cut"])
    assert text["padding"].count("\n") == 3 * len(step.RECIPES)
    phases = dict(re.findall(rf"^  ([a-z ]+?) +({NUMBER}) s", text["idle"], re.MULTILINE))
    assert phases.keys() == {"reward", "rollout", "old", "train", "sync", "between phases"}
    whole = float(re.search(rf": ({NUMBER}) s", text["idle"])[1])
    assert sum(map(float, phases.values())) == pytest.approx(whole, abs=0.01)


def test_sync_on_two_ranks_stands_beside_one(monkeypatch):
    """Processes in turn, each with half of the rounds: 1, 2, 2, 1 ranks."""
    asked, arms = [], ("copy", "gather", "publish", "packed", "sync", "wall")

    def in_process(script, setting, ranks):
        asked.append((ranks, setting["rounds"]))
        return {name: [ranks * (i + len(asked) // 4 + 1.0) for i in (0, 1)] for name in arms} | dict(bytes=ranks)

    monkeypatch.setattr(timing, "in_process", in_process)
    found, line = step.sync_beside(dict(ranks=2, rounds=4))
    assert asked == [(1, 2), (2, 2), (2, 2), (1, 2)] and found["bytes"] == 2 and found["sync"] == [2, 4, 2, 4]
    assert "2 ranks / 1 rank: rank 0's own time 1.667 [1.000, 2.000]" in line  # 2/1, 4/2, 2/2, 4/3
    asked.clear()
    assert step.sync_beside(dict(ranks=0, rounds=4))[1] == "" and asked == [(0, 4)]


# ------------------------------------------------------------------------------------------- saves
def test_saves_in_turn():
    text = saves.measure(TINY | dict(responses=8, prompt=4, response=6, rounds=2, steps=1, ranks=2))
    size = int(re.search(r"a checkpoint of (\d+) MB, 2 ranks, and 1 train steps", text)[1])
    parameters = 2 * 61 * 64 + 64 + 2 * (2 * 64 + 2 * 32 + 64 * (64 + 2 * 32 + 64) + 8 * 64 + 8 * 3 * 64 * 32)
    assert size == pytest.approx(12 * parameters / 1e6, abs=1.5)  # weights, two moments, and what torch writes around
    times = {name: [float(x) for x in re.findall(NUMBER, line)] for name, line in re.findall(
        "^(foreground|background) +(.+)$", text, re.MULTILINE)}
    assert len(times["foreground"]) == len(times["background"]) == 6 and times["foreground"][0] > 0


def test_what_a_save_saves_is_a_difference_of_one_round():
    rows = dict(none=[[0, 5.0], [0, 7.0], [0, 4.0]], foreground=[[3, 8.5], [2, 9.5], [3, 8.0]],
                background=[[1, 6.0], [1, 7.5], [2, 7.0]])
    text = saves.table(dict(ranks=0, steps=4), rows | dict(bytes=2e6))
    assert text.splitlines()[0] == "a checkpoint of 2 MB, 1 ranks, and 4 train steps of 5.00 s together; 3 rounds"
    assert text.splitlines()[2].split() == "foreground 3.000 [2.000, 3.000] 3.500 [2.500, 4.000]".split()
    assert text.splitlines()[3].split() == "background 1.000 [1.000, 2.000] 1.000 [0.500, 3.000]".split()
    assert text.endswith("returns 1.000 [1.000, 2.000] s sooner; saved until all is done: 2.000 [1.000, 2.500] s")


# ------------------------------------------------------------------------------------------ growth
def test_growth_of_every_kind(tmp_path):
    found, base = {}, growth.BASE | TINY | dict(prompt=4, response=6, responses=8, budget=60)
    axes = {"train": {"ranks": ((1, 2), "half", "flat")}, "rollout": {"layers": ((2, 4), "linear", "linear")},
            "single": {"batch": ((8, 16), "linear", "linear")}}
    for kind, of in axes.items():
        found[kind] = growth.cells(kind, of, base if kind != "single" else growth.NANO | dict(length=4), 1, tmp_path)
        text = growth.table(kind, of, found[kind])
        axis = next(iter(of))
        assert f"{kind}: {axis}" in text and f"seconds: expected {of[axis][1]}; measured power" in text
    one, two = found["train"]["ranks"]
    assert 0 < two["gradients"] == pytest.approx(one["gradients"] / 2, rel=0.01)  # 31 of 61 symbols are on rank 0
    assert all(row["seconds"] > 0 and row["process"] >= row["mib"] for kind in found.values()
               for rows in kind.values() for row in rows)
    growth.draw(found, tmp_path / "growth.svg")
    assert "rollout: seconds" in (tmp_path / "growth.svg").read_text()


def test_powers_are_slopes_of_logarithms():
    rows = [dict(value=x, cubic=2 * x**3, nothing=0) for x in (2, 4, 8)]
    assert growth.exponent(rows, "cubic") == pytest.approx((3, 3)) and math.isnan(growth.exponent(rows, "nothing")[0])


def test_memory_after_rollout_batches(monkeypatch):
    """As the metrics of a run have it, in GiB; the run itself is that of step.py."""
    asked = []
    monkeypatch.setattr(timing, "in_process", lambda script, setting: asked.append((script, setting)) or dict(
        peaks=[1.0, 1.0, 1.25, 1.5, 9.0]))
    text, peaks = growth.batches({"lr": 1e-4}, 4)
    assert peaks == [(2, 1024), (4, 1536)] and "measured +256.00 MiB a batch" in text
    (script, setting), = asked
    assert Path(script).name == "step.py" and setting["kind"] == "idle" and setting["options"] == {"lr": 1e-4}


# --------------------------------------------------------------------------------------------- TRL
def test_scaled_beside_trl(tmp_path):
    """Ours in a process of its own; TRL's environment is not there, its numbers are made up."""
    c = TINY | dict(folder=timing.checkpoint(tmp_path, **TINY), steps=scaled_trl.WARM_UP + 2, prompts_a_step=2,
                    group=2, prompt=4, response=3, prompts=timing.prompts(8, 4, 61))
    ours = timing.in_process(str(BENCHMARKS / "scaled_trl.py"), c)
    assert {name: len(x) for name, x in ours.items()} == dict(seconds=2, rollout=2, train=2, sync=2)
    for whole, *parts in zip(ours["seconds"], ours["rollout"], ours["train"], ours["sync"]):
        assert whole == pytest.approx(sum(parts))
    theirs = dict(seconds=[3 * x for x in ours["seconds"]], rollout=[2 * x for x in ours["rollout"]])
    text = scaled_trl.table(dict(prompts=2, group=2, prompt=4, response=3, updates=2, rounds=1),
                            {"TRL": [theirs], "scaled": [ours]})
    assert re.search(r"rollout .* 2\.00 \[2\.00, 2\.00\]", text) and re.search(r"update .* 3\.00 \[.*bound 1\.5", text)


def test_both_sides_of_trl_take_the_same_setting():
    """trl_step.py needs packages that are not here: its source is read."""
    source = (BENCHMARKS / "trl_step.py").read_text()
    read = set(re.findall(r'c\["(\w+)"\]', source))
    assert read == {"folder", "steps", "vocabulary", "prompts", "prompts_a_step", "group", "response", "precision"}
    assert f"WARM_UP = {scaled_trl.WARM_UP}\n" in source
    assert json.loads(json.dumps(scaled_trl.SHAPE)).keys() >= {"prompts", "group", "response"}


# ------------------------------------------------------------------------------------------- paper
def test_on_paper_is_the_plan(capsys):
    from scaled import plan

    row, = on_paper.rows("Qwen3-30B-A3B", [16], "h200", {}, {})
    assert plan.main(["--config", on_paper.RECIPE, "--gpus", "16", "--gpu", "h200", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    total = sum(out["seconds"].values())
    assert row["seconds"] == pytest.approx(total) and row["fits"] == (not out["faults"])
    assert row["hours"] == pytest.approx(out["run"]["gpu_hours"] / out["run"]["updates"])
    assert row["shares"] == pytest.approx({name: x / total for name, x in out["seconds"].items()})
    on_paper.main(["--gpus", "16"])
    text = capsys.readouterr().out
    assert re.search(r"^  16 +\d+ ", text, re.MULTILINE) and "The largest part on 16 GPUs is rollout" in text
