"""Ranks of a process group in processes of their own, for tests."""
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import nano_moe_rl as nano
from scaled.export import export_nano

ROOT = Path(__file__).parents[2]
groups, starts = itertools.count(), itertools.count()
MARK = "STARTED_BY_A_TEST"  # in the environment of a start, and of all that comes of it


def run_ranks(function, world, *args, seconds=240):
    """function(rank, world, *args) in processes of their own, all killed when the time is up."""
    os.environ["GROUP"] = f"{next(groups)}"
    ranks = mp.spawn(one_rank, (function, world, *args), world, join=False)
    try:
        # a join ends with one of the processes, and raises what it raised
        assert any(ranks.join(seconds) for _ in range(world)), "deadlock"
    finally:
        for process in ranks.processes:
            process.kill()


def one_rank(rank, function, world, *args):
    function(rank, world, *args)
    # Not by the interpreter's own end: a thread of gloo that still holds a tensor of the last collective
    # would abort the process there ("terminate called without an active exception").
    sys.stdout.flush()
    os._exit(0)


def join_group(rank, world, folder):
    torch.set_num_threads(1)
    # A file of its own for each group: whoever meets that of an ended one waits for its dead ranks.
    store = f"file://{folder}/group-{os.environ.get('GROUP', 'alone')}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)


def prepare(folder, **options):
    """What the smallest run under torchrun needs: an untrained checkpoint, prompts, options.toml."""
    options = dict(
        checkpoint="hf", train_data="train.jsonl", chat=False, reward="running_sum", max_prompt=7, max_response=8,
        prompts=4, group_size=2, mini_batches=2, token_budget=4096, train_precision="fp32",
        gradient_checkpointing=False, check_sync=0) | options
    export_nano(nano.Model(nano.Config(layers=1, experts=4)), folder / "hf")
    (folder / "train.jsonl").write_text("".join(
        f'{{"prompt": "{a}{b}{c}=", "answer": "0"}}\n' for a in range(3) for b in range(3, 6) for c in range(6, 9)))
    (folder / "options.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items()))


def start(folder, module, *argv, ranks=2, **environment):
    """A module under torchrun, or with ranks=0 without it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return launch(folder, [*torchrun, "-m", module, *argv], **environment)


def launch(folder, argv, **environment):
    """Python with these arguments, as finish, family and kill want it."""
    mark = f"{os.getpid()}-{next(starts)}"
    process = subprocess.Popen(
        [sys.executable, *map(str, argv)], cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", MARK: mark} | environment)
    process.mark = mark
    return process


def family(process):
    """Pids of what has come of a start and is not ended. By their environment: torchrun gives each rank a session of
    its own, and the ranks of one that was killed have another parent."""
    mark, found = f"{MARK}={process.mark}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except OSError:  # it has ended meanwhile, or is somebody else's
            continue
    return found


def kill(process):
    """SIGKILL for the whole family."""
    while pids := family(process):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def finish(process, seconds=300):
    """Exit code, stdout, stderr; nothing of the family may be alive afterwards."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(process.communicate())
    for _ in range(100):
        if not family(process):
            return process.returncode, out, err
        time.sleep(0.1)
    kill(process)
    raise AssertionError("a process is left behind")


def running(pid):
    """Whether it is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
