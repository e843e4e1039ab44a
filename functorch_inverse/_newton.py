r"""Newton's method with a line search, for samples that are vectors.

    y <- y - t d,      A d = f(y) - x,      A = df/dy

The residual norm falls along d for small t, so t is halved or more until it does; then t = 1 in the end and
the error is squared in every step. Where A has no inverse, (A^T A + mu I) d = A^T (f(y) - x) takes its place.

Source: Dennis and Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear Equations (1996),
algorithms A6.3.1 (line search) and A5.5.1 (singular A).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._equation import largest
from functorch_inverse._status import DONE, RUNNING, STUCK, UNDEFINED, Options, chosen

__all__ = ["NewtonState", "advanced", "arrived"]


class NewtonState(NamedTuple):
    """Where a sample is, and where it tries next: y - length * direction."""

    y: Tensor
    residual: Tensor
    trial: Tensor
    status: Tensor
    direction: Tensor
    length: Tensor
    # What makes the equations comparable: one over the size of each.
    weight: Tensor
    # A residual that rounding errors here may be the reason of.
    floor: Tensor


def arrived(x: Tensor, y: Tensor, residual: Tensor, matrix: Tensor, before: Tensor, options: Options) -> NewtonState:
    """The state at a point that is believed; `before` is the residual at the last one, 0 at the start."""
    # The size of rounding errors: x and the terms of A y are what f(y) - x is made of. Each equation has its own.
    scale, error = x.abs() + (matrix.abs() @ y.abs().unsqueeze(-1)).squeeze(-1), residual.abs()
    weight = 1 / (scale + error).clamp_min(torch.finfo(y.dtype).tiny)
    direction = _direction(weight.unsqueeze(-1) * matrix, weight * residual)
    done = _done(x, error, before.abs(), scale, options).all(-1)
    finite = residual.isfinite().all(-1)
    status = torch.where(direction.isfinite().all(-1) & finite, RUNNING, torch.where(finite, STUCK, UNDEFINED))
    trial = y - direction
    # Once more without a look at f, since the step is known: it squares an error that is small already, in each number.
    size = options.eps**0.25 * y.abs() + options.eps**0.75 * largest(y).unsqueeze(-1)
    y = chosen(done & (direction.abs() <= size).all(-1), trial, y)
    length = torch.ones_like(x[..., :1].sum(-1))
    floor = _ROUNDING * options.eps * scale + _smallest(y)
    return NewtonState(y, residual, trial, torch.where(done, DONE, status), direction, length, weight, floor)


# How many rounding errors f may be made of.
_ROUNDING = 100


# That A y is large makes a residual small only where A holds: close to a pole of f it does not, and Newton's steps are
# slow there. So the last step must have paid.
def _done(x: Tensor, error: Tensor, before: Tensor, scale: Tensor, options: Options) -> Tensor:
    """Which equations hold."""
    quick = (error <= before / 4) | (error <= 4 * options.eps * scale)
    small = (error <= options.atol + options.rtol * scale) & quick & scale.isfinite()
    return small | (error <= options.atol + options.rtol * x.abs() + _smallest(x))


def _smallest(x: Tensor) -> float:
    """Below, numbers lose their digits: y -> 0 where x is 0 has no other end."""
    return 16 * torch.finfo(x.dtype).tiny


def advanced(
    state: NewtonState, x: Tensor, residual: Tensor, jacobian: Callable[[], Tensor], options: Options
) -> NewtonState:
    """Go to the point that was tried; stay, and try a shorter step the next time, where it is no better."""
    before, after = (torch.linalg.vector_norm(state.weight * r, dim=-1) for r in (state.residual, residual))
    better = after <= (1 - 1e-4 * state.length) * before
    stay = _shorter(state, x, after / before, options)
    if _torch.can_inspect(better) and not better.any():
        return stay
    go = arrived(x, state.trial, residual, jacobian(), state.residual, options)
    return NewtonState(*(chosen(better, a, b) for a, b in zip(go, stay, strict=True)))


def _shorter(state: NewtonState, x: Tensor, ratio: Tensor, options: Options) -> NewtonState:
    """The minimum of the parabola through |r|^2 at 0, its slope there and its value at t, within [t / 10, t / 2]."""
    t = state.length
    best = (t**2 / (ratio**2 - 1 + 2 * t)).nan_to_num(nan=0.0)
    length = torch.minimum(torch.maximum(best, 0.1 * t), 0.5 * t)
    # A residual of this size is all rounding: no step makes it smaller. Elsewhere a shorter one may; where many do not,
    # and half the digits of x and of y are right, f loses the others inside.
    rounded = (state.residual.abs() <= state.floor).all(-1)
    half = (state.residual.abs() <= options.eps**0.5 * x.abs()).all(-1)
    half = half & (largest(state.direction) <= options.eps**0.5 * largest(state.y))
    exhausted = rounded | (half & (length < 0.01))
    status = torch.where(exhausted, DONE, torch.where(length < options.eps**0.75, STUCK, state.status))
    return state._replace(trial=state.y - length.unsqueeze(-1) * state.direction, length=length, status=status)


def _direction(matrix: Tensor, residual: Tensor) -> Tensor:
    """A^-1 r; where A has no inverse, a regularised one."""
    direction = _solve(matrix, residual)
    regular = direction.isfinite().all(-1, keepdim=True)
    if _torch.can_inspect(regular) and regular.all():
        return direction
    return torch.where(regular, direction, _regularised(matrix, residual))


def _regularised(matrix: Tensor, residual: Tensor) -> Tensor:
    """The Levenberg-Marquardt direction; where A knows of none that helps, one to get away from there."""
    if not residual.shape[-1]:
        return residual
    size = matrix.abs().amax((-2, -1))[..., None, None]
    scaled = matrix / torch.where(size == 0, 1, size)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    gram = scaled.mT @ scaled + torch.finfo(matrix.dtype).eps ** 0.5 * eye
    direction = _solve(gram, (scaled.mT @ residual.unsqueeze(-1)).squeeze(-1))
    left = residual - (scaled @ direction.unsqueeze(-1)).squeeze(-1)
    helps = torch.linalg.vector_norm(left, dim=-1) < 0.9 * torch.linalg.vector_norm(residual, dim=-1)
    away = _solve(scaled + 0.01 * eye, residual)
    return chosen(helps, direction, away) / torch.where(size == 0, 1, size).squeeze(-1)


def _solve(matrix: Tensor, b: Tensor) -> Tensor:
    """A^-1 b, nan or infinite where there is none."""
    if matrix.shape[-1] == 1:
        return b / matrix.squeeze(-1)
    if torch.compiler.is_dynamo_compiling():  # the first step stands in the open graph
        inverse, info = torch.linalg.inv_ex(matrix)
        return torch.where((info == 0).unsqueeze(-1), (inverse @ b.unsqueeze(-1)).squeeze(-1), torch.nan)
    found, info = torch.linalg.solve_ex(matrix, b.unsqueeze(-1))
    return torch.where((info == 0).unsqueeze(-1), found.squeeze(-1), torch.nan)
