r"""Banded matrices in compressed form: bands[..., upper + i - j, j] = A[i, j], everything else is zero.

All of it is plain differentiable torch, linear in the bands and in the vectors; x has the shape (*batch, n, k).
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Width", "inside", "outer", "product", "transposed", "trimmed"]


class Width(NamedTuple):
    """How many diagonals stand below and above the main one."""

    lower: int
    upper: int

    @property
    def diagonals(self) -> int:
        return self.lower + self.upper + 1

    @property
    def swapped(self) -> "Width":
        """Those of A^T."""
        return Width(self.upper, self.lower)


def trimmed(bands: Tensor, width: Width) -> tuple[Tensor, Width]:
    """Without the diagonals that lie outside the matrix."""
    last = max(bands.shape[-1] - 1, 0)
    kept = Width(min(width.lower, last), min(width.upper, last))
    first = width.upper - kept.upper
    return bands[..., first : first + kept.diagonals, :], kept


def inside(bands: Tensor, width: Width) -> Tensor:
    """The bands with zeros at the places that are no entries of A."""
    n = bands.shape[-1]
    j = torch.arange(n, device=bands.device)
    i = j + torch.arange(-width.upper, width.lower + 1, device=bands.device).unsqueeze(-1)
    return torch.where((i >= 0) & (i < n), bands, 0)


def _shifted(x: Tensor, by: int, dim: int) -> Tensor:
    """y[i] = x[i + by], zero where that does not exist."""
    if not by:
        return x
    n = x.shape[dim]
    kept = x.narrow(dim, max(by, 0), n - abs(by))
    zeros = torch.zeros_like(x.narrow(dim, 0, abs(by)))
    return torch.cat([kept, zeros] if by > 0 else [zeros, kept], dim)


def _offsets(width: Width) -> range:
    """i - j for each row of the bands."""
    return range(-width.upper, width.lower + 1)


def product(bands: Tensor, width: Width, x: Tensor, transpose: bool) -> Tensor:
    """A x, or A^T x."""
    total = torch.zeros_like(x)
    for diagonal, offset in zip(bands.unbind(-2), _offsets(width), strict=True):
        values = diagonal.unsqueeze(-1)
        total = total + (values * _shifted(x, offset, -2) if transpose else _shifted(values * x, -offset, -2))
    return total


def outer(u: Tensor, v: Tensor, width: Width) -> Tensor:
    """The bands of u v^T."""
    return torch.stack([(_shifted(u, offset, -2) * v).sum(-1) for offset in _offsets(width)], -2)


def transposed(bands: Tensor, width: Width) -> Tensor:
    """The bands of A^T, whose width is `width.swapped`."""
    reversed_rows = bands.flip(-2).unbind(-2)
    moved = [_shifted(row, offset, -1) for row, offset in zip(reversed_rows, _offsets(width.swapped), strict=True)]
    return torch.stack(moved, -2)
