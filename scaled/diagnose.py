"""How far apart are engine and trainer on a checkpoint, which fault explains it, what closes it?

    python -m scaled.diagnose --model DIR --prompts FILE
    torchrun --nproc-per-node 8 -m scaled.diagnose --model DIR --precision fp8 --tensor-parallel 2

The first step with a new checkpoint, engine version or precision: vLLM samples, the trainer scores
the same tokens with its own experts and with the engine's, and artificial new weights are synced
twice. No reward, no optimiser, nothing is trained or written but a picture that is asked for.
"""
import json
import shutil
import sys
import textwrap
from dataclasses import asdict, field, fields, make_dataclass
from pathlib import Path

from nano_moe_rl import command_line
from scaled.config import Config

# Those of the configuration that matter here; all else is at its default.
OPTIONS = ("seed", "trust_remote_code", "prompt_column", "chat", "system", "max_prompt",
           "max_response", "group_size", "temperature", "train_precision", "token_budget",
           "logits_mib", "cpu_offload", "tensor_parallel", "gpu_memory")
DEFAULTS = dict(max_response=256, group_size=4, chat=False)
SIZE = 0.1  # of the artificial changes, in mean sizes of a weight


def parse(argv: list[str] | None) -> tuple[Config, dict]:
    """Config of both engines, and the options of this command alone. ValueError or SystemExit for
    what is refused."""
    from scaled.ranks import refuse

    ours = [(f.name, f.type, field(default=DEFAULTS.get(f.name, f.default), metadata=f.metadata))
            for f in fields(Config) if f.name in OPTIONS]
    parser = command_line(make_dataclass("Options", ours), __doc__.split("\n")[0])
    parser.error = refuse
    parser.add_argument("--model", metavar="DIR", required=True, help="Hugging Face folder")
    parser.add_argument("--precision", metavar="fp32|bf16|fp8|int8", help="of the engine [bf16]")
    parser.add_argument("--prompts", metavar="FILE", help="as for training [random tokens]")
    parser.add_argument("--count", type=int, help="prompts that are sampled, the first [16]")
    parser.add_argument("--json", action="store_true", help="all numbers, for machines")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the gap")
    given = dict(precision="bf16", prompts="", count=16, json=False, picture="") | DEFAULTS | vars(
        parser.parse_args(argv))
    alone = {name: given.pop(name) for name in ("prompts", "count", "json", "picture")}
    c = Config(name="diagnose", checkpoint=given.pop("model"), answer_column="", replay="none",
               train_data=alone["prompts"] or "random tokens", mini_batches=1,
               rollout_precision=given.pop("precision"), gradient_checkpointing=False, **given)
    if alone["count"] < 1:
        raise ValueError(f"--count {alone['count']}: give 1 or more")
    if alone["picture"] and not Path(alone["picture"]).absolute().parent.is_dir():
        raise ValueError(f"--picture {alone['picture']}: there is no such folder; make it")
    return c, alone


def take_prompts(c: Config, file: str, count: int) -> list[list[int]]:
    """Token ids of the first prompts of a file, or of random ones. ValueError for checkpoints and
    data that cannot be used."""
    import torch

    from scaled.checks import read_checkpoint, read_prompts

    config, tokenizer = read_checkpoint(c)
    vocabulary = config.get_text_config().vocab_size
    if not file:
        generator = torch.Generator().manual_seed(c.seed)
        length = min(8, c.max_prompt)
        return torch.randint(vocabulary, (count, length), generator=generator).tolist()
    prompts = read_prompts(c, file, c.train_split, tokenizer, vocabulary)
    return [prompt.tokens for prompt in prompts[:count]]


def observe(policy, rollout, c: Config):
    """An Observation of this rank's rows of a rollout, all in three forward passes of the trainer.
    A collective."""
    import torch

    from scaled.gap import Observation
    from scaled.replay import routed
    from scaled.trainer import passes

    def score(replay, temperature):
        logprobs = torch.zeros_like(rollout.rollout_logprobs)
        routing = None if rollout.routing is None else rollout.routing.clone()
        for rows, part in passes(rollout, c):
            with torch.no_grad(), routed(policy.model, part.routing if replay else None,
                                         part.fed) as routes:
                some, _ = policy(part.tokens, part.fed, temperature)
            if rows:
                logprobs[rows, :some.shape[1]] = some.cpu()
                if routing is not None:
                    routing[rows, :some.shape[1]] = routes.routing.to(routing)
        return logprobs, routing

    own, own_routing = score(False, c.temperature)
    return Observation(
        rollout.fed, rollout.mask, rollout.rollout_logprobs, own, score(False, 1.0)[0],
        rollout.routing, own_routing,
        None if rollout.routing is None else score(True, c.temperature)[0])


def shake(policy, seed: int):
    """Every weight changes by about SIZE of the mean size of its tensor."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            mine = getattr(parameter, "to_local", lambda: parameter.data)()
            noise = torch.randn(mine.shape, generator=generator).to(mine)
            mine += SIZE * mine.abs().mean().nan_to_num(1.0) * noise


def sync_twice(engine, policy, sequences: list[list[int]]) -> list[str]:
    """Two artificial changes, each synced: what the engine has afterwards, "" if it has the new
    weights. A collective; the policy is another one afterwards."""
    import torch

    from scaled.gap import sync_fault
    from scaled.huggingface import named_weights
    from scaled.trainer import logprobs_of

    lengths = torch.tensor([len(sequence) for sequence in sequences])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], True)
    fed = torch.arange(1, tokens.shape[1]) < lengths[:, None]

    def trainer(routing, head=None):
        return logprobs_of(policy, tokens, lengths, routing, head).cpu()

    faults, before = [], {"the weights of the folder": trainer(None)}
    for version in (1, 2):
        weight = policy.model.get_output_embeddings().weight.detach()
        head = getattr(weight, "full_tensor", weight.clone)().clone()
        shake(policy, version)
        engine.wake_up("weights")
        engine.load_weights(named_weights(policy), version)
        engine.wake_up("kv_cache")
        scored, routing = engine.score(sequences)
        candidates = {"the new weights": trainer(routing), **before,
                      "the new weights, but an old output head": trainer(routing, head)}
        fault = sync_fault(scored, candidates, fed)
        faults.append(fault and f"sync {version} left the engine with {fault}")
        before["the weights of the sync before"] = trainer(None)
    return faults


def diagnose(engine, policy, rollout, c: Config) -> dict:
    """All that the command says. A collective; every rank gets the same."""
    import torch.distributed as dist

    from scaled import gap

    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, observe(policy, rollout, c))
    seen = gap.together(parts)
    found = {"responses": len(seen.mask), "tokens": int(seen.mask.sum()),
             "own": gap.distances(seen.rollout_logprobs, seen.own_logprobs, seen.mask)}
    faults = [gap.logprob_fault(seen)]
    if seen.routing is not None:
        found["replayed"] = gap.distances(seen.rollout_logprobs, seen.replayed_logprobs, seen.mask)
        found |= gap.routes_apart(seen)
        faults.append(gap.route_fault(seen))
    rows = list(zip(rollout.tokens, rollout.lengths))[:8]
    faults += sync_twice(engine, policy, [tokens[:n].tolist() for tokens, n in rows])
    found["faults"] = [fault for fault in faults if fault]
    return found | {"recommendation": gap.recommend(found, c.rollout_precision, found["faults"])}


def table(found: dict, c: Config) -> str:
    """For people, as wide as their terminal."""
    from scaled import gap

    width = min(shutil.get_terminal_size().columns, 120)

    def wrap(text: str, indent: str = "  ") -> str:
        return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False)

    columns = [found[name] for name in ("own", "replayed") if name in found]
    rows = [("|Δ log p|, mean", "mean", "9.1e"), ("99th percentile", "p99", "9.1e"),
            ("largest", "max", "9.1e"), ("equal in every bit", "equal_bits", "9.1%"),
            ("k1", "k1", "9.1e"), ("k3, KL(μ‖π)", "k3", "9.1e"),
            ("F(2), ratio beyond 2", "extreme_token_fraction", "9.1e"),
            ("effective sample size", "effective_sample_size", "9.4f"),
            (f"weights above {gap.CAP:g}", "truncated_fraction", "9.1e")]
    lines = [wrap(f"{c.checkpoint}: {found['tokens']} tokens of {found['responses']} responses, "
                  f"engine {c.rollout_precision}, trainer {c.train_precision}"), "",
             f"{'the trainer with':24}" + "".join(f"{name:>16}" for name in
                                                  ("its own experts", "those of μ")[:len(columns)])]
    lines += [f"{text:24}" + "".join(f"{column[name]:16{kind[1:]}}" for column in columns)
              for text, name, kind in rows]
    low = ["0", *map(str, gap.BUCKETS)]
    for i, (a, b) in enumerate(zip(low, low[1:] + ["1"])):
        tokens = columns[0]["by_probability"][i]["tokens"]
        if tokens:
            means = "".join(f"{column['by_probability'][i]['mean']:16.1e}" for column in columns)
            lines.append(f"{f'|Δ|, μ in ({a}, {b}]':24}{means}{tokens:9} tokens")
    if "agreement_by_layer" in found:
        worst, L = min(found["agreement_by_layer"]), len(found["agreement_by_layer"])
        share, first = found["routing_share"], found["first_layer_that_differs"]
        most = f"; first to differ is most often layer {first.index(max(first))}"
        lines += ["", wrap(f"same experts: {sum(found['agreement_by_layer']) / L:.2%} of (token, "
                           f"layer), {worst:.2%} in layer "
                           f"{found['agreement_by_layer'].index(worst)}, the lowest of {L}"),
                  wrap(f"tokens with other experts somewhere: {sum(first):.2%}"
                       + (most if sum(first) else "")),
                  wrap("same experts by position: " + ", ".join(
                      f"from {part['from']} {part['agreement']:.2%}"
                      for part in found["agreement_by_position"])),
                  "routing share, what replay closes of KL(μ‖π): " + (
                      f"{share:.0%}" if share is not None else "there is no gap")]
    advice = found["recommendation"]
    lines += [""] + [wrap(f"FAULT: {fault}") for fault in found["faults"]]
    if not found["faults"]:
        lines += [wrap("both syncs of artificial weights arrived; no fault found" + (
            "" if c.temperature != 1 else "; one of temperature shows only at another than 1"))]
        lines += [f"recommended: replay {advice['replay']}, N up to {advice['mini_batches']}, "
                  f"rollouts in {advice['precision']}"]
    return "\n".join(lines + [wrap(f"  because {text}", "    ") for text in advice["because"]])


def draw(found: dict, path: str):
    """|Δ log p| by size and by probability, same experts by layer and by position."""
    from matplotlib.figure import Figure

    from scaled import gap

    figure = Figure(figsize=(12, 6), layout="constrained")
    sizes, probabilities, layers, positions = figure.subplots(2, 2).flat
    names = [f"≤ {edge:g}" for edge in gap.EDGES] + [f"> {gap.EDGES[-1]:g}"]
    buckets = [f"≤ {edge:g}" for edge in (*gap.BUCKETS, 1)]
    for i, (name, label) in enumerate((("own", "its own experts"), ("replayed", "those of μ"))):
        if name in found:
            style = dict(width=0.4, label=f"trainer with {label}", hatch=["", "//"][i])
            sizes.bar([x + 0.4 * i for x in range(len(names))],
                      [n / found["tokens"] for n in found[name]["histogram"]], **style)
            probabilities.bar([x + 0.4 * i for x in range(len(buckets))],
                              [part["mean"] or 0 for part in found[name]["by_probability"]],
                              **style)
    for axes, labels in (sizes, names), (probabilities, buckets):
        axes.set_xticks([x + 0.2 for x in range(len(labels))], labels, fontsize=8)
        axes.legend()
    sizes.set(title="|log π - log μ| of a token, nats", ylabel="share of tokens")
    probabilities.set(title="mean by the token's probability under μ", ylabel="nats")
    layers.set(title="same experts in both engines, by MoE layer", xlabel="layer")
    positions.set(title="same experts, by position", xlabel="from position")
    if "agreement_by_layer" in found:
        layers.plot(found["agreement_by_layer"], marker=".")
        parts = found["agreement_by_position"]
        positions.plot([str(part["from"]) for part in parts],
                       [part["agreement"] for part in parts], marker=".")
    layers.xaxis.get_major_locator().set_params(integer=True)
    for axes in (layers, positions):
        axes.grid(alpha=0.3)
        axes.set_ylim(top=1.0)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 without a fault, 3 with one; 1 for a failure, 2 for what was refused."""
    from scaled.ranks import RANK, WORLD, Ranks, refuse

    try:
        c, alone = parse(argv)
    except ValueError as error:
        refuse(str(error))
    ranks = Ranks()
    try:
        from scaled.batches import prompts_of_engine, rows_of_rank, take
        from scaled.run import make_engine, make_policy

        prompts = take_prompts(c, alone["prompts"], alone["count"])
        engines, index = WORLD // c.tensor_parallel, RANK // c.tensor_parallel
        if WORLD % c.tensor_parallel or len(prompts) % engines:
            raise ValueError(f"--count {len(prompts)}: with {WORLD} processes and "
                             f"--tensor-parallel {c.tensor_parallel}, give a multiple of the "
                             "number of engines")
        engine = make_engine(c)
    except ValueError as error:
        ranks.fail(str(error), code=2)
    except BaseException as error:
        ranks.fail(f"rank {RANK} at the start: {type(error).__name__}: {error}", 1, error)
    try:
        mine = prompts_of_engine(len(prompts), len(prompts), engines, index)
        rollout = engine.generate([prompts[i] for i in mine], c.group_size, c.max_response,
                                  c.seed, 0)
        engine.sleep()
        rollout = take(rollout, rows_of_rank(len(rollout.tokens), 1, c.tensor_parallel,
                                             RANK % c.tensor_parallel))
        found = diagnose(engine, make_policy(c), rollout, c)
        if RANK == 0:
            print(json.dumps(asdict(c) | found) if alone["json"] else table(found, c))
            if alone["picture"]:
                draw(found, alone["picture"])
    except BaseException as error:
        ranks.fail(f"rank {RANK}: {type(error).__name__}: {error}", 1, error)
    ranks.end()
    return 3 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
