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
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)})
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{function}: its process ended with code {self.process.wait()} at "
                               "its start")

    def ask(self, *question):
        """The function's answer. RuntimeError for what it raises, and the terminal gets the
        traceback; Ended if it does not answer."""
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            late = not select.select([self.process.stdout], [], [], self.seconds + GRACE)[0]
            if late:  # it has changed what an alarm does
                self.process.kill()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer, late = "", False
        if not answer:
            code = self.close()
            late = late or code == -signal.SIGALRM
            raise Ended(f"no answer in {self.seconds:g} seconds" if late else
                        f"its process ended with code {code}", late)
        answer = json.loads(answer)
        if "error" in answer:
            say(answer["traceback"].rstrip(), err())
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> int:
        """Ends the process. Not needed: it ends with this program."""
        try:
            self.process.communicate()
        except BrokenPipeError:
            pass
        return self.process.returncode


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
            answer = {"error": f"{type(error).__name__}: {error}",
                      "traceback": traceback.format_exc()}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
