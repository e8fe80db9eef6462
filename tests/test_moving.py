"""The picture that moves: its numbers against the rollout, by hand, and its page in a real browser."""

import base64
import hashlib
import json
import math
import re
import time
import xml.etree.ElementTree as ET
from html import unescape

import pytest
import torch
from conftest import ROOT

import nano_moe_rl as nano
from figures import moving
from figures.browser import PATH, Browser

PICTURES = ROOT / "tutorials" / "pictures"
SCRIPT = re.compile(r"<script([^>]*)>(.*?)</script>", re.DOTALL)
EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</td></table>", "'", "a\u202eb", "&lt;", "<!--"]


@pytest.fixture(scope="module")
def rolled():
    """π_θ, the response, its maps."""
    return moving.rollout()


@pytest.fixture(scope="module")
def file(rolled, tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "routes.html"
    path.write_text(moving.build(*rolled))
    return path


def parsed(html):
    """The page without its scripts, which are no XML, and the numbers that they read."""
    (_, numbers), (_, script) = SCRIPT.findall(html)
    return ET.fromstring(SCRIPT.sub("", html)), json.loads(numbers), script


def cells_of(root):
    """By mode, token and layer."""
    return {tuple(int(cell.get(f"data-{x}")) for x in ("mode", "t", "layer")): cell
            for cell in root.iter("td") if "cell" in cell.get("class", "").split()}


def logprobs_by_hand(model, row, routes):
    """log π of each next token of one response, alone in its batch: [] of T - 1 floats, 0 in the prompt."""
    tokens = row.tokens[:, : int(row.lengths[0])]
    with torch.no_grad():
        logits, _ = model(tokens[:, :-1], torch.tensor([routes]))
    found = []
    for t, scores in enumerate(logits[0].double().tolist()):
        chosen = scores[tokens[0, t + 1]] - math.log(sum(math.exp(x) for x in scores))
        found.append(chosen if t + 1 >= row.prompt_lengths[0] else 0.0)
    return found


def test_each_cell_says_what_was_chosen_and_what_the_flip_did(rolled, file):
    model, row, maps = rolled
    root, numbers, _ = parsed(file.read_text())
    cells, end = cells_of(root), int(row.lengths[0]) - 1
    engine = row.routing[0, :end].tolist()
    assert cells.keys() == {(m, t, layer) for m in range(3) for t in range(end) for layer in range(3)}
    assert row.rewards.item() == 1 and [one.mode for one in maps] == ["none", "R2", "R3"]
    assert maps[0].used == maps[0].live and maps[2].used == engine and maps[1].used not in (engine, maps[0].live)
    flips = 0
    for m, one in enumerate(maps):
        used = logprobs_by_hand(model, row, one.used)
        assert numbers["modes"][m]["used"] == one.used and numbers["engine"] == engine
        told = [float(x.replace("−", "-")) for x in numbers["modes"][m]["logprobs"]]
        assert told == pytest.approx(used, abs=6e-4)
        for t in range(end):
            for layer in range(3):
                cell, sets = cells[m, t, layer], [{*side[t][layer]} for side in (engine, one.used, one.live)]
                others = len(sets[1] - sets[0])
                assert (cell.text or "") == (str(others) if others else "")
                assert ("other" in cell.get("class")) == bool(others)
                assert ("ringed" in cell.get("class")) == (sets[2] != sets[1])
                text = cell.get("title").replace("−", "-")
                assert f"μ chose {' and '.join(map(str, sorted(sets[0])))}" in text
                claims = re.findall(r"With (μ's|π's own) in this cell alone(.*?not [-.\d]+)\.(?= With|$)", text)
                assert len(claims) == sum(ids != sets[1] for ids in (sets[0], sets[2]))
                for whose, claim in claims:
                    routes = [[[*ids] for ids in layers] for layers in one.used]
                    routes[t][layer] = (engine if whose == "μ's" else one.live)[t][layer]
                    other = logprobs_by_hand(model, row, routes)
                    asked = t + 1 < int(row.prompt_lengths[0])
                    wanted = ([] if asked else [other[t], used[t]]) + [sum(other), sum(used)]
                    said = [float(x) for x in re.findall(r"(?:be|not|response) (-?[\d.]+\d)", claim)]
                    assert said == pytest.approx(wanted, abs=6e-4), text
                    flips += 1
    assert flips > 20


def test_text_of_a_model_stays_text(rolled, monkeypatch, tmp_path):
    monkeypatch.setattr(moving, "words", lambda tokens: [EVIL[i % len(EVIL)] for i in range(len(tokens))])
    path = tmp_path / "evil.html"
    path.write_text(moving.build(*rolled))
    html = path.read_text()
    root, numbers, _ = parsed(html)
    assert len(SCRIPT.findall(html)) == 2 and not list(root.iter("img")) and "\u202e" not in html
    assert numbers["words"][0] == EVIL[0]
    heads = [node.text for node in root.iter("th") if node.get("scope") == "row"]
    assert heads[: len(EVIL)] == [text.replace("\u202e", "\\u202e") for text in EVIL]
    if PATH:
        with Browser(path, 1280) as browser:
            assert browser.value("document.documentElement.dataset.ready") == "yes" and not browser.errors
            assert browser.value("document.images.length") == 0
            for t in range(len(EVIL)):
                browser.value(f"show({t}, 0)")
                assert heads[t] in browser.value("detail.querySelector('h2').textContent")


def test_the_page_by_eye_mouse_and_keyboard(rolled, file):
    """In Chromium, where there is one; else what its script needs is in the page."""
    root, _, script = parsed(file.read_text())
    cells = cells_of(root)
    if not PATH:
        ids = {node.get("id") for node in root.iter()} | {"numbers"}
        assert set(re.findall(r'getElementById\("(\w+)"\)', script)) <= ids
        assert [cell.get("tabindex") for cell in cells.values()].count("0") == 1
        return
    for width, dark in ((1280, False), (1280, True), (400, False), (400, True)):
        with Browser(file, width, dark=dark) as browser:
            assert browser.value("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
            assert browser.value("[...document.querySelectorAll('.scroll')].every(x => x.scrollWidth <= x.clientWidth)")
            back, text = browser.value("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
            bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) > 384 for colour in (back, text)]
            assert bright == [not dark, dark]
            if (width, dark) == (1280, False):
                use(browser, cells)
            assert not browser.errors


def use(browser, cells):
    """Points, tabs, presses arrows and plays."""
    panel = "document.querySelector('#detail p').textContent"
    first = browser.value(panel)  # begins at a flip of the response
    assert "With μ's in this cell alone, log p of the next token" in first
    browser.point('[data-mode="1"][data-t="3"][data-layer="1"]')
    assert browser.value(panel) == cells[1, 3, 1].get("title")
    browser.press("Tab")
    assert browser.value("document.activeElement.id") == "play"
    browser.press("Tab")
    at = "['mode', 't', 'layer'].map(x => +document.activeElement.dataset[x])"
    assert browser.value(at) == [1, 3, 1]
    for key, place in (("ArrowRight", (1, 3, 2)), ("ArrowRight", (2, 3, 0)), ("ArrowDown", (2, 4, 0)),
                       ("ArrowUp", (2, 3, 0)), ("ArrowLeft", (1, 3, 2)), ("Home", (0, 3, 0)), ("ArrowLeft", (0, 3, 0))):
        browser.press(key)
        assert browser.value(at) == [*place]
        assert browser.value(panel) == unescape(cells[place].get("title"))
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert browser.value(outline) == "solid", "focus is not seen"
    browser.value("play.click()")
    assert browser.value("document.querySelectorAll('.later').length") == len({t for _, t, _ in cells}) - 4
    for _ in range(200):  # until it has moved by itself
        if browser.value("here[0]") > 3:
            break
        time.sleep(0.1)
    assert browser.value("here[0]") > 3
    browser.value("play.click()")
    assert browser.value("document.querySelectorAll('.later').length") == 0


def test_the_kept_page_is_of_these_sources(rolled):
    html = (PICTURES / "routes.html").read_text()
    assert len(html.encode()) < 300_000 and html.startswith(moving.MARK)
    root, numbers, script = parsed(html)
    assert script == (moving.HERE / "moving.js").read_text()
    assert root.find(".//style").text.endswith((moving.HERE / "moving.css").read_text())
    allowed = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
               for text in (root.find(".//style").text, script)]
    policy = f"default-src 'none'; style-src {allowed[0]}; script-src {allowed[1]}"
    assert root.find(".//meta[@http-equiv]").get("content") == policy
    assert not re.search(r"https?:|url\(|@import", html)
    assert len(numbers["engine"]) == len(numbers["words"]) - 1 and numbers["experts"] == nano.Config().experts
    assert (PICTURES / "routes.png").read_bytes()[:5] == b"\x89PNG\r"
