r"""The Jacobian of an equation at a point, as an operator: what a linear solver sees.

f(y, theta) = x,    A = df/dy,    mv: A v,    rmv: A^T w
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._chunks import chunk_of, jacobian
from functorch_inverse._graph import Graph
from functorch_inverse._pullback import Function, Pullback, Tensors, seen_by_graph
from functorch_inverse._transforms import mapped
from functorch_inverse._vectors import Layout, batch_shape, real_dtype
from functorch_inverse.errors import StructureError

__all__ = ["Ahead", "Equation", "JacobianOperator", "MatVec", "vmapped"]

MatVec: TypeAlias = Callable[[Tensor], Tensor]
Ahead: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def vmapped(f: Function, first: int | None, theta_is_batched: Sequence[bool], randomness: str) -> Function:
    """f of two groups of leaves, where the first (if batched) and some of theta carry one more leading dim."""
    return _Vmapped(f, first, tuple(0 if b else None for b in theta_is_batched), randomness)


@dataclass(frozen=True, eq=False)
class _Vmapped:
    f: Function
    first: int | None
    dims: tuple[int | None, ...]
    randomness: str

    def __call__(self, leading: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        n = len(leading)
        dims = (self.first,) * n + self.dims
        return mapped(lambda *t: self.f(t[:n], t[n:]), dims, self.randomness, (*leading, *theta))

    def seen_by_graph(self) -> "_Vmapped":
        """The same with such an f."""
        return replace(self, f=seen_by_graph(self.f))


@dataclass(frozen=True, eq=False)
class Equation:
    """f(y, theta) = x, or f(y, theta) = 0 where `x_dims` is None.

    `f` takes y leaves (*batch, *event) with any number of leading dims, and theta leaves of any shape. The
    last `near` of theta are no arguments of f but a matrix (*batch, n, n) close to its Jacobian, or (LU, pivots) of it.
    """

    caller: str
    f: Function
    y_dims: tuple[int, ...]
    x_dims: tuple[int, ...] | None
    near: int = 0

    def batched(self, theta_is_batched: Sequence[bool], randomness: str) -> "Equation":
        """The same equation where y, and some of theta, carry one more leading dim."""
        return replace(self, f=vmapped(self.f, 0, theta_is_batched, randomness))


class JacobianOperator:
    """A = df/dy at (y, theta): one matrix a sample, differentiable with respect to y and theta.

    Vectors are real and packed: (*columns, *batch, n) with any number of column dims in front.
    """

    def __init__(self, equation: Equation, y: Tensors, theta: Tensors, wanted: Sequence[int] | None = ()) -> None:
        self.equation, self.y, self.theta = equation, y, theta
        self.batch = batch_shape(y, equation.y_dims, equation.caller, "y")
        # None: f reads everything but y by itself, in the open graph.
        self.pullback = Pullback.open(equation.f, y) if wanted is None else Pullback.of(equation.f, y, theta, wanted)
        outputs = self.pullback.outputs
        self.x_dims = equation.x_dims or _root_dims(equation, outputs, self.batch)
        # The leaves as one vector: what A is applied to, and what it gives.
        self.inputs, self.outputs = Layout.of(y, equation.y_dims), Layout.of(outputs, self.x_dims)
        self.frozen = False

    @property
    def dtype(self) -> torch.dtype:
        """That of packed vectors: of y, whatever f returns."""
        return functools.reduce(torch.promote_types, map(real_dtype, self.inputs.dtypes))

    @property
    def eps(self) -> float:
        """The precision of what f computes with."""
        return max(torch.finfo(dtype).eps for dtype in (*self.inputs.dtypes, *self.outputs.dtypes))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of A."""
        return self.outputs.size, self.inputs.size

    @property
    def elementwise(self) -> bool:
        """One real number a sample: A is a derivative, not a matrix, and 1 / 0 is inf as in torch."""
        real = not any(t.is_complex() for t in (*self.y, *self.pullback.outputs))
        return real and self.equation.y_dims == self.x_dims == (0,)

    @property
    def graph(self) -> Graph | None:
        """The graph of f, where it takes one real vector to another and stand-ins can be sent through."""
        return self.pullback.graph() if self.inputs.is_vector and self.outputs.is_vector else None

    def derivative(self) -> Tensor:
        """The numbers of an elementwise A."""
        (out,) = self.pullback.outputs
        ones = torch.ones((), dtype=out.dtype, device=out.device).expand_as(out)
        return self._froze(self.pullback.to_y((ones,))[0])

    def as_matrix(self, chunk_size: int | None = None) -> Tensor:
        """A of shape (*batch, rows, columns), by one pass of f backward for each row, or for `chunk_size` rows at once."""
        A, (rows, columns), graph = self.pullback, self.shape, self.graph
        chunk = chunk_of(chunk_size, rows, self.batch.numel() * rows * columns, A.width)
        matrix = None if graph is None else graph.matrix(chunk)
        if matrix is None:
            matrix = jacobian(self._pull, self.batch, rows, A.outputs[0], chunk=chunk, plain=A.in_open_graph)
        return self._froze(matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix)

    def rows(self, cotangents: Tensor) -> Tensor:
        """A^T times cotangents (k, m), each of them in every sample: (k, *batch, n)."""
        count, size = cotangents.shape
        expanded = cotangents.reshape(count, *(1,) * len(self.batch), size).expand(count, *self.batch, size)
        if _torch.plain() or self.pullback.in_open_graph:
            return torch.stack([self._pull(w) for w in expanded])
        return self._froze(self.rmv(expanded))

    def mv(self, v: Tensor) -> Tensor:
        """A v."""
        return self._columns(self._push, v)

    def rmv(self, w: Tensor) -> Tensor:
        """A^T w."""
        return self._columns(self._pull, w)

    def products(self) -> tuple[MatVec, MatVec, Ahead | None]:
        """`mv` and `rmv`, prepared where many of them are to come, and (b, w) -> b + w - A^T w where that costs less."""
        graph = self.graph if self.inputs.dtypes == self.outputs.dtypes else None
        tape = None if graph is None else graph.tape()
        if tape is None:
            return self.mv, self.rmv, None
        return functools.partial(self._columns, tape.push), functools.partial(self._columns, tape.pull), tape.ahead

    def _froze(self, result: Tensor) -> Tensor:
        return result.detach() if self.frozen else result

    def _pull(self, w: Tensor) -> Tensor:
        return self.inputs.pack(self.pullback.to_y(self.outputs.unpack(w)), self.batch)

    def _push(self, v: Tensor) -> Tensor:
        return self.outputs.pack(self.pullback.push(self.inputs.unpack(v)), self.batch).to(self.dtype)

    def _columns(self, one: MatVec, v: Tensor) -> Tensor:
        count = v.ndim - len(self.batch) - 1
        if not count:
            return one(v)
        if not v.shape[:count].numel():
            return v.new_empty((*v.shape[:-1], self.shape[0] if one == self._push else self.shape[1]))
        return torch.vmap(one)(v.flatten(0, count - 1)).unflatten(0, v.shape[:count])


def _root_dims(equation: Equation, outputs: Tensors, batch: torch.Size) -> tuple[int, ...]:
    """What is left of each leaf of a residual behind the batch dims of y."""
    for out in outputs:
        if out.shape[: len(batch)] != batch:
            raise StructureError(
                f"`{equation.caller}`: the function has a leaf of shape {tuple(out.shape)} where the batch dims of y, "
                f"{tuple(batch)}, must come first. It has to treat the samples of a batch independently; check `event_dim`."
            )
    return tuple(out.ndim - len(batch) for out in outputs)
