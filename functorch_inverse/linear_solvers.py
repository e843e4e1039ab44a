"""Solvers of linear systems A u = b, where A is the Jacobian of f at y: what `linear_solver=` takes.

Direct ones factorise once for many right-hand sides. All are frozen and equal by value.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._chunks import check_chunk_size
from functorch_inverse._dense import Matrix, factorised
from functorch_inverse._lu import lu_of
from functorch_inverse._singular import column_sizes, harmless, has_to_wait, named, raise_if_singular, singular, suspect
from functorch_inverse._structure import refuse_asymmetric, refuse_full
from functorch_inverse.errors import SingularJacobianError
from functorch_inverse.operators import JacobianOperator

__all__ = ["LU", "Cholesky", "Factors", "LeastSquares", "LinearSolver", "Triangular"]

OnSingular = Literal["raise", "nan"]


class Factors(Protocol):
    """A square Jacobian, ready to be solved with."""

    def solve(self, b: Tensor, *, transpose: bool = False) -> Tensor:
        """u with A u = b, or A^T u = b; b has the shape (*batch, n)."""
        ...


class LinearSolver(Protocol):
    """A solver object: one factorisation that serves many right-hand sides.

    Where its class says `exact = True`, A u = b holds for what it finds: then it needs no derivative of its own.
    """

    def factorise(self, operator: JacobianOperator) -> Factors:
        """What is prepared once for a Jacobian: `operator.as_matrix()` has the shape (*batch, n, n)."""
        ...


@dataclass(frozen=True)
class _Direct:
    """A solver by factors of the whole matrix."""

    # A u = b holds for what it finds, so that the derivative of u follows from that.
    exact: ClassVar[bool] = True

    on_singular: OnSingular = "raise"
    chunk_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_chunk_size(type(self).__name__, self.chunk_size)
        if self.on_singular not in ("raise", "nan"):
            raise ValueError(f"`{type(self).__name__}`: `on_singular` is {self.on_singular!r}; choose 'raise' or 'nan'.")

    def factorise(self, operator: JacobianOperator) -> Matrix:
        """The factors of all samples, shared by all solves with them."""
        return factorised(self, operator.as_matrix(self.chunk_size), owned=True)  # type: ignore[arg-type]

    def _refuse(self, bad: Tensor) -> None:
        """SingularJacobianError, where it is asked for and values can be looked at."""
        if self.on_singular == "raise" and _torch.can_inspect(bad):
            raise_if_singular(bad, f"{type(self).__name__}(on_singular='nan')")


@dataclass(frozen=True)
class LU(_Direct):
    r"""The direct solver: :math:`P A = L U` with partial pivoting, O(n^3) once per matrix.

    Args:
        on_singular: "raise" gives a `SingularJacobianError` that names the samples; "nan" gives nan for
            those samples and leaves the others right; on a GPU it also spares the derivative from waiting for its
            values. Where they cannot be looked at (torch.compile, fx tracing, CUDA graph capture) it is always nan.
        chunk_size: how many rows of the Jacobian are pulled back through f at once, at most. None: as many as take a few
            times the memory of the Jacobian itself. Fewer are slower and take less; the result is the same up to rounding.

    A matrix counts as singular where the rounding errors of its own factorisation,
    :math:`|E| \approx \min(n, 4)\, \epsilon\, |L||U|`, could hide a singular one; scaling rows or columns does not change the
    verdict. A matrix with nan or inf gives nan in its own sample and is not called singular.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, sections 3.3 (rounding errors)
    and 3.5 (condition estimation).
    """

    def factor(self, matrix: Tensor, *, owned: bool = False) -> tuple[Tensor, ...]:
        """(LU, pivots) of A^T, which lies in memory as LAPACK wants it."""
        matrix = matrix.mT
        lu, pivots, sizes = lu_of(matrix, owned=owned)
        at_hand = not has_to_wait(lu)
        known = _torch.can_inspect(lu) and (at_hand or self.on_singular == "raise")
        if known and at_hand and sizes is None and harmless(matrix, lu):
            return lu, pivots
        sizes = column_sizes(matrix) if sizes is None else sizes
        doubtful = suspect(lu, sizes)
        if known and not doubtful.any():
            return lu, pivots
        finite = sizes.isfinite().all(-1)
        bad = finite & doubtful & singular(lu, pivots, sizes)
        self._refuse(bad)
        return lu.masked_fill_((bad | ~finite)[..., None, None], torch.nan), pivots

    def apply(self, factors: tuple[Tensor, ...], b: Tensor, transpose: bool) -> Tensor:
        """A^-1 b, or A^-T b."""
        n, columns = b.shape[-2:]
        if n == 1:
            return b / factors[0]
        if columns <= 2 * n:
            return torch.linalg.lu_solve(*factors, b, adjoint=not transpose)
        # As accurate up to a small factor, and a matrix product is several times as fast as substitution.
        unit = torch.eye(n, dtype=b.dtype, device=b.device).expand(*b.shape[:-2], n, n)
        return torch.linalg.lu_solve(*factors, unit, adjoint=not transpose) @ b

    def log_abs_det(self, factors: tuple[Tensor, ...]) -> Tensor:
        """log |det U|."""
        return _log_of_diagonal(factors[0])


@dataclass(frozen=True)
class Cholesky(_Direct):
    r"""For a symmetric positive definite A, as at a minimum: :math:`A = L L^T`, half the work of `LU`.

    An A that is not symmetric is an error (its derivative would be silently wrong), one that is not positive
    definite counts as singular; `on_singular` and `chunk_size` are as for `LU`.

    Raises:
        StructureError: A is not symmetric.
        SingularJacobianError: A is not positive definite; names the samples.

    Example:
        >>> from functorch_inverse import custom_root
        >>> energy = lambda y, t: (y**2).sum() + y.prod() - (t * y).sum()
        >>> argmin = custom_root(lambda t: torch.zeros(2), torch.func.grad(energy), linear_solver=Cholesky())
        >>> torch.func.jacrev(argmin)(torch.zeros(2))
        tensor([[ 0.6667, -0.3333],
                [-0.3333,  0.6667]])

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 4.2.
    """

    def factor(self, matrix: Tensor, *, owned: bool = False) -> tuple[Tensor, ...]:
        """(L,)."""
        lower, info = torch.linalg.cholesky_ex(matrix)
        finite, n = _finite(matrix), matrix.shape[-1]
        if _torch.can_inspect(matrix) and n:
            refuse_asymmetric(matrix, finite)
        pivots = lower.diagonal(dim1=-2, dim2=-1)
        tiny = n * torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1).abs()
        bad = finite & ((info != 0) | (pivots**2 <= tiny).any(-1))
        if self.on_singular == "raise" and _torch.can_inspect(bad) and bad.any():
            raise SingularJacobianError(
                f"the Jacobian is not positive definite in {named(bad)}: y is no minimum there, or a degenerate one. Use "
                "linear_solver=LU() for an indefinite Jacobian, or Cholesky(on_singular='nan') to get nan for these samples."
            )
        return (lower.masked_fill((bad | ~finite)[..., None, None], torch.nan),)

    def apply(self, factors: tuple[Tensor, ...], b: Tensor, transpose: bool) -> Tensor:
        """A^-1 b."""
        (lower,) = factors
        return torch.cholesky_solve(b, lower)

    def log_abs_det(self, factors: tuple[Tensor, ...]) -> Tensor:
        """2 log |det L|."""
        return 2 * _log_of_diagonal(factors[0])


@dataclass(frozen=True)
class Triangular(_Direct):
    r"""For a triangular A, as of autoregressive f: by substitution, O(n^2) and no factorisation.

    Args:
        on_singular, chunk_size: as for `LU`; A is singular where its diagonal has a zero.
        lower: whether A is lower triangular (part i of f depends on parts j <= i of y) or upper.

    Raises:
        StructureError: A has something on its other side.
        SingularJacobianError: a zero on the diagonal; names the samples.

    Example:
        >>> from functorch_inverse import custom_inverse
        >>> f = lambda y: y + y.cumsum(-1).tanh()
        >>> g = custom_inverse(lambda x: x * 0, f, event_dim=1, linear_solver=Triangular(lower=True))
        >>> torch.func.jacrev(g)(torch.zeros(2))
        tensor([[ 0.5000,  0.0000],
                [-0.2500,  0.5000]])

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 3.1.
    """

    lower: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.lower, bool):
            raise ValueError(f"`Triangular`: lower={self.lower!r}; choose lower=True or lower=False.")

    def factor(self, matrix: Tensor, *, owned: bool = False) -> tuple[Tensor, ...]:
        """(A,)."""
        finite = _finite(matrix)
        other = matrix.triu(1) if self.lower else matrix.tril(-1)
        if _torch.can_inspect(matrix):
            refuse_full(((other != 0).flatten(-2).any(-1) & finite), self.lower)
        bad = finite & (matrix.diagonal(dim1=-2, dim2=-1) == 0).any(-1)
        self._refuse(bad)
        return (matrix.masked_fill((bad | ~finite)[..., None, None], torch.nan),)

    def apply(self, factors: tuple[Tensor, ...], b: Tensor, transpose: bool) -> Tensor:
        """A^-1 b, or A^-T b."""
        (matrix,) = factors
        return torch.linalg.solve_triangular(matrix.mT if transpose else matrix, b, upper=self.lower == transpose)

    def log_abs_det(self, factors: tuple[Tensor, ...]) -> Tensor:
        """log |det A|."""
        return _log_of_diagonal(factors[0])


@dataclass(frozen=True)
class LeastSquares(_Direct):
    r"""Where y and x have different sizes: :math:`u = A^+ b` with the pseudo-inverse, by QR.

    More outputs than inputs: f(g(x)) = x does not determine the derivative of g. To pass this solver is to
    assert that g moves along the minimum-norm branch, :math:`\partial y / \partial x = A^+ = A^T (A A^T)^{-1}`.
    Fewer: the equations f(y) = x are more than the unknowns, and hold together wherever g is called;
    :math:`A^+ = (A^T A)^{-1} A^T`.

    Args:
        on_singular, chunk_size: as for `LU`; A must have full rank.

    Raises:
        SingularJacobianError: A does not have full rank; names the samples.

    Under torch.compile only plain backward passes are possible.

    Example:
        >>> from functorch_inverse import custom_inverse
        >>> g = custom_inverse(lambda x: torch.stack([x, x], -1) / 2, lambda y: y.sum(-1), event_dim=0, out_event_dim=1,
        ...                    linear_solver=LeastSquares())
        >>> torch.func.jacrev(g)(torch.tensor(3.0))
        tensor([0.5000, 0.5000])

    Source: Golub and Van Loan, Matrix Computations, 4th edition, sections 5.3 and 5.6; Golub and Pereyra (1973).
    """

    exact: ClassVar[bool] = False
    rectangular: ClassVar[bool] = True

    def factor(self, matrix: Tensor, *, owned: bool = False) -> tuple[Tensor, ...]:
        """(Q, R) of A, or of A^T where that is the tall one."""
        wide = matrix.shape[-2] < matrix.shape[-1]
        finite = _finite(matrix)
        q, r = torch.linalg.qr((matrix.mT if wide else matrix).masked_fill(~finite[..., None, None], 0))
        spread = torch.linalg.svdvals(r)
        tiny = max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps * spread[..., :1]
        bad = finite & ~(spread > tiny).all(-1)
        self._refuse(bad)
        return q, r.masked_fill((bad | ~finite)[..., None, None], torch.nan)

    # A = Q R:    A^+ = R^-1 Q^T        A^T = Q R:    A^+ = Q R^-T
    def apply(self, factors: tuple[Tensor, ...], b: Tensor, transpose: bool) -> Tensor:
        """A^+ b, or its transpose."""
        q, r = factors
        square = q.shape[-1] == q.shape[-2]
        inside = not transpose if square else b.shape[-2] == q.shape[-2]
        if inside:
            return torch.linalg.solve_triangular(r, q.mT @ b, upper=True)
        return q @ torch.linalg.solve_triangular(r.mT, b, upper=False)

    def log_abs_det(self, factors: tuple[Tensor, ...]) -> Tensor:
        """A rectangular Jacobian has no determinant."""
        raise ValueError("LeastSquares: a rectangular Jacobian has no determinant; use LU().")


# --- what the matrices are like ---------------------------------------------------------------------


def _finite(matrix: Tensor) -> Tensor:
    return matrix.isfinite().flatten(-2).all(-1)


def _log_of_diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
