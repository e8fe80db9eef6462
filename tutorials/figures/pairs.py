"""Two commands of the single file that differ in one flag, and what the runs of the grid say of them.

A page quotes `text`; a test compares. The seed is the first whose cold start takes the default number of updates, so
that its command needs no more flags: it was not chosen by how it ends.
"""
from dataclasses import asdict

import numpy as np

import nano_moe_rl as nano
from figures import outcomes
from figures.grid import BASE, LITTLE, MUCH, Cell

SEED = 1001
PAIRS = {  # page: one cell and the other
    "05_importance": (Cell("router", 1, "no IS"), Cell("router", 1, "none")),
    "06_off_policy": (Cell("router", MUCH, "R3, no clip"), Cell("router", MUCH, "R3")),
    "08_replay": (Cell("router", LITTLE, "none"), Cell("router", LITTLE, "R3")),
}


def flags(options: dict) -> str:
    """As the command line takes them."""
    names = {name: "--" + name.replace("_", "-") for name in options}
    return " ".join(("" if value else "--no-").join(("", names[name].removeprefix("" if value else "--")))
                    if isinstance(value, bool) else f"{names[name]} {value}" for name, value in options.items())


def commands(page: str) -> list[str]:
    """What both share, in a variable of the shell, and the two commands."""
    one, other = (asdict(cell.config(SEED)) for cell in PAIRS[page])
    default, differ = asdict(nano.Config()), [name for name in one if one[name] != other[name]]
    shared = {name: x for name, x in one.items() if x != default[name] and name not in (*differ, *BASE, "name")}
    recipe = {name: one[name] for name in BASE if one[name] != default[name]}
    return [f'recipe="{flags(recipe)}"'] + [
        f"python nano_moe_rl.py $recipe {flags(shared | {name: x[name] for name in differ})}" for x in (one, other)]


def text(page: str, runs: outcomes.Runs) -> str:
    """Markdown: the commands, where both end, and the spread over all seeds that both cells have."""
    ends = [runs.per_seed(cell.key, outcomes.end) for cell in PAIRS[page]]
    shared = sorted(set.intersection(*map(set, ends)))
    over = [f"{np.mean(x):.3f} ± {np.std(x, ddof=1):.3f}" for x in ([of[seed] for seed in shared] for of in ends)]
    difference = runs.difference(*(cell.key for cell in reversed(PAIRS[page])))
    lines = "".join(f"    {command}\n" for command in commands(page))
    return (f"{lines}\n`engine_score` ends at {ends[0][SEED]:.3f} with the first command, at {ends[1][SEED]:.3f} with the "
            f"second.\nOver {len(shared)} seeds the ends are {over[0]} and {over[1]} (mean and standard deviation);\n"
            f"the second minus the first, in pairs of a seed, is {difference.mean:+.3f}, 95 % interval "
            f"[{difference.low:+.3f}, {difference.high:+.3f}].\n")
