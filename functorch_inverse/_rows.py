r"""All rows of a Jacobian by one backward pass, as cheap as its formula where f is made of layers.

Row r of A is the cotangent e_r pulled back through the graph of f. All rows travel together, as

    T[b, r, j] = D[b, r, j] c[b, j] + delta_rj d[b, j],

a dense part and a diagonal one, each of which may be the same for all samples; there is a c only where D is. The unit
vectors are diagonal at first, and stay so through whatever acts elementwise; at a linear layer W, the diagonal d
becomes d_r W[r, j], where a matrix product of all rows with W would cost n times as much. That D is the same for all
samples at first, and what acts elementwise changes c alone; so two layers V and W with an activation in between are

    T[b, r, j] = sum_k c[b, k] (V[r, k] W[k, j]),

one product of matrices with the samples as rows. What mixes the numbers of a sample in another way is done to all rows as
a tensor with one more dim.
"""

from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._mixing import BROADCASTING, MIXING, SAME_WITH_MORE_DIMS, with_rows
from functorch_inverse._singular import has_to_wait
from functorch_inverse._stand_in import DIVISIONS, ELEMENTWISE, StandIn

__all__ = ["jacobian_of_graph"]

_aten = torch.ops.aten


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
    (found,) = _torch.graph_grad((output,), (y,), (_Rows(output.shape, (start, stop), None, None, unit),))
    if not isinstance(found, _Rows):
        raise NotImplementedError("rows of a Jacobian through something that lost them")
    return found.matrix()


class _Rows(StandIn):
    """Cotangents for the rows of a window (start, stop); torch sees the shape of one.

    `dense` has the shape (*batch, rows, columns), `factor` and `scale` (*batch, columns), where batch dims may be 1; those of
    a dense part with a factor are.
    """

    window: tuple[int, int]
    dense: Tensor | None
    factor: Tensor | None
    scale: Tensor | None

    @staticmethod
    def __new__(
        cls: Any, shape: Any, window: tuple[int, int], dense: Tensor | None, factor: Tensor | None, scale: Tensor | None
    ) -> "_Rows":
        like = scale if dense is None else dense
        assert like is not None
        self = _torch.wrapper(cls, shape, like)
        self.window, self.dense, self.factor, self.scale = window, dense, factor, scale
        return self

    @classmethod
    def otherwise(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """All rows as one tensor."""
        return _mixed(func, args, kwargs) if func in MIXING else None

    def own(self, numbers: Tensor) -> Tensor:
        """Of one number for each row of the Jacobian, along the last dim, those of these rows."""
        start, stop = self.window
        return numbers if stop - start == numbers.shape[-1] else numbers[..., start:stop]

    def multiplied(self) -> Tensor | None:
        """The dense part with its factor."""
        return self.dense if self.dense is None or self.factor is None else self.dense * self.factor.unsqueeze(-2)

    def stacked(self, ndim: int) -> Tensor:
        """These rows as one tensor, (rows, 1..., *shape) with so many dims behind the first."""
        rows = self.matrix(spent=False).movedim(-2, 0)
        return rows.reshape(len(rows), *(1,) * (ndim - self.ndim), *self.shape)

    def matrix(self, *, spent: bool = True) -> Tensor:
        """These rows, (*shape[:-1], rows, shape[-1]); of `spent` ones nobody else will read the memory."""
        start, stop = self.window
        full, dense = (*self.shape[:-1], stop - start, self.shape[-1]), self.multiplied()
        if dense is None:
            assert self.scale is not None
            total = self.scale.new_zeros(full)
        else:
            if not spent and self.scale is None:
                return dense.expand(full)
            free = (spent or self.factor is not None) and dense.shape == full and dense.is_contiguous()
            total = dense if free else dense.expand(full).clone(memory_format=torch.contiguous_format)
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

    dense, factor, scale = rows.dense, rows.factor, apply(rows.scale, False)
    if dense is not None and _samples(dense, 2) == 1 < max([_samples(args[k], 1) for k in others], default=1):
        factor = apply(dense.new_ones((*dense.shape[:-2], shape[-1])) if factor is None else factor, False)
    else:
        dense = apply(dense, True)
    return _Rows(shape, rows.window, dense, factor, scale)


def _samples(tensor: Tensor, event_dim: int) -> int:
    return tensor.shape[: tensor.ndim - event_dim].numel()


def _add(func: Any, args: Any, kwargs: Any) -> _Rows | None:
    a, b = args
    if kwargs or not (isinstance(a, _Rows) and isinstance(b, _Rows) and a.shape == b.shape):
        return None
    both = a.dense is not None and b.dense is not None
    dense, factor = (_sum(a.multiplied(), b.multiplied()), None) if both else (_sum(a.dense, b.dense), _sum(a.factor, b.factor))
    return _Rows(a.shape, a.window, dense, factor, _sum(a.scale, b.scale))


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
    dense = None if rows.dense is None else _dense_through(rows.dense, rows.factor, weight)
    if rows.scale is not None:
        scale, own = rows.own(rows.scale), rows.own(weight.mT).mT
        if len(own) <= _FEW_ROWS and _samples(scale, 1) >= _MANY_SAMPLES and _multiplies_exactly(scale):
            spread = torch.diag_embed(own.mT, dim1=0, dim2=1)  # delta_rs W[r, j]
            dense = _sum(dense, _combined(scale, spread))
        else:
            scale = scale.unsqueeze(-1)
            dense = scale * own if dense is None else torch.addcmul(dense, scale, own)
    return _Rows((*rows.shape[:-1], weight.shape[-1]), rows.window, dense, None, None)


def _dense_through(dense: Tensor, factor: Tensor | None, weight: Tensor) -> Tensor:
    if factor is None:
        return dense @ weight
    # What is the same for all samples would take more memory than A itself; or be rounded to nothing, or to infinity,
    # which nobody waits to find out.
    if _samples(factor, 1) < 2 * len(weight) or has_to_wait(factor) or not _moderate(dense, weight):
        return (dense * factor.unsqueeze(-2)) @ weight
    return _combined(factor, dense.flatten(0, -2).mT.unsqueeze(-1) * weight.unsqueeze(-2))


def _moderate(*matrices: Tensor) -> bool:
    """Whether products of all their numbers keep their precision."""
    sizes = torch.cat([t.flatten() for t in matrices]).abs()
    most = torch.finfo(sizes.dtype).tiny ** -0.25
    return not ((sizes > most) | ((sizes < 1 / most) & (sizes > 0))).any()


def _combined(numbers: Tensor, matrices: Tensor) -> Tensor:
    """For each sample another sum of the same matrices (k, rows, columns), by its numbers (*batch, k)."""
    return (numbers @ matrices.flatten(1)).unflatten(-1, matrices.shape[1:])


def _multiplies_exactly(like: Tensor) -> bool:
    """Whether products of matrices are as precise as those of numbers, which are fast enough on other devices."""
    return like.is_cpu and (like.dtype is torch.float64 or torch.get_float32_matmul_precision() == "highest")


# For so few rows of so many samples a product with matrices of zeros is faster than one element by element along a short dim.
_FEW_ROWS, _MANY_SAMPLES = 4, 512


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
    dense = view(rows.dense, (rows.window[1] - rows.window[0], *event))
    return _Rows(shape, rows.window, dense, view(rows.factor, event), view(rows.scale, event))


# Fewer rows are faster one by one; measured with couplings, sums and permutations of samples of 8, 32 and 64 numbers.
_WORTH_MIXING = 16


def _mixed(func: Any, args: Any, kwargs: Any) -> Any:
    """All rows, as one tensor with one more dim, through an operation that does the same to each."""
    tensors = [t for t in _torch.tree_leaves(args) if isinstance(t, Tensor)]
    first = next(t for t in tensors if isinstance(t, _Rows))
    count = first.window[1] - first.window[0]
    if count < _WORTH_MIXING or not first.ndim or any(t.ndim > first.ndim for t in tensors):
        return None
    if func not in BROADCASTING and not all(isinstance(t, _Rows) for t in tensors):
        return None
    shifted = with_rows(func, list(args), first.ndim, count)
    if shifted is None:
        return None
    stacked = _torch.tree_map(lambda t: t.stacked(first.ndim) if isinstance(t, _Rows) else t, shifted)
    found = SAME_WITH_MORE_DIMS.get(func, func)(*stacked, **kwargs)
    results = [_Rows(t.shape[1:], first.window, t.movedim(0, -2), None, None) for t in _torch.tree_leaves(found) if t.ndim > 1]
    return None if not results else results if isinstance(found, (tuple, list)) else results[0]


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
