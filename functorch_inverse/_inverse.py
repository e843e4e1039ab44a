"""The evidence is an inverse: f(g(x, *args), *args) = x."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_inverse._attach import attach
from functorch_inverse._call import Given, Problem, Values
from functorch_inverse._capture import Captured
from functorch_inverse._check import check_residual
from functorch_inverse._evidence import Evidence
from functorch_inverse._rules import ImplicitRule
from functorch_inverse._sight import Kept
from functorch_inverse._tree import Partition, Tree, event_dims, is_differentiable, is_number
from functorch_inverse._vectors import Layout, batch_shape, lead
from functorch_inverse.errors import StructureError
from functorch_inverse.linear_solvers import LinearSolver
from functorch_inverse.operators import Equation

__all__ = ["InverseProblem", "Pick", "target_of"]

Tensors = Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class InverseProblem(Problem):
    """g with its inverse f as evidence."""

    evidence: Callable[..., Any]
    linear_solver: LinearSolver

    def probe(self, given: Given, values: Values) -> Any:
        """f at y, since it may be undefined at x."""
        return self.evidence(values.y.join(values.tensors), *given.args.join(given.arg_tensors))

    @functools.cached_property
    def kept(self) -> Kept:
        """What direct calls have found out."""
        return Kept()

    @functools.cached_property
    def _direct_dim(self) -> int | None:
        plain = type(self.event_dim) in (int, type(None)) and self.out_event_dim in (None, self.event_dim)
        return (self.event_dim or 0) if plain and not (self.has_aux or self.check) else None

    def is_direct(self, ndim: int) -> bool:
        """Whether a tensor x of so many dims needs no further look."""
        least = self._direct_dim
        return least is not None and 0 <= least <= ndim

    def attach(self, given: Given, values: Values, captured: Captured) -> tuple[Tensor, ...]:
        """The leaves of y with the derivatives that f gives them."""
        rule, x, theta = self.rule(given, values, captured)
        return attach(rule, values.leaves, x, theta)

    def rule(self, given: Given, values: Values, captured: Captured) -> tuple[ImplicitRule, Tensors, Tensors]:
        """The rule, and the leaves of x and of theta that it speaks of."""
        target, x = _target(given)
        x_dims = event_dims(self.event_dim, target, x, self.caller, "event_dim")
        y, y_dims = values.leaves, _y_dims(self, given, values)
        batch = batch_shape(y, y_dims, self.caller, "y")
        _check_sizes(self, x, y, x_dims, y_dims)
        x = tuple(lead(self.caller, t, d, batch) for t, d in zip(x, x_dims, strict=True))
        theta = (*given.arg_tensors, *values.constants, *captured.tensors)
        pick = Pick(self.caller, target)
        evidence = Evidence(self.evidence, values.y, values.differentiable, given.args, captured, pick)
        if self.check:
            got = evidence([t.detach() for t in y], [t.detach() for t in theta])
            check_residual(self.caller, self.check, got, x, y, (x_dims, y_dims))
        return ImplicitRule(Equation(self.caller, evidence, y_dims, x_dims), self.linear_solver), x, theta


@dataclass(frozen=True, eq=False)
class Pick:
    """The leaves of what f returned that belong to x."""

    caller: str
    target: Partition

    def __call__(self, result: Tree) -> tuple[Tensor, ...]:
        leaves = self.target.pick(result, self.caller, "f(y, *args)")
        _check_tensors(self.caller, leaves)
        return leaves


def _check_tensors(caller: str, leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise StructureError(
                f"`{caller}`: f(y, *args) returned {type(leaf).__name__} where x has a tensor. f is what gets "
                "differentiated: it must be made of torch operations and return tensors in x's structure."
            )


def _target(given: Given) -> tuple[Partition, tuple[Tensor, ...]]:
    return target_of(given.x.join(given.x_tensors))


def target_of(tree: Tree) -> tuple[Partition, tuple[Tensor, ...]]:
    """The leaves of x that f must give back: the floating ones, or all numbers where none is."""
    target, x = Partition.of(tree, is_differentiable)
    if x:
        return target, x
    target, numbers = Partition.of(tree, is_number)
    return target, tuple(torch.as_tensor(n) for n in numbers)


def _y_dims(problem: InverseProblem, given: Given, values: Values) -> tuple[int, ...]:
    _check_integers(problem.caller, given, values)
    prefix, name = problem.out_event_dim, "out_event_dim"
    if prefix is None:
        prefix, name = problem.event_dim, "event_dim` (also for y, as there is no `out_event_dim`), `event_dim"
    dims = event_dims(prefix, values.y, values.tensors, problem.caller, name)
    return tuple(d for d, floating in zip(dims, values.differentiable, strict=True) if floating)


def _check_integers(caller: str, given: Given, values: Values) -> None:
    """An integer leaf of y must be one that x passes through."""
    if all(values.differentiable):
        return
    integers = {p: t for p, t in zip(values.y.places, values.tensors, strict=True) if not is_differentiable(t)}
    if values.y.spec == given.x.spec and not integers.keys() & set(_target(given)[0].places):
        return
    arrived = ", ".join(f"{t.dtype} of shape {tuple(t.shape)}" for t in integers.values())
    raise StructureError(
        f"`{caller}`: g returned {arrived}; an integer has no derivative. Return floating numbers (in NumPy: "
        ".astype(float)), or hand integers over as aux with has_aux=True."
    )


def _check_sizes(problem: InverseProblem, xs: Tensors, ys: Tensors, x_dims: Sequence[int], y_dims: Sequence[int]) -> None:
    if x_dims == y_dims and [(t.shape, t.dtype) for t in xs] == [(t.shape, t.dtype) for t in ys]:
        return
    x, y, caller = Layout.of(xs, x_dims), Layout.of(ys, y_dims), problem.caller
    if x.size == y.size or getattr(problem.linear_solver, "rectangular", False):
        return
    more = (
        "More outputs than inputs: f(g(x)) = x does not determine the derivative of g"
        if y.size > x.size
        else "Fewer outputs than inputs: f(g(x)) = x cannot hold around x"
    )
    raise StructureError(
        f"`{caller}`: one sample of x has {x.size} real numbers (event shapes {list(x.shapes)}), one of y has {y.size} "
        f"({list(y.shapes)}). {more}. Give g and f equally many, state the missing equations in f, or describe the "
        "samples by `event_dim` and `out_event_dim`. linear_solver=LeastSquares() asserts the minimum-norm branch."
    )
