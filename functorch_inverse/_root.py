"""The evidence is an equation: r(y, *args) = 0 at y = solve(*args)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_inverse._attach import attach
from functorch_inverse._call import Given, Problem, Values
from functorch_inverse._capture import Captured
from functorch_inverse._check import check_left_over, check_root
from functorch_inverse._evidence import Evidence
from functorch_inverse._rules import ImplicitRule
from functorch_inverse._tree import Partition, Tree, event_dims, flatten, is_differentiable
from functorch_inverse._vectors import batch_shape
from functorch_inverse.errors import StructureError
from functorch_inverse.linear_solvers import LinearSolver
from functorch_inverse.operators import Equation

__all__ = ["RootProblem", "StepResidual", "WithoutX"]

Tensors = Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class RootProblem(Problem):
    """solve with the residual that it makes zero as evidence.

    With `has_jacobian`, solve returns the Jacobian of the residual at y, or its (LU, pivots), last.
    """

    linear_solver: LinearSolver
    has_jacobian: bool = False
    rooted: ClassVar[bool] = True

    @property
    def returns_more(self) -> bool:
        return self.has_aux or self.has_jacobian

    def probe(self, given: Given, values: Values) -> Any:
        """The residual at y."""
        return self.evidence(values.y.join(values.tensors), *given.args.join(given.arg_tensors))

    def attach(self, given: Given, values: Values, captured: Captured) -> tuple[Tensor, ...]:
        """The leaves of y with the derivatives that the residual gives them."""
        y, dims = values.leaves, _y_dims(self, values)
        batch = batch_shape(y, dims, self.caller, "y")
        near = _near(self.caller, values.aux[0][-1], y, dims, batch) if self.has_jacobian else ()
        theta = (*given.arg_tensors, *captured.tensors, *near)
        pick = _Pick(self.caller)
        evidence = Evidence(self.evidence, values.y, values.differentiable, given.args, captured, pick, len(near))
        rule = ImplicitRule(Equation(self.caller, evidence, dims, None, len(near)), self.linear_solver)
        if self.check:
            at = [t.detach() for t in y], [t.detach() for t in theta]
            with torch.no_grad():
                check_root(self.caller, self.check, rule.residual_step(*at), at[0], dims)
                check_left_over(self.caller, self.check, rule.left_over(*at))
        return attach(rule, y, (), theta)


@dataclass(frozen=True)
class WithoutX:
    """solve(*args) where a problem calls g(x, *args); with the Jacobian that came last handed on beside aux."""

    solve: Callable[..., Any]
    caller: str
    has_aux: bool
    has_jacobian: bool

    def __call__(self, _: Tree, *args: Tree, **kwargs: Any) -> Tree:
        result = self.solve(*args, **kwargs)
        if not self.has_jacobian:
            return result
        parts = 3 if self.has_aux else 2
        if not isinstance(result, tuple) or len(result) != parts:
            raise StructureError(
                f"`{self.caller}`: has_jacobian=True asks `solve` for a tuple of {parts}, (y, {'aux, ' * self.has_aux}jacobian)"
                f"; it returned {type(result).__name__}{f' of {len(result)}' if isinstance(result, tuple) else ''}."
            )
        return result[0], result[1:]


@dataclass(frozen=True)
class StepResidual:
    """step(y, *args) - y."""

    step: Callable[..., Any]
    caller: str

    def __call__(self, y: Tree, *args: Tree) -> tuple[Tensor, ...]:
        part, before = Partition.of(y, is_differentiable)
        after = part.pick(self.step(y, *args), self.caller, "step(y, *args)")
        for a, b in zip(after, before, strict=True):
            if not isinstance(a, Tensor) or a.shape != b.shape:
                arrived = tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__
                raise StructureError(
                    f"`{self.caller}`: step(y, *args) returned {arrived} where y has {tuple(b.shape)}. A fixed point "
                    "step(y) = y needs the same structure and shapes."
                )
        return tuple(a - b for a, b in zip(after, before, strict=True))


# Made under torch.compile, which until torch 2.12 asks for the hash of what it calls before there are any fields.
@dataclass(frozen=True, eq=False)
class _Pick:
    """The floating leaves of a residual, in whatever structure it has."""

    caller: str

    def __call__(self, result: Tree) -> tuple[Tensor, ...]:
        leaves = [leaf for leaf in flatten(result)[0] if leaf is not None]
        for leaf in leaves:
            if not is_differentiable(leaf):
                arrived = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise StructureError(
                    f"`{self.caller}`: the residual returned {arrived}; needed are floating tensors that are zero at the "
                    "solution, made of torch operations from y."
                )
        return tuple(leaves)


def _y_dims(problem: RootProblem, values: Values) -> tuple[int, ...]:
    if not all(values.differentiable):
        arrived = ", ".join(f"{t.dtype} of shape {tuple(t.shape)}" for t in values.constants)
        raise StructureError(
            f"`{problem.caller}`: solve returned {arrived}; an integer has no derivative. Return floating numbers, or hand "
            "integers over as aux with has_aux=True."
        )
    return event_dims(problem.event_dim, values.y, values.tensors, problem.caller, "event_dim")


def _near(caller: str, given: Any, y: Tensors, dims: Sequence[int], batch: torch.Size) -> tuple[Tensor, ...]:
    """What solve knows of the Jacobian: a matrix (*batch, n, n), or such an LU with its pivots."""
    parts = given if isinstance(given, tuple) else (given,)
    n = sum(prod(t.shape[t.ndim - d :]) for t, d in zip(y, dims, strict=True))
    fits = all(isinstance(t, Tensor) for t in parts) and (
        len(parts) == 1 or (len(parts) == 2 and parts[1].shape == (*batch, n) and not parts[1].is_floating_point())
    )
    if not fits or parts[0].numel() != prod(batch) * n * n or parts[0].is_complex() or any(t.is_complex() for t in y):
        arrived = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in parts]
        raise StructureError(
            f"`{caller}`: solve handed on a Jacobian of shape {arrived}; needed is a real one of shape {(*batch, n, n)} "
            "(batch, residual, y), or a pair (LU, pivots) as torch.linalg.lu_factor returns it."
        )
    return parts[0].to(y[0].dtype).reshape(*batch, n, n), *parts[1:]
