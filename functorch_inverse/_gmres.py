r"""One round of restarted GMRES: every row of (k, n) is a system of its own.

Each step makes the residual r as small as it can be made in the space of all directions z so far,

    A M z_j = w_j + sum_{i<j} h_ij w_i,   w_j orthogonal to the w_i before,   r -= a_j w_j,   a_j = <w_j, r> / <w_j, w_j>,

so that the end is u += M Z y with (I + h) y = a, without rotations. A direction is the residual, or the last w where
that residual hardly moved, so Z is never stored. Source: Walker and Zhou, A simpler GMRES (1994); Jiranek and
Rozloznik, Adaptive version of simpler GMRES (2010), for the choice; Giraud, Langou and Rozloznik, The loss of
orthogonality in the Gram-Schmidt orthogonalization process (2005): twice is enough.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from functorch_inverse._orthomin import Pair, Standing, contract, fast
from functorch_inverse._systems import Systems, dot, norm

__all__ = ["gmres"]

# What is left of a residual that hardly moved; and in units of eps what no round brings it below, since what rounding adds
# along vectors that are done with is never taken off again.
_SLOW, _FLOOR = 0.9, 16


def gmres(s: Systems, active: Tensor, restart: int) -> Tensor:
    """Two vectors where they are enough, else at most `restart` steps."""
    # No round brings a true residual down by more than that: what is carried along may become as small as it likes.
    target = torch.maximum(s.target, torch.finfo(s.residual.dtype).eps * s.residual)
    standing = contract(s, active, target)
    if standing is not None:
        _cycle(s, standing, target, restart)
    return torch.zeros_like(active)


# Systems that are light keep nothing; they are here so that those beside them need not wait. One that no longer is
# begins a cycle of its own, with all its steps.
def _cycle(s: Systems, standing: Standing, target: Tensor, restart: int) -> None:
    """From a first product on, at most `restart` steps of each system."""
    moving, light, direction, w, pair = standing
    r, size, slow, mixed = s.r, norm(s.r), moving, bool(light.any())
    numbers, most = torch.finfo(size.dtype), min(restart, s.b.shape[-1])
    floor, tiny = _FLOOR * numbers.eps * size, numbers.tiny
    space, end = _Space.empty(s.b, 2 * most if mixed else most), torch.full_like(s.steps, most)
    for j in range(space.a.shape[1]):
        if j:
            direction = s.maps.precondition(space.direction(j, slow, r, size))
            w = s.maps.mv(direction)
        if mixed:
            direction, w = pair.next(direction, w, light)
        w, length = space.orthogonalised(j, w, moving)
        moving = moving & (length > 0)
        inverse = torch.where(moving, 1 / length.clamp(min=tiny), 0)
        a = dot(w, r) * inverse
        space.add(j, w, *((t.masked_fill(light, 0) for t in (inverse, a)) if mixed else (inverse, a)))
        r.addcmul_(a.unsqueeze(-1), w, value=-1)
        before, size = size, norm(r)
        s.steps += moving
        moving = moving & (size > target) & (s.steps < s.max_steps)
        slow = moving & (size > _SLOW * before)
        moving = moving & ~(slow & (size < floor))
        if mixed:
            s.u.addcmul_(torch.where(light, a, 0).unsqueeze(-1), direction)
            end = torch.where(light, j + 1 + most, end)
            pair, slow, light = Pair(direction, w, inverse), slow & ~light, light & fast(size, before)
            moving = moving & (j + 1 < end)
        if not moving.any():
            break
    s.u += s.maps.precondition(space.combination(j + 1, r))


class _Space(NamedTuple):
    """The w of a cycle (k, m, n), the rows of h^T, and for each step 1 / <w, w>, a, and |z| / |w| where z is the last w.

    A system that waits has zeros in the last three, so that nothing of it moves.
    """

    basis: Tensor
    h: Tensor
    inverse: Tensor
    a: Tensor
    turn: Tensor

    @classmethod
    def empty(cls, like: Tensor, m: int) -> "_Space":
        k, n = like.shape
        inverse, turn = like.real.new_zeros(2, k, m)
        return cls(like.new_empty(k, m, n), like.new_empty(k, m, m), inverse, like.new_zeros(k, m), turn)

    def direction(self, j: int, slow: Tensor, r: Tensor, size: Tensor) -> Tensor:
        """The residual; where it hardly moved the last w, as long as the residual is."""
        if not slow.any():
            return r
        turn = torch.where(slow, size * self.inverse[:, j - 1].sqrt(), 0)
        self.turn[:, j] = turn
        return torch.where(slow.unsqueeze(-1), self.basis[:, j - 1] * turn.unsqueeze(-1), r)

    def orthogonalised(self, j: int, w: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """w without its parts along the basis, and <w, w>: zero where nothing but rounding errors is left."""
        reach = length = dot(w, w).real
        if j:
            w, self.h[:, j, :j] = self._subtracted(j, w)
            length = dot(w, w).real
            if (moving & (length < 0.5 * reach)).any():
                w, again = self._subtracted(j, w)
                self.h[:, j, :j] += again
                length = dot(w, w).real
        return w, length.masked_fill(length <= torch.finfo(length.dtype).eps ** 2 * reach, 0)

    def _subtracted(self, j: int, w: Tensor) -> tuple[Tensor, Tensor]:
        """Rows times matrices, which is several times faster than matrices times columns."""
        basis, row = self.basis[:, :j], w.unsqueeze(1)
        h = torch.bmm(row, basis.mH) * self.inverse[:, :j].unsqueeze(1)
        return torch.baddbmm(row, h, basis, alpha=-1).squeeze(1), h.squeeze(1)

    def add(self, j: int, w: Tensor, inverse: Tensor, a: Tensor) -> None:
        """The j-th w, 1 / <w, w> and a."""
        self.basis[:, j], self.inverse[:, j], self.a[:, j] = w, inverse, a

    # With m steps done, the z of step j was r_j = r_m + (a_j w_j + ... + a_m w_m), or turn_j w_(j-1).
    def combination(self, m: int, r: Tensor) -> Tensor:
        """Z y with (I + h) y = a."""
        h, a, turn = self.h[:, :m, :m].mT, self.a[:, :m], self.turn[:, :m]
        y = torch.linalg.solve_triangular(h, a.unsqueeze(-1), upper=True, unitriangular=True).squeeze(-1)
        total = torch.where(turn == 0, y, 0).cumsum(-1)
        weights = total * a
        weights[:, :-1] += (turn * y)[:, 1:]
        return torch.baddbmm((total[:, -1:] * r).unsqueeze(1), weights.unsqueeze(1), self.basis[:, :m]).squeeze(1)
