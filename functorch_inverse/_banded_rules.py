"""The derivatives of banded solves and determinants, and which banded matrices have no inverse."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from functorch_inverse import _lapack, _torch
from functorch_inverse._bands import Width, outer, product, transposed
from functorch_inverse._cyclic import dominant_solve
from functorch_inverse._legacy import through_vmap
from functorch_inverse._preconditioner import probes
from functorch_inverse._reduction import reduced_log_abs_det, reduced_solve
from functorch_inverse._singular import has_to_wait, raise_if_singular

__all__ = ["LogAbsDet", "Solve", "clearly_dominant", "equilibrating", "factorise", "scaling"]


# The factors are three tensors: LAPACK's factors and pivots, or the bands and no pivots; and a taint, which is nan where
# the sample has no inverse and 0 elsewhere. Such samples are factorised as I, so that nothing of them can reach others.
# Where all samples are tridiagonal and dominant there are no factors, lu.shape[0] == 0: from the bands a system is solved
# almost as fast as from factors, and to make these costs as much again.
def factorise(bands: Tensor, width: Width, on_singular: str, clear: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(factors, pivots, taint), constants of every transform; `clear`: it is known that no sample is singular."""
    # Without a transform, apply would only cost time.
    call = _Factorise.apply if _torch.transforms_active() else _Factorise.forward
    return call(bands.detach(), width, on_singular, clear)


def equilibrating(bands: Tensor, width: Width) -> tuple[Tensor, Tensor] | None:
    """Powers of two, for rows and columns, that make the largest number of each about one; None where that is no matter.

    Columns come first, whose sizes tell below how near a matrix is to a singular one, unless rows leave less far from one.
    """
    sizes = bands.abs()
    if _torch.can_inspect(bands) and not sizes.amax() > _MIXED * torch.where(sizes > 0, sizes, torch.inf).amin():
        return None
    swapped = transposed(sizes, width)
    late, early = _balanced(swapped, sizes, width.swapped)[::-1], _balanced(sizes, swapped, width)
    usual = _spread(sizes, *late, width) <= _spread(sizes, *early, width)
    return torch.where(usual, late[0], early[0]), torch.where(usual, late[1], early[1])


# How far the sizes of numbers may be apart.
_MIXED = 1e3


def _balanced(sizes: Tensor, swapped: Tensor, width: Width) -> tuple[Tensor, Tensor]:
    """Factors for the rows, and then for the columns."""
    rows = _power_of_two(swapped.amax(-2))
    return rows, _power_of_two((sizes * scaling(rows, torch.ones_like(rows), width)).amax(-2))


def _power_of_two(sizes: Tensor) -> Tensor:
    """The inverse of a size, and one for those that have none."""
    known = torch.where((sizes > 0) & sizes.isfinite(), sizes, 1).clamp(min=4 * torch.finfo(sizes.dtype).tiny)
    return torch.exp2(-known.log2().round())


def _spread(sizes: Tensor, rows: Tensor, columns: Tensor, width: Width) -> Tensor:
    """How many powers of two all numbers are away from one, but for a few, shape (*batch, 1)."""
    scaled = sizes * scaling(rows, columns, width)
    away = torch.where((scaled > 0) & scaled.isfinite(), scaled.log2().abs() - 8, 0)
    return away.clamp(min=0).sum((-2, -1)).unsqueeze(-1)


def scaling(rows: Tensor, columns: Tensor, width: Width) -> Tensor:
    """The bands of r c^T."""
    return outer(rows.unsqueeze(-2), columns.unsqueeze(-2), width)


class _Factorise(Function):
    """bands -> (factors, pivots, taint), without derivative: the others differentiate with respect to the bands."""

    @staticmethod
    def forward(bands: Tensor, width: Width, on_singular: str, clear: bool) -> tuple[Tensor, Tensor, Tensor]:
        visible = _torch.can_inspect(bands)
        clear = clear or clearly_dominant(bands, width)
        dominant = None if clear else _dominant(bands, width)
        if dominant is None or (visible and dominant.all()):  # and so finite
            make = _unfactorised if max(width) <= 1 else _factorised
            return *make(bands, width), bands.real.new_zeros(bands.shape[:-2])
        bad = _undefined(bands)
        safe = _without(bands, bad, width) if not visible or bad.any() else bands
        lu, pivots = _factorised(safe, width)
        singular = ~(dominant | bad) & _singular(safe, lu, pivots, width)
        if visible and on_singular == "raise":
            raise_if_singular(singular, "Banded(lower, upper, on_singular='nan')")
        if not visible or singular.any():
            lu, pivots = _factorised(_without(safe, singular, width), width)
        return lu, pivots, _taint(bad | singular, bands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], bands: Tensor, *how: Any) -> tuple[Any, Any]:
        return _Factorise.apply(bands.movedim(in_dims[0], 0), *how), (1, 0, 0)


def _factorised(bands: Tensor, width: Width) -> tuple[Tensor, Tensor]:
    if _lapack.available(bands):
        return _lapack.factorise(bands, width)
    return bands.unsqueeze(0).clone(), bands.new_zeros(*bands.shape[:-2], 0, dtype=torch.int32)


def _unfactorised(bands: Tensor, width: Width) -> tuple[Tensor, Tensor]:
    batch = bands.shape[:-2]
    return bands.new_empty(0, *batch, 0), bands.new_empty(*batch, 0, dtype=torch.int32)


def _solved(bands: Tensor, lu: Tensor, pivots: Tensor, b: Tensor, width: Width, transpose: bool) -> Tensor:
    """X from the factors; the bands are read where there are none."""
    if not lu.shape[0]:
        return dominant_solve(bands, width, b, transpose)
    if pivots.shape[-1]:
        return _lapack.solve(lu, pivots, b, width, transpose)
    return reduced_solve(lu[0], width, b, transpose)


def _undefined(bands: Tensor) -> Tensor:
    """Which samples have nan or inf; one sum tells that nobody has."""
    if _torch.can_inspect(bands) and bands.sum().isfinite():
        return torch.zeros(bands.shape[:-2], dtype=torch.bool, device=bands.device)
    return ~bands.isfinite().flatten(-2).all(-1)


def _without(bands: Tensor, bad: Tensor, width: Width) -> Tensor:
    """I in the place of some samples."""
    unit = torch.zeros_like(bands)
    unit[..., width.upper, :] = 1
    return torch.where(bad[..., None, None], unit, bands)


def _taint(bad: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(bad, dtype=like.real.dtype).masked_fill(bad, torch.nan)


# With A = (I - N) D, D the diagonal, A + E is invertible for all |E| <= c eps |A| where the columns of |N| + c eps |A/D|
# sum up to less than one. Else: the computed factors belong to such an A + E, so A cannot be told from a singular
# matrix unless c eps | W^-1 A^-1 |A| W | < 1 for some W > 0. The norm is found by solving for |A| w under a pattern, for
# w the inverse column sizes of A; where it is not small, under another pattern too, and for the inverse column sizes of
# A with rows of size one: then scaling columns or rows changes nothing. The reduction rounds on each of its levels.
def _rounding(n: int, width: Width, like: Tensor, levels: bool) -> float:
    return 4 * width.diagonals * torch.finfo(like.dtype).eps * (math.ceil(math.log2(n + 1)) if levels else 1)


def clearly_dominant(bands: Tensor, width: Width) -> bool:
    """Whether no sample is singular by the smallest number of all their diagonals, and the largest of the others."""
    if not _torch.can_inspect(bands) or bands.is_complex() or has_to_wait(bands) or not bands.numel():
        return False
    count = width.diagonals
    lows, highs = [each(-1).reshape(-1, count) for each in (bands.amin, bands.amax)]
    low, high = lows.amin(0).tolist(), highs.amax(0).tolist()
    sizes = list(map(max, high, [-t for t in low]))  # nan where there is any
    least = max(low[width.upper], -high[width.upper])  # of the diagonal; negative where it has both signs
    largest = sizes.pop(width.upper)
    return least * (1 - _rounding(bands.shape[-1], width, bands, True)) > sum(sizes) and largest < math.inf


def _dominant(bands: Tensor, width: Width) -> Tensor:
    """Which samples are certainly not singular, from the size of their diagonals alone."""
    sizes = bands.abs().unbind(-2)
    margin = sizes[width.upper] * (1 - _rounding(bands.shape[-1], width, bands, True))
    for size in (*sizes[: width.upper], *sizes[width.upper + 1 :]):
        margin -= size
    margin /= sizes[width.upper]
    return margin.amin(-1) > 0  # nan where the diagonal is infinite


def _singular(bands: Tensor, lu: Tensor, pivots: Tensor, width: Width) -> Tensor:
    """Which samples are singular up to the rounding error of their own factorisation."""
    sizes, patterns = bands.abs(), probes(bands.real[..., 0, :])
    columns = sizes.amax(-2)
    clear = _hidden(sizes, columns, patterns[:1], lu, pivots, width) < 1e-4
    if _torch.can_inspect(bands) and clear.all():
        return ~clear
    weights = _reciprocal(transposed(sizes, width).amax(-2))
    equilibrated = (sizes * outer(weights, torch.ones_like(weights), width)).amax(-2)
    either = [_hidden(sizes, size, patterns, lu, pivots, width) < 1 for size in (columns, equilibrated)]
    return ~(either[0] | either[1])


def _hidden(sizes: Tensor, columns: Tensor, patterns: tuple[Tensor, ...], lu: Tensor, pivots: Tensor, width: Width) -> Tensor:
    """c eps | W^-1 A^-1 |A| W | for W^-1 = columns."""
    weights = _reciprocal(columns)
    b = product(sizes, width, weights, False) * torch.stack(patterns, -2)
    found = (_solved(lu[0], lu, pivots, b.to(lu.dtype), width, False) / weights).abs().flatten(-2).amax(-1)
    return _rounding(columns.shape[-1], width, columns, not pivots.shape[-1]) * found


def _reciprocal(sizes: Tensor) -> Tensor:
    """Finite, and as one row."""
    return sizes.clamp(min=4 * torch.finfo(sizes.dtype).tiny).reciprocal().unsqueeze(-2)


# Right-hand sides and solutions are rows here, so that all loops run along n. As columns:
# A X = b:    A dX = db - dA X       =>  reverse:  gb = A^-H g,   gA = -gb X^H, of which the bands take their part
# A^T X = b:  A^T dX = db - dA^T X   =>  reverse:  gb = conj(A^-1) g,   gA = -conj(X) gb^T
class Solve(Function):
    """X with A X = b (or A^T X = b) from the factors of A; b has the shape (*batch, k, n)."""

    @staticmethod
    def forward(bands: Tensor, lu: Tensor, pivots: Tensor, taint: Tensor, b: Tensor, width: Width, transpose: bool) -> Tensor:
        x = _solved(bands.detach(), lu, pivots, b, width, transpose)
        return x + taint[..., None, None] if lu.shape[0] else x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *factors, _, ctx.width, ctx.transpose = inputs
        ctx.save_for_backward(*factors, output)
        ctx.save_for_forward(*factors, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @through_vmap
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        *factors, x = ctx.saved_tensors
        gb = Solve.apply(*factors, g.conj(), ctx.width, not ctx.transpose).conj()
        ga = None
        if ctx.needs_input_grad[0]:
            ga = -(outer(x.conj(), gb, ctx.width) if ctx.transpose else outer(gb, x.conj(), ctx.width))
        return ga, None, None, None, gb, None, None

    @staticmethod
    @through_vmap
    def jvp(ctx: Any, da: Tensor | None, _lu: None, _p: None, _t: None, db: Tensor | None, *_: None) -> Tensor | None:
        with _torch.forward_mode_again():
            *factors, x = [_torch.primal(t) for t in ctx.saved_tensors]
            assert x is not None
            da, db = _torch.primal(da), _torch.primal(db)
            if da is not None:
                moved = product(da, ctx.width, x, ctx.transpose)
                db = -moved if db is None else db - moved
            return None if db is None else Solve.apply(*factors, db, ctx.width, ctx.transpose)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        *factors, b, width, transpose = args
        if all(d is None for d in in_dims[:4]):
            columns = b.movedim(in_dims[4], -2)
            x = Solve.apply(*factors, columns.flatten(-3, -2), width, transpose)
            return x.unflatten(-2, columns.shape[-3:-1]), columns.ndim - 2
        moved = _in_front(info.batch_size, in_dims, (0, 1, 0, 0, 0), (*factors, b))
        return Solve.apply(*moved, width, transpose), 0


# d log|det A| = Re tr(A^-1 dA): the gradient is the in-band part of A^-H, which the adjoint of the cyclic reduction finds
# in O(n) from the eliminated unknowns, for each sample by itself and to any order.
class LogAbsDet(Function):
    """log|det A| from the factors of A, shape (*batch)."""

    @staticmethod
    def forward(bands: Tensor, lu: Tensor, pivots: Tensor, taint: Tensor, width: Width) -> Tensor:
        if not lu.shape[0]:
            lu, pivots = _factorised(bands.detach(), width)
        return (_lapack.log_abs_det(lu, width) if pivots.shape[-1] else reduced_log_abs_det(lu[0], width)) + taint

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        bands, _, _, taint, ctx.width = inputs
        ctx.save_for_backward(bands, taint)
        ctx.save_for_forward(bands, taint)

    @staticmethod
    @through_vmap
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        bands, taint = ctx.saved_tensors
        return g[..., None, None] * _gradient(bands, taint, ctx.width), None, None, None, None

    @staticmethod
    @through_vmap
    def jvp(ctx: Any, da: Tensor, *_: None) -> Tensor:
        with _torch.forward_mode_again():
            bands, taint = [_torch.primal(t) for t in ctx.saved_tensors]
            da = _torch.primal(da)  # type: ignore[assignment]
            return (_gradient(bands, taint, ctx.width).conj() * da).real.sum((-2, -1))  # type: ignore[arg-type]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        *factors, width = args
        return LogAbsDet.apply(*_in_front(info.batch_size, in_dims, (0, 1, 0, 0), factors), width), 0


def _gradient(bands: Tensor, taint: Tensor, width: Width) -> Tensor:
    """The in-band part of A^-H, nan where A has no inverse."""
    value, pull = torch.func.vjp(lambda t: reduced_log_abs_det(t, width), bands)
    return pull(torch.ones_like(value))[0] + taint[..., None, None]


def _in_front(size: int, dims: tuple[Any, ...], places: tuple[int, ...], tensors: Any) -> list[Tensor]:
    """The mapped dim of each tensor at its place; tensors without it are expanded."""
    batch = zip(tensors, dims, places, strict=False)
    return [t.unsqueeze(p).expand(*t.shape[:p], size, *t.shape[p:]) if d is None else t.movedim(d, p) for t, d, p in batch]
