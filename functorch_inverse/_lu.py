"""LU factors, in the memory of the matrix where nobody else needs it."""

import torch
from torch import Tensor

from functorch_inverse._singular import column_sizes

__all__ = ["lu_of"]

# Fresh memory costs as much as a good part of the factorisation; of a small matrix, a copy costs nothing. Of a few in double
# precision neither, and it spares the sizes of the columns: in single precision most factors have to be compared with those.
_WORTH_OVERWRITING, _MANY_NUMBERS = 16, 2**16


def lu_of(columns: Tensor, *, owned: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(LU, pivots) of a matrix (*batch, n, n), best stored by columns; where it was overwritten, the sizes of its columns."""
    few = columns.dtype is torch.float64 and columns.numel() < _MANY_NUMBERS
    fits = columns.is_cpu and not few and columns.shape[-1] >= _WORTH_OVERWRITING and columns.mT.is_contiguous()
    if not (owned and fits):
        return *torch.linalg.lu_factor_ex(columns)[:2], None
    sizes = column_sizes(columns)
    pivots, info = (torch.empty(columns.shape[:k], dtype=torch.int32) for k in (-1, -2))
    torch.linalg.lu_factor_ex(columns, out=(columns, pivots, info))
    return columns, pivots, sizes
