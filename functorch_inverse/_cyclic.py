r"""Dominant tridiagonal systems by cyclic reduction, as few passes of torch over vectors.

    a_i x_(i-1) + d_i x_i + c_i x_(i+1) = b_i

The unknowns of even i are eliminated at once, which leaves half as many equations of the same form. That is Gaussian
elimination in another order, so it is stable where rows or columns are dominant. What is left over goes to LAPACK, which takes
longer for each unknown and less for each system. Source: Golub and Van Loan, Matrix Computations, 4th edition, section 4.5.4.
"""

import torch
from torch import Tensor

from functorch_inverse import _lapack
from functorch_inverse._bands import Width, shifted

__all__ = ["dominant_solve"]

# Measured in benchmarks/: so many numbers LAPACK solves as fast as torch calls fourteen operations.
_FEW = 12_000


def dominant_solve(bands: Tensor, width: Width, b: Tensor, transpose: bool) -> Tensor:
    """u with A u = b, or A^T u = b, for tridiagonal A with dominant columns; b has the shape (*batch, k, n)."""
    if bands.shape[-1] >= 3 and bands[..., 0, :].numel() <= _FEW and _lapack.available(bands):
        return _lapack.solve_tridiagonal(bands, b, width, transpose)
    rows, nothing = bands.unsqueeze(-2).unbind(-3), torch.zeros_like(bands[..., :1, :])
    above, below = rows[0] if width.upper else nothing, rows[-1] if width.lower else nothing
    a, c = (above, below) if transpose else (shifted(below, -1), shifted(above, 1))
    return _reduced(a, rows[width.upper], c, b)


# Nothing reads a[..., 0] and c[..., -1].
def _reduced(a: Tensor, d: Tensor, c: Tensor, b: Tensor) -> Tensor:
    n = d.shape[-1]
    if n == 1:
        return b / d
    if n >= 3 and d.numel() <= _FEW and _lapack.available(d):
        return _lapack.solve_rows(a, d, c, b)
    odd, even = n // 2, n - n // 2
    both = even - 1  # odd ones that have an even one behind
    minus = -d[..., 0::2]
    ae, ce, be = a[..., 0::2] / minus, c[..., 0::2] / minus, b[..., 0::2] / minus
    ao, co = a[..., 1::2], c[..., 1::2][..., :both]
    left = torch.addcmul(d[..., 1::2], ao, ce[..., :odd])
    left[..., :both].addcmul_(co, ae[..., 1:])
    right = torch.addcmul(b[..., 1::2], ao, be[..., :odd])
    right[..., :both].addcmul_(co, be[..., 1:])
    behind = co * ce[..., 1:]
    if both < odd:
        behind = torch.nn.functional.pad(behind, (0, 1))
    xo = _reduced(ao * ae[..., :odd], left, behind, right)
    xe = be.neg_()
    xe[..., 1:].addcmul_(ae[..., 1:], xo[..., :both])
    xe[..., :odd].addcmul_(ce[..., :odd], xo)
    x = torch.empty_like(b, memory_format=torch.contiguous_format)
    x[..., 0::2], x[..., 1::2] = xe, xo
    return x
