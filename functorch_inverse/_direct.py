"""The commonest call of an inverse: plain autograd, one tensor to one tensor of its shape.

What any other call has to find out about pytrees, event dims and closures is kept here from one call to the next.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._attach import attach_plainly
from functorch_inverse._call import Given, Values, solve
from functorch_inverse._capture import Captured
from functorch_inverse._graph import check_graph
from functorch_inverse._inverse import InverseProblem
from functorch_inverse._pullback import Tensors, in_torch
from functorch_inverse._rules import ImplicitRule, Pull
from functorch_inverse._tree import ONE_TENSOR, PLAIN, Tree
from functorch_inverse._values import is_array, output
from functorch_inverse._vectors import Like
from functorch_inverse.operators import Equation

__all__ = ["solve_inverse"]

_has_graph = operator.attrgetter("requires_grad")
_DTYPES = (torch.float64, torch.float32)


def solve_inverse(problem: InverseProblem, x: Tree, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> Tree:
    """g(x, *args, **kwargs) with its derivatives to x, args and whatever f closes over."""
    given, grad = (x, *args), torch.is_grad_enabled()
    if kwargs or not (_torch.undisturbed() and all(map(_is_plain, given)) and problem.is_direct(x.ndim)):
        return solve(problem, x, args, kwargs)
    inner, seen = _seen(problem, 0).captured, _seen(problem, 1) if grad else _NOTHING
    outer = seen.captured
    if not outer.complete:
        return solve(problem, x, args, kwargs)
    live = grad and any(map(_has_graph, (*given, *outer.tensors)))
    plain = [t.detach() for t in (*given, *inner.tensors)]
    n = len(given)
    if grad and not inner.tensors:
        result = problem.g(*plain)
    else:
        with torch.enable_grad(), inner.running(plain[n:]):
            result = problem.g(*plain[:n])
    y = output(result, x, plain) if is_array(result) else None
    if y is None or y.shape != x.shape or y.dtype is not x.dtype:
        return solve(replace(problem, g=_Returned(result)), x, args, {})
    return attach_plainly(_rule(problem, y, x, args, seen), y, x, (*args, *outer.tensors)) if live else y


def _is_plain(leaf: Any) -> bool:
    return type(leaf) in PLAIN and leaf.dtype in _DTYPES and leaf.layout is torch.strided and not _torch.is_wrapped(leaf)


class _Seen(NamedTuple):
    """What a function captures, and the equations of calls in which it did, by the dims of x and the number of args."""

    captured: Captured
    equations: dict[tuple[int, int], Equation]


_NOTHING = _Seen(Captured(), {})


def _seen(problem: InverseProblem, which: int) -> _Seen:
    """That of g (0) or f (1); the same object as long as it captures nothing."""
    sight, last = problem.sees[which], problem.kept.get(which)
    reach = sight.reach()
    if last is not None and last.captured.reach is reach and (not reach.tensors or last.captured.captures_nothing_still()):
        return last
    seen = _Seen(Captured.of(sight, reach=reach), {})
    if seen.captured.tensors:
        problem.kept.pop(which, None)
    else:
        problem.kept[which] = seen
    return seen


def _rule(problem: InverseProblem, y: Tensor, x: Tensor, args: Tensors, seen: _Seen) -> ImplicitRule:
    """A rule of its own for each call, since it keeps factors; its equation is that of an earlier call, if there is one."""
    key, (captured, equations) = (x.ndim, len(args)), seen
    equation = equations.get(key)
    if equation is None:
        rule, _, _ = problem.rule(Given.of(x, tuple(args), {}), Values(ONE_TENSOR, (y,), (True,), ()), captured)
        equations[key] = equation = rule.equation
    if equation.y_dims == equation.x_dims == (0,) and not captured.tensors:
        return NumberRule(equation, problem.linear_solver, problem.evidence, captured)
    return ImplicitRule(equation, problem.linear_solver)


class _Returned:
    """A g that has been called already."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, *_: Any) -> Any:
        return self.result


@dataclass(frozen=True, eq=False)
class NumberRule(ImplicitRule):
    """Each number is a sample of its own: x receives v / f'(y), where f' takes one pass through the graph of f.

    What is not plain autograd of plain numbers takes the general way.
    """

    f: Callable[..., Any]
    captured: Captured

    def vjp(self, y: Tensors, theta: Tensors, x: Sequence[Like], wanted: Sequence[int]) -> Pull:
        """The map from cotangents v of y to what x and the wanted theta receive."""
        if not _torch.plain():
            return super().vjp(y, theta, x, wanted)
        at = y[0].detach().requires_grad_()
        leaves = [t.detach() for t in theta]
        chosen = [leaves[i].requires_grad_() for i in wanted]
        self.captured.verify()
        with torch.enable_grad():
            out = in_torch(self.f, at, *leaves)
        if type(out) is not Tensor or out.shape != at.shape or out.dtype is not at.dtype or not out.requires_grad:
            return super().vjp(y, theta, x, wanted)
        check_graph((out,), (at, *chosen))
        (slope,) = _torch.graph_grad((out,), (at,), (torch.ones_like(at),))
        return functools.partial(_pull, out, chosen, slope)


def _pull(out: Tensor, chosen: Sequence[Tensor], slope: Tensor, v: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
    u = v[0] / slope
    return (u,), _torch.graph_grad((out,), tuple(chosen), (-u,)) if chosen else ()
