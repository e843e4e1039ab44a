r"""All rows of a Jacobian by one backward pass, as cheap as its formula where f is made of layers.

Row r of A is the cotangent e_r pulled back through the graph of f. All rows travel together, as

    T[b, r, j] = D[b, r, j] + delta_rj d[b, j],

a dense part and a diagonal one, each of which may be the same for all samples. The unit vectors are diagonal
at first, and stay so through whatever acts elementwise; at a linear layer W, the diagonal d becomes d_r W[r, j],
where a matrix product of all rows with W would cost n times as much. What mixes the numbers of a sample in another way
is done to all rows as a tensor with one more dim.
"""

from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._stand_in import DIVISIONS, ELEMENTWISE, StandIn

__all__ = ["jacobian_of_graph"]

_aten = torch.ops.aten
# Those that mix the numbers of a sample, as in couplings, permutations and sums: where their arguments name dims, and sizes.
_MIXING: dict[Any, tuple[int | None, int | None]] = {
    _aten.slice.Tensor: (1, None), _aten.slice_backward.default: (2, 1), _aten.select.int: (1, None),
    _aten.select_backward.default: (2, 1), _aten.split.Tensor: (2, None), _aten.split_with_sizes.default: (2, None),
    _aten.unsqueeze.default: (1, None), _aten.squeeze.dim: (1, None), _aten.sum.dim_IntList: (1, None),
    _aten.view.default: (None, 1), _aten._unsafe_view.default: (None, 1), _aten.expand.default: (None, 1),
    _aten.permute.default: (1, None), _aten.flip.default: (1, None), _aten.roll.default: (2, None),
    _aten.cumsum.default: (1, None), _aten.cat.default: (1, None), _aten.where.self: (None, None),
    _aten.masked_fill.Scalar: (None, None), _aten.bmm.default: (None, None), _aten.add.Tensor: (None, None),
    _aten.mul.Tensor: (None, None), _aten.transpose.int: (1, None),
}  # fmt: skip
_OF_DIM_ZERO = {_aten.slice.Tensor, _aten.split.Tensor, _aten.split_with_sizes.default, _aten.cat.default}  # unless they say
_BROADCASTING = {
    _aten.where.self, _aten.masked_fill.Scalar, _aten.bmm.default, _aten.add.Tensor, _aten.mul.Tensor,
}  # fmt: skip
_SAME_WITH_MORE_DIMS = {
    _aten.bmm.default: torch.matmul, _aten.view.default: torch.reshape, _aten._unsafe_view.default: torch.reshape,
}  # fmt: skip


def jacobian_of_graph(output: Tensor, y: Tensor, chunk: int) -> Tensor | None:
    """A of shape (*batch, rows, columns) from the graph of output (*batch, rows) = f(y), y of shape (*batch, columns).

    So many rows at once, in memory that nobody else reads. None where the graph has an operation without a rule here.
    """
    rows = output.shape[-1]
    try:
        if chunk >= rows:
            return _pulled(output, y, 0, rows)
        result = output.new_empty((*output.shape, y.shape[-1]))
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            result[..., start:stop, :] = _pulled(output, y, start, stop)
    except Exception:  # one row after another is right in any case, or says what is wrong
        return None
    return result


def _pulled(output: Tensor, y: Tensor, start: int, stop: int) -> Tensor:
    unit = output.new_ones((*(1,) * (output.ndim - 1), output.shape[-1]))
    (found,) = _torch.graph_grad((output,), (y,), (_Rows(output.shape, (start, stop), None, unit),))
    if not isinstance(found, _Rows):
        raise NotImplementedError("rows of a Jacobian through something that lost them")
    return found.matrix()


class _Rows(StandIn):
    """Cotangents for the rows of a window (start, stop); torch sees the shape of one.

    `dense` has the shape (*batch, rows, columns), `scale` (*batch, columns), where batch dims may be 1.
    """

    window: tuple[int, int]
    dense: Tensor | None
    scale: Tensor | None

    @staticmethod
    def __new__(cls: Any, shape: Any, window: tuple[int, int], dense: Tensor | None, scale: Tensor | None) -> "_Rows":
        like = scale if dense is None else dense
        assert like is not None
        self = _torch.wrapper(cls, shape, like)
        self.window, self.dense, self.scale = window, dense, scale
        return self

    @classmethod
    def through(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """By its own rule, or with all rows as one tensor."""
        found = super().through(func, args, kwargs)
        return _mixed(func, args, kwargs) if found is None and func in _MIXING else found

    def own(self, numbers: Tensor) -> Tensor:
        """Of one number for each row of the Jacobian, along the last dim, those of these rows."""
        start, stop = self.window
        return numbers if stop - start == numbers.shape[-1] else numbers[..., start:stop]

    def stacked(self, ndim: int) -> Tensor:
        """These rows as one tensor, (rows, 1..., *shape) with so many dims behind the first."""
        rows = self.matrix(spent=False).movedim(-2, 0)
        return rows.reshape(len(rows), *(1,) * (ndim - self.ndim), *self.shape)

    def matrix(self, *, spent: bool = True) -> Tensor:
        """These rows, (*shape[:-1], rows, shape[-1]); of `spent` ones nobody else will read the memory."""
        start, stop = self.window
        full = (*self.shape[:-1], stop - start, self.shape[-1])
        if self.dense is None:
            assert self.scale is not None
            total = self.scale.new_zeros(full)
        else:
            if not spent and self.scale is None:
                return self.dense.expand(full)
            free = spent and self.dense.shape == full and self.dense.is_contiguous()
            total = self.dense if free else self.dense.expand(full).clone(memory_format=torch.contiguous_format)
        if self.scale is not None:
            total.diagonal(start, -2, -1).add_(self.own(self.scale))
        return total


def _elementwise(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    mine = [i for i, arg in enumerate(args) if isinstance(arg, _Rows)]
    others = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.ndim and i not in mine]
    i, rows = mine[0], args[mine[0]]
    if len(mine) > 1 or not rows.ndim or (func in DIVISIONS and i):
        return None
    shape = rows.shape
    if any(args[k].shape != shape for k in others):
        shape = torch.broadcast_shapes(shape, *(args[k].shape for k in others))
        if len(shape) != rows.ndim or shape[-1] != rows.shape[-1]:
            return None

    def apply(part: Tensor | None, lift: bool) -> Tensor | None:
        if part is None:
            return None
        lifted = [arg.unsqueeze(-2) if lift and k in others else arg for k, arg in enumerate(args)]
        lifted[i] = part
        return func(*lifted, **kwargs)

    return _Rows(shape, rows.window, apply(rows.dense, True), apply(rows.scale, False))


def _add(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    a, b = args
    if kwargs or not (isinstance(a, _Rows) and isinstance(b, _Rows) and a.shape == b.shape):
        return None
    return _Rows(a.shape, a.window, _sum(a.dense, b.dense), _sum(a.scale, b.scale))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _product(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    rows, weight = args
    return None if isinstance(weight, _Rows) else _through(rows, weight)


def _product_with_vector(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    matrix, rows = args
    return None if isinstance(matrix, _Rows) else _through(rows, matrix.mT)


def _through(rows: _Rows, weight: Tensor) -> _Rows:
    """All cotangents times a matrix (*shape[-1:], columns)."""
    dense = None if rows.dense is None else rows.dense @ weight
    if rows.scale is not None:
        scale, own = rows.own(rows.scale).unsqueeze(-1), rows.own(weight.mT).mT
        dense = scale * own if dense is None else torch.addcmul(dense, scale, own)
    return _Rows((*rows.shape[:-1], weight.shape[-1]), rows.window, dense, None)


def _view(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    rows, shape = args
    if not shape or not rows.ndim or shape[-1] != rows.shape[-1]:
        return None

    def view(part: Tensor | None, event: tuple[int, ...]) -> Tensor | None:
        if part is None:
            return None
        shared = part.shape[: part.ndim - len(event)].numel() == 1
        batch = (1,) * (len(shape) - 1) if shared else shape[:-1]
        return (part if shared else part.expand(*rows.shape[:-1], *event)).reshape(*batch, *event)

    event = rows.shape[-1:]
    return _Rows(shape, rows.window, view(rows.dense, (rows.window[1] - rows.window[0], *event)), view(rows.scale, event))


# Fewer rows are faster one by one; measured with couplings, sums and permutations of samples of 8, 32 and 64 numbers.
_WORTH_MIXING = 16


# With the rows as first dim, before all that an operation knows of, its dims and sizes are those of one row, shifted by one.
def _mixed(func: Any, args: Any, kwargs: Any) -> Any:
    """All rows, as one tensor with one more dim, through an operation that does the same to each."""
    tensors = [t for t in _torch.tree_leaves(args) if isinstance(t, Tensor)]
    first = next(t for t in tensors if isinstance(t, _Rows))
    count = first.window[1] - first.window[0]
    if count < _WORTH_MIXING or not first.ndim or any(t.ndim > first.ndim for t in tensors):
        return None
    if func not in _BROADCASTING and not all(isinstance(t, _Rows) for t in tensors):
        return None
    shifted = _shifted(func, list(args), first.ndim, count)
    if shifted is None:
        return None
    stacked = _torch.tree_map(lambda t: t.stacked(first.ndim) if isinstance(t, _Rows) else t, shifted)
    found = _SAME_WITH_MORE_DIMS.get(func, func)(*stacked, **kwargs)
    results = [_Rows(t.shape[1:], first.window, t.movedim(0, -2), None) for t in _torch.tree_leaves(found) if t.ndim > 1]
    return None if not results else results if isinstance(found, (tuple, list)) else results[0]


def _shifted(func: Any, args: list[Any], ndim: int, rows: int) -> list[Any] | None:
    """The arguments of an operation on one row as those for all."""
    dims, sizes = _MIXING[func]
    if func is _aten.transpose.int:
        return [args[0], *(d % ndim + 1 for d in args[1:])]
    if sizes is not None:
        ndim = len(args[sizes]) if dims is not None else ndim
        if func is _aten.expand.default and len(args[sizes]) != ndim:
            return None
        args[sizes] = [rows, *args[sizes]]
    if dims is None:
        return args
    if dims == len(args) and func in _OF_DIM_ZERO:
        args.append(0)
    named = args[dims] if dims < len(args) else None
    if named is None or named == []:
        return None
    ndim += func is _aten.unsqueeze.default
    args[dims] = [d % ndim + 1 for d in named] if isinstance(named, (list, tuple)) else named % ndim + 1
    if func is _aten.permute.default:
        args[dims] = [0, *args[dims]]
    return args


def _unsqueezed(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    rows, dim = args
    place = dim % (rows.ndim + 1)
    return _view(func, (rows, (*rows.shape[:place], 1, *rows.shape[place:])), kwargs) if place < rows.ndim else None


def _squeezed(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    rows, dims = args
    gone = {d % rows.ndim for d in (dims if isinstance(dims, list | tuple) else [dims]) if rows.shape[d] == 1}
    shape = tuple(size for i, size in enumerate(rows.shape) if i not in gone)
    return None if rows.ndim - 1 in gone else _view(func, (rows, shape), kwargs)


_Rows.rules = dict.fromkeys(ELEMENTWISE, _elementwise) | {
    _aten.add.Tensor: _add,
    _aten.mm.default: _product,
    _aten.mv.default: _product_with_vector,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.unsqueeze.default: _unsqueezed,
    _aten.squeeze.dim: _squeezed,
    _aten.squeeze.dims: _squeezed,
}
