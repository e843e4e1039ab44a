r"""Linear systems A u = b where A is known only by its products with vectors.

    CG          A = A^T > 0          1 product a step     shortest
    NormalCG    any invertible A     A and A^T a step     slow where A is ill-conditioned, never stagnates
    GMRES       any invertible A     1 product a step     smallest residual; keeps 2 vectors while it falls fast, else `restart`
    BiCGStab    any invertible A     2 products a step    a few vectors, erratic

They compute values. Every leading index of b is a system that stops by itself, and no answer comes back whose true
residual was not checked. A singular A is noticed by a residual that stays; where b happens to be in its range, one of
the many solutions comes back. Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd edition (2003),
chapters 6 to 9; Golub and Van Loan, Matrix Computations, 4th edition, section 11.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from functorch_inverse._cycles import bicgstab, conjugate_gradients, normal_conjugate_gradients
from functorch_inverse._gmres import gmres
from functorch_inverse._krylov import Krylov
from functorch_inverse._preconditioner import Apply, apply_preconditioner, prepare
from functorch_inverse._systems import LinearSolution, Round, Systems, asymmetric, named
from functorch_inverse._together import contract_together
from functorch_inverse.errors import StructureError

__all__ = ["CG", "GMRES", "BiCGStab", "Krylov", "LinearSolution", "NormalCG", "apply_preconditioner"]


@dataclass(frozen=True, eq=False, kw_only=True)
class CG(Krylov):
    r"""Conjugate gradients, for :math:`A = A^T > 0` (and M the same): one product with A a step, five vectors.

    Where `transposed` is known, one product with each of A and A^T checks that A is symmetric.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> u = CG().run(lambda v: v @ A.T, torch.tensor([3.0, 4.0])).value
    >>> assert torch.allclose(u, torch.ones(2))
    """

    _hint: ClassVar[str] = "A or the preconditioner is not symmetric positive definite (GMRES or NormalCG do not ask for it)"

    def _check(self, systems: Systems) -> None:
        which = asymmetric(systems).nonzero().flatten()
        if which.numel():
            raise StructureError(
                f"`CG`: A differs from its transpose in {len(which)} of {len(systems.b)} linear systems (flat indices over all "
                f"leading dims: {named(which)}). Conjugate gradients need A = A^T > 0. Use GMRES or NormalCG."
            )

    def _advice(self, s: Systems, which: Tensor) -> str:
        indefinite = which[s.hopeless[which]]
        if not indefinite.numel():
            return super()._advice(s, which)
        return (
            f"A direction with p^T A p <= 0 (or r^T M r <= 0) was met in {named(indefinite)}, so A (or the preconditioner) is "
            "not positive definite there. Use GMRES or NormalCG; CG for -A where A is negative definite."
        )

    def _round(self) -> Round:
        return conjugate_gradients


@dataclass(frozen=True, eq=False, kw_only=True)
class NormalCG(Krylov):
    r"""Conjugate gradients on :math:`A^T A u = A^T b`, for any invertible A: products with A and A^T.

    It never breaks down, but the steps grow with the condition number of A, not with its root. With a
    preconditioner the equations are those of A M.

    >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
    >>> u = NormalCG().run(lambda v: v @ A.T, torch.tensor([2.0, -1.0]), transposed=lambda v: v @ A).value
    >>> assert torch.allclose(u, torch.ones(2))
    """

    _hint: ClassVar[str] = "the condition number of A enters squared (GMRES does not square it)"

    def _other_side(self, b: Tensor, transpose: bool) -> Apply:
        return prepare(self.preconditioner, b, transpose)

    def _check(self, systems: Systems) -> None:
        if systems.maps.adjoint is None:
            raise StructureError("`NormalCG`: the method needs products with A^T: give `transposed`, or use GMRES or BiCGStab.")

    def _round(self) -> Round:
        return normal_conjugate_gradients


@dataclass(frozen=True, eq=False, kw_only=True)
class GMRES(Krylov):
    r"""Generalised minimal residuals, for any invertible A: one product with A a step.

    While the residuals fall fast, as they do for contractions :math:`|A - c I| < |c| / 3`, two vectors are kept and not much
    is lost. Else `restart` of them, and up to twice as many where only a part of the systems is so. A derivative asks for
    values alone (`value`): then systems that contract, such as those of A = I - B, take the steps of the Neumann series
    together as long as all keep pace.

    Args:
        restart: after how many steps the vectors are given up and the method begins again where it is.

    >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
    >>> u = GMRES().run(lambda v: v @ A.T, torch.tensor([2.0, -1.0])).value
    >>> assert torch.allclose(u, torch.ones(2))
    """

    restart: int = 50

    _progress: ClassVar[float] = 0.999
    _hint: ClassVar[str] = "it stagnates between restarts (a larger `restart`)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart < 1:
            raise ValueError(f"`GMRES`: `restart` is {self.restart}; it must be at least 1.")

    def _together(self, systems: Systems) -> bool:
        return contract_together(systems)

    def _round(self) -> Round:
        return functools.partial(_restarted, self.restart)


def _restarted(restart: int, s: Systems, active: Tensor, attempt: int) -> Tensor:
    return gmres(s, active, restart)


@dataclass(frozen=True, eq=False, kw_only=True)
class BiCGStab(Krylov):
    r"""Stabilised biconjugate gradients, for any invertible A: two products with A a step, seven vectors.

    >>> A = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])
    >>> u = BiCGStab().run(lambda v: v @ A.T, torch.tensor([3.0, 0.0])).value
    >>> assert torch.allclose(u, torch.ones(2))
    """

    _hint: ClassVar[str] = "the eigenvalues of A surround zero or are imaginary, which this method does not like (GMRES)"

    def _round(self) -> Round:
        return bicgstab
