r"""LAPACK's banded factorisations, through SciPy where it is installed.

Banded matrices that follow each other on a diagonal are one banded matrix: a batch is factorised by one call, and
no pivot is sought in a neighbour, where all entries are zero. Tridiagonal ones are kept as (4, *batch, n): the
multipliers, the diagonal of U and its two neighbours; others as (1, *batch, n, 2 lower + upper + 1). Pivots are counted
from their own row. Source: Golub and Van Loan, Matrix Computations, 4th edition, section 4.3.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._bands import Width

__all__ = ["available", "diagonal", "factorise", "log_abs_det", "solve"]


@functools.cache
def _lapack() -> Any:
    """scipy.linalg.lapack, or None."""
    try:
        from scipy.linalg import lapack  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return None
    return lapack


_PREFIXES = {torch.float32: "s", torch.float64: "d", torch.complex64: "c", torch.complex128: "z"}


def available(bands: Tensor) -> bool:
    """Whether these numbers can be given to LAPACK."""
    plain = bands.device.type == "cpu" and bands.dtype in _PREFIXES and _torch.can_inspect(bands)
    return plain and bands.numel() > 0 and _lapack() is not None


def _routine(name: str, like: Tensor) -> Any:
    return getattr(_lapack(), _PREFIXES[like.dtype] + name)


def factorise(bands: Tensor, width: Width) -> tuple[Tensor, Tensor]:
    """The factors and pivots of finite bands (*batch, count, n)."""
    return (_tridiagonal if tridiagonal(bands, width) else _general)(bands, width)


def tridiagonal(bands: Tensor, width: Width) -> bool:
    """Whether LAPACK's routines for tridiagonal matrices take these."""
    return max(width) <= 1 and bands.shape[-1] >= 3


def _places(like: Tensor, first: int) -> Tensor:
    """Where each row of a batch stands among all of them."""
    return torch.arange(first, first + like.numel(), dtype=torch.int32).view_as(like)


def _tridiagonal(bands: Tensor, width: Width) -> tuple[Tensor, Tensor]:
    batch, n = bands.shape[:-2], bands.shape[-1]
    rows = bands.movedim(-2, 0).reshape(width.diagonals, -1)
    lu = rows.new_empty(4, rows.shape[-1])
    lu[0] = rows[width.upper + 1] if width.lower else 0
    lu[1] = rows[width.upper]
    lu[2, :-1] = rows[0, 1:] if width.upper else 0
    below, main, above, _ = lu.numpy()
    *results, second, pivots, _ = _routine("gttrf", bands)(below[:-1], main, above[:-1], 1, 1, 1)
    for place, result in zip((below[:-1], main, above[:-1]), results, strict=True):
        if result.ctypes.data != place.ctypes.data:
            place[...] = result
    lu[3, :-2] = torch.from_numpy(second)
    lu[2, -1:], lu[3, -2:] = 0, 0
    pivots = torch.from_numpy(pivots).view(*batch, n)
    return lu.view(4, *batch, n), pivots.sub_(_places(pivots, 1))


def _general(bands: Tensor, width: Width) -> tuple[Tensor, Tensor]:
    batch, n = bands.shape[:-2], bands.shape[-1]
    columns = bands.mT.reshape(-1, width.diagonals)
    storage = torch.cat([columns.new_zeros(columns.shape[0], width.lower), columns], -1)
    lu, pivots, _ = _routine("gbtrf", bands)(storage.numpy().T, *width, overwrite_ab=1)
    pivots = torch.from_numpy(pivots).view(*batch, n)
    return torch.from_numpy(lu.T).view(1, *batch, n, -1), pivots.sub_(_places(pivots, 0))


def solve(lu: Tensor, pivots: Tensor, b: Tensor, width: Width, transpose: bool) -> Tensor:
    """A^-1 b, or A^-T b, for b of shape (*batch, k, n)."""
    count = b.ndim - 2
    return _confined(partial(_solve, width, transpose), b, lu.movedim(0, count), pivots)


def solve_tridiagonal(bands: Tensor, b: Tensor, width: Width, transpose: bool) -> Tensor:
    """The same from the bands themselves."""
    return _confined(partial(_solve_tridiagonal, width, transpose), b, bands)


def _confined(solve: Callable[..., Tensor], b: Tensor, *factors: Tensor) -> Tensor:
    """Zeros between neighbours do not stop nan and inf: whoever has any is solved alone."""
    x = solve(b, *factors)
    if b.ndim == 2 or x.sum().isfinite() or x.isfinite().all():
        return x
    alone = x.contiguous().flatten(0, -3)
    inputs = [t.flatten(0, b.ndim - 3) for t in (b, *factors)]
    for i in (~alone.isfinite()).flatten(1).any(-1).nonzero().flatten().tolist():
        alone[i] = solve(*(t[i] for t in inputs))
    return alone.view(x.shape)


def _solve(width: Width, transpose: bool, b: Tensor, lu: Tensor, pivots: Tensor) -> Tensor:
    lu, right = lu.movedim(b.ndim - 2, 0).resolve_conj(), _columns(b)
    absolute = (pivots + _places(pivots, 1)).flatten().numpy()
    if lu.shape[0] == 4:
        below, main, above, second = lu.reshape(4, -1).numpy()
        factors = (below[:-1], main, above[:-1], second[:-2], absolute)
        x, _ = _routine("gttrs", b)(*factors, right, trans="T" if transpose else "N")
    else:
        factors = (lu.reshape(-1, lu.shape[-1]).numpy().T, *width, right, absolute - 1)
        x, _ = _routine("gbtrs", b)(*factors, trans=int(transpose))
    return _rows(x, b)


def _solve_tridiagonal(width: Width, transpose: bool, b: Tensor, bands: Tensor) -> Tensor:
    rows = bands.resolve_conj().movedim(-2, 0).reshape(width.diagonals, -1).numpy()
    nothing = np.zeros(rows.shape[-1] - 1, rows.dtype) if min(width) == 0 else None
    above, below = rows[0, 1:] if width.upper else nothing, rows[-1, :-1] if width.lower else nothing
    outer = (above, rows[width.upper], below) if transpose else (below, rows[width.upper], above)
    *_, x, _ = _routine("gtsv", b)(*outer, _columns(b))
    return _rows(x, b)


def solve_rows(a: Tensor, d: Tensor, c: Tensor, b: Tensor) -> Tensor:
    """x with a_i x_(i-1) + d_i x_i + c_i x_(i+1) = b_i; a, d and c have the shape (*batch, 1, n), and b (*batch, k, n)."""
    return _confined(_solve_rows, b, a, d, c)


def _solve_rows(b: Tensor, a: Tensor, d: Tensor, c: Tensor) -> Tensor:
    a, c = a.clone(), c.clone()
    a[..., 0], c[..., -1] = 0, 0
    a, d, c = [t.resolve_conj().flatten() for t in (a, d, c)]
    *_, x, _ = _routine("gtsv", b)(a.numpy()[1:], d.numpy(), c.numpy()[:-1], _columns(b))
    return _rows(x, b)


def _columns(b: Tensor) -> Any:
    """The right-hand sides, as LAPACK wants them."""
    return b.detach().resolve_conj().movedim(-2, 0).reshape(b.shape[-2], -1).numpy().T


def _rows(x: Any, b: Tensor) -> Tensor:
    return torch.from_numpy(x.T).view(b.shape[-2], *b.shape[:-2], b.shape[-1]).movedim(0, -2)


def diagonal(lu: Tensor, width: Width) -> Tensor:
    """That of U, shape (*batch, n)."""
    return lu[1] if lu.shape[0] == 4 else lu[0, ..., width.lower + width.upper]


def log_abs_det(lu: Tensor, width: Width) -> Tensor:
    """log|det A|, shape (*batch)."""
    return diagonal(lu, width).abs().log().sum(-1)
