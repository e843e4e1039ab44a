"""Solvers that rely on a structure of A look whether it is there."""

import torch
from torch import Tensor

from functorch_inverse._singular import named
from functorch_inverse.errors import StructureError

__all__ = ["refuse_asymmetric", "refuse_full"]


def refuse_asymmetric(matrix: Tensor, finite: Tensor) -> None:
    """StructureError for samples that are not symmetric."""
    # |A_ij|^2 < A_ii A_jj where A is positive definite: so each entry is judged in its own units.
    root = matrix.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    size = torch.maximum(root.unsqueeze(-1) * root.unsqueeze(-2), torch.minimum(matrix.abs(), matrix.mT.abs()))
    gap = (matrix - matrix.mT).abs() > 1e3 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps * size
    bad = finite & gap.flatten(-2).any(-1)
    if bad.any():
        raise StructureError(
            f"Cholesky: the Jacobian is not symmetric in {named(bad)}. It is where the residual is the gradient of a "
            "function; otherwise use linear_solver=LU()."
        )


def refuse_full(bad: Tensor, lower: bool) -> None:
    """StructureError for samples with something on the other side of their triangle."""
    if bad.any():
        here, other = ("lower", "above") if lower else ("upper", "below")
        raise StructureError(
            f"Triangular: the Jacobian is not {here} triangular, there is something {other} the diagonal in {named(bad)}. "
            f"Use Triangular(lower={not lower}) if it is the other way round, or LU()."
        )
