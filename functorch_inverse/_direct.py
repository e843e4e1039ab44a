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
from functorch_inverse._chunks import chunk_of, jacobian, widest
from functorch_inverse._dense import factorised
from functorch_inverse._graph import Graph, check_graph
from functorch_inverse._inverse import InverseProblem
from functorch_inverse._pullback import GraphPullback, Tensors, in_torch
from functorch_inverse._rules import ImplicitRule, Pull
from functorch_inverse._solvers import iteration
from functorch_inverse._tree import ONE_TENSOR, PLAIN, Tree
from functorch_inverse._values import is_array, output
from functorch_inverse._vectors import Like
from functorch_inverse.krylov import Krylov
from functorch_inverse.linear_solvers import LU
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
    # A parameter that is frozen now may be another one, or live, in the next call.
    if seen.captured.tensors or reach.modules:
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
    numbers, vectors, solver = *(equation.y_dims == equation.x_dims == (n,) for n in (0, 1)), problem.linear_solver
    if not captured.tensors and (numbers or (vectors and (type(solver) is LU or iteration(solver)))):
        return DirectRule(equation, solver, problem.evidence, captured)
    return ImplicitRule(equation, solver)


class _Returned:
    """A g that has been called already."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, *_: Any) -> Any:
        return self.result


@dataclass(frozen=True, eq=False)
class DirectRule(ImplicitRule):
    """The same rule by plain autograd of one real tensor: x receives A^-T v with A from the graph of one evaluation of f.

    What is more than that, or does not fit, takes the general way.
    """

    f: Callable[..., Any]
    captured: Captured

    def vjp(self, y: Tensors, theta: Tensors, x: Sequence[Like], wanted: Sequence[int]) -> Pull:
        """The map from cotangents v of y to what x and the wanted theta receive."""
        # Where there have been other derivatives, their factors serve this one.
        if not _torch.plain() or "system" in vars(self) or not y[0].numel():
            return super().vjp(y, theta, x, wanted)
        at = y[0].detach().requires_grad_()
        leaves = [t.detach() for t in theta]
        chosen = [leaves[i].requires_grad_() for i in wanted]
        self.captured.verify()
        with torch.enable_grad():
            out = in_torch(self.f, at, *leaves)
        if type(out) is not Tensor or out.shape != at.shape or out.dtype is not at.dtype or not out.requires_grad:
            return super().vjp(y, theta, x, wanted)
        graph = Graph(out, at, check_graph((out,), (at, *chosen)))
        return functools.partial(_pull, self._solve_with(graph), out, tuple(chosen))

    def _solve_with(self, graph: Graph) -> Callable[[Tensor], Tensor]:
        """v -> A^-T v."""
        if self.equation.y_dims == (0,):
            return _division(graph)
        krylov = iteration(self.linear_solver)
        return _lu(graph, self.linear_solver) if krylov is None else _iterated(graph, krylov)


def _division(graph: Graph) -> Callable[[Tensor], Tensor]:
    """Numbers: v / f'(y), where f' takes one pass."""
    (slope,) = _torch.graph_grad((graph.output,), (graph.y,), (torch.ones_like(graph.y),))
    return lambda v: v / slope


def _lu(graph: Graph, solver: Any) -> Callable[[Tensor], Tensor]:
    """Vectors: one factorisation of A."""
    out, y = graph.output, graph.y
    *batch, rows = out.shape
    chunk = chunk_of(solver.chunk_size, rows, out.numel() * rows, lambda: widest(graph.nodes))
    matrix = graph.matrix(chunk)
    if matrix is None:
        matrix = jacobian(lambda w: _torch.graph_grad((out,), (y,), (w,))[0], batch, rows, out, chunk=chunk)
    return functools.partial(factorised(solver, matrix, owned=True).solve, transpose=True)


def _iterated(graph: Graph, krylov: Krylov) -> Callable[[Tensor], Tensor]:
    """Vectors: products with A^T, and with A where they are asked for."""
    tape = graph.tape()
    if tape is not None:
        return functools.partial(krylov.value, tape.pull, transposed=tape.push, transpose=True, ahead=tape.ahead)
    at = GraphPullback.of_graph(graph)
    return functools.partial(krylov.value, lambda w: at.to_y((w,))[0], transposed=lambda v: at.push((v,))[0], transpose=True)


def _pull(
    solve: Callable[[Tensor], Tensor], out: Tensor, chosen: tuple[Tensor, ...], v: Sequence[Tensor]
) -> tuple[Tensors, Tensors]:
    u = solve(v[0])
    return (u,), _torch.graph_grad((out,), chosen, (-u,)) if chosen else ()
