"""How far apart are engine and trainer on a checkpoint, which fault explains it, what closes it?

    python -m scaled.diagnose --model DIR --prompts FILE
    torchrun --nproc-per-node 8 -m scaled.diagnose --model DIR --precision fp8 --tensor-parallel 2

The first step with a new checkpoint, engine version or precision: vLLM samples, the trainer scores
the same tokens with its own experts and with the engine's, and artificial new weights are synced
twice. No reward, no optimiser, nothing is trained or written but a picture that is asked for.
"""
import json
import sys
from dataclasses import asdict, field, fields, make_dataclass
from pathlib import Path

from nano_moe_rl import command_line
from scaled.config import Config
from scaled.pictures import check_picture

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
    given = dict(precision="bf16", prompts="", count=16, json=False, picture=None) | DEFAULTS | vars(
        parser.parse_args(argv))
    alone = {name: given.pop(name) for name in ("prompts", "count", "json", "picture")}
    c = Config(name="diagnose", checkpoint=given.pop("model"), answer_column="", replay="none",
               train_data=alone["prompts"] or "random tokens", mini_batches=1,
               rollout_precision=given.pop("precision"), gradient_checkpointing=False, **given)
    if alone["count"] < 1:
        raise ValueError(f"--count {alone['count']}: give 1 or more")
    check_picture(alone["picture"])
    return c, alone


def take_prompts(c: Config, file: str, count: int) -> list[list[int]]:
    """Token ids of the first prompts of a file, or of random ones. ValueError for checkpoints and
    data that cannot be used."""
    import torch

    from scaled.checkpoint import ROWS
    from scaled.checks import read_checkpoint, read_prompts

    try:
        config, tokenizer = read_checkpoint(c)
    except ValueError as error:
        line = str(error).replace("--checkpoint", "--model")
        if Path(c.checkpoint, ROWS).exists():
            line = (f"--model {c.checkpoint}: is a run; python -m scaled.export {c.checkpoint} DIR makes a Hugging "
                    "Face folder of it")
        raise ValueError(line) from error
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
            from scaled.findings import draw, table
            print(json.dumps(asdict(c) | found) if alone["json"] else table(found, c))
            if alone["picture"]:
                draw(found, alone["picture"])
    except BaseException as error:
        ranks.fail(f"rank {RANK}: {type(error).__name__}: {error}", 1, error)
    ranks.end()
    return 3 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
