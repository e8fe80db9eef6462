"""Pictures for a page, as SVG that takes its colours from the page's style: curves, maps of routes.

Text in them is escaped by `page.visible`; all else are numbers of ours."""

from math import log10

from scaled.page import visible
from scaled.readback import Recorded
from scaled.routemap import RouteMap

# Title, whether the axis is logarithmic, and the name: in the single file and in scaled, where they
# differ, or one lacks it.
PANELS = [("score of the inference engine", False, ("engine_score", "score")),
          ("score in training precision", False, ("score", "")),
          ("training reward", False, "reward"),
          ("entropy of π_θ, nats", False, "entropy"),
          ("KL(μ_old‖π_old), between engines", True, "mismatch_kl"),
          ("KL(π_old‖π_θ), stale weights", True, "staleness_kl"),
          ("same experts in π_θ and μ, mean of layers", False, "routing_agreement"),
          ("norm of the gradient", True, "grad_norm"),
          ("share of groups with equal rewards", False, "equal_groups"),
          ("share of responses cut off", False, "truncation_rate"),
          ("difference after a weight sync, nats a token", True, "sync_difference")]
POINTS = 200  # of a line; where a run has more updates each is the mean of several
SMALLEST = 1e-12  # on a logarithmic axis; below is rounding
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 48, 10, 8, 22  # of a panel, and its margins


def thin(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most POINTS, means of as many neighbours each."""
    size = -(-len(points) // POINTS)
    parts = [points[i:i + size] for i in range(0, len(points), size)] if size > 1 else (
        [[point] for point in points])
    return [tuple(sum(x) / len(part) for x in zip(*part)) for part in parts]


def curves(runs: list[Recorded]) -> list[tuple[str, str]]:
    """Title and SVG of each panel for which a run has numbers, a line a run."""
    panels = []
    for title, logarithmic, name in PANELS:
        lines = [run.points(name) for run in runs]
        if logarithmic:
            lines = [[(x, y) for x, y in line if y >= SMALLEST] for line in lines]
        if any(lines):
            panels.append((title, panel([thin(line) for line in lines], logarithmic)))
    return panels


def panel(lines: list[list[tuple[float, float]]], logarithmic: bool) -> str:
    from matplotlib.ticker import LogLocator, MaxNLocator  # slow to import

    xs, ys = zip(*(point for line in lines for point in line))
    last, low, high = max(max(xs), 1), min(ys), max(ys)
    if logarithmic:
        low, high = low / 1.2, high * 1.2
    else:
        pad = (high - low) * 0.05 or abs(high) * 0.05 or 0.05
        low, high = (max(low - pad, 0) if low >= 0 else low - pad), high + pad
    decades = logarithmic and high > 30 * low
    ticks = (LogLocator(numticks=5) if decades else MaxNLocator(4)).tick_values(low, high)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / last

    def up(y: float) -> float:
        a, b, y = (map(log10, (low, high, y)) if logarithmic else (low, high, y))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - a) / (b - a)

    parts = []
    for tick in ticks:
        if low <= tick <= high:
            parts.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/><text '
                         f'class="end" x="{LEFT - 5}" y="{up(tick) + 3:.1f}">{tick:.3g}</text>')
    for tick in MaxNLocator(5, integer=True).tick_values(0, last):
        if 0 <= tick <= last:
            parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - 6}" class="middle">'
                         f"{tick:.0f}</text>")
    for place, line in enumerate(lines):
        if line:
            path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in line)
            parts.append(f'<path class="line run{place}" d="M{path}"/>')
            if len(line) < 20:
                parts += [f'<circle class="dot run{place}" cx="{across(x):.1f}" cy="{up(y):.1f}" '
                          'r="2.5"/>' for x, y in line]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


WORD, GAP, HEAD, HIGH = 14, 26, 34, 15  # characters of a token; between maps; above; of a row


def grid(maps: list[RouteMap]) -> str:
    """Maps of one sequence beside each other, a row a token and a column a layer. A cell has the
    number of experts that training used and the engine did not; a ring: replay overruled the
    router."""
    first, layers = maps[0], len(maps[0].used[0])
    wide = 18 if layers <= 12 else 8  # of a column: 48 layers in three modes fit a screen
    step, apart = (1 if layers <= 12 else 4), max(layers * wide, 60) + GAP
    words = [token.strip() or "␣" for token in first.tokens]
    words = [word if len(word) <= WORD else f"{word[:WORD - 1]}…" for word in words]
    start = 16 + 7 * max(map(len, words))
    bottom, total, parts = HEAD + HIGH * len(words), start + len(maps) * apart, []
    for t, word in enumerate(words):
        kind = "asked" if t < first.response_from else "said"
        parts.append(f'<text class="end mono {kind}" x="{start - 8}" y="{HEAD + HIGH * t + 11}">'
                     f"{visible(word)}</text>")
    for place, one in enumerate(maps):
        left = start + place * apart
        parts.append(f'<text x="{left}" y="11" class="head">{one.mode}</text>'
                     f'<rect class="field" x="{left}" y="{HEAD}" width="{wide * layers}" '
                     f'height="{bottom - HEAD}"/>')
        parts += [f'<text x="{left + wide * (layer + 0.5)}" y="27" class="middle">{layer}</text>'
                  for layer in range(0, layers, step)]
        parts += [mark(one, t, layer, left + wide * layer, HEAD + HIGH * t, wide)
                  for t, layer in one.pairs]
        gaps = [f"M{left + wide * layer} {HEAD}V{bottom}" for layer in range(layers + 1)] + [
            f"M{left} {HEAD + HIGH * t}h{wide * layers}" for t in range(len(words) + 1)]
        parts.append(f'<path class="gap" d="{"".join(gaps)}"/>')
    parts.append(f'<path class="grid" d="M0 {HEAD + HIGH * first.response_from}H{total}"/>')
    return f'<svg width="{total}" height="{bottom + 4}" role="img">{"".join(parts)}</svg>'


def mark(one: RouteMap, t: int, layer: int, x: int, y: int, wide: int) -> str:
    """What a cell has, "" where all agree. x, y: its corner."""
    count, overruled = one.others(t, layer), one.overruled(t, layer)
    if not count and not overruled:
        return ""
    engine, used, live = (", ".join(map(str, sorted(side[t][layer])))
                          for side in (one.engine, one.used, one.live))
    parts = [f"<title>layer {layer}: engine {engine}; training {used}; router {live}</title>"]
    if count:
        strength = 1 + (3 * count - 1) // len(one.used[t][layer])  # 1 to 3
        parts.append(f'<rect class="other{strength}" x="{x}" y="{y}" width="{wide}" '
                     f'height="{HIGH}"/>')
        if wide > 12:
            parts.append(f'<text class="middle" x="{x + wide / 2}" y="{y + 11}">{count}</text>')
    if overruled:
        parts.append(f'<circle class="ring" cx="{x + wide / 2}" cy="{y + HIGH / 2}" '
                     f'r="{wide / 3}"/>')
    return f"<g>{''.join(parts)}</g>"
