r"""Banded matrices in compressed form: bands[..., upper + i - j, j] = A[i, j], everything else is zero.

All of it is plain differentiable torch, linear in the bands and in the vectors; x has the shape (*batch, k, n).
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Width", "inside", "outer", "product", "shifted", "transposed", "trimmed"]


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
    return torch.stack([_inside(row, offset) for row, offset in zip(bands.unbind(-2), _offsets(width), strict=True)], -2)


def _inside(row: Tensor, offset: int) -> Tensor:
    """0 <= i = j + offset < n."""
    kept = row[..., max(0, -offset) : row.shape[-1] - max(0, offset)]
    zeros = torch.zeros_like(row[..., : abs(offset)])
    return torch.cat([zeros, kept] if offset < 0 else [kept, zeros], -1) if offset else row


def shifted(x: Tensor, by: int) -> Tensor:
    """y[i] = x[i + by], zero where that does not exist."""
    if not by:
        return x
    kept = x[..., max(by, 0) : x.shape[-1] + min(by, 0)]
    zeros = torch.zeros_like(x[..., : abs(by)])
    return torch.cat([kept, zeros] if by > 0 else [zeros, kept], -1)


def _offsets(width: Width) -> range:
    """i - j for each row of the bands."""
    return range(-width.upper, width.lower + 1)


def product(bands: Tensor, width: Width, x: Tensor, transpose: bool) -> Tensor:
    """A x, or A^T x."""
    total = torch.zeros_like(x)
    for diagonal, offset in zip(bands.unbind(-2), _offsets(width), strict=True):
        values = diagonal.unsqueeze(-2)
        total = total + (values * shifted(x, offset) if transpose else shifted(values * x, -offset))
    return total


def outer(u: Tensor, v: Tensor, width: Width) -> Tensor:
    """The bands of u^T v, summed over the k rows."""
    return torch.stack([(shifted(u, offset) * v).sum(-2) for offset in _offsets(width)], -2)


def transposed(bands: Tensor, width: Width) -> Tensor:
    """The bands of A^T, whose width is `width.swapped`."""
    reversed_rows = bands.flip(-2).unbind(-2)
    moved = [shifted(row, offset) for row, offset in zip(reversed_rows, _offsets(width.swapped), strict=True)]
    return torch.stack(moved, -2)
