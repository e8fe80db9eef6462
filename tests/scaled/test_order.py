"""In which order a run takes its prompts."""
import pytest

from scaled.data import PromptOrder


def test_the_order_is_decided_by_seed_and_position_alone():
    n = 7
    stream = PromptOrder(n, seed=3).take(0, 5 * n)
    epochs = [stream[i : i + n] for i in range(0, len(stream), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5  # each epoch has its own
    for position, count in [(0, 1), (6, 2), (5, 16), (34, 1), (13, 0)]:  # a fresh one, anywhere
        assert PromptOrder(n, seed=3).take(position, count) == stream[position : position + count]
    other = PromptOrder(n, seed=4).take(0, 5 * n)
    assert all(other[i : i + n] not in epochs for i in range(0, len(other), n))
    assert PromptOrder(1, seed=0).take(10**9, 3) == [0, 0, 0]
    with pytest.raises(ValueError, match="1 or more"):
        PromptOrder(0, seed=0)


def test_the_order_favours_no_prompt():
    """Each of 5 prompts is first in a fifth of 4,000 epochs, within five standard deviations."""
    order, n, epochs = PromptOrder(5, seed=0), 5, 4000
    first = [order.take(epoch * n, 1)[0] for epoch in range(epochs)]
    sd = (epochs * 0.2 * 0.8) ** 0.5
    assert all(abs(first.count(i) - epochs / n) < 5 * sd for i in range(n))
