r"""All rows of a Jacobian by one backward pass, as cheap as its formula where f is made of layers.

Row r of A is the cotangent e_r pulled back through the graph of f. All rows travel together, as

    T[b, r, j] = D[b, r, j] + delta_rj d[b, j],

a dense part and a diagonal one, each of which may be the same for all samples. The unit vectors are diagonal
at first, and stay so through whatever acts elementwise; at a linear layer W, the diagonal d becomes d_r W[r, j],
where a matrix product of all rows with W would cost n times as much.
"""

from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch

__all__ = ["jacobian_of_graph"]

_aten = torch.ops.aten
# Linear in one argument, element by element.
_ELEMENTWISE = {
    _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar, _aten.neg.default, _aten.detach.default,
    _aten.alias.default, _aten.clone.default, _aten.tanh_backward.default, _aten.sigmoid_backward.default,
    _aten.threshold_backward.default, _aten.gelu_backward.default, _aten.silu_backward.default,
    _aten.softplus_backward.default, _aten.elu_backward.default, _aten.leaky_relu_backward.default,
}  # fmt: skip
_DIVISIONS = (_aten.div.Tensor, _aten.div.Scalar)


def jacobian_of_graph(output: Tensor, y: Tensor) -> Tensor | None:
    """A of shape (*batch, rows, columns) from the graph of output (*batch, rows) = f(y), y of shape (*batch, columns).

    None where the graph has an operation without a rule here.
    """
    unit = output.new_ones((*(1,) * (output.ndim - 1), output.shape[-1]))
    try:
        (rows,) = _torch.graph_grad((output,), (y,), (_Rows(output.shape, output.shape[-1], None, unit),))
    except NotImplementedError:
        return None
    return rows.matrix() if isinstance(rows, _Rows) else None


class _Rows(Tensor):
    """Cotangents for all rows; torch sees the shape of one.

    `dense` has the shape (*batch, rows, columns), `scale` (*batch, columns), where batch dims may be 1.
    """

    rows: int
    dense: Tensor | None
    scale: Tensor | None
    __torch_function__ = _torch.no_torch_function

    @staticmethod
    def __new__(cls: Any, shape: Any, rows: int, dense: Tensor | None, scale: Tensor | None) -> "_Rows":
        like = scale if dense is None else dense
        assert like is not None
        self = _torch.wrapper(cls, shape, like)
        self.rows, self.dense, self.scale = rows, dense, scale
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        rule = _RULES.get(func)
        found = rule(func, args, kwargs or {}) if rule else None
        if found is None:
            raise NotImplementedError(f"no rule for rows of a Jacobian through {func}")
        return found

    def matrix(self) -> Tensor:
        """All rows, (*shape[:-1], rows, shape[-1])."""
        full = (*self.shape[:-1], self.rows, self.shape[-1])
        if self.scale is None:
            assert self.dense is not None
            return self.dense.expand(full)
        total = self.scale.new_zeros(full) if self.dense is None else self.dense.expand(full).clone()
        total.diagonal(dim1=-2, dim2=-1).add_(self.scale)
        return total


def _elementwise(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    places = [i for i, arg in enumerate(args) if isinstance(arg, _Rows)]
    others = [arg for arg in args if isinstance(arg, Tensor) and not isinstance(arg, _Rows)]
    if len(places) != 1 or (func in _DIVISIONS and places != [0]):
        return None
    (i,), rows = places, args[places[0]]
    shape = torch.broadcast_shapes(rows.shape, *(t.shape for t in others))
    if len(shape) != rows.ndim or shape[-1] != rows.shape[-1] or not rows.ndim:
        return None

    def apply(part: Tensor | None, lift: bool) -> Tensor | None:
        if part is None:
            return None
        lifted = [t.unsqueeze(-2) if lift and isinstance(t, Tensor) and t.ndim and t is not rows else t for t in args]
        lifted[i] = part
        return func(*lifted, **kwargs)

    return _Rows(shape, rows.rows, apply(rows.dense, True), apply(rows.scale, False))


def _add(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    a, b = args
    if kwargs or not (isinstance(a, _Rows) and isinstance(b, _Rows) and a.shape == b.shape):
        return None
    return _Rows(a.shape, a.rows, _sum(a.dense, b.dense), _sum(a.scale, b.scale))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _product(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    rows, weight = args
    if isinstance(weight, _Rows):
        return None
    dense = None if rows.dense is None else rows.dense @ weight
    scaled = None if rows.scale is None else rows.scale.unsqueeze(-1) * weight
    return _Rows((len(rows), weight.shape[-1]), rows.rows, _sum(dense, scaled), None)


def _product_with_vector(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    matrix, rows = args
    if isinstance(matrix, _Rows):
        return None
    dense = None if rows.dense is None else rows.dense @ matrix.mT
    scaled = None if rows.scale is None else rows.scale.unsqueeze(-1) * matrix.mT
    return _Rows((len(matrix),), rows.rows, _sum(dense, scaled), None)


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
    return _Rows(shape, rows.rows, view(rows.dense, (rows.rows, *event)), view(rows.scale, event))


def _unsqueezed(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    rows, dim = args
    place = dim % (rows.ndim + 1)
    return _view(func, (rows, (*rows.shape[:place], 1, *rows.shape[place:])), kwargs) if place < rows.ndim else None


def _squeezed(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    rows, dims = args
    gone = {d % rows.ndim for d in (dims if isinstance(dims, list | tuple) else [dims]) if rows.shape[d] == 1}
    shape = tuple(size for i, size in enumerate(rows.shape) if i not in gone)
    return None if rows.ndim - 1 in gone else _view(func, (rows, shape), kwargs)


_RULES = dict.fromkeys(_ELEMENTWISE, _elementwise) | {
    _aten.add.Tensor: _add,
    _aten.mm.default: _product,
    _aten.mv.default: _product_with_vector,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.unsqueeze.default: _unsqueezed,
    _aten.squeeze.dim: _squeezed,
    _aten.squeeze.dims: _squeezed,
}
