"""The commonest call of an inverse: plain autograd, one tensor to one tensor of its shape.

What any other call has to find out about pytrees, event dims and closures is kept here from one call to the next.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from functorch_inverse._sight import Sight
from functorch_inverse._tree import ONE_TENSOR, PLAIN, Tree
from functorch_inverse._values import is_array, output
from functorch_inverse._vectors import Like

__all__ = ["solve_inverse"]

_has_graph = operator.attrgetter("requires_grad")
_NOTHING = Captured()
_DTYPES = (torch.float64, torch.float32)


def solve_inverse(problem: InverseProblem, x: Tree, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> Tree:
    """g(x, *args, **kwargs) with its derivatives to x, args and whatever f closes over."""
    given, grad = (x, *args), torch.is_grad_enabled()
    if kwargs or not (_torch.undisturbed() and all(map(_is_plain, given)) and problem.is_direct(x.ndim)):
        return solve(problem, x, args, kwargs)
    inner, outer = _captured(problem, 0), _captured(problem, 1) if grad else _NOTHING
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
    return attach_plainly(_rule(problem, y, x, args, outer), y, x, (*args, *outer.tensors)) if live else y


def _is_plain(leaf: Any) -> bool:
    return type(leaf) in PLAIN and leaf.dtype in _DTYPES and leaf.layout is torch.strided and not _torch.is_wrapped(leaf)


def _captured(problem: InverseProblem, which: int) -> Captured:
    """What g (0) or f (1) captures; the same object as long as it is nothing."""
    sight: Sight = problem.sees[which]
    last: Captured | None = problem.kept.get(which)
    reach = sight.reach()
    if last is not None and last.reach is reach and (not reach.tensors or last.captures_nothing_still()):
        return last
    problem.kept[which] = captured = Captured.of(sight, reach=reach)
    if captured.tensors:
        del problem.kept[which]
    return captured


def _rule(problem: InverseProblem, y: Tensor, x: Tensor, args: Tensors, captured: Captured) -> ImplicitRule:
    """The rule; that of an earlier call with as many dims, if f captures nothing."""
    before, rule = problem.kept.get((x.ndim, len(args)), (None, None))
    if before is not captured or rule is None:
        rule, _, _ = problem.rule(Given.of(x, tuple(args), {}), Values(ONE_TENSOR, (y,), (True,), ()), captured)
        if rule.equation.y_dims == rule.equation.x_dims == (0,) and not captured.tensors:
            rule = NumberRule(rule.equation, rule.linear_solver, problem.evidence, captured)
        if not captured.tensors:
            problem.kept[x.ndim, len(args)] = captured, rule
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
            out = in_torch(self.f, at, *leaves)
        if type(out) is not Tensor or out.shape != at.shape or out.dtype is not at.dtype or not out.requires_grad:
            return super().vjp(y, theta, x, wanted)
        check_graph((out,), (at, *chosen))
        (slope,) = _torch.graph_grad((out,), (at,), (torch.ones_like(at),))
        return functools.partial(_pull, out, chosen, slope)


def _pull(out: Tensor, chosen: Sequence[Tensor], slope: Tensor, v: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
    u = v[0] / slope
    return (u,), _torch.graph_grad((out,), tuple(chosen), (-u,)) if chosen else ()
