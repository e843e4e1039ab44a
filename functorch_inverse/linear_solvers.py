"""Linear systems A u = b that stay right under every nesting of transforms.

torch's own `linalg.solve` is silently wrong in nested forward mode (torch 2.13), and `lu_solve` is
wrong where the batch shapes of the factors and of the right-hand sides broadcast. So the solve is a
Function of its own: many right-hand sides under vmap become columns of ONE factorisation.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from functorch_inverse import _torch
from functorch_inverse.errors import SingularJacobianError

__all__ = ["LU", "LinearSolver"]


class Factors(Protocol):
    """A factorised square matrix A of shape (*batch, n, n)."""

    def solve(self, b: Tensor, *, transpose: bool = False) -> Tensor:
        """u with A u = b, or A^T u = b; b has the shape (*batch, n)."""
        ...


class LinearSolver(Protocol):
    """What `linear_solver=` takes: one factorisation that serves many right-hand sides."""

    def factorise(self, matrix: Tensor) -> Factors:
        """The factors of a matrix of shape (*batch, n, n)."""
        ...


@dataclass(frozen=True)
class LU:
    r"""The direct solver: :math:`P A = L U` with partial pivoting, O(n^3) once per matrix.

    Args:
        on_singular: "raise" gives a `SingularJacobianError` that names the samples; "nan" gives nan for
            those samples and leaves the others right. Where values cannot be looked at
            (torch.compile, fx tracing, CUDA graph capture) it is always nan.

    A matrix counts as singular where the rounding errors of its own factorisation,
    :math:`|E| \le n \epsilon\, |L||U|`, could hide a singular one; scaling rows or columns does not change the
    verdict. A matrix with nan or inf gives nan in its own sample and is not called singular.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, sections 3.3 (rounding errors)
    and 3.5 (condition estimation).
    """

    on_singular: Literal["raise", "nan"] = "raise"

    def __post_init__(self) -> None:
        if self.on_singular not in ("raise", "nan"):
            raise ValueError(f"`LU`: `on_singular` is {self.on_singular!r}; choose 'raise' or 'nan'.")

    def factorise(self, matrix: Tensor) -> Factors:
        """The factors of a matrix of shape (*batch, n, n), shared by all solves with it."""
        if torch.compiler.is_dynamo_compiling():
            return _Inverse(matrix)
        return _LUFactors(matrix, *_Factorise.apply(matrix.detach(), self.on_singular))


class _LUFactors(NamedTuple):
    matrix: Tensor
    lu: Tensor
    pivots: Tensor

    def solve(self, b: Tensor, *, transpose: bool = False) -> Tensor:
        return _Solve.apply(*self, b.unsqueeze(-1), transpose).squeeze(-1)


class _Inverse:
    """For Dynamo, which drops the rules of a Function inside a transform."""

    def __init__(self, matrix: Tensor) -> None:
        inverse, info = torch.linalg.inv_ex(matrix)
        self.inverse = torch.where((info == 0)[..., None, None], inverse, torch.nan)

    def solve(self, b: Tensor, *, transpose: bool = False) -> Tensor:
        inverse = self.inverse.mT if transpose else self.inverse
        return (inverse @ b.unsqueeze(-1)).squeeze(-1)


class _Factorise(Function):
    """A -> (LU, pivots), without derivative: `_Solve` differentiates with respect to A itself."""

    @staticmethod
    def forward(matrix: Tensor, on_singular: str) -> tuple[Tensor, Tensor]:
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        suspect = _suspect(matrix, lu)
        visible = _torch.can_inspect(lu)
        if visible and not suspect.any():
            return lu, pivots
        finite = matrix.isfinite().flatten(-2).all(-1)
        singular = finite & suspect & _singular(matrix, lu, pivots)
        if on_singular == "raise" and visible:
            _raise_if_any(singular)
        return lu.masked_fill_((singular | ~finite)[..., None, None], torch.nan), pivots

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], matrix: Tensor, on_singular: str) -> tuple[Any, Any]:
        return _Factorise.apply(matrix.movedim(in_dims[0], 0), on_singular), (0, 0)


def _rounding(lu: Tensor) -> float:
    return lu.shape[-1] * torch.finfo(lu.dtype).eps


def _suspect(matrix: Tensor, lu: Tensor) -> Tensor:
    """Which matrices are worth a closer look: where all pivots are of the size of their columns, nothing was lost."""
    if not lu.shape[-1]:
        return lu.new_zeros(lu.shape[:-2], dtype=torch.bool)
    kept = lu.diagonal(dim1=-2, dim2=-1).abs() / matrix.abs().amax(-2)
    return ~(kept.prod(-1) > 1e4 * _rounding(lu))


# The computed factors are exact for some A + E with |E| <= n eps |L||U|. So A cannot be told from a singular
# matrix where n eps | A^-1 |L||U| | >= 1. The size of A^-1 |L||U| is found by one solve with signs in front of
# |L||U| w, w the inverse column sizes of A: then scaling rows or columns changes nothing.
def _singular(matrix: Tensor, lu: Tensor, pivots: Tensor) -> Tensor:
    """Which matrices are singular up to the rounding error of their own factorisation."""
    n = lu.shape[-1]
    size, unit = lu.abs(), torch.eye(n, dtype=lu.dtype, device=lu.device)
    columns = matrix.abs().amax(-2).unsqueeze(-1)
    probes = ((size.tril(-1) + unit) @ (size.triu() @ columns.reciprocal())) * _signs(n, lu)
    unpermuted = torch.arange(1, n + 1, dtype=pivots.dtype, device=lu.device).expand_as(pivots)
    found = torch.linalg.lu_solve(lu, unpermuted, probes)
    return ~(_rounding(lu) * (found * columns).abs().flatten(-2).amax(-1) < 1)


def _signs(n: int, like: Tensor) -> Tensor:
    """Sign patterns (n, 4) that no structure of a matrix is likely to cancel."""
    i = torch.arange(1, n + 1, dtype=like.dtype, device=like.device)
    return torch.stack([torch.ones_like(i), torch.cos(torch.pi * i), torch.cos(i * i), torch.cos(1.7 * i * i * i)], -1).sign()


def _raise_if_any(singular: Tensor) -> None:
    if not singular.any():
        return
    samples = singular.flatten().nonzero().flatten().tolist()
    some = ", ".join(map(str, samples[:10])) + (", ..." if len(samples) > 10 else "")
    raise SingularJacobianError(
        f"the Jacobian is singular in {len(samples)} of {singular.numel()} samples (flat indices over all batch "
        f"dims, vmapped ones outermost: {some}), so g has no derivative there. Likely causes: f ignores or "
        "duplicates a part of y; g returned a point where f turns around (a fold or a boundary of its domain); "
        "`event_dim` is too large, so that unrelated samples count as one. Pass linear_solver=LU(on_singular='nan') "
        "to get nan for these samples and right derivatives for the others."
    )


# A X = b:    A dX = db - dA X       =>  reverse:  gb = A^-T g,   gA = -gb X^T
# A^T X = b:  A^T dX = db - dA^T X   =>  reverse:  gb = A^-1 g,   gA = -X gb^T
class _Solve(Function):
    """X with A X = b (or A^T X = b) from the factors of A; b has the shape (*batch, n, k)."""

    @staticmethod
    def forward(matrix: Tensor, lu: Tensor, pivots: Tensor, b: Tensor, transpose: bool) -> Tensor:
        return torch.linalg.lu_solve(lu, pivots, b, adjoint=transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *factors, _, ctx.transpose = inputs
        ctx.save_for_backward(*factors, output)
        ctx.save_for_forward(*factors, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None, None
        *factors, x = ctx.saved_tensors
        gb = _Solve.apply(*factors, g, not ctx.transpose)
        ga = None
        if ctx.needs_input_grad[0]:
            ga = -(x @ gb.mT) if ctx.transpose else -(gb @ x.mT)
        return ga, None, None, gb, None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, _lu: None, _pivots: None, db: Tensor | None, _t: None) -> Tensor | None:
        with _torch.forward_mode_again():
            *factors, x = [_torch.primal(t) for t in ctx.saved_tensors]
            assert x is not None
            da, db = _torch.primal(da), _torch.primal(db)
            if da is not None:
                moved = (da.mT if ctx.transpose else da) @ x
                db = -moved if db is None else db - moved
            return None if db is None else _Solve.apply(*factors, db, ctx.transpose)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], matrix: Tensor, lu: Tensor, pivots: Tensor, b: Tensor, transpose: bool
    ) -> tuple[Tensor, int]:
        dims = in_dims[:4]
        if dims[0] is None and dims[1] is None:
            columns = b.movedim(dims[3], -1)
            x = _Solve.apply(matrix, lu, pivots, columns.flatten(-2), transpose)
            return x.unflatten(-1, columns.shape[-2:]), columns.ndim - 1
        size = info.batch_size
        moved = [
            t.expand(size, *t.shape).contiguous() if d is None else t.movedim(d, 0)
            for t, d in zip((matrix, lu, pivots, b), dims, strict=True)
        ]
        return _Solve.apply(*moved, transpose), 0
