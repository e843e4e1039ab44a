"""Solves with a Jacobian that is never built: all that is known of it is its products with vectors."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from functorch_inverse.operators import Ahead, JacobianOperator, MatVec

__all__ = ["System", "ValueSolver", "solve_by_values"]


class ValueSolver(Protocol):
    """Finds the value of u with A u = b."""

    def values(self, system: "System", b: Tensor) -> Tensor:
        """u for b of shape (*columns, *batch, n)."""
        ...


@dataclass(frozen=True, eq=False)
class System:
    """A u = b as an iteration sees it; A may be the transpose of a Jacobian.

    Vectors have the shape (*columns, *batch, n). `near` applies the inverse of a matrix that is close to A; `ahead` is
    (b, u) -> b + u - A u, where it costs less than A u.
    """

    mv: MatVec
    rmv: MatVec
    transpose: bool
    sample_dims: int
    near: MatVec | None = None
    ahead: Ahead | None = None


def solve_by_values(A: JacobianOperator, solver: ValueSolver, b: Tensor, *, transpose: bool = False) -> Tensor:
    """u with A u = b (or A^T u = b), found by the solver where nobody differentiates."""
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(
            f"`{A.equation.caller}`: an iterative linear solver looks at values, which torch.compile cannot. Keep "
            "this call outside of the compiled region, or use a direct solver such as LU()."
        )
    # What is near A leaves few products to take.
    mv, rmv, ahead = (A.mv, A.rmv, None) if A.equation.near else A.products()
    maps, dims = (rmv, mv) if transpose else (mv, rmv), len(A.batch) + 1
    return solver.values(
        System(*maps, transpose, dims, _near(A, transpose), ahead if transpose and b.ndim == dims else None), b
    )


def _near(A: JacobianOperator, transpose: bool) -> MatVec | None:
    """The inverse of what is close to A, where the equation brings such a matrix."""
    if not A.equation.near:
        return None
    factors = A.theta[-A.equation.near :]
    lu, pivots = factors if len(factors) == 2 else torch.linalg.lu_factor_ex(factors[0])[:2]

    def apply(v: Tensor) -> Tensor:
        count = v.ndim - len(A.batch) - 1
        columns = v.movedim(tuple(range(count)), tuple(range(-count, 0))).reshape(*A.batch, v.shape[-1], -1)
        found = torch.linalg.lu_solve(lu, pivots, columns, adjoint=transpose)
        back = found.unflatten(-1, v.shape[:count]) if count else found.squeeze(-1)
        back = back.movedim(tuple(range(-count, 0)), tuple(range(count))) if count else back
        return torch.where(back.isfinite().all(-1, keepdim=True), back, v)  # a singular one helps nobody

    return apply
