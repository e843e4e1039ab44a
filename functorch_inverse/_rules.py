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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._pullback import Function, Pullback, Tensors, jacobian, pushforward
from functorch_inverse._vectors import Layout, batch_shape
from functorch_inverse.errors import StructureError
from functorch_inverse.linear_solvers import LinearSolver

__all__ = ["ImplicitRule", "Rule"]

Optional = Sequence[Tensor | None]


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

    def vjp(
        self, y: Tensors, theta: Tensors, x: Layout, v: Optional, wanted: Sequence[int]
    ) -> tuple[Tensors, Optional]:
        """What x, and the wanted theta, receive from the cotangents v of y."""
        ...

    def jvp(self, y: Tensors, theta: Tensors, dx: Tensors, dtheta: Optional) -> tuple[Tensor, ...]:
        """The tangents of y, from those of x and of some theta."""
        ...

    def reattach(self, y: Tensors, x: Tensors, theta: Tensors, order: int) -> tuple[Tensor, ...]:
        """y, as an expression in the open graph whose derivatives are right up to an order."""
        ...


def vmapped(f: Function, first: int | None, theta_is_batched: Sequence[bool], randomness: str) -> Function:
    """f of two groups of leaves, where the first (if batched) and some of theta carry one more leading dim."""
    dims = tuple(0 if b else None for b in theta_is_batched)

    def mapped(leading: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        n = len(leading)
        in_dims = (first,) * n + dims
        return torch.vmap(lambda *t: f(t[:n], t[n:]), in_dims=in_dims, randomness=randomness)(*leading, *theta)

    return mapped


@dataclass(frozen=True, eq=False)
class ImplicitRule:
    """The derivative of y where f(y, theta) = x.

    `f` takes y leaves (*batch, *event) with any number of leading dims, and theta leaves of any shape.
    """

    caller: str
    f: Function
    y_dims: tuple[int, ...]
    x_dims: tuple[int, ...]
    linear_solver: LinearSolver

    def batched(self, theta_is_batched: Sequence[bool], randomness: str) -> "ImplicitRule":
        """The same rule where y, and some of theta, carry one more leading dim."""
        return replace(self, f=vmapped(self.f, 0, theta_is_batched, randomness))

    def vjp(
        self, y: Tensors, theta: Tensors, x: Layout, v: Optional, wanted: Sequence[int]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What x and the wanted theta receive from the cotangents v of y.

        x's part has the batch shape of y and the layout `x`.
        """
        with _torch.full_precision(y[0]):
            wide, dtypes = widen(theta), [theta[i].dtype for i in wanted]
            point = _Point(self, widen(y), wide, x, wanted)
            v = widen([torch.zeros_like(t) if c is None else c for c, t in zip(v, y, strict=True)])
            u = point.solve(v, transpose=True)
            if not wanted:
                return u, ()
            received = point.pullback.to_theta(tuple(-t for t in point.like_output(u)))
            return u, tuple(t.to(d) for t, d in zip(received, dtypes, strict=True))

    def jvp(self, y: Tensors, theta: Tensors, dx: Tensors, dtheta: Optional) -> tuple[Tensor, ...]:
        """The tangents of y."""
        with _torch.full_precision(y[0]):
            wide_y, wide = widen(y), widen(theta)
            point = _Point(self, wide_y, wide, Layout.of(dx, self.x_dims), ())
            rhs = [d.to(out.dtype) for d, out in zip(dx, point.pullback.outputs, strict=True)]
            if any(t is not None for t in dtheta):
                moved = pushforward(self.f, wide_y, wide, [None if t is None else widen([t])[0] for t in dtheta])
                rhs = [r - m for r, m in zip(rhs, moved, strict=True)]
            dy = point.solve(rhs, transpose=False)
            return tuple(d.to(t.dtype) for d, t in zip(dy, y, strict=True))

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
            point = _Point(self, widen(y), widen(theta), Layout.of(x, self.x_dims), ())
            residual = [out - t for out, t in zip(point.pullback.outputs, x, strict=True)]
            step = point.solve([r - r.detach() for r in residual], transpose=False, frozen=frozen)
            return tuple(move(t, -d.to(t.dtype), residual) for t, d in zip(y, step, strict=True))


class _Point:
    """A, evaluated at one (y, theta)."""

    def __init__(self, rule: ImplicitRule, y: Tensors, theta: Tensors, x: Layout, wanted: Sequence[int]) -> None:
        self.y, self.batch = y, batch_shape(y, rule.y_dims, rule.caller, "y")
        self.pullback = Pullback.of(rule.f, y, theta, wanted)
        self.outputs = Layout.of(self.pullback.outputs, rule.x_dims)
        _check_output(rule.caller, self.pullback.outputs, self.batch, x)
        self.inputs = Layout.of(y, rule.y_dims)
        # One real number a sample: A is a derivative, not a matrix, and 1 / 0 is inf as in torch.
        self.elementwise = rule.y_dims == rule.x_dims == (0,) and self.inputs.size == self.outputs.size == 1
        self.rule = rule

    def solve(self, b: Tensors, *, transpose: bool, frozen: bool = False) -> tuple[Tensor, ...]:
        """A^-1 b (as y), or A^-T b (as x); a frozen A has no derivative."""
        source, target = (self.inputs, self.outputs) if transpose else (self.outputs, self.inputs)
        matrix = self.matrix()
        matrix = matrix.detach() if frozen else matrix
        if self.elementwise:
            return (b[0] / matrix,)
        packed = source.pack(b, self.batch)
        return target.unpack(self.rule.linear_solver.factorise(matrix).solve(packed, transpose=transpose))

    def matrix(self) -> Tensor:
        """A of shape (*batch, x size, y size); where it is elementwise, its numbers."""
        if self.elementwise:
            (out,) = self.pullback.outputs
            return self.pullback.to_y((torch.ones((), dtype=out.dtype, device=out.device).expand_as(out),))[0]

        def pull(row: Tensor) -> Tensor:
            return self.inputs.pack(self.pullback.to_y(self.outputs.unpack(row)), self.batch)

        return jacobian(pull, self.batch, self.outputs.size, self.pullback.outputs[0])

    def like_output(self, u: Tensors) -> tuple[Tensor, ...]:
        return tuple(t.to(o.dtype) for t, o in zip(u, self.pullback.outputs, strict=True))


def move(y: Tensor, step: Tensor, live: Tensors) -> Tensor:
    """y + step, where the step is known to have the value zero.

    Where the step is nan (A is singular, or y infinite), the value stays y and the derivative to
    everything `live` is nan, without touching the other samples.
    """
    defined = step.isfinite()
    unknown = undefined(live, ~defined)
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
    return tuple(t.to(_WIDER.get(t.dtype, t.dtype)) for t in tensors)


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
