r"""The mathematics of the derivatives, and nothing else.

Let f(y, theta) = x hold identically along y = g(x, theta). Differentiating both sides,

    A dy + C dtheta = dx,        A = df/dy,  C = df/dtheta,

    jvp:   dy = A^-1 (dx - C dtheta)
    vjp:   u = A^-T v,   x receives u,   theta receives -C^T u

A root r(y, theta) = 0 is the same without x. Source: Krantz and Parks, The Implicit Function
Theorem (2002), theorems 3.3.1 and 1.3.1; Blondel et al., Efficient and Modular Implicit
Differentiation (2022), section 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._pullback import Function, Pullback, Tensors, jacobian, pushforward
from functorch_inverse._vectors import Layout, batch_shape
from functorch_inverse.errors import StructureError
from functorch_inverse.linear_solvers import LinearSolver

__all__ = ["ImplicitRule"]

Optional = Sequence[Tensor | None]


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
        dims = tuple(0 if b else None for b in theta_is_batched)
        f = self.f

        def mapped(y: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
            return torch.vmap(
                lambda *leaves: f(leaves[: len(y)], leaves[len(y) :]),
                in_dims=(0,) * len(y) + dims,
                randomness=randomness,
            )(*y, *theta)

        return replace(self, f=mapped)

    def vjp(
        self, y: Tensors, theta: Tensors, x: Layout, v: Optional, wanted: Sequence[int]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What x and the wanted theta receive from the cotangents v of y.

        x's part has the batch shape of y and the layout `x`.
        """
        with _torch.full_precision(y[0]):
            wide, dtypes = _widen(theta), [theta[i].dtype for i in wanted]
            point = _Point(self, _widen(y), wide, x, wanted)
            v = _widen([torch.zeros_like(t) if c is None else c for c, t in zip(v, y, strict=True)])
            u = point.solve(v, transpose=True)
            if not wanted:
                return u, ()
            received = point.pullback.to_theta(tuple(-t for t in point.like_output(u)))
            return u, tuple(t.to(d) for t, d in zip(received, dtypes, strict=True))

    def jvp(self, y: Tensors, theta: Tensors, x: Layout, dx: Optional, dtheta: Optional) -> tuple[Tensor, ...]:
        """The tangents of y."""
        with _torch.full_precision(y[0]):
            wide_y, wide = _widen(y), _widen(theta)
            point = _Point(self, wide_y, wide, x, ())
            rhs = [torch.zeros_like(t) for t in point.pullback.outputs]
            rhs = [r if d is None else r + d for r, d in zip(rhs, dx, strict=True)] if dx else rhs
            if any(t is not None for t in dtheta):
                moved = pushforward(self.f, wide_y, wide, [None if t is None else _widen([t])[0] for t in dtheta])
                rhs = [r - m for r, m in zip(rhs, moved, strict=True)]
            dy = point.solve(rhs, transpose=False)
            return tuple(d.to(t.dtype) for d, t in zip(dy, y, strict=True))

    def newton_step(self, y: Tensors, x: Tensors, theta: Tensors, *, frozen: bool) -> tuple[Tensor, ...]:
        """y - A^-1 (r - r.detach()) with r = f(y, theta) - x: the value of y, and a derivative more.

        `frozen` leaves out the derivative of A, which the last order asked for does not need.
        """
        point = _Point(self, _widen(y), _widen(theta), Layout.of(x, self.x_dims), ())
        residual = [out - t for out, t in zip(point.pullback.outputs, x, strict=True)]
        step = point.solve([r - r.detach() for r in residual], transpose=False, frozen=frozen)
        return tuple(_step(t, d.to(t.dtype), residual) for t, d in zip(y, step, strict=True))


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
        packed, matrix = source.pack(b, self.batch), self.matrix()
        matrix = matrix.detach() if frozen else matrix
        if self.elementwise:
            return target.unpack(packed / matrix[..., 0])
        return target.unpack(self.rule.linear_solver.factorise(matrix).solve(packed, transpose=transpose))

    def matrix(self) -> Tensor:
        """A of shape (*batch, x size, y size)."""

        def pull(row: Tensor) -> Tensor:
            return self.inputs.pack(self.pullback.to_y(self.outputs.unpack(row)), self.batch)

        if self.elementwise:
            return pull(torch.ones_like(self.inputs.pack(self.y, self.batch))).unsqueeze(-1)
        return jacobian(pull, self.batch, self.outputs.size, self.pullback.outputs[0])

    def like_output(self, u: Tensors) -> tuple[Tensor, ...]:
        return tuple(t.to(o.dtype) for t, o in zip(u, self.pullback.outputs, strict=True))


def _step(y: Tensor, step: Tensor, residual: Tensors) -> Tensor:
    """y - step, where the step is known to have the value zero.

    Where A is singular or y infinite the step is nan: there the value stays y and the derivative is nan
    (sqrt|s| at s = 0), without touching the other samples.
    """
    defined = step.isfinite()
    nothing = sum(torch.where(r.isfinite(), r, 0).abs().sum() for r in residual)
    undefined = torch.where(defined, 1, (nothing - nothing.detach()).abs()).sqrt()
    return torch.where(defined, y - step, y + undefined.to(y.dtype))


def _widen(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
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
