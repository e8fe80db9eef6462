"""A reward of one's own, module:function: how it is tried, called, and how it can fail."""
import os
import signal
import time

import pytest
from processes import running

from scaled.checks import check_reward
from scaled.data import Prompt
from scaled.rewards import grade, load_reward, take_counts


OWN = """if True:
    import os, signal, sys, time
    number = 3
    errors = 0
    def length(prompts, texts, tokens):
        print("no reward")
        return [len(p.tokens) + 10 * len(t) + 100 * len(r) for p, t, r in zip(prompts, texts, tokens)]
    def counting(prompts, texts, tokens):
        counting.errors += 1
        return [0.5] * len(prompts)
    counting.errors = 0
    def leaves(prompts, texts, tokens):
        if texts[0]:
            {"0": os._exit, "1": sys.exit, "2": lambda code: os.kill(os.getpid(), signal.SIGKILL)}[texts[0]](0)
        return [1.0] * len(prompts)
    def hangs(prompts, texts, tokens):
        if "deaf" in texts[0]:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(600 if texts[0] else 0)
        return [1.0] * len(prompts)
    def raises(prompts, texts, tokens):
        return [1 / len(t) for t in texts]
    def nan(prompts, texts, tokens):
        return [float("nan")] * len(prompts)
    def number_of(prompts, texts, tokens):
        return [float(p.answer) for p in prompts]
    def hangs_at_x(prompts, texts, tokens):
        time.sleep(600 if any(p.answer == "x" for p in prompts) else 0)
        return [0.0] * len(prompts)
    def ends_at_x(prompts, texts, tokens):
        os._exit(3) if any(p.answer == "x" for p in prompts) else None
        return [0.0] * len(prompts)
    def from_nowhere(prompts, texts, tokens):
        raise KeyError(prompts[0].answer) from ValueError("never raised")
    def not_alone(prompts, texts, tokens):
        return [1 / (len(prompts) - 1)] * len(prompts)
    def not_64(prompts, texts, tokens):
        return [1 / (len(prompts) - 64)] * len(prompts)
    def forks(prompts, texts, tokens):
        if any(texts) and os.fork() == 0:  # a child that holds all of its pipes
            open("child", "w").write(str(os.getpid()))
            time.sleep(600)
        while any(texts) and not os.path.exists("child"):
            time.sleep(0.01)
        time.sleep(600) if "hang" in texts else os._exit(0) if "end" in texts else None
        return [1.0] * len(prompts)
    def slow(prompts, texts, tokens):
        time.sleep(0.3)
        return [0.0] * len(prompts)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(OWN)
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "leaving_rewards.py").write_text("import os; os._exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_reward_of_ones_own(own):
    reward = load_reward("my_rewards:length")
    prompts = [Prompt("a:0", [1, 2], ""), Prompt("a:1", [1], "")]
    check_reward(reward, prompts)
    assert grade(reward, prompts, ["xyz", ""], [[1], [1, 2]]) == [132.0, 201.0]
    assert take_counts(reward) == {"errors": 0, "timeouts": 0}
    counting = load_reward("my_rewards:counting")
    assert grade(counting, prompts, ["", ""], [[1], [1]]) == [0.5, 0.5]
    assert take_counts(counting) == {"errors": 1, "timeouts": 0} != take_counts(counting)
    for name, message in [("accuracy", "math, exact_match, running_sum, or module:function"),
                          (":length", "module:function"), ("my_rewards:", "module:function"),
                          ("my_rewards:width", "has no function width"),
                          ("my_rewards:number", "has no function number"),
                          ("no_such_module:f", "cannot be imported: No module"),
                          ("leaving_rewards:f", "its process ended with code 0"),
                          ("broken_rewards:f", "cannot be imported: division by zero")]:
        with pytest.raises(ValueError, match=message) as refusal:
            load_reward(name)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name, text, message", [
    ("leaves", "0", "its process ended with code 0 for 2 responses, the first to prompt a:0"),
    ("leaves", "1", "its process ended with code 0"), ("leaves", "2", "its process ended with code -9"),
    ("hangs", "x", "no answer in 3 seconds .*prompt a:0; raise reward_seconds"),
    ("hangs", "deaf", "no answer in 3 seconds"), ("raises", "", "ZeroDivisionError: division by zero")])
def test_how_a_reward_of_ones_own_can_fail_is_said(own, monkeypatch, name, text, message):
    monkeypatch.setattr("scaled.worker.GRACE", 2)
    reward = load_reward(f"my_rewards:{name}", seconds=3)
    prompts = [Prompt("a:0", [1, 2], ""), Prompt("a:1", [1], "")]
    with pytest.raises(RuntimeError, match=f"^reward my_rewards:{name}: {message}") as failure:
        grade(reward, prompts, [text, "x"], [[1], [2]])
    assert "\n" not in str(failure.value)
    assert grade(reward, prompts, ["" if name != "raises" else "x"] * 2, [[1], [2]]) == [1, 1]


def test_a_process_of_ones_own_reward_that_died_while_idle_is_started_again(own):
    reward, prompts = load_reward("my_rewards:length"), [Prompt("a:0", [1, 2], "")]
    assert grade(reward, prompts, ["xyz"], [[1]]) == [132.0]
    os.kill(reward.worker.process.pid, signal.SIGKILL)
    while running(reward.worker.process.pid):
        time.sleep(0.01)
    assert grade(reward, prompts, ["xyz"], [[1]]) == [132.0]


@pytest.mark.parametrize("text, message", [
    ("hang", "no answer in 3 seconds"), ("end", "its process ended with code 0")])
def test_a_child_of_a_reward_of_ones_own_neither_holds_up_a_run_nor_stays(own, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scaled.worker.GRACE", 500)
    reward, prompts = load_reward("my_rewards:forks", seconds=3), [Prompt("a:0", [1, 2], "")]
    with pytest.raises(RuntimeError, match=message):
        grade(reward, prompts, [text], [[1]])
    pid = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not running(pid):
            return
        time.sleep(0.1)
    raise AssertionError("the child is still there")


@pytest.mark.parametrize("name, message", [
    ("number_of", r"ValueError: could not convert string to float: 'x' \(my_rewards.py, line 26\) "),
    ("ends_at_x", "its process ended with code 3 "), ("hangs_at_x", "no answer in 2 seconds .* raise reward_seconds ")])
def test_a_row_on_which_a_reward_of_ones_own_fails_is_found_wherever_it_is(own, capfd, name, message):
    prompts = [Prompt(f"a:{i}", [1, 2], "x" if i in (150, 160) else "1") for i in range(170)]
    with pytest.raises(ValueError, match=f"^reward my_rewards:{name}: {message}.*prompt a:150.*: correct the function, "
                                         "or remove the row$") as refusal:
        check_reward(load_reward(f"my_rewards:{name}", seconds=2), prompts)
    assert "\n" not in str(refusal.value) and capfd.readouterr() == ("", "")
    assert check_reward(load_reward(f"my_rewards:{name}"), prompts[:150]) == 150


def test_a_reward_of_ones_own_may_need_several_responses_in_a_call(own):
    prompts = [Prompt(f"a:{i}", [1, 2], "") for i in range(129)]
    assert check_reward(load_reward("my_rewards:not_alone"), prompts) == 129
    with pytest.raises(ValueError, match="division by zero .*to prompt a:0 to a:63, all in one call"):
        check_reward(load_reward("my_rewards:not_64"), prompts)


def test_trying_a_reward_of_ones_own_takes_no_longer_than_is_stated(own, monkeypatch):
    """A call that has begun may take its time."""
    monkeypatch.setattr("scaled.checks.TRY_SECONDS", 0.4)
    reward, prompts = load_reward("my_rewards:slow"), [Prompt(f"a:{i}", [1], "") for i in range(1000)]
    assert check_reward(reward, prompts[:65]) == 65
    assert check_reward(reward, prompts) == 128


@pytest.mark.parametrize("name, message", [
    ("from_nowhere", r"reward my_rewards:from_nowhere: KeyError: '' \(my_rewards.py, line "),
    ("nan", "reward my_rewards:nan: ValueError: nan returned nan for a response to prompt a:0"),
    ("raises", "reward my_rewards:raises: ZeroDivisionError")])
def test_a_reward_of_ones_own_is_tried_at_the_start(own, name, message):
    with pytest.raises(ValueError, match=message):
        check_reward(load_reward(f"my_rewards:{name}"), [Prompt("a:0", [1, 2], "")])
