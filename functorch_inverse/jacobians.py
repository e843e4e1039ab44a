"""Per-sample Jacobians of whole batches."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._chunks import check_chunk_size, chunk_of, in_chunks, nodes_below, rooted, widest
from functorch_inverse._precision import full_precision
from functorch_inverse._pullback import in_torch
from functorch_inverse._solvers import SolverLike, as_solver
from functorch_inverse._tree import Partition, Tree, event_dims, flatten, is_differentiable, unflatten
from functorch_inverse._vectors import batch_shape, real_dtype
from functorch_inverse.errors import StructureError
from functorch_inverse.linear_solvers import LinearSolver
from functorch_inverse.operators import Equation, JacobianOperator

__all__ = ["batch_jacobian", "log_abs_det_jacobian"]

Tensors = tuple[Tensor, ...]
_CALLER = "batch_jacobian"


def batch_jacobian(
    f: Callable[..., Tree], y: Tree, *args: Any, event_dim: Tree = 1, chunk_size: int | None = None
) -> Tree:
    r"""The Jacobian of each sample of a batch, from a few evaluations of f on the whole batch.

    .. math:: J_{b, i, j} = \partial f(y, \ldots)_{b, i} / \partial y_{b, j}

    f handles leading batch dims itself and treats samples independently, so that one tangent (or
    cotangent), the same unit vector in every sample, gives one column (or row) of all Jacobians at once:
    min(inputs, outputs) passes of f, never one pass per sample. Composes with all of torch.func and is
    differentiable with respect to y, args and whatever f closes over.

    Args:
        f: takes y and args; differentiable torch code.
        y: a tensor of shape (*batch, *in_event), or a pytree of those with one batch shape.
        args: handed on to f.
        event_dim: how many trailing dims of each leaf of y make up one sample; an int, None (all of
            them), or a pytree prefix of those.
        chunk_size: how many rows (or columns) are computed at once, at most. None: as many as take a few times the
            memory of the Jacobian itself.

    Returns:
        A tensor of shape (*batch, *out_event, *in_event); for pytrees a tree of f's structure with trees of
        y's structure as leaves, as torch.func.jacrev returns them. The batch dims of the outputs are those
        of y, what is left is out_event.

    Raises:
        StructureError: an output does not have the batch dims of y, or something is complex (there is no
            single matrix then; use torch.view_as_real).
        ValueError: `chunk_size` is no positive int.

    Example:
        >>> y = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> batch_jacobian(lambda y: y.prod(-1, keepdim=True), y)
        tensor([[[2., 1.]],
        <BLANKLINE>
                [[4., 3.]]])
    """
    check_chunk_size(_CALLER, chunk_size)
    partition, leaves = _floating(_CALLER, y)
    dims = event_dims(event_dim, partition, leaves, _CALLER, "event_dim")
    batch = batch_shape(leaves, dims, _CALLER, "y")
    spec: list[Any] = []

    def flat(*inputs: Tensor) -> Tensors:
        outputs, structure = flatten(in_torch(f, partition.join(inputs), *args))
        spec[:] = [structure]
        _check(outputs, inputs, batch)
        return tuple(outputs)

    rows = _jacobian(flat, leaves, batch, chunk_size)
    hollow = replace(partition, mould=(None,) * len(partition.mould))
    return unflatten(spec[0], [hollow.join(row) for row in rows])


def log_abs_det_jacobian(
    f: Callable[..., Tree],
    y: Tree,
    *args: Any,
    event_dim: Tree = 1,
    linear_solver: SolverLike = None,
    has_value: bool = False,
    chunk_size: int | None = None,
) -> Any:
    r"""The logarithm of the volume by which f stretches space at y, one number for each sample.

    .. math:: \log \left|\det \frac{\partial f}{\partial y}\right|, \qquad d \log|\det A| = \operatorname{tr}(A^{-1} dA)

    The density of y = g(x) with x ~ p and g = f^-1 is p(f(y)) |det df/dy|, so a normalizing flow is trained by
    ``value, ladj = log_abs_det_jacobian(f, y, has_value=True)``: one evaluation of f and one factorisation serve the value,
    the determinant and their derivatives, of any order and in all transforms, to y, args and whatever f closes over.

    Args:
        f: ``f(y, *args)``, as many numbers out of a sample as into it; differentiable torch code that handles leading
            batch dims and treats samples independently.
        y: a tensor of shape (*batch, *event), or a pytree of those.
        args: handed on to f.
        event_dim: how many trailing dims of each leaf of y make up one sample. 0: elementwise, log|f'(y)| for each number
            without any matrix.
        linear_solver: what factorises: `LU()` unless given; `Triangular(...)` for autoregressive f, which takes no
            factorisation; `Banded(lower, upper)`, O(n), where `Banded(0, 0)` says that f is elementwise; `Cholesky()`.
        has_value: return ``(f(y, *args), log|det|)``.
        chunk_size: how many rows of the Jacobian are pulled back through f at once, as for `LU`, in place of the solver's own.

    Returns:
        A tensor of shape (*batch), or the pair. A complex number counts as two real ones.

    Raises:
        StructureError: f changes the size of a sample, or its batch dims.
        SingularJacobianError: the determinant is zero up to rounding in some samples (elementwise: -inf).

    Example:
        >>> y = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> log_abs_det_jacobian(lambda y: torch.stack([y[..., 1].exp(), -3 * y[..., 0]], -1), y) - torch.tensor(3.0).log()
        tensor([1., 3.])

    Source: Magnus and Neudecker, Matrix Differential Calculus, 3rd edition, section 8.4; Papamakarios et al., Normalizing
    Flows for Probabilistic Modeling and Inference (2021), section 2.
    """
    caller = "log_abs_det_jacobian"
    solver = _chunked(caller, as_solver(caller, linear_solver), chunk_size)
    partition, leaves = _floating(caller, y)
    dims = event_dims(event_dim, partition, leaves, caller, "event_dim")
    spec: list[Any] = []

    def flat(y: Sequence[Tensor], _: Sequence[Tensor]) -> Tensors:
        outputs, structure = flatten(f(partition.join(y), *args))
        spec[:] = [structure]
        _check_tensors(caller, outputs)
        return tuple(outputs)

    with full_precision(leaves[0]):
        A = JacobianOperator(Equation(caller, flat, dims, None), leaves, (), None)
        _check_square(caller, A)
        ladj = A.derivative().abs().log() if A.elementwise else _with_determinant(caller, solver, A).log_abs_det()
    ladj = ladj.to(real_dtype(leaves[0].dtype))
    return (unflatten(spec[0], A.pullback.values), ladj) if has_value else ladj


def _floating(caller: str, y: Tree) -> tuple[Partition, tuple[Tensor, ...]]:
    partition, leaves = Partition.of(y, is_differentiable)
    if not leaves:
        raise StructureError(f"`{caller}`: y is {y!r}, without a floating tensor in it. Pass a tensor, or a pytree of those.")
    return partition, leaves


def _chunked(caller: str, solver: LinearSolver, chunk_size: int | None) -> Any:
    check_chunk_size(caller, chunk_size)
    if chunk_size is None:
        return solver
    if not hasattr(solver, "chunk_size"):
        raise ValueError(
            f"`{caller}`: `chunk_size` is given, but linear_solver={solver!r} does not build the Jacobian row by row; leave it "
            "out, or choose LU(), Cholesky() or Triangular()."
        )
    return replace(solver, chunk_size=chunk_size)  # type: ignore[type-var]


def _with_determinant(caller: str, solver: LinearSolver, A: JacobianOperator) -> Any:
    factors = solver.factorise(A)
    if not hasattr(factors, "log_abs_det"):
        raise ValueError(
            f"`{caller}`: `linear_solver` is {solver!r}, which knows no determinant; choose LU(), Cholesky(), Triangular() or "
            "Banded(lower, upper)."
        )
    return factors


def _check_tensors(caller: str, outputs: Sequence[Any]) -> None:
    for out in outputs:
        if not is_differentiable(out):
            arrived = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise StructureError(f"`{caller}`: f returned {arrived}; needed are floating tensors, made by torch from y.")


def _check_square(caller: str, A: JacobianOperator) -> None:
    rows, columns = A.shape
    if rows != columns:
        raise StructureError(
            f"`{caller}`: f makes {rows} numbers out of the {columns} of one sample; only a square Jacobian has a determinant. "
            "Check `event_dim`."
        )


def _jacobian(
    f: Callable[..., Tensors], y: Sequence[Tensor], batch: torch.Size, chunk_size: int | None
) -> list[Tensors]:
    """For each output the Jacobians to each input."""
    roots: list[Any] = []
    outputs, pull = torch.func.vjp(lambda *y: rooted(f(*y), roots), *y)
    sizes = [prod(t.shape[len(batch) :]) for t in (*y, *outputs)]
    ins, outs = sum(sizes[: len(y)]), sum(sizes[len(y) :])
    chunk = chunk_of(chunk_size, max(ins, outs), batch.numel() * ins * outs, lambda: widest(nodes_below(roots)))
    if ins < outs and _forward_mode_available():
        columns = _forward(f, y, outputs, batch, chunk)
        if columns is not None:
            return columns
    return [_rows(pull, outputs, i, y, batch, chunk) for i in range(len(outputs))]


def _forward_mode_available() -> bool:
    """Whether torch.func.jvp can be opened here: not inside a plain dual level, and not under Dynamo."""
    open_to_it = not _torch.dual_level_open() or _torch.in_jvp()
    return open_to_it and not torch.compiler.is_dynamo_compiling()


def _check(outputs: Sequence[Any], y: Sequence[Tensor], batch: torch.Size) -> None:
    for out in outputs:
        if not isinstance(out, Tensor) or out.shape[: len(batch)] != batch:
            arrived = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise StructureError(
                f"`{_CALLER}`: f returned {arrived} where the batch dims of y, {tuple(batch)}, must come first. f has to "
                "treat the samples of a batch independently; check `event_dim`."
            )
    if any(t.is_complex() for t in (*outputs, *y)):
        raise StructureError(
            f"`{_CALLER}`: a complex function has no single Jacobian matrix unless it is holomorphic. Use "
            "torch.view_as_real and torch.view_as_complex to say what is meant."
        )


def _unit(like: Tensor, batch: torch.Size) -> Tensor:
    """All unit vectors of one sample, each of them in every sample: (n, *batch, *event)."""
    event = like.shape[len(batch) :]
    n = prod(event)
    basis = torch.eye(n, dtype=like.dtype, device=like.device)
    return basis.reshape((n, *(1,) * len(batch), *event)).expand((n, *batch, *event))


def _rows(pull: Any, outputs: Tensors, i: int, y: Sequence[Tensor], batch: torch.Size, chunk: int) -> Tensors:
    """Reverse mode: one cotangent for each number of output i."""
    event = outputs[i].shape[len(batch) :]
    if not prod(event):
        return tuple(t.new_zeros((*batch, *event, *t.shape[len(batch) :])) for t in y)

    def row(cotangent: Tensor) -> Tensors:
        return pull(tuple(cotangent if j == i else torch.zeros_like(o) for j, o in enumerate(outputs)))

    grads = in_chunks(row, _unit(outputs[i], batch), chunk)
    moved = (g.movedim(0, len(batch)) for g in grads)
    return tuple(g.reshape((*batch, *event, *t.shape[len(batch) :])) for g, t in zip(moved, y, strict=True))


# torch's forward mode keeps its level in a global of the process.
_FORWARD_MODE = threading.RLock()


def _forward(
    f: Callable[..., Tensors], y: Sequence[Tensor], outputs: Tensors, batch: torch.Size, chunk: int
) -> list[Tensors] | None:
    """Forward mode: one tangent for each number of an input; None where some operation has no forward rule."""
    try:
        with _FORWARD_MODE:
            columns = [_columns(f, y, i, batch, chunk) for i in range(len(y))]
    except NotImplementedError:
        return None
    # A Python number times a 0-d dual number turns float32 tangents into float64 ones.
    if any(c.dtype != out.dtype for column in columns for c, out in zip(column, outputs, strict=True)):
        return None
    return list(zip(*columns, strict=True))


def _columns(f: Callable[..., Tensors], y: Sequence[Tensor], i: int, batch: torch.Size, chunk: int) -> Tensors:
    def column(tangent: Tensor) -> Tensors:
        tangents = tuple(tangent if j == i else torch.zeros_like(t) for j, t in enumerate(y))
        return torch.func.jvp(f, tuple(t.contiguous() for t in y), tangents)[1]

    moved = in_chunks(column, _unit(y[i], batch), chunk)
    return tuple(t.movedim(0, -1).reshape((*t.shape[1:], *y[i].shape[len(batch) :])) for t in moved)
