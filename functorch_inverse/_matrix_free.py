r"""Solves with a Jacobian whose inside cannot be differentiated: their derivative comes from what they solve.

    A u = b    =>    A du = db - dA u
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from functorch_inverse import _torch
from functorch_inverse._pullback import Tensors, pushforward
from functorch_inverse.operators import Equation, JacobianOperator, MatVec

__all__ = ["System", "ValueSolver", "solve_by_values"]


class ValueSolver(Protocol):
    """Finds the value of u with A u = b."""

    def values(self, system: "System", b: Tensor) -> Tensor:
        """u for b of shape (*columns, *batch, n)."""
        ...


@dataclass(frozen=True, eq=False)
class System:
    """A u = b as an iteration sees it; A may be the transpose of a Jacobian.

    Vectors have the shape (*columns, *batch, n). `near` applies the inverse of a matrix that is close to A.
    """

    mv: MatVec
    rmv: MatVec
    transpose: bool
    sample_dims: int
    near: MatVec | None = None


def solve_by_values(A: JacobianOperator, solver: ValueSolver, b: Tensor, *, transpose: bool = False) -> Tensor:
    """u with A u = b (or A^T u = b), its value found by the solver."""
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(
            f"`{A.equation.caller}`: an iterative linear solver looks at values, which torch.compile cannot. Keep "
            "this call outside of the compiled region, or use a direct solver such as LU()."
        )
    if _torch.plain():
        return _values(A, solver, b, transpose)
    return _Solve.apply(A.equation, solver, transpose, len(A.y), b, *A.y, *A.theta)


def _values(A: JacobianOperator, solver: ValueSolver, b: Tensor, transpose: bool) -> Tensor:
    mv, rmv = (A.mv, A.rmv) if A.equation.near else A.products()  # what is near A leaves few products to take
    maps = (rmv, mv) if transpose else (mv, rmv)
    return solver.values(System(*maps, transpose, len(A.batch) + 1, _near(A, transpose)), b)


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


# With T = A or A^T, u = T^-1 b and a cotangent g of u:   w = T^-T g,   b receives w,   (y, theta) receive -d<w, T u>
#                                                         T du = db - dT u
class _Solve(Function):
    """u with A u = b, its value found by an iteration; b has the shape (*columns, *batch, n)."""

    @staticmethod
    def forward(equation: Equation, solver: ValueSolver, transpose: bool, n_y: int, b: Tensor, *point: Tensor) -> Tensor:
        y, theta = ([t.detach() for t in part] for part in (point[:n_y], point[n_y:]))
        with torch.no_grad():
            return _values(JacobianOperator(equation, y, theta), solver, b.detach(), transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.equation, ctx.solver, ctx.transpose, ctx.n_y, _, *point = inputs
        ctx.save_for_backward(output, *point)
        ctx.save_for_forward(output, *point)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if g is None:
            return tuple(nothing)
        u, *point = ctx.saved_tensors
        nothing[4] = w = _Solve.apply(ctx.equation, ctx.solver, not ctx.transpose, ctx.n_y, g, *point)
        wanted = [i for i in range(len(point)) if ctx.needs_input_grad[5 + i]]
        if wanted:
            pairing = _Pairing(ctx.equation, ctx.n_y, *((w, u) if not ctx.transpose else (u, w)))
            moved = pairing.gradient(point, wanted)
            for i, t in zip(wanted, moved, strict=True):
                nothing[5 + i] = -t
        return tuple(nothing)

    @staticmethod
    def jvp(ctx: Any, _e: None, _s: None, _t: None, _n: None, db: Tensor | None, *dpoint: Tensor | None) -> Tensor | None:
        with _torch.forward_mode_again():
            saved: list[Any] = [_torch.primal(t) for t in ctx.saved_tensors]
            u, *point = saved
            db, moved = _torch.primal(db), [_torch.primal(t) for t in dpoint]
            if any(t is not None for t in moved):
                change = _along(ctx.equation, ctx.n_y, ctx.transpose, u, point, moved)
                db = -change if db is None else db - change
            if db is None:
                return None
            return _Solve.apply(ctx.equation, ctx.solver, ctx.transpose, ctx.n_y, db, *point)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], equation: Equation, solver: Any, transpose: bool, n_y: int, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        (b, *point), (b_dim, *dims) = tensors, in_dims[4:]
        if all(d is None for d in dims):
            return _Solve.apply(equation, solver, transpose, n_y, b.movedim(b_dim, 0), *point), 0
        size, batch = info.batch_size, point[0].ndim - (dims[0] is not None) - equation.y_dims[0]
        led = [
            t.movedim(d, 0) if d is not None else t.expand(size, *t.shape) if i < n_y else t
            for i, (t, d) in enumerate(zip(point, dims, strict=True))
        ]
        place = b.ndim - (b_dim is not None) - batch - 1  # behind the columns, in front of the batch dims
        b = b.unsqueeze(place).expand(*b.shape[:place], size, *b.shape[place:]) if b_dim is None else b.movedim(b_dim, place)
        batched = equation.batched([d is not None for d in dims[n_y:]], info.randomness)
        return _Solve.apply(batched, solver, transpose, n_y, b, *led), place


@dataclass(frozen=True, eq=False)
class _Pairing:
    """<w, A(y, theta) u> as a function of the point."""

    equation: Equation
    n_y: int
    w: Tensor
    u: Tensor

    def gradient(self, point: Tensors, wanted: Sequence[int]) -> tuple[Tensor, ...]:
        def value(*chosen: Tensor) -> Tensor:
            everything = _replaced(point, wanted, chosen)
            operator = JacobianOperator(self.equation, everything[: self.n_y], everything[self.n_y :])
            return (operator.rmv(self.w) * self.u).sum()

        return torch.func.grad(value, tuple(range(len(wanted))))(*(point[i] for i in wanted))


def _along(equation: Equation, n_y: int, transpose: bool, u: Tensor, point: Tensors, moved: Sequence[Tensor | None]) -> Tensor:
    """dT u along tangents of the point."""

    def applied(_: Tensors, everything: Tensors) -> tuple[Tensor, ...]:
        operator = JacobianOperator(equation, everything[:n_y], everything[n_y:])
        return (operator.rmv(u) if transpose else operator.mv(u),)

    return pushforward(applied, (), point, moved)[0]


def _replaced(point: Tensors, wanted: Sequence[int], chosen: Tensors) -> list[Tensor]:
    everything = [_torch.at_current_level(t) for t in point]
    for i, t in zip(wanted, chosen, strict=True):
        everything[i] = t
    return everything
