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
    if not s.untouched and not s.unsolved().any():
        return True
    direction, product = s.begin()
    c = _mean(s.r, product)
    if not 1e-6 < abs(c) < 1e6 or s.max_steps < 3:  # nor nan
        return False
    r = torch.sub(s.r, product, alpha=1 / c)
    size, tiny = norm(r), torch.finfo(s.target.dtype).tiny
    pace = _worst(size, s.residual.clamp(min=tiny))
    if not pace <= min(_PACE, s.rtol ** (1 / r.shape[-1])):  # n steps of other methods are enough for any system
        return False
    s.begun, u = None, torch.add(direction, s.maps.precondition(r))
    u = torch.add(s.u, u, alpha=1 / c) if c != 1 or not s.untouched else u
    floor = s.target.clamp(min=tiny)
    return _go_on(s, u, c, floor, _worst(size, floor), pace)


def _go_on(s: Systems, u: Tensor, c: complex, floor: Tensor, left: float, pace: float) -> bool:
    """From two steps on; the first of them left so many times the target."""
    ahead, step, seen = s.maps.ahead if c == 1 else None, 2, 1
    look = _next_look(1, left, pace, s.max_steps)
    while True:
        if ahead is None:
            r = s.b - s.maps.mv(u)
        else:
            after = ahead(s.b, u)
        if step == look:
            r = r if ahead is None else after - u
            size, before = norm(r), left
            left = _worst(size, floor)
            pace = (left / before) ** (1 / (step - seen)) if before else math.inf
            if left <= 1:
                s.u, s.r, s.residual = u, r, size
                return True
            if not pace <= _PACE or step >= s.max_steps:
                return _leave(s, u, r, size, step)
            look, seen = _next_look(step, left, pace, s.max_steps), step
        u = u.add_(s.maps.precondition(r), alpha=1 / c) if ahead is None else after
        step += 1


def _mean(r: Tensor, product: Tensor) -> complex:
    """c."""
    r, product = r.flatten(), product.flatten()
    size = torch.vdot(r, r).item().real
    c = torch.vdot(r, product).item() / size if size else math.nan
    return 1 if abs(c - 1) < _NEAR else c


def _worst(size: Tensor, target: Tensor) -> float:
    return (size / target).max().item()


def _next_look(step: int, left: float, pace: float, most: int) -> int:
    """When so many times the target should have gone down to one, at this pace; soon, while little is known of it."""
    needed = math.ceil(math.log(left) / -math.log(pace)) if 1 < left < math.inf and pace else 1
    return min(step + max(needed, 1), 2 * step + 1, most)


def _leave(s: Systems, u: Tensor, r: Tensor, size: Tensor, steps: int) -> bool:
    """What is reached, but where it is worse than what was there before."""
    start, before, s.u, s.r, s.residual = s.u, s.residual, u, r, size
    s.steps += steps
    s.take_back(start, ~(size <= before))
    return False
