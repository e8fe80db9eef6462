"""The processes of a run: one group, one voice, one end."""

import os
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from nano_moe_rl import DEVICE

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TIMEOUT = timedelta(hours=1)  # of a collective; others may be grading long responses
POLL = 0.5  # seconds between two looks at whether another rank has failed


def refuse(message: str):
    """Ends this process with code 2. For what all ranks find out by themselves, before they form a
    group: rank 0 says it in one line, the others wait until torchrun ends them."""
    if RANK == 0:
        print(f"scaled: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(10)
    sys.exit(2)


class Ranks:
    """The default process group, gloo and on GPUs also NCCL. When one rank fails the others sit in
    collectives that never end; a thread on each looks out for that and ends the process."""

    def __init__(self):
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if "RANK" in os.environ:
            try:
                store = next(iter(dist.rendezvous("env://")))[0]
            except dist.DistError as error:  # torchrun meets a port in use itself, before any rank
                address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                refuse(f"no meeting of ranks at {address}: {str(error).splitlines()[0]}; give "
                       "another MASTER_PORT, or let torchrun --standalone choose one")
        else:  # started without torchrun: one process, and vLLM asks for these too
            store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
            os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                               MASTER_PORT=str(store.port))
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo",
                                store=store, rank=RANK, world_size=WORLD,
                                timeout=TIMEOUT)
        self.store, self.over = store.clone(), False
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while not self.store.check(["failure"]):
            time.sleep(POLL)
            if self.over:
                return
        code, _, message = self.store.get("failure").decode().partition(" ")
        if RANK == 0:
            print(f"\nscaled: {message}", file=sys.stderr, flush=True)
            self.store.set("said", "")
        else:
            deadline = time.monotonic() + 5
            while not self.store.check(["said"]) and time.monotonic() < deadline:
                time.sleep(POLL / 5)
        os._exit(int(code))  # the main thread may never come back from a collective

    def fail(self, message: str, code: int):
        """Ends all ranks; rank 0 prints the line of whoever came first. Does not return."""
        self.store.compare_set("failure", "", f"{code} {' '.join(message.split())}")
        time.sleep(60)  # the thread ends the process long before
        os._exit(code)

    def end(self):
        """After all work. Every rank waits for the others, so that none finds the store gone."""
        dist.barrier()
        self.over = True
        time.sleep(2 * POLL)
        dist.destroy_process_group()
