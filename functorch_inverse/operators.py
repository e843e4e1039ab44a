r"""The Jacobian of an equation at a point, as an operator: what a linear solver sees.

    f(y, theta) = x,    A = df/dy,    mv: A v,    rmv: A^T w

A solve whose inside cannot be differentiated (an iteration) gets its derivative from what it solves:

    A u = b    =>    A du = db - dA u
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function as AutogradFunction

from functorch_inverse import _torch
from functorch_inverse._pullback import Function, Pullback, Tensors, jacobian, pushforward
from functorch_inverse._vectors import Layout, batch_shape
from functorch_inverse.errors import StructureError

__all__ = ["Equation", "JacobianOperator", "MatVec", "ValueSolver", "vmapped"]

MatVec: TypeAlias = Callable[[Tensor], Tensor]


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
    near: MatVec | None = None


def vmapped(f: Function, first: int | None, theta_is_batched: Sequence[bool], randomness: str) -> Function:
    """f of two groups of leaves, where the first (if batched) and some of theta carry one more leading dim."""
    dims = tuple(0 if b else None for b in theta_is_batched)

    def mapped(leading: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        n = len(leading)
        in_dims = (first,) * n + dims
        return torch.vmap(lambda *t: f(t[:n], t[n:]), in_dims=in_dims, randomness=randomness)(*leading, *theta)

    return mapped


@dataclass(frozen=True, eq=False)
class Equation:
    """f(y, theta) = x, or f(y, theta) = 0 where `x_dims` is None.

    `f` takes y leaves (*batch, *event) with any number of leading dims, and theta leaves of any shape. The
    last `near` of theta are no arguments of f but a matrix (*batch, n, n) close to its Jacobian, or (LU, pivots) of it.
    """

    caller: str
    f: Function
    y_dims: tuple[int, ...]
    x_dims: tuple[int, ...] | None
    near: int = 0

    def batched(self, theta_is_batched: Sequence[bool], randomness: str) -> "Equation":
        """The same equation where y, and some of theta, carry one more leading dim."""
        return replace(self, f=vmapped(self.f, 0, theta_is_batched, randomness))


class JacobianOperator:
    """A = df/dy at (y, theta): one matrix a sample, differentiable with respect to y and theta.

    Vectors are real and packed: (*columns, *batch, n) with any number of column dims in front.
    """

    def __init__(self, equation: Equation, y: Tensors, theta: Tensors, wanted: Sequence[int] | None = ()) -> None:
        self.equation, self.y, self.theta = equation, y, theta
        self.batch = batch_shape(y, equation.y_dims, equation.caller, "y")
        # None: f reads everything but y by itself, in the open graph.
        self.pullback = Pullback.open(equation.f, y) if wanted is None else Pullback.of(equation.f, y, theta, wanted)
        outputs = self.pullback.outputs
        self.x_dims = equation.x_dims or _root_dims(equation, outputs, self.batch)
        # The leaves as one vector: what A is applied to, and what it gives.
        self.inputs, self.outputs = Layout.of(y, equation.y_dims), Layout.of(outputs, self.x_dims)
        self.frozen = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of A."""
        return self.outputs.size, self.inputs.size

    @property
    def elementwise(self) -> bool:
        """One real number a sample: A is a derivative, not a matrix, and 1 / 0 is inf as in torch."""
        real = not any(t.is_complex() for t in (*self.y, *self.pullback.outputs))
        return real and self.equation.y_dims == self.x_dims == (0,)

    def derivative(self) -> Tensor:
        """The numbers of an elementwise A."""
        (out,) = self.pullback.outputs
        ones = torch.ones((), dtype=out.dtype, device=out.device).expand_as(out)
        return self._froze(self.pullback.to_y((ones,))[0])

    def as_matrix(self) -> Tensor:
        """A of shape (*batch, rows, columns), by one pass of f backward for each row, or at once."""
        A, vectors = self.pullback, self.inputs.is_vector and self.outputs.is_vector
        if not vectors or (matrix := A.matrix()) is None:
            matrix = jacobian(self._pull, self.batch, self.outputs.size, A.outputs[0], plain=A.in_open_graph)
        return self._froze(matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix)

    def rows(self, cotangents: Tensor) -> Tensor:
        """A^T times cotangents (k, m), each of them in every sample: (k, *batch, n)."""
        expanded = cotangents.reshape(-1, *(1,) * len(self.batch), cotangents.shape[-1]).expand(-1, *self.batch, -1)
        if _torch.plain() or self.pullback.in_open_graph:
            return torch.stack([self._pull(w) for w in expanded])
        return self._froze(self.rmv(expanded))

    def mv(self, v: Tensor) -> Tensor:
        """A v."""
        return self._columns(self._push, v)

    def rmv(self, w: Tensor) -> Tensor:
        """A^T w."""
        return self._columns(self._pull, w)

    def solve(self, solver: ValueSolver, b: Tensor, *, transpose: bool = False) -> Tensor:
        """u with A u = b (or A^T u = b), its value found by the solver."""
        if torch.compiler.is_dynamo_compiling():
            raise NotImplementedError(
                f"`{self.equation.caller}`: an iterative linear solver looks at values, which torch.compile cannot. Keep "
                "this call outside of the compiled region, or use a direct solver such as LU()."
            )
        if _torch.plain():
            return self._values(solver, b, transpose)
        return _Solve.apply(self.equation, solver, transpose, len(self.y), b, *self.y, *self.theta)

    def _values(self, solver: ValueSolver, b: Tensor, transpose: bool) -> Tensor:
        maps = (self.rmv, self.mv) if transpose else (self.mv, self.rmv)
        return solver.values(System(maps[0], maps[1], transpose, self._near(transpose)), b)

    def _near(self, transpose: bool) -> MatVec | None:
        if not self.equation.near:
            return None
        factors = self.theta[-self.equation.near :]
        lu, pivots = factors if len(factors) == 2 else torch.linalg.lu_factor_ex(factors[0])[:2]

        def apply(v: Tensor) -> Tensor:
            count = v.ndim - len(self.batch) - 1
            columns = v.movedim(tuple(range(count)), tuple(range(-count, 0))).reshape(*self.batch, v.shape[-1], -1)
            found = torch.linalg.lu_solve(lu, pivots, columns, adjoint=transpose)
            back = found.unflatten(-1, v.shape[:count]) if count else found.squeeze(-1)
            back = back.movedim(tuple(range(-count, 0)), tuple(range(count))) if count else back
            return torch.where(back.isfinite().all(-1, keepdim=True), back, v)  # a singular one helps nobody

        return apply

    def _froze(self, result: Tensor) -> Tensor:
        return result.detach() if self.frozen else result

    def _pull(self, w: Tensor) -> Tensor:
        return self.inputs.pack(self.pullback.to_y(self.outputs.unpack(w)), self.batch)

    def _push(self, v: Tensor) -> Tensor:
        return self.outputs.pack(self.pullback.push(self.inputs.unpack(v)), self.batch)

    def _columns(self, one: MatVec, v: Tensor) -> Tensor:
        count = v.ndim - len(self.batch) - 1
        if not count:
            return one(v)
        if not v.shape[:count].numel():
            return v.new_empty((*v.shape[:-1], self.shape[0] if one == self._push else self.shape[1]))
        return torch.vmap(one)(v.flatten(0, count - 1)).unflatten(0, v.shape[:count])


def _root_dims(equation: Equation, outputs: Tensors, batch: torch.Size) -> tuple[int, ...]:
    """What is left of each leaf of a residual behind the batch dims of y."""
    for out in outputs:
        if out.shape[: len(batch)] != batch:
            raise StructureError(
                f"`{equation.caller}`: the function has a leaf of shape {tuple(out.shape)} where the batch dims of y, "
                f"{tuple(batch)}, must come first. It has to treat the samples of a batch independently; check `event_dim`."
            )
    return tuple(out.ndim - len(batch) for out in outputs)


# With T = A or A^T, u = T^-1 b and a cotangent g of u:   w = T^-T g,   b receives w,   (y, theta) receive -d<w, T u>
#                                                         T du = db - dT u
class _Solve(AutogradFunction):
    """u with A u = b, its value found by an iteration; b has the shape (*columns, *batch, n)."""

    @staticmethod
    def forward(equation: Equation, solver: ValueSolver, transpose: bool, n_y: int, b: Tensor, *point: Tensor) -> Tensor:
        y, theta = ([t.detach() for t in part] for part in (point[:n_y], point[n_y:]))
        with torch.no_grad():
            return JacobianOperator(equation, y, theta)._values(solver, b.detach(), transpose)

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
