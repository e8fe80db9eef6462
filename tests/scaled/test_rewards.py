"""Every reward against hand-made verdicts, what may end a worker of math_verify, and refusals."""
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
from sympy.parsing import parse_expr

import nano_moe_rl as nano
from scaled import judge
from scaled.data import Prompt
from scaled.rewards import MathVerify, exact_match, grade, load_reward, running_sum, take_counts

ROOT = Path(__file__).parents[2]
TOWER = "$9^{9^{9^{9^{9}}}}$"  # never ends: most of it inside one multiplication of Python


def apply(reward, pairs):
    """Rewards of (reference, response text) pairs."""
    prompts = [Prompt(f"data.jsonl:{i}", [1], answer) for i, (answer, _) in enumerate(pairs)]
    return grade(reward, prompts, [text for _, text in pairs], [[2]] * len(pairs))


# --------------------------------------------------------------------------------- math_verify
@pytest.fixture(scope="module")
def math_verify():
    reward = MathVerify(seconds=20, workers=2)  # far from what an answer takes on a busy machine
    yield reward
    reward.close()


EQUAL = [  # reference, response
    ("42", "42"), ("42", "So the answer is $42$."), ("42", "first 7, then \\boxed{42}"),
    ("\\boxed{42}", "\\boxed{42}"), ("#### 42", "42"), ("3 + 4 = 7\n#### 7", "The answer is 7"),
    ("$\\frac{1}{2}$", "0.5"), ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}"), ("1/2", "$0.5$"),
    ("\\(\\frac{1}{2}\\)", "1/2"), ("\\sqrt{2}", "$2^{1/2}$"), ("1,234", "1234"), ("-3", "-3"),
    ("2^{10}", "1024"), ("1024", "2^10"), ("7", "3+4"), ("-7/2", "-(3 + 1/2)"),
    ("x^2+2x+1", "$(x+1)^2$"), ("(1,2)", "\\boxed{(1, 2)}"), ("\\{1,2\\}", "$\\{2,1\\}$"),
    ("x=3", "$3$"), ("50\\%", "$0.5$"), ("\\text{yes}", "\\boxed{\\text{yes}}")]
DIFFERENT = [
    ("42", "41"), ("42", ""), ("42", "forty-two"), ("42", "-42"), ("\\sqrt{2}", "2"), ("2", "3-2"),
    ("(1,2)", "\\boxed{(2, 1)}"), ("1/2", "2"), ("x+1", "$y+1$"), ("42", "\\boxed{42"),
    ("\\frac{1}{2}", "$\\frac{1}{$"), ("42", "$\\frac{}{}}{$ \\right) \\begin{"),
    ("42", "$" + "{" * 20 + "$"), ("42", "__import__('os')._exit(7)"), ("42", "\x00\ud800\n")]


def test_math_verify_on_pairs(math_verify):
    pairs = EQUAL + DIFFERENT
    random.Random(0).shuffle(pairs)  # which worker gets which pair says nothing
    verdicts = dict(zip(pairs, apply(math_verify, pairs)))
    assert [pair for pair in EQUAL if verdicts[pair] != 1.0] == []
    assert [pair for pair in DIFFERENT if verdicts[pair] != 0.0] == []
    assert take_counts(math_verify) == {"errors": 0, "timeouts": 0}


def test_an_exception_in_math_verify_is_reward_0_and_counted(math_verify):
    infinite = "$\\frac{1}{0}$"
    import math_verify as library
    with pytest.raises(ValueError, match="nan or zoo"):
        library.verify(library.parse(infinite), library.parse("$x$"), raise_on_error=True)
    assert apply(math_verify, [("1", "1"), (infinite, "$x$"), (infinite, "$i$"), ("1", "1")]) == [
        1, 0, 0, 1]
    assert take_counts(math_verify) == {"errors": 2, "timeouts": 0}
    assert take_counts(math_verify) == {"errors": 0, "timeouts": 0}


@pytest.fixture
def impatient():
    reward = MathVerify(seconds=2, workers=2)
    yield reward
    reward.close()


def test_what_never_ends_is_stopped_and_counted(impatient):
    pairs = [("1", "1"), ("42", TOWER), ("2", "2"), ("42", "9**9**9**9**9"), ("3", "3")]
    assert apply(impatient, pairs) == [1, 0, 1, 0, 1]
    assert take_counts(impatient) == {"errors": 0, "timeouts": 2}
    out = []  # math_verify's own limit refuses to work here
    thread = threading.Thread(target=lambda: out.extend(apply(impatient, pairs[:3])))
    thread.start()
    thread.join()
    assert out == [1, 0, 1] and take_counts(impatient) == {"errors": 0, "timeouts": 1}


def test_a_worker_that_dies_is_an_error_and_replaced():
    reward = MathVerify(seconds=20, workers=1)
    assert apply(reward, [("1", "1")]) == [1]
    worker = reward.workers.get()
    assert resource.prlimit(worker.pid, resource.RLIMIT_AS) == (2**32, 2**32)
    worker.kill()
    worker.wait()
    reward.workers.put(worker)
    assert apply(reward, [("1", "1"), ("2", "2")]) == [0, 1]
    assert take_counts(reward) == {"errors": 1, "timeouts": 0}
    reward.close()


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("last", ["idle", "busy"])
def test_no_worker_outlives_a_killed_program(last):
    program = f"""if True:
        import os, signal, threading, time
        from scaled.data import Prompt
        from scaled.rewards import MathVerify
        reward = MathVerify(seconds=3, workers=1)
        assert reward([Prompt("a:0", [1], "1")], ["1"], [[1]]) == [1]
        worker = reward.workers.get()
        reward.workers.put(worker)
        if {last == "busy"}:
            threading.Thread(target=reward, args=([Prompt("a:1", [1], "1")], ["{TOWER}"], [[1]])
                             ).start()
            time.sleep(0.5)
        print(worker.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for _ in range(600):
        if not running(int(done.stdout)):
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_a_worker_runs_no_text_of_a_model_and_does_without_torch(tmp_path):
    """Python tells an audit hook of every string that eval and exec compile: none comes from the
    pairs. Without the worker's arithmetic, sympy compiles each number that it reads."""
    program = f"""if True:
        import sys
        strings, on = [], False
        def hook(event, arguments):
            if on and event == "compile" and arguments[1] == "<string>":
                strings.append(str(arguments[0]))
        sys.addaudithook(hook)
        if sys.argv[1] == "worker":
            from scaled.judge import serve
            on = True
            serve(20.0)
        else:
            import json, math_verify
            on = True
            for line in sys.stdin:
                math_verify.verify(*map(math_verify.parse, json.loads(line)))
        on = False
        with open({str(tmp_path / "strings")!r}, "w") as file:
            print(*strings, "torch" in sys.modules, file=file)"""
    pairs = [(f"${answer}$", text) for answer, text in EQUAL if "$" not in answer] + DIFFERENT
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    seen = {}
    for who in ("worker", "library"):
        subprocess.run([sys.executable, "-c", program, who], cwd=ROOT, input=lines, text=True,
                       check=True, capture_output=True)
        seen[who] = (tmp_path / "strings").read_text()
    assert "Integer (1024 )" in seen["library"]
    assert "1024" not in seen["worker"] and "Integer" not in seen["worker"]
    assert seen["worker"].endswith("False\n")


@pytest.mark.parametrize("text", ["1/2", "3 + 1/2", "2*(3-4)", "-3", "--2", "2**3**2", "-(1.5)*4",
                                  "1-2-3", "+7", " (2)/(3)/4", "0.125**2", "12"])
def test_arithmetic_is_what_sympy_gets_by_eval(text):
    assert judge.arithmetic(text) == parse_expr(text)
    ours, theirs = judge.arithmetic(text, evaluate=False), parse_expr(text, evaluate=False)
    assert ours.doit() == theirs.doit() == parse_expr(text)


@pytest.mark.parametrize("text", ["True", "Symbol(x)", "1 if 2 else 3", "(1).real", "2 // 3", "a",
                                  "'1'", "Integer(1, 2)", "1 +", "1; 2", "exit()", "x: 1"])
def test_arithmetic_is_all_it_reads(text):
    with pytest.raises((ValueError, SyntaxError)):
        judge.arithmetic(text)


@pytest.mark.parametrize("answer, message", [
    ("", "prompt data.jsonl:1 has no reference answer; set answer_column"),
    ("$", "no answer in the reference '\\$' of prompt data.jsonl:1")])
def test_math_verify_needs_references(math_verify, answer, message):
    with pytest.raises(ValueError, match=message):
        apply(math_verify, [("1", "1"), (answer, "1")])


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


# ------------------------------------------------------------------------- load_reward and grade
def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, texts, tokens):\n"
        "    return [len(p.tokens) + 10 * len(t) + 100 * len(r)\n"
        "            for p, t, r in zip(prompts, texts, tokens)]\n"
        "number = 3\n")
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_reward("my_rewards:length")
    prompts = [Prompt("a:0", [1, 2], ""), Prompt("a:1", [1], "")]
    assert grade(reward, prompts, ["xyz", ""], [[1], [1, 2]]) == [132.0, 201.0]
    assert take_counts(reward) == {"errors": 0, "timeouts": 0}
    for name, message in [("accuracy", "math_verify, exact_match, running_sum, or module:function"),
                          (":length", "module:function"), ("my_rewards:", "module:function"),
                          ("my_rewards:width", "has no function width"),
                          ("my_rewards:number", "has no function number"),
                          ("no_such_module:f", "cannot be imported: No module"),
                          ("broken_rewards:f", "cannot be imported: division by zero")]:
        with pytest.raises(ValueError, match=message) as refusal:
            load_reward(name)
        assert "\n" not in str(refusal.value)


def test_the_names_of_the_rewards():
    assert load_reward("exact_match") is exact_match and load_reward("running_sum") is running_sum
    assert load_reward("math_verify", seconds=7).seconds == 7
    with pytest.raises(ValueError, match="0 seconds"):
        load_reward("math_verify", seconds=0)


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
        assert 1 <= MathVerify().size <= max(1, min(8, cores // ranks))
