r"""Factorised matrices that stay right under every nesting of transforms.

torch's own `linalg.solve` is silently wrong in nested forward mode (torch 2.13), and `lu_solve` is
wrong where the batch shapes of the factors and of the right-hand sides broadcast. So the solve is a
Function of its own: many right-hand sides under vmap become columns of ONE factorisation.

Let P be the inverse of A, or its pseudo-inverse where A has full rank but is not square. Then

    dP = -P dA P + P P^T dA^T (I - A P) + (I - P A) dA^T P^T P,

whose last two terms vanish for an inverse. Source: Golub and Pereyra, The Differentiation of
Pseudo-Inverses and Nonlinear Least Squares Problems Whose Variables Separate (1973), theorem 4.3.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from functorch_inverse import _torch
from functorch_inverse._blocks import by_blocks
from functorch_inverse._legacy import through_vmap
from functorch_inverse._levels import signed
from functorch_inverse._quadrature import gauss_legendre

__all__ = ["Factorisation", "Matrix", "factorised"]


class Factorisation(Protocol):
    """How one kind of matrix is factorised and solved with: values alone, no derivative."""

    def factor(self, matrix: Tensor, *, owned: bool = False) -> tuple[Tensor, ...]:
        """The factors of a matrix (*batch, m, n); nan, or an error, where it has no (pseudo-)inverse.

        They may lie in the memory of a matrix that is `owned`.
        """
        ...

    def apply(self, factors: tuple[Tensor, ...], b: Tensor, transpose: bool) -> Tensor:
        """P b for b of shape (*batch, m, k), or P^T b for b of shape (*batch, n, k)."""
        ...

    def log_abs_det(self, factors: tuple[Tensor, ...]) -> Tensor:
        """log |det A| of shape (*batch)."""
        ...


class Matrix(Protocol):
    """A factorised matrix A of shape (*batch, m, n)."""

    def solve(self, b: Tensor, *, transpose: bool = False) -> Tensor:
        """u of shape (*batch, n) with A u = b; or u of shape (*batch, m) with A^T u = b."""
        ...

    def log_abs_det(self) -> Tensor:
        """log |det A| of shape (*batch)."""
        ...


def factorised(kind: Factorisation, matrix: Tensor, *, owned: bool = False) -> Matrix:
    """The factors of a matrix, shared by everything that is computed with it; `owned`: nobody else reads it."""
    if torch.compiler.is_dynamo_compiling():
        return _Inverse(matrix)
    if not _torch.plain():
        return _Factors(kind, matrix, _Factorise.apply(matrix.detach(), kind))
    owned = owned and _torch.can_inspect(matrix)
    factors = kind.factor(matrix, owned=owned)
    if owned and factors[0].data_ptr() == matrix.data_ptr():
        matrix = matrix.new_full((), torch.nan).expand_as(matrix)  # its values are gone, and nobody needs them
    return _Factors(kind, matrix, factors)


class _Factors(NamedTuple):
    kind: Factorisation
    matrix: Tensor
    factors: tuple[Tensor, ...]

    @property
    def takes_columns(self) -> bool:
        return True

    def solve(self, b: Tensor, *, transpose: bool = False) -> Tensor:
        count = b.ndim - self.matrix.ndim + 1
        if not count:
            return _solve(self.kind, transpose, b.unsqueeze(-1), self.matrix, self.factors).squeeze(-1)

        def of_rows(rows: Tensor) -> Tensor:
            return _solve(self.kind, transpose, rows.movedim(0, -1), self.matrix, self.factors).movedim(-1, 0)

        return by_blocks(of_rows, b.flatten(0, count - 1)).unflatten(0, b.shape[:count])

    def log_abs_det(self) -> Tensor:
        return _LogAbsDet.apply(self.kind, self.matrix, *self.factors)


class _Factorise(Function):
    """A -> factors, without derivative: what uses them differentiates with respect to A itself."""

    @staticmethod
    @signed
    def forward(matrix: Tensor, kind: Factorisation) -> tuple[Tensor, ...]:
        return kind.factor(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], matrix: Tensor, kind: Factorisation) -> tuple[Any, Any]:
        factors = _Factorise.apply(matrix.movedim(in_dims[0], 0), kind)
        return factors, (0,) * len(factors)


def _solve(kind: Factorisation, transpose: bool, b: Tensor, matrix: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    if _torch.plain():
        return kind.apply(factors, b, transpose)
    return _Solve.apply(kind, transpose, b, matrix, *factors)


# With M = A or A^T, P its (pseudo-)inverse, X = P b, r = b - M X and a cotangent g of X:
#   gb = P^T g,   gM = -gb X^T + r (P gb)^T + (P^T X) (g - M^T gb)^T
#   dX = P (db - dM X) + P P^T dM^T r + (I - P M) dM^T P^T X
class _Solve(Function):
    """P b (or P^T b) from the factors of A; b has the shape (*batch, m, k)."""

    @staticmethod
    @signed
    def forward(kind: Factorisation, transpose: bool, b: Tensor, matrix: Tensor, *factors: Tensor) -> Tensor:
        return kind.apply(factors, b, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kind, ctx.transpose, b, matrix, *factors = inputs
        saved = (output, matrix, *factors) if matrix.shape[-1] == matrix.shape[-2] else (output, matrix, *factors, b)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    @through_vmap
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if g is None:
            return tuple(nothing)
        x, step, m, rest = _unsaved(ctx, list(ctx.saved_tensors))
        nothing[2] = gb = step(g, True)
        if ctx.needs_input_grad[3]:
            gm = -(gb @ x.mT)
            if rest:
                gm = gm + (rest[0] - m @ x) @ step(gb).mT + step(x, True) @ (g - m.mT @ gb).mT
            nothing[3] = gm.mT if ctx.transpose else gm
        return tuple(nothing)

    @staticmethod
    @through_vmap
    def jvp(ctx: Any, _k: None, _t: None, db: Tensor | None, da: Tensor | None, *_factors: None) -> Tensor | None:
        with _torch.forward_mode_again():
            x, step, m, rest = _unsaved(ctx, [_torch.primal(t) for t in ctx.saved_tensors])
            db, da = _torch.primal(db), _torch.primal(da)
            if da is None:
                return None if db is None else step(db)
            dm = da.mT if ctx.transpose else da
            dx = step(-(dm @ x) if db is None else db - dm @ x)
            if rest:
                other = dm.mT @ step(x, True)
                dx = dx + step(step(dm.mT @ (rest[0] - m @ x), True)) + other - step(m @ other)
            return dx

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], kind: Factorisation, transpose: bool, *tensors: Tensor) -> tuple[Any, int]:
        b, matrix, *factors = tensors
        b_dim, *dims = in_dims[2:]
        if all(d is None for d in dims):
            columns = b.movedim(b_dim, -1)
            x = _solve(kind, transpose, columns.flatten(-2), matrix, tuple(factors))
            return x.unflatten(-1, columns.shape[-2:]), columns.ndim - 1
        led = _lead(info.batch_size, in_dims[2:], tensors)
        return _solve(kind, transpose, led[0], led[1], tuple(led[2:])), 0


def _unsaved(ctx: Any, saved: list[Any]) -> tuple[Tensor, Any, Tensor, list[Tensor]]:
    """X; P and P^T as a function; M; and b, where A is not square."""
    x, matrix, *factors = saved
    rest = [factors.pop()] if matrix.shape[-1] != matrix.shape[-2] else []

    def step(b: Tensor, flip: bool = False) -> Tensor:
        return _solve(ctx.kind, ctx.transpose != flip, b, matrix, tuple(factors))

    return x, step, matrix.mT if ctx.transpose else matrix, rest


def _lead(size: int, in_dims: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        t.expand(size, *t.shape).contiguous() if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, in_dims, strict=True)
    ]


# d log|det A| = tr(A^-1 dA)
class _LogAbsDet(Function):
    """log |det A| from the factors of A."""

    @staticmethod
    @signed
    def forward(kind: Factorisation, matrix: Tensor, *factors: Tensor) -> Tensor:
        return kind.log_abs_det(factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kind, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @through_vmap
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        matrix, *factors = ctx.saved_tensors
        nothing = (None,) * len(factors)
        if g is None:
            return None, None, *nothing
        unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        return None, g[..., None, None] * _solve(ctx.kind, True, unit, matrix, tuple(factors)), *nothing

    @staticmethod
    @through_vmap
    def jvp(ctx: Any, _kind: None, da: Tensor | None, *_factors: None) -> Tensor | None:
        with _torch.forward_mode_again():
            saved: list[Any] = [_torch.primal(t) for t in ctx.saved_tensors]
            matrix, *factors = saved
            da = _torch.primal(da)
            return None if da is None else _trace(_solve(ctx.kind, False, da, matrix, tuple(factors)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], kind: Factorisation, *tensors: Tensor) -> tuple[Tensor, int]:
        return _LogAbsDet.apply(kind, *_lead(info.batch_size, in_dims[1:], tensors)), 0


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


class _Inverse:
    """For Dynamo, which drops the rules of a Function inside a transform; nan where A is singular."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        m, n = matrix.shape[-2:]
        if m == n:
            self.inverse = _inverse(matrix)
        else:  # A = Q R, of which A^T A would square the condition
            q, r = torch.linalg.qr(matrix if m > n else matrix.mT)
            found = _inverse(r) @ q.mT
            self.inverse = found if m > n else found.mT

    def solve(self, b: Tensor, *, transpose: bool = False) -> Tensor:
        inverse = self.inverse.mT if transpose else self.inverse
        return (inverse @ b.unsqueeze(-1)).squeeze(-1)

    # log|det| along a line from A.detach() to A: the integral of tr(A(s)^-1 dA), by Gauss-Legendre of the order asked for.
    def log_abs_det(self) -> Tensor:
        start = self.matrix.detach()
        change = self.matrix - start
        value = torch.linalg.slogdet(start)[1] + 0 * _inverse(start).sum((-2, -1))  # nan where it is singular
        for node, weight in gauss_legendre(_torch.derivative_order()):
            value = value + weight * _trace(_inverse(start + node * change) @ change)
        return value


def _inverse(matrix: Tensor) -> Tensor:
    inverse, info = torch.linalg.inv_ex(matrix)
    regular = (info == 0) & ~_hopeless(matrix.detach().abs(), inverse.detach().abs())
    return torch.where(regular[..., None, None], inverse, torch.nan)


# A + E is singular for some |E| <= c eps |A| at the latest where c eps | |A^-1| |A| | >= 1; w, the inverse column sizes
# of A, makes this independent of scale. Rounding errors would ask for c = n, but add up to less, and n calls regular
# matrices singular: of those of rank n - 1, drawn at random up to n = 256, none came below eps | |A^-1| |A| | = 2.
def _hopeless(size: Tensor, inverse: Tensor) -> Tensor:
    """Which matrices cannot be told from singular ones, from the absolute values of A and of its inverse."""
    n = size.shape[-1]
    if not n:
        return torch.zeros(size.shape[:-2], dtype=torch.bool, device=size.device)
    columns = size.amax(-2).unsqueeze(-1)
    spread = (inverse @ (size @ torch.where(columns > 0, columns, 1).reciprocal())) * columns
    return ~(min(n, 4) * torch.finfo(size.dtype).eps * spread.flatten(-2).amax(-1) < 1)
