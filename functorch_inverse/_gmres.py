r"""One round of restarted GMRES: every row of (k, n) is a system of its own.

    A M V_m = V_{m+1} H,    Q H = (R, 0)^T,    u += M V_m y with R y = |r| Q e_1

The rotations are kept as their product Q, so that a step is a fixed number of batched products. Source: Saad,
Iterative Methods for Sparse Linear Systems, 2nd edition (2003), algorithms 6.9 and 9.5; Giraud, Langou and
Rozloznik, The loss of orthogonality in the Gram-Schmidt orthogonalization process (2005): twice is enough.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from functorch_inverse._systems import Systems, norm

__all__ = ["gmres"]


def gmres(s: Systems, active: Tensor, restart: int) -> Tensor:
    """At most `restart` steps of Arnoldi's process, and the u that makes the residual smallest."""
    k, n = s.b.shape
    m, moving = min(restart, n), active
    basis = s.b.new_empty(k, m + 1, n)
    least_squares = _LeastSquares.empty(s.b, m)
    basis[:, 0] = _scaled(s.r, active, s.residual)
    for j in range(m):
        w = s.maps.mv(s.maps.precondition(basis[:, j]))
        h, w = _orthogonalised(basis[:, : j + 1], w)
        rest = norm(w)
        left = least_squares.add(j, moving, h, rest) * s.residual
        s.steps += moving
        moving = moving & (left > s.target) & (rest > 0) & (s.steps < s.max_steps)
        if not moving.any():
            break
        basis[:, j + 1] = _scaled(w, moving, rest)
    y = least_squares.solve(j + 1) * s.residual.unsqueeze(-1)
    u = s.maps.precondition((y.unsqueeze(-2) @ basis[:, : j + 1]).squeeze(-2))
    s.u += torch.where(active.unsqueeze(-1), u, 0)
    return torch.zeros_like(active)


def _scaled(v: Tensor, where: Tensor, by: Tensor) -> Tensor:
    return torch.where(where.unsqueeze(-1), v / by.unsqueeze(-1), 0)


def _orthogonalised(basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The part of w along the basis, and the rest: exactly zero where it is only rounding errors."""
    size, total = norm(w), w.new_zeros(basis.shape[:-1])
    for _ in range(2):
        h = (basis.conj() @ w.unsqueeze(-1)).squeeze(-1)
        w = w - (h.unsqueeze(-2) @ basis).squeeze(-2)
        total += h
    noise = norm(w) <= torch.finfo(w.dtype).eps * size
    return total, w.masked_fill(noise.unsqueeze(-1), 0)


class _LeastSquares(NamedTuple):
    """min_y |e_1 - H y|, column by column: Q H = (R, 0)^T, with a column of the identity where a system waits."""

    q: Tensor
    r: Tensor
    rhs: Tensor

    @classmethod
    def empty(cls, like: Tensor, m: int) -> "_LeastSquares":
        k = like.shape[0]
        q, r = (torch.eye(size, dtype=like.dtype, device=like.device).repeat(k, 1, 1) for size in (m + 1, m))
        return cls(q, r, like.new_zeros(k, m))

    def add(self, j: int, moving: Tensor, h: Tensor, rest: Tensor) -> Tensor:
        """The j-th column (h, rest) of H; what is left of |e_1 - H y| (0 where the column adds nothing)."""
        column = (self.q[:, : j + 1, : j + 1] @ h.unsqueeze(-1)).squeeze(-1)
        last = column[:, j]
        length = torch.hypot(last.abs(), rest)
        size = torch.hypot(norm(h), rest)
        used = moving & (length > torch.finfo(h.dtype).eps * size)
        phase = torch.where(last == 0, 1, torch.sgn(last))
        divisor = torch.where(used, length, 1)
        c = torch.where(used, last.abs() / divisor, 1)
        self._rotate(j, c, torch.where(used, phase * rest / divisor, 0))
        self.r[:, :j, j] = torch.where(used.unsqueeze(-1), column[:, :j], 0)
        self.r[:, j, j] = torch.where(used, phase * length, 1)
        self.rhs[:, j] = torch.where(used, self.q[:, j, 0], 0)
        return torch.where(used, self.q[:, j + 1, 0].abs(), 0)

    def _rotate(self, j: int, c: Tensor, s: Tensor) -> None:
        """Rows j and j + 1 of Q."""
        upper, lower = self.q[:, j].clone(), self.q[:, j + 1].clone()
        c, s = c.unsqueeze(-1), s.unsqueeze(-1)
        self.q[:, j] = c * upper + s * lower
        self.q[:, j + 1] = c * lower - s.conj() * upper

    def solve(self, m: int) -> Tensor:
        """y for the first m columns."""
        return torch.linalg.solve_triangular(self.r[:, :m, :m], self.rhs[:, :m, None], upper=True).squeeze(-1)
