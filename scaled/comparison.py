"""What an evaluation shows: the table of checkpoints and of their differences, and the picture."""

import io
import shutil
from pathlib import Path
from string import ascii_uppercase

from nano_moe_rl import save
from scaled.estimators import LEVEL, ks
from scaled.models import Options

LABELS = {"response_length": "tokens", "truncation_rate": "cut off"}
GAP = "  "


def cell(estimate: dict, sign: str = "") -> str:
    mean, low, high = (estimate[name] for name in ("mean", "low", "high"))
    digits = 3 if max(abs(x) for x in (mean, low, high) if x is not None) < 10 else 1
    text = f"{mean:{sign}.{digits}f}"
    return text if low is None else (
        f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]")


def letters(n: int) -> list[str]:
    """A, B, …, Z, then A1, B1, …"""
    return [ascii_uppercase[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(n)]


def table(results: list[dict], pairs: list[dict], o: Options, width: int = 0) -> str:
    """A legend, and the columns of all models and pairs, in blocks as wide as the terminal, or
    80."""
    width = width or shutil.get_terminal_size((80, 24)).columns
    names = letters(len(results))
    models = [[name, *(cell(x) for x in result["estimates"].values())]
              for name, result in zip(names, results)]
    order = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    differences = [[f"{names[j]} - {names[i]}", *(cell(x, "+") for x in pair["estimates"].values())]
                   for (i, j), pair in zip(order, pairs, strict=True)]
    labels = ["", *(LABELS.get(name, name) for name in results[0]["estimates"])]
    lines = [f"{o.data}: {len(results[0]['rows'])} problems, {o.samples} responses to each",
             f"temperature {o.temperature:g}, top-p {o.top_p:g}, up to {o.max_response} tokens, "
             f"{o.rollout_precision} engine"]
    lines += [f"{name}  {result['model']}" + (
        "" if result["update"] is None else f" (update {result['update']})")
        for name, result in zip(names, results)]
    for block in blocks(labels, models + differences, width):
        lines += ["", *block]
    lines += ["", f"[low, high]: {100 * LEVEL:.0f} % over problems; none where all problems are "
              "alike"]
    for name, result in zip(names, results):
        lines += [f"{name}: {count} {what.replace('_', ' ')}"
                  for what, count in result["counts"].items() if count]
    return "\n".join(lines)


def blocks(labels: list[str], columns: list[list[str]], width: int) -> list[list[str]]:
    """Columns beside each other, as many as fit, each block with the labels in front."""
    front, found = max(map(len, labels)), []
    while columns:
        taken, used = [], front
        while columns and (not taken or used + len(GAP) + max(map(len, columns[0])) <= width):
            taken.append(columns.pop(0))
            used += len(GAP) + max(map(len, taken[-1]))
        wide = [front, *(max(map(len, column)) for column in taken)]
        found.append([GAP.join(text.ljust(w) for text, w in zip(row, wide)).rstrip()
                      for row in zip(labels, *taken)])
    return found


def draw(results: list[dict], path: Path, o: Options):
    """How many problems have which pass rate; pass@k and maj@k against k, with intervals."""
    from matplotlib.figure import Figure  # slow to import

    figure, buffer = Figure(figsize=(12, 4.5), layout="constrained"), io.BytesIO()
    rates, curves = figure.subplots(1, 2)
    n, wide = o.samples, o.samples // 20 + 1  # rates are whole numbers of n; so many to a bar
    edges = [(i - 0.5) / n for i in range(0, n + 1 + wide, wide)]
    for name, result in zip(letters(len(results)), results):
        label = f"{name}  {result['model']}".replace("$", r"\$")  # no formula
        rates.hist([problem["pass@1"] for problem in result["problems"]], edges,
                   histtype="step", linewidth=1.5, label=label)
        color = None
        for kind, style in ("pass@", "-"), ("maj@", "--"):
            points = {int(key.removeprefix(kind)): x for key, x in result["estimates"].items()
                      if key.startswith(kind)}
            if not points:
                continue
            points = {1: result["estimates"]["pass@1"]} | points  # one vote is a majority
            means = [x["mean"] for x in points.values()]
            line, = curves.plot([*points], means, style, marker=".", color=color,
                                label=f"{kind}k of {name}")
            color = line.get_color()
            ends = [[x[end] if x[end] is not None else x["mean"] for x in points.values()]
                    for end in ("low", "high")]
            curves.fill_between([*points], *ends, color=color, alpha=0.12, linewidth=0)
    rates.set(title=f"{len(results[0]['rows'])} problems by their pass rate",
              xlabel=f"share of {n} responses that pass", ylabel="problems")
    rates.legend()
    curves.set_xscale("log", base=2)
    curves.set_xticks(ks(n), map(str, ks(n)))
    curves.set(title=f"pass@k and maj@k, {100 * LEVEL:.0f} % intervals over problems", xlabel="k")
    curves.grid(alpha=0.3)
    curves.legend()
    figure.savefig(buffer, format="png", dpi=100)
    save(path, buffer.getvalue())
