"""f linearised at a point: A = df/dy ready to be solved with, and C = df/dtheta.

Whatever is open, and for derivatives of all orders, f is evaluated once by values alone, and A factorised once.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_inverse._composed import Tensors, pullback_to_theta, pushforward
from functorch_inverse._levels import memory_of, sink
from functorch_inverse._pullback import GraphPullback
from functorch_inverse._vectors import Layout
from functorch_inverse.errors import StructureError
from functorch_inverse.linear_solvers import LinearSolver
from functorch_inverse.operators import Equation, JacobianOperator

__all__ = ["LinearSystem", "Linearised", "each_column"]

Optional: TypeAlias = Sequence[Tensor | None]


@dataclass(frozen=True, eq=False)
class LinearSystem:
    """What is solved, and how."""

    equation: Equation
    solver: LinearSolver
    # What was found at the last point, and the systems of vmapped equations.
    last: "list[tuple[Any, Linearised]]" = field(default_factory=list)
    vmapped: "dict[Any, LinearSystem]" = field(default_factory=dict)

    def batched(self, theta_is_batched: Sequence[bool], randomness: str) -> "LinearSystem":
        """The same where y, and some of theta, carry one more leading dim."""
        key = tuple(theta_is_batched), randomness
        if key not in self.vmapped:
            self.vmapped[key] = LinearSystem(self.equation.batched(*key), self.solver)
        return self.vmapped[key]

    def forget(self) -> None:
        """Let go of what was found."""
        self.last.clear()
        self.vmapped.clear()

    @property
    def differentiates_itself(self) -> bool:
        """Whether a solve is differentiated like any other function: it may not be exact, or is but a division."""
        elementwise = self.equation.y_dims == (0,) and self.equation.x_dims in ((0,), None)
        return elementwise or not getattr(self.solver, "exact", False)

    def at(self, y: Tensors, theta: Tensors, x: Layout) -> "Linearised":
        """f at plain values; once for all orders."""
        y, theta = ([t.detach() for t in part] for part in (y, theta))
        memory = memory_of((*y, *theta))
        for known, found in tuple(self.last):
            if known == memory:
                return found
        found = Linearised(self.equation, self.solver, y, theta, x)
        self.last[:] = [] if memory is None else [(memory, found)]
        return found

    def to_theta(self, u: Tensors, y: Tensors, theta: Tensors, x: Layout, wanted: Sequence[int]) -> Tensors:
        """C^T u, for the wanted theta."""

        def found(at_hand: bool, u: Tensors, y: Tensors, theta: Tensors) -> Tensors:
            if at_hand:
                return self.at(y, theta, x).graph(wanted).pull([len(y) + i for i in wanted], u)
            return pullback_to_theta(self.equation.f, y, theta, wanted, u)

        return sink(found, u, y, theta)

    def along_theta(self, tangents: Optional, y: Tensors, theta: Tensors, x: Layout) -> Tensors:
        """C times tangents of some theta."""
        wanted = [i for i, t in enumerate(tangents) if t is not None]

        def found(at_hand: bool, moved: Tensors, y: Tensors, theta: Tensors) -> Tensors:
            if at_hand:
                return self.at(y, theta, x).graph(wanted).push_along([len(y) + i for i in wanted], moved)
            return pushforward(self.equation.f, y, theta, wanted, moved)

        return sink(found, [t for t in tangents if t is not None], y, theta)


class Linearised:
    """f and its Jacobian A at a point; `x` describes what f should return."""

    def __init__(
        self, equation: Equation, solver: LinearSolver, y: Tensors, theta: Tensors, x: Layout, wanted: Sequence[int] = ()
    ) -> None:
        self.solver = solver
        self.prepared: Any = None
        self.complete: GraphPullback | None = None
        self.A = JacobianOperator(equation, y, theta, wanted)
        if equation.x_dims is not None:
            _check_output(equation.caller, self.A.pullback.outputs, self.A.batch, x)

    def graph(self, of_theta: Sequence[int]) -> GraphPullback:
        """f at plain values, to be differentiated in y and, if in any theta at all, in all of them."""
        A = self.A
        # What was found in inference mode has no graph, and serves a backward pass, where there can be one.
        if not of_theta and isinstance(A.pullback, GraphPullback):
            return A.pullback
        if self.complete is None:
            floating = [i for i, t in enumerate(A.theta) if t.is_floating_point() or t.is_complex()]
            self.complete = GraphPullback(A.equation.f, A.y, A.theta, floating)
        return self.complete

    def factors(self) -> Any:
        """What serves every solve with A: its factors; where it is elementwise, its numbers."""
        if self.prepared is None:
            if self.A.elementwise:
                self.prepared = self.A.derivative()
            else:
                _check_shape(self.A.equation.caller, self.A, self.solver)
                self.prepared = self.solver.factorise(self.A)
        return self.prepared

    def solve(self, b: Tensors, *, transpose: bool, columns: int = 0) -> tuple[Tensor, ...]:
        """A^-1 b (as y), or A^-T b (as f(y)); b may have columns in front of the batch dims."""
        A, factors = self.A, self.factors()
        if isinstance(factors, Tensor):
            return (b[0] / factors,)
        source, target = (A.inputs, A.outputs) if transpose else (A.outputs, A.inputs)
        packed = source.pack(b, (*b[0].shape[:columns], *A.batch)).to(A.dtype)
        one = functools.partial(factors.solve, transpose=transpose)
        if getattr(factors, "takes_columns", False):
            return target.unpack(one(packed))
        # Whoever wrote the solver may change what is given, or give it back.
        return target.unpack(each_column(one, columns, packed.clone()))

    def to_theta(self, u: Tensors) -> Optional:
        """C^T u."""
        pullback = self.A.pullback
        return pullback.to_theta(tuple(t.to(o.dtype) for t, o in zip(u, pullback.outputs, strict=True)))


def each_column(function: Callable[..., Any], columns: int, *tensors: Tensor) -> Any:
    """A function of tensors with some number of leading dims, which it does not know of."""
    return function(*tensors) if not columns else torch.vmap(lambda *t: each_column(function, columns - 1, *t))(*tensors)


def _check_output(caller: str, outputs: Sequence[Tensor], batch: torch.Size, x: Layout) -> None:
    for out, shape, dtype in zip(outputs, x.shapes, x.dtypes, strict=True):
        if out.shape == (*batch, *shape) and out.is_complex() == dtype.is_complex:
            continue
        raise StructureError(
            f"`{caller}`: f(y, *args) gave shape {tuple(out.shape)} and {out.dtype} where x asks for "
            f"{(*batch, *shape)} and {'a complex' if dtype.is_complex else 'a real'} dtype (batch dims of y, then "
            "the event dims of x). f must map y back to x; check `event_dim`, or squeeze what f returns."
        )


def _check_shape(caller: str, A: JacobianOperator, solver: LinearSolver) -> None:
    rows, columns = A.shape
    if rows != columns and not getattr(solver, "rectangular", False):
        raise StructureError(
            f"`{caller}`: one sample has {rows} equations (numbers of the residual) for {columns} unknowns (numbers of y), so "
            "the Jacobian has no inverse. State as many equations as unknowns, check `event_dim`, or pass "
            "linear_solver=LeastSquares(), which asserts the minimum-norm solution."
        )
