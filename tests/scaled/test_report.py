"""The page of a report: it loads and runs nothing, hostile text stays text, its pictures are the numbers."""
import base64
import hashlib
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import nano_moe_rl as nano
from figures.browser import PATH, Browser
from scaled import report
from scaled.charts import POINTS, thin
from scaled.config import read_config
from scaled.page import visible
from scaled.readback import number, read_run
from scaled.routemap import maps_of_single
from scaled.rules import Event
from tiny_run import arguments

ROOT = Path(nano.__file__).parent
EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></td></table></body>", "&lt;b&gt;",
        "a\u202eb\u2028c\x00d\x1b[31m", "' onclick='x", "]]><!--", "\ud800", "javascript:alert(1)", "{{7*7}}"]
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "span", "figure", "figcaption",
        "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "svg", "path", "text", "circle", "rect", "g"}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "data-is", "viewBox", "role", "d", "x", "y",
              "cx", "cy", "r", "width", "height"}


def write_run(folder, rows, samples=(), events=(), **options):
    """A run as scaled leaves it behind."""
    folder.mkdir(parents=True)
    options = asdict(read_config(str(ROOT / "scaled/configs/laptop.toml"), {})) | options
    (folder / "config.json").write_text(json.dumps(options))
    for name, lines in (("metrics", rows), ("samples", samples), ("events", events)):
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


ROWS = [{"update": 0, "score": 0.25, "score_errors": 0, "sync_difference": 1e-3}] + [
    {"update": i, "score": i / 100 if i % 4 == 0 else None, "reward": 0.3 + 0.05 * (i * 7 % 5), "entropy": 1 / i,
     "mismatch_kl": 10.0 ** -(i % 4 + 2), "staleness_kl": 0.0 if i % 4 == 1 else 1e-3 * i, "seconds": 2.0,
     "routing_agreement": [0.9, 0.8], "equal_groups": float(i == 3), "grad_norm": 0.5} for i in range(1, 13)]


def made(folder, capsys, *argv):
    assert report.main([*map(str, argv), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    return ET.fromstring(Path(told["page"]).read_text()), told["runs"]  # well formed, or this raises


def texts(root, tag="*"):
    return ["".join(node.itertext()) for node in root.iter(None if tag == "*" else tag)]


def test_hostile_text_is_shown_and_nothing_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample = {"update": 0, "version": 0, "source": "held out", "prompt_id": EVIL[0], "reward": float("nan")}
    samples = [sample | {"prompt": evil, "response": evil, "prompt_id": str(i), "update": update}
               for update in (0, 8) for i, evil in enumerate(EVIL)]
    ids = [[[0, 1]]] * len(EVIL)
    samples.append({"update": 8, "version": 4, "source": "training", "tokens": EVIL, "response_from": 2,
                    "engine_experts": ids, "old_experts": ids, "prompt": "", "response": "",
                    "live_experts": {mode: [[[2, 1]]] * len(EVIL) for mode in ("none", "R2", "R3")}})
    events = [{"update": 3, "rule": evil, "value": evil, "limit": evil} for evil in EVIL] + [{"update": 4}] + [
        {"update": 5, "act": evil, "to": [evil], "change": {evil: evil}} for evil in EVIL]
    name = "runs/<b>&'\"><script>"
    write_run(tmp_path / name.replace("/<", "/<"), ROWS, samples, events, replay=EVIL[0], system=EVIL,
              **{evil: evil for evil in EVIL})
    root, _ = made(tmp_path, capsys, name, "--out", "page.html")
    html = Path("page.html").read_text()
    assert {node.tag for node in root.iter()} <= TAGS
    assert {key for node in root.iter() for key in node.attrib} <= ATTRIBUTES
    policy, style = root.find(".//meta[@http-equiv]").attrib["content"], root.find(".//style").text
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'"
    assert not re.search(r"url\(|@import|expression|https?:", style) and "<script" not in html
    assert root.find(".//title").text == root.find(".//h1").text == name
    shown = {evil: visible(evil).replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace(
        "&#x27;", "'").replace("&amp;", "&") for evil in EVIL}
    assert shown[EVIL[4]] == "a\\u202eb\\u2028c\\u0000d\\u001b[31m" and shown[EVIL[7]] == "\\ud800"
    cells = Counter(texts(root, "td"))
    for evil in EVIL:  # an option's name and value, a prompt, and the rule of an event
        assert cells[shown[evil]] >= 4, evil
        assert sum(text.startswith(shown[evil] + "\n") for text in cells) == 1  # the response, before and after
    assert not [x for x in html if x != "\n" and not x.isprintable()]


def test_a_reader_gets_the_numbers_back_from_the_curves(tmp_path, capsys):
    """From the labels of two ticks of an axis and where they stand, as with a ruler."""
    write_run(tmp_path / "a", ROWS)
    write_run(tmp_path / "b", [row | {"reward": 2 * row.get("reward", 0)} for row in ROWS[1:9]], lr=1.0)
    root, _ = made(tmp_path, capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "page.html")
    panels = {figure.find("figcaption").text: figure.find("svg") for figure in root.iter("figure")}
    assert "score in training precision" not in panels and len(panels) == 9
    for title, name, logarithmic in (("training reward", "reward", False), ("entropy of π_θ, nats", "entropy", False),
                                     ("KL(μ_old‖π_old), between engines", "mismatch_kl", True),
                                     ("score of the inference engine", "score", False)):
        svg = panels[title]
        labels = {kind: [node for node in svg.iter("text") if node.get("class") == kind] for kind in ("end", "middle")}
        ticks = [[(float(node.text), float(node.get("y")) - 3) for node in labels["end"]],
                 [(float(node.text), float(node.get("x"))) for node in labels["middle"]]]
        for place, run in enumerate("ab"):
            rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            wanted = [(row["update"], row[name]) for row in rows if row.get(name) is not None]
            line = svg.find(f"path[@class='line run{place}']").get("d")
            read = [[float(x) for x in point.split()] for point in line[1:].split("L")]
            for (update, value), (x, y) in zip(wanted, read, strict=True):
                (u0, x0), (u1, x1) = ticks[1][0], ticks[1][-1]
                assert u0 + (x - x0) / (x1 - x0) * (u1 - u0) == pytest.approx(update, abs=0.05)
                (v0, y0), (v1, y1) = [(torch.tensor(v).log10().item() if logarithmic else v, y)
                                      for v, y in (ticks[0][0], ticks[0][-1])]
                found = v0 + (y - y0) / (y1 - y0) * (v1 - v0)
                found = 10 ** found if logarithmic else found
                assert found == pytest.approx(value, rel=0.02, abs=0 if logarithmic else 2e-3)
    changed = [texts(row, "td") for row in root.iter("tr") if len(row) == 3 and row.find("td") is not None]
    assert changed == [["lr", "0.0003", "1.0"]]


def test_long_lines_are_means_of_neighbours():
    points = [(i, float(i * i % 97)) for i in range(1, 5 * POINTS)]
    short = thin(points)
    assert len(short) == POINTS and thin(points[:POINTS]) == points[:POINTS]
    assert short[0] == (3.0, sum(y for _, y in points[:5]) / 5) and short[-1] == (997.5, sum(
        y for _, y in points[-4:]) / 4)


def test_responses_and_numbers_of_a_run(tmp_path, capsys):
    samples = [{"update": u, "version": u, "source": "held out", "prompt_id": f"p{i}", "prompt": f"ask {i}",
                "response": f"{i} at {u}", "reward": float(i == u), "truncated": i == 1}
               for u in (0, 4, 12) for i in (0, 1)]
    write_run(tmp_path / "a", ROWS, samples, [
        asdict(Event(3, 1, "reward_falls", "reward", 0.123, 0.25)), {"update": 4, "act": "save"},
        asdict(Event(4, 2, "gradient_grows", "grad_norm", float("nan"), 5.0)),
        {"update": 8, "act": "back", "to": 4, "change": {"lr": 0.5}}])
    root, (numbers,) = made(tmp_path, capsys, tmp_path / "a")
    assert (tmp_path / "a/report.html").exists()
    assert numbers == {
        "run": str(tmp_path / "a"), "kind": "scaled", "updates": 12, "first_score": 0.25, "last_score": 0.12,
        "last_reward": pytest.approx(0.3 + 0.05 * 4), "seconds_per_update": 2.0, "updates_without_gradient": 1,
        "events": 4, "routes": []}
    rows = [texts(row, "td") for row in root.iter("tr") if row.find("td") is not None]
    assert ["ask 0", "0 at 0\nreward 1", "0 at 12\nreward 0"] in rows
    assert ["ask 1", "1 at 0\nreward 0, cut off", "1 at 12\nreward 0, cut off"] in rows
    assert ["3", "reward_falls", "limit 0.25, it was 0.123"] in rows and ["4", "", "save"] in rows
    assert ["4", "gradient_grows", "limit 5, it was not a number"] in rows
    assert ["8", "", 'back to 4 with {"lr": 0.5}'] in rows


# ------------------------------------------------------------------------------------- Maps of routes
@pytest.fixture(scope="module")
def noisy(tmp_path_factory, no_pictures):
    """A run of the single file whose engines choose other experts."""
    folder = tmp_path_factory.mktemp("noisy")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert nano.main(arguments(name="noisy", router_noise=1.0, replay="R2", lr=0.03, mini_batches=4)) == 0
    return folder / "runs/noisy"


def test_maps_of_the_single_file_are_what_each_mode_does_to_a_token(noisy):
    """Against the engine, π_old and π_θ made anew, and routes compared one by one."""
    maps, samples = maps_of_single(read_run(str(noisy)))
    c, state = nano.Config(**json.loads((noisy / "config.json").read_text())), torch.load(noisy / "checkpoint.pt")
    old = nano.Model(c)
    old.load_state_dict(state["model"])
    rollout = nano.sample(nano.InferenceEngine(old, c.rollout_precision, 1.0), 4 * c.mini_batch // c.group_size,
                          c.group_size, 2**61 + 1)
    row = rollout.split(1)[3 * c.mini_batch]
    fed = int(row.lengths[0]) - 1
    old_routing = nano.policy(old, row)[2][0, :fed].tolist()
    engine = row.routing[0, :fed].tolist()
    none, R2, R3 = maps
    assert [one.mode for one in maps] == ["none", "R2", "R3"] and {one.update for one in maps} == {8}
    assert none.engine == R2.engine == R3.engine == R3.used == engine and R2.used == old_routing
    assert none.used == none.live and none.used != old_routing  # three updates later
    assert none.tokens == [nano.VOCABULARY[token] for token in row.tokens[0, :fed]]
    assert none.response_from == row.prompt_lengths[0] and len(none.pairs) == fed * c.layers
    for one in maps:
        for t in range(fed):
            for layer in range(c.layers):
                missing = sum(expert not in engine[t][layer] for expert in one.used[t][layer])
                assert one.others(t, layer) == missing
                assert one.overruled(t, layer) == (sorted(one.live[t][layer]) != sorted(one.used[t][layer]))
    assert any(R3.overruled(*pair) for pair in R3.pairs) and any(none.others(*pair) for pair in none.pairs)
    for place, sample in enumerate(samples):
        end = int(rollout.lengths[place * c.group_size])
        whole = [nano.VOCABULARY[token] for token in rollout.tokens[place * c.group_size, :end]]
        assert f"{sample['prompt']} {sample['response']}".split() == whole
        assert sample["reward"] == rollout.rewards[place * c.group_size]


def test_the_picture_has_a_mark_for_each_difference(noisy, tmp_path, capsys):
    engine = [[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]]]
    trainer = [[[1, 0], [2, 3]], [[0, 2], [2, 3]], [[4, 5], [3, 6]]]  # 0, 0; 1, 0; 2, 1 others
    sample = {"update": 4, "source": "training", "tokens": ["a", " ", "c" * 40], "response_from": 1,
              "engine_experts": engine, "trainer_experts": trainer}  # of an earlier version
    for mode in ("none", "R3"):
        write_run(tmp_path / mode, ROWS, [sample], replay=mode)
    root, numbers = made(tmp_path, capsys, noisy, tmp_path / "none", tmp_path / "R3", "--out", tmp_path / "page.html")
    assert numbers[1]["routes"] == [
        {"mode": "none", "update": 4, "pairs": 6, "other_experts": 3, "router_overruled": 0}]
    assert numbers[2]["routes"] == [
        {"mode": "R3", "update": 4, "pairs": 6, "other_experts": 0, "router_overruled": 3}]
    pictures = [svg for div in root.iter("div") if div.get("class") == "maps" for svg in div.iter("svg")]
    assert len(pictures) == 3
    for svg, row in zip(pictures, numbers):
        marks = [node.get("class") for node in svg.iter() if node.tag in ("rect", "circle")]
        assert sum(mark.startswith("other") for mark in marks) == sum(x["other_experts"] for x in row["routes"])
        assert marks.count("ring") == sum(x["router_overruled"] for x in row["routes"])
        assert marks.count("field") == len(row["routes"])
    hints = texts(pictures[1], "title")
    assert hints == ["layer 0: engine 0, 1; training 0, 2; router 0, 2",
                     "layer 0: engine 0, 1; training 4, 5; router 4, 5",
                     "layer 1: engine 2, 3; training 3, 6; router 3, 6"]
    assert [node.text for node in pictures[1].iter("text") if "mono" in node.get("class")] == ["a", "␣", "c" * 13 + "…"]


def test_a_recorded_response_has_a_map_for_each_mode(tmp_path, capsys):
    """Ten tokens of one layer, whose experts are written down; of the four samples the first and the last."""
    engine, old = [[[0, 1]]] * 10, [[[0, 1]]] * 8 + [[[1, 2]]] * 2
    live = {"none": [[[1, 0]]] * 5 + [[[2, 3]]] * 5, "R2": [[[0, 1]]] * 7 + [[[1, 2]]] * 3,
            "R3": [[[0, 2]]] + engine[1:]}
    sample = {"source": "training", "tokens": [*"abcdefghij"], "response_from": 4, "engine_experts": engine,
              "old_experts": old, "live_experts": live}
    rows = [sample | {"update": update} for update in (4, 8, 12)]
    rows[1] = {name: x for name, x in rows[1].items() if not name.endswith("_experts")}
    for name, changes in (("R2", {"replay": "R2"}), ("1", {"mini_batches": 1, "replay": [["R3"]]})):
        write_run(tmp_path / name, ROWS, rows, **changes)
    root, numbers = made(tmp_path, capsys, tmp_path / "R2", tmp_path / "1", "--out", tmp_path / "page.html")
    assert numbers[0]["routes"] == numbers[1]["routes"] == [
        {"mode": mode, "update": update, "pairs": 10, "other_experts": others, "router_overruled": overruled}
        for update in (4, 12) for mode, others, overruled in (("none", 5, 0), ("R2", 2, 1), ("R3", 0, 1))]
    pictures = [svg for div in root.iter("div") if div.get("class") == "maps" for svg in div.iter("svg")]
    assert len(pictures) == 4
    for svg in pictures:
        assert [node.text for node in svg.iter("text") if node.get("class") == "head"] == ["none", "R2", "R3"]
        hints = Counter(texts(svg, "title"))
        assert hints == {"layer 0: engine 0, 1; training 2, 3; router 2, 3": 5,
                         "layer 0: engine 0, 1; training 1, 2; router 1, 2": 2,
                         "layer 0: engine 0, 1; training 0, 1; router 1, 2": 1,
                         "layer 0: engine 0, 1; training 0, 1; router 0, 2": 1}
    recorded = [text for text in texts(root, "p") if text.startswith("Recorded in training")]
    assert [text.rpartition("mode.")[2] for text in recorded] == [
        " The run itself trains under R2.", " With N = 1 π_old is π_θ, and R2 the same as none."]


# ------------------------------------------------------------------------------------- Refusals
GOOD = json.dumps(ROWS[1]) + "\n"
ALL = dict.fromkeys(("none", "R2", "R3"), [[[1]]])
WRONG = [{"old_experts": None}, {"old_experts": [[[1, 2]]]}, {"live_experts": []}, {"live_experts": {}},
         {"live_experts": {"none": [[[1]]]}}, {"live_experts": ALL | {"R4": [[[1]]]}}, {"engine_experts": {}},
         {"live_experts": ALL | {"R2": [[[True]]]}}, {"live_experts": ALL | {"R3": "R3"}}, {"response_from": 2}]
REFUSED = [
    ({}, ["nowhere"], "nowhere: has no config.json and metrics.jsonl; give the folder of a run"),
    ({"metrics.jsonl": ""}, [], "metrics.jsonl: is empty; wait for the first update"),
    ({"metrics.jsonl": GOOD + "half\n"}, [], "metrics.jsonl:2: is not JSON"),
    ({"metrics.jsonl": "[1]\n"}, [], "metrics.jsonl:1: is no JSON object"),
    ({"metrics.jsonl": '{"update": true}\n'}, [], "metrics.jsonl:1: has no update"),
    ({"metrics.jsonl": '{"update": -1}\n'}, [], "metrics.jsonl:1: has no update"),
    ({"metrics.jsonl": "[" * 10**5 + "\n"}, [], "metrics.jsonl:1: is not JSON"),
    ({"samples.jsonl": "{}\n"}, [], "samples.jsonl:1: has no update"),
    ({"events.jsonl": "{\n"}, [], "events.jsonl:1: is not JSON"),
    ({"config.json": "no"}, [], "config.json: is not JSON"),
    ({"config.json": '{"lr": 1}'}, [], "config.json: has neither the options of nano_moe_rl.py nor those of scaled"),
    ({"config.json": '{"train_data": ' + "[" * 6 + "]" * 6 + "}"}, [], "config.json: has lists in lists, deeper"),
    ({"events.jsonl": '{"update": 1, "a": ' + '{"a": ' * 900 + "1" + "}" * 901 + "\n"}, [], "events.jsonl:1: has"),
    ({"config.json": '{"cold_start_steps": 1}', "checkpoint.pt": "x"}, [], "checkpoint.pt: is damaged or foreign"),
    ({"samples.jsonl": '{"update": 4, "engine_experts": [[[1]]], "trainer_experts": [[[1, 2]]], "tokens": ["a"], '
                       '"response_from": 0}\n'}, [], "a sample of update 4 has no experts for each"),
    ({"samples.jsonl": '{"update": 4, "engine_experts": [[["x"]]], "trainer_experts": [[["x"]]], "tokens": ["a"], '
                       '"response_from": 0}\n'}, [], "a sample of update 4 has no experts for each"),
    *(({"samples.jsonl": json.dumps({"update": 4, "tokens": ["a"], "response_from": 0, "engine_experts": [[[1]]],
                                     "old_experts": [[[1]]], "live_experts": ALL} | wrong) + "\n"}, [],
       "a sample of update 4 has no experts for each") for wrong in WRONG),
    ({}, ["run", "--out", "no/page.html"], "--out no/page.html: there is no folder no; make it first"),
    ({}, ["run", "--out", "run/config.json"], "--out run/config.json: exists and is no report; give another file"),
    ({}, ["run", "--out", "run"], "--out run: exists and is no report"),
    ({}, ["run"] * 9, "9 runs: give at most 8"), ({}, ["run", "--open"], "--open"), ({}, ["--json"], "RUN"),
]


def test_the_page_in_a_browser(noisy, tmp_path, capsys):
    """No script, no request, no error, and as wide as the screen; in Chromium, where there is one."""
    write_run(tmp_path / "evil", ROWS, [dict(update=4, source="held out", prompt=text, response=text, reward=1.0)
                                       for text in EVIL])
    page = tmp_path / "page.html"
    root, _ = made(tmp_path, capsys, noisy, tmp_path / "evil", "--out", page)
    colours = set()
    for width, dark in ((1400, False), (400, False), (400, True)) if PATH else ():
        with Browser(page, width, dark=dark) as browser:
            assert not browser.errors and browser.value("document.scripts.length + document.images.length") == 0
            assert browser.value("performance.getEntriesByType('resource').length") == 0
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("document.querySelectorAll('svg').length") == len([*root.iter("svg")]) > 3
            colours.add((dark, browser.value("getComputedStyle(document.body).backgroundColor")))
    assert len(colours) == (2 if PATH else 0)


@pytest.mark.parametrize("files, argv, line", REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys, files, argv, line):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", ROWS)
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as end:
        report.main(argv or ["run"])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and line in err and len(err) < 300, err
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_run_that_goes_on_and_a_report_that_is_there_already(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    name = "runs/" + "long" * 20
    write_run(tmp_path / name, ROWS)
    with open(tmp_path / name / "metrics.jsonl", "a") as file:
        file.write('{"update": 13, "rew')
    for _ in range(2):
        assert report.main([name]) == 0
        head, row, where = capsys.readouterr().out.splitlines()
        assert len(head) == len(row) == 80 and where == f"{name}/report.html: open it in a browser"
        assert row.split()[1:] == ["scaled", "12", "0.250", "0.120", "0.500", "2.000", "1", "0"]


def test_numbers_are_finite_numbers():
    assert [number(x) for x in (1, 0.5, [1, 2], True, None, "1", [], [None], [[1]], float("nan"), float("inf"), 10**400)
            ] == [1.0, 0.5, 1.5] + [None] * 9


def test_help_loads_little():
    code = ("import sys\nfrom scaled import report\ntry: report.main(['--help'])\nexcept SystemExit as end:\n"
            "    print(end.code, *sorted({'transformers', 'vllm', 'matplotlib'} & {*sys.modules}), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == "0\n" and "--out FILE" in done.stdout
