"""Derivatives from values alone."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._call import Given, Problem, Values, solve
from functorch_inverse._capture import Captured
from functorch_inverse._explicit import JacobianProblem
from functorch_inverse._pullback import Tensors
from functorch_inverse._stencils import Method, Order, Stencil, stencil
from functorch_inverse._tree import Partition, Tree, event_dims, flatten, is_differentiable, unflatten
from functorch_inverse._values import VmapMethod, check_vmap_method
from functorch_inverse._vectors import real_dtype
from functorch_inverse.custom import Chosen, CustomJacobian, check_argnums, check_callables
from functorch_inverse.errors import NoDerivativeError, StructureError

__all__ = ["finite_difference", "numerical_jacobian"]


@dataclass(frozen=True)
class _Differences:
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
        return _ValueProblem(
            caller=self.caller,
            g=self.fn,
            event_dim=self.event_dim,
            out_event_dim=self.out_event_dim,
            vmap_method=self.vmap_method,
            has_aux=self.has_aux,
            keeps_dtypes=True,
        )


@dataclass(frozen=True, kw_only=True)
class _ValueProblem(Problem):
    def attach(self, given: Given, values: Values, captured: Captured) -> tuple[Tensor, ...]:
        return values.leaves


@dataclass(frozen=True)
class _Derivative:
    """The k-th derivative of fn as a function of plain tensors: a tree of y's structure, then k times x's."""

    how: _Differences
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


Blocks = list[tuple[Tensor, Tensor]]


class _Point:
    """All differences at one x. The blocks of a k-th derivative stand in the order y, x, x, ..."""

    def __init__(self, how: _Differences, part: Partition, x: tuple[Tensor, ...], others: tuple[Tree, ...]) -> None:
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
        blocks = []
        for value, batch in rows:
            lined_up = steps.reshape(n, *(1,) * (batch + 1 - steps.ndim), *steps.shape[1:], *(1,) * (value.ndim - 2 - batch))
            if by_imaginary:
                block = value[0] / lined_up
                error = self.eps * block.abs()
            else:
                block, error = rule.combine(value, lined_up, self.eps)
            blocks.append(tuple(t.movedim(0, -1).reshape(*value.shape[2:], *event) for t in (block, error)))
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
    return tuple(torch.where(doubts[1] < doubts[0], b, a) for a, b in zip(one, other, strict=True))


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


_WIDE = {t: torch.float64 for t in (torch.float16, torch.bfloat16, torch.float32)} | {torch.complex64: torch.complex128}


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


def y_event_dims(how: _Differences, y: Partition, leaves: Sequence[Tensor]) -> tuple[int, ...]:
    """How many trailing dims of each leaf of y make up one sample."""
    return event_dims(_out_prefix(how), y, leaves, how.caller, "out_event_dim")


def _out_prefix(how: _Differences) -> Tree:
    if how.out_event_dim is not None:
        return how.out_event_dim
    return next((d for d in flatten(how.event_dim)[0] if d is not None), None)


# --- as a function with derivatives ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _DifferenceProblem(JacobianProblem):
    """The k-th derivative, with that of one order more as its Jacobian."""

    how: _Differences
    times: int
    probes: ClassVar[bool] = False  # looking at the evidence would cost as much as the derivative

    @classmethod
    def of(cls, how: _Differences, times: int) -> "_DifferenceProblem":
        return cls(
            caller=how.caller,
            g=_Derivative(how, times) if times else how.fn,
            evidence=_Level(how, times + 1),
            event_dim=how.event_dim,
            out_event_dim=how.out_event_dim,
            vmap_method=how.vmap_method,
            has_aux=how.has_aux and not times,
            how=how,
            times=times,
        )

    def attach(self, given: Given, values: Values, captured: Captured) -> tuple[Tensor, ...]:
        """The leaves with their derivative; a trace ends where no higher one can be asked for."""
        if torch.compiler.is_dynamo_compiling() and self.times >= _torch.derivative_order():
            return values.leaves
        return super().attach(given, values, captured)

    def _y_dims(self, given: Given, values: Values) -> tuple[int, ...]:
        """Those of fn's own output, and those of x for each derivative."""
        part, x = Partition.of(given.x.join(given.x_tensors), is_differentiable)
        x_dims = event_dims(self.event_dim, part, x, self.caller, "event_dim")
        more = [sum(dims) for dims in itertools.product(x_dims, repeat=self.times)]
        count = len(values.tensors) // len(more)
        said = flatten(_out_prefix(self.how))[0]
        own = said * count if len(said) == 1 else said
        paths = itertools.product(own, more)
        return tuple(
            t.ndim if d is None else d + rest for t, (d, rest) in zip(values.tensors, paths, strict=True)
        )


@dataclass(frozen=True)
class _Level:
    """The k-th derivative, itself differentiable."""

    how: _Differences
    times: int

    def __call__(self, x: Tree, *others: Tree) -> Tree:
        return solve(_DifferenceProblem.of(self.how, self.times), x, others, {})


class DifferenceFunction(CustomJacobian):
    """A black box with finite differences as derivatives: what `finite_difference` returns."""

    def __init__(self, how: _Differences, fn: Callable[..., Any], argnums: int | tuple[int, ...]) -> None:
        super().__init__(_DifferenceProblem.of(how, 0), fn, argnums)
        self.how = how

    def __call__(self, *args: Tree, **kwargs: Any) -> Tree:
        """fn(*args, **kwargs)."""
        if not kwargs:
            return super().__call__(*args)
        # The differences call fn with the same keywords.
        fn = functools.partial(self.__wrapped__, **kwargs)
        return DifferenceFunction(replace(self.how, fn=Chosen(fn, self.argnums)), fn, self.argnums)(*args)


def finite_difference(
    fn: Callable[..., Any],
    *,
    argnums: int | tuple[int, ...] = 0,
    method: Method = "central",
    order: Order = 2,
    step: float | Tensor | None = None,
    noise: float = 0.0,
    event_dim: Tree = None,
    out_event_dim: Tree = None,
    vmap_method: VmapMethod | None = None,
    has_aux: bool = False,
) -> DifferenceFunction:
    r"""Give a function that is known by its values alone the derivatives of finite differences.

    .. math:: \frac{\partial y}{\partial x_j} \approx \frac1{h_j} \sum_c w_c\, g(x + c\, h_j e_j)

    Every number has its own step, made from the precision of the values, the order and the size of the number. Where
    numbers are very small or very large, two steps are tried, one relative to the number and one absolute, and each
    entry of the result takes the better one by its own error estimate. Second and third derivatives difference the
    function again, each order with the step that it needs.

    Args:
        fn: the function, as g of `custom_inverse`; keyword arguments go along. For float32 input it is evaluated in
            float64 where it can, so that the result is right to float32.
        argnums: the position, or tuple of positions, to differentiate.
        method: "central"; "forward" or "backward" at the edge of a domain; "complex", one evaluation at x + ih for
            functions that are holomorphic and take complex numbers: no cancellation, right to machine precision.
        order: the order of accuracy: 2, 4 or 6 for central differences, 1, 2 or 3 for one-sided ones, or "auto",
            Richardson extrapolation to the smallest error estimate. The complex step needs none.
        step: an absolute step instead, a number or a tensor that broadcasts against x.
        noise: how precise fn is, relative to its values, if worse than rounding: 1e-6 for a solver's tolerance, say.
        event_dim, out_event_dim, vmap_method, has_aux: as for `custom_jacobian`. With event_dim=0 all numbers of x move
            at once, so that one batched call of fn serves everything; else x moves along one number of a sample at a
            time. All these points are one vmap: one call with "broadcast".

    Returns:
        A callable with the signature of fn.

    Raises:
        ValueError: an unknown method or order, or a step that is not positive.
        StructureError: x is complex or has no floating tensor.
        NoDerivativeError: method="complex" and fn returns real numbers; or a derivative flows into an argument outside
            argnums or into what fn closes over.

    Example:
        >>> import numpy as np
        >>> g = finite_difference(lambda x: np.exp(x.numpy()) * np.sin(2 * x.numpy()), order=4, event_dim=0)
        >>> x = torch.linspace(-1, 1, 5)
        >>> expected = torch.exp(x) * (torch.sin(2 * x) + 2 * torch.cos(2 * x))
        >>> torch.allclose(torch.func.grad(lambda x: g(x).sum())(x), expected)
        True

    Source: Press et al., Numerical Recipes, 3rd edition, section 5.7; Squire and Trapp, Using Complex Variables to
    Estimate Derivatives of Real Functions (1998) for the complex step.
    """
    return DifferenceFunction(
        _differences(
            "finite_difference", fn, argnums, method, order, step, noise, event_dim, out_event_dim, vmap_method, has_aux
        ),
        fn,
        argnums,
    )


def numerical_jacobian(
    fn: Callable[..., Any],
    *args: Tree,
    argnums: int | tuple[int, ...] = 0,
    method: Method = "central",
    order: Order = 2,
    step: float | Tensor | None = None,
    noise: float = 0.0,
    event_dim: Tree = None,
    out_event_dim: Tree = None,
    vmap_method: VmapMethod | None = None,
) -> tuple[Tree, Tree]:
    """The Jacobian by finite differences, with an estimate of its error.

    Args:
        fn: the function, and args where to look at it.
        argnums, method, order, step, noise, event_dim, out_event_dim, vmap_method: as for `finite_difference`.

    Returns:
        ``(J, error)``, both in the structure and shapes of ``torch.func.jacrev(fn, argnums)(*args)``, which are
        (*batch, *out_event, *in_event). `error` estimates truncation (from the difference of two orders) and rounding.
        Neither has a derivative.

    Raises:
        ValueError, StructureError, NoDerivativeError: as for `finite_difference`.

    Example:
        >>> J, error = numerical_jacobian(torch.sin, torch.tensor([0.0, 1.0], dtype=torch.float64), order=4)
        >>> bool(((J - torch.diag(torch.tensor([0.0, 1.0]).cos())).abs() <= 10 * error + 1e-7).all())
        True
    """
    caller = "numerical_jacobian"
    how = _differences(caller, fn, argnums, method, order, step, noise, event_dim, out_event_dim, vmap_method, False)
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    chosen = tuple(args[i] for i in numbers)
    others = tuple(arg for i, arg in enumerate(args) if i not in numbers)
    problem = _ValueProblem(caller=caller, g=_Judged(how), event_dim=event_dim, vmap_method=vmap_method)
    return solve(problem, chosen if isinstance(argnums, tuple) else chosen[0], others, {})


@dataclass(frozen=True)
class _Judged:
    how: _Differences

    def __call__(self, x: Tree, *others: Tree) -> tuple[Tree, Tree]:
        return _Derivative(self.how, 1).evaluate(x, others, judged=True)


def _differences(caller: str, fn: Callable[..., Any], argnums: Any, method: Any, order: Any, *rest: Any) -> _Differences:
    check_callables(caller, fn=fn)
    check_argnums(caller, argnums)
    stencil(caller, method, order)
    how = _Differences(caller, Chosen(fn, argnums), method, order, *rest)
    check_vmap_method(caller, how.vmap_method)
    if how.noise < 0 or (isinstance(how.step, int | float) and not how.step > 0):
        raise ValueError(f"`{caller}`: step={how.step} and noise={how.noise} arrived; `step` is positive or None, `noise` not negative.")
    return how
