"""Who votes for what in a majority: the answers that the reward extracts from responses, and which
of them it holds to be the same."""

import nano_moe_rl as nano
from scaled.rewards import SECONDS, Math, Score, exact_match, final_answers, running_sum
from scaled.worker import Ended, Worker


class Votes:
    """Of one reward. `timeouts` counts what took more than SECONDS: an answer that is then no
    vote, or two answers that are then different."""

    def __init__(self, reward: Score):
        self.reward, self.timeouts = reward, 0
        self.workers: dict[str, Worker] = {}

    def __call__(self, texts: list[str], tokens: list[list[int]]) -> list[str | None] | None:
        """The answer of each response to one prompt, spelled as where it first came; None is no
        answer. None for all: what a function of one's own extracts nobody knows."""
        if isinstance(self.reward, Math):
            return self.merged([self.ask("extract", text) for text in texts])
        if self.reward is exact_match:
            return [(*final_answers(text), "")[0] or None for text in texts]
        if self.reward is running_sum:
            return [nano.VOCABULARY[row[-2]] if len(row) > 2 and (row[-3], row[-1]) == (
                nano.ANSWER, nano.EOS) else None for row in tokens]
        return None

    def merged(self, answers: list[str | None]) -> list[str | None]:
        first: dict[str | None, str | None] = {None: None}
        for answer in answers:
            if answer not in first:
                kinds = dict.fromkeys(kind for kind in first.values() if kind is not None)
                first[answer] = next(
                    (kind for kind in kinds if self.ask("alike", kind, answer)), answer)
        return [first[answer] for answer in answers]

    def ask(self, function: str, *question):
        """What a function of judge.py says in a process of its own; None if it fails."""
        if function not in self.workers:
            self.workers[function] = Worker(f"scaled.judge:{function}", seconds=SECONDS)
        try:
            return self.workers[function].ask(*question)
        except Ended as end:
            del self.workers[function]
            self.timeouts += end.timeout
        except RuntimeError:  # sympy can raise anything
            pass
        return None

    def take_timeouts(self) -> int:
        """Those since the last call."""
        timeouts, self.timeouts = self.timeouts, 0
        return timeouts
