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

from functorch_inverse._orthomin import contract
from functorch_inverse._systems import Systems, dot, norm

__all__ = ["gmres"]

# What is left of a residual that hardly moved.
_SLOW = 0.9


def gmres(s: Systems, active: Tensor, restart: int) -> Tensor:
    """Two vectors where they are enough, else at most `restart` steps."""
    left, w = contract(s, active)
    if w is not None:
        _cycle(s, left, w, restart)
    return torch.zeros_like(active)


def _cycle(s: Systems, moving: Tensor, w: Tensor, restart: int) -> None:
    """From w = A M r on."""
    m, r, size = min(restart, s.b.shape[-1]), s.r, norm(s.r)
    space = _Space.empty(s.b, m)
    for j in range(m):
        if j:
            w = s.maps.mv(s.maps.precondition(space.direction(j, moving & (size > _SLOW * before), r, size)))
        w, length = space.add(j, w, moving)
        moving = moving & (length > 0)
        r.addcmul_(space.step(j, w, torch.where(moving, 1 / length, 0), r), w, value=-1)
        before, size = size, norm(r)
        s.steps += moving
        moving = moving & (size > s.target) & (s.steps < s.max_steps)
        if not moving.any():
            break
    s.u += s.maps.precondition(space.combination(j + 1, r))


class _Space(NamedTuple):
    """The w of a cycle (k, m, n), the rows of h^T, and for each step 1 / <w, w>, a, and z / w where z is a w.

    A system that waits has zeros in all three, so that nothing of it moves.
    """

    basis: Tensor
    h: Tensor
    inverse: Tensor
    a: Tensor
    turn: Tensor

    @classmethod
    def empty(cls, like: Tensor, m: int) -> "_Space":
        k, n = like.shape
        real = like.real.new_zeros(2, k, m)
        return cls(like.new_empty(k, m, n), like.new_empty(k, m, m), real[0], like.new_zeros(k, m), real[1])

    def direction(self, j: int, slow: Tensor, r: Tensor, size: Tensor) -> Tensor:
        """The residual, or the last w at its length."""
        if not slow.any():
            return r
        turn = torch.where(slow, size * self.inverse[:, j - 1].sqrt(), 0)
        self.turn[:, j] = turn
        return torch.where(slow.unsqueeze(-1), self.basis[:, j - 1] * turn.unsqueeze(-1), r)

    def add(self, j: int, w: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """w without its parts along the basis, as the next vector of it, and <w, w>: zero where nothing but rounding is left."""
        new, reach = self.basis[:, j], dot(w, w).real
        if not j:
            new.copy_(w)
            return new, reach
        h = self.h[:, j, :j].unsqueeze(1)
        h.copy_(self._subtract(j, w, new))
        length = dot(new, new).real
        if (moving & (length < 0.5 * reach)).any():
            h += self._subtract(j, new, new)
            length = dot(new, new).real
        return new, length.masked_fill(length <= torch.finfo(length.dtype).eps ** 2 * reach, 0)

    def _subtract(self, j: int, w: Tensor, out: Tensor) -> Tensor:
        """One pass of Gram-Schmidt: rows times matrices, which is the faster way round."""
        basis, row = self.basis[:, :j], w.unsqueeze(1)
        h = torch.bmm(row, basis.mH) * self.inverse[:, :j].unsqueeze(1)
        torch.baddbmm(row, h, basis, alpha=-1, out=out.unsqueeze(1))
        return h

    def step(self, j: int, w: Tensor, inverse: Tensor, r: Tensor) -> Tensor:
        """a, as a column."""
        self.inverse[:, j] = inverse
        a = self.a[:, j] = dot(w, r) * inverse
        return a.unsqueeze(-1)

    def combination(self, m: int, r: Tensor) -> Tensor:
        """Z y, where a z that was a residual is what is left of it now and all that was taken off since."""
        y = torch.linalg.solve_triangular(self.h[:, :m, :m].mT, self.a[:, :m, None], upper=True, unitriangular=True).squeeze(-1)
        turn = self.turn[:, :m]
        total = torch.where(turn == 0, y, 0).cumsum(-1)
        weights = total * self.a[:, :m]
        weights[:, :-1] += (turn * y)[:, 1:]
        last = total[:, -1:]
        return torch.baddbmm((last * r).unsqueeze(1), weights.unsqueeze(1), self.basis[:, :m]).squeeze(1)
