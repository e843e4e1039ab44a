"""`check=`: is f(g(x)) really x, is y really a root?"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functorch_inverse._inspect import inspect
from functorch_inverse._singular import raise_if_singular
from functorch_inverse._vectors import Layout, real_dtype
from functorch_inverse.errors import ResidualError

__all__ = ["check_left_over", "check_residual", "check_root", "check_tolerance"]

Tensors = Sequence[Tensor]


def check_residual(caller: str, check: bool | float, got: Tensors, x: Tensors, y: Tensors, dims: Any) -> None:
    """ResidualError where f(y) differs from x by more than the relative tolerance.

    Args:
        check: True for sqrt(eps) of the dtype, or the tolerance itself.
        got: f(y, *args), leaves of shape (*batch, *event).
        x: what it should be, of the same shapes.
        y: its arguments, for the size of rounding errors.
        dims: the event dims of x and of y.
    """
    with torch.no_grad():
        batch = got[0].shape[: got[0].ndim - dims[0][0]]
        packed = [_pack(t, d, batch) for t, d in ((got, dims[0]), (x, dims[0]), (y, dims[1]))]
        value, wanted, at = (t.to(packed[0].dtype) for t in packed)
        eps = torch.finfo(_torch_real(x)).eps
        tolerance = eps**0.5 if check is True else float(check)
        error = _largest(value - wanted)
        # Rounding alone moves f(y) by some eps of y, however small x is.
        allowed = tolerance * _largest(wanted) + 16 * eps * _largest(at)
        # nan in, nan out is no mistake of f; nan from finite numbers is.
        error = torch.where(wanted.isfinite().all(-1), error.nan_to_num(nan=torch.inf), 0)
        allowed = allowed.nan_to_num(nan=0.0)
        inspect(partial(_compare, _INVERSE.format(caller=caller), tolerance), error, allowed)


def check_root(caller: str, check: bool | float, step: Tensors, y: Tensors, dims: Sequence[int]) -> None:
    """ResidualError where a Newton step would move y by more than the relative tolerance."""
    with torch.no_grad():
        batch = y[0].shape[: y[0].ndim - dims[0]]
        eps = torch.finfo(_torch_real(y)).eps
        tolerance = eps**0.5 if check is True else float(check)
        error, size = (_largest(_pack(t, dims, batch)) for t in (step, y))
        inspect(raise_if_singular, ~error.isfinite() & size.isfinite())
        error = torch.where(size.isfinite(), error, 0)  # nan in y is no mistake of the residual
        allowed = tolerance * size.nan_to_num(nan=0.0) + 16 * eps * torch.where(size == 0, 1, size).nan_to_num(nan=0.0)
        inspect(partial(_compare, _ROOT.format(caller=caller), tolerance), error, allowed)


def check_left_over(caller: str, check: bool | float, found: tuple[Tensor, Tensor] | None) -> None:
    """ResidualError where equations cannot hold together: least squares make the Newton step zero, not the residual."""
    if found is None:
        return
    error, size = found
    eps = torch.finfo(error.dtype).eps
    tolerance = eps**0.5 if check is True else float(check)
    allowed = tolerance * size + torch.finfo(size.dtype).tiny
    error = torch.where(size.isfinite(), error.nan_to_num(nan=torch.inf), 0)
    inspect(partial(_compare, _LEFT_OVER.format(caller=caller), tolerance), error, allowed.nan_to_num(nan=0.0))


def check_tolerance(caller: str, check: Any) -> None:
    """ValueError unless `check` is a bool or a tolerance."""
    if isinstance(check, bool) or (isinstance(check, int | float) and 0 < check < float("inf")):
        return
    raise ValueError(f"`{caller}`: `check` is {check!r}; choose True, False or a relative tolerance, a number above zero.")


_INVERSE = (
    "`{caller}`: f(g(x)) is not x in {{bad}}, where f(g(x)) - x is {{error}} and {{tolerance}} relative ({{allowed}}) is "
    "allowed. Either f is not the inverse of g, g did not converge, or the tolerance is too small: check=1e-3, say, asks "
    "for less."
)
_ROOT = (
    "`{caller}`: the residual is not zero at y in {{bad}}, where a Newton step moves y by {{error}} and {{tolerance}} relative "
    "({{allowed}}) is allowed. Either the residual is not that of `solve`, `solve` did not converge, or the tolerance is too "
    "small: check=1e-3, say, asks for less."
)

_LEFT_OVER = (
    "`{caller}`: the residual is not zero at y in {{bad}}, where it is {{error}} and {{tolerance}} relative ({{allowed}}) is "
    "allowed. There are more equations than unknowns, and these do not hold together: y is a least-squares fit, whose "
    "derivative needs the gradient of the loss as residual (as many equations as unknowns)."
)


def _torch_real(x: Tensors) -> torch.dtype:
    return next((real_dtype(t.dtype) for t in x if t.dtype.is_floating_point or t.dtype.is_complex), torch.float32)


def _pack(leaves: Tensors, dims: Sequence[int], batch: Sequence[int]) -> Tensor:
    floating = [t if t.is_floating_point() or t.is_complex() else t.double() for t in leaves]
    return Layout.of(floating, dims).pack(floating, batch)


def _largest(vectors: Tensor) -> Tensor:
    return vectors.abs().amax(-1) if vectors.shape[-1] else vectors.sum(-1)


def _compare(text: str, tolerance: float, error: Tensor, allowed: Tensor) -> None:
    bad = error > allowed
    if not bad.any():
        return
    worst = int((error / allowed).nan_to_num(nan=0.0, posinf=torch.inf).where(bad, 0).argmax())
    raise ResidualError(
        text.format(
            bad=f"{int(bad.sum())} of {bad.numel()} samples; worst is sample {worst} (flat index over all batch dims)",
            error=f"{error.flatten()[worst]:.3g}",
            tolerance=f"{tolerance:.3g}",
            allowed=f"{allowed.flatten()[worst]:.3g}",
        )
    )
