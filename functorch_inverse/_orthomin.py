r"""Minimal residuals by a recurrence of two vectors, for the systems where it is as good as all of GMRES.

    z = M r - h z',   w = A z = A M r - h w',   h = <w', A M r> / <w', w'>,        u += a z,   r -= a w,   a = <w, r> / <w, w>

Where A is symmetric, or a multiple of I plus a skew matrix, these are the steps of GMRES itself, and where |A - c I| is
small beside |c|, as it is for contractions, they come close. It shows in the residuals: where they fall slowly, GMRES
goes on with all vectors, from where it is.
Source: Eisenstat, Elman and Schultz, Variational iterative methods for nonsymmetric systems of linear equations (1983),
Orthomin(1); Saad, Iterative Methods for Sparse Linear Systems, 2nd edition (2003), section 6.9.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from functorch_inverse._systems import Systems, dot, norm

__all__ = ["Pair", "Standing", "contract", "fast"]

# What a step may leave of a residual.
_PACE = 1 / 2


class Pair(NamedTuple):
    """z and w = A z of the step before, and 1 / <w, w>: zero where there was none."""

    z: Tensor
    w: Tensor
    inverse: Tensor

    def next(self, direction: Tensor, product: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next z and w; outside of `where` the direction and its product as they are."""
        h = dot(self.w, product) * self.inverse
        h = (h if where is None else torch.where(where, h, 0)).unsqueeze(-1)
        return torch.addcmul(direction, h, self.z, value=-1), torch.addcmul(product, h, self.w, value=-1)


class Standing(NamedTuple):
    """Systems on their way: which of them move, which do so by the recurrence, and the product that comes next."""

    moving: Tensor
    light: Tensor
    direction: Tensor
    product: Tensor
    pair: Pair


def contract(s: Systems, moving: Tensor, target: Tensor) -> Standing | None:
    """Steps as long as all systems that move do so fast; None where nothing is left to do."""
    r, size = s.r, s.residual
    direction, product = _first(s, moving)
    light, pair = moving & _promising(s, product), Pair(direction, product, torch.zeros_like(size))
    tiny, room = torch.finfo(size.dtype).tiny, s.max_steps - int(s.steps.max())
    while torch.equal(light, moving):
        direction, product = pair.next(direction, product)
        inverse = moving / dot(product, product).real.clamp(min=tiny)  # zero in systems that wait: nothing of them moves
        pair, a = Pair(direction, product, inverse), (dot(product, r) * inverse).unsqueeze(-1)
        s.u.addcmul_(a, direction)
        r.addcmul_(a, product, value=-1)
        before, size, room = size, norm(r), room - 1
        s.steps += moving
        moving = moving & (size > target)
        if room < 1:
            moving = moving & (s.steps < s.max_steps)
        if not moving.any():
            return None
        light = moving & fast(size, before)
        direction = s.maps.precondition(r)
        product = s.maps.mv(direction)
    return Standing(moving, light, direction, product, pair)


def _first(s: Systems, moving: Tensor) -> tuple[Tensor, Tensor]:
    """M r and A M r, at a length that leaves the squares of both in the range of the dtype."""
    (direction, product), s.begun = s.begin(), None
    reach = norm(product) / s.residual
    extreme = moving & ((reach < 1e-6) | (reach > 1e6))
    return s.rescale(direction, product) if extreme.any() else (direction, product)


# n steps of GMRES are enough for any system, so fewer than n must be in sight.
def _promising(s: Systems, product: Tensor) -> Tensor:
    """Where a first step along A M r would leave little of r."""
    pace = min(_PACE, s.rtol ** (1 / product.shape[-1]))
    return dot(product, s.r).abs().square() > (1 - pace**2) * dot(product, product).real * s.residual.square()


def fast(size: Tensor, before: Tensor) -> Tensor:
    """Where the last step left little enough."""
    return size <= _PACE * before
