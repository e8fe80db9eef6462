"""Every reward against hand-made verdicts, what may end a worker, and refusals."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from answer_pairs import PAIRS
from processes import running

import nano_moe_rl as nano
from scaled.checks import check_reward
from scaled.data import Prompt
from scaled.rewards import Math, exact_match, grade, load_reward, running_sum, take_counts
from scaled.worker import Worker

ROOT = Path(__file__).parents[2]


def apply(reward, pairs):
    """Rewards of (reference, response text) pairs."""
    prompts = [Prompt(f"data.jsonl:{i}", [1], answer) for i, (answer, _) in enumerate(pairs)]
    return grade(reward, prompts, [text for _, text in pairs], [[2]] * len(pairs))


# ---------------------------------------------------------------------------------------- math
ENDLESS = ("(x+y+1)^{200}", "\\boxed{(x^2+2xy+y^2+2x+2y+1)^{100}}")  # equal, but who can tell


@pytest.fixture
def impatient():
    reward = Math(seconds=2, workers=2)
    yield reward
    reward.close()


def test_what_never_ends_is_stopped_and_counted(impatient):
    pairs = [("1", "1"), ENDLESS, ("2", "2"), ENDLESS, ("3", "3")]
    assert apply(impatient, pairs) == [1, 0, 1, 0, 1]
    assert take_counts(impatient) == {"errors": 0, "timeouts": 2}
    out = []
    thread = threading.Thread(target=lambda: out.extend(apply(impatient, pairs[:3])))
    thread.start()
    thread.join()
    assert out == [1, 0, 1] and take_counts(impatient) == {"errors": 0, "timeouts": 1}
    assert take_counts(impatient) == {"errors": 0, "timeouts": 0}


def test_a_worker_that_died_while_idle_costs_no_answer_its_reward():
    reward = Math(seconds=20, workers=1)
    assert apply(reward, [("1", "1")]) == [1]
    worker = reward.workers.get()
    assert resource.prlimit(worker.process.pid, resource.RLIMIT_AS) == (2**32, 2**32)
    worker.process.kill()
    worker.process.wait()
    reward.workers.put(worker)
    assert apply(reward, [("1", "1"), ("2", "2")]) == [1, 1]
    assert take_counts(reward) == {"errors": 0, "timeouts": 0}
    reward.close()


def test_an_answer_that_ends_its_worker_twice_is_an_error(monkeypatch, impatient):
    """The memory limit of the kernel: every process is killed as it is asked."""
    monkeypatch.setattr(Worker, "ask", lambda worker, *question: (
        worker.process.kill(), worker.process.wait(), ask(worker, *question))[-1])
    assert apply(impatient, [("1", "1")]) == [0]
    assert take_counts(impatient) == {"errors": 1, "timeouts": 0}


ask = Worker.ask


@pytest.mark.parametrize("last", ["idle", "busy"])
def test_no_worker_outlives_a_killed_program(last):
    program = f"""if True:
        import os, signal, threading, time
        from scaled.data import Prompt
        from scaled.rewards import Math
        reward = Math(seconds=3, workers=1)
        assert reward([Prompt("a:0", [1], "1")], ["1"], [[1]]) == [1]
        worker = reward.workers.get()
        reward.workers.put(worker)
        if {last == "busy"}:
            threading.Thread(target=reward, args=([Prompt("a:1", [1], {ENDLESS[0]!r})], [{ENDLESS[1]!r}], [[1]])
                             ).start()
            time.sleep(0.5)
        print(worker.process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for _ in range(600):
        if not running(int(done.stdout)):
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_no_text_of_a_model_is_run(tmp_path):
    """Python tells an audit hook of every string that eval and exec compile: all are functions of
    sympy's for as many variables, though its own parser compiles each number that it reads."""
    pairs = [pair[:2] for pair in sum(PAIRS.values(), []) if len(pair[1]) < 300]
    program = """if True:
        import json, sys
        strings = []
        sys.addaudithook(lambda event, arguments: event == "compile" and arguments[1] == "<string>"
                         and strings.append(str(arguments[0])))
        if sys.argv[1] == "judge":
            from scaled.judge import right
            import sympy.physics.units  # which sympy imports late, and its import needs eval
            strings.clear()
            for reference, text in json.load(sys.stdin):
                right(reference, text)
        else:
            from sympy import sympify
            sympify("1024 + 0.51")
        print(json.dumps([strings, "torch" in sys.modules]))"""
    seen = {who: json.loads(subprocess.run([sys.executable, "-c", program, who], cwd=ROOT, text=True, check=True,
                                           input=json.dumps(pairs), capture_output=True).stdout)
            for who in ("judge", "sympy")}
    assert any("1024" in string for string in seen["sympy"][0])
    assert all(string.startswith("b'def monomial_") for string in seen["judge"][0]) and not seen["judge"][1]


def test_math_needs_references():
    with pytest.raises(ValueError, match="prompt data.jsonl:1 has no reference answer; set answer_column"):
        apply(Math(workers=1), [("1", "1"), ("", "1")])


# ------------------------------------------------------------------- exact_match and running_sum
@pytest.mark.parametrize("answer, text, right", [
    ("yes", "yes", 1), ("yes", "  yes\n", 1), (" yes ", "yes", 1), ("yes", "Yes", 0),
    ("yes", "I think:\nyes", 1), ("yes", "yes\nI think", 0), ("yes", "yes, I think", 0),
    ("yes", "", 0), ("a\nb", "a\nb", 1), ("b", "a\n b \n\n", 1),
    ("yes", "\\boxed{no} so \\boxed{ yes } it is", 1), ("no", "\\boxed{no} so \\boxed{yes}", 0),
    ("no", "\\boxed{yes}\nno", 0), ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}.", 1),
    ("1}", "\\boxed{1}}", 0), ("yes", "\\boxed{yes", 0), ("1.0", "1", 0)])
def test_exact_match(answer, text, right):
    assert apply(exact_match, [(answer, text)]) == [right]


def test_exact_match_needs_references():
    with pytest.raises(ValueError, match="prompt data.jsonl:0 has no reference"):
        apply(exact_match, [("", "")])


def test_running_sum_is_the_task_of_the_single_file():
    """Against a verdict on strings; responses of every length, right ones among them."""
    draw = random.Random(0)
    prompts, responses, expected = [], [], []
    for i in range(400):
        digits = draw.sample("0123456789", draw.randint(3, 6))
        response = "".join(draw.choices(nano.VOCABULARY, k=draw.randint(0, 9)))
        end = f":{draw.choice([sum(map(int, digits)) % 10, 3])}$"
        response += draw.choice([end, end, end[:2], "$", end + "1", ""])
        prompts.append(Prompt(f"p:{i}", [nano.VOCABULARY.index(x) for x in digits + ["="]], ""))
        responses.append([nano.VOCABULARY.index(x) for x in response])
        expected.append(float(response.endswith(f":{sum(map(int, digits)) % 10}$")))
    assert 50 < sum(expected) < 350
    assert grade(running_sum, prompts, [""] * 400, responses) == expected
    for response in ([], [nano.EOS], [99_999]):  # a vocabulary may be padded
        assert grade(running_sum, prompts[:1], [""], [response]) == [0.0]


@pytest.mark.parametrize("tokens", [[], [nano.ASK], [3, 4], [3, nano.EOS, nano.ASK], [500, 7]])
def test_running_sum_refuses_other_prompts(tokens):
    with pytest.raises(ValueError, match="prompt a:0 is not digits.*chat = false"):
        grade(running_sum, [Prompt("a:0", tokens, "")], [""], [[1]])


@pytest.mark.parametrize("reference, message", [
    ("", "prompt a:1 has no reference"), ("yes}", "prompt a:1 in a box"), ("{", "prompt a:1 in a box")])
def test_exact_match_refuses_what_no_response_can_match(reference, message):
    with pytest.raises(ValueError, match=message):
        check_reward(exact_match, [Prompt("a:0", [1], "\\frac{1}{2}"), Prompt("a:1", [1], reference)])


# ------------------------------------------------------------------------- load_reward and grade
def test_the_names_of_the_rewards():
    assert load_reward("exact_match") is exact_match and load_reward("running_sum") is running_sum
    assert isinstance(load_reward("math"), Math)
    with pytest.raises(ValueError, match="0 seconds"):
        Math(seconds=0)


PROMPTS = [Prompt(f"a:{i}", [1], "") for i in range(3)]


@pytest.mark.parametrize("returned, expected", [
    ([1, 0, 1], [1.0, 0.0, 1.0]), ((True, False, True), [1.0, 0.0, 1.0]),
    (torch.tensor([0.5, -2.0, 0.0]), [0.5, -2.0, 0.0]), (np.array([True, False, True]), [1, 0, 1]),
    ([torch.tensor(0.25), np.float32(0.5), np.int64(-3)], [0.25, 0.5, -3.0])])
def test_rewards_become_floats(returned, expected):
    values = grade(lambda *_: returned, PROMPTS, [""] * 3, [[]] * 3)
    assert values == expected and all(type(value) is float for value in values)


@pytest.mark.parametrize("returned, message", [
    ([0.0, float("nan"), 1.0], "nan for a response to prompt a:1"),
    (torch.tensor([0.0, 1.0, torch.inf]), "inf for a response to prompt a:2"),
    ([0.0, 1.0, -1e39], "prompt a:2"), ([10**400, 0, 0], "prompt a:0"),
    ([None, 0.0, 0.0], "None for a response to prompt a:0"), (["1", 0, 0], "'1' .* prompt a:0"),
    ([1j, 0, 0], "prompt a:0"), ([0, [1.0], 0], "prompt a:1"),
    ([0, torch.ones(1), 0], "prompt a:1"),
    ([1.0, 0.0], "2 rewards for 3 responses, of which the first is to prompt a:0"),
    ([0.0] * 4, "4 rewards for 3"), (torch.ones(3, 1), r"a Tensor of shape \(3, 1\) for 3"),
    (torch.ones(()), r"shape \(\)"), (0.5, "a float"), (None, "a NoneType"), ({}, "a dict"),
    ("123", "a str")])
def test_what_a_reward_may_not_return(returned, message):
    with pytest.raises(ValueError, match=message) as refusal:
        grade(lambda *_: returned, PROMPTS, [""] * 3, [[]] * 3)
    assert "\n" not in str(refusal.value)


def test_one_of_each_for_a_response():
    with pytest.raises(ValueError, match="3 prompts, 2 texts and 3 token lists"):
        grade(lambda *_: [0.0] * 3, PROMPTS, [""] * 2, [[]] * 3)


def test_torchrun_ranks_share_the_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for ranks in (1, 2, 3 * cores):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert 1 <= Math().size <= max(1, min(8, cores // ranks))
