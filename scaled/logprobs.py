"""Log-probabilities and entropies over a large vocabulary, without the logits of a whole batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nano_moe_rl import entropy, token_logprobs


class _Head(torch.autograd.Function):
    """The output head a chunk of tokens at a time; the backward pass computes each chunk again.
    torch.utils.checkpoint would do this too, but gives every chunk a gradient of its own in the
    shape of the weight; here all chunks add to one, and no memory but that grows with V."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
                temperature: float, chunk: int):
        results = []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = F.linear(h, weight, bias)
            results.append((token_logprobs(logits, t, temperature), entropy(logits, temperature)))
            del logits  # else it lives on beside the next chunk's
        logprobs, entropies = map(torch.cat, zip(*results))
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs: Tensor, _):
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden, grad_weight, grad_bias = (  # fp32: a sum of many chunks would lose bf16's end
            torch.zeros_like(x, dtype=torch.float32) if needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad))
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = F.linear(hidden[part], weight, bias).requires_grad_()
            with torch.enable_grad():
                logprobs = token_logprobs(logits, targets[part], ctx.temperature)
            grad, = torch.autograd.grad(logprobs, logits, grad_logprobs[part])
            del logits, logprobs
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None and grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.T, hidden[part])  # else a chunk's has the shape of the weight
            elif grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del grad  # as in forward
        grads = (grad if grad is None else grad.to(hidden.dtype)
                 for grad in (grad_hidden, grad_weight, grad_bias))
        return *grads, None, None, None


def head_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float,
                  logits_bytes: int, logits_scale: float = 1.0, bias: Tensor | None = None):
    """hidden (B, T, D), head weight (V, D), bias (V,), targets (B, T) -> log π of the targets and
    entropies in nats, (B, T) in fp32, of softmax(logits · logits_scale / temperature). Only the
    first has a gradient. One chunk's fp32 logits take at most logits_bytes; with log_softmax,
    entropy or gradient about four times that is alive at once.
    ValueError if not even one token's logits fit."""
    chunk = logits_bytes // (4 * len(weight))
    if chunk < 1:
        raise ValueError(f"logits_bytes {logits_bytes}: the fp32 logits of one token over "
                         f"{len(weight)} symbols take {4 * len(weight)}; give that or more")
    logprobs, entropies = _Head.apply(hidden.flatten(0, 1), weight, bias, targets.flatten(),
                                      temperature / logits_scale, chunk)
    return logprobs.view(targets.shape), entropies.view(targets.shape)
