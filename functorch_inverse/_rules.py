r"""The mathematics of the derivatives, and nothing else.

Let f(y, theta) = x hold identically along y = g(x, theta). Differentiating both sides,

    A dy + C dtheta = dx,        A = df/dy,  C = df/dtheta,

    jvp:   dy = A^-1 (dx - C dtheta)
    vjp:   u = A^-T v,   x receives u,   theta receives -C^T u

A root r(y, theta) = 0 is the same without x. Source: Krantz and Parks, The Implicit Function
Theorem (2002), theorems 3.3.1 and 1.3.1; Blondel et al., Efficient and Modular Implicit
Differentiation (2022), section 2.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._pullback import Tensors, pushforward
from functorch_inverse._vectors import Layout, Like
from functorch_inverse.errors import StructureError
from functorch_inverse.linear_solvers import LinearSolver
from functorch_inverse.operators import Equation, JacobianOperator

__all__ = ["ImplicitRule", "Rule"]

Optional: TypeAlias = Sequence[Tensor | None]
Pull: TypeAlias = Callable[[Optional], tuple[Tensors, Optional]]


class Rule(Protocol):
    """The derivative of y to x and theta, as mathematics: nothing here knows how torch attaches it.

    y and x are leaves with common leading batch dims and an event each; theta are leaves of any shape.
    """

    @property
    def x_dims(self) -> tuple[int, ...]:
        """How many trailing dims of each leaf of x make up one sample."""
        ...

    def batched(self, theta_is_batched: Sequence[bool], randomness: str) -> "Rule":
        """The same rule where y, x and some of theta carry one more leading dim."""
        ...

    def vjp(self, y: Tensors, theta: Tensors, x: Sequence[Like], wanted: Sequence[int]) -> Pull:
        """The map from cotangents v of y to what x, and the wanted theta, receive; both in full precision."""
        ...

    def jvp(self, y: Tensors, theta: Tensors, dx: Tensors, dtheta: Optional) -> tuple[Tensor, ...]:
        """The tangents of y, from those of x and of some theta."""
        ...

    def reads_more(self, y: Tensors, theta: Tensors) -> bool:
        """Whether something else than y and theta would lose its derivative; asked while Dynamo traces."""
        ...

    def reattach(self, y: Tensors, x: Tensors, theta: Tensors, order: int) -> tuple[Tensor, ...]:
        """y, as an expression in the open graph whose derivatives are right up to an order."""
        ...


@dataclass(frozen=True, eq=False)
class ImplicitRule:
    """The derivative of y where f(y, theta) = x, or f(y, theta) = 0 and there is no x."""

    equation: Equation
    linear_solver: LinearSolver

    @property
    def x_dims(self) -> tuple[int, ...]:
        """How many trailing dims of each leaf of x make up one sample."""
        return self.equation.x_dims or ()

    def batched(self, theta_is_batched: Sequence[bool], randomness: str) -> "ImplicitRule":
        """The same rule where y, and some of theta, carry one more leading dim."""
        return replace(self, equation=self.equation.batched(theta_is_batched, randomness))

    def vjp(self, y: Tensors, theta: Tensors, x: Sequence[Like], wanted: Sequence[int]) -> Pull:
        """The map from cotangents v of y to what x and the wanted theta receive.

        x's part has the batch shape of y and the layout of `x`.
        """
        A = self._at(y, theta, Layout.of(x, self.x_dims), wanted)
        return functools.partial(self._pull, A, self._factors(A), len(x), [theta[i].dtype for i in wanted])

    def _pull(
        self, A: JacobianOperator, factors: Any, n_x: int, dtypes: Sequence[torch.dtype], v: Optional
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        v = widen([torch.zeros_like(t) if c is None else c for c, t in zip(v, A.y, strict=True)])
        u = self._solve(A, factors, v, transpose=True)
        if not dtypes:
            return u[:n_x], ()
        received = A.pullback.to_theta(tuple(-t.to(o.dtype) for t, o in zip(u, A.pullback.outputs, strict=True)))
        return u[:n_x], tuple(t.to(d) for t, d in zip(received, dtypes, strict=True))

    def jvp(self, y: Tensors, theta: Tensors, dx: Tensors, dtheta: Optional) -> tuple[Tensor, ...]:
        """The tangents of y."""
        with _torch.full_precision(y[0]):
            A = self._at(y, theta, Layout.of(dx, self.x_dims))
            rhs = [d.to(out.dtype) for d, out in zip(dx, A.pullback.outputs, strict=True)] if dx else None
            if rhs is None or any(t is not None for t in dtheta):
                along = [None if t is None else widen([t])[0] for t in dtheta]
                moved = pushforward(self.equation.f, A.y, A.theta, along)
                rhs = [-m for m in moved] if rhs is None else [r - m for r, m in zip(rhs, moved, strict=True)]
            dy = self._solve(A, self._factors(A), rhs, transpose=False)
            return tuple(d.to(t.dtype) for d, t in zip(dy, y, strict=True))

    def reads_more(self, y: Tensors, theta: Tensors) -> bool:
        """Whether f has a derivative to something else than y and theta; while Dynamo traces, at no cost."""
        outputs = self.equation.f([t.detach() for t in y], [t.detach() for t in theta])
        return any(t.requires_grad for t in outputs)

    # With r = f(y, theta) - x, one Newton step y - A^-1 (r - r.detach()) leaves the value of y as it is and
    # makes its derivatives right up to order 2k + 1 where they were right up to order k.
    def reattach(self, y: Tensors, x: Tensors, theta: Tensors, order: int) -> tuple[Tensor, ...]:
        """y by as many Newton steps as the order asks for."""
        right = 0
        while right < order:
            last = right + 1 >= order
            y = self._newton_step(y, x, theta, frozen=last)
            right = order if last else 2 * right + 1
        return tuple(y)

    def _newton_step(self, y: Tensors, x: Tensors, theta: Tensors, *, frozen: bool) -> tuple[Tensor, ...]:
        """`frozen` leaves out the derivative of A, which the last order asked for does not need."""
        with _torch.full_precision(y[0]):
            A = self._at(y, theta, Layout.of(x, self.x_dims))
            if A.shape[0] != A.shape[1] and not frozen:
                _refuse_rectangular(self.equation.caller)
            A.frozen = frozen
            outputs = A.pullback.outputs
            residual = [out - t for out, t in zip(outputs, x, strict=True)] if x else list(outputs)
            step = self._solve(A, self._factors(A), [r - r.detach() for r in residual], transpose=False)
            if A.elementwise:
                return (_move_numbers(y[0], -step[0].to(y[0].dtype), residual[0]),)
            return tuple(move(t, -d.to(t.dtype), residual) for t, d in zip(y, step, strict=True))

    def residual_step(self, y: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        """A^-1 r: how far y is from the root of the residual, to first order."""
        with _torch.full_precision(y[0]):
            A = self._at(y, theta, Layout((), (), ()))
            return self._solve(A, self._factors(A), A.pullback.outputs, transpose=False)

    def _at(self, y: Tensors, theta: Tensors, x: Layout, wanted: Sequence[int] = ()) -> JacobianOperator:
        """A at a point, in full precision."""
        A = JacobianOperator(self.equation, widen(y), widen(theta), wanted)
        if self.equation.x_dims is not None:
            _check_output(self.equation.caller, A.pullback.outputs, A.batch, x)
        return A

    def _factors(self, A: JacobianOperator) -> Any:
        """What serves every solve with A: its factors; where it is elementwise, its numbers."""
        if A.elementwise:
            return A.derivative()
        _check_shape(self.equation.caller, A, self.linear_solver)
        return self.linear_solver.factorise(A)

    def _solve(self, A: JacobianOperator, factors: Any, b: Tensors, *, transpose: bool) -> tuple[Tensor, ...]:
        """A^-1 b (as y), or A^-T b (as x)."""
        if isinstance(factors, Tensor):
            return (b[0] / factors,)
        source, target = (A.inputs, A.outputs) if transpose else (A.outputs, A.inputs)
        return target.unpack(factors.solve(source.pack(b, A.batch).to(A.dtype), transpose=transpose))


def move(y: Tensor, step: Tensor, live: Tensors) -> Tensor:
    """y + step, where the step is known to have the value zero.

    Where the step is nan (A is singular, or y infinite), the value stays y and the derivative to
    everything `live` is nan, without touching the other samples.
    """
    defined = step.isfinite()
    unknown = undefined(live, ~defined)
    return torch.where(defined, y + step, y + unknown.to(y.dtype))


def _move_numbers(y: Tensor, step: Tensor, residual: Tensor) -> Tensor:
    """The same where each number is a sample of its own: nothing is summed, so a compiler can fuse it all."""
    defined = step.isfinite()
    unknown = torch.where(defined, 1, residual - residual.detach()).abs().sqrt()
    return torch.where(defined, y + step, y + unknown.to(y.dtype))


def poisoned(leaves: Tensors, lost: Tensors) -> tuple[Tensor, ...]:
    """The same values, with the derivative nan to what a trace would lose without a word."""
    if not lost:
        return tuple(leaves)
    return tuple(t + undefined(lost, torch.ones_like(t, dtype=torch.bool)).to(t.dtype) for t in leaves)


def undefined(live: Tensors, mask: Tensor) -> Tensor:
    """Where masked zero, with the derivative nan to everything live: sqrt|s| at s = 0. Elsewhere one.

    The mask acts inside the root: the derivative of what is not used must be finite, or 0 * inf would
    reach what is used.
    """
    nothing = [torch.where(t.isfinite(), t - t.detach(), 0).abs().sum() for t in live]
    return torch.where(mask, functools.reduce(torch.add, nothing), 1).sqrt()


def widen(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Half precision in float32, everything else as it is."""
    # Also where nothing changes: an operation takes off what a closed transform left around a saved tensor.
    return tuple([t.to(_WIDER.get(t.dtype, t.dtype)) for t in tensors])


_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}


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


def _refuse_rectangular(caller: str) -> None:
    raise NotImplementedError(
        f"`{caller}`: under torch.compile, LeastSquares has derivatives in plain backward passes only, not inside "
        "torch.func transforms. Keep the transform outside of the compiled region, or leave out torch.compile."
    )
