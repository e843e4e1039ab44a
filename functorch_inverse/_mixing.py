"""Operations that mix the numbers of a sample, done to one row of a Jacobian: what they are for all rows as one tensor.

With the rows as first dim, before all that an operation knows of, its dims and sizes are those of one row, shifted by one.
"""

from typing import Any

import torch

__all__ = ["BROADCASTING", "MIXING", "SAME_WITH_MORE_DIMS", "with_rows"]

_aten = torch.ops.aten
# As in couplings, permutations and sums: where their arguments name dims, and sizes.
MIXING: dict[Any, tuple[int | None, int | None]] = {
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
BROADCASTING = {
    _aten.where.self, _aten.masked_fill.Scalar, _aten.bmm.default, _aten.add.Tensor, _aten.mul.Tensor,
}  # fmt: skip
SAME_WITH_MORE_DIMS = {
    _aten.bmm.default: torch.matmul, _aten.view.default: torch.reshape, _aten._unsafe_view.default: torch.reshape,
}  # fmt: skip


def with_rows(func: Any, args: list[Any], ndim: int, rows: int) -> list[Any] | None:
    """The arguments of an operation on one row as those for all."""
    dims, sizes = MIXING[func]
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
