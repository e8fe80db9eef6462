"""Ranks of a process group in processes of their own, for tests."""
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function, world, *args, seconds=240):
    """function(rank, world, *args) in processes of their own, all killed when the time is up."""
    ranks = mp.spawn(function, (world, *args), world, join=False)
    try:
        # a join ends with one of the processes, and raises what it raised
        assert any(ranks.join(seconds) for _ in range(world)), "deadlock"
    finally:
        for process in ranks.processes:
            process.kill()


def join_group(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group-{world}", rank=rank,
                            world_size=world)
