r"""The systems A u = b and A^T u = b of an equation, solved by values and differentiated any number of times.

With T = A or A^T, and w = T^-T g for a cotangent g of u,

    T du = db - dT u,    b receives w,    (y, theta) receive -d<w, T u>,

where <w, A^T u> is the derivative of <u, f> along w. So A is never differentiated row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from functorch_inverse._composed import Tensors, change_of_push, mixed
from functorch_inverse._levels import Dims, announced, run, sink
from functorch_inverse._linear import Linearised, LinearSystem, each_column
from functorch_inverse._precision import full_precision
from functorch_inverse._transforms import alive, in_front
from functorch_inverse._vectors import Layout

__all__ = ["solve"]

Optional: TypeAlias = Sequence[Tensor | None]


def solve(system: LinearSystem, b: Tensors, y: Tensors, theta: Tensors, x: Layout, *, transpose: bool) -> Tensors:
    """u (as y) with A u = b, or u (as f(y)) with A^T u = b; `x` describes what f should return."""
    found: tuple[Tensor, ...] = announced(_solved, (*b, *y, *theta), _Task(system, x, transpose, len(b), len(y), 0))
    return found


def _solved(tensors: Tensors, task: "_Task") -> tuple[Tensor, ...]:
    return run(task, tensors)


@dataclass(frozen=True, eq=False)
class _Task:
    """T u = b where T is A or A^T; its tensors are b (*columns, *batch, *event), y and theta."""

    system: LinearSystem
    x: Layout
    transpose: bool
    n_b: int
    n_y: int
    columns: int
    has_derivative: ClassVar[bool] = True

    def itself(self, tensors: Tensors) -> Tensors | None:
        """u, where its derivatives are those of the operations that find it."""
        if not self.system.differentiates_itself:
            return None
        y, theta = self.point(tensors)
        at = Linearised(self.system.equation, self.system.solver, y, theta, self.x)
        return at.solve(tensors[: self.n_b], transpose=self.transpose, columns=self.columns)

    def point(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """y and theta."""
        middle = self.n_b + self.n_y
        return tensors[self.n_b : middle], tensors[middle:]

    def values(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """u of plain tensors, and nothing else."""
        at = self.system.at(*self.point(tensors), self.x)
        return at.solve(tensors[: self.n_b], transpose=self.transpose, columns=self.columns)

    def mapped(self, dims: Dims, size: int, randomness: str, tensors: Tensors) -> tuple[Tensors, Dims]:
        """u for tensors with one more dim each; it is one of the columns if b alone has it, and one of the batch otherwise."""
        (y, theta), n, place, columns, system = self.point(tensors), self.n_b, 0, self.columns, self.system
        if all(d is None for d in dims[n:]):
            columns = self.columns + 1
        else:
            place, rest = self.columns, dims[n + self.n_y :]
            y = [_at(0, t, d, size) for t, d in zip(y, dims[n:], strict=False)]
            theta = [t if d is None else in_front(t, d) for t, d in zip(theta, rest, strict=True)]
            system = system.batched([d is not None for d in rest], randomness)
        b = [_at(place, t, d, size) for t, d in zip(tensors[:n], dims, strict=False)]
        u = run(_Task(system, self.x, self.transpose, n, self.n_y, columns), (*b, *y, *theta))
        return u, (place,) * len(u)

    def keep(self, ctx: Any, tensors: Tensors, output: Tensors) -> Tensors:
        """u and the point."""
        ctx.n_u, ctx.b_kinds = len(output), [(t.shape, t.dtype) for t in tensors[: self.n_b]]
        return (*output, *tensors[self.n_b :])

    def backward(self, ctx: Any, needed: Sequence[bool], g: Optional) -> Optional:
        """What b and the point receive."""
        saved = [alive(t) for t in ctx.saved_tensors]
        u, point = saved[: ctx.n_u], saved[ctx.n_u :]
        cotangents = [torch.zeros_like(t) if c is None else c for t, c in zip(u, g, strict=True)]
        wanted = [i for i in range(len(point)) if needed[self.n_b + i]]
        with full_precision(u[0]):
            transposed = _Task(self.system, self.x, not self.transpose, ctx.n_u, self.n_y, self.columns)
            w = run(transposed, (*cotangents, *point))
            inner, outer = (u, w) if self.transpose else (w, u)
            moved = _pairing(self, point, inner, outer, wanted) if wanted else ()
        grads: list[Tensor | None] = [*w, *[None] * len(point)]
        for i, t in zip(wanted, moved, strict=True):
            grads[self.n_b + i] = -t
        return grads

    def jvp(self, ctx: Any, saved: Tensors, tangents: Optional) -> Optional:
        """du, as b and the point move."""
        u, point = saved[: ctx.n_u], saved[ctx.n_u :]
        given, moved = tangents[: self.n_b], tangents[self.n_b :]
        if all(t is None for t in (*given, *moved)):
            return (None,) * ctx.n_u
        db = [u[0].new_zeros(s, dtype=k) if t is None else t for t, (s, k) in zip(given, ctx.b_kinds, strict=True)]
        with full_precision(u[0]):
            if any(t is not None for t in moved):
                db = [d - c for d, c in zip(db, _change(self, point, u, moved), strict=True)]
            return run(self, (*db, *point))


def _at(place: int, t: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor with its mapped dim somewhere, or expanded there."""
    if dim is None:
        return t.unsqueeze(place).expand(*t.shape[:place], size, *t.shape[place:])
    return t if dim == place else t.movedim(dim, place)


def _pairing(task: _Task, point: Tensors, c: Tensors, along: Tensors, wanted: Sequence[int]) -> Tensors:
    """The derivative of <c, A along> in the wanted parts of the point, all columns together."""
    n, f = len(along), task.system.equation.f
    if not task.columns:
        return _mixed(task, point, c, range(n), along, wanted)
    each = each_column(lambda *t: mixed(f, n, point, t[n:], range(n), t[:n], wanted), task.columns, *along, *c)
    return tuple(t.flatten(0, task.columns - 1).sum(0) for t in each)


def _change(task: _Task, point: Tensors, u: Tensors, moved: Optional) -> Tensors:
    """dT u, as the point moves."""
    chosen = [i for i, t in enumerate(moved) if t is not None]
    along, f, n = [t for t in moved if t is not None], task.system.equation.f, task.n_y
    if not task.transpose:
        return each_column(lambda *t: change_of_push(f, n, point, t, chosen, along), task.columns, *u)
    if not task.columns:
        return _mixed(task, point, u, chosen, along, range(n))
    return each_column(lambda *t: mixed(f, n, point, t, chosen, along, range(n)), task.columns, *u)


def _mixed(task: _Task, point: Tensors, c: Tensors, chosen: Sequence[int], along: Tensors, wanted: Sequence[int]) -> Tensors:
    """d(d<c, f> along) in the wanted parts of the point; from the graph at hand where nobody follows."""

    def found(at_hand: bool, y: Tensors, theta: Tensors, c: Tensors, along: Tensors) -> Tensors:
        if at_hand:
            of_theta = [i for i in (*chosen, *wanted) if i >= len(y)]
            return task.system.at(y, theta, task.x).graph(of_theta).mixed(c, chosen, along, wanted)
        return mixed(task.system.equation.f, len(y), (*y, *theta), c, chosen, along, wanted)

    return sink(found, point[: task.n_y], point[task.n_y :], c, along)
