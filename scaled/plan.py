"""What a run would need and cost: memory, host memory, seconds and money, before it is started.

    python -m scaled.plan --config scaled/configs/qwen3_30b_a3b.toml --gpus 8 --gpu h200
    python -m scaled.plan --config FILE --gpus 8 --gpu h200 --metrics runs/NAME/metrics.jsonl

No GPU and no weights. Options of the run go over those of the file.
"""

import json
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass, fields, replace
from inspect import getdoc

from nano_moe_rl import command_line
from scaled.config import Config, read_config
from scaled.machine import Machine
from scaled.pictures import check_picture, draw_plan

WIDE = 110  # columns, from which on each line has its formula beside it


@dataclass(frozen=True)
class Flags(Machine, Config):
    """The fields of both, for the command line."""


def make_plan(c: Config, m: Machine):
    """-> the plan as Seconds, which has all else, and the rates that were measured, or None.
    ValueError, in one line, for what cannot be planned or could not be started."""
    from scaled.checks import check_model
    from scaled.rates import read_rates
    from scaled.seconds import Seconds
    from scaled.sizes import measure, read_configuration

    name, source, config = read_configuration(c, m.model)
    check_model(c, config)
    s = measure(name, source, config)
    m.check_run(c, s.heads)
    rates = read_rates(c, m, s) if m.metrics else None
    if rates:
        m = replace(m, mean_prompt=m.mean_prompt or rates.mean_prompt,
                    mean_response=m.mean_response or rates.mean_response)
    return Seconds(c, m, s, rates.factors if rates else {}), rates


def as_json(plan, rates) -> dict:
    """All numbers of a plan: bytes, seconds, dollars."""
    from scaled.choices import compare, remedies, savings
    from scaled.memory import GIB

    memory, c, m, s = plan.memory, plan.c, plan.m, plan.s
    return {
        "model": dict(name=s.name, source=s.source, parameters=s.total, active=s.active,
                      cache_bytes_a_token=s.cache_bytes, route_bytes_a_token=s.route_bytes),
        "options": asdict(c), "machine": asdict(m) | asdict(m.facts),
        "gpu_bytes": memory.table(), "gpu_totals": memory.totals(),
        "gpu_limit": m.facts.gib * GIB, "cached_tokens": memory.cached_tokens,
        "host_bytes": memory.host(), "host_limit": m.host_gib * GIB,
        "checkpoint_bytes": memory.checkpoints, "faults": memory.faults(),
        "remedies" if memory.faults() else "savings": [
            change | {"cost": other.cost} for change, other in (
                remedies if memory.faults() else savings)(plan)],
        "seconds": plan.phases(), "factors": plan.factors,
        "measured": asdict(rates) if rates else None,
        "run": dict(updates=c.updates, hours=plan.gpu_hours / m.gpus, gpu_hours=plan.gpu_hours,
                    cost=plan.cost),
        "choices": compare(plan, whole=True)}


# ------------------------------------------------------------------------------------- for people
def report(plan, rates, columns: int) -> str:
    c, m, s = plan.c, plan.m, plan.s
    name = ascii(s.name)[1:-1]
    unit, letter = (1e9, "B") if s.total >= 1e9 else (1e6, "M")
    head = (f"{name}: {s.total / unit:.4g} {letter} parameters, {s.active / unit:.3g} {letter} "
            "active\n"
            f"{m.gpus} x {m.gpu}; N = {c.mini_batches}, {c.replay}, {c.rollout_precision} "
            f"rollouts, {c.prompts} x {c.group_size} responses an update")
    parts = [head, memory_table(plan.memory, columns), host_table(plan.memory), fit(plan)]
    if not plan.memory.faults():  # else its seconds would be those of no run
        parts += [phase_table(plan), choice_table(plan)]
    return "\n\n".join(parts + [assumptions(plan, rates)])


def memory_table(memory, columns: int) -> str:
    from scaled.memory import LINES, MOMENTS

    rows = [f"{'GiB of a GPU':23}" + "".join(f"{moment:>9}" for moment in MOMENTS)]
    for method in LINES:
        row = f"{method.label:23}" + "".join(
            f"{gib(method(memory, moment)) if moment in method.moments else '':>9}"
            for moment in MOMENTS)
        if columns >= WIDE:
            room = columns - len(row) - 3
            row += "   " + textwrap.shorten(getdoc(method), room, placeholder=" …")
        rows.append(row.rstrip())
    totals = memory.totals()
    rows.append(f"{f'total, of {memory.m.facts.gib}':23}" + "".join(
        f"{gib(totals[moment]) if moment in totals else '':>9}" for moment in MOMENTS))
    return "\n".join(rows)


def gib(size: float) -> str:
    from scaled.memory import GIB

    return "<0.01" if 0 < size < 0.005 * GIB else f"{size / GIB:.2f}" if size else "0"


def spelled(change: dict) -> str:
    """As flags of the command line."""
    words = []
    for name, value in change.items():
        flag = "--" + name.replace("_", "-")
        words.append(f"{flag} {value}" if not isinstance(value, bool) else
                     flag if value else f"--no-{flag[2:]}")
    return " ".join(words)


def fit(plan) -> str:
    """Whether it fits, with which other options it would, or would cost less."""
    from scaled.choices import remedies, savings

    memory, most = plan.memory, 4
    if faults := memory.faults():
        lines = ["It does not fit. " + "; ".join(faults) + "."]
        found, verb = remedies(plan)[:most], "fits"
        lines += [] if found else ["  no two of the options that are tried would be enough"]
    else:
        lines = [f"It fits. An engine samples {memory.sequences:.0f} responses a rollout batch, "
                 f"{plan.running(memory.sequences):.0f} at once."]
        found, verb = savings(plan)[:most], "cheaper"
    lines += [f"  {verb} with {spelled(change)}: ${short(other.cost)}" + (
        "" if faults else f", {other.cost / plan.cost - 1:+.1%}") for change, other in found]
    return "\n".join(lines)


def host_table(memory) -> str:
    from scaled.memory import GIB

    rows = memory.host()
    lines = ["GiB of a node's host memory"]
    lines += [f"{name:23}{size / GIB:9.1f}" for name, size in rows.items() if size]
    lines.append(f"{f'total, of {memory.m.host_gib:.0f}':23}{sum(rows.values()) / GIB:9.1f}")
    lines.append(f"{'checkpoints on disk':23}{memory.checkpoints / GIB:9.1f}")
    return "\n".join(lines)


def phase_table(plan) -> str:
    c, m = plan.c, plan.m
    lines = [f"{'seconds an update':23}{'':9}{'share':>9}"]
    for name, seconds in plan.phases().items():
        source = "stated"
        if name in plan.factors:
            source = f"measured: stated x {plan.factors[name]:.3g}"
        elif (like := plan.like.get(name)) in plan.factors:
            source = f"stated x that of {like}"
        lines.append(f"{name:23}{seconds:9.2f}{seconds / plan.total:9.1%}   {source}")
    lines.append(f"{'total':23}{plan.total:9.2f}")
    hours = plan.gpu_hours / m.gpus
    lines.append(f"{c.updates} updates: "
                 f"{f'{hours:,.1f} hours' if hours > 1 else f'{60 * hours:.1f} minutes'}, "
                 f"{short(plan.gpu_hours)} GPU hours, ${short(plan.cost)} at ${m.facts.price:.2f}, "
                 f"{'as given' if m.price else 'assumed, ' + m.facts.priced}")
    return "\n".join(lines)


def short(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.2g}"


def choice_table(plan) -> str:
    from scaled.choices import compare

    lines = [f"{'choice':13}{'s/update':>9}{'GPU h':>8}{'cost $':>9}{'change':>8}{'fits':>5} "
             "the paper's run of 30 B"]
    for row in compare(plan):
        choice = f"N={row['mini_batches']} {row['replay']:4} {row['rollout_precision']}"
        lines.append(f"{choice:13}{row['seconds']:9.1f}{short(row['gpu_hours']):>8}"
                     f"{short(row['cost']):>9}"
                     f"{row['change']:+8.1%}{'yes' if row['fits'] else 'no':>5} "
                     f"{row['paper'] or '-'}")
    return "\n".join(lines)


def assumptions(plan, rates) -> str:
    """What the numbers rest on."""
    m, (prompt, response) = plan.m, plan.memory.lengths
    lengths = f"mean prompt {prompt:.4g}, response {response:.5g} tokens"
    names = ["disk_gb_s", "engine_gib", "context_gib", "fragmentation", "process_gib"]
    text = f"Sizes by {plan.s.source}."
    if rates:
        unlike = f", which had other {', '.join(rates.unlike)}" if rates.unlike else ""
        text += (f" Measured, in {rates.updates} updates of {ascii(m.metrics)[1:-1]}{unlike}: "
                 f"seconds, {lengths}. Assumed: ")
    else:
        text += f" Assumed, not measured: {lengths}, "
        names = ["train_efficiency", "rollout_efficiency", "link_efficiency", "step_ms",
                 "reduce_us", "tensor_ms", "reward_ms"] + names
    return textwrap.fill(text + ", ".join(f"{name} {getattr(m, name):g}" for name in names) + ".",
                         79)


def explain() -> str:
    """Moments and letters, and every line of the tables with its formula."""
    from scaled import memory, seconds
    from scaled.memory import LINES
    from scaled.seconds import PHASES, Seconds

    parts = [(method.label, getdoc(method)) for method in LINES]
    parts += [(f"{name} seconds", getdoc(getattr(Seconds, name))) for name in PHASES]
    return "\n\n".join([memory.__doc__.strip(), seconds.__doc__.strip()] + [
        f"{label}\n    " + text.replace("\n", "\n    ") for label, text in parts])


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, also for a run that does not fit; SystemExit 2 for one that is refused."""
    from scaled.ranks import refuse

    parser = command_line(Flags, __doc__.split("\n")[0])
    parser.error = refuse
    parser.add_argument("--config", metavar="FILE", help="TOML file of the run's options")
    parser.add_argument("--json", action="store_true", help="all numbers, in bytes and seconds")
    parser.add_argument("--explain", action="store_true", help="the formula of each line")
    parser.add_argument("--picture", metavar="FILE.png", help="draw memory and seconds")
    given = vars(parser.parse_args(argv))
    own = {f.name: given.pop(f.name) for f in fields(Machine) if f.name in given}
    if given.pop("explain", False):
        print(explain())
        return 0
    path, to_json, picture = (given.pop(name, None) for name in ("config", "json", "picture"))
    try:
        if path is None:
            raise ValueError("give --config FILE; scaled/configs has examples")
        check_picture(picture)
        plan, rates = make_plan(read_config(path, given), Machine(**own))
    except ValueError as error:
        refuse(str(error))
    if to_json:
        print(json.dumps(as_json(plan, rates), indent=2))
    else:
        print(report(plan, rates, shutil.get_terminal_size().columns))
    if picture:
        draw_plan(plan, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
