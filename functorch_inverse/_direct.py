"""The commonest call of an inverse: plain autograd, one tensor to one tensor of its shape, and nothing hidden in f or g.

What any other call has to find out about pytrees, event dims and closures is kept here from one call to the next.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._attach import attach_plainly
from functorch_inverse._call import Given, Values, solve
from functorch_inverse._capture import Captured
from functorch_inverse._inverse import InverseProblem
from functorch_inverse._pullback import Tensors, check_graph
from functorch_inverse._rules import ImplicitRule, Pull
from functorch_inverse._sight import Sight
from functorch_inverse._tree import ONE_TENSOR, PLAIN, Tree
from functorch_inverse._values import is_array, output
from functorch_inverse._vectors import Like

__all__ = ["solve_inverse"]

_has_graph = operator.attrgetter("requires_grad")
_DTYPES = (torch.float64, torch.float32)


def solve_inverse(problem: InverseProblem, x: Tree, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> Tree:
    """g(x, *args, **kwargs) with its derivatives to x, args and whatever f closes over."""
    tensors = (x, *args)
    if kwargs or not (_torch.undisturbed() and all(map(_is_plain, tensors)) and problem.is_direct(x.ndim)):
        return solve(problem, x, args, kwargs)
    g, f = problem.sees
    live = torch.is_grad_enabled() and any(map(_has_graph, tensors))
    if not _closed(g) or (live and not _closed(f)):
        return solve(problem, x, args, kwargs)
    plain = [t.detach() for t in tensors]
    with nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
        result = problem.g(*plain)
    y = output(result, x, plain) if is_array(result) else None
    if y is None or y.shape != x.shape or y.dtype is not x.dtype:
        return solve(replace(problem, g=_Returned(result)), x, args, {})
    return attach_plainly(_rule(problem, y, x, args), y, x, args) if live else y


def _is_plain(leaf: Any) -> bool:
    return type(leaf) in PLAIN and leaf.dtype in _DTYPES and leaf.layout is torch.strided and not _torch.is_wrapped(leaf)


def _closed(sight: Sight) -> bool:
    """Whether everything that a function reaches is seen, and none of it has a derivative."""
    reach = sight.reach()
    return reach.complete and not reach.modules and not any(map(_torch.is_open, reach.tensors))


def _rule(problem: InverseProblem, y: Tensor, x: Tensor, args: Sequence[Tensor]) -> ImplicitRule:
    """The rule of an earlier call with as many dims, if f still reads the same."""
    key, sight = (x.ndim, len(args)), problem.sees[1]
    captured, rule = problem.rules.get(key, (None, None))
    if captured is None or captured.reach is not sight.reach() or not captured.unchanged:
        captured = Captured.of(sight)
        rule, _, _ = problem.rule(Given.of(x, tuple(args), {}), Values(ONE_TENSOR, (y,), (True,), ()), captured)
        if rule.equation.y_dims == rule.equation.x_dims == (0,):
            rule = NumberRule(rule.equation, rule.linear_solver, problem.evidence, captured)
        problem.rules[key] = captured, rule
    return rule


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
            out = self.f(at, *leaves)
        if type(out) is not Tensor or out.shape != at.shape or out.dtype is not at.dtype or not out.requires_grad:
            return super().vjp(y, theta, x, wanted)
        check_graph((out,), (at, *chosen))
        (slope,) = _torch.graph_grad((out,), (at,), (torch.ones_like(at),))
        return functools.partial(_pull, out, chosen, slope)


def _pull(out: Tensor, chosen: Sequence[Tensor], slope: Tensor, v: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
    u = v[0] / slope
    return (u,), _torch.graph_grad((out,), tuple(chosen), (-u,)) if chosen else ()
