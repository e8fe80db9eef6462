"""Commands of the single file, and what the runs of the grid say of them: pairs that differ in one flag, and a table.

Pages quote `text`, the README `table`; tests compare. The seed is the first whose cold start takes the default number
of updates, so that its command needs no more flags: it was not chosen by how it ends.
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
    dashed = {name.replace("_", "-"): value for name, value in options.items()}
    return " ".join(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {value}"
                    for name, value in dashed.items())


def commands(page: str) -> list[str]:
    """What both share, in variables of the shell, and the two commands. The grid's runs have a thread each; with more
    threads sums have another order, and a run takes another course. eval_every is left out: a score in between
    changes no number of a run."""
    one, other = (asdict(cell.config(SEED)) for cell in PAIRS[page])
    default, differ = asdict(nano.Config()), [name for name in one if one[name] != other[name]]
    changed = [name for name in one if one[name] != default[name] and name not in (*differ, "eval_every", "name")]
    recipe, same = ({name: one[name] for name in changed if (name in BASE) == of_all} for of_all in (True, False))
    return ["export OMP_NUM_THREADS=1", f'recipe="{flags(recipe)}"', f'same="{flags(same)}"'] + [
        f"python nano_moe_rl.py $recipe $same {flags({name: x[name] for name in differ})}" for x in (one, other)]


def text(page: str, runs: outcomes.Runs) -> str:
    """Markdown: the commands, where both end, and the spread over all seeds that both cells have."""
    ends = [runs.per_seed(cell.key, outcomes.end) for cell in PAIRS[page]]
    shared = sorted(set.intersection(*map(set, ends)))
    if SEED not in shared:
        raise outcomes.NotRun(f"{PAIRS[page][0].key} and {PAIRS[page][1].key} with seed {SEED}")
    over = [f"{np.mean(x):.3f} ± {np.std(x, ddof=1):.3f}" for x in ([of[seed] for seed in shared] for of in ends)]
    difference = runs.difference(*(cell.key for cell in reversed(PAIRS[page])))
    lines = "".join(f"    {command}\n" for command in commands(page))
    return (f"{lines}\n`engine_score` ends at {ends[0][SEED]:.3f} with the first command, at {ends[1][SEED]:.3f} with "
            f"the second.\nOver {len(shared)} seeds, mean ± standard deviation: {over[0]} and {over[1]}. Second minus "
            f"first, in pairs of a\nseed: {difference.mean:+.3f}, 95 % interval [{difference.low:+.3f}, "
            f"{difference.high:+.3f}].\n")


def table(runs: outcomes.Runs) -> str:
    """The three modes at N = LITTLE: seeds, and the ends of both engines as mean and standard deviation."""
    lines = ["| command, with `recipe` as above | seeds | `engine_score` at the end | `score` |", "|---|---|---|---|"]
    for mode in ("none", "R2", "R3"):
        cell = Cell("router", LITTLE, mode)
        options = dict(mini_batches=LITTLE, router_noise=cell.config(SEED).router_noise, replay=mode)
        columns = [runs.per_seed(cell.key, outcome) for outcome in (outcomes.end, outcomes.trained_end)]
        seeds, ends = sorted(columns[0]), [f"{np.mean([*of.values()]):.3f} ± {np.std([*of.values()], ddof=1):.3f}"
                                           for of in columns]
        lines.append(f"| `python nano_moe_rl.py $recipe {flags(options)}` | {seeds[0]} to {seeds[-1]} | "
                     f"{ends[0]} | {ends[1]} |")
    return "\n".join(lines) + "\n"
