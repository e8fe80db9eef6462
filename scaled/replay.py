"""Routing replay around Hugging Face models: a context manager answers each router's final top-k.

    with RoutingReplay(model, replay, mask) as routes:    # replay None: the model's own experts
        loss_of(model(tokens).logits).backward()          # gradient checkpointing recomputes here
    routes.routing                                        # (B, T, L, A), the live top-k

Only the selection is given. Scoring (softmax or sigmoid, groups, correction bias), weighting and
the router's gradient stay those of the family, because its own forward runs around the answer.
Which routers a model has is in families.py. N is B·T here, padding included.
"""
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scaled.families import knows, route_shape, routers

class _Selection(TorchFunctionMode):
    """Answers the top-A over (N, E) scores with select(live (N, A)) -> (N, A) and their scores.
    Top-k of other shapes, as over groups of experts, are left alone."""
    def __init__(self, A: int, E: int, select: Callable[[Tensor], Tensor]):
        super().__init__()
        self.A, self.E, self.select, self.answered = A, E, select, 0
        self.masked = self.unmasked = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is Tensor.masked_fill:
            # DeepSeek-V2 takes its weights from scores that are 0 outside the live groups: a
            # replayed expert there would have weight 0 and no gradient
            self.masked, self.unmasked = out, args[0]
        if func in (torch.topk, Tensor.topk):
            scores, live = args[0], out[1]
            if scores.dim() == 2 and scores.shape[1] == self.E and live.shape[1] == self.A:
                self.answered += 1
                scores = self.unmasked if scores is self.masked else scores
                experts = self.select(live)
                # gather saves more for backward than top-k. A checkpointed layer that is
                # recomputed outside the context, natively, is thereby an error of torch's
                return torch.return_types.topk((scores.gather(-1, experts), experts))
        return out

def repeated(routes: Tensor) -> Tensor:
    """Whether two of A experts are the same: routes (A, ...) -> bool (...). Each pair is compared: a
    sixth of the time of a sort, which also takes nine bytes an id."""
    same = torch.zeros(routes.shape[1:], dtype=torch.bool, device=routes.device)
    for i, one in enumerate(routes):
        for other in routes[:i]:
            same |= one == other
    return same

def check_routes(routing, mask, shape, experts):
    """ValueError if the routes (B, T, L, A) of real tokens cannot be replayed."""
    if routing.shape != shape:
        raise ValueError(f"replay has shape {tuple(routing.shape)}, the model needs {shape}")
    routes = routing[mask].movedim(-1, 0).contiguous()  # (A, n, L)
    bad = (routes.amin(0) < 0) | repeated(routes)
    bad |= routes.amax(0).long() >= experts  # an id of uint8 cannot be compared with 256
    if bad.any():
        raise ValueError(f"replay lacks a valid route for {int(bad.sum())} of {bad.numel()} "
                         f"(token, layer) pairs: {shape[-1]} different experts below {experts}")

class RoutingReplay:
    """Inside it, one forward of `model` on (B, T) tokens routes as told, and so does what its
    backward recomputes. replay (B, T, L, A), a narrow integer dtype on any device, or None: the
    live top-k. mask (B, T) bool, True on real tokens. Padding goes to experts in turn: it cannot
    overload one, and its routes are neither read nor counted. Afterwards the model is as before.

    ValueError: unknown family, wrong shape, a real token without a valid route. RuntimeError: a
    router that does not fire exactly once in the forward, or is inside another RoutingReplay."""
    def __init__(self, model: nn.Module, replay: Tensor | None, mask: Tensor):
        L, self.A, self.E = route_shape(model.config)
        self.routers, self.live = routers(model), {}
        self.dtype = torch.uint8 if self.E <= 256 else torch.int16
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}: give bool (B, T)")
        if replay is not None:
            if replay.dtype == torch.uint8 and self.E > 256:
                raise ValueError(f"replay is uint8, in which ids of {self.E} experts wrap: give "
                                 "int16")
            check_routes(replay, mask.to(replay.device), (*mask.shape, L, self.A), self.E)
            replay = replay.flatten(0, 1)
        self.shape, self.replay, self.mask = mask.shape, replay, mask.flatten()[:, None]
        turn = (~self.mask).cumsum(0) * self.A + torch.arange(self.A, device=mask.device)
        self.spread = (turn % self.E).to(self.dtype)  # (N, A), different within a row

    def __enter__(self):
        for layer, router in self.routers.items():
            if "forward" in vars(router):
                raise RuntimeError(f"the router of layer {layer} already has a replaced forward: "
                                   "leave the other RoutingReplay, or remove the wrapper, first")
        self.live = {}
        for column, (layer, router) in enumerate(self.routers.items()):
            router.forward = partial(self._route, layer, column, router.forward)
        return self

    def __exit__(self, failure, *_):
        for router in self.routers.values():
            del router.forward
        if failure is None:
            self._check_fired()

    def __deepcopy__(self, memo):
        raise RuntimeError("a model copied inside a RoutingReplay would replay too: copy it before")

    @property
    def routing(self) -> Tensor:
        """The live top-k of every layer, (B, T, L, A), also under replay; uint8 up to 256 experts,
        else int16. Padding positions hold anything. RuntimeError before the forward."""
        self._check_fired()
        return torch.stack([self.live[layer] for layer in self.routers], 1).unflatten(0, self.shape)

    def _check_fired(self):
        if silent := [layer for layer in self.routers if layer not in self.live]:
            raise RuntimeError(f"{len(self.live)} of {len(self.routers)} routers fired, not those "
                               f"of layers {silent}: run the whole model inside RoutingReplay")

    def _route(self, layer: int, column: int, forward: Callable, *args, **kwargs):
        with _Selection(self.A, self.E, partial(self._select, layer, column)) as selection:
            out = forward(*args, **kwargs)
        if selection.answered != 1:
            raise RuntimeError(f"the router of layer {layer} took {selection.answered} top-{self.A}"
                               f" of {self.E} experts where one was expected")
        return out

    def _select(self, layer: int, column: int, live: Tensor) -> Tensor:
        """The experts (N, A) that one router uses, int64."""
        if len(live) != len(self.mask):
            raise RuntimeError(f"the model ran on {len(live)} tokens, RoutingReplay got a mask of "
                               f"{tuple(self.shape)}")
        # A recompute sees what the forward saw, even where the kernels do not repeat bit for bit
        recomputed = torch._C._current_graph_task_id() != -1  # -1: not inside a backward
        if recomputed != (layer in self.live):
            raise RuntimeError(f"the router of layer {layer} was recomputed without a forward, or "
                               "ran twice: one forward, with its backward, in a RoutingReplay")
        if not recomputed:
            self.live[layer] = live.to(self.dtype)
        self.mask, self.spread = self.mask.to(live.device), self.spread.to(live.device)
        if self.replay is None:
            chosen = self.live[layer]
        else:
            self.replay = self.replay.to(live.device)  # narrow; once, all layers
            chosen = self.replay[:, column]
        return chosen.long().where(self.mask, self.spread.long())


def routed(model: nn.Module, replay: Tensor | None, mask: Tensor):
    """A RoutingReplay. For a family whose routers are not known, and without replay, a context that
    does nothing, with None for its routing."""
    if replay is None and not knows(model.config):
        return nullcontext(SimpleNamespace(routing=None))
    return RoutingReplay(model, replay, mask)
