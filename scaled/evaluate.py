"""How good checkpoints are: mean@k, pass@k and maj@k over problems, with intervals, in pairs.

    python -m scaled.evaluate --model runs/laptop --samples 8
    python -m scaled.evaluate --model runs/laptop@40 --model runs/laptop@80 --picture pass.png
    torchrun --nproc-per-node 8 -m scaled.evaluate --model DIR --data FILE --out problems.jsonl

A model is a Hugging Face folder, or what scaled.export takes: runs/NAME, runs/NAME@UPDATE,
runs/NAME@best, or the checkpoint.pt of a run of nano_moe_rl.py. The options of a run are the
defaults. Several models get the same problems and seeds; processes share out the problems.
"""

import json
import sys
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

from nano_moe_rl import check, command_line
from scaled.config import Config
from scaled.models import Model, Options, as_folder, config_of, find, options_of, read_problems
from scaled.pictures import check_new, check_picture
from scaled.ranks import RANK, WORLD, Ranks, refuse

BATCH = 4096  # responses that an engine is asked for at once: their tokens are kept until then


def sample(c: Config, o: Options, tokenizer, prompts: list, reward, votes, peers) -> list[dict]:
    """Rows of the problems of this rank's engine, on the first of its ranks; [] on the others."""
    import torch.distributed as dist
    from scaled.batches import responses
    from scaled.metrics import truncated
    from scaled.ranks import RANK
    from scaled.rewards import grade
    from scaled.run import make_engine

    engine, rows, step = make_engine(c, routes=False), [], max(1, BATCH // o.samples)
    for start in range(0, len(prompts), step):
        part = prompts[start:start + step]
        rollout = engine.generate([prompt.tokens for prompt in part], o.samples, c.max_response,
                                  2**61 + start, 0, c.eval_top_p)  # seeds as of a run's scores
        if RANK % c.tensor_parallel == 0:
            tokens = responses(rollout)
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            rewards = grade(reward, [p for p in part for _ in range(o.samples)], texts, tokens)
            cut = truncated(rollout, c.max_response, engine.eos).tolist()
            for i, prompt in enumerate(part):
                its = slice(i * o.samples, (i + 1) * o.samples)
                rows.append(dict(
                    id=prompt.id, prompt=tokenizer.decode(prompt.tokens), answer=prompt.answer,
                    rewards=rewards[its], answers=votes(texts[its], tokens[its]),
                    lengths=[len(row) for row in tokens[its]], truncated=cut[its]))
        dist.barrier(peers)  # the others are not to wait in vLLM, which has less patience
    engine.close()
    return rows


def evaluate(model: Model, c: Config, o: Options, problems: tuple, reward, votes, ranks,
             peers) -> dict | None:
    """On rank 0 what the responses say of one model; a collective."""
    import torch.distributed as dist
    from scaled.estimators import estimate, of_problem
    from scaled.rewards import take_counts

    (tokenizer, prompts), engines = problems, WORLD // c.tensor_parallel
    with as_folder(model, ranks) as (folder, update):
        rows = sample(replace(c, checkpoint=folder), o, tokenizer,
                      prompts[RANK // c.tensor_parallel::engines], reward, votes, peers)
    counts = {f"reward_{name}": n for name, n in take_counts(reward).items()}
    parts = [None] * WORLD if RANK == 0 else None
    dist.gather_object((rows, counts | {"vote_timeouts": votes.take_timeouts()}), parts)
    if RANK:
        return None
    shares = [rows for rows, _ in parts[::c.tensor_parallel]]
    rows = [shares[i % engines][i // engines] for i in range(len(prompts))]
    each = [of_problem(row, o.threshold) for row in rows]
    return dict(model=model.name, update=update, estimates=estimate(each), problems=each,
                rows=[{"model": model.name, "update": update} | row for row in rows],
                counts={name: sum(counts[name] for _, counts in parts) for name in parts[0][1]})


def report(results: list[dict], o: Options, as_json: bool, picture: str | None):
    from scaled.comparison import draw, table
    from scaled.estimators import LEVEL, estimate

    pairs = [dict(model=b["model"], minus=a["model"],
                  estimates=estimate(b["problems"], a["problems"]))
             for a, b in combinations(results, 2)]
    if as_json:
        print(json.dumps({
            "options": asdict(o), "problems": len(results[0]["rows"]), "level": LEVEL,
            "models": [{key: r[key] for key in ("model", "update", "estimates", "counts")}
                       for r in results], "differences": pairs}))
    else:
        print(table(results, pairs, o))
    if picture:
        draw(results, Path(picture), o)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 for an evaluation that failed, 2 for one that was refused."""
    parser = command_line(Options, __doc__.split("\n")[0])
    parser.error = refuse
    parser.add_argument("--model", action="append", metavar="DIR|RUN[@UPDATE]",
                        help="a Hugging Face folder or a checkpoint of a run; give several")
    parser.add_argument("--out", metavar="FILE", help="rows of JSON, one a problem and model")
    parser.add_argument("--picture", metavar="FILE.png", help="pass rates, and pass@k against k")
    parser.add_argument("--json", action="store_true", default=False, help="instead of a table")
    given = vars(parser.parse_args(argv))
    out, picture, as_json = (given.pop(name, None) for name in ("out", "picture", "json"))
    try:
        Options(**{name: value for name, value in given.items() if name != "model"})
        check_new("out", out)
        check_picture(picture)
        if not (names := given.pop("model", None)):
            raise ValueError("--model: give a Hugging Face folder or a checkpoint of a run, such "
                             "as runs/NAME or runs/NAME@UPDATE")
        models = [find(name) for name in names]
        o = options_of(models, given)
        configs = [config_of(model, o, given.get("trust_remote_code")) for model in models]
        check(o, "tensor_parallel", WORLD % o.tensor_parallel == 0,
              f"a divisor of the {WORLD} processes")
    except (ValueError, OSError) as error:
        refuse(str(error))
    ranks = Ranks()
    try:
        import torch.distributed as dist
        from scaled.checks import check_reward
        from scaled.folder import write_aside
        from scaled.ranks import TIMEOUT
        from scaled.rewards import load_reward
        from scaled.votes import Votes

        reward = load_reward(o.reward, o.reward_seconds)
        problems = [read_problems(model, c) for model, c in zip(models, configs)]
        tried = check_reward(reward, problems[0][1])
        if RANK == 0 and tried < len(problems[0][1]):
            print(f"reward {o.reward} was tried on {tried} of {len(problems[0][1])} rows",
                  file=sys.stderr, flush=True)
        peers, _ = dist.new_subgroups(o.tensor_parallel, backend="gloo", timeout=TIMEOUT)
        votes, results = Votes(reward), []
    except ValueError as error:
        ranks.fail(str(error), code=2)
    except BaseException as error:  # also SystemExit, of a checkpoint's code
        ranks.fail(f"rank {RANK} at the start: {type(error).__name__}: {error}", 1, error)
    try:
        for model, c, its in zip(models, configs, problems):
            results.append(evaluate(model, c, o, its, reward, votes, ranks, peers))
            if RANK == 0 and out:  # after each: the next one can fail
                write_aside(Path(out), "".join(
                    json.dumps(row) + "\n" for result in results for row in result["rows"]))
        if RANK == 0:
            report(results, o, as_json, picture)
    except OSError as error:  # a full disk
        ranks.fail(f"rank {RANK}: {error}", 1)
    except BaseException as error:
        ranks.fail(f"rank {RANK}: {type(error).__name__}: {error}", 1, error)
    ranks.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
