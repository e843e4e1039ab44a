"""Down through the open transforms, to where somebody follows what is computed."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from functorch_inverse import _torch

__all__ = ["Dims", "Task", "memory_of", "run", "signed", "sink"]

Tensors: TypeAlias = Sequence[Tensor]
Dims: TypeAlias = Sequence[int | None]


class _Peeled(NamedTuple):
    """Tensors with and without what the innermost transform put around them, the dims that it maps, and whether it follows one.

    The transform is None where only plain autograd can follow.
    """

    tensors: list[Tensor]
    inner: list[Tensor]
    dims: Dims
    followed: bool

    @staticmethod
    def of(tensors: Tensors, transform: Any) -> "_Peeled":
        with _torch.no_functions():  # a mode would answer for what stands in for a tensor
            tensors = [_torch.alive(t) for t in tensors]
            pairs = [_torch.peeled(t, transform) for t in tensors]
            followed = any(_torch.is_followed(t, transform) for t in tensors)
        return _Peeled(tensors, [t for t, _ in pairs], [d for _, d in pairs], followed)


class Task(Protocol):
    """What is computed of some tensors, whatever is open."""

    def differentiable(self, tensors: Tensors) -> Tensors:
        """The outputs, for transforms of which the innermost follows some of the tensors."""
        ...

    def values(self, tensors: Tensors) -> Tensors:
        """The outputs of plain tensors that nobody follows."""
        ...

    def mapped(self, dims: Dims, size: int, randomness: str, tensors: Tensors) -> "tuple[Tensors, Dims]":
        """The outputs beneath a vmap, and where they have its dim."""
        ...


def run(task: Task, tensors: Tensors) -> tuple[Tensor, ...]:
    """The outputs of a task: open transforms that follow no tensor are taken off one by one, cheaper than by a Function."""
    found: Tensors
    top = _innermost()
    tensors, inner, dims, followed = _Peeled.of(tensors, top)
    if followed:
        return tuple(task.differentiable(tensors))
    if top is None:
        with torch.no_grad(), _torch.forward_mode(False):
            return tuple(task.values(inner))
    with top.lower():
        if all(d is None for d in dims):
            found, places = run(task, inner), None
        else:
            found, places = task.mapped(dims, top.batch_size(), top.randomness(), inner)
    return _wrapped(found, places, top)


def _innermost() -> Any:
    top = _torch.innermost()
    if top is not None and _torch.functionalizes(top):
        raise NotImplementedError(
            "a black box inside torch.func.functionalize: that has no rule for functions of one's own. Leave functionalize "
            "out; f and g may change tensors of their own in place without it."
        )
    return top


def sink(function: Callable[..., Tensors], *groups: Tensors) -> Tensors:
    """function(whether a plain graph will do, *groups of tensors), below all the open transforms that have no part in them."""
    top, sizes = _innermost(), [len(group) for group in groups]
    tensors, inner, dims, followed = _Peeled.of([t for group in groups for t in group], top)
    if followed or any(d is not None for d in dims):
        return function(False, *_split(tensors, sizes))
    if top is None:
        with torch.no_grad(), _torch.forward_mode(False):
            return function(_torch.can_record(), *_split(inner, sizes))
    with top.lower():
        found = sink(function, *_split(inner, sizes))
    return _wrapped(found, None, top)


def _split(tensors: list[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(tensors)
    return [list(itertools.islice(rest, size)) for size in sizes]


def _wrapped(tensors: Tensors, dims: Dims | None, transform: Any) -> tuple[Tensor, ...]:
    """Tensors from beneath a transform as they are inside of it; where it is a vmap, `dims` are what it maps."""
    now = transform.level()
    if not _torch.is_mapping(transform):
        return tuple([_torch.wrap_for_grad(t, now) for t in tensors])
    if dims is None:
        return tuple(tensors)
    return tuple([t if d is None else _torch.add_batch_dim(t, d, now) for t, d in zip(tensors, dims, strict=True)])


def signed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of an autograd.Function with its signature at hand, which torch asks for at every call under a transform."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


def memory_of(tensors: Tensors) -> "Memory | None":
    """Equal for tensors that share memory, which nobody has written to in between; None where nobody can tell."""
    marks = [_torch.mark(t) for t in tensors]
    return None if None in marks else Memory(marks, tensors)


class Memory:
    """Where some values lie; it keeps them, so that nothing else can take their place."""

    def __init__(self, marks: list[Any], tensors: Tensors) -> None:
        self.marks, self.tensors = marks, tensors

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Memory) and self.marks == other.marks

    __hash__ = None  # type: ignore[assignment]
