"""Which matrices no derivative can be trusted through, decided by rounding errors; and how that is said."""

import math

import torch
from torch import Tensor

from functorch_inverse.errors import SingularJacobianError

__all__ = ["column_sizes", "harmless", "has_to_wait", "named", "raise_if_singular", "regular", "singular", "suspect"]


# Many rounding errors make up for each other: n eps |L||U| exaggerates |E| so much that regular float32 matrices of n = 128
# would count as singular. Of 900 000 random matrices of rank n - 1, n from 2 to 48, all have eps | A^-1 |L||U| | > 0.4.
def has_to_wait(tensor: Tensor) -> bool:
    """Whether a look at the values stops Python until a device has computed them."""
    return not tensor.is_cpu


def _rounding(lu: Tensor) -> float:
    return min(lu.shape[-1], 4) * torch.finfo(lu.dtype).eps


def _needed(lu: Tensor) -> float:
    return 1e4 * lu.shape[-1] * torch.finfo(lu.dtype).eps


def column_sizes(matrix: Tensor) -> Tensor:
    """The largest absolute value of each column, shape (*batch, n); nan and inf stay."""
    if not matrix.shape[-2]:
        return matrix.new_zeros((*matrix.shape[:-2], matrix.shape[-1]))
    return torch.maximum(matrix.amax(-2), -matrix.amin(-2))  # abs() would make another matrix


def suspect(lu: Tensor, sizes: Tensor | float) -> Tensor:
    """Which matrices are worth a closer look: where all pivots are of the size of their columns, nothing was lost.

    A pivot that has grown makes up for none that was lost.
    """
    kept = (lu.diagonal(dim1=-2, dim2=-1).abs() / sizes).clamp(max=1).prod(-1)
    return ~(kept > _needed(lu))


def harmless(matrix: Tensor, lu: Tensor) -> bool:
    """Whether none is suspect, most often by the smallest pivot and the largest number of all matrices."""
    if not lu.numel():
        return True
    least, size = (_extremes_of_few if lu.numel() <= _FEW else _extremes)(matrix, lu)
    if least > size * min(_needed(lu), 1) ** (1 / lu.shape[-1]):
        return True
    return not suspect(lu, size).any()


def regular(numbers: Tensor) -> bool:
    """Whether none of these matrices of one number is singular, or not finite."""
    if numbers.numel() <= _FEW:
        return all(0 < abs(number) < math.inf for number in numbers.flatten().tolist())
    return bool((numbers.isfinite() & (numbers != 0)).all())


# So few numbers that Python reads them faster than torch starts to look; and rows so short that a coarse bound is enough.
_FEW, _SHORT = 64, 3


def _extremes_of_few(matrix: Tensor, lu: Tensor) -> tuple[float, float]:
    factors, n = lu.flatten().tolist(), lu.shape[-1]
    least = min([abs(pivot) for first in range(0, len(factors), n * n) for pivot in factors[first : first + n * n : n + 1]])
    # |A| <= |L||U| and |L| <= 1; and what is not finite in A is not in its factors either.
    numbers, terms = (factors, n) if n <= _SHORT else (matrix.flatten().tolist(), 1)
    finite = sum(numbers) - sum(numbers) == 0  # max ignores nan
    return least, terms * max(map(abs, numbers)) if finite else math.inf


def _extremes(matrix: Tensor, lu: Tensor) -> tuple[float, float]:
    smallest, largest = (matrix if matrix.is_contiguous() else matrix.mT).aminmax()  # in the order of memory
    return lu.diagonal(dim1=-2, dim2=-1).abs().amin().item(), max(largest.item(), -smallest.item())


# The computed factors are exact for some A + E with |E| <= n eps |L||U|. So a small A cannot be told from a singular
# matrix where n eps | A^-1 |L||U| | >= 1. The size of A^-1 |L||U| is found by one solve with signs in front of
# |L||U| w, w the inverse column sizes of A: then scaling rows or columns changes nothing.
def singular(lu: Tensor, pivots: Tensor, sizes: Tensor) -> Tensor:
    """Which matrices are singular up to the rounding error of their own factorisation."""
    n, columns = lu.shape[-1], sizes.unsqueeze(-1)
    size = lu.abs()
    above = size.triu() @ columns.reciprocal()
    probes = (size.tril(-1) @ above + above) * _signs(n, lu)
    unpermuted = torch.arange(1, n + 1, dtype=pivots.dtype, device=lu.device).expand_as(pivots)
    found = torch.linalg.lu_solve(lu, unpermuted, probes)
    return ~(_rounding(lu) * (found * columns).abs().flatten(-2).amax(-1) < 1)


# Two equal columns of A cancel whatever has one size and one sign at both; so two patterns have sizes of their own everywhere,
# between a half and one.
def _signs(n: int, like: Tensor) -> Tensor:
    """Patterns (n, 4) of numbers up to one that no structure of a matrix is likely to cancel."""
    i = torch.arange(1, n + 1, dtype=like.dtype, device=like.device)
    signs = torch.stack([torch.ones_like(i), torch.cos(torch.pi * i), torch.cos(i * i), torch.cos(1.7 * i * i * i)], -1).sign()
    shares = torch.stack([0 * i, 0 * i, torch.remainder(0.6180339887 * i, 1), torch.remainder(0.4142135623 * i, 1)], -1)
    return signs * (1 - shares / 2)


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
