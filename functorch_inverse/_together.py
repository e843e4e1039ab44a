r"""Plain steps of systems that contract together: a product with A and two additions each, and nothing is asked on the way.

    u += M r / c,   r = b - A u,        c = <r, A M r> / <r, r> over all systems.

r is a true residual at every step. It shrinks where |A M - c I| is small beside |c|, as for A = I - B with a contraction B:
the Neumann series. How fast says when the next look at it pays. A system that does not keep pace ends it for all; and who
wants to know how many steps each of them takes has to watch them instead.
Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd edition (2003), section 4.2.1 (Richardson's iteration).
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from functorch_inverse._systems import Systems, norm

__all__ = ["contract_together"]

# What a step may leave of a residual, and where it costs next to nothing beside one of another method; how near to one c is
# no news; and from how many numbers on a product is dear.
_PACE, _CHEAP_PACE, _NEAR, _DEAR = 1 / 2, 0.7, 0.1, 2**20

# u -> the u after it, and the r of u, or None: then with c = 1 and M = I it is their difference.
_Step: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def contract_together(s: Systems) -> bool:
    """Whether all systems are solved; where they are not, others go on from what is reached, or from the first product."""
    if not s.untouched and s.solved():
        return True
    if s.max_steps < 3:
        return False
    found = _in_sums(s)
    return _in_products(s) if found is None else found


def _in_sums(s: Systems) -> bool | None:
    """The series of A = I - B, as it is written: u = b + B u; None where nothing came of it."""
    ahead = s.maps.ahead
    if ahead is None:
        return None
    first = s.b if s.untouched else s.u + s.r
    u = ahead(s.b, first)
    r = u - first
    found = _go_on(s, u, r, lambda u: (ahead(s.b, u), None))
    if found is None:
        s.begun = s.r, s.r - r
    return found


def _in_products(s: Systems) -> bool:
    """The same for any A and M."""
    direction, product = s.begin()
    M, size = s.maps.precondition, torch.vdot(s.r.flatten(), s.r.flatten()).item().real
    c = torch.vdot(s.r.flatten(), product.flatten()).item() / size if size else math.nan
    tried = s.maps.ahead is not None and abs(c - 1) < _NEAR
    if tried or not 1e-6 < abs(c) < 1e6:  # nor nan
        return False
    r = torch.sub(s.r, product, alpha=1 / c)

    def step(u: Tensor) -> tuple[Tensor, Tensor]:
        r = s.b - s.maps.mv(u)
        return torch.add(u, M(r), alpha=1 / c), r

    return _go_on(s, torch.add(s.u, direction + M(r), alpha=1 / c), r, step) or False


def _go_on(s: Systems, u: Tensor, r: Tensor, step: _Step) -> bool | None:
    """From two steps on, where r was left by the first; None where a system does not contract so, or others do better."""
    floor, before = s.target, s.residual
    if s.scale is not None:  # only then there may be zeros
        floor, before = (t.clamp(min=torch.finfo(t.dtype).tiny) for t in (floor, before))
    size = norm(r)
    pace = _worst(size, before)
    if not pace <= min(_PACE, s.rtol ** (1 / u.shape[-1])):  # n steps of other methods are enough for any system; nor nan
        return None
    dear = u.numel() * u.shape[-1] >= _DEAR
    slowest, stretch = (_PACE, 2) if dear or s.maps.ahead is None else (_CHEAP_PACE, 3)
    left, steps, seen = _worst(size, floor), 2, 1
    needed = _needed(left, pace)
    if seen + needed > s.max_steps:
        return None
    look = 2 if dear else min(seen + needed, stretch + 1)
    while True:
        after, residual = step(u)
        if steps == look:
            r = after - u if residual is None else residual
            size, last = norm(r), left
            left = _worst(size, floor)
            if left <= 1:
                s.u, s.r, s.residual = u, r, size
                return True
            pace = (left / last) ** (1 / (steps - seen)) if last else math.inf
            if seen == 1 and (not pace <= slowest or (dear and _alike(r, s.r))):
                return None
            needed = _needed(left, pace)
            if not pace <= slowest or steps + needed > s.max_steps:
                return _leave(s, u, r, size, steps)
            look, seen = min(steps + needed, stretch * steps + 1), steps  # soon, while little is known of the pace
        u, steps = after, steps + 1


def _alike(r: Tensor, before: Tensor) -> bool:
    """Whether two steps left r much as it was, as where A is symmetric or skew: then recurrences take fewer products."""
    sizes = torch.linalg.vector_norm(r) * torch.linalg.vector_norm(before)
    return bool(torch.vdot(r.flatten(), before.flatten()).abs() > 0.5 * sizes)


def _worst(size: Tensor, target: Tensor) -> float:
    return (size / target).max().item()


def _needed(left: float, pace: float) -> int:
    """After how many steps at this pace so many times the target should be no more than the target."""
    return max(math.ceil(math.log(left) / -math.log(pace)), 1) if 1 < left < math.inf and 0 < pace < 1 else 1


def _leave(s: Systems, u: Tensor, r: Tensor, size: Tensor, steps: int) -> bool:
    """What is reached, but where it is worse than what was there before."""
    start, before, s.u, s.r, s.residual, s.begun = s.u, s.residual, u, r, size, None
    s.steps += steps
    s.take_back(start, ~(size <= before))
    return False
