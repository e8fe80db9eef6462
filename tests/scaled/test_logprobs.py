"""Chunked log-probabilities: values, gradients and memory against the whole logits at once."""
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nano_moe_rl as nano
from scaled import logprobs as module
from scaled.logprobs import head_logprobs

B, T, D, V = 3, 7, 5, 11


def inputs(dtype=torch.float64, vocabulary=V, shape=(B, T)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, D, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, shape, generator=generator)
    return hidden, weight, bias, targets, torch.randn(shape, generator=generator)


def test_functions_are_those_of_the_single_file():
    assert module.token_logprobs is nano.token_logprobs and module.entropy is nano.entropy


@pytest.mark.parametrize("tokens", [1, 4, 21, 100])  # a chunk: 21 is all, and 4 leaves one over
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_whole_logits_with_gradients(tokens, with_bias):
    hidden, weight, bias, targets, grad = inputs(torch.float32)
    bias = bias if with_bias else None
    logprobs, entropies = head_logprobs(hidden, weight, targets, 0.7, 4 * V * tokens + 3, 0.4, bias)
    parts = [x for x in (hidden, weight, bias) if x is not None]
    mine = torch.autograd.grad(logprobs, parts, grad)

    logits = hidden.double() @ weight.double().T + (bias.double() if with_bias else 0)
    distribution = torch.distributions.Categorical(logits=logits * 0.4 / 0.7)
    expected = distribution.log_prob(targets)
    assert logprobs.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(entropies.double(), distribution.entropy(), atol=2e-6, rtol=0)
    for a, b in zip(mine, torch.autograd.grad(expected, parts, grad.double())):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=0)
    assert logprobs.requires_grad and not entropies.requires_grad


def test_bf16_products_are_those_of_the_plain_head():
    hidden, weight, _, targets, grad = inputs(torch.bfloat16)
    logprobs, _ = head_logprobs(hidden, weight, targets, 1.3, 4 * V * 5)
    expected = nano.token_logprobs(F.linear(hidden, weight), targets, 1.3)
    assert torch.equal(logprobs, expected)
    mine = torch.autograd.grad(logprobs, (hidden, weight), grad)
    theirs = torch.autograd.grad(expected, (hidden, weight), grad)
    assert torch.equal(mine[0], theirs[0])
    # sums of several chunks are rounded to bf16 after each, here 5
    torch.testing.assert_close(mine[1], theirs[1], atol=0.02, rtol=0.02)


def test_a_frozen_weight_gets_no_gradient_and_hidden_does():
    hidden, weight, _, targets, grad = inputs(torch.float32)
    logprobs, _ = head_logprobs(hidden, weight.detach(), targets, 1.0, 4 * V)
    logprobs.backward(grad)
    assert hidden.grad.abs().min() > 0 and weight.grad is None


def test_of_no_token_there_is_nothing_but_a_gradient_of_zeros():
    """A rank whose responses are all too old still takes part in the backward pass."""
    hidden, weight, bias, targets, grad = (x[:, :0] if x.shape[:2] == (B, T) else x for x in inputs(torch.float32))
    logprobs, entropies = head_logprobs(hidden, weight, targets, 1.0, 4 * V, bias=bias)
    assert logprobs.shape == entropies.shape == (B, 0)
    grads = torch.autograd.grad(logprobs, (hidden, weight, bias), grad)
    assert grads[0].shape == (B, 0, D) and not grads[1].any() and not grads[2].any()


def test_a_budget_below_one_token_is_refused():
    hidden, weight, _, targets, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=f"one token over {V} symbols take {4 * V}"):
        head_logprobs(hidden, weight, targets, 1.0, 4 * V - 1)


class PeakBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive: now, and at most. Those
    of the inputs, of which operations give views, do not count."""
    def __init__(self, *inputs):
        super().__init__()
        self.alive, self.now, self.peak = {x.untyped_storage()._cdata for x in inputs}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.alive:
                    self.alive.add(key)
                    self.now += size
                    weakref.finalize(storage, self.free, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size


def peak_bytes(vocabulary, head):
    """At most allocated in forward and backward, less the gradient of the weight that stays."""
    hidden, weight, _, targets, grad = inputs(torch.float32, vocabulary, (2, 135))
    gc.collect()
    with PeakBytes(hidden, weight, targets, grad) as memory:
        head(hidden, weight, targets).backward(grad)
    assert memory.now >= weight.grad.nbytes
    return memory.peak - weight.grad.nbytes


def test_peak_memory_is_flat_in_the_vocabulary():
    budget = 2**20  # of logits: 262 tokens at 1,000 symbols, a single one at 150,000
    chunked = [peak_bytes(v, lambda *x: head_logprobs(*x, 1.0, budget)[0])
               for v in (1_000, 6_000, 30_000, 150_000)]
    whole = [peak_bytes(v, lambda h, w, t: nano.token_logprobs(h @ w.T, t))
             for v in (1_000, 30_000)]
    assert whole[1] > 25 * whole[0] > 25 * 2 * 270 * 1_000 * 4  # the measure sees whole logits
    assert max(chunked) == chunked[0] < 4.1 * budget
