"""Pictures beside the tables of a plan and of the rules, and which file may become a picture."""

import os
from pathlib import Path


def check_new(option: str, path: str | None):
    """ValueError for a file that cannot be written, or is there already; None is fine."""
    if path is not None and os.path.lexists(path):
        raise ValueError(f"--{option} {path}: exists; give a new file")
    if path is not None and not Path(path).parent.is_dir():
        raise ValueError(f"--{option} {path}: {Path(path).parent} is no folder; make it first")


def check_picture(path: str | None):
    """ValueError for what cannot become a picture; None is fine."""
    check_new("picture", path)
    if path is not None and not path.endswith(".png"):
        raise ValueError(f"--picture {path}: give a name that ends in .png")


def new_figure(size: tuple[float, float]):
    from matplotlib.figure import Figure  # slow to import
    return Figure(figsize=size, layout="constrained")


def draw_plan(plan, path: str):
    """GiB of a GPU at each moment, line on line, under what it has; seconds of an update by phase,
    which a run that does not fit has not."""
    from scaled.memory import GIB

    figure = new_figure((13, 5))
    memory, seconds = figure.subplots(1, 2, width_ratios=(3, 2))
    moments = [*plan.memory.totals()]
    bottom = [0.0] * len(moments)
    for i, (label, row) in enumerate(plan.memory.table().items()):
        sizes = [row.get(moment, 0.0) / GIB for moment in moments]
        if any(sizes):
            memory.bar(moments, sizes, bottom=bottom, label=label, color=f"C{i % 10}",
                       hatch=["", "//", "xx"][i // 10 % 3], edgecolor="white", linewidth=0.5)
            bottom = [low + size for low, size in zip(bottom, sizes)]
    memory.axhline(plan.m.facts.gib, color="black", linestyle="--",
                   label=f"{plan.m.gpu}: {plan.m.facts.gib:g}")
    handles, labels = memory.get_legend_handles_labels()  # from the top of the bars downwards
    memory.legend(handles[::-1], labels[::-1], fontsize=7, loc="center left",
                  bbox_to_anchor=(1.0, 0.5))
    memory.set(title="GiB of a GPU at five moments", ylabel="GiB")
    if plan.memory.faults():
        seconds.axis("off")
        seconds.text(0.5, 0.5, "It does not fit.", ha="center", va="center", fontsize=14)
    else:
        phases = plan.phases()
        bars = seconds.barh([*phases], [*phases.values()], color="C0")
        seconds.bar_label(bars, [f"{x / plan.total:.1%}" for x in phases.values()], padding=3)
        seconds.invert_yaxis()
        seconds.margins(x=0.15)
        seconds.set(title=f"seconds an update: {plan.total:,.4g}", xlabel="seconds")
    figure.savefig(path, dpi=100)


def draw_watched(runs: dict[str, tuple[list[dict], dict]], path: str):
    """A column a run, of its rows and of what watch.watch found in them: reward and score, and under
    them a dot where a rule began to hold, at the end of the line that it looked at."""
    from scaled.rules import NAMES

    figure = new_figure((max(7.0, 4.5 * len(runs) + 2), 6.5))
    above, below = figure.subplots(2, len(runs), sharex="col", squeeze=False,
                                   height_ratios=(1, 1.4))
    for (name, (rows, watched)), curves, rules in zip(runs.items(), above, below, strict=True):
        for metric, marker in (("reward", ""), ("score", ".")):
            points = [(row["update"], row[metric]) for row in rows if row.get(metric) is not None]
            if points:
                curves.plot(*zip(*points), marker=marker, label=metric)
        for event in watched["events"]:
            place = NAMES.index(event["rule"])
            rules.plot([event["since"], event["update"]], [place] * 2, color="C3", linewidth=3)
            rules.plot(event["update"], place, color="C3", marker="o")
        for act in watched["acts"]:
            curves.axvline(act["update"], color="black", linestyle="--", label=act["act"])
        if curves.lines:
            curves.legend()
        curves.set(title=name.replace("$", r"\$"))  # no formula
        rules.set(xlabel="update", ylim=(len(NAMES) - 0.5, -0.5))
        rules.set_yticks(range(len(NAMES)), NAMES if rules is below[0] else [""] * len(NAMES))
        for axes in (curves, rules):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
