"""What scaled.plan says as GPUs become more: where the time goes, what fits, when weights on their way are the
bottleneck. Nothing is computed here that the plan does not compute; no GPU is needed.

    python tests/benchmarks/on_paper.py
    python tests/benchmarks/on_paper.py --model Qwen3-235B-A22B --gpus 64 512 --tensor-parallel 8
"""
import argparse
import sys

from timing import ROOT

RECIPE = str(ROOT / "scaled/configs/qwen3_30b_a3b.toml")
# GPU hours a gradient step of 1,024 responses (arXiv 2512.01374)
PUBLISHED = {"Qwen3-30B-A3B": "Published: 5 to 6 GPU hours. "}


def rows(model: str, gpus: list[int], gpu: str, options: dict, machine: dict) -> list[dict]:
    """A plan for each number of GPUs. computing and gathering are the two of which a train step takes the
    slower; what goes over the host's link comes on top."""
    from scaled.config import read_config
    from scaled.memory import GIB
    from scaled.machine import Machine
    from scaled.plan import make_plan

    found = []
    for n in gpus:
        plan, _ = make_plan(read_config(RECIPE, options), Machine(model=model, gpus=n, gpu=gpu, **machine))
        phases, itemsize = plan.phases(), plan.memory.itemsize
        found.append(dict(
            gpus=n, seconds=plan.total, hours=plan.total * n / 3600, fits=not plan.memory.faults(),
            peak=max(plan.memory.totals().values()) / GIB, responses=plan.memory.sequences,
            shares={name: x / plan.total for name, x in phases.items()},
            computing=plan.computing(4 if plan.c.gradient_checkpointing else 3),
            gathering=plan.gathering(2 * itemsize + 4), over_host=plan.over_host(12)))
    return found


def table(model: str, gpu: str, found: list[dict]) -> str:
    lines = [f"{model} on {gpu}, {RECIPE.rpartition('/')[2]}: an update of 1,024 responses. A share is of its seconds; "
             "the last three are seconds of a train step",
             "GPUs  s/update  GPU hours  rollout    old  train   sync  GiB of a GPU  fits  computing  gathering  host"]
    for row in found:
        of = row["shares"]
        lines.append(
            f"{row['gpus']:4}  {row['seconds']:8.0f}  {row['hours']:9.2f}  {of['rollout']:7.1%}  {of['old']:5.1%}  "
            f"{of['train']:5.1%}  {of['sync']:5.1%}  {row['peak']:12.1f}  {'yes' if row['fits'] else 'no':>4}  "
            f"{row['computing']:9.1f}  {row['gathering']:9.1f}  {row['over_host']:4.1f}")
    first = max(found[0]["shares"], key=found[0]["shares"].get)
    over = next((row["gpus"] for row in found if row["gathering"] > row["computing"]), None)
    return "\n".join(lines + [
        f"{PUBLISHED.get(model, '')}The largest part on {found[0]['gpus']} GPUs is {first}. " + (
            f"From {over} GPUs on gathering takes longer than computing." if over else
            "Gathering stays below computing.")])


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="Qwen3-30B-A3B")
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--tensor-parallel", type=int, help="left out, the recipe's, as the next one")
    parser.add_argument("--cpu-offload", action=argparse.BooleanOptionalAction)
    parser.add_argument("--train-efficiency", type=float, default=0.2)
    parser.add_argument("--rollout-efficiency", type=float, default=0.5)
    args = parser.parse_args(argv)
    options = {name: value for name in ("tensor_parallel", "cpu_offload")
               if (value := getattr(args, name)) is not None}
    machine = {name: getattr(args, name) for name in ("train_efficiency", "rollout_efficiency")}
    print(table(args.model, args.gpu, rows(args.model, args.gpus, args.gpu, options, machine)))


if __name__ == "__main__":
    sys.exit(main())
