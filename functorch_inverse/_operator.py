"""Black boxes under torch.compile: one operator for all of them.

The graph holds a number that stands for the black box, and the structure of the call as text. The operator has
no autograd formula, which would break it inside transforms.
"""

import ast
import itertools
import weakref
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from functorch_inverse._arrays import OnArrays
from functorch_inverse._capture import Captured
from functorch_inverse._tree import Partition, Tree
from functorch_inverse._values import BlackBox, Loop, Outcome, VmapMethod
from functorch_inverse.errors import FunctorchInverseError, StructureError

__all__ = ["Callee", "call", "register"]

_CALLER = "black_box"


class Callee(Protocol):
    """What the operator calls."""

    arrays: OnArrays
    vmap_method: VmapMethod
    loop: Loop


_NUMBERS = itertools.count()
_REGISTERED: "weakref.WeakValueDictionary[str, Callee]" = weakref.WeakValueDictionary()


def register(callee: Callee) -> str:
    """A name for a callee, which lives as long as somebody else keeps it; a number would become a symbol of the trace."""
    token = f"{_CALLER}_{next(_NUMBERS)}"
    _REGISTERED[token] = callee
    return token


def call(token: str, tree: Tree, has_result: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The output tensors for a tree of arguments, and the tensors in that tree."""
    given = _Given([], [], [])
    structure = _encode(tree, given)
    if not (given.tensors or has_result):
        raise StructureError(
            f"`{_CALLER}`: under torch.compile an output like the first tensor is assumed, and there is no tensor among the "
            "arguments. Pass torch.as_tensor(x), or result=lambda *args: ... returning tensors of fn's shapes and dtypes."
        )
    return _operator(given.tensors, given.ints, given.floats, token, structure, ""), given.tensors


class _Given(NamedTuple):
    """What changes from call to call, in the order in which the structure mentions it."""

    tensors: list[Tensor]
    ints: list[Any]
    floats: list[Any]


def _encode(tree: Tree, given: _Given) -> str:
    """A tree as a Python literal, with ... for a tensor, {0} for an int and {1} for a float."""
    kind = type(tree)
    if isinstance(tree, Tensor):
        given.tensors.append(tree)
        return "..."
    if kind is tuple or kind is list:
        inner = "".join([_encode(part, given) + "," for part in tree])
        return f"({inner})" if kind is tuple else f"[{inner}]"
    if kind is dict:
        return "{" + "".join([f"{key!r}:{_encode(part, given)}," for key, part in tree.items()]) + "}"
    if tree is None or kind is bool or kind is str:
        return repr(tree)
    if isinstance(tree, int | torch.SymInt) and not isinstance(tree, Enum):
        given.ints.append(tree)
        return "{0}"
    if isinstance(tree, float | torch.SymFloat):
        given.floats.append(tree)
        return "{1}"
    raise StructureError(
        f"`{_CALLER}`: torch.compile cannot hand {kind.__name__} to the function. Pass tensors, numbers, strings, None, and "
        "plain tuples, lists and dicts of those; keep other things in fn itself."
    )


def _decode(structure: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Any:
    rest, numbers = iter(tensors), (iter(ints), iter(floats))

    def fill(part: Any) -> Any:
        if part is ...:
            return next(rest)
        if isinstance(part, set):
            return next(numbers[part.pop()])
        if isinstance(part, dict):
            return {key: fill(value) for key, value in part.items()}
        return type(part)(map(fill, part)) if isinstance(part, tuple | list) else part

    return fill(ast.literal_eval(structure))


def _levels(text: str, tensors: Sequence[Tensor]) -> tuple[tuple[tuple[bool, ...], int], ...]:
    """Which tensors have which vmapped dim, outermost first, from text such as "10,11"."""
    flags = [tuple(flag == "1" for flag in level) for level in text.split(",") if level]
    used, levels = [0] * len(tensors), []
    for level in flags:
        size = next(t.shape[n] for t, n, flag in zip(tensors, used, level, strict=True) if flag)
        levels.append((level, size))
        used = [n + flag for n, flag in zip(used, level, strict=True)]
    return tuple(levels)


def _found(token: str) -> Callee:
    try:
        return _REGISTERED[token]
    except KeyError:
        raise FunctorchInverseError(
            f"`{_CALLER}`: the compiled code calls a black box that is gone. Keep the object that black_box returned."
        ) from None


@torch.library.custom_op("functorch_inverse::black_box", mutates_args=())
def _operator(
    tensors: list[Tensor], ints: list[int], floats: list[float], token: str, structure: str, levels: str
) -> list[Tensor]:
    callee = _found(token)
    box = BlackBox(
        caller=_CALLER,
        call=lambda given: callee.arrays(_decode(structure, given, ints, floats)),
        captured=Captured(),
        has_aux=False,
        method="sequential",
        x_only=False,
        x_places=(),
        batch_dims=(),
        like=None,
        outcome=Outcome(),
        loop=callee.loop,
        levels=_levels(levels, tensors),
    )
    outputs = list(box(*tensors))
    if callee.arrays.result is None:
        _check_assumed(outputs, _like_first(tensors, box.levels))
    return outputs


def _like_first(tensors: Sequence[Tensor], levels: Any) -> Tensor:
    """What is assumed of the output: like one sample of the first tensor, with all vmapped dims."""
    first = tensors[0]
    own = first.shape[sum(batched[0] for batched, _ in levels) :]
    return first.new_empty((*(size for _, size in levels), *own))


def _check_assumed(outputs: list[Tensor], assumed: Tensor) -> None:
    got = [(tuple(t.shape), t.dtype) for t in outputs]
    if got != [(tuple(assumed.shape), assumed.dtype)]:
        raise StructureError(
            f"`{_CALLER}`: under torch.compile fn returned {got}, and without `result` one output like the first tensor "
            f"is assumed, {(tuple(assumed.shape), assumed.dtype)}. Pass result=lambda *args: ... returning tensors of "
            "fn's shapes and dtypes."
        )


@_operator.register_fake
def _operator_fake(
    tensors: list[Tensor], ints: list[int], floats: list[float], token: str, structure: str, levels: str
) -> list[Tensor]:
    result, sizes = _found(token).arrays.result, _levels(levels, tensors)
    if result is None:
        return [_like_first(tensors, sizes)]
    used = [sum(batched[i] for batched, _ in sizes) for i in range(len(tensors))]
    samples = [t.new_empty(t.shape[n:]) for t, n in zip(tensors, used, strict=True)]
    args, kwargs = _decode(structure, samples, ints, floats)
    leaves = Partition.of(result(*args, **kwargs))[1]
    return [t.new_empty((*(size for _, size in sizes), *t.shape)) for t in leaves]


@_operator.register_vmap
def _operator_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    tensors: list[Tensor],
    ints: list[int],
    floats: list[float],
    token: str,
    structure: str,
    levels: str,
) -> tuple[list[Tensor], list[int]]:
    dims = in_dims[0]
    moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    if _found(token).vmap_method == "broadcast":
        moved = [t.expand(info.batch_size, *t.shape) if d is None else t for t, d in zip(moved, dims, strict=True)]
    else:
        levels = "".join("0" if d is None else "1" for d in dims) + "," + levels
    outputs = _operator(moved, ints, floats, token, structure, levels)
    return outputs, [0] * len(outputs)
