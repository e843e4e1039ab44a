r"""The fixed point of y + x - f(y), with Anderson's acceleration.

With r = f(y) - x the plain step is y <- y - r. From the last changes dY, dR of y and r the accelerated one takes
out what their span can explain of r:

    gamma = argmin |r - dR gamma|,      y <- y - r - (dY - dR) gamma

Source: Walker and Ni, Anderson Acceleration for Fixed-Point Iterations (2011), section 2; Behrmann et al.,
Invertible Residual Networks (2019), algorithm 1 (the plain step).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from functorch_inverse._equation import largest
from functorch_inverse._status import DONE, RUNNING, UNDEFINED, Options, chosen

__all__ = ["AndersonState", "advanced", "started"]


class AndersonState(NamedTuple):
    """Where a sample is, what it tries next, and its last changes as rows of shape (*batch, memory, n)."""

    y: Tensor
    residual: Tensor
    trial: Tensor
    status: Tensor
    # Whether the trial is a plain step.
    plain: Tensor
    dy: Tensor
    dr: Tensor


def started(x: Tensor, y: Tensor, residual: Tensor, memory: int, options: Options) -> AndersonState:
    """Begin with a plain step."""
    nothing = y.new_zeros((*y.shape[:-1], memory, y.shape[-1]))
    status = _status(x, y, residual, options)
    plain = torch.ones_like(status, dtype=torch.bool)
    return _finished(AndersonState(y, residual, y - residual, status, plain, nothing, nothing))


def advanced(state: AndersonState, x: Tensor, residual: Tensor, jacobian: object, options: Options) -> AndersonState:
    """Go to the point that was tried; an accelerated one that is no better is taken back, a plain step is believed."""
    before, after = (torch.linalg.vector_norm(r, dim=-1) for r in (state.residual, residual))
    better = after < before
    status = _status(x, state.trial, residual, options)
    rounding = state.plain & _stalled(state, x, residual, options)
    go = _moved(state, residual, better)._replace(status=torch.where(rounding & (status == RUNNING), DONE, status))
    stay = state._replace(trial=state.y - state.residual, plain=torch.ones_like(state.plain), dy=0 * state.dy, dr=0 * state.dr)
    pairs = zip(_finished(go), stay, strict=True)
    return AndersonState(*(chosen(better | state.plain, a, b) for a, b in pairs))


def _finished(state: AndersonState) -> AndersonState:
    """What has converged takes the plain step that it knows already."""
    return state._replace(y=chosen(state.status == DONE, state.y - state.residual, state.y))


def _moved(state: AndersonState, residual: Tensor, better: Tensor) -> AndersonState:
    """At the point that was tried, with what comes next; a plain step that made it worse leaves no memory."""
    # Rows of unit length, so that old and large changes do not outweigh the new ones.
    change, moved = residual - state.residual, state.trial - state.y
    size = torch.linalg.vector_norm(change, dim=-1, keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)
    rows = [_pushed(old, new / size) for old, new in ((state.dy, moved), (state.dr, change))]
    dy, dr = (chosen(better, row, torch.zeros_like(row)) for row in rows)
    trial = state.trial - residual - _explained(dy, dr, residual)
    return state._replace(y=state.trial, residual=residual, trial=trial, plain=~better, dy=dy, dr=dr)


def _pushed(rows: Tensor, row: Tensor) -> Tensor:
    return torch.cat([row.unsqueeze(-2), rows], -2)[..., : rows.shape[-2], :]


def _explained(dy: Tensor, dr: Tensor, residual: Tensor) -> Tensor:
    """(dY - dR) gamma."""
    memory = dr.shape[-2]
    if not memory or not residual.shape[-1]:
        return torch.zeros_like(residual)
    ridge = 100 * torch.finfo(dr.dtype).eps * torch.eye(memory, dtype=dr.dtype, device=dr.device)
    inverse, _ = torch.linalg.inv_ex(dr @ dr.mT + ridge)
    gamma = inverse @ (dr @ residual.unsqueeze(-1))
    return ((dy - dr).mT @ gamma).squeeze(-1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _status(x: Tensor, y: Tensor, residual: Tensor, options: Options) -> Tensor:
    """Each number by itself, so that a large one does not hide the small."""
    done = (residual.abs() <= options.atol + options.rtol * (x.abs() + y.abs())).all(-1)
    return torch.where(done, DONE, torch.where(residual.isfinite().all(-1), RUNNING, UNDEFINED))


# Where f adds large numbers to small ones, the small ones cannot be found better than the large ones are rounded.
def _stalled(state: AndersonState, x: Tensor, residual: Tensor, options: Options) -> Tensor:
    """Whether the residual is no more than rounding of the largest number, and the relative one of no number falls."""
    rounding = 16 * options.eps * (largest(x) + largest(state.trial))
    size = (x.abs() + state.trial.abs()).clamp_min(torch.finfo(x.dtype).tiny)
    return (largest(residual) <= rounding) & (largest(residual / size) >= largest(state.residual / size))
