r"""An approximate inverse :math:`M \approx A^{-1}` in whatever form it is known: diagonal, matrix or callable."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse.errors import StructureError

__all__ = ["Preconditioner", "Transposable", "apply_preconditioner", "identity", "prepare", "probes"]

Apply = Callable[[Tensor], Tensor]


class Transposable(Protocol):
    """A linear map that knows its transpose."""

    @property
    def T(self) -> Apply:
        """v -> M^T v."""
        ...

    def __call__(self, v: Tensor, /) -> Tensor:
        """M v; v and what comes back have the shape (*lead, n)."""
        ...


Preconditioner = Tensor | Transposable | Apply | None


def apply_preconditioner(preconditioner: Preconditioner, v: Tensor, transpose: bool = False) -> Tensor:
    r"""M v, or M^T v.

    Args:
        preconditioner: None for :math:`M = I`; a tensor (n,) or (\*batch, n), the diagonal of M; a tensor
            (..., n, n), M itself (where both readings fit, it is a matrix); a linear callable on
            (\*lead, n). Leading dims of a tensor broadcast against those of v, from the right.
        v: shape (\*lead, n).
        transpose: M^T v. A callable answers by its attribute `T`, or else by `torch.func.vjp`.

    Returns:
        A tensor of v's shape.

    Raises:
        StructureError: for a tensor whose shape does not fit v, or a callable that changes the shape.

    >>> M = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    >>> apply_preconditioner(M, torch.tensor([1.0, 2.0])), apply_preconditioner(M, torch.tensor([1.0, 2.0]), transpose=True)
    (tensor([2., 0.]), tensor([0., 1.]))
    """
    return prepare(preconditioner, v, transpose)(v)


def prepare(preconditioner: Preconditioner, like: Tensor, transpose: bool) -> Apply:
    """v -> M v (or M^T v) for many v of one shape."""
    if preconditioner is None:
        return identity
    if isinstance(preconditioner, Tensor):
        _refuse_wrapped(preconditioner)
        return _from_tensor(preconditioner.detach(), like, transpose)
    if not transpose:
        return _checked(preconditioner)
    known = getattr(preconditioner, "T", None)
    return _checked(_pulled_back(preconditioner, like) if known is None else known)


def _refuse_wrapped(tensor: Tensor) -> None:
    if _torch.is_wrapped(tensor):
        raise StructureError(
            "the preconditioner is a tensor that torch.vmap batches (or another transform wraps), which a solver object cannot "
            "carry through it. Pass one tensor for all samples, or a callable v -> M v that is made outside of the transform."
        )


def identity(v: Tensor) -> Tensor:
    """No preconditioner."""
    return v


def _from_tensor(tensor: Tensor, like: Tensor, transpose: bool) -> Apply:
    n, lead = like.shape[-1], like.shape[:-1]
    is_matrix = tensor.shape[-2:] == (n, n)
    batch = tensor.shape[:-2] if is_matrix else tensor.shape[:-1]
    if not tensor.ndim or tensor.shape[-1] != n or not _broadcasts(batch, lead) or tensor.dtype != like.dtype:
        raise StructureError(
            f"the preconditioner is a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}, the right-hand sides have "
            f"shape {tuple(like.shape)} and {like.dtype}. Needed: the diagonal of M, ({n},) or (*batch, {n}), or M itself, "
            f"(..., {n}, {n}), of this dtype and with batch dims that broadcast against {tuple(lead)}; or a callable v -> M v."
        )
    if not is_matrix:
        return lambda v: tensor * v
    matrix = tensor.mT if transpose else tensor
    if not batch:
        return lambda v: v @ matrix.mT
    return lambda v: (matrix @ v.unsqueeze(-1)).squeeze(-1)


def _broadcasts(batch: torch.Size, lead: torch.Size) -> bool:
    """Whether batch dims fill lead from the right, without adding to it."""
    ends = zip(reversed(batch), reversed(lead), strict=False)
    return len(batch) <= len(lead) and all(size in (1, wanted) for size, wanted in ends)


def _checked(function: Apply) -> Apply:
    def checked(v: Tensor) -> Tensor:
        out: Any = function(v)
        if isinstance(out, Tensor) and out.shape == v.shape and out.dtype == v.dtype:
            return out.detach()
        arrived = f"shape {tuple(out.shape)} and {out.dtype}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise StructureError(
            f"the preconditioner was called with shape {tuple(v.shape)} and {v.dtype} and returned {arrived}. It must map "
            "(*lead, n) to (*lead, n), one approximate solve for each leading index."
        )

    return checked


def _pulled_back(function: Apply, like: Tensor) -> Apply:
    """v -> M^T v, from one recorded evaluation of M; compared with M once, since a detached M would give zeros."""
    v, w = probes(like)
    try:
        there, pull = torch.func.vjp(function, v)
        back = pull(w)[0].detach()
        agree = ((there.detach() * w).sum(-1) - (back * v).sum(-1)).abs() <= 1e-3 * (there * w).abs().sum(-1)
        problem = "is not the transpose of a linear map" if not bool(agree.all()) else None
    except RuntimeError as error:
        problem = f"raised: {error}"
    if problem is not None:
        raise StructureError(
            f"the transposed solve needs M^T, and torch.func.vjp of the preconditioner {problem}. Give an object with "
            "`__call__(v)` for M v and an attribute `T` for v -> M^T v, a tensor, or a linear function in torch."
        )
    return lambda v: pull(v)[0]


def probes(like: Tensor) -> tuple[Tensor, Tensor]:
    """Two vectors of entries between -1 and 1 that no structure of a matrix is likely to cancel."""
    i = torch.arange(1, like.shape[-1] + 1, dtype=torch.float64, device=like.device)
    first, second = ((2 * torch.frac(c * i * i) - 1).to(like.dtype) for c in (2**0.5, 3**0.5))
    return first.expand_as(like).contiguous(), second.expand_as(like).contiguous()
