"""The command: what it says of runs of both sizes and of recorded ones, and what it refuses."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

import nano_moe_rl as nano
import scaled
from figures import outcomes, runner
from scaled import pictures, rules, watch
from scaled.recorded import curves, summary, text

ROOT = Path(nano.__file__).parent
CORE = ROOT / "tutorials/results/core.jsonl"


def write_run(folder, rows, N=4, acts=()):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"mini_batches": N}))
    if acts:
        (folder / "events.jsonl").write_text("".join(json.dumps(act) + "\n" for act in acts))
    return folder


def ask(capsys, *argv):
    assert watch.main([*map(str, argv)]) == 0
    return capsys.readouterr().out


def test_a_run_of_the_single_file_is_read(finished, capsys):
    """Its deployed policy is what its engine_score says; it writes fewer metrics."""
    found = json.loads(ask(capsys, finished / "runs/done", "--json"))[str(finished / "runs/done")]
    assert found["rules"].keys() == set(rules.NAMES) and found["acts"] == []
    missing = {name for name, rule in found["rules"].items() if (rule["not_applied"] or "").startswith("no ")}
    assert missing == {"weights_truncated", "truncation_rises", "groups_equal", "sync_differs"}
    # 4 updates are no window
    assert found["rules"]["reward_falls"]["not_applied"] == "too few rows with reward"


def test_the_score_is_that_of_the_engine(tmp_path):
    def scored(i):
        return {"update": 40 * i, "score": 0.9, "engine_score": 0.5 if i < 8 else 0.2}
    found = watch.watch(*watch.read_run(write_run(tmp_path / "run", [scored(i) for i in range(10)])))
    assert [(event["rule"], event["update"], event["since"]) for event in found["events"]] == [
        ("score_falls", 320, 281)]


def test_events_acts_and_a_line_a_rule_within_80_columns(tmp_path, capsys):
    rows = [{"update": i, "mismatch_kl": 0.01 if i < 17 else 0.04, "reward": 0.5, "score": None} for i in range(1, 41)]
    back = {"update": 60, "act": "back", "to": 16, "change": {"watch_times": 0, "lr": 1e-6}}
    first = write_run(tmp_path / "a", rows, acts=[{"update": 24, "rule": "mismatch_kl_high"}, back])
    second = write_run(tmp_path / "b", rows[:16], N=16)
    out = ask(capsys, first, second)
    lines = out.splitlines()
    assert lines[:3] == [str(first), 'update 60: back to 16 with {"watch_times": 0, "lr": 1e-06}',
                         "update 24: mismatch_kl_high: 0.04 is above 0.02"]
    assert max(len(line) for line in lines if line not in (str(first), str(second))) <= 80
    assert len(lines) == 4 + len(rules.RULES) + 1 + 2 + len(rules.RULES)
    table = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[4:4 + len(rules.RULES)]}
    assert table["mismatch_kl_high"] == "1     24  above 0.02"
    assert table["reward_falls"].startswith("0      -  below its best")
    assert table["groups_equal"] == "not applied: no equal_groups"
    assert table["score_falls"] == "not applied: no score"


BAD = [
    ("metrics.jsonl", None, "metrics.jsonl: No such file or directory; give runs/NAME"),
    ("metrics.jsonl", b"\xff", "metrics.jsonl: is not text"),
    ("metrics.jsonl", b'{"update": 1}\n{"upd', "metrics.jsonl: line 2 is no JSON object"),
    ("metrics.jsonl", b"[1]", "line 1 is no JSON object"),
    ("metrics.jsonl", b"[" * 100_000, "line 1 is no JSON object"),
    ("metrics.jsonl", b'{"reward": 1}', "line 1 has no update"),
    ("metrics.jsonl", b'{"update": true}', "line 1 has no update"),
    ("metrics.jsonl", b'{"update": 1}\n{"update": 1}', "its updates are not in order"),
    ("metrics.jsonl", b'{"update": 1, "reward": "__import__"}', "line 1: reward is no number"),
    ("metrics.jsonl", b'{"update": 1, "reward": 1' + b"0" * 400 + b"}", "line 1: reward is no number"),
    ("metrics.jsonl", b'{"update": 1, "routing_agreement": [0.5, null]}', "routing_agreement is no number"),
    ("config.json", b"{}", "config.json: has no mini_batches"),
    ("config.json", b'{"mini_batches": 0}', "config.json: has no mini_batches"),
    ("events.jsonl", b'{"act": "back", "update": 3, "to": "\\u001b[2J", "change": 1}', "an act is not as runs"),
    ("events.jsonl", b"{", "events.jsonl: line 1 is no JSON object"),
]


@pytest.mark.parametrize("file, data, line", BAD, ids=[str(row[2])[:30] for row in BAD])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, file, data, line):
    folder = write_run(tmp_path / "run", [{"update": 1, "reward": 0.5}])
    (folder / file).unlink(missing_ok=True)
    if data is not None:
        (folder / file).write_bytes(data)
    refused(capsys, line, folder)


@pytest.mark.parametrize("argv", [[], ["runs/a", "--rules"], ["--recorded", "x", "runs/a"], ["--shout"]])
def test_arguments_that_say_nothing_or_two_things_are_refused(capsys, argv):
    refused(capsys, "give folders of runs, or --recorded FILE, or --rules" if "--shout" not in argv else "--shout",
            *argv)


def test_a_picture_is_of_runs(tmp_path, capsys):
    refused(capsys, "rules.png: is of runs; give their folders", "--rules", "--picture", tmp_path / "rules.png")
    refused(capsys, "no is no folder; make it first", "runs/a", "--picture", tmp_path / "no/rules.png")


def refused(capsys, line, *argv):
    with pytest.raises(SystemExit) as end:
        watch.main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and len(err) < 400
    assert err.startswith("scaled: ") and line in err and "\x1b" not in err


def test_the_picture_has_a_dot_where_a_rule_began_to_hold(tmp_path, capsys, monkeypatch):
    figures, make = [], pictures.new_figure
    monkeypatch.setattr(pictures, "new_figure", lambda size: figures.append(make(size)) or figures[-1])
    rows = [{"update": i, "mismatch_kl": 0.01 if i < 17 else 0.04, "reward": i / 40, "score": None}
            for i in range(1, 41)]
    back = {"update": 60, "act": "back", "to": 16, "change": {}}
    runs = [write_run(tmp_path / "a$", rows, acts=[back]), write_run(tmp_path / "b", rows[:16])]
    ask(capsys, *runs, "--picture", tmp_path / "rules.png")
    assert (tmp_path / "rules.png").read_bytes().startswith(b"\x89PNG\r\n")
    curves, others, dots, none = figures[0].axes
    assert curves.lines[0].get_xydata().tolist() == [[row["update"], row["reward"]] for row in rows]
    assert [line.get_label() for line in curves.lines] == ["reward", "back"]
    assert len(others.lines) == 1 and not none.lines
    found = watch.watch(*watch.read_run(runs[0]))["events"]
    assert found and [line.get_xydata().tolist() for line in dots.lines] == [
        points for event in found for place in [rules.NAMES.index(event["rule"])]
        for points in ([[event["since"], place], [event["update"], place]], [[event["update"], place]])]
    assert [text.get_text() for text in dots.get_yticklabels()] == list(rules.NAMES)


def test_help_answers_without_what_is_slow():
    code = "import sys, scaled.watch; assert not {'torch', 'vllm', 'transformers', 'scipy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_readme_has_the_rules_and_the_recorded_table():
    readme = Path(scaled.__file__).with_name("README.md").read_text()
    assert watch.rules_table() in readme
    said = {row["rule"]: row for row in summary(CORE)}
    falls, kl, any_rule = said["reward_falls"], said["mismatch_kl_high"], said["any of them"]
    flat = " ".join(readme.split())
    assert (f"the {falls['failures'] + falls['well']} runs of the experiments: {falls['failures']} fail, as "
            in flat and f"defines it, {falls['well']} stay well" in flat)
    for row, name in ((falls, "`reward_falls`"), (kl, "`mismatch_kl_high`"),
                      (said["extreme_tokens_high"], "`extreme_tokens_high`"),
                      (said["staleness_kl_high"], "`staleness_kl_high`"), (any_rule, "any of them")):
        low, high = row["warned_interval"]
        false_low, false_high = row["false_alarms_interval"]
        assert (f"| {name} | {row['warned']} of {row['failures']} [{low:.2f}, {high:.2f}] | "
                f"{row['median_updates_before']:g} | {row['false_alarms']} of {row['well']} "
                f"[{false_low:.2f}, {false_high:.2f}] |") in flat, name


# ---------------------------------------------------------------------------- recorded runs
def recorded(seed, cell="router | N=1 | none", **curves):
    """20 points of 8 updates, of a run that stays well unless a curve says otherwise."""
    flat = dict(reward=[0.5] * 20, entropy=[0.3] * 20, mismatch_kl=[1e-3] * 20, staleness_kl=[0.0] * 20,
                extreme_token_fraction=[0.0] * 20, clip_fraction=[0.0] * 20)
    return {"cell": cell, "seed": seed, "stopped": None, "score": [[80, 0.5], [160, 0.5]],
            "engine_score": [[80, 0.5], [160, 0.5]]} | flat | curves


def test_a_warning_is_an_event_before_the_failure_and_an_alarm_one_without(tmp_path):
    """Three failures, the first with an event long before, the second with one after it, the third with none; of two
    runs that stay well one has an event."""
    falls = [0.5] * 10 + [0.44] * 10
    steep = {"reward": falls, "mismatch_kl": [1e-3] * 2 + [0.03] * 18}
    late = {"reward": falls, "mismatch_kl": [1e-3] * 19 + [0.03]}
    runs = [recorded(1, **steep), recorded(2, **late), recorded(3, reward=falls), recorded(4),
            recorded(5, mismatch_kl=[0.03] * 20), recorded(6, stopped="loss nan, after update 24", reward=[0.5] * 3,
                                                           **{name: [0.0] * 3 for name in runner.CURVES[1:]})]
    path = tmp_path / "core.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in runs) + '{"half')
    fails = outcomes.updates_until_failure(runs[0])
    assert fails == outcomes.updates_until_failure(runs[2]) and 80 < fails < 160
    said = {row["rule"]: row for row in summary(path)}
    kl = said["mismatch_kl_high"]
    assert (kl["failures"], kl["warned"], kl["updates_before"]) == (4, 1, [fails - 24])
    assert (kl["well"], kl["false_alarms"]) == (2, 1)
    interval = stats.binomtest(1, 2).proportion_ci(0.95, "exact")
    assert kl["false_alarms_interval"] == pytest.approx([interval.low, interval.high])
    # the mean of the 16 updates that end at update 88 is .47; that of 64 comes below .95 of .5 at update 112
    assert said["reward_falls"]["updates_before"] == [fails - 88] * 3 == [24] * 3
    assert said["any of them"]["updates_before"] == [fails - 24, 24, 24]
    assert said["sync_differs"] == {"rule": "sync_differs", "not_applied": "no sync_difference"}
    assert max(map(len, text(summary(path)).splitlines())) <= 80


def test_the_recorded_runs_by_a_slow_count(tmp_path):
    """The bound on the KL, counted from the curves without any function of ours but the definition of a failure. Runs
    of N up to 8: of others a window has more points."""
    runs = [run for run in runner.load(CORE).values() if int(run["cell"].split("N=")[1].split()[0]) <= 8]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    first = {id(run): next((8 * (i + 1) for i, x in enumerate(run["mismatch_kl"]) if x > 0.02), None) for run in runs}
    at = {id(run): outcomes.updates_until_failure(run) for run in runs}
    ahead = [at[run] - first[run] for run in first if at[run] and first[run] and first[run] < at[run]]
    alarms = sum(1 for run in first if not at[run] and first[run])
    kl = next(row for row in summary(tmp_path / "some.jsonl") if row["rule"] == "mismatch_kl_high")
    assert sorted(kl["updates_before"]) == sorted(ahead) and kl["false_alarms"] == alarms


def test_curves_become_rows(capsys):
    rows, N = curves(recorded(1, cell="router | N=32 | R3"), "here", 8)
    assert N == 32 and [row["update"] for row in rows] == [*range(8, 161, 8)]
    assert [row.get("score") for row in rows] == [None] * 9 + [0.5] + [None] * 9 + [0.5]
    assert rows[0]["mismatch_kl"] == 1e-3 and "clip_fraction" not in rows[0]


HOSTILE = [
    (recorded(1, cell=7), "run 1 is no recorded run (TypeError"),
    (recorded(1, cell="x"), "run 1 is no recorded run"),
    (recorded(1, reward=["0.5"] * 20), "'0.5' is no number"),
    (recorded(1, reward=[float("nan")] * 20), "run 1 is no recorded run"),
    (recorded(1, entropy=[0.3] * 19), "run 1 is no recorded run (ValueError"),
    (recorded(1, engine_score=[[80]]), "run 1 is no recorded run"),
    (recorded(1, stopped=3), "run 1 is no recorded run"),
    ({"cell": "a"}, "is no file of recorded runs (KeyError)"),
    (7, "is no file of recorded runs (TypeError)"),
    ("", "has no runs"),
]


@pytest.mark.parametrize("run, line", HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_what_is_no_recorded_run_is_refused_in_one_line(tmp_path, capsys, run, line):
    path = tmp_path / "core.jsonl"
    path.write_text(json.dumps(run) if run else "")
    refused(capsys, line, "--recorded", path)
    if not run:
        refused(capsys, "there is no such file", "--recorded", tmp_path / "nowhere")
