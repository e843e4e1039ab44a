"""Differences of any order at one point, in leaves."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._call import Given, Problem, Values, solve
from functorch_inverse._capture import Captured
from functorch_inverse._points import given_step, unit_vectors, values_at, with_center
from functorch_inverse._pullback import Tensors
from functorch_inverse._stencils import Estimate, Method, Order, Stencil, stencil
from functorch_inverse._tree import Partition, Tree, event_dims, flatten, is_differentiable
from functorch_inverse._values import VmapMethod
from functorch_inverse._vectors import real_dtype
from functorch_inverse.errors import NoDerivativeError, StructureError

__all__ = ["Derivative", "Differences", "ValueProblem", "check_real_values", "out_prefix"]


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
                if judged and self.how.method == "complex":
                    check_real_values(self.how.caller, point.values_at_x())
                estimates = point.derivative(self.times, judged)
            except Exception:
                if precision[0].dtype == leaves[0].dtype or torch.compiler.is_dynamo_compiling():
                    raise
                continue  # fn cannot take float64
            if point.precise:
                break
        if not point.precise:  # fn takes float64 and computes in less
            point.eps = max(point.eps, point.found_eps)
            estimates = point.derivative(self.times, judged)
        value, error = [e.value for e in estimates], [e.error for e in estimates]
        return point.tree(value, self.times), point.tree(error, self.times)


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


class _Point:
    """All differences at one x. The blocks of a k-th derivative stand in the order y, x, x, ..."""

    def __init__(self, how: Differences, part: Partition, x: tuple[Tensor, ...], others: tuple[Tree, ...]) -> None:
        self.how, self.part, self.x, self.others = how, part, x, others
        self.x_dims = event_dims(how.event_dim, part, x, how.caller, "event_dim")
        self.eps = max(how.noise, torch.finfo(x[0].dtype).eps)
        self.y: Partition | None = None
        self.y_batch: list[int] = []
        self.precise, self.found_eps = True, 0.0
        self.sizes: list[Tensor] = []

    def _is_far(self, times: int) -> bool:
        """Whether the two lengths, |x| and 1, are far apart somewhere; a trace cannot tell, nor can meta tensors."""
        if self.how.step is not None:
            return False
        return not all(map(_torch.can_inspect, self.x)) or any(bool(_is_far(t, times).any()) for t in self.x)

    def tree(self, blocks: list[Tree], times: int) -> Tree:
        """Blocks in the structure of y, in each leaf that of x, and so on."""
        n = len(self.x)
        for _ in range(times):
            blocks = [_hollow(self.part).join(blocks[i : i + n]) for i in range(0, len(blocks), n)]
        assert self.y is not None
        return _hollow(self.y).join(blocks)

    def values_at_x(self) -> tuple[Tensor, ...]:
        """fn itself."""
        return self._values(self.x)

    def derivative(self, times: int, judged: bool) -> list[Estimate]:
        """One estimate for each block; each number takes the better of the steps that were tried."""
        far = self._is_far(times)
        kinds, judged = (False, True) if far else (False,), judged or far
        if times > 1:  # the inner differences use the same kind of step
            self.sizes = [t.abs() for t in self.values_at_x()] if judged else []
            tried = [self._difference(self.x, times, times, (kind,), judged)[0] for kind in kinds]
        else:
            tried = self._difference(self.x, 1, 1, kinds, judged)
        return [functools.reduce(Estimate.or_else, blocks) for blocks in zip(*tried, strict=True)]

    def _difference(self, x: Tensors, times: int, total: int, kinds: tuple[bool, ...], judged: bool) -> list[list[Estimate]]:
        """For each kind of step the estimates of all blocks."""

        def inner(x: Tensors) -> tuple[Tensor, ...]:
            if times == 1:
                return self._values(x)
            return tuple(e.value for e in self._difference(x, times - 1, total, kinds, False)[0])

        along = [self._along(inner, x, i, times, total, kinds, judged) for i in range(len(x))]
        return [list(itertools.chain(*zip(*(leaf[k] for leaf in along), strict=True))) for k in range(len(kinds))]

    def _values(self, x: Tensors) -> tuple[Tensor, ...]:
        how = self.how
        result = solve(how.values(), self.part.join(x), self.others, {})
        self.y, leaves = Partition.of(result[0] if how.has_aux else result, is_differentiable)
        if not leaves:
            raise StructureError(f"`{how.caller}`: fn returned no floating tensor or array, so there is nothing to difference.")
        dims = y_event_dims(how, self.y, leaves)
        self.y_batch = [t.ndim - d for t, d in zip(leaves, dims, strict=True)]
        coarse = [torch.finfo(t.dtype).eps for t in leaves if real_dtype(t.dtype) != self.x[0].dtype]
        self.precise &= not coarse
        self.found_eps = max([self.found_eps, *coarse])
        return leaves

    def _along(
        self, inner: Any, x: Tensors, i: int, times: int, total: int, kinds: tuple[bool, ...], judged: bool
    ) -> list[list[Estimate]]:
        """Differences along each number of leaf i of x, for each kind of step; all points in one batched call."""
        event = x[i].shape[x[i].ndim - self.x_dims[i] :]
        units = unit_vectors(x[i], event)
        if self.how.method == "complex" and times == 1:
            size = self.x[i].abs().clamp(max=1)
            steps = [_IMAGINARY_STEP * torch.where(size > 0, size, 1.0)]
            values, _ = values_at(inner, x, i, [steps[0] * units], (1j,), center=False)
            parts = [_imaginary_part(self.how.caller, t) for t in values[0]]
            estimates = self._estimates(parts, steps[0], event, len(x), times, None, [t[0].real for t in values[0]])
            return [estimates] * len(kinds)
        rule = self._stencil(total)
        rule = rule if judged else rule.bare()
        # From the point itself, also where x is one beside it: a step that jumps would be differentiated too.
        steps = [self._step(self.x[i], rule, total, kind) for kind in kinds]
        moves = tuple(c for c in rule.points if c)
        values, at_x = values_at(inner, x, i, [h * units for h in steps], moves, center=0.0 in rule.points)
        if at_x is not None:
            place = rule.points.index(0.0)
            values = [[with_center(t, c, place) for t, c in zip(v, at_x, strict=True)] for v in values]
        return [self._estimates(v, h, event, len(x), times, rule) for v, h in zip(values, steps, strict=True)]

    def _estimates(
        self,
        values: list[Tensor],
        h: Tensor,
        event: Sequence[int],
        leaves: int,
        times: int,
        rule: Stencil | None,
        of_x: Sequence[Tensor] = (),
    ) -> list[Estimate]:
        """What values (points, n, *value) say of each block (*value, *event)."""
        n = prod(event)
        steps = h.flatten(h.ndim - len(event)).movedim(-1, 0) if event else h.unsqueeze(0)
        found = []
        for a, value in enumerate(values):
            batch, shape = self.y_batch[a // leaves ** (times - 1)], (*value.shape[2:], *event)
            lined_up = steps.reshape((n, *(1,) * (batch + 1 - steps.ndim), *steps.shape[1:], *(1,) * (value.ndim - 2 - batch)))
            if rule is None:  # the complex step: no cancellation
                block = value[0] / lined_up
                terms = block.abs() + of_x[a].abs() * _IMAGINARY_STEP / lined_up
                estimate = Estimate(block, self.eps * terms, lined_up.expand(block.shape))
            else:
                # Values that are differences themselves have lost a factor of the step each time.
                lost = lined_up.clamp(max=rule.step(self.eps, times)) ** (times - 1)
                judges = self.sizes and times > 1
                noise = self._noise(a // leaves ** (times - 1), value, lined_up, times) if judges else 0.0
                estimate = rule.combine(value, lined_up, self.eps / lost, noise)
            found.append(Estimate(*(t.movedim(0, -1).reshape(shape) for t in estimate)))
        return found

    def _noise(self, leaf: int, value: Tensor, h: Tensor, times: int) -> Tensor:
        """The rounding of fn in its derivatives, where these are far below it: beside large x."""
        size = self.sizes[leaf]
        large = torch.stack([(t.abs() > 1).any() for t in self.x]).any()
        return self.eps * size.reshape((*size.shape, *(1,) * (value.ndim - 2 - size.ndim))) * large / h ** (times - 1)

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
            return given_step(self.how.caller, self.how.step, x)
        size = x.abs()
        length = torch.where(_is_far(x, total), size if relative else 1.0, size.clamp(max=1))
        length = torch.where(size > 0, length, 1.0)
        h = rule.step(self.eps, total - (self.how.method == "complex")) * length
        # A power of two, and no smaller than some units in the last place of x: then x + c h is exact.
        return torch.exp2(torch.maximum(h, 8 * torch.finfo(x.dtype).eps * size).log2().floor())


# Far below anything that f could notice: (x + ih)^2 = x^2 up to rounding.
_IMAGINARY_STEP = 2.0**-70


def _is_far(x: Tensor, times: int) -> Tensor:
    """Where |x| and 1 differ by more than a factor that costs little; a small step costs more each time."""
    size = x.abs()
    return (size > 0) & ((size < (1e-2 if times == 1 else 0.5)) | (size > 1e2))


def _hollow(part: Partition) -> Partition:
    """The same structure without what stands in the places that are not chosen."""
    return replace(part, mould=(None,) * len(part.mould))


def check_real_values(caller: str, leaves: Sequence[Tensor]) -> None:
    """The imaginary part of f(x + ih) is the derivative only where f(x) itself has none."""
    if any(t.is_complex() for t in leaves):
        raise NoDerivativeError(
            f"`{caller}`: method='complex' takes the imaginary part for the derivative, and fn is complex at real x. Use "
            "method='central'."
        )


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
