"""The commonest call of an inverse: plain autograd, one tensor to one tensor of its shape.

What any other call has to find out about pytrees, event dims and closures is kept here from one call to the next.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from functorch_inverse import _torch
from functorch_inverse._attach import attach_plainly, pulled_back
from functorch_inverse._call import Given, Values, solve
from functorch_inverse._capture import Captured
from functorch_inverse._deferred import SMALL, Deferred, ForGraph
from functorch_inverse._graph import Graph, check_graph, stand_in_for
from functorch_inverse._hooks import unhooked
from functorch_inverse._in_place import check_unchanged, keeping
from functorch_inverse._inverse import InverseProblem
from functorch_inverse._legacy import through_vmap
from functorch_inverse._levels import plain_apply
from functorch_inverse._precision import autocasts
from functorch_inverse._prepare import division, preparation
from functorch_inverse._pullback import Tensors, in_torch
from functorch_inverse._reach import Opaque
from functorch_inverse._rules import ImplicitRule
from functorch_inverse._tree import ONE_TENSOR, PLAIN, Tree
from functorch_inverse._values import is_array, output
from functorch_inverse._vectors import Like
from functorch_inverse.operators import Equation

__all__ = ["solve_inverse"]

_has_graph = operator.attrgetter("requires_grad")
_DTYPES = (torch.float64, torch.float32)
_RESULTS = (Tensor, Deferred)


@_torch.called_eagerly
def solve_inverse(problem: InverseProblem, x: Tree, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> Tree:
    """g(x, *args, **kwargs) with its derivatives to x, args and whatever f closes over."""
    given, grad = (x, *args), torch.is_grad_enabled()
    if kwargs or not (_torch.undisturbed() and all(map(_is_plain, given)) and problem.is_direct(x.ndim)):
        return solve(problem, x, args, kwargs)
    inner, seen = _seen(problem, 0).captured, _seen(problem, 1) if grad else _NOTHING
    outer = seen.captured
    if not outer.complete or (outer.loose and outer.doubtful):
        return solve(problem, x, args, kwargs)
    outer.refuse_memos()
    live = grad and any(map(_has_graph, (*given, *outer.tensors)))
    plain = [t.detach() for t in (*given, *inner.tensors)]
    n = len(given)
    if grad and not inner.tensors:
        held = [problem.g(*plain)]
    else:
        with torch.enable_grad(), inner.running(plain[n:]):
            held = [problem.g(*plain[:n])]
    y = output(held, x) if is_array(held[0]) else None
    if y is None or y.shape != x.shape or y.dtype is not x.dtype:
        return solve(replace(problem, g=_Returned(held if y is None else [y])), x, args, {})
    if not live:
        return y
    if outer.frozen:
        seen = _Seen(outer.after_g(), {})
    return _attached(_way(problem, y, x, args, seen), y, x, args)


def _is_plain(leaf: Any) -> bool:
    ordinary = type(leaf) in PLAIN and leaf.dtype in _DTYPES and leaf.layout is torch.strided
    return ordinary and not (_torch.is_wrapped(leaf) or leaf.is_neg())


class _Seen(NamedTuple):
    """What a function captures, and the ways of calls in which it did, by the dims of x and the number of args."""

    captured: Captured
    ways: dict[tuple[int, int], "_Way"]


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


def _way(problem: InverseProblem, y: Tensor, x: Tensor, args: Tensors, seen: _Seen) -> "_Way":
    """That of an earlier call, if there is one."""
    key = x.ndim, len(args)
    way = seen.ways.get(key)
    if way is None:
        seen.ways[key] = way = _Way(problem, _equation(problem, y, x, args, seen.captured), seen.captured)
    return way


def _equation(problem: InverseProblem, y: Tensor, x: Tensor, args: Tensors, captured: Captured) -> Equation:
    key = x.ndim, len(args)
    equation: Any = problem.kept.get(key)
    if equation is None:
        rule, _, _ = problem.rule(Given.of(x, tuple(args), {}), Values(ONE_TENSOR, (y,), (True,), ()), _NOTHING.captured)
        problem.kept[key] = equation = rule.equation
    return replace(equation, f=replace(equation.f, captured=captured))


class _Returned(Opaque):
    """A g that has been called already; what it holds is nothing that g reads."""

    def __init__(self, held: list[Any]) -> None:
        self.held = held

    def __call__(self, *_: Any) -> Any:
        return self.held.pop()


class _Way:
    """From a cotangent v of y to what x and some args receive; what is more, or does not fit, takes the general way."""

    def __init__(self, problem: InverseProblem, equation: Equation, captured: Captured) -> None:
        self.equation, self.linear_solver, self.captured = equation, problem.linear_solver, captured
        numbers, vectors = (equation.y_dims == equation.x_dims == (n,) for n in (0, 1))
        self.evidence = problem.evidence
        self.f = ForGraph(problem.evidence) if numbers else problem.evidence
        self.prepare = division if numbers else preparation(self.linear_solver) if vectors else None
        self.is_short = self.prepare is not None and all(map(_is_plain, captured.tensors))

    def rule(self) -> ImplicitRule:
        """The general way; a rule of its own for each call, since it keeps factors."""
        return ImplicitRule(self.equation, self.linear_solver)

    def pull(self, y: Tensor, theta: Tensors, wanted: Sequence[bool]) -> "_Pull | None":
        """A^-T v and -C^T A^-T v as functions of v, by plain autograd: one evaluation of f. Grad mode is off outside."""
        if not y.numel() or self.prepare is None:
            return None
        at, leaves = y.detach().requires_grad_(), [t.detach() for t in theta]
        chosen = tuple([t.requires_grad_() for t, flag in zip(leaves, wanted, strict=True) if flag])
        stand_in_for(chosen)
        _torch.set_grad_enabled(True)
        try:
            out = self._evaluate(at, leaves)
        finally:
            _torch.set_grad_enabled(False)
        if type(out) not in _RESULTS or out.shape != at.shape or out.dtype is not at.dtype or not out.requires_grad:
            return None
        graph = Graph(out, at, check_graph((out,), (at,), chosen))
        return _Pull(self.prepare(graph, self.linear_solver), out, chosen)

    def _evaluate(self, y: Tensor, theta: Tensors) -> Any:
        """f, which reads its captured tensors from theta."""
        if self.captured.tensors:
            return in_torch(self.equation.f, (y,), theta)[0]
        if self.captured.changes() is not None:
            with self.captured.running((), later=True):
                return keeping((y, *theta), in_torch, self.evidence, y, *theta)
        f = self.f if y.nbytes >= SMALL else self.evidence
        if theta:
            return keeping((y, *theta), in_torch, f, y, *theta)
        before, out = y._version, in_torch(f, y)  # as `keeping` does, for one tensor
        if y._version != before:
            check_unchanged([before], (y,))
        return out


class _Pull(NamedTuple):
    """u = A^-T v, and the graph that gives the chosen args their -C^T u."""

    solve: Callable[[Tensor], Tensor]
    output: Tensor
    chosen: tuple[Tensor, ...]


def _attached(way: _Way, y: Tensor, x: Tensor, args: Tensors) -> Tensor:
    """y with its derivatives."""
    if not way.is_short:
        return attach_plainly(way.rule(), y, x, (*args, *way.captured.tensors))
    return _apply(way, 1, 1, (y,), x, *args, *way.captured.tensors)


class _Short(Function):
    """The arguments have the places that they have in the general way."""

    @staticmethod
    def forward(ctx: Any, way: _Way, n_y: int, n_x: int, y: tuple[Tensor], x: Tensor, *theta: Tensor) -> Tensor:
        ctx.way, ctx.rule, ctx.kept = way, None, None
        ctx.save_for_backward(*y, *theta)
        ctx.set_materialize_grads(False)
        return y[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, ...]:
        if v is None:
            return (None,) * len(ctx.needs_input_grad)
        if _torch.is_legacy_batched(v):
            return _by_vmap(ctx, v)
        if _torch.top_hooks(False) is None:
            return _pulled(ctx, ctx.saved_tensors, v)
        with unhooked():
            return _pulled(ctx, ctx.saved_tensors, v)


_apply = plain_apply(_Short)
_by_vmap = through_vmap(_Short.backward)


def _pulled(ctx: Any, saved: Tensors, v: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[5:]
    # Where there have been other derivatives, their factors serve this one.
    if ctx.rule is not None or not _torch.plain() or autocasts(v):
        return _generally(ctx, saved, v)
    kept = ctx.kept  # once: another thread may be at it
    pull = kept[1] if kept is not None and kept[0] == wanted else ctx.way.pull(saved[0], saved[1:], wanted)
    if pull is None:
        return _generally(ctx, saved, v)
    # The factors serve the next backward of this node, and go with the graph.
    ctx.kept = (wanted, pull) if _torch.graph_is_kept() else None
    u = pull.solve(v)
    if not pull.chosen:
        return None, None, None, None, u, *[None] * len(wanted)
    received = iter(_torch.graph_grad((pull.output,), pull.chosen, (-u,), zeros=False))
    return None, None, None, None, u, *[next(received) if flag else None for flag in wanted]


def _generally(ctx: Any, saved: Tensors, v: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.rule is None:
        ctx.n_y, ctx.n_x, ctx.x, ctx.kept = 1, 1, [Like(v.shape, v.dtype)], (None, None)
        ctx.rule = ctx.way.rule()  # the last, since others look at it
    return pulled_back(ctx, saved, (v,))
