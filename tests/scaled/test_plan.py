"""python -m scaled.plan, as a user starts it; the choices that it compares; the ready plans."""
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

import nano_moe_rl as nano
from scaled import pictures, plan
from scaled.choices import compare, fitting, remedies, savings, varied
from scaled.config import Config, read_config
from scaled.export import export_nano
from scaled.facts import GPUS, OUTCOMES
from scaled.machine import Machine
from scaled.memory import GIB, LINES, MOMENTS
from scaled.seconds import PHASES

ROOT = Path(nano.__file__).parent
NODE, LAPTOP = (str(ROOT / "scaled/configs" / name) for name in ("qwen3_30b_a3b.toml", "laptop.toml"))


def said(capsys, *argv):
    assert plan.main(list(argv)) == 0
    return capsys.readouterr().out


def made(*argv, **changes):
    return plan.make_plan(read_config(NODE, changes), Machine(**dict(gpu="h200") | dict(argv)))[0]


# ------------------------------------------------------------------------------ the command
def test_the_laptop_recipe_before_there_is_any_checkpoint(tmp_path):
    """In a process of its own, in an empty directory, where nothing is left behind."""
    done = subprocess.run([sys.executable, "-m", "scaled.plan", "--config", LAPTOP, "--gpus", "2"], cwd=tmp_path,
                          text=True, capture_output=True, env=os.environ | dict(PYTHONPATH=str(ROOT), COLUMNS="80"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith("laptop-cold-start: 0.6321 M parameters, 0.116 M active\n2 x h100; N = 4, R3, bf16")
    assert "\nIt fits. An engine samples 512 responses a rollout batch, 512 at once.\n" in done.stdout
    assert not list(tmp_path.iterdir()) and max(map(len, done.stdout.splitlines())) <= 80


def test_a_checkpoint_on_disk_is_what_is_planned(tmp_path, capsys):
    export_nano(nano.Model(nano.Config(width=32, heads=1, experts=4)), tmp_path / "small")
    out = json.loads(said(capsys, "--config", LAPTOP, "--gpus", "2", "--json", "--model", str(tmp_path / "small")))
    model = nano.Model(nano.Config(width=32, heads=1, experts=4))
    assert out["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert out["model"]["source"] == "its config.json"


def test_what_people_and_machines_read_is_the_same(capsys, monkeypatch):
    argv = "--config", NODE, "--gpus", "8", "--gpu", "h200", "--no-cpu-offload"
    monkeypatch.setenv("COLUMNS", "80")
    text, numbers = said(capsys, *argv), json.loads(said(capsys, *argv, "--json"))
    assert max(map(len, text.splitlines())) <= 80
    for line in LINES:
        row = next(row for row in text.splitlines() if row.startswith(line.label + " "))
        shown = [float(x) for x in row[23:].split()]
        assert shown == [round(numbers["gpu_bytes"][line.label][moment] / GIB, 2) for moment in line.moments]
    totals = next(row for row in text.splitlines() if row.startswith("total, of 139.81"))
    assert [float(x) for x in totals[23:].split()] == [round(numbers["gpu_totals"][x] / GIB, 2) for x in MOMENTS]
    for name in PHASES:
        assert re.search(rf"^{name} +{numbers['seconds'][name]:.2f} ", text, re.MULTILINE)
    assert len(numbers["choices"]) == 24 and numbers["faults"] == [] and numbers["machine"]["price"] == 4.0
    monkeypatch.setenv("COLUMNS", "140")
    wide = said(capsys, *argv)
    assert 100 < max(map(len, wide.splitlines())) <= 140 and "4 bytes for each parameter of a shard" in wide


def test_every_formula_can_be_read(capsys):
    out = said(capsys, "--explain")
    for label in [line.label for line in LINES] + [f"{name} seconds" for name in PHASES]:
        assert re.search(rf"^{label}\n    \S", out, re.MULTILINE), label


def test_help_needs_neither_transformers_nor_vllm():
    code = ("import sys; sys.argv = ['plan', '--help']; from scaled import plan\ntry: plan.main()\nexcept SystemExit: "
            "print(*({'transformers', 'vllm', 'pandas', 'matplotlib'} & sys.modules.keys()), 'none')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout.splitlines()[-1].split() == ["none"] and "--gpu a100|h100|h200|b200" in done.stdout
    assert not {f.name for f in fields(Config)} & {f.name for f in fields(Machine)}


@pytest.mark.parametrize("gpus", ["8", "2"])
def test_the_picture_has_the_numbers_of_the_tables(capsys, folder, monkeypatch, gpus):
    figures, make = [], pictures.new_figure
    monkeypatch.setattr(pictures, "new_figure", lambda size: figures.append(make(size)) or figures[-1])
    argv = "--config", NODE, "--gpus", gpus, "--gpu", "h200", "--no-cpu-offload"
    numbers = json.loads(said(capsys, *argv, "--json", "--picture", "plan.png"))
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG\r\n")
    memory, seconds = figures[0].axes
    moments = [text.get_text() for text in memory.get_xticklabels()]
    assert moments == [*numbers["gpu_totals"]]
    for x, moment in enumerate(moments):
        tops = [bar.get_y() + bar.get_height() for bar in memory.patches
                if round(bar.get_x() + bar.get_width() / 2) == x]
        assert max(tops) == pytest.approx(numbers["gpu_totals"][moment] / GIB)
    limit, = memory.lines
    assert limit.get_ydata()[0] == pytest.approx(numbers["gpu_limit"] / GIB)
    assert {text.get_text() for text in memory.get_legend().get_texts()} - {*numbers["gpu_bytes"]} == {"h200: 139.81"}
    if numbers["faults"]:  # its seconds would be those of no run
        assert [text.get_text() for text in seconds.texts] == ["It does not fit."]
    else:
        assert [bar.get_width() for bar in seconds.patches] == pytest.approx([*numbers["seconds"].values()])
    assert bool(numbers["faults"]) == (gpus == "2")
    with pytest.raises(SystemExit):  # nothing is written over
        plan.main([*argv, "--picture", "plan.png"])
    assert "--picture plan.png: exists; give a new file" in capsys.readouterr().err


@pytest.mark.parametrize("argv, line", [
    ([], "give --config FILE"),
    (["--config", "nowhere.toml"], "--config nowhere.toml: there is no such file"),
    (["--config", NODE, "--gpus", "many"], "--gpus: invalid int value: 'many'"),
    (["--config", NODE, "--gpus", "12"], "--gpus 12: give a multiple of --node-gpus 8"),
    (["--config", NODE, "--gpu", "tpu"], "--gpu tpu: give a100 or h100 or h200 or b200"),
    (["--config", NODE, "--gpu", "a100"], "--rollout-precision fp8: give bf16 or int8: --gpu a100 has no fp8 units"),
    (["--config", NODE, "--tensor-parallel", "3"], "--tensor-parallel 3: give a divisor of the 8 processes"),
    (["--config", NODE, "--gpus", "64", "--tensor-parallel", "64", "--prompts", "64"],
     "--tensor-parallel 64: give a divisor of the model's 32 attention heads"),
    (["--config", NODE, "--price", "nan"], "--price nan: give 0"),
    (["--config", NODE, "--model", "Qwen3"], "--model Qwen3: has no config.json; give --model the folder of one, or"),
    (["--config", NODE, "--checkpoint", "there"], "--checkpoint there: has no config.json"),
    (["--config", NODE, "--max-response", "60000", "--token-budget", "70000"], "exceeds the checkpoint's context"),
    (["--config", NODE, "--picture", "plan.svg"], "--picture plan.svg: give a name that ends in .png"),
    (["--config", NODE, "--metrics", "none.jsonl"], "--metrics none.jsonl: config.json does not say what was run")],
    ids=lambda x: " ".join(x[2:]) if isinstance(x, list) else "")
def test_what_is_refused_in_one_line(capsys, folder, argv, line):
    with pytest.raises(SystemExit) as end:
        plan.main(argv)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and not list(folder.iterdir())
    assert len(err.splitlines()) == 1 and err.startswith("scaled: ") and line in err


def test_a_name_cannot_write_to_the_terminal(capsys, tmp_path):
    export_nano(nano.Model(nano.Config(width=32, heads=1)), tmp_path / "a\x1b[31m")
    out = said(capsys, "--config", LAPTOP, "--gpus", "2", "--model", str(tmp_path / "a\x1b[31m"))
    assert "\x1b" not in out and out.startswith("a\\x1b[31m: ")


# ------------------------------------------------------------------------------- the choices
def test_choices_are_plans_of_their_own():
    base = made()
    rows = compare(base)
    assert [(r["mini_batches"], r["replay"], r["rollout_precision"]) for r in rows] == [
        (4, "R3", "fp8"), (4, "none", "fp8"), (4, "R2", "fp8"), (1, "R3", "fp8"), (2, "R3", "fp8"), (8, "R3", "fp8"),
        (4, "R3", "bf16")]
    for row in rows + compare(base, whole=True):
        choice = {name: row[name] for name in ("mini_batches", "replay", "rollout_precision")}
        other = made(**choice)
        assert row["seconds"] == other.total and row["cost"] == pytest.approx(other.cost)
        assert row["gpu_hours"] == pytest.approx(200 * 8 * other.total / 3600)
        assert row["change"] == pytest.approx(other.cost / base.cost - 1, abs=1e-12)
        assert row["fits"] == (not other.memory.faults())
        assert row["paper"] == OUTCOMES.get((row["mini_batches"], row["replay"], True))
    # what a rollout batch saves as N grows, and what fp8 does, have the sign that they must have
    cost = {(r["mini_batches"], r["rollout_precision"]): r["cost"] for r in rows if r["replay"] == "R3"}
    assert cost[1, "fp8"] > cost[2, "fp8"] > cost[4, "fp8"] > cost[8, "fp8"] and cost[4, "bf16"] > cost[4, "fp8"]


def test_an_n_that_does_not_divide_the_updates_is_still_compared():
    rows = compare(made(updates=100))
    assert {row["mini_batches"] for row in rows} == {1, 2, 4, 8}
    assert next(r for r in rows if r["mini_batches"] == 8)["gpu_hours"] == pytest.approx(
        100 * 8 * made(mini_batches=8).total / 3600)


def test_a_gpu_without_fp8_has_no_such_choice():
    assert {row["rollout_precision"] for row in compare(made(("gpu", "a100"), rollout_precision="bf16"))} == {"bf16"}


@pytest.mark.parametrize("argv, several", [
    (["--gpu", "h100", "--no-cpu-offload"], False),
    (["--gpu", "h100", "--model", "Qwen3-235B-A22B", "--gpus", "16"], True)], ids=["one option", "two options"])
def test_what_is_said_to_fit_does(capsys, argv, several):
    out = said(capsys, "--config", NODE, *argv)
    assert "\nIt does not fit. " in out and "s/update" not in out and "seconds" not in out
    found = re.findall(r"^  fits with (.*): \$", out, re.MULTILINE)
    assert found and all(("--" in flags[2:]) == several for flags in found)
    for flags in found:
        changed = [x for x in argv if not (x == "--no-cpu-offload" and "--cpu-offload" in flags)]
        assert "\nIt fits. " in said(capsys, "--config", NODE, *changed, *flags.split())


def test_remedies_are_all_that_fit_and_options_of_the_run_come_first():
    tight = made(("gpu", "h100"), cpu_offload=False)
    found = remedies(tight)
    assert found == fitting(tight) and found[0][0] == {"cpu_offload": True}
    kinds = [bool(change.keys() & {"gpus", "gpu"}) for change, _ in found]
    assert kinds == sorted(kinds) and True in kinds
    for change, other in found:
        assert not varied(tight, change).memory.faults() and other.cost == varied(tight, change).cost


def test_savings_keep_the_numerics_and_the_machine():
    base = made()
    found = savings(base)
    assert found and [x.cost for _, x in found] == sorted(x.cost for _, x in found)
    for change, other in found:
        assert other.cost < 0.99 * base.cost and not other.memory.faults()
        assert change.keys() <= Config.free | {"tensor_parallel"}
        assert other.m == base.m and other.c == replace(base.c, **change)


def test_nothing_is_promised_where_nothing_helps(capsys):
    out = said(capsys, "--config", NODE, "--model", "Qwen3-235B-A22B", "--gpus", "2", "--node-gpus", "2", "--host-gib",
               "100")
    assert "no two of the options that are tried would be enough" in out and "fits with" not in out


# ------------------------------------------------------------------------------- ready plans
def test_the_ready_plans_are_what_the_command_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(ROOT)
    page = (ROOT / "scaled/plans.md").read_text()
    blocks = re.findall(r"```bash\npython -m scaled.plan ([^\n]*)\n```\n\n```\n(.*?)```", page, re.DOTALL)
    assert [re.search(r"--gpus (\d+)", argv).group(1) for argv, _ in blocks] == ["8", "64", "512"]
    for argv, output in blocks:
        assert said(capsys, *argv.split()) == output
        assert "\nIt fits. " in output
    cost = [float(re.search(r"GPU hours, \$([\d,]+)", output)[1].replace(",", "")) for _, output in blocks]
    more = int(re.search(r"a response costs (\d+) % more than on 64 GPUs", page)[1])  # there are four times as many
    assert cost[2] / 4 / cost[1] - 1 == pytest.approx(more / 100, abs=0.005)


@pytest.mark.parametrize("path", sorted((ROOT / "scaled/configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_fits_on_what_it_names(capsys, monkeypatch, path):
    """By the command in its comment, with the memory of GPU and host that it says it needs."""
    monkeypatch.chdir(ROOT)
    text = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    command = re.search(r"python -m scaled.plan (--config \S+ --gpus \d+)", text)
    argv = command.group(1).split() if command else ["--config", str(path), "--gpus", "2"]
    if re.search(r"of 40 GB", text):
        argv += ["--gib", "39.4"]
    if host := re.search(r"(\d+) ([GT])B of host memory", text):
        argv += ["--host-gib", str(float(host[1]) * dict(G=1e9, T=1e12)[host[2]] / GIB)]
    assert "\nIt fits. " in said(capsys, *argv)


def test_gpus_of_the_table_in_their_order():
    """By year: none of a later one is slower, or has less memory."""
    cards = [GPUS[name] for name in ("a100", "h100", "h200", "b200")]
    for older, newer in zip(cards, cards[1:]):
        for rate in ("gib", "bf16_tflops", "fp8_tflops", "hbm_tb_s", "nvlink_gb_s", "network_gb_s", "price"):
            assert getattr(older, rate) <= getattr(newer, rate)
    assert all(card.fp8_tflops in (0, pytest.approx(2 * card.bf16_tflops, rel=0.01)) for card in cards)
