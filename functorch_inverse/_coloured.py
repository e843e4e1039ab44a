"""The bands of a Jacobian from a few passes of f backward, or from one.

Rows i, i + p, i + 2p, ... of a matrix with p = lower + upper + 1 diagonals have no column in common, so one
cotangent with ones at all of them brings back all their entries at once. Source: Curtis, Powell and
Reid, On the Estimation of Sparse Jacobian Matrices (1974).
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._bands import Width, inside, product, transposed
from functorch_inverse._graph import Graph
from functorch_inverse._inspect import inspect
from functorch_inverse._singular import named
from functorch_inverse.errors import StructureError
from functorch_inverse.operators import JacobianOperator

__all__ = ["bands_of", "bands_of_graph"]


def bands_of(operator: JacobianOperator, width: Width) -> Tensor:
    """The bands (*batch, lower + upper + 1, n) of a square operator; an error if there is something outside them."""
    graph = operator.graph if _torch.plain() else None
    bands = None if graph is None else _from_graph(graph, width)
    return _coloured(operator, width) if bands is None else bands


def bands_of_graph(graph: Graph, width: Width) -> Tensor:
    """Those of an f that takes one real vector to another, from its graph."""
    bands = _from_graph(graph, width)
    return _coloured(_Vectors(graph), width) if bands is None else bands


class _Vectors(NamedTuple):
    """What the colours ask of an operator."""

    graph: Graph

    @property
    def y(self) -> tuple[Tensor]:
        return (self.graph.y,)

    @property
    def dtype(self) -> torch.dtype:
        return self.graph.y.dtype

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    def rows(self, cotangents: Tensor) -> Tensor:
        return torch.stack([self.rmv(w.expand_as(self.graph.output)) for w in cotangents])

    def rmv(self, w: Tensor) -> Tensor:
        return _torch.graph_grad((self.graph.output,), (self.graph.y,), (w,))[0]


def _coloured(operator: JacobianOperator | _Vectors, width: Width) -> Tensor:
    p, y = width.diagonals, operator.y[0]
    n = operator.shape[1] if isinstance(operator, JacobianOperator) else y.shape[-1]
    place = torch.arange(n, device=y.device)
    seeds = (place % p == torch.arange(p, device=y.device).unsqueeze(-1)).to(operator.dtype)
    colours = operator.rows(seeds).movedim(0, -2)
    # bands[upper + i - j, j] = A[i, j], and A[i, j] stands at (i mod p, j) among the colours.
    rows = place + torch.arange(-width.upper, width.lower + 1, device=y.device).unsqueeze(-1)
    return _verified(operator, inside(colours.gather(-2, (rows % p).expand(colours.shape)), width), width)


def _from_graph(graph: Graph, width: Width) -> Tensor | None:
    """The same at once, where f is made of elementwise operations and shifts; what is doubtful is left to the colours."""
    if graph.y.shape != graph.output.shape or not graph.y.numel() or not _torch.can_inspect(graph.y):
        return None
    y, output = graph.y, graph.output
    # More than there are in the end: some may cancel, or be zero.
    diagonals = graph.diagonals(2 * width.diagonals + 2)
    if diagonals is None:
        return None
    shifts = range(width.upper, -width.lower - 1, -1)
    for s, entries in diagonals.items():
        if entries.dtype != y.dtype or (s not in shifts and entries.any()):
            return None
    nothing = None if all(s in diagonals for s in shifts) else torch.zeros_like(output)
    bands = torch.stack([diagonals.get(s, nothing) for s in shifts], -2)
    for row, shift in zip(bands.unbind(-2), shifts, strict=True):
        if shift:
            (row[..., :shift] if shift > 0 else row[..., row.shape[-1] + shift :]).zero_()
    return bands


def _verified(operator: JacobianOperator | _Vectors, bands: Tensor, width: Width) -> Tensor:
    """What A^T does to a vector must be what the bands do to it: each column by itself, with rows of one size."""
    fixed = bands.detach()
    largest = transposed(fixed.abs(), width).amax(-2)
    place = torch.arange(fixed.shape[-1], dtype=fixed.dtype, device=fixed.device)
    # The numbers of no two rows of one colour agree.
    probe = torch.cos(place**2 + 0.7) / torch.where(largest > 0, largest, 1)
    vector = probe.unsqueeze(-2)
    size = product(fixed.abs(), width, vector.abs(), True).squeeze(-2)
    probed = operator.rmv(probe).detach()
    gap = (product(fixed, width, vector, True).squeeze(-2) - probed).abs()
    bad = (gap > 100 * operator.eps * torch.maximum(size, probed.abs())).any(-1)
    if torch.compiler.is_dynamo_compiling():
        return torch.where(bad[..., None, None], torch.nan, bands)
    inspect(partial(_refuse, width), bad)
    return bands


def _refuse(width: Width, bad: Tensor) -> None:
    if bad.any():
        raise StructureError(
            f"Banded: the Jacobian has entries outside of {width.lower} diagonals below and {width.upper} above the main "
            f"one in {named(bad)}. Widen Banded(lower, upper), put y and the residual into an order in which neighbours are "
            "close, or use GMRES(). (A complex number counts as two neighbours.)"
        )
