r"""Banded linear systems in compressed form, O(n) memory, right under every nesting of transforms.

The bands of A are stored as in LAPACK, bands[..., upper + i - j, j] = A[i, j]. On a CPU with SciPy the factors are
LAPACK's, everywhere else the system is solved by orthogonal cyclic reduction, log2(n) steps of torch. Dominant
tridiagonal systems take a shorter way on both.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._banded_rules import LogAbsDet, Solve, clearly_dominant, equilibrating, factorise, scaling
from functorch_inverse._bands import Width, inside, trimmed
from functorch_inverse._coloured import bands_of, bands_of_graph
from functorch_inverse._graph import Graph
from functorch_inverse._reduction import reduced_log_abs_det, reduced_solve
from functorch_inverse.errors import StructureError
from functorch_inverse.operators import JacobianOperator

__all__ = ["Banded", "BandedFactors"]

OnSingular: TypeAlias = Literal["raise", "nan"]


@dataclass(frozen=True)
class Banded:
    r"""For a banded A: :math:`A_{ij} = 0` unless :math:`-upper \le i - j \le lower`, in O(n) memory.

    The bands come from lower + upper + 1 passes of f backward, whatever n is, and one more pass checks that there is
    nothing outside of them; where f is made of elementwise operations, slices, pads and concatenations, one pass shows
    both. They are factorised by LAPACK's banded routines on a CPU with SciPy, by orthogonal cyclic reduction, log2(n)
    steps of torch, otherwise. Tridiagonal matrices with dominant columns need no factors and no pivots.

    Args:
        lower, upper: how many diagonals stand below and above the main one. `Banded(0, 0)`: f is elementwise.
        on_singular: as for `LU`.

    Raises:
        StructureError: A has something outside of its bands.
        SingularJacobianError: A is singular up to rounding; names the samples.

    Example:
        >>> from functorch_inverse import custom_inverse
        >>> f = lambda y: 2 * y - torch.nn.functional.pad(y, (1, 0))[..., :-1].sin()
        >>> g = custom_inverse(lambda x: x * 0, f, event_dim=1, linear_solver=Banded(lower=1, upper=0))
        >>> torch.func.jacrev(g)(torch.zeros(3))
        tensor([[0.5000, 0.0000, 0.0000],
                [0.2500, 0.5000, 0.0000],
                [0.1250, 0.2500, 0.5000]])

    Source: Curtis, Powell and Reid, On the Estimation of Sparse Jacobian Matrices (1974); Golub and Van Loan, Matrix
    Computations, 4th edition, section 4.3.
    """

    lower: int
    upper: int
    on_singular: OnSingular = "raise"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.on_singular not in ("raise", "nan"):
            raise ValueError(f"`Banded`: `on_singular` is {self.on_singular!r}; choose 'raise' or 'nan'.")
        if not all(isinstance(count, int) and count >= 0 for count in (self.lower, self.upper)):
            raise ValueError(f"`Banded`: lower={self.lower!r}, upper={self.upper!r}; counts of diagonals are 0, 1, 2, ...")

    def factorise(self, operator: JacobianOperator) -> "BandedFactors":
        """The factors of all samples, shared by all solves with them."""
        width = self._width(operator.shape[1])
        return BandedFactors._inside(bands_of(operator, width), width, self.on_singular)

    def factorise_graph(self, graph: Graph) -> "BandedFactors":
        """The same from the graph of an f that takes one real vector to another."""
        width = self._width(graph.y.shape[-1])
        return BandedFactors._inside(bands_of_graph(graph, width), width, self.on_singular)

    def _width(self, n: int) -> Width:
        last = max(n - 1, 0)
        return Width(min(self.lower, last), min(self.upper, last))


@dataclass(frozen=True, eq=False)
class BandedFactors:
    r"""A factorised banded matrix; `solve` and `log_abs_det` are differentiable to any order.

    A matrix counts as singular where rounding errors of the size of its entries, :math:`|E| \le c \epsilon |A|` with
    c the number of diagonals, could hide a singular one. One with nan or inf gives nan in its own sample and is not
    called singular.

    >>> bands = torch.tensor([[0.0, 1.0, 1.0], [4.0, 4.0, 4.0], [1.0, 1.0, 0.0]])
    >>> factors = BandedFactors.of(bands, lower=1, upper=1)
    >>> assert torch.allclose(factors.solve(torch.tensor([5.0, 6.0, 5.0])), torch.ones(3))
    >>> assert torch.allclose(factors.log_abs_det(), torch.tensor(56.0).log())

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 4.3; Wright, Stable parallel algorithms
    for two-point boundary value problems (1992).
    """

    bands: Tensor
    width: Width
    parts: tuple[Tensor, Tensor, Tensor] | None
    # Powers of two that the rows and columns were multiplied by: pivots are chosen by size, so units must not matter.
    scales: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, bands: Tensor, lower: int, upper: int, on_singular: OnSingular = "raise") -> "BandedFactors":
        r"""The factors of A, shared by all solves with it.

        Args:
            bands: shape (\*batch, lower + upper + 1, n) with bands[..., upper + i - j, j] = A[i, j]; what stands
                at places outside the matrix is ignored and receives no gradient.
            lower, upper: how many diagonals stand below and above the main one.
            on_singular: "raise" names the singular samples in an error, "nan" gives nan for them. Where values cannot
                be looked at (torch.compile, tracing) it is always nan.

        Raises:
            SingularJacobianError: names the flat indices of the samples.
            StructureError: the bands have another shape.
        """
        _check(bands, lower, upper, on_singular)
        bands, width = trimmed(bands, Width(lower, upper))
        return cls._inside(inside(bands, width), width, on_singular)

    @classmethod
    def _inside(cls, bands: Tensor, width: Width, on_singular: OnSingular) -> "BandedFactors":
        """The same of bands with zeros at places outside the matrix."""
        if not bands.numel() or torch.compiler.is_dynamo_compiling():
            return cls(bands, width, None)
        clear = clearly_dominant(bands.detach(), width)
        scales = None if clear else equilibrating(bands.detach(), width)
        if scales is not None:
            bands = bands * scaling(*scales, width)
        return cls(bands, width, factorise(bands, width, on_singular, clear), scales)

    def solve(self, b: Tensor, *, transpose: bool = False) -> Tensor:
        r"""u with A u = b, or A^T u = b.

        Args:
            b: shape (\*batch, n).

        Returns:
            u of b's shape.
        """
        batch, n = self.bands.shape[:-2], self.bands.shape[-1]
        if b.shape != (*batch, n) or b.dtype != self.bands.dtype:
            raise StructureError(
                f"`BandedFactors.solve`: b has shape {tuple(b.shape)} and {b.dtype}; the factors need {(*batch, n)} and "
                f"{self.bands.dtype}. Use torch.vmap for several right-hand sides."
            )
        if not self.bands.numel():
            return b + self.bands.sum()
        if self.parts is None:
            return reduced_solve(self.bands, self.width, b.unsqueeze(-2), transpose).squeeze(-2)
        call = Solve.forward if _torch.plain() else Solve.apply  # where nobody differentiates, apply would only cost time
        if self.scales is None:
            return call(self.bands, *self.parts, b.unsqueeze(-2), self.width, transpose).squeeze(-2)
        first, then = self.scales[::-1] if transpose else self.scales
        return then * call(self.bands, *self.parts, (first * b).unsqueeze(-2), self.width, transpose).squeeze(-2)

    def log_abs_det(self) -> Tensor:
        r""":math:`\log|\det A|`, shape (\*batch)."""
        if not self.bands.numel():
            return self.bands.sum((-2, -1)).real
        if self.parts is None:
            return reduced_log_abs_det(self.bands, self.width)
        found = LogAbsDet.apply(self.bands, *self.parts, self.width)
        return found if self.scales is None else found - sum(t.log().sum(-1) for t in self.scales)


def _check(bands: Tensor, lower: int, upper: int, on_singular: str) -> None:
    if on_singular not in ("raise", "nan"):
        raise ValueError(f"`BandedFactors`: `on_singular` is {on_singular!r}; choose 'raise' or 'nan'.")
    if lower < 0 or upper < 0 or bands.ndim < 2 or bands.shape[-2] != lower + upper + 1 or not _is_inexact(bands):
        raise StructureError(
            f"`BandedFactors`: the bands have shape {tuple(bands.shape)} and {bands.dtype}; lower={lower} and upper={upper} "
            "need (*batch, lower + upper + 1, n) in a wide floating or complex dtype, bands[..., upper + i - j, j] = A[i, j]."
        )


def _is_inexact(bands: Tensor) -> bool:
    return (bands.is_floating_point() or bands.is_complex()) and bands.dtype.itemsize >= 4
