"""The picture that moves, pictures/routes.html: a response token by token, and whose experts each mode uses.

The rollout is that of page 8, with larger steps: fp8, router noise .3, three updates before π_θ. Of the right responses
of the last mini-batch the one is shown in which the router of π_θ disagrees with π_old's most often.
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import nano_moe_rl as nano
import toy
from figures.browser import PATH, Browser
from scaled.page import page, printable, visible
from scaled.routemap import TITLES, RouteMap, maps_of_row, to_last_update, words

MARK = "<!DOCTYPE html><!-- made by python tutorials/figures moving -->"
HERE = Path(__file__).parent
STEPS = dict(mini_batch=64, mini_batches=4, router_noise=0.3, lr=1e-3)
Cell = tuple[int, int]  # token, layer


@dataclass(frozen=True)
class Shown:
    """A response of T fed tokens in one mode. Log-probabilities are in nats."""
    map: RouteMap
    logprobs: list[float]  # log π_θ of token t + 1 after token t, T of them; 0 in the prompt
    instead: dict[tuple[Cell, str], list[float]]  # the same with those of "engine" or "live" in this cell alone


@torch.no_grad()
def with_other_experts(model: nano.Model, row: nano.Rollout, one: RouteMap) -> Shown:
    """What each flip does: the response once more for each cell and each choice that was not used in it. All other
    cells keep what was used, so that nothing but this choice differs."""
    used = torch.tensor(one.used)  # (T, L, A)
    asked, routes = [], [used]
    for cell in one.pairs:
        t, layer = cell
        for name, ids in (("engine", one.engine[t][layer]), ("live", one.live[t][layer])):
            if {*ids} != {*one.used[t][layer]}:
                asked.append((cell, name))
                routes.append(used.clone())
                routes[-1][t, layer] = torch.tensor(ids)
    T = len(used)
    many = {name: getattr(row, name).expand(len(routes), *getattr(row, name).shape[1:])
            for name in ("tokens", "prompt_lengths", "lengths")}
    batch = nano.Rollout(many["tokens"][:, :T + 1], many["prompt_lengths"], many["lengths"],
                         replay=torch.stack(routes).to(row.tokens.device))
    first, *others = (nano.policy(model, batch)[0] * batch.mask).tolist()
    return Shown(one, first, dict(zip(asked, others, strict=True)))


def rollout() -> tuple[nano.Model, nano.Rollout, list[RouteMap]]:
    """π_θ, the response, and its map in each mode."""
    start = toy.trained()
    model = nano.Model(c := replace(start.config, **STEPS))
    model.load_state_dict(start.state_dict())
    engine = nano.InferenceEngine(model, c.rollout_precision, c.router_noise)
    batch = nano.sample(engine, c.mini_batches * c.mini_batch // c.group_size, c.group_size, seed=0)
    batch.advantages = nano.group_advantages(batch.rewards, c.group_size)
    old, last = to_last_update(model, nano.adamw(model, c.lr), batch)
    right = [(row, maps_of_row(old, model, row, c.mini_batches)) for row in last.split(1) if row.rewards.item() == 1]
    row, maps = max(right, key=lambda pair: [sum(one.overruled(*cell) for cell in one.pairs) for one in pair[1][1:]])
    return model, row, maps


def listed(ids: set[int]) -> str:
    return " and ".join(map(str, sorted(ids)))


def nats(x: float, digits: int = 3) -> str:
    return f"{round(x, digits) or 0.0:.{digits}f}".replace("-", "−")


def sentence(shown: Shown, words: list[str], cell: Cell) -> str:
    """What a cell has, and what a flip in it did."""
    one, (t, layer) = shown.map, cell
    engine, used, live = ({*side[t][layer]} for side in (one.engine, one.used, one.live))
    text = f"{one.mode}, token {t + 1} “{words[t]}”, layer {layer}: μ chose {listed(engine)}, "
    text += "and so did π." if live == engine else f"π would choose {listed(live)}."
    if not used == live == engine:
        text += f" Used: {listed(used)}."
    for name, whose in (("engine", "μ's"), ("live", "π's own")):
        if other := shown.instead.get((cell, name)):
            text += f" With {whose} in this cell alone, log p of "
            if t + 1 >= one.response_from:
                text += f"the next token, “{words[t + 1]}”, would be {nats(other[t])}, not {nats(shown.logprobs[t])}, "
                text += "and of "
            text += f"the whole response {nats(sum(other))}, not {nats(sum(shown.logprobs))}."
    return text


def mark(shown: Shown, words: list[str], cell: Cell, place: int) -> str:
    one = shown.map
    count, overruled = one.others(*cell), one.overruled(*cell)
    strength = f" other{1 + (3 * count - 1) // len(one.used[cell[0]][cell[1]])}" if count else ""
    edge = " first" if cell[1] == 0 else ""
    text = visible(sentence(shown, words, cell))
    ring = " ringed" if overruled else ""
    return (f'<td role="gridcell" tabindex="{0 if place == cell[0] == cell[1] == 0 else -1}" '
            f'class="cell{strength}{edge}{ring}" data-t="{cell[0]}" data-mode="{place}" data-layer="{cell[1]}" '
            f'title="{text}">{count or ""}</td>')


def table(modes: list[Shown], words: list[str], mu: list[float]) -> str:
    """A row a token, for each mode a column a layer; beside them log p of the next token."""
    first, layers = modes[0].map, range(len(modes[0].map.used[0]))
    head = ('<tr><th scope="col">token</th><th scope="col" class="log">log μ</th>' + "".join(
        f'<th scope="colgroup" class="first" colspan="{len(layers)}">{shown.map.mode}</th>'
        '<th scope="col" class="log">log π</th>' for shown in modes) + "</tr>")
    under = '<tr class="layers"><td>layer</td><td class="log"></td>' + "".join(
        "".join(f'<td class="{"first" if not layer else ""}">{layer}</td>' for layer in layers)
        + '<td class="log"></td>' for _ in modes) + "</tr>"
    rows = ""
    for t in range(len(first.used)):
        number = (lambda x: nats(x[t], 2)) if t + 1 >= first.response_from else (lambda x: "")
        rows += (f'<tr data-t="{t}" class="{"asked" if t < first.response_from else ""}"><th scope="row">'
                 f'{visible(words[t])}</th><td class="log">{number(mu)}</td>')
        for place, shown in enumerate(modes):
            rows += "".join(mark(shown, words, (t, layer), place) for layer in layers)
            rows += f'<td class="log">{number(shown.logprobs)}</td>'
        rows += "</tr>\n"
    foot = f'<tr class="log"><th scope="row">sum</th><td>{nats(sum(mu), 2)}</td>' + "".join(
        f'<td class="first" colspan="{len(layers)}"></td><td>{nats(sum(shown.logprobs), 2)}</td>' for shown in modes)
    foot += "</tr>"
    return (f'<table role="grid" id="map" aria-label="experts by token, mode and layer"><thead>{head}{under}</thead>'
            f"<tbody>{rows}</tbody><tfoot>{foot}</tfoot></table>")


INTRO = """<p>A tiny MoE answers “<b>{prompt}</b>” with “<b>{response}</b>”. An inference engine in fp8 with a noisy
router (.3) sampled it (μ); the training engine, three updates later (π), computes its probability. A row is a token, a
column a layer. <span class="sample other3">1</span> experts used that μ had not: <b>a flip</b>.
<span class="sample ringed">&#160;</span> the router of π would choose others than replay gave it.</p>
<p class="controls"><button type="button" id="play">▶ Play</button> <span class="dim">or point at a cell; with the
keyboard Tab to the table, then arrow keys.</span></p>
"""


def build(model: nano.Model, row: nano.Rollout, maps: list[RouteMap]) -> str:
    """The page."""
    modes, end = [with_other_experts(model, row, one) for one in maps], int(row.lengths[0])
    said, start = [*map(printable, words(row.tokens[0, :end]))], maps[0].response_from
    mu = row.rollout_logprobs[0, :end - 1].tolist()
    numbers = {"words": said, "from": start, "experts": model.config.experts, "engine": maps[0].engine,
               "mu": [nats(x) for x in mu],
               "modes": [{"title": TITLES[one.mode], "used": one.used, "live": one.live,
                          "logprobs": [nats(x) for x in shown.logprobs]} for one, shown in zip(maps, modes)]}
    data = json.dumps(numbers, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    intro = INTRO.format(prompt=visible(" ".join(said[:start])), response=visible(" ".join(said[start:])))
    body = (f'{intro}<div class="two"><div class="scroll">{table(modes, said, mu)}</div>'
            '<section id="detail" aria-label="experts of the token" aria-live="polite"></section></div>\n'
            f'<script type="application/json" id="numbers">{data}</script>\n')
    return page("Whose experts? One response under none, R2 and R3", [("", body)], MARK,
                (HERE / "moving.css").read_text(), (HERE / "moving.js").read_text())


def write(folder: Path) -> list[Path]:
    """routes.html, and its still, routes.png, where there is a Chromium to draw it."""
    html, still = folder / "routes.html", folder / "routes.png"
    nano.save(html, build(*rollout()).encode())
    if not PATH:
        return [html]
    with Browser(html, width=1150, height=670) as browser:
        browser.screenshot(still)
    return [html, still]
