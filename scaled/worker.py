"""A function in a process of its own: it may hang, print, run out of memory or end the process, and
whoever asked learns it in words. The process is started by exec, so it is safe beside CUDA and
threads, and ends with its input, however this program ends."""
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

from scaled.terminal import err, say

GRACE = 10  # seconds, after which a process that outlives its alarm is killed


class Ended(RuntimeError):
    """The process is gone: `timeout`, or by itself."""

    def __init__(self, what: str, timeout: bool):
        super().__init__(what)
        self.timeout = timeout


class Worker:
    """`function` is module:function, called with `arguments` and what is asked; each answer may
    take `seconds`. RuntimeError if the process does not start."""

    def __init__(self, function: str, *arguments: str, seconds: float):
        self.seconds = seconds
        path = [str(Path(__file__).parents[1])] + [os.path.abspath(p) for p in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "scaled.worker", function, str(seconds), *arguments], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)})
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{function}: its process ended with code {self.process.wait()} at "
                               "its start")
        self.ended = os.pidfd_open(self.process.pid)

    def ask(self, *question):
        """The function's answer. RuntimeError for what it raises, and the terminal gets the
        traceback; Ended if it does not answer."""
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            # not the end of its output alone: what it forked may hold that open
            ready, _, _ = select.select(
                [self.process.stdout, self.ended], [], [], self.seconds + GRACE)
            answer = self.process.stdout.readline() if self.process.stdout in ready else ""
            late = not ready  # it has changed what an alarm does
        except BrokenPipeError:
            answer, late = "", False
        if not answer:
            if not late:  # its output ends some time before it does
                select.select([self.ended], [], [], GRACE)
            code = self.end()
            late = late or code == -signal.SIGALRM
            raise Ended(f"no answer in {self.seconds:g} seconds" if late else
                        f"its process ended with code {code}", late)
        answer = json.loads(answer)
        if "error" in answer:
            error = RuntimeError(answer["error"])
            error.add_note(answer["traceback"])  # printed with the error's own, where that is
            raise error
        return answer["value"]

    def end(self) -> int:
        """Kills the process, if it has not ended, with all that it started -> its exit code."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self.close()

    def close(self) -> int:
        """Ends the process when it has answered. Not needed: it ends with this program."""
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        code = self.process.wait()
        self.process.stdout.close()
        os.close(self.ended)
        return code


def place(error: Exception) -> str:
    """Where an error came up, if that is not in this project."""
    cause = error.__cause__
    frames = traceback.extract_tb(
        (cause if cause and cause.__traceback__ else error).__traceback__)
    file, line = frames[-1].filename, frames[-1].lineno
    ours = Path(file).parent == Path(__file__).parent or file.startswith("<")
    return "" if ours else f" ({Path(file).name}, line {line})"


def serve(function: str, seconds: str, *arguments: str):
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, and then input ends
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler: the kernel ends the process
    module, _, name = function.partition(":")
    call = getattr(import_module(module), name)
    print("ready", file=answers, flush=True)
    for line in questions:
        signal.setitimer(signal.ITIMER_REAL, float(seconds))
        try:
            answer = {"value": call(*arguments, *json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}{place(error)}",
                      "traceback": traceback.format_exc()}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
