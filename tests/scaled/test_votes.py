"""Who votes for what: as the reward judges, for each kind of reward."""
import itertools
import random

import nano_moe_rl as nano
from scaled import votes as module
from scaled.data import Prompt
from scaled.judge import right
from scaled.rewards import Math, exact_match, running_sum
from scaled.votes import Votes

TEXTS = ["so it is \\boxed{1/2}.", "The answer is 0.5.", "\\boxed{\\frac12}", "#### 3", "hence\n3.0", "\\boxed{17*3}",
         "\\boxed{51}", "\\boxed{51", "", "\\boxed{2,1,\\{}", "(2, 1)", "(1, 2)", "\\boxed{x+1}", "\\boxed{1+x}"]
VOTES = ["1/2", "1/2", "1/2", "3", "3", "17*3", "51", None, None, "2,1,\\{", "(2, 1)", "(1, 2)", "x+1", "x+1"]


def test_votes_of_math_are_what_the_reward_takes_for_the_same():
    votes = Votes(Math())
    found = votes(TEXTS, [[]] * len(TEXTS))
    assert found == VOTES
    for (a, text_a), (b, text_b) in itertools.combinations(zip(found, TEXTS), 2):
        if a and b:
            boxes = [text if "boxed" in text else f"\\boxed{{{vote}}}" for vote, text in ((a, text_a), (b, text_b))]
            assert (a == b) == (right(boxes[0], boxes[1]) and right(boxes[1], boxes[0])), (text_a, text_b)
    assert votes.take_timeouts() == 0


def test_what_takes_too_long_is_no_vote_and_the_next_one_counts(monkeypatch):
    """A blank at each of 300,000 places where a formula could end: seconds of a regular expression."""
    monkeypatch.setattr(module, "SECONDS", 0.3)
    votes = Votes(Math())
    assert votes(["\\boxed{1}", "$$" + " " * 300_000 + "x", "\\boxed{1.0}"], [[]] * 3) == ["1", None, "1"]
    assert votes.take_timeouts() == 1 and votes.take_timeouts() == 0


def test_a_pair_that_cannot_be_compared_is_two_answers(monkeypatch):
    votes = Votes(Math())
    ask = votes.ask
    monkeypatch.setattr(votes, "ask", lambda name, *question: None if name == "alike" else ask(name, *question))
    assert votes(["\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{1/2}"], [[]] * 3) == ["1/2", "0.5", "1/2"]


def test_votes_of_exact_match_are_for_the_reference_where_the_reward_is_1():
    texts = ["8", " 8 ", "first\n8", "\\boxed{8}", "\\boxed{ 8}\nor 9", "\\boxed{8", "", "9", "8.0"]
    found = Votes(exact_match)(texts, [[]] * len(texts))
    rewards = exact_match([Prompt("p", [1, 2], "8")] * len(texts), texts, [[]] * len(texts))
    assert [vote == "8" for vote in found] == [reward == 1 for reward in rewards]
    assert found[5:7] == [None, None] and found[8] == "8.0"


def test_votes_of_the_running_sum_are_for_the_right_digit_where_the_reward_is_1():
    draw, ends = random.Random(0), [nano.ANSWER, nano.EOS]
    rows = [[draw.randrange(10), nano.ANSWER, draw.randrange(10), nano.EOS] for _ in range(60)]
    rows += [[], [8], ends, [nano.ANSWER, 8], [nano.ASK, 8, nano.EOS], [nano.ANSWER, 8, 8, nano.EOS]]
    prompt = Prompt("p", [3, 1, 4, nano.ASK], "8")
    found = Votes(running_sum)([""] * len(rows), rows)
    rewards = running_sum([prompt] * len(rows), [""] * len(rows), rows)
    assert [vote == "8" for vote in found] == [reward == 1 for reward in rewards] and 1 in rewards
    assert found[60:] == [None] * 6 and set(found[:60]) == set("0123456789")


def test_a_function_of_ones_own_has_no_votes():
    assert Votes(lambda prompts, texts, tokens: [0.0] * len(prompts))(["8"], [[8]]) is None
