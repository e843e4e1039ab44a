"""Which matrices no derivative can be trusted through, decided by rounding errors; and how that is said."""

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse.errors import SingularJacobianError

__all__ = ["named", "raise_if_singular", "singular", "suspect"]


def _rounding(lu: Tensor) -> float:
    return lu.shape[-1] * torch.finfo(lu.dtype).eps


def suspect(matrix: Tensor, lu: Tensor) -> Tensor:
    """Which matrices are worth a closer look: where all pivots are of the size of their columns, nothing was lost."""
    if not lu.numel():
        return lu.new_zeros(lu.shape[:-2], dtype=torch.bool)
    pivots, needed = lu.diagonal(dim1=-2, dim2=-1).abs(), 1e4 * _rounding(lu)
    smallest, largest = (matrix if matrix.is_contiguous() else matrix.mT).aminmax()  # in the order of memory
    size = torch.maximum(largest, -smallest)  # of the largest column of all: most often that says enough
    doubtful = ~((pivots / size).prod(-1) > needed)
    if not (_torch.can_inspect(doubtful) and not doubtful.any()):
        doubtful = ~((pivots / matrix.abs().amax(-2)).prod(-1) > needed)
    return doubtful


# The computed factors are exact for some A + E with |E| <= n eps |L||U|. So A cannot be told from a singular
# matrix where n eps | A^-1 |L||U| | >= 1. The size of A^-1 |L||U| is found by one solve with signs in front of
# |L||U| w, w the inverse column sizes of A: then scaling rows or columns changes nothing.
def singular(matrix: Tensor, lu: Tensor, pivots: Tensor) -> Tensor:
    """Which matrices are singular up to the rounding error of their own factorisation."""
    n = lu.shape[-1]
    size, unit = lu.abs(), torch.eye(n, dtype=lu.dtype, device=lu.device)
    columns = matrix.abs().amax(-2).unsqueeze(-1)
    probes = ((size.tril(-1) + unit) @ (size.triu() @ columns.reciprocal())) * _signs(n, lu)
    unpermuted = torch.arange(1, n + 1, dtype=pivots.dtype, device=lu.device).expand_as(pivots)
    found = torch.linalg.lu_solve(lu, unpermuted, probes)
    return ~(_rounding(lu) * (found * columns).abs().flatten(-2).amax(-1) < 1)


def _signs(n: int, like: Tensor) -> Tensor:
    """Sign patterns (n, 4) that no structure of a matrix is likely to cancel."""
    i = torch.arange(1, n + 1, dtype=like.dtype, device=like.device)
    return torch.stack([torch.ones_like(i), torch.cos(torch.pi * i), torch.cos(i * i), torch.cos(1.7 * i * i * i)], -1).sign()


def named(samples: Tensor) -> str:
    """How many samples are marked, and the flat indices of some of them."""
    found = samples.flatten().nonzero().flatten().tolist()
    some = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
    return f"{len(found)} of {samples.numel()} samples (flat indices over all batch dims, vmapped ones outermost: {some})"


def raise_if_singular(samples: Tensor, solver: str = "LU(on_singular='nan')") -> None:
    """SingularJacobianError if a sample is marked."""
    if samples.any():
        raise SingularJacobianError(
            f"the Jacobian is singular in {named(samples)}, so g has no derivative there. Likely causes: f ignores or "
            "duplicates a part of y; g returned a point where f turns around (a fold or a boundary of its domain); "
            f"`event_dim` is too large, so that unrelated samples count as one. Pass linear_solver={solver} "
            "to get nan for these samples and right derivatives for the others."
        )
