"""Derivatives from values alone."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._call import Given, Values, solve
from functorch_inverse._capture import Captured
from functorch_inverse._differences import Derivative, Differences, ValueProblem, check_real_values, out_prefix
from functorch_inverse._explicit import JacobianProblem
from functorch_inverse._stencils import Method, Order, stencil
from functorch_inverse._tree import Partition, Tree, event_dims, is_differentiable, prefix_values
from functorch_inverse._values import VmapMethod, check_vmap_method
from functorch_inverse.custom import Chosen, CustomJacobian, check_argnums, check_callables, places_of

__all__ = ["DifferenceFunction", "finite_difference", "numerical_jacobian"]


@dataclass(frozen=True, kw_only=True)
class _DifferenceProblem(JacobianProblem):
    """The k-th derivative, with that of one order more as its Jacobian."""

    how: Differences
    times: int
    probes: ClassVar[bool] = False  # looking at the evidence would cost as much as the derivative

    @classmethod
    def of(cls, how: Differences, times: int) -> "_DifferenceProblem":
        return cls(
            caller=how.caller,
            g=Derivative(how, times) if times else how.fn,
            evidence=_Level(how, times + 1),
            event_dim=how.event_dim,
            out_event_dim=how.out_event_dim,
            vmap_method=_for_derivative(how) if times else how.vmap_method,
            has_aux=how.has_aux and not times,
            how=how,
            times=times,
        )

    def attach(self, given: Given, values: Values, captured: Captured) -> tuple[Tensor, ...]:
        """The leaves with their derivative; a trace ends where no higher one can be asked for."""
        if self.how.method == "complex" and not self.times:
            check_real_values(self.caller, values.leaves)
        if torch.compiler.is_dynamo_compiling() and self.times >= _torch.derivative_order():
            return values.leaves
        return super().attach(given, values, captured)

    def _y_dims(self, given: Given, values: Values) -> tuple[int, ...]:
        """Those of fn's own output, and those of x for each derivative."""
        if not self.times:
            return super()._y_dims(given, values)
        part, x = Partition.of(given.x.join(given.x_tensors), is_differentiable)
        x_dims = event_dims(self.event_dim, part, x, self.caller, "event_dim")
        more = [sum(dims) for dims in itertools.product(x_dims, repeat=self.times)]
        own = prefix_values(out_prefix(self.how), values.y, values.tensors, self.caller, "out_event_dim")
        pairs = zip(values.tensors, own, itertools.cycle(more), strict=False)
        return tuple(t.ndim if d is None else d + rest for t, d, rest in pairs)


def _for_derivative(how: Differences) -> VmapMethod | None:
    """How vmap calls a derivative: with a leading dim only where that is a batch dim and no part of the sample."""
    return None if how.vmap_method is None or (how.vmap_method, how.event_dim) == ("broadcast", 0) else "sequential"


@dataclass(frozen=True)
class _Level:
    """The k-th derivative, itself differentiable."""

    how: Differences
    times: int

    def __call__(self, x: Tree, *others: Tree) -> Tree:
        return solve(_DifferenceProblem.of(self.how, self.times), x, others, {})


class DifferenceFunction(CustomJacobian):
    """A black box with finite differences as derivatives: what `finite_difference` returns."""

    def __init__(self, how: Differences, fn: Callable[..., Any], argnums: int | tuple[int, ...]) -> None:
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
        fn: the function, as g of `custom_inverse`, called again by each derivative; keyword arguments go along. For
            float32 input it is evaluated in float64 where it can, so that the result is right to float32.
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
    numbers = places_of(caller, argnums, len(args))
    chosen = tuple(args[i] for i in numbers)
    others = tuple(arg for i, arg in enumerate(args) if i not in numbers)
    problem = ValueProblem(caller=caller, g=_Judged(how), event_dim=event_dim, vmap_method=_for_derivative(how))
    return solve(problem, chosen if isinstance(argnums, tuple) else chosen[0], others, {})


@dataclass(frozen=True)
class _Judged:
    how: Differences

    def __call__(self, x: Tree, *others: Tree) -> tuple[Tree, Tree]:
        return Derivative(self.how, 1).evaluate(x, others, judged=True)


def _differences(caller: str, fn: Callable[..., Any], argnums: Any, method: Any, order: Any, *rest: Any) -> Differences:
    check_callables(caller, fn=fn)
    check_argnums(caller, argnums)
    stencil(caller, method, order)
    how = Differences(caller, Chosen(fn, argnums), method, order, *rest)
    check_vmap_method(caller, how.vmap_method)
    if not isinstance(how.step, int | float | Tensor | None) or not isinstance(how.noise, int | float):
        raise TypeError(
            f"`{caller}`: step={how.step!r}, noise={how.noise!r}: `step` is a number, a tensor or None, `noise` a number."
        )
    if not 0 <= how.noise < 1 or (isinstance(how.step, int | float) and not 0 < how.step < float("inf")):
        raise ValueError(
            f"`{caller}`: step={how.step}, noise={how.noise}: `step` is None or positive and finite, `noise` not negative and "
            "below 1, relative to the values."
        )
    return how
