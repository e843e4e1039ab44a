"""All diagonals of a Jacobian by one backward pass, where f is made of elementwise operations and shifts.

Ones at all outputs, pulled back through the graph of f, stand for one diagonal of A: entry j of what arrives belongs to row
j - s. Elementwise operations keep the shift s; slices, pads and concatenations change it. Cotangents of different
shifts travel together but apart, so each formula is evaluated once for each diagonal that passes it. What is found is the
structure of A, not a guess at it: nothing can stand outside of these diagonals.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._stand_in import ELEMENTWISE, StandIn

__all__ = ["Diagonals", "diagonals_of_graph"]

_aten = torch.ops.aten
# s -> the entries A[j - s, j] of a diagonal, at j; nothing is said about those that have no row.
Diagonals: TypeAlias = dict[int, Tensor]


def diagonals_of_graph(output: Tensor, y: Tensor, most: int) -> Diagonals | None:
    """Those of f from the graph of output = f(y), both of shape (*batch, n).

    None where the graph has an operation without a rule here, or where more than `most` diagonals meet.
    """
    try:
        one = output.new_ones((1,) * output.ndim)
        (found,) = _torch.graph_grad((output,), (y,), (_Shifted(output.shape, {0: one}, most),))
    except Exception:  # a hook may do anything with what it is given
        return None
    return {s: part.expand(y.shape) for s, part in found.parts.items()} if isinstance(found, _Shifted) else None


class _Shifted(StandIn):
    """Cotangents of several shifts; torch sees the shape of one. What is one number everywhere is kept as that."""

    parts: Diagonals
    most: int

    @staticmethod
    def __new__(cls: Any, shape: Any, parts: Diagonals, most: int) -> "_Shifted":
        self: _Shifted = _torch.wrapper(cls, shape, next(iter(parts.values())))
        self.parts, self.most = parts, most
        return self


def _elementwise(func: Any, args: Any, kwargs: Any) -> _Shifted | None:
    """Of one cotangent, most often the first argument."""
    i = 0
    while not isinstance(args[i], _Shifted):
        i += 1
    cotangent, before, behind = args[i], args[:i], args[i + 1 :]
    for arg in behind:
        if isinstance(arg, _Shifted):
            return None
    return _fitting(cotangent, {s: func(*before, part, *behind, **kwargs) for s, part in cotangent.parts.items()})


def _unbroadcast(func: Any, args: Any, kwargs: Any) -> _Shifted | None:
    """The same of an operation that wants all tensors in one shape."""
    cotangent, *others = args
    parts = {s: part.expand(cotangent.shape) for s, part in cotangent.parts.items()}
    return _elementwise(func, (_Shifted(cotangent.shape, parts, cotangent.most), *others), kwargs)


def _fitting(cotangent: _Shifted, parts: Diagonals) -> _Shifted | None:
    """What has the shape of a cotangent, and is not too much."""
    shape = cotangent.shape
    for s, part in parts.items():
        if part.shape != shape and part.numel() != 1:
            parts[s] = part.expand(shape)  # an error where it is larger
    return _Shifted(shape, parts, cotangent.most) if len(parts) <= cotangent.most else None


def _quotient(func: Any, args: Any, kwargs: Any) -> _Shifted | None:
    return _elementwise(func, args, kwargs) if isinstance(args[0], _Shifted) else None


def _chosen(func: Any, args: Any, kwargs: Any) -> _Shifted | None:
    """where(mask, cotangent, 0), or the other way round."""
    others = [t for t in args[1:] if not isinstance(t, _Shifted)]
    return _elementwise(func, args, kwargs) if len(others) == 1 and not others[0].any() else None


def _filled(func: Any, args: Any, kwargs: Any) -> _Shifted | None:
    """masked_fill(cotangent, mask, 0)."""
    return _elementwise(func, args, kwargs) if not isinstance(args[2], Tensor) and args[2] == 0 else None


def _add(func: Any, args: Any, kwargs: Any) -> _Shifted | None:
    a, b = args
    if kwargs or not (isinstance(a, _Shifted) and isinstance(b, _Shifted) and a.shape == b.shape):
        return None
    return _fitting(a, a.parts | {s: a.parts[s] + part if s in a.parts else part for s, part in b.parts.items()})


def _slice_backward(func: Any, args: Any, kwargs: Any) -> _Shifted | None:
    """t'[j] = t[j + start], pulled back to t."""
    cotangent, sizes, dim, start, _, step = args
    by = _start(start, sizes, dim, step, tuple(sizes) == cotangent.shape)
    return None if kwargs or by is None else _moved(func, args, by)


def _slice(func: Any, args: Any, kwargs: Any) -> _Shifted | None:
    """A part of a cotangent: pulled back to a part of a concatenation."""
    numbers: Any = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])
    dim, start, _, step = numbers
    by = _start(start or 0, args[0].shape, dim, step, False)
    return None if kwargs or by is None else _moved(func, args, -by)


def _start(start: int, sizes: Any, dim: int, step: int, whole: bool) -> int | None:
    """Where a slice along the last dim begins; 0 of one that leaves nothing out."""
    if step != 1 or (dim % len(sizes) != len(sizes) - 1 and not whole):
        return None
    return 0 if whole else min(max(start + sizes[-1] if start < 0 else start, 0), sizes[-1])


def _moved(func: Any, args: Any, by: int) -> _Shifted:
    cotangent, *others = args
    parts = {s + by: func(part.expand(cotangent.shape), *others) for s, part in cotangent.parts.items()}
    return _Shifted(next(iter(parts.values())).shape, parts, cotangent.most)


def _pad(func: Any, args: Any, kwargs: Any) -> _Shifted | None:
    """Of a cotangent: pulled back to what was padded, or cut."""
    cotangent, (before, _, *others), value = (*args, 0)[:3]
    return None if kwargs or any(others) or value != 0 or not cotangent.ndim else _moved(func, args, before)


def _view(func: Any, args: Any, kwargs: Any) -> _Shifted | None:
    """What changes no shape; torch insists on a new tensor."""
    cotangent, shape, *_ = args
    return _Shifted(cotangent.shape, cotangent.parts, cotangent.most) if tuple(shape) == cotangent.shape else None


_MORE = {_aten.hardtanh_backward.default, _aten._to_copy.default}
_Shifted.rules = dict.fromkeys(ELEMENTWISE | _MORE, _elementwise) | {
    _aten.log_sigmoid_backward.default: _unbroadcast,
    _aten.div.Tensor: _quotient,
    _aten.div.Scalar: _quotient,
    _aten.where.self: _chosen,
    _aten.masked_fill.Scalar: _filled,
    _aten.add.Tensor: _add,
    _aten.slice_backward.default: _slice_backward,
    _aten.slice.Tensor: _slice,
    _aten.constant_pad_nd.default: _pad,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.expand.default: _view,
}
