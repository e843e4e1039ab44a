"""Per-sample Jacobians of whole batches."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._tree import Partition, Tree, event_dims, flatten, is_differentiable, unflatten
from functorch_inverse._vectors import batch_shape
from functorch_inverse.errors import StructureError

__all__ = ["batch_jacobian"]

Tensors = tuple[Tensor, ...]
_CALLER = "batch_jacobian"


def batch_jacobian(f: Callable[..., Tree], y: Tree, *args: Any, event_dim: Tree = 1) -> Tree:
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

    Returns:
        A tensor of shape (*batch, *out_event, *in_event); for pytrees a tree of f's structure with trees of
        y's structure as leaves, as torch.func.jacrev returns them. The batch dims of the outputs are those
        of y, what is left is out_event.

    Raises:
        StructureError: an output does not have the batch dims of y, or something is complex (there is no
            single matrix then; use torch.view_as_real).

    Example:
        >>> y = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> batch_jacobian(lambda y: y.prod(-1, keepdim=True), y)
        tensor([[[2., 1.]],
        <BLANKLINE>
                [[4., 3.]]])
    """
    partition, leaves = Partition.of(y, is_differentiable)
    dims = event_dims(event_dim, partition, leaves, _CALLER, "event_dim")
    batch = batch_shape(leaves, dims, _CALLER, "y")
    spec: list[Any] = []

    def flat(*inputs: Tensor) -> Tensors:
        outputs, structure = flatten(f(partition.join(inputs), *args))
        spec[:] = [structure]
        _check(outputs, inputs, batch)
        return tuple(outputs)

    rows = _jacobian(flat, leaves, batch)
    hollow = replace(partition, mould=(None,) * len(partition.mould))
    return unflatten(spec[0], [hollow.join(row) for row in rows])


def _jacobian(f: Callable[..., Tensors], y: Sequence[Tensor], batch: torch.Size) -> list[Tensors]:
    """For each output the Jacobians to each input."""
    outputs, pull = torch.func.vjp(f, *y)
    sizes = [prod(t.shape[len(batch) :]) for t in (*y, *outputs)]
    if sum(sizes[: len(y)]) < sum(sizes[len(y) :]) and _torch.forward_mode_available():
        columns = _forward(f, y, outputs, batch)
        if columns is not None:
            return columns
    return [_rows(pull, outputs, i, y, batch) for i in range(len(outputs))]


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


def _rows(pull: Any, outputs: Tensors, i: int, y: Sequence[Tensor], batch: torch.Size) -> Tensors:
    """Reverse mode: one cotangent for each number of output i."""
    event = outputs[i].shape[len(batch) :]
    if not prod(event):
        return tuple(t.new_zeros((*batch, *event, *t.shape[len(batch) :])) for t in y)

    def row(cotangent: Tensor) -> Tensors:
        return pull(tuple(cotangent if j == i else torch.zeros_like(o) for j, o in enumerate(outputs)))

    grads = torch.vmap(row)(_unit(outputs[i], batch))
    moved = (g.movedim(0, len(batch)) for g in grads)
    return tuple(g.reshape((*batch, *event, *t.shape[len(batch) :])) for g, t in zip(moved, y, strict=True))


# torch's forward mode keeps its level in a global of the process.
_FORWARD_MODE = threading.RLock()


def _forward(f: Callable[..., Tensors], y: Sequence[Tensor], outputs: Tensors, batch: torch.Size) -> list[Tensors] | None:
    """Forward mode: one tangent for each number of an input; None where some operation has no forward rule."""
    try:
        with _FORWARD_MODE:
            columns = [_columns(f, y, i, batch) for i in range(len(y))]
    except NotImplementedError:
        return None
    # A Python number times a 0-d dual number turns float32 tangents into float64 ones.
    if any(c.dtype != out.dtype for column in columns for c, out in zip(column, outputs, strict=True)):
        return None
    return list(zip(*columns, strict=True))


def _columns(f: Callable[..., Tensors], y: Sequence[Tensor], i: int, batch: torch.Size) -> Tensors:
    def column(tangent: Tensor) -> Tensors:
        tangents = tuple(tangent if j == i else torch.zeros_like(t) for j, t in enumerate(y))
        return torch.func.jvp(f, tuple(t.contiguous() for t in y), tangents)[1]

    moved = torch.vmap(column)(_unit(y[i], batch))
    return tuple(t.movedim(0, -1).reshape((*t.shape[1:], *y[i].shape[len(batch) :])) for t in moved)
