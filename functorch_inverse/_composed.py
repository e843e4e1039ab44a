"""Derivatives of f(y, theta) made of reverse mode alone, to be differentiated by whatever is open outside.

Reverse mode throughout: torch's forward mode is not thread-safe, turns float32 into float64 now and
then, is missing for some special functions, and cannot run inside a plain dual level.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_inverse import _torch

__all__ = [
    "Function", "Tensors", "change_of_push", "dependent", "leveled", "mixed", "own_node", "pullback_to_theta", "pushforward",
]  # fmt: skip

Tensors: TypeAlias = Sequence[Tensor]
# (y leaves, theta leaves) -> x leaves
Function: TypeAlias = Callable[[Tensors, Tensors], tuple[Tensor, ...]]


def _vjp(function: Callable[..., tuple[Tensor, ...]], *primals: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    """torch.func.vjp, without its costs (and in spite of saved-tensor hooks) where plain autograd alone is at work."""
    if not _torch.recording():
        return torch.func.vjp(function, *primals)  # type: ignore[return-value]
    inputs = [own_node(t) for t in primals]
    outputs = function(*inputs)

    def pull(cotangents: Tensors) -> tuple[Tensor, ...]:
        live, c = dependent(outputs, cotangents)
        if not live:
            return tuple(torch.zeros_like(t) for t in inputs)
        return torch.autograd.grad(live, inputs, c, create_graph=True, materialize_grads=True)

    return outputs, pull


def dependent(outputs: Tensors, cotangents: Tensors) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What depends on anything at all, with its cotangents."""
    live = [o.requires_grad for o in outputs]
    return tuple(itertools.compress(outputs, live)), tuple(itertools.compress(cotangents, live))


def own_node(tensor: Tensor) -> Tensor:
    """The same tensor, tangent and all, as a new node of the graph, or as a leaf."""
    own = tensor.view_as(tensor)
    return own if own.requires_grad else own.requires_grad_()


def _at_current_level(tensor: Tensor) -> Tensor:
    """A tensor as an untracked constant of the innermost open transform."""
    if torch.compiler.is_dynamo_compiling():  # nothing escapes a trace
        return tensor
    now = _torch.current_level()
    return tensor if now is None or _torch.level(tensor) >= now else _torch.wrap_for_grad(tensor, now)


def leveled(tensors: Tensors) -> list[Tensor]:
    """Constants of this level, so that a tensor of a lower one in f is seen to come from elsewhere."""
    return [_at_current_level(t) for t in tensors]


def _replaced(tensors: Tensors, places: Sequence[int], chosen: Tensors) -> list[Tensor]:
    everything = leveled(tensors)
    for i, t in zip(places, chosen, strict=True):
        everything[i] = t
    return everything


def _restrict(f: Function, y: Tensors, theta: Tensors, wanted: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """f as a function of the wanted theta alone."""
    return lambda *chosen: f(leveled(y), _replaced(theta, wanted, chosen))


def pullback_to_theta(f: Function, y: Tensors, theta: Tensors, wanted: Sequence[int], c: Tensors) -> tuple[Tensor, ...]:
    """(df/dtheta)^T times cotangents, for the wanted theta."""
    outputs, pull = _vjp(_restrict(f, y, theta, wanted), *(theta[i] for i in wanted))
    return pull(tuple(t.to(out.dtype) for t, out in zip(c, outputs, strict=True)))


def pushforward(f: Function, y: Tensors, theta: Tensors, wanted: Sequence[int], tangents: Tensors) -> tuple[Tensor, ...]:
    """df/dtheta times tangents of the wanted theta, as the transpose of the transpose."""
    outputs, pull = _vjp(_restrict(f, y, theta, wanted), *(theta[i] for i in wanted))
    return _vjp(lambda *c: pull(c), *(torch.zeros_like(out) for out in outputs))[1](tuple(tangents))


# A point is (*y, *theta); n of its parts are y.
def mixed(
    f: Function, n: int, point: Tensors, c: Tensors, chosen: Sequence[int], along: Tensors, wanted: Sequence[int]
) -> tuple[Tensor, ...]:
    """With s the derivative of <c, f> in the chosen parts of the point along some directions: ds in the wanted parts."""

    def slope(*free: Tensor) -> tuple[Tensor, ...]:
        here = _replaced(point, wanted, free)

        def part(*chosen_: Tensor) -> tuple[Tensor, ...]:
            there = _replaced(here, chosen, chosen_)
            return f(there[:n], there[n:])

        return _vjp(part, *(here[i] for i in chosen))[1](tuple(c))

    return _vjp(slope, *(point[i] for i in wanted))[1](tuple(along))


def change_of_push(
    f: Function, n: int, point: Tensors, u: Tensors, chosen: Sequence[int], along: Tensors
) -> tuple[Tensor, ...]:
    """d(df/dy u) as the chosen parts of the point move along some directions: `mixed`, transposed in c."""
    zeros = [torch.zeros_like(t) for t in f(point[:n], point[n:])]
    return _vjp(lambda *c: mixed(f, n, point, c, chosen, along, range(n)), *zeros)[1](tuple(u))
