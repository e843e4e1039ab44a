r"""One round of each short-recurrence method: every row of (k, n) is a system of its own.

A system that is done gets steps of length zero and waits for the others. Source: Saad, Iterative Methods for
Sparse Linear Systems, 2nd edition (2003): algorithms 9.1 (CG), 8.4 (CGNR), 7.7 (BiCGStab).
"""

import torch
from torch import Tensor

from functorch_inverse._preconditioner import probes
from functorch_inverse._systems import Systems, dot, norm

__all__ = ["bicgstab", "conjugate_gradients", "normal_conjugate_gradients"]


def _add(target: Tensor, factor: Tensor, direction: Tensor) -> None:
    """target += factor * direction, row by row, without a temporary."""
    target.addcmul_(factor.to(direction.dtype).unsqueeze(-1), direction)


def _ratio(where: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a / b in the systems that still move, zero in the others."""
    return torch.where(where, a / b, 0)


def conjugate_gradients(s: Systems, active: Tensor, attempt: int) -> Tensor:
    """CG for A = A^H > 0; hopeless is where p^H A p <= 0 or r^H M r <= 0 shows that A or M is not so."""
    r, z = s.r, s.maps.precondition(s.r)
    p, rz = z.clone(), dot(r, z).real
    indefinite = active & (rz <= 0)
    active = active & (rz > 0)
    while True:
        q = s.maps.mv(p)
        curvature = dot(p, q).real
        indefinite = indefinite | (active & (curvature <= 0))
        active = active & (curvature > 0)
        alpha = _ratio(active, rz, curvature)
        _add(s.u, alpha, p)
        _add(r, -alpha, q)
        s.steps += active
        active = active & (norm(r) > s.target) & (s.steps < s.max_steps)
        if not active.any():
            return indefinite
        z = s.maps.precondition(r)
        before, rz = rz, dot(r, z).real
        indefinite = indefinite | (active & (rz <= 0))
        active = active & (rz > 0)
        p.mul_(_ratio(active, rz, before).unsqueeze(-1)).add_(z)


# With N = A M and u = M y: CG for N^H N y = N^H b, with the gradient N^H r. Where it vanishes beside r, what is
# left is out of A's reach, or noise.
def normal_conjugate_gradients(s: Systems, active: Tensor, attempt: int) -> Tensor:
    """CG for the normal equations, which any invertible A has."""
    maps, r = s.maps, s.r
    assert maps.adjoint is not None
    gradient = maps.precondition_adjoint(maps.adjoint(r))
    p, slope, size, largest = gradient.clone(), norm(gradient), s.residual, torch.zeros_like(s.residual)
    eps = torch.finfo(size.dtype).eps
    while True:
        direction = maps.precondition(p)
        q = maps.mv(direction)
        reach = norm(q)
        largest = torch.maximum(largest, _ratio(slope > 0, reach, norm(p)))
        active = active & (slope > eps * largest * size) & (reach > 0)
        alpha = _ratio(active, slope, reach).square()
        _add(s.u, alpha, direction)
        _add(r, -alpha, q)
        size = norm(r)
        s.steps += active
        active = active & (size > s.target) & (s.steps < s.max_steps)
        if not active.any():
            return torch.zeros_like(active)
        gradient = maps.precondition_adjoint(maps.adjoint(r))
        before, slope = slope, norm(gradient)
        p.mul_(_ratio(active, slope, before).square().unsqueeze(-1)).add_(gradient)


# The shadow is r in the first round. A breakdown (rho = 0 or sigma = 0) ends the round of its system, and the next
# one has another shadow. omega = 0 does not occur: its angle is kept away from 90 degrees. Source: Sleijpen and
# van der Vorst, Maintaining convergence properties of BiCGstab methods in finite precision arithmetic (1995).
def bicgstab(s: Systems, active: Tensor, attempt: int) -> Tensor:
    """BiCGStab with the preconditioner on the right, so that r stays the residual of A u = b."""
    maps, r, shadow = s.maps, s.r, _shadow(s.r, attempt)
    p, rho, away = r.clone(), dot(shadow, r), torch.finfo(r.dtype).eps * norm(shadow)
    while True:
        direction = maps.precondition(p)
        v = maps.mv(direction)
        sigma = dot(shadow, v)
        active = active & (sigma.abs() > away * norm(v))
        alpha = _ratio(active, rho, sigma)
        _add(s.u, alpha, direction)
        _add(r, -alpha, v)
        size = norm(r)
        smooth = active & (size > s.target)
        direction = maps.precondition(r)
        t = maps.mv(direction)
        omega = _smoothing(smooth, t, r, size)
        _add(s.u, omega, direction)
        _add(r, -omega, t)
        s.steps += active
        size, before, rho = norm(r), rho, dot(shadow, r)
        # <shadow, r> must be more than the rounding errors of orthogonal vectors, as <shadow, v> above.
        active = smooth & (omega != 0) & (size > s.target) & (s.steps < s.max_steps) & (rho.abs() > away * size)
        if not active.any():
            return torch.zeros_like(active)
        _add(p, -omega, v)
        p.mul_((_ratio(active, rho, before) * _ratio(active, alpha, omega)).unsqueeze(-1)).add_(r)


def _shadow(r: Tensor, attempt: int) -> Tensor:
    if not attempt:
        return r.clone()
    probe = probes(r)[attempt % 2]
    return r + attempt * probe * (norm(r) / norm(probe)).unsqueeze(-1)


def _smoothing(where: Tensor, t: Tensor, r: Tensor, size: Tensor) -> Tensor:
    """omega = <t, r> / <t, t>, lengthened where t and r, whose length is `size`, are nearly orthogonal."""
    length = norm(t)
    where = where & (length > 0)
    stretch = _ratio(where, size, length)
    cosine = _ratio(where, dot(t, r), length * size)
    return torch.where(cosine == 0, 1, torch.sgn(cosine)) * cosine.abs().clamp(min=0.7) * stretch
