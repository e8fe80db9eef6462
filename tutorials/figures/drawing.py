"""Pictures of the runs. A method has one colour and marker everywhere; colours differ in lightness too."""
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from figures import intervals
from figures.grid import FOUR, LITTLE, MUCH, Cell
from figures.outcomes import Runs, end
from figures.runner import STEP

matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "figures", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False})
STYLES = {"none": ("#000000", "o"), "R2": ("#E69F00", "s"), "R3": ("#0072B2", "^"), "no IS": ("#D55E00", "v"),
          "sequence IS": ("#56B4E9", "D"), "R3, no IS": ("#CC79A7", "<"), "DPPO": ("#009E73", ">"),
          "length norm": ("#999999", "P"), "no clip, half the lr": ("#56B4E9", "D"), "random drop": ("#D55E00", "v")}
LABELS = {"none": "no replay", "no IS": "no replay,\nno IS weight"}


def style(method: str) -> dict:
    """Filled with clipping, hollow without."""
    colour, marker = STYLES.get(method, STYLES.get(method.removesuffix(", no clip"), ("#777777", "x")))
    hollow = method.endswith("no clip")
    return dict(color=colour, marker=marker, markerfacecolor="white" if hollow else colour)


def save(figure: Figure, path: Path):
    figure.savefig(path, metadata={"Date": None})


def points(axes, x: float, values: list[float], method: str):
    """A point a seed, and beside them their mean with its interval."""
    colour = style(method)["color"]
    axes.scatter(x - 0.16 + np.linspace(-0.06, 0.06, len(values)), values, s=9, color=colour, alpha=0.35, linewidths=0)
    of = intervals.mean(values)
    if np.isfinite(of.low):
        axes.errorbar(x + 0.08, of.mean, [[of.mean - of.low], [of.high - of.mean]], capsize=4, markersize=8,
                      linewidth=1.8, linestyle="", **style(method))
        axes.annotate(f"{of.mean:.2f}", (x + 0.16, of.mean), va="center")


def summary(runs: Runs, folder: Path) -> str | None:
    """The picture of the README: what the deployed policy scores at the end, by replay. -> its caption."""
    groups = [("on-policy (N = 1)", 1, ["none", "R3"]), (f"off-policy (N = {LITTLE})", LITTLE, ["none", "R2", "R3"])]
    if not all(Cell("router", N, method).key in runs.cells for _, N, methods in groups for method in ("none", "R3")):
        return None
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    caption = []
    for axes, (title, N, methods) in zip(figure.subplots(1, 2, sharey=True, width_ratios=[2, 3]), groups):
        shown = [method for method in methods if Cell("router", N, method).key in runs.cells]
        by_method = [runs.per_seed(Cell("router", N, method).key, end) for method in shown]
        for seed in by_method[0]:  # a line a seed: the comparison is paired
            axes.plot([x for x, of in enumerate(by_method) if seed in of], [of[seed] for of in by_method if seed in of],
                      color="#999999", linewidth=0.8, marker=".", markersize=4)
        for x, (method, of) in enumerate(zip(shown, by_method)):
            mean = np.mean([*of.values()])
            axes.plot(x, mean, markersize=10, linestyle="", zorder=3, **style(method))
            axes.annotate(f"{mean:.2f}", (x, mean), xytext=(10, -3), textcoords="offset points", fontweight="bold",
                          bbox=dict(color="white", pad=0.5), zorder=4)
        difference = runs.difference(Cell("router", N, "R3").key, Cell("router", N, "none").key)
        caption.append(f"N = {N}: R3 minus none {difference}")
        axes.set(title=f"{title}\nR3 gains {difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]",
                 xticks=range(len(shown)), xticklabels=[LABELS.get(m, m) for m in shown],
                 xlim=(-0.5, len(shown) - 0.4), ylim=(0, 1))
        axes.grid(alpha=0.25, axis="y")
    if "fp32 | N=1 | none" in runs.cells:
        ideal = runs.mean("fp32 | N=1 | none", end)
        caption.append(f"engines that agree (fp32), N = 1: {ideal}")
        for axes in figure.axes:
            axes.axhline(ideal.mean, color="#777777", linestyle="--", linewidth=1)
        figure.axes[0].annotate("engines that agree", (-0.45, ideal.mean + 0.02), color="#555555", fontsize=8)
    figure.axes[0].set_ylabel("score of the deployed policy")
    save(figure, folder / "summary.svg")
    return "summary: " + "; ".join(caption)


def band(axes, rows: list[list[float]], method: str, label: str):
    """Mean and interval over seeds, by update, in the looks of a method."""
    n = min(map(len, rows))
    if n == 0:
        return
    y = np.array([row[:n] for row in rows])
    of = [intervals.mean(column) for column in y.T]
    mean, low, high = (np.array([getattr(x, name) for x in of]) for name in ("mean", "low", "high"))
    x = np.arange(1, n + 1) * STEP
    looks = style(method) | dict(markersize=4, markevery=max(1, n // 6), linestyle="--" if "no " in method else "-")
    axes.plot(x, mean, label=label, linewidth=1.3, **looks)
    if np.isfinite(low).all():
        axes.fill_between(x, low, high, color=looks["color"], alpha=0.13, linewidth=0)


NUMERICS = ("long fp32", "long fp8", "long int6", "long int5", "long int4")
NOISES = {"mild": 0.0, "noise .3": 0.3, "noise .5": 0.5, "router": 0.8, "noise 1": 1.0}
NS = (1, 2, 4, 8, 16, 32)


def dials(runs: Runs, folder: Path) -> str | None:
    """The end along each dial, the other two at rest."""
    panels = {"numerics, N = 1": (["none"], {name.removeprefix("long "): (name, 1) for name in NUMERICS}),
              "router noise, N = 1": (["none", "R3"], {f"{noise:g}": (name, 1) for name, noise in NOISES.items()}),
              "N, updates per rollout batch": (["none", "none, no clip"], {str(N): ("mild", N) for N in NS})}
    drawn = {}
    for title, (methods, places) in panels.items():
        for method in methods:  # on-policy no gate closes
            keys = {x: Cell(regime, N, "none" if N == 1 and "clip" in method else method).key
                    for x, (regime, N) in places.items()}
            seeds = {x: len(runs.cells.get(key, ())) for x, key in keys.items()}
            of = {x: runs.mean(keys[x], end) for x in keys  # a cell of few seeds waits for the others
                  if seeds[x] and 2 * seeds[x] >= max(seeds.values())}
            if len(of) > 1:
                drawn.setdefault(title, {})[method] = of
    if not drawn:
        return None
    figure = Figure(figsize=(3.6 * len(drawn), 3), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(drawn), sharey=True, squeeze=False).flat, drawn.items()):
        for method, of in lines.items():
            mean, low, high = (np.array([getattr(x, name) for x in of.values()]) for name in ("mean", "low", "high"))
            axes.errorbar([*of], mean, np.nan_to_num([mean - low, high - mean], posinf=0), capsize=3, label=method,
                          linestyle="--" if "clip" in method else "-", **style(method))
        axes.set(title=title, ylim=(0, 1))
        axes.grid(alpha=0.25, axis="y")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("score of the deployed policy")
    save(figure, folder / "dials.svg")
    return None


CAUSES = {  # of a failure: what is drawn beside what, a label -> regime, N, method, and the method whose looks it has
    "rounding of the engine, N = 1": {
        "fp32": ("long fp32", 1, "none", "R3"), "int5": ("long int5", 1, "none", "none")},
    "other experts in the engine, N = 1": {
        "R3": ("long noise .15", 1, "R3", "R3"), "no replay": ("long noise .15", 1, "none", "none")},
    f"old weights, N = {MUCH}": {
        "clipping": ("long fp8", MUCH, "none", "R3"), "no clipping": ("long fp8", MUCH, "none, no clip", "none")}}


def long(runs: Runs, folder: Path) -> str | None:
    """Reward over 1,024 updates: each cause of a failure, and what takes it away."""
    found = {title: {label: (Cell(f"{regime}, 1,024 updates", N, method).key, looks)
                     for label, (regime, N, method, looks) in lines.items()} for title, lines in CAUSES.items()}
    found = {title: lines for title, lines in found.items() if all(key in runs.cells for key, _ in lines.values())}
    if not found:
        return None
    figure = Figure(figsize=(3.4 * len(found), 3), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(found), sharey=True, squeeze=False).flat, found.items()):
        for label, (key, looks) in lines.items():
            band(axes, [row["reward"] for row in runs.cells[key].values()], looks, label)
        axes.set(title=title, xlabel="update", ylim=(0, 1))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("reward, of the inference engine")
    save(figure, folder / "long.svg")
    return "long.svg: " + "; ".join(f"{title}, {label}: {runs.mean(key, end)}" for title, lines in found.items()
                                    for label, (key, _) in lines.items())


def maps(runs: Runs, folder: Path) -> str | None:
    """Mean end by the engines' gap and N, over the seeds that all cells have; a map for each replay mode; dark is
    low. It waits until these are most of the planned ones."""
    regimes, Ns = ("fp32", "mild", "noise .5", "router"), (1, 2, LITTLE, MUCH)
    names = {mode: [[Cell(regime, N, "none" if (N, mode) == (1, "R2") else mode).key for N in Ns] for regime in regimes]
             for mode in ("none", "R2", "R3")}
    every = [name for rows in names.values() for row in rows for name in row]
    seeds = set.intersection(*({*runs.cells.get(name, ())} for name in every))
    if len(seeds) < 0.75 * len(FOUR):
        return None
    figure = Figure(figsize=(9.5, 3), layout="constrained")
    for axes, (mode, rows) in zip(figure.subplots(1, 3), names.items()):
        ends = np.array([[np.mean([runs.per_seed(name, end)[seed] for seed in seeds]) for name in row] for row in rows])
        axes.imshow(ends, cmap="gray", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(ends):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.5 else "black")
        axes.set(title=LABELS.get(mode, mode), xticks=range(len(Ns)), xticklabels=[f"N={N}" for N in Ns],
                 yticks=range(len(regimes)),
                 yticklabels=["fp32, control", "fp8, control", "fp8, noise .5", "fp8, noise .8"])
    save(figure, folder / "maps.svg")
    return f"maps.svg: {len(seeds)} seeds a cell"


def mechanism(rows: dict, folder: Path) -> str | None:
    """Cosine with each of two true gradients against signal to noise of a batch, a column for each dial."""
    if not rows:
        return None
    dials = list(dict.fromkeys(key.split(" | ")[0] for key in rows))
    truths = {"cosine": "cosine with the gradient of the\ntraining engine's policy (fp32)",
              "deployed": "cosine with the gradient of the\npolicy that is deployed"}
    figure, named = Figure(figsize=(10.5, 6.6), layout="constrained"), {}
    panels = figure.subplots(len(truths), len(dials), sharex="col", sharey=True, squeeze=False)
    for dial, column in zip(dials, panels.T):
        for axes, truth in zip(column, truths):
            for key, row in rows.items():
                name = key.removeprefix(f"{dial} | ")
                if name == key:
                    continue
                (x, *x_ends), (y, *y_ends) = row["snr"], row[truth]
                looks = style(MECHANISM.get(name, name))
                errors = [[y - y_ends[0]], [y_ends[1] - y]], [[x - x_ends[0]], [x_ends[1] - x]]
                named[name] = axes.errorbar(x, y, *errors, linestyle="", elinewidth=0.7, **looks)
            axes.axhline(1, color="#777777", linewidth=0.8, linestyle="--")
            axes.grid(alpha=0.25)
        column[0].set_title(dial)
        column[-1].set_xlabel("signal to noise of 1,024 responses")
    for axes, label in zip(panels[:, 0], truths.values()):
        axes.set(ylabel=label, ylim=(0.3, 1.2))
    figure.legend(named.values(), named, loc="outside lower center", ncols=6, fontsize=9)
    save(figure, folder / "mechanism.svg")
    return None


MECHANISM = {"token weight": "none, no clip", "token weight, clip": "none", "sequence weight": "sequence IS",
             "R3, sequence weight": "length norm, no clip",
             "IcePop": "DPPO", "ceiling": "length norm", "R2": "R2, no clip", "R2, clip": "R2", "R3": "R3, no clip",
             "R3, clip": "R3"}  # whose look it has
PICTURES = (summary, dials, long, maps)
