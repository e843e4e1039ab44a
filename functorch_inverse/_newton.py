r"""Newton's method with a line search, for samples that are vectors.

    y <- y - t d,      A d = f(y) - x,      A = df/dy

The residual norm falls along d for small t, so t is halved or more until it does; then t = 1 in the end and
the error is squared in every step. Where A has no inverse, (A^T A + mu I) d = A^T (f(y) - x) takes its place.

Source: Dennis and Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear Equations (1996),
algorithms A6.3.1 (line search) and A5.5.1 (singular A).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._equation import Equation, Point, largest
from functorch_inverse._iterate import DONE, RUNNING, STUCK, UNDEFINED

__all__ = ["NewtonState", "arrived", "step"]


class NewtonState(NamedTuple):
    """Where a sample is, and where it tries next: y - length * direction."""

    y: Tensor
    residual: Tensor
    direction: Tensor
    length: Tensor
    floor: Tensor
    status: Tensor


def arrived(equation: Equation, y: Tensor, point: Point, floor: Tensor | None, rtol: float, atol: float) -> NewtonState:
    """The state at a point that is believed; `floor` is what the residual was at the start, times rtol."""
    residual, matrix = point.residual, point.jacobian()
    direction = _direction(matrix, residual)
    # The size of rounding errors: x and the terms of A y are what f(y) - x is made of.
    scale = largest(equation.x) + largest((matrix.abs() @ y.abs().unsqueeze(-1)).squeeze(-1))
    error = largest(residual)
    done = error <= atol + rtol * scale
    status = torch.where(error.isfinite(), STUCK, UNDEFINED)
    status = torch.where(direction.isfinite().all(-1) & error.isfinite(), RUNNING, status)
    # Once more without a look at f, since the step is known: it squares an error that is small already.
    small = largest(direction) <= equation.eps**0.25 * largest(y)
    y = torch.where((done & small).unsqueeze(-1), y - direction, y)
    floor = rtol * (scale + error) if floor is None else floor
    return NewtonState(y, residual, direction, torch.ones_like(error), floor, torch.where(done, DONE, status))


def step(equation: Equation, state: NewtonState, rtol: float, atol: float) -> NewtonState:
    """Try a point; stay, and try a shorter step the next time, where it is no better."""
    trial = state.y - state.length.unsqueeze(-1) * state.direction
    point = equation.at(trial, graph=True)
    before, after = (torch.linalg.vector_norm(r, dim=-1) for r in (state.residual, point.residual))
    better = after <= (1 - 1e-4 * state.length) * before
    stay = _shorter(equation, state, after / before, rtol)
    if _torch.can_inspect(better) and not better.any():
        return stay
    go = arrived(equation, trial, point, state.floor, rtol, atol)
    return NewtonState(*(torch.where(_like(better, a), a, b) for a, b in zip(go, stay, strict=True)))


def _like(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask if mask.ndim == tensor.ndim else mask.unsqueeze(-1)


def _shorter(equation: Equation, state: NewtonState, ratio: Tensor, rtol: float) -> NewtonState:
    """The minimum of the parabola through |r|^2 at 0, its slope there and its value at t, within [t / 10, t / 2]."""
    t = state.length
    best = (t**2 / (ratio**2 - 1 + 2 * t)).nan_to_num(nan=0.0)
    length = torch.minimum(torch.maximum(best, 0.1 * t), 0.5 * t)
    # Close to the solution a Newton step fails only because of rounding: there is nothing better.
    close = largest(state.direction) <= equation.eps**0.5 * largest(state.y)
    exhausted = close | (largest(state.residual) <= state.floor)
    status = torch.where(exhausted, DONE, torch.where(length < equation.eps**0.75, STUCK, state.status))
    return state._replace(length=length, status=status)


def _direction(matrix: Tensor, residual: Tensor) -> Tensor:
    """A^-1 r; where A has no inverse, a regularised one."""
    direction = _solve(matrix, residual)
    regular = direction.isfinite().all(-1, keepdim=True)
    if _torch.can_inspect(regular) and regular.all():
        return direction
    return torch.where(regular, direction, _regularised(matrix, residual))


def _regularised(matrix: Tensor, residual: Tensor) -> Tensor:
    """The Levenberg-Marquardt direction; where A is zero, the residual itself."""
    if not residual.shape[-1]:
        return residual
    size = matrix.abs().amax((-2, -1))[..., None, None]
    scaled = matrix / size
    mu = torch.finfo(matrix.dtype).eps ** 0.5
    gram = scaled.mT @ scaled + mu * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    direction = _solve(gram, (scaled.mT @ residual.unsqueeze(-1)).squeeze(-1)) / size.squeeze(-1)
    return torch.where(size.squeeze(-1) == 0, residual, direction)


def _solve(matrix: Tensor, b: Tensor) -> Tensor:
    """A^-1 b, nan or infinite where there is none."""
    if matrix.shape[-1] == 1:
        return b / matrix.squeeze(-1)
    if torch.compiler.is_dynamo_compiling():
        inverse, info = torch.linalg.inv_ex(matrix)
        return torch.where((info == 0).unsqueeze(-1), (inverse @ b.unsqueeze(-1)).squeeze(-1), torch.nan)
    found, info = torch.linalg.solve_ex(matrix, b.unsqueeze(-1))
    return torch.where((info == 0).unsqueeze(-1), found.squeeze(-1), torch.nan)
