"""The processes of a run: one group, one voice, one end."""

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from nano_moe_rl import DEVICE
from scaled.terminal import err

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TIMEOUT = timedelta(hours=1)  # of a collective; others may be grading long responses
MEETING = timedelta(seconds=30)  # for a rank to reach the store that torchrun keeps
POLL = 0.5  # seconds between two looks at whether another rank has failed, and two signs of life
# Seconds without a sign of life, after which a rank is taken to have ended: when there is reason to
# think so, and when there is none but that NCCL, unlike gloo, would never tell.
SILENCE, LOST = 12.0, 600.0


def one_line(message: str) -> str:
    """With what a terminal would obey escaped: names and texts of files can be anything."""
    line = " ".join(message.split())[:1000]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def refuse(message: str):
    """Ends this process with code 2. For what all ranks find out by themselves, before they form a
    group: rank 0 says it in one line, the others wait until torchrun ends them."""
    if RANK == 0:
        print(f"scaled: {one_line(message)}", file=err(), flush=True)
    else:
        time.sleep(10)
    sys.exit(2)


class Ranks:
    """The default process group, gloo and on GPUs also NCCL. When one rank fails the others sit in
    collectives that never end, and deaf to signals; a thread on each looks out for that, for
    signals, and for the end of torchrun, and ends the process."""

    def __init__(self, remedy: str = ""):
        """remedy: what to do after Ctrl-C or a rank that is gone, "; --resume NAME goes on"."""
        self.remedy, self.over = remedy, False
        self.patient = self.stopping = False  # whether somebody asks stop_asked; SIGTERM has come
        self.leave = lambda code: None  # what is to be done before this process ends with a code
        self.log = ""  # where libraries have said something, once they print there
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it in the middle of a meeting, too
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if "RANK" in os.environ:
            # torchrun had its store before it started a rank: one that cannot reach it is left behind
            # by a torchrun that was killed meanwhile, and would wait for half an hour.
            kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            limit = {"timeout": MEETING} if kept else {}
            try:
                store = next(iter(dist.rendezvous("env://", **limit)))[0]
            except dist.DistError as error:  # torchrun meets a port in use itself, before any rank
                address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                refuse(f"no meeting of ranks at {address}: {str(error).splitlines()[0]}; " + (
                    "torchrun has ended: start it again" if kept else
                    "give another MASTER_PORT, or let torchrun --standalone choose one"))
            store.set_timeout(TIMEOUT)
        else:  # started without torchrun: one process, and vLLM asks for these too
            store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
            os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                               MASTER_PORT=str(store.port))
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo",
                                store=store, rank=RANK, world_size=WORLD,
                                timeout=TIMEOUT)
        self.store = store.clone()
        # Signals wake the thread by this: a handler would have to wait until the main thread is
        # back from whatever collective it is in, and an exception could come up anywhere, also in
        # the middle of ending.
        self.signals, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        self.wake = wake  # closed if it were garbage
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, daemon=True).start()

    # ------------------------------------------------------------------- what the thread does
    def _watch(self):
        seen = {}
        try:
            while not self.over and not self.store.check(["failure"]):
                self.store.add(f"alive {RANK}", 1)
                for number in self._signals():
                    if number == signal.SIGINT:
                        self._announce(f"130 stopped by Ctrl-C{self.remedy}")
                    if number == signal.SIGTERM and not self.patient:
                        self._announce(f"143 stopped by SIGTERM{self.remedy}")
                    self.stopping |= number == signal.SIGTERM
                # torchrun sends SIGTERM also when a rank has died: it will never get to the end
                limit = SILENCE if self.stopping else LOST
                if (self.stopping or RANK < 2) and (gone := self._gone(seen, limit)):
                    self._announce(f"1 {self._obituary(gone)}")
                if self.launcher and os.getppid() != self.launcher:
                    raise RuntimeError("no launcher")
            if self.over:
                return
            self._end(*self.store.get("failure").decode().split(" ", 1))
        except RuntimeError:  # the store is gone, and with it who kept it
            if not self.over:
                if RANK == 0:
                    self._say(f"torchrun has ended, and all ranks with it{self.remedy}")
                elif RANK == 1 and not self.launcher:
                    self._say(self._obituary([0]))
                self.leave(1)
                os._exit(1)

    def _signals(self) -> bytes:
        """Those that come within POLL seconds."""
        ready, _, _ = select.select([self.signals], [], [], POLL)
        return self.signals.recv(64) if ready else b""

    def _gone(self, seen: dict[int, tuple[int, float]], limit: float) -> list[int]:
        """Ranks without a sign of life for so many seconds; `seen` is what earlier calls saw."""
        now = time.monotonic()
        for rank, signs in enumerate(self._signs()):
            if rank not in seen or seen[rank][0] != signs:
                seen[rank] = signs, now
        return [rank for rank, (_, since) in seen.items() if now - since > limit]

    def _obituary(self, gone: list[int]) -> str:
        return (f"rank {', '.join(map(str, gone))} ended without a word: killed, perhaps for "
                f"memory, or by code that it ran{self.log}{self.remedy}")

    def _announce(self, failure: str):
        """A code and a line: how all ranks end, unless another was first."""
        self.store.compare_set("failure", "", one_line(failure))

    def _say(self, message: str):
        print(f"\nscaled: {message.strip()}", file=err(), flush=True)

    def _end(self, code: str, message: str):
        if RANK == 0:
            self._say(message)
            self.store.set("said", "")
        else:
            deadline = time.monotonic() + 5
            while not self.store.check(["said"]) and time.monotonic() < deadline:
                time.sleep(POLL / 5)
            if not self.store.check(["said"]) and self.store.add("voices", 1) == 1:
                self._say(message)  # rank 0 is gone
                self.store.set("said", "")
        self.leave(int(code))
        os._exit(int(code))  # the main thread may never come back from a collective

    # --------------------------------------------------------------------- for the main thread
    def fail(self, message: str, code: int, error: BaseException | None = None):
        """Ends all ranks; rank 0 prints the line of whoever came first, after the traceback of its
        error, if one is given. Does not return."""
        try:
            # an error in a collective is how a rank hears that another has died
            if gone := self._missing():
                message, error, code = self._obituary(gone), None, 1
            if self.store.compare_set("first", "", str(RANK)) == str(RANK).encode():
                if error is not None:
                    traceback.print_exception(error, file=err())
                self._announce(f"{code} {message}")
        except RuntimeError:  # the store is gone: the thread finds that out, too
            pass
        time.sleep(60)  # the thread ends the process long before
        os._exit(code)

    def _missing(self) -> list[int]:
        """Ranks that give no sign of life within SILENCE seconds."""
        before, until = self._signs(), time.monotonic() + SILENCE
        gone = list(range(WORLD))
        while gone and time.monotonic() < until:
            time.sleep(POLL / 5)
            gone = [rank for rank, signs in enumerate(self._signs()) if signs == before[rank]]
        return gone

    def _signs(self) -> list[int]:
        return [self.store.add(f"alive {rank}", 0) for rank in range(WORLD)]

    def stop_asked(self) -> bool:
        """Whether SIGTERM has come, to any rank. A collective."""
        asked = torch.tensor(float(self.stopping), device=DEVICE)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)

    def end(self):
        """After all work. Every rank waits for the others, so that none finds the store gone."""
        dist.barrier()
        self.over = True
        self.leave(0)
        time.sleep(2 * POLL)
        dist.destroy_process_group()
