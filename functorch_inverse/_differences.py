"""Differences of any order at one point, in leaves."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_inverse._call import Given, Problem, Values, solve
from functorch_inverse._capture import Captured
from functorch_inverse._pullback import Tensors
from functorch_inverse._stencils import Method, Order, Stencil, stencil
from functorch_inverse._tree import Partition, Tree, event_dims, flatten, is_differentiable
from functorch_inverse._values import VmapMethod
from functorch_inverse._vectors import real_dtype
from functorch_inverse.errors import NoDerivativeError, StructureError

__all__ = ["Derivative", "Differences", "ValueProblem", "out_prefix"]


@dataclass(frozen=True)
class Differences:
    """How a function is differenced."""

    caller: str
    fn: Callable[..., Any]
    method: Method
    order: Order
    step: float | Tensor | None
    noise: float
    event_dim: Tree
    out_event_dim: Tree
    vmap_method: VmapMethod | None
    has_aux: bool

    def values(self) -> Problem:
        """fn without any derivative; its dtypes show how precisely it computes."""
        return ValueProblem(
            caller=self.caller,
            g=self.fn,
            event_dim=self.event_dim,
            out_event_dim=self.out_event_dim,
            vmap_method=self.vmap_method,
            has_aux=self.has_aux,
            keeps_dtypes=True,
        )


@dataclass(frozen=True, kw_only=True)
class ValueProblem(Problem):
    def attach(self, given: Given, values: Values, captured: Captured) -> tuple[Tensor, ...]:
        return values.leaves


@dataclass(frozen=True)
class Derivative:
    """The k-th derivative of fn as a function of plain tensors: a tree of y's structure, then k times x's."""

    how: Differences
    times: int

    def __call__(self, x: Tree, *others: Tree) -> Tree:
        return self.evaluate(x, others, judged=False)[0]

    def evaluate(self, x: Tree, others: tuple[Tree, ...], *, judged: bool) -> tuple[Tree, Tree]:
        """The derivative, and (if judged) an estimate of its error in the same structure."""
        part, leaves = Partition.of(x, is_differentiable)
        _check_real(self.how.caller, leaves)
        for precision in _precisions(leaves):
            point = _Point(self.how, part, precision, others)
            try:
                blocks = point.derivative(self.times, judged)
            except (RuntimeError, TypeError):
                if precision[0].dtype == leaves[0].dtype:
                    raise
                continue  # fn cannot take float64
            if point.precise:
                break
        return tuple(point.tree(list(side), self.times) for side in zip(*blocks, strict=True))


def _check_real(caller: str, leaves: Sequence[Tensor]) -> None:
    if not leaves or any(t.is_complex() for t in leaves):
        raise StructureError(
            f"`{caller}`: {'a complex' if leaves else 'no floating'} input arrived; differences are taken along real "
            "numbers. Give the function floating tensors, for a complex one torch.view_as_real(x)."
        )


def _precisions(leaves: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """float64, where fn computes so, or else the precision of x."""
    narrow = tuple(t.detach() for t in leaves)
    if torch.compiler.is_dynamo_compiling() or all(t.dtype == torch.float64 for t in leaves):
        return [narrow]
    return [tuple(t.double() for t in narrow), narrow]


Blocks: TypeAlias = list[tuple[Tensor, Tensor]]


class _Point:
    """All differences at one x. The blocks of a k-th derivative stand in the order y, x, x, ..."""

    def __init__(self, how: Differences, part: Partition, x: tuple[Tensor, ...], others: tuple[Tree, ...]) -> None:
        self.how, self.part, self.x, self.others = how, part, x, others
        self.x_dims = event_dims(how.event_dim, part, x, how.caller, "event_dim")
        self.eps = max(how.noise, torch.finfo(x[0].dtype).eps)
        self.y: Partition | None = None
        self.y_batch: list[int] = []
        self.precise = True
        # Whether the two lengths, |x| and 1, are far apart somewhere; a trace cannot tell.
        tracing = torch.compiler.is_dynamo_compiling()
        self.far = how.step is None and (tracing or any(bool(_is_far(t).any()) for t in x))

    def tree(self, blocks: list[Tree], times: int) -> Tree:
        """Blocks in the structure of y, in each leaf that of x, and so on."""
        n = len(self.x)
        for _ in range(times):
            blocks = [_hollow(self.part).join(blocks[i : i + n]) for i in range(0, len(blocks), n)]
        assert self.y is not None
        return _hollow(self.y).join(blocks)

    def derivative(self, times: int, judged: bool) -> Blocks:
        """Blocks and their estimated errors; each number takes the better of the steps that were tried."""
        unit = self._difference(self.x, times, times, relative=False, judged=judged or self.far)
        if not self.far:
            return unit
        scaled = self._difference(self.x, times, times, relative=True, judged=True)
        return [_better(a, b) for a, b in zip(unit, scaled, strict=True)]

    def _difference(self, x: Tensors, times: int, total: int, *, relative: bool, judged: bool) -> Blocks:
        def inner(x: Tensors) -> tuple[Tensor, ...]:
            if times == 1:
                return self._values(x)
            return tuple(b for b, _ in self._difference(x, times - 1, total, relative=relative, judged=False))

        along = [self._along(inner, x, i, times, total, relative, judged) for i in range(len(x))]
        return list(itertools.chain(*zip(*along, strict=True)))

    def _values(self, x: Tensors) -> tuple[Tensor, ...]:
        how = self.how
        result = solve(how.values(), self.part.join(x), self.others, {})
        self.y, leaves = Partition.of(result[0] if how.has_aux else result, is_differentiable)
        if not leaves:
            raise StructureError(f"`{how.caller}`: fn returned no floating tensor or array, so there is nothing to difference.")
        dims = y_event_dims(how, self.y, leaves)
        self.y_batch = [t.ndim - d for t, d in zip(leaves, dims, strict=True)]
        self.precise &= all(real_dtype(t.dtype) == self.x[0].dtype for t in leaves)
        return leaves

    def _along(self, inner: Any, x: Tensors, i: int, times: int, total: int, relative: bool, judged: bool) -> Blocks:
        """Differences along each number of leaf i of x."""
        event = x[i].shape[x[i].ndim - self.x_dims[i] :]
        n, by_imaginary = prod(event), self.how.method == "complex" and times == 1
        rule = self._stencil(total)
        rule = rule if judged else rule.bare()
        h = _IMAGINARY_STEP * x[i].abs().clamp(min=1e-50) if by_imaginary else self._step(x[i], rule, total, relative)
        moves = (1j,) if by_imaginary else tuple(c for c in rule.points if c)
        values = _at(inner, x, i, h * _unit_vectors(x[i], event), moves)
        if by_imaginary:
            values = [_imaginary_part(self.how.caller, t) for t in values]
        elif 0.0 in rule.points:
            at_x = rule.points.index(0.0)
            values = [_insert(t, c, at_x) for t, c in zip(values, inner(x), strict=True)]
        rows = zip(values, [self.y_batch[a // len(x) ** (times - 1)] for a in range(len(values))], strict=True)
        steps = h.expand(x[i].shape).flatten(x[i].ndim - len(event)).movedim(-1, 0) if event else h.unsqueeze(0)
        blocks: Blocks = []
        for value, batch in rows:
            lined_up = steps.reshape(n, *(1,) * (batch + 1 - steps.ndim), *steps.shape[1:], *(1,) * (value.ndim - 2 - batch))
            if by_imaginary:
                block = value[0] / lined_up
                error = self.eps * block.abs()
            else:
                block, error = rule.combine(value, lined_up, self.eps)
            shape = (*value.shape[2:], *event)
            blocks.append((block.movedim(0, -1).reshape(shape), error.movedim(0, -1).reshape(shape)))
        return blocks

    def _stencil(self, total: int) -> Stencil:
        how = self.how
        if how.method == "complex":
            return stencil(how.caller, "central", 4)
        order = how.order
        if order == "auto" and total > 1:
            order = 4 if how.method == "central" else 3
        return stencil(how.caller, how.method, order)

    def _step(self, x: Tensor, rule: Stencil, total: int, relative: bool) -> Tensor:
        if self.how.step is not None:
            h = torch.as_tensor(self.how.step, dtype=x.dtype, device=x.device).expand(x.shape)
            return (x + h) - x
        size = x.abs()
        length = torch.where(_is_far(x), size if relative else 1.0, size.clamp(max=1))
        length = torch.where(size > 0, length, 1.0)
        h = rule.step(self.eps, total - (self.how.method == "complex")) * length
        # A power of two, and no smaller than some units in the last place of x: then x + c h is exact.
        return torch.exp2(torch.maximum(h, 8 * torch.finfo(x.dtype).eps * size).log2().floor())


# Far below anything that f could notice: (x + ih)^2 = x^2 up to rounding.
_IMAGINARY_STEP = 2.0**-70


def _is_far(x: Tensor) -> Tensor:
    size = x.abs()
    return (size > 0) & ((size < 1e-2) | (size > 1e2))


def _hollow(part: Partition) -> Partition:
    """The same structure without what stands in the places that are not chosen."""
    return replace(part, mould=(None,) * len(part.mould))


def _better(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """For each number the more trustworthy estimate, by the product of its absolute and relative error.

    Absolute errors alone prefer a wrong derivative that is far too small, relative ones alone a wrong one
    where the right one is zero.
    """
    doubts = [(e * (e / b.abs()).clamp(max=1)).nan_to_num(nan=torch.inf) for b, e in (one, other)]
    trusted = doubts[1] < doubts[0]
    return torch.where(trusted, other[0], one[0]), torch.where(trusted, other[1], one[1])


def _unit_vectors(x: Tensor, event: Sequence[int]) -> Tensor:
    """(n, 1, ..., *event), one for each number of a sample."""
    n = prod(event)
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    return eye.reshape(n, *(1,) * (x.ndim - len(event)), *event)


def _at(inner: Any, x: Tensors, i: int, offsets: Tensor, moves: Sequence[Any]) -> list[Tensor]:
    """The values at x + c * offset for all moves c and offsets, each (moves, offsets, *value)."""
    c = torch.tensor(moves, device=offsets.device, dtype=offsets.dtype if moves != (1j,) else torch.complex128)
    points = x[i] + c.reshape(-1, *(1,) * offsets.ndim) * offsets

    def value(point: Tensor) -> tuple[Tensor, ...]:
        return tuple(inner((*x[:i], point, *x[i + 1 :])))

    values = torch.vmap(value)(points.flatten(0, 1))
    return [t.unflatten(0, points.shape[:2]).to(_WIDE.get(t.dtype, t.dtype)) for t in values]


_WIDE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64) | {torch.complex64: torch.complex128}


def _insert(values: Tensor, center: Tensor, at: int) -> Tensor:
    row = center.to(values.dtype).expand(values.shape[1:]).unsqueeze(0)
    return torch.cat([values[:at], row, values[at:]])


def _imaginary_part(caller: str, value: Tensor) -> Tensor:
    if not value.is_complex():
        raise NoDerivativeError(
            f"`{caller}`: method='complex' hands complex numbers to fn, which returned {value.dtype}: it drops the "
            "imaginary part, where the derivative is. Use method='central', or make fn holomorphic."
        )
    return value.imag


def y_event_dims(how: Differences, y: Partition, leaves: Sequence[Tensor]) -> tuple[int, ...]:
    """How many trailing dims of each leaf of y make up one sample."""
    return event_dims(out_prefix(how), y, leaves, how.caller, "out_event_dim")


def out_prefix(how: Differences) -> Tree:
    if how.out_event_dim is not None:
        return how.out_event_dim
    return next((d for d in flatten(how.event_dim)[0] if d is not None), None)
