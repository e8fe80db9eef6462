"""What a run does about its events: a line, a checkpoint, its end, or the way back with a change.

events.jsonl has an object a line, in the order in which things happened: an event of a rule, as
rules.py has it, or {"update", "act"}, of going back also "to" and "change". Updates that are made
again, after a resume or a way back, can have the same events again.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nano_moe_rl import DEVICE
from scaled import checkpoint
from scaled.config import WATCH, Config, options_text
from scaled.folder import EVENTS, append, write_aside
from scaled.log import Log
from scaled.ranks import RANK
from scaled.rules import events

if TYPE_CHECKING:  # transformers and vLLM: only for a run that can start
    from scaled.run import Run


def change(c: Config) -> dict:
    """The options that going back changes, with the values that they get."""
    return {"watch_times": c.watch_times - 1} | {
        "R3": {"replay": "R3"}, "N/2": {"mini_batches": c.mini_batches // 2},
        "lr/2": {"lr": c.lr / 2}}[c.watch_change]


class Guard:
    """Looks at a run after each rollout batch. Rank 0 decides, for all of them."""

    def __init__(self, run: "Run", log: Log, settle: Callable[[], None]):
        """settle: waits for a checkpoint that is being written."""
        self.settle = settle
        self.run, self.log, self.stopped, self.reason = run, log, False, ""
        self.rows = [json.loads(line) for line in log.lines.splitlines()]

    def look(self, rows: list[dict]) -> str:
        """Writes down the events of new rows -> what the run did or has to do, one of WATCH, the
        same on every rank: "back" is done, "save" and "stop" are the caller's. A collective."""
        decision = torch.tensor(self.decide(rows) if RANK == 0 else [0, 0], device=DEVICE)
        dist.broadcast(decision, 0)
        act, last_good = WATCH[decision[0]], int(decision[1])
        if act == "back" and not self.go_back(last_good):
            act = "stop"
        if act == "save":
            self.run.c = replace(self.run.c, watch_times=self.run.c.watch_times - 1)
        if act in ("save", "stop"):
            self.write([{"update": self.run.version, "act": act}])
            self.log.say(f"update {self.run.version}: {act}")
        self.stopped = act == "stop"
        return act

    def decide(self, rows: list[dict]) -> tuple[int, int]:
        """The place of an act in WATCH, and the last update before what led to it."""
        c = self.run.c
        self.rows += rows
        new = [event for event in events(self.rows, c.mini_batches)
               if event.update >= rows[0]["update"]]
        self.write(asdict(event) for event in new)
        for event in new:
            self.log.say(str(event))
        asked = [event for event in new if c.acts_on(event.rule)]
        if not asked or c.watch == "log" or c.watch != "stop" and not c.watch_times:
            return 0, 0
        self.reason = f"{asked[0].rule} at update {asked[0].update}"
        return WATCH.index(c.watch), min(event.since for event in asked) - 1

    def go_back(self, last_good: int) -> bool:
        """To the newest whole checkpoint of that update or before, and on from there with the
        change; False, and nothing done, if there is none. A collective."""
        run, at = self.run, self.run.version
        self.settle()
        saved = [path for path in checkpoint.checkpoints(run.folder)
                 if checkpoint.version_of(path) <= last_good]
        try:
            path, line = checkpoint.newest_whole(saved)
        except ValueError as damaged:
            why = f": {damaged}" if saved else ""
            self.log.say(f"no checkpoint of update {last_good} or before to go back to{why}")
            return False
        run.engine.sleep()
        run.move_trainer(DEVICE)
        run.restore(path)
        made, run.c = change(run.c), replace(run.c, **change(run.c))
        if RANK == 0:
            # in this order: a run that is cut short here resumes before the change, or with it
            checkpoint.set_aside(run.folder, run.version, "abandoned")
            self.write([{"update": at, "act": "back", "to": run.version, "change": made}])
            write_aside(run.folder / checkpoint.OPTIONS, options_text(run.c))
            changed = ", ".join(f"{name} {x}" for name, x in made.items() if name != "watch_times")
            for said in filter(None, (line, f"update {at}: back to {run.version}, {changed}")):
                self.log.say(said)
        self.rows = [row for row in self.rows if row["update"] <= run.version]
        self.log.rewind(run.lines, run.version, f"abandoned-{run.version:06}-{at:06}.jsonl")
        run.sync()
        run.phases.begin(run.c.updates, run.version)
        run.phases.seconds = {}
        return True

    def write(self, lines: Iterable[dict]):
        if RANK == 0 and (lines := list(lines)):
            append(self.run.folder / EVENTS, lines)
