r"""Plain steps of systems that contract together: a product with A and two additions each, and nothing is asked on the way.

    u += M r / c,   r = b - A u,        c = <r, A M r> / <r, r> over all systems.

r is a true residual at every step. It shrinks where |A M - c I| is small beside |c|, as for A = I - B with a contraction B:
the Neumann series. How fast says when the next look at it pays. A system that does not keep pace ends it for all; and who
wants to know how many steps each of them takes has to watch them instead.
Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd edition (2003), section 4.2.1 (Richardson's iteration).
"""

import math

import torch
from torch import Tensor

from functorch_inverse._systems import Systems, norm

__all__ = ["contract_together"]

# What a step may leave of a residual; and how near to one c is one, as for most contractions.
_PACE, _NEAR = 1 / 2, 0.1


def contract_together(s: Systems) -> bool:
    """Whether all systems are solved; where they are not, others go on from what is reached, or from the first product."""
    floor = s.target.clamp(min=torch.finfo(s.target.dtype).tiny)
    before = _worst(s.residual, floor)
    if before <= 1:
        return True
    direction, product = s.begin()
    c = _mean(s.r, product)
    if not 1e-6 < abs(c) < 1e6:  # nor nan
        return False
    r = torch.sub(s.r, product, alpha=1 / c)
    size, pace = norm(r), min(_PACE, s.rtol ** (1 / r.shape[-1]))  # n steps of other methods are enough for any system
    if not (size <= pace * s.residual).all():
        return False
    s.begun, left, step, seen = None, _worst(size, floor), 1, 1
    u, look = torch.add(s.u, direction, alpha=1 / c), _next_look(1, 1, left, before, s.max_steps)
    u.add_(s.maps.precondition(r), alpha=1 / c)
    ahead = s.maps.ahead if c == 1 else None
    while True:
        step += 1
        if ahead is None:
            r = s.b - s.maps.mv(u)
        else:
            after = ahead(s.b, u)
        if step == look:
            r = r if ahead is None else after - u
            size, before = norm(r), left
            left = _worst(size, floor)
            if not (1 < left <= _PACE ** (step - seen) * before and step < s.max_steps):
                return _end(s, u, r, size, step)
            look, seen = _next_look(step, step - seen, left, before, s.max_steps), step
        u = u.add_(s.maps.precondition(r), alpha=1 / c) if ahead is None else after


def _mean(r: Tensor, product: Tensor) -> complex:
    """c."""
    r, product = r.flatten(), product.flatten()
    size = torch.vdot(r, r).item().real
    c = torch.vdot(r, product).item() / size if size else math.nan
    return 1 if abs(c - 1) < _NEAR else c


def _worst(size: Tensor, target: Tensor) -> float:
    return float((size / target).max())


def _next_look(step: int, steps: int, left: float, before: float, most: int) -> int:
    """When so many times the target should have gone down to one, at the rate of the last steps; soon, while little is known."""
    needed = math.ceil(steps * math.log(left) / math.log(before / left)) if 1 < left < before < math.inf else 1
    return min(step + max(needed, 1), 2 * step + 1, most)


def _end(s: Systems, u: Tensor, r: Tensor, size: Tensor, steps: int) -> bool:
    """What is reached, but where it is worse than what was there before."""
    start, before, s.u, s.r, s.residual = s.u, s.residual, u, r, size
    s.steps += steps
    if (size <= s.target).all():
        return True
    s.take_back(start, ~(size <= before))
    return False
