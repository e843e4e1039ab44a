"""What solves A^T u = v from the graph of one evaluation of f, for numbers and for vectors."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._chunks import chunk_of, jacobian, widest
from functorch_inverse._graph import Graph
from functorch_inverse._pullback import GraphPullback
from functorch_inverse._singular import has_to_wait, regular
from functorch_inverse._solvers import iteration
from functorch_inverse.banded import Banded
from functorch_inverse.krylov import Krylov
from functorch_inverse.linear_solvers import LU

__all__ = ["Prepare", "division", "preparation"]

_LARGE = 2**12


def division(graph: Graph, _: Any) -> Callable[[Tensor], Tensor]:
    """Numbers: v / f'(y), where f' takes one pass."""
    slope = _slope(graph)
    return lambda v: v / slope


def _slope(graph: Graph) -> Tensor:
    y = graph.y
    ones = torch.ones_like(y) if y.numel() < _LARGE else y.new_ones(()).expand_as(y)  # no memory to go through
    return _torch.graph_grad((graph.output,), (y,), (ones,))[0]


def _lu(graph: Graph, solver: Any) -> Callable[[Tensor], Tensor]:
    """Vectors: one factorisation of A."""
    out, y = graph.output, graph.y
    *batch, rows = out.shape
    if rows == 1 and _torch.can_inspect(out) and not has_to_wait(out):
        slope = _slope(graph)
        if regular(slope):
            return lambda v: v / slope
    chunk = chunk_of(solver.chunk_size, rows, out.numel() * rows, lambda: widest(graph.nodes))
    matrix = graph.matrix(chunk)
    if matrix is None:
        matrix = jacobian(lambda w: _torch.graph_grad((out,), (y,), (w,))[0], batch, rows, out, chunk=chunk)
    factors = solver.factor(matrix, owned=True)
    return lambda v: solver.apply(factors, v.unsqueeze(-1), transpose=True).squeeze(-1)


def _banded(graph: Graph, solver: Any) -> Callable[[Tensor], Tensor]:
    """Vectors whose numbers depend on their neighbours."""
    return functools.partial(solver.factorise_graph(graph).solve, transpose=True)


def _iterated(graph: Graph, solver: Any) -> Callable[[Tensor], Tensor]:
    """Vectors: products with A^T, and with A where they are asked for."""
    return functools.partial(_iterate, graph, cast(Krylov, iteration(solver)))


def _iterate(graph: Graph, krylov: Krylov, v: Tensor) -> Tensor:
    tape = graph.tape()  # of each solve: to make one, torch looks whether what f read is as it was
    if tape is not None:
        return krylov.value(tape.pull, v, transposed=tape.push, transpose=True, ahead=tape.ahead)
    at = GraphPullback.of_graph(graph)
    return krylov.value(lambda w: at.to_y((w,))[0], v, transposed=lambda t: at.push((t,))[0], transpose=True)


Prepare: TypeAlias = Callable[[Graph, Any], Callable[[Tensor], Tensor]]
_PREPARE: dict[type, Prepare] = {LU: _lu, Banded: _banded}


def preparation(solver: Any) -> Prepare | None:
    """What makes a solve with A^T of a graph, if that is at hand."""
    return _PREPARE.get(type(solver)) if iteration(solver) is None else _iterated
