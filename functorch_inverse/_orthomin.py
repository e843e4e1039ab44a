r"""Minimal residuals by a recurrence of two vectors, for the systems where it is as good as all of GMRES.

    z = M r - h z',   w = A z = A M r - h w',   h = <w', A M r> / <w', w'>,        u += a z,   r -= a w,   a = <w, r> / <w, w>

Where A is symmetric or skew up to a multiple of I these are the steps of GMRES itself, and where |A - c I| is small beside
|c|, as it is for contractions, they come close. It shows in the residuals: a system in which they
fall slower than `_PACE` a step goes to the method that keeps all vectors. Source: Eisenstat, Elman and Schultz,
Variational iterative methods for nonsymmetric systems of linear equations (1983), Orthomin(1); Saad, Iterative Methods
for Sparse Linear Systems, 2nd edition (2003), section 6.9.
"""

import torch
from torch import Tensor

from functorch_inverse._systems import Systems, dot, norm

__all__ = ["contract"]

_PACE = 0.5


def contract(s: Systems, active: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which systems are left to do, and A M r for them; None where all are done."""
    z = s.maps.precondition(s.r)
    w = s.maps.mv(z)
    quick = active & _quick(s, w)
    if not quick.any():
        return active, w
    _recur(s, quick, z, w)
    left = active & (norm(s.r) > s.target) & (s.steps < s.max_steps)
    return left, s.maps.mv(s.maps.precondition(s.r)) if left.any() else None


# n steps of GMRES are enough for any system, so fewer than n must be in sight.
def _quick(s: Systems, w: Tensor) -> Tensor:
    """Where a first step along w brings the residual down at a pace that promises the rest of it."""
    pace = ((s.target / s.residual) ** (1 / w.shape[-1])).clamp(max=_PACE)
    explained = dot(w, s.r).abs() ** 2 / (dot(w, w).real * s.residual**2)
    return 1 - explained < pace**2


def _recur(s: Systems, moving: Tensor, z: Tensor, w: Tensor) -> None:
    r, size = s.r, s.residual
    z, w = z.clone(), w.clone()  # they may be r itself
    tiny = torch.finfo(size.dtype).tiny
    while True:
        inverse = moving / dot(w, w).real.clamp(min=tiny)  # zero in systems that wait: nothing of them moves
        a = (dot(w, r) * inverse).unsqueeze(-1)
        s.u.addcmul_(a, z)
        r.addcmul_(a, w, value=-1)
        before, size = size, norm(r)
        s.steps += moving
        moving = moving & (size > s.target) & (size <= _PACE * before) & (s.steps < s.max_steps)
        if not moving.any():
            return
        direction = s.maps.precondition(r)
        product = s.maps.mv(direction)
        h = (dot(w, product) * inverse).unsqueeze(-1)
        z, w = torch.addcmul(direction, h, z, value=-1), torch.addcmul(product, h, w, value=-1)
