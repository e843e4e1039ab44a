r"""Minimal residuals by a recurrence of two vectors, for the systems where it is as good as all of GMRES.

    z = M r - h z',   w = A z = A M r - h w',   h = <w', A M r> / <w', w'>,        u += a z,   r -= a w,   a = <w, r> / <w, w>

Where A is symmetric or skew up to a multiple of I these are the steps of GMRES itself, and where |A - c I| is small beside
|c|, as it is for contractions, they come close. It shows in the residuals: a system whose residual falls
slower than by `_PACE` a step goes to the method that keeps all vectors. Source: Eisenstat, Elman and Schultz,
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
    r, size = s.r, s.residual
    z = s.maps.precondition(r)
    w = s.maps.mv(z)
    ww, wr = dot(w, w).real, dot(w, r)
    # n steps of GMRES are enough for any system, so fewer than n must be in sight; and ww = 0 is no progress.
    pace = min(_PACE, s.rtol ** (1 / r.shape[-1]))
    moving = active & (wr.abs().square() > (1 - pace**2) * ww * size.square())
    if not moving.any():
        return active, w
    z, w = z.clone(), w.clone()  # they may be r itself
    tiny, room = torch.finfo(size.dtype).tiny, s.max_steps - int(s.steps.max())
    while True:
        inverse = moving / ww.clamp(min=tiny)  # zero in systems that wait: nothing of them moves
        a = (wr * inverse).unsqueeze(-1)
        s.u.addcmul_(a, z)
        r.addcmul_(a, w, value=-1)
        before, size = size, norm(r)
        s.steps += moving
        room -= 1
        moving = moving & (size > s.target) & (size <= _PACE * before)
        if room < 1:
            moving = moving & (s.steps < s.max_steps)
        if not moving.any():
            break
        direction = s.maps.precondition(r)
        product = s.maps.mv(direction)
        h = (dot(w, product) * inverse).unsqueeze(-1)
        z, w = torch.addcmul(direction, h, z, value=-1), torch.addcmul(product, h, w, value=-1)
        ww, wr = dot(w, w).real, dot(w, r)
    left = active & (size > s.target) & (s.steps < s.max_steps)
    return left, s.maps.mv(s.maps.precondition(r)) if left.any() else None
