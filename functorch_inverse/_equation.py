"""f(y) = x for a batch of samples, as an equation between real vectors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from functorch_inverse._chunks import jacobian
from functorch_inverse._hooks import unhooked
from functorch_inverse._pullback import Function, Pullback, Tensors
from functorch_inverse._vectors import Layout, real_dtype
from functorch_inverse.errors import StructureError

__all__ = ["Equation", "Point", "largest"]


@dataclass(frozen=True, eq=False)
class Equation:
    """f(y, theta) = x, with y and x packed into real vectors of shape (*batch, n).

    The first `levels` batch dims are those of vmap: f does not see them, so nothing broadcasts against them.
    """

    caller: str
    f: Function
    theta: Tensors
    inputs: Layout
    outputs: Layout
    batch: tuple[int, ...]
    levels: int
    x: Tensor

    @classmethod
    def of(
        cls,
        caller: str,
        f: Function,
        y: Tensors,
        x: Tensors,
        theta: Tensors,
        dims: tuple[Sequence[int], Sequence[int]],
        levels: int,
    ) -> "tuple[Equation, Tensor]":
        """The equation, and the packed y; `dims` are the event dims of y and of x."""
        inputs, outputs = Layout.of(y, dims[0]), Layout.of(x, dims[1])
        _check_sizes(caller, inputs, outputs)
        pairs = [(t, d) for leaves, ds in ((y, dims[0]), (x, dims[1])) for t, d in zip(leaves, ds, strict=True)]
        batch = _broadcast(caller, [tuple(t.shape[: t.ndim - d]) for t, d in pairs], levels)
        y, x = (_spread(leaves, ds, batch, levels) for leaves, ds in ((y, dims[0]), (x, dims[1])))
        start = inputs.pack(y, batch)
        return cls(caller, f, theta, inputs, outputs, batch, levels, outputs.pack(x, batch).to(start.dtype)), start

    @property
    def eps(self) -> float:
        """The precision of the coarsest leaf."""
        return max(torch.finfo(real_dtype(d)).eps for d in (*self.inputs.dtypes, *self.outputs.dtypes))

    def at(self, y: Tensor, graph: bool) -> "Point":
        """f at packed y; with a graph, its Jacobian can be asked for."""
        leaves = self.inputs.unpack(y)
        if not graph:
            return Point(self, tuple(self._values(leaves, self.theta)), None)
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            _refuse_export(self.caller)
        with unhooked():
            pullback = Pullback.of_values(self._values, leaves, self.theta)
        return Point(self, pullback.outputs, pullback)

    def _values(self, y: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        """f of its own copy of y, which it may change."""
        return tuple(self.f([t.clone() for t in y], theta))

    def fitting(self, y: Tensor, point: "Point") -> "tuple[Equation, Tensor]":
        """With the batch dims that f broadcast y to."""
        shapes = zip(point.values, self.outputs.shapes, strict=True)
        found = [tuple(t.shape[: t.ndim - len(s)]) for t, s in shapes if t.shape[t.ndim - len(s) :] == s]
        batch = _broadcast(self.caller, [self.batch, *found], self.levels)
        if batch == self.batch:
            return self, y
        y, x = (_spread((t,), (1,), batch, self.levels)[0] for t in (y, self.x))
        return replace(self, batch=batch, x=x), y


@dataclass(frozen=True, eq=False)
class Point:
    """f evaluated at one y."""

    equation: Equation
    values: tuple[Tensor, ...]
    pullback: Pullback | None

    @property
    def residual(self) -> Tensor:
        """f(y) - x, of shape (*batch, n)."""
        eq = self.equation
        _check_values(eq, self.values)
        return eq.outputs.pack([t.detach() for t in self.values], eq.batch).to(eq.x.dtype) - eq.x

    def jacobian(self) -> Tensor:
        """df/dy of shape (*batch, n, n)."""
        eq = self.equation

        def pull(row: Tensor) -> Tensor:
            assert self.pullback is not None
            cotangents = [c.to(v.dtype) for c, v in zip(eq.outputs.unpack(row), self.values, strict=True)]
            return eq.inputs.pack(self.pullback.to_y(cotangents), eq.batch)

        return jacobian(pull, eq.batch, eq.outputs.size, eq.x).to(eq.x.dtype)


def largest(vectors: Tensor) -> Tensor:
    """The maximum norm of each sample, (*batch, n) to (*batch)."""
    return vectors.abs().amax(-1) if vectors.shape[-1] else vectors.sum(-1)


def _broadcast(caller: str, shapes: Sequence[tuple[int, ...]], levels: int) -> tuple[int, ...]:
    """The common batch shape, in which the first `levels` dims stand apart."""
    try:
        rest = torch.broadcast_shapes(*(s[levels:] for s in shapes))
    except RuntimeError as error:
        raise StructureError(
            f"`{caller}`: the batch shapes {[s[levels:] for s in shapes]} of init, x and f(init, *args) do not broadcast. "
            "Check `event_dim`, and the shape of init."
        ) from error
    return (*shapes[0][:levels], *rest)


def _spread(leaves: Tensors, dims: Sequence[int], batch: tuple[int, ...], levels: int) -> list[Tensor]:
    """Leaves with all the batch dims; new ones come after the first `levels`."""

    def one(t: Tensor, dim: int) -> Tensor:
        ones = (1,) * (len(batch) - (t.ndim - dim))
        t = t.reshape((*t.shape[:levels], *ones, *t.shape[levels:])) if ones else t
        return t.expand((*batch, *t.shape[t.ndim - dim :]))

    return [one(t, dim) for t, dim in zip(leaves, dims, strict=True)]


def _refuse_export(caller: str) -> None:
    # What is not strict traces below autograd, where no derivative is left to be taken.
    raise NotImplementedError(
        f"`{caller}`: Newton() takes derivatives of f on the way, which torch.export(strict=False) leaves out. Use "
        "Chandrupatla() or FixedPoint(), or torch.compile."
    )


def _check_sizes(caller: str, y: Layout, x: Layout) -> None:
    if x.size != y.size:
        raise StructureError(
            f"`{caller}`: one sample of init has {y.size} real numbers (event shapes {list(y.shapes)}), one of x has "
            f"{x.size} ({list(x.shapes)}). f(y) = x needs as many unknowns as equations; pass an init of y's structure and "
            "shapes, and describe the samples by `event_dim` and `out_event_dim`."
        )


def _check_values(eq: Equation, values: Tensors) -> None:
    for value, shape, dtype in zip(values, eq.outputs.shapes, eq.outputs.dtypes, strict=True):
        if value.shape == (*eq.batch, *shape) and value.is_complex() == dtype.is_complex:
            continue
        raise StructureError(
            f"`{eq.caller}`: f(y, *args) gave shape {tuple(value.shape)} and {value.dtype} where x asks for "
            f"{(*eq.batch, *shape)} and {'a complex' if dtype.is_complex else 'a real'} dtype. f must map y, which has the "
            "shapes of init (of x, without init), to x; pass init, or check `event_dim` and `out_event_dim`."
        )
