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
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._composed import Tensors
from functorch_inverse._linear import Linearised, LinearSystem
from functorch_inverse._precision import full_precision
from functorch_inverse._solve import solve
from functorch_inverse._transforms import is_live
from functorch_inverse._vectors import Layout, Like
from functorch_inverse.linear_solvers import LinearSolver
from functorch_inverse.operators import Equation

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

    def forget(self) -> None:
        """Let go of what was kept for more derivatives."""
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
        return ImplicitRule(self.equation.batched(theta_is_batched, randomness), self.linear_solver)

    @functools.cached_property
    def system(self) -> LinearSystem:
        """What is solved for the derivatives of all orders."""
        return LinearSystem(self.equation, self.linear_solver)

    def forget(self) -> None:
        """Let go of factors."""
        if "system" in vars(self):
            self.system.forget()

    def vjp(self, y: Tensors, theta: Tensors, x: Sequence[Like], wanted: Sequence[int]) -> Pull:
        """The map from cotangents v of y to what x and the wanted theta receive.

        x's part has the batch shape of y and the layout of `x`.
        """
        dtypes, y, theta = [theta[i].dtype for i in wanted], widen(y), widen(theta)
        if _torch.plain():  # a saved output knows its node, which keeps what comes of this
            y, theta = (tuple([t.detach() for t in part]) for part in (y, theta))
        layout = Layout.of(x, self.x_dims)
        if torch.compiler.is_dynamo_compiling() or self._is_first(y, theta):
            at = Linearised(self.equation, self.linear_solver, y, theta, layout, wanted)
            solve_: Callable[[Tensors], Tensors] = functools.partial(at.solve, transpose=True)
            to_theta: Callable[[Tensors], Optional] = at.to_theta
        else:
            solve_ = functools.partial(solve, self.system, y=y, theta=theta, x=layout, transpose=True)
            to_theta = functools.partial(self.system.to_theta, y=y, theta=theta, x=layout, wanted=wanted)
        return functools.partial(_pull, solve_, to_theta, y, len(x), dtypes)

    def _is_first(self, y: Tensors, theta: Tensors) -> bool:
        """Whether f is to be evaluated here and now: by values for one order, or with operations to be differentiated."""
        if _torch.plain():
            return not self.system.last
        return self.system.differentiates_itself and any(map(is_live, (*y, *theta)))

    def jvp(self, y: Tensors, theta: Tensors, dx: Tensors, dtheta: Optional) -> tuple[Tensor, ...]:
        """The tangents of y."""
        with full_precision(y[0]):
            at, x, rhs = (widen(y), widen(theta)), Layout.of(dx, self.x_dims), widen(dx)
            if not rhs or any(t is not None for t in dtheta):
                along = [None if t is None else widen([t])[0] for t in dtheta]
                moved = self.system.along_theta(along, *at, x)
                rhs = tuple(r - m for r, m in zip(rhs, moved, strict=True)) if rhs else tuple(-m for m in moved)
            dy = solve(self.system, rhs, *at, x, transpose=False)
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
        with full_precision(y[0]):
            at = Linearised(self.equation, self.linear_solver, widen(y), widen(theta), Layout.of(x, self.x_dims))
            A = at.A
            if A.shape[0] != A.shape[1] and not frozen:
                _refuse_rectangular(self.equation.caller)
            A.frozen = frozen
            outputs = A.pullback.outputs
            residual = [out - t for out, t in zip(outputs, x, strict=True)] if x else list(outputs)
            step = at.solve([r - r.detach() for r in residual], transpose=False)
            if A.elementwise:
                return (_move_numbers(y[0], -step[0].to(y[0].dtype), residual[0]),)
            return tuple(move(t, -d.to(t.dtype), residual) for t, d in zip(y, step, strict=True))

    def residual_step(self, y: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        """A^-1 r: how far y is from the root of the residual, to first order."""
        with full_precision(y[0]):
            y, theta = widen(y), widen(theta)
            return tuple(solve(self.system, self.equation.f(y, theta), y, theta, Layout((), (), ()), transpose=False))

    def left_over(self, y: Tensors, theta: Tensors) -> tuple[Tensor, Tensor] | None:
        """Where there are more equations than unknowns: the largest |r| of each sample, and of the |A| |y| beside it."""
        with full_precision(y[0]):
            y = widen(y)
            A = self.system.at(y, widen(theta), Layout((), (), ())).A
            if A.shape[0] <= A.shape[1]:
                return None
            r, terms = A.outputs.pack(A.pullback.outputs, A.batch), A.inputs.pack(y, A.batch).abs().unsqueeze(-1)
            return r.abs().amax(-1), (A.as_matrix().abs() @ terms).amax((-2, -1))


def _pull(
    solve: Callable[[Tensors], Tensors],
    to_theta: Callable[[Tensors], Optional],
    y: Tensors,
    n_x: int,
    dtypes: Sequence[torch.dtype],
    v: Optional,
) -> tuple[Tensors, Optional]:
    u = solve(widen([torch.zeros_like(t) if c is None else c for c, t in zip(v, y, strict=True)]))
    received = to_theta([-t for t in u]) if dtypes else ()
    return u[:n_x], tuple(None if t is None else t.to(d) for t, d in zip(received, dtypes, strict=True))


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


def _refuse_rectangular(caller: str) -> None:
    raise NotImplementedError(
        f"`{caller}`: under torch.compile, LeastSquares has derivatives in plain backward passes only, not inside "
        "torch.func transforms. Keep the transform outside of the compiled region, or leave out torch.compile."
    )
