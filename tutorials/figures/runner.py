"""Makes the runs of the grid, one thread and one line of JSON each, and keeps what is done."""
import hashlib, io, json, multiprocessing, time  # noqa: E401
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm

import nano_moe_rl as nano
from figures.grid import LOSSES, STUDIES, Block, Cell
from scaled import study

CURVES = ("reward", "entropy", "mismatch_kl", "staleness_kl", "extreme_token_fraction", "clip_fraction")
STEP = 8  # updates of which a curve keeps the mean
STARTS = Path("runs", "figures-starts")
START_RANGE = (0.2, 0.4)


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()[:12]


# Of the single file, when this process began: `git log --find-object` says which commits had it.
REVISION = git_blob(Path(nano.__file__).read_bytes())


def start_config(c: nano.Config) -> nano.Config:
    """What decides a cold start, and all else at its default: equal for cells that share one."""
    names = ("seed", "teacher", "slip_rate", "width", "heads", "layers", "experts", "top_k", "expert_width",
             "min_digits", "max_digits", "max_response", "cold_start_steps")
    return nano.Config(name="start", **{name: getattr(c, name) for name in names})


def task(symbols: int) -> nano.Task:
    """The running sum over a vocabulary of so many symbols: those beyond its own 13 are never right."""
    others = map(chr, range(0x4E00, 0x4E00 + symbols - len(nano.VOCABULARY)))
    return replace(nano.RUNNING_SUM, vocabulary=nano.VOCABULARY + "".join(others))


def cold_start(start: nano.Config, quick: bool = False, symbols: int = len(nano.VOCABULARY)) -> Path:
    """A file: weights whose score lies in START_RANGE, the score, the updates. It is the single file's cold start,
    with half as many updates more while it has not learned, a fifth fewer while it has learned too much."""
    path = STARTS / f"{hashlib.sha1(f'{start} {symbols} {REVISION}'.encode()).hexdigest()[:16]}.pt"
    steps, scores, (low, high) = start.cold_start_steps, [], START_RANGE
    while not path.exists():
        model = nano.cold_start(replace(start, cold_start_steps=steps), task(symbols))
        scores.append(nano.sample(nano.InferenceEngine(model, "fp32"), 1024, 1, 2**61).rewards.mean().item())
        if quick or low <= scores[-1] <= high:
            buffer = io.BytesIO()
            torch.save((model.state_dict(), scores[-1], steps), buffer)
            STARTS.mkdir(parents=True, exist_ok=True)
            nano.save(path, buffer.getvalue())
        elif len(scores) == 5:
            raise ValueError(f"{start}: cold starts end at {scores}, not within {START_RANGE}: another setting")
        steps = int(steps * (1.5 if scores[-1] < low else 0.8))
    return path


def thin(values: list[float]) -> list[float]:
    """Means of STEP updates, three digits."""
    n = len(values) // STEP
    return [float(f"{x:.3g}") for x in np.reshape(values[:n * STEP], (n, STEP)).mean(1)]


@torch.no_grad()
def replay_the_response(model, batch, prepare_batch=nano.prepare_batch):
    """Instead of nano.prepare_batch: of a prompt, the experts of π_old are replayed, not those of μ."""
    own = nano.policy(model, batch)[2]
    routing = batch.routing.where(batch.mask[..., None, None], own)
    return prepare_batch(model, replace(batch, routing=routing))


def run(cell: Cell, seed: int, quick: bool = False) -> dict:
    """RL of one cell and seed, from its cold start -> what the results keep of it."""
    began, c = time.perf_counter(), cell.config(seed, quick)
    state, start, steps = torch.load(cold_start(start_config(c), quick, cell.symbols))
    model = nano.Model(c, task(cell.symbols))
    model.load_state_dict(state)
    torch.manual_seed(seed)  # of `random drop`; all else has generators of its own
    if cell.method == "frozen router":
        study.freeze_routers(model)
    prepare = replay_the_response if cell.method == "R3 on the response" else nano.prepare_batch
    rows, stopped = [{"update": 0}], None
    try:
        around = STUDIES[cell.method].around(c) if cell.method in STUDIES else nullcontext()
        with around, patch.object(nano, "prepare_batch", prepare):
            nano.learn(model, nano.adamw(model, c.lr), rows, *LOSSES.get(cell.method, ()))
    except FloatingPointError as error:  # a collapse, not a run to drop: its last score is 0
        stopped = f"{error}, after update {rows[-1]['update']}"
        rows.append({"update": rows[-1]["update"] + 1, "score": 0.0, "engine_score": 0.0, "routing_share": None})
    kept = {"cell": cell.key, "seed": seed, "revision": REVISION, "start": round(start, 4), "start_steps": steps,
            "stopped": stopped}
    for name in ("score", "engine_score", "routing_share"):
        kept[name] = [[row["update"], row[name] and round(row[name], 4)] for row in rows if name in row]
    updates = [row for row in rows if "reward" in row]
    kept |= {name: thin([row[name] for row in updates]) for name in CURVES}
    for name, some in (("flips_first", updates[:8]), ("flips_last", updates[-8:])):  # by layer
        kept[name] = [round(1 - x, 4) for x in np.mean([row["routing_agreement"] for row in some], 0)] if some else []
    return kept | {"seconds": round(time.perf_counter() - began, 1)}


def load(path: Path) -> dict[tuple[str, int], dict]:
    """Finished runs by cell and seed. A half-written last line, from an interruption, is left out."""
    runs = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        runs[row["cell"], row["seed"]] = row
    return runs


def one_thread():
    torch.set_num_threads(1)


def run_blocks(blocks: list[Block], path: Path, jobs: int, quick: bool = False):
    """The runs that path does not have yet: block after block, and all cells of a seed before the next."""
    done = load(path)
    nano.save(path, "".join(json.dumps(row) + "\n" for row in done.values()).encode())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=one_thread) as pool, open(path, "a") as file:
        for block in blocks:
            seeds = block.seeds[:1] if quick else block.seeds
            todo = [[(cell, seed) for cell in block.cells if (cell.key, seed) not in done] for seed in seeds]
            starts = [list({(start_config(cell.config(seed, quick)), cell.symbols): None for cell, seed in runs})
                      for runs in todo]
            futures = [pool.submit(cold_start, start, quick, symbols) for start, symbols in starts[0]]
            for runs, following in zip(todo, [*starts[1:], []]):  # a seed's cold starts before the runs of the last
                futures += [pool.submit(cold_start, start, quick, symbols) for start, symbols in following]
                futures += [pool.submit(run, cell, seed, quick) for cell, seed in runs]
            for future in tqdm(as_completed(futures), block.name, len(futures), disable=None):
                if isinstance(row := future.result(), dict):
                    done[row["cell"], row["seed"]] = row
                    file.write(json.dumps(row) + "\n")
                    file.flush()


def again(key: str, seed: int, path: Path, quick: bool = False) -> bool:
    """Runs one cell again and says whether the single file, as it is now, still gives the kept numbers."""
    kept = load(path)[key, seed]
    regime, N, method = key.split(" | ")
    row = json.loads(json.dumps(run(Cell(regime, int(N[2:]), method), seed, quick)))
    differ = [name for name in kept if name not in ("seconds", "revision") and row.get(name) != kept[name]]
    print(f"{key}, seed {seed}: revision {kept['revision']} then, {row['revision']} now; "
          + (f"other numbers: {', '.join(differ)}" if differ else "the same numbers"))
    return not differ
