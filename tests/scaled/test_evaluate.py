"""The command: what it refuses, what it takes from a run, and one evaluation with the real engine on two ranks."""
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import nano_moe_rl as nano
from processes import finish, start
from scaled import checkpoint, evaluate
from scaled.comparison import table
from scaled.config import Config
from scaled.estimators import estimate, of_problem
from scaled.export import export_nano
from scaled.models import Model, Options, as_folder, config_of, find, options_of, read_problems
from scaled.policy import load_policy

TINY = nano.Config(layers=1, experts=4, expert_width=8, width=32, heads=1)
PROMPTS = ["314=", "271=", "59=", "8067=", "12345=", "90=", "456="]
T, N = 0.7, 64  # temperature of the run, responses to a prompt


def logits(folder):
    """Of the first token of a response, (problems, vocabulary)."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack([model(torch.tensor([[nano.VOCABULARY.index(c) for c in prompt]])).logits[0, -1]
                            for prompt in PROMPTS])


@pytest.fixture(scope="module")
def folder(group, tmp_path_factory):
    """A checkpoint, and a run whose update 4 has other weights and whose update 8 is damaged. The reference of a
    prompt is the digit that update 4 likes best."""
    folder = tmp_path_factory.mktemp("evaluate")
    export_nano(nano.Model(TINY), folder / "base")
    policy = load_policy(folder / "base", precision="fp32", logits_bytes=10**5, device="cpu",
                         gradient_checkpointing=False, cpu_offload=False)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(3.0)
        policy.model.model.embed_tokens.weight.roll(1, 0)
    c = Config(name="run", checkpoint="base", train_data="problems.jsonl", eval_data="problems.jsonl", chat=False,
               reward="exact_match", max_prompt=6, max_response=1, temperature=T, rollout_precision="fp32", seed=5)
    texts = {"config.json": json.dumps(asdict(c)), "metrics.jsonl": ""}
    (folder / "runs/run").mkdir(parents=True)
    for version in (4, 8):
        checkpoint.save(folder / "runs/run", policy, nano.adamw(policy, 1e-3), version, 2, texts)
    with open(folder / "runs/run/update-000008/__0_0.distcp", "ab") as file:
        file.write(b"more")
    export_nano(sharper(), folder / "update-4")
    best = logits(folder / "update-4")[:, :10].argmax(1).tolist()
    (folder / "problems.jsonl").write_text("".join(
        json.dumps({"prompt": prompt, "answer": str(digit)}) + "\n" for prompt, digit in zip(PROMPTS, best)))
    return folder


def sharper():
    """The single file's model with the weights of update 4."""
    model = nano.Model(TINY)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def evaluated(folder):
    """One command: the run, whose damaged update 8 is passed over, and the checkpoint that it began from."""
    before = set(folder.rglob("*"))
    process = start(folder, "scaled.evaluate", "--model", "runs/run", "--model", "base", "--samples", N, "--out",
                    "rows.jsonl", "--picture", "pass.png", "--json")
    code, out, err = finish(process)
    assert code == 0, err
    assert set(folder.rglob("*")) - before == {folder / "rows.jsonl", folder / "pass.png"}
    assert "update-000008 is damaged" in err
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return json.loads(out), rows


def test_rows_have_every_problem_of_every_model_in_order(folder, evaluated):
    _, rows = evaluated
    references = [json.loads(line)["answer"] for line in (folder / "problems.jsonl").read_text().splitlines()]
    assert [(row["model"], row["update"], row["id"]) for row in rows] == [
        (model, update, f"problems.jsonl:{i}") for model, update in (("runs/run", 4), ("base", None)) for i in range(7)]
    for row, prompt, reference in zip(rows, PROMPTS * 2, references * 2, strict=True):
        assert row["prompt"].replace(" ", "") == prompt and row["answer"] == reference
        assert row["lengths"] == [1] * N
        assert row["rewards"] == [float(answer == reference) for answer in row["answers"]]
        # a token that ends a response is no text; all others are cut off after one
        assert row["truncated"] == [answer is not None for answer in row["answers"]]
        assert set(row["answers"]) - {None} <= set(nano.VOCABULARY)


def test_samples_are_of_the_policy_that_was_asked_for(folder, evaluated):
    """Frequencies of the reference, and of the end, against softmax(logits / T), 4 standard deviations; the two
    models are so different that neither could pass for the other."""
    _, rows = evaluated
    digits = torch.tensor([int(row["answer"]) for row in rows[:7]])
    expected = {}
    for name, its in (("update-4", rows[:7]), ("base", rows[7:])):
        mu = (logits(folder / name) / T).softmax(-1).double()
        for what, p, count in (
                ("passes", mu.gather(1, digits[:, None])[:, 0], sum(sum(row["rewards"]) for row in its)),
                ("ends", mu[:, nano.EOS], sum(row["answers"].count(None) for row in its))):
            mean, deviation = N * p.sum().item(), math.sqrt(N * (p * (1 - p)).sum())
            assert abs(count - mean) < 4 * deviation, (name, what, count, mean)
            expected[name, what] = mean, deviation
    (a, _), (b, deviation) = expected["update-4", "passes"], expected["base", "passes"]
    assert a - b > 8 * deviation


def test_estimates_are_those_of_the_rows(evaluated):
    out, rows = evaluated
    a, b = ([of_problem(row, 1.0) for row in part] for part in (rows[:7], rows[7:]))
    assert [(m["model"], m["update"]) for m in out["models"]] == [("runs/run", 4), ("base", None)]
    assert [m["estimates"] for m in out["models"]] == [estimate(a), estimate(b)]
    assert out["differences"] == [{"model": "base", "minus": "runs/run", "estimates": estimate(b, a)}]
    assert out["models"][0]["estimates"][f"mean@{N}"]["mean"] == pytest.approx(
        sum(sum(row["rewards"]) for row in rows[:7]) / 7 / N)
    assert out["models"][0]["counts"] == {"reward_errors": 0, "reward_timeouts": 0, "vote_timeouts": 0}
    assert (out["problems"], out["options"]["temperature"], out["options"]["seed"]) == (7, T, 0)


def test_the_picture_is_one(folder, evaluated):
    assert (folder / "pass.png").read_bytes().startswith(b"\x89PNG\r\n") and os.path.getsize(folder / "pass.png") > 2e4


# ----------------------------------------------------------------------------------- without an engine
def a_run(name="runs/a", **options):
    return Model(name, "run", (Path(name, "update-000004"),), options, "base")


def test_options_are_given_or_of_the_runs_and_those_agree():
    a, b = a_run(temperature=0.7, data="d"), a_run("runs/b", temperature=0.9, data="d")
    assert options_of([a], {}).temperature == 0.7
    assert options_of([Model("base", "folder"), a], {}).temperature == 0.7
    with pytest.raises(ValueError, match="--model runs/b: its run has temperature 0.9, that of runs/a 0.7: give "
                                         "--temperature for both"):
        options_of([a, b], {})
    assert options_of([a, b], {"temperature": 0.8}).temperature == 0.8
    with pytest.raises(ValueError, match="--data : give a file"):
        options_of([Model("base", "folder")], {})


def test_a_folder_does_not_inherit_that_code_of_its_own_may_be_run():
    """Nor do two runs have to agree on it."""
    a, b = a_run(trust_remote_code=True, data="d"), a_run("runs/b", trust_remote_code=False, data="d")
    o = options_of([a, b], {})
    trusts = [config_of(model, o, None).trust_remote_code for model in (a, b, Model("base", "folder", base="base"))]
    assert trusts == [True, False, False]
    assert config_of(b, options_of([b], {"trust_remote_code": True}), True).trust_remote_code


def test_every_option_of_a_run_comes_from_its_definition(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model = find("runs/run@4")
    c = config_of(model, o := options_of([model], {}), None)
    saved = json.loads((folder / "runs/run/update-000004/config.json").read_text())
    assert {name: getattr(c, name) for name in (
        "eval_data", "eval_split", "prompt_column", "answer_column", "chat", "system", "reward", "temperature",
        "eval_top_p", "max_prompt", "max_response", "rollout_precision", "checkpoint")} == {
        name: saved[name] for name in (
        "eval_data", "eval_split", "prompt_column", "answer_column", "chat", "system", "reward", "temperature",
        "eval_top_p", "max_prompt", "max_response", "rollout_precision", "checkpoint")}
    assert (saved["seed"], o.seed, o.samples) == (5, 0, 32)


def test_a_run_of_the_single_file_is_a_folder_for_as_long_as_it_is_needed(group, tmp_path):
    path = tmp_path / "runs/nano/checkpoint.pt"
    path.parent.mkdir(parents=True)
    torch.save({"config": asdict(TINY), "model": sharper().state_dict(), "rows": [{"update": 12}]}, path)
    model, ranks = find(str(path)), SimpleNamespace(leave=lambda: None)
    o = options_of([model], {"data": "d"})
    assert (o.reward, o.chat, o.max_prompt, o.max_response) == ("running_sum", False, 6, TINY.max_response)
    tokens = torch.tensor([[3, 1, 4, nano.ASK]])
    with as_folder(model, ranks) as (folder, update):
        twin = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert update == 12 and Path(folder).parent == tmp_path / "runs"
        with torch.no_grad():
            torch.testing.assert_close(twin(tokens).logits, sharper()(tokens)[0], atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError), as_folder(model, ranks):
        raise RuntimeError
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["nano"]


def test_the_table_fits_and_has_every_number():
    rows = [[dict(rewards=[float(i % m == 0)] * 3 + [1.0], answers=["3"] * 4, lengths=[1200 + i] * 4,
                  truncated=[False] * 4) for i in range(12)] for m in (2, 3, 4)]
    each = [[of_problem(row, 1.0) for row in part] for part in rows]
    results = [dict(model=f"runs/{i}", update=i or None, rows=rows[i], estimates=estimate(each[i]),
                    counts={"reward_errors": 0, "vote_timeouts": i}) for i in range(3)]
    pairs = [dict(estimates=estimate(each[j], each[i])) for i in range(3) for j in range(i + 1, 3)]
    o = Options(data="problems.jsonl", samples=4)
    narrow, wide = (table(results, pairs, o, width) for width in (80, 200))
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, wide.splitlines())) <= 200
    assert narrow.splitlines()[:5] == [
        "problems.jsonl: 12 problems, 4 responses to each", "temperature 1, top-p 1, up to 8192 tokens, bf16 engine",
        "A  runs/0", "B  runs/1 (update 1)", "C  runs/2 (update 2)"]
    assert narrow.splitlines()[-2:] == ["B: 1 vote timeouts", "C: 2 vote timeouts"]
    for text in (narrow, wide):
        for one in [result["estimates"] for result in results]:
            pass_1 = one["pass@1"]
            assert f"{pass_1['mean']:.3f} [{pass_1['low']:.3f}, {pass_1['high']:.3f}]" in text
        assert "1205.5 [" in text and all(name in text for name in ("B - A", "C - A", "C - B"))
        assert "+0.000\n" in text  # truncation: alike, so without an interval
    assert narrow.count("pass@4") == 3 and wide.count("pass@4") == 1


@pytest.fixture(scope="module")
def odd(folder):
    """Runs whose options are not of a kind that anybody could use, and one without a checkpoint."""
    for name, options in (("odd", {"temperature": 1.0}), ("list", [1]),
                          ("hot", {"checkpoint": "base", "temperature": "hot"})):
        path = folder / "runs" / name / "update-000004"
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(options))
        (path / "files.json").write_text(json.dumps(dict.fromkeys(
            [".metadata", "metrics.jsonl", "x"], "") | {"config.json": checkpoint.digest(path / "config.json")}))
    (folder / "runs/new").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (folder / "runs/new" / name).touch()
    return folder


REFUSED = [  # before ranks meet
    ("--model runs/new", "--model runs/new has no checkpoint: give"),
    ("--model runs/odd", "config.json of its run does not say from which checkpoint it began"),
    ("--model runs/list", "runs/list has no checkpoint that is whole (update-000004/config.json is not as"),
    ("--model runs/hot", "--model runs/hot: config.json of its run has for temperature 'hot'; it should be a number"),
    ("", "--model: give a Hugging Face folder or a checkpoint of a run"),
    ("--model nowhere", "--model nowhere has no checkpoint: give"),
    ("--model runs/run@12", "--model runs/run has no checkpoint of update 12, only of 4, 8"),
    ("--model problems.jsonl", "problems.jsonl is no checkpoint of nano_moe_rl.py"),
    ("--model base", "--data : give a file"),
    ("--model base --data d --top-p 0", "--top-p 0.0: give 0.01 to 1"),
    ("--model base --data d --samples 0", "--samples 0: give 1 to 10000"),
    ("--model base --data d --temperature hot", "--temperature"),
    ("--model base --data d --tensor-parallel 2", "--tensor-parallel 2: give a divisor of the 1 processes"),
    ("--model runs/run --out problems.jsonl", "--out problems.jsonl: exists; give a new file"),
    ("--model runs/run --out no/rows.jsonl", "--out no/rows.jsonl: no is no folder; make it first"),
    ("--model runs/run --picture pass.jpg", "--picture pass.jpg: give a name that ends in .png"),
    ("--model runs/run --eval-data d", "--eval-data"),
]


@pytest.mark.parametrize("argv, line", REFUSED, ids=[row[0] for row in REFUSED])
def test_options_are_refused_in_one_line(odd, monkeypatch, capsys, argv, line):
    folder = odd
    monkeypatch.chdir(folder)
    before = set(folder.rglob("*"))
    with pytest.raises(SystemExit) as end:
        evaluate.main(argv.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and line in err and len(err) < 400
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize("model, changes, line", [
    ("base", dict(max_response=30), "--max-response 30: with --max-prompt 6 it exceeds"),
    ("base", dict(data="nowhere.jsonl"), "nowhere.jsonl does not exist"),
    ("base", dict(chat=True), "no chat template"),
    ("runs/run", dict(prompt_column="question"), "no column 'question'"),
    ("base/..", {}, "--model base/..: has no config.json"),
    ("gone", {}, "--model gone: the checkpoint nowhere, from which it began, has no config.json"),
])
def test_problems_and_checkpoints_are_refused_in_one_line(folder, monkeypatch, model, changes, line):
    monkeypatch.chdir(folder)
    if model == "gone":
        model = Model("gone", "run", (Path("runs/run/update-000004"),), {}, "nowhere")
    else:
        model = find(model) if model != "base/.." else Model(model, "folder", base=model)
    common = dict(data="problems.jsonl", chat=False, max_prompt=6, max_response=1, rollout_precision="fp32")
    with pytest.raises(ValueError) as refusal:
        read_problems(model, config_of(model, Options(**common | changes), None))
    assert line in str(refusal.value) and "\n" not in str(refusal.value)
