"""What `linear_solver=` may be: a solver object, an iteration that finds values, or a callable of the user's own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from functorch_inverse._matrix_free import System, ValueSolver, solve_by_values
from functorch_inverse.errors import NotConvergedError, StructureError
from functorch_inverse.krylov import GMRES, Krylov
from functorch_inverse.linear_solvers import LU, Factors, LinearSolver
from functorch_inverse.operators import JacobianOperator, MatVec

__all__ = ["SolverLike", "as_solver", "iteration", "with_jacobian"]

SolverLike: TypeAlias = LinearSolver | Krylov | ValueSolver | Callable[[MatVec, Tensor], Tensor] | None


@dataclass(frozen=True)
class _ByValues:
    """A solver that knows only values; the derivative comes from what it solves."""

    solver: ValueSolver
    exact: ClassVar[bool] = True

    def __repr__(self) -> str:
        return repr(self.solver)

    def factorise(self, operator: JacobianOperator) -> Factors:
        return _Iterated(self.solver, operator)


@dataclass(frozen=True)
class _Iterated:
    solver: ValueSolver
    operator: JacobianOperator
    takes_columns: ClassVar[bool] = True

    def solve(self, b: Tensor, *, transpose: bool = False) -> Tensor:
        return solve_by_values(self.operator, self.solver, b, transpose=transpose)


@dataclass(frozen=True)
class _Iteration:
    """A Krylov solver, preconditioned by what is near A where there is such a thing."""

    krylov: Krylov

    def __repr__(self) -> str:
        return repr(self.krylov)

    def values(self, system: System, b: Tensor) -> Tensor:
        if system.near is None:
            krylov, transpose = self.krylov, system.transpose
        else:
            krylov, transpose = replace(self.krylov, preconditioner=system.near), False
        found = krylov.value(system.mv, b, transposed=system.rmv, transpose=transpose, ahead=system.ahead)
        # The part of p outside of the range of A is some 1 / sqrt(n) of it.
        loose = replace(krylov, rtol=0.03 / max(b.shape[-1], 1) ** 0.5, atol=0.0, warm_start=False)
        _probe(system, b, lambda p: loose.value(system.mv, p, transposed=system.rmv))
        return found


# A tangent b = -B dtheta lies in the range of A by its making, also where A is singular and A u = b has many solutions;
# a vector of no such origin does not. (A cotangent in the range of A^T asks for nothing that is ambiguous.)
def _probe(system: System, b: Tensor, solve: Callable[[Tensor], Any]) -> None:
    """An error where A u = p cannot be solved for a p that nobody made with A."""
    columns = b.ndim - system.sample_dims
    if system.transpose or not b.numel():
        return
    sample = b[(0,) * columns] if columns else b
    p = torch.cos(torch.arange(b.shape[-1], dtype=b.dtype, device=b.device) ** 2 + 0.3).expand_as(sample)
    try:
        solve(p)
    except NotConvergedError as error:
        raise NotConvergedError(
            f"A u = b was solved, but A u = p for an arbitrary p was not: the Jacobian is singular, so that u is one of many "
            f"solutions, or the iteration is too short. ({error})"
        ) from error


@dataclass(frozen=True)
class _Callable:
    """`solve(mv, rhs)` as the user wrote it, with its result looked at."""

    function: Callable[[MatVec, Tensor], Tensor]

    def values(self, system: System, b: Tensor) -> Tensor:
        u = self._solved(system, b)
        _probe(system, b, lambda p: self._solved(system, p))
        return u

    def _solved(self, system: System, b: Tensor) -> Tensor:
        u = self.function(system.mv, b.clone())  # which may be changed, or given back
        if not isinstance(u, Tensor) or u.shape != b.shape or u.dtype != b.dtype:
            arrived = f"{u.dtype} of shape {tuple(u.shape)}" if isinstance(u, Tensor) else type(u).__name__
            raise StructureError(
                f"`linear_solver`: solve(mv, rhs) returned {arrived}; needed is {b.dtype} of shape {tuple(b.shape)}."
            )
        error, size = (system.mv(u) - b).norm(dim=-1), b.norm(dim=-1)
        undefined = ~(b.isfinite().all(-1) & system.mv(torch.zeros_like(b)).isfinite().all(-1))
        bad = ~(undefined | (error <= torch.finfo(b.dtype).eps ** 0.5 * size))
        if bad.any():
            worst = (error / size)[bad].nan_to_num(nan=torch.inf).max().item()
            raise NotConvergedError(
                f"`linear_solver`: solve(mv, rhs) left a relative residual of {worst:.3g} in {int(bad.sum())} of "
                f"{bad.numel()} systems; the derivative would be wrong. Let it iterate longer, or use GMRES()."
            )
        return u


def as_solver(caller: str, solver: Any) -> LinearSolver:
    """What `linear_solver=` was given, as an object that factorises."""
    if solver is None:
        return LU()
    if isinstance(solver, type):
        raise ValueError(f"`{caller}`: `linear_solver` is the class {solver.__name__}; pass an object, {solver.__name__}().")
    if hasattr(solver, "factorise"):
        return solver
    if isinstance(solver, Krylov):
        return _ByValues(_Iteration(solver))
    if hasattr(solver, "values"):
        return _ByValues(solver)
    if callable(solver):
        return _ByValues(_Callable(solver))
    raise ValueError(
        f"`{caller}`: `linear_solver` is {solver!r}; choose LU(), Cholesky(), Triangular(), LeastSquares(), "
        "Banded(lower, upper), CG(), NormalCG(), GMRES(), BiCGStab(), or a callable solve(mv, rhs)."
    )


def iteration(solver: LinearSolver) -> Krylov | None:
    """The Krylov solver that stands behind one that `as_solver` made, if there is one."""
    values = solver.solver if type(solver) is _ByValues else None
    return values.krylov if type(values) is _Iteration else None


def with_jacobian(caller: str, solver: Any) -> LinearSolver:
    """A solver that uses a matrix close to the Jacobian: an iteration that it preconditions."""
    found = GMRES() if solver is None else solver
    if not isinstance(found, Krylov):
        raise ValueError(
            f"`{caller}`: `linear_solver` is {solver!r}; with has_jacobian=True the Jacobian that `solve` returned "
            "preconditions an iteration: leave it out, or choose GMRES(), BiCGStab(), CG() or NormalCG()."
        )
    return _Preconditioned(_Iteration(found))


@dataclass(frozen=True)
class _Preconditioned(_ByValues):
    def factorise(self, operator: JacobianOperator) -> Factors:
        """Under Dynamo, where nothing can iterate, the Jacobian is built after all."""
        return LU().factorise(operator) if torch.compiler.is_dynamo_compiling() else super().factorise(operator)
