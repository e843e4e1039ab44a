r"""LAPACK's banded factorisations, through SciPy where it is installed.

Banded matrices that follow each other on a diagonal are one banded matrix: a batch is factorised by one call, and
no pivot is sought in a neighbour, where all entries are zero. Tridiagonal ones are kept as (4, *batch, n): the
multipliers, the diagonal of U and its two neighbours; others as (1, *batch, n, 2 lower + upper + 1). Pivots are counted
from their own row. Source: Golub and Van Loan, Matrix Computations, 4th edition, section 4.3.
"""

import functools
from typing import Any

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
    tridiagonal = max(width) <= 1 and bands.shape[-1] >= 3
    lu, pivots = (_tridiagonal if tridiagonal else _general)(bands, width)
    rows = torch.arange(pivots.numel(), dtype=torch.int32).view_as(pivots)
    return lu, pivots - rows


def _tridiagonal(bands: Tensor, width: Width) -> tuple[Tensor, Tensor]:
    batch, n = bands.shape[:-2], bands.shape[-1]
    rows = bands.movedim(-2, 0).reshape(width.diagonals, -1)
    lu = rows.new_zeros(4, rows.shape[-1])
    lu[1] = rows[width.upper]
    if width.lower:
        lu[0] = rows[width.upper + 1]
    if width.upper:
        lu[2, :-1] = rows[0, 1:]
    below, main, above, _ = lu.numpy()
    *results, second, pivots, _ = _routine("gttrf", bands)(below[:-1], main, above[:-1], 1, 1, 1)
    for place, result in zip((below[:-1], main, above[:-1]), results, strict=True):
        if result.ctypes.data != place.ctypes.data:
            place[...] = result
    lu[3, :-2] = torch.from_numpy(second)
    return lu.view(4, *batch, n), torch.from_numpy(pivots).view(*batch, n) - 1


def _general(bands: Tensor, width: Width) -> tuple[Tensor, Tensor]:
    batch, n = bands.shape[:-2], bands.shape[-1]
    columns = bands.mT.reshape(-1, width.diagonals)
    storage = torch.cat([columns.new_zeros(columns.shape[0], width.lower), columns], -1)
    lu, pivots, _ = _routine("gbtrf", bands)(storage.numpy().T, *width, overwrite_ab=1)
    return torch.from_numpy(lu.T).view(1, *batch, n, -1), torch.from_numpy(pivots).view(*batch, n)


def solve(lu: Tensor, pivots: Tensor, b: Tensor, width: Width, transpose: bool) -> Tensor:
    """A^-1 b, or A^-T b, for b of shape (*batch, k, n)."""
    x = _solve(lu, pivots, b, width, transpose)
    if x.sum().isfinite() or x.isfinite().all():
        return x
    # Zeros between neighbours do not stop nan and inf: whoever has any is solved alone.
    return x if x.ndim == 2 else _alone(lu, pivots, b, width, transpose, x.contiguous())


def _alone(lu: Tensor, pivots: Tensor, b: Tensor, width: Width, transpose: bool, x: Tensor) -> Tensor:
    batch = b.shape[:-2]
    lus, rows = lu.reshape(lu.shape[0], -1, *lu.shape[1 + len(batch) :]), pivots.reshape(-1, pivots.shape[-1])
    x, b = x.reshape(-1, *x.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    for i in (~x.isfinite()).flatten(1).any(-1).nonzero().flatten().tolist():
        x[i] = _solve(lus[:, i], rows[i], b[i], width, transpose)
    return x.view(*batch, *x.shape[-2:])


def _solve(lu: Tensor, pivots: Tensor, b: Tensor, width: Width, transpose: bool) -> Tensor:
    columns = b.resolve_conj().movedim(-2, 0).clone(memory_format=torch.contiguous_format).view(b.shape[-2], -1)
    right = columns.numpy().T
    rows = torch.arange(pivots.numel(), dtype=torch.int32)
    absolute = (pivots.reshape(-1) + rows).numpy()
    if lu.shape[0] == 4:
        below, main, above, second = lu.resolve_conj().reshape(4, -1).numpy()
        factors = (below[:-1], main, above[:-1], second[:-2], absolute + 1)
        x, _ = _routine("gttrs", b)(*factors, right, trans="T" if transpose else "N", overwrite_b=1)
    else:
        factors = (lu.resolve_conj().reshape(-1, lu.shape[-1]).numpy().T, *width, right, absolute)
        x, _ = _routine("gbtrs", b)(*factors, trans=int(transpose), overwrite_b=1)
    return torch.from_numpy(x.T).view(b.shape[-2], *b.shape[:-2], b.shape[-1]).movedim(0, -2)


def diagonal(lu: Tensor, width: Width) -> Tensor:
    """That of U, shape (*batch, n)."""
    return lu[1] if lu.shape[0] == 4 else lu[0, ..., width.lower + width.upper]


def log_abs_det(lu: Tensor, width: Width) -> Tensor:
    """log|det A|, shape (*batch)."""
    return diagonal(lu, width).abs().log().sum(-1)
