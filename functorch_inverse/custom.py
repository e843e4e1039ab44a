"""Black boxes with a derivative: the function first, what is known about it second."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from functorch_inverse._call import Problem, solve
from functorch_inverse._explicit import JacobianProblem
from functorch_inverse._inverse import InverseProblem
from functorch_inverse._tree import Tree
from functorch_inverse._values import VmapMethod, check_vmap_method
from functorch_inverse.linear_solvers import LU, LinearSolver

__all__ = ["CustomInverse", "CustomJacobian", "custom_inverse", "custom_jacobian"]


class CustomInverse:
    """A black box with the derivatives of its inverse: what `custom_inverse` returns.

    It keeps the name, doc and signature of g, and pickles and copies where g and f do.
    """

    def __init__(self, problem: Problem) -> None:
        functools.update_wrapper(self, problem.g, updated=())
        self.problem = problem

    def __repr__(self) -> str:
        return f"custom_inverse({_name(self.problem.g)}, {_name(self.problem.evidence)})"

    def __call__(self, x: Tree, /, *args: Tree, **kwargs: Any) -> Tree:
        """g(x, *args, **kwargs)."""
        return solve(self.problem, x, args, kwargs)


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or repr(function)


def custom_inverse(
    g: Callable[..., Any],
    f: Callable[..., Any],
    *,
    event_dim: Tree = None,
    out_event_dim: Tree = None,
    linear_solver: LinearSolver | None = None,
    vmap_method: VmapMethod | None = None,
    has_aux: bool = False,
    check: bool | float = False,
) -> CustomInverse:
    """TODO"""
    caller = "custom_inverse"
    check_callables(caller, g=g, f=f)
    check_vmap_method(caller, vmap_method)
    solver = LU() if linear_solver is None else linear_solver
    if not hasattr(solver, "factorise"):
        raise ValueError(f"`{caller}`: `linear_solver` is {solver!r}; choose LU() or an object with its methods.")
    return CustomInverse(
        InverseProblem(
            caller=caller,
            g=g,
            evidence=f,
            event_dim=event_dim,
            out_event_dim=out_event_dim,
            vmap_method=vmap_method,
            has_aux=has_aux,
            check=check,
            linear_solver=solver,
        )
    )


@dataclass(frozen=True)
class Chosen:
    """A function of the chosen arguments first, of the others after them."""

    function: Callable[..., Any]
    argnums: int | tuple[int, ...]

    def __call__(self, x: Tree, *others: Tree, **kwargs: Any) -> Tree:
        chosen = dict(zip(self.argnums, x, strict=True)) if isinstance(self.argnums, tuple) else {self.argnums: x}
        rest = iter(others)
        args = [chosen[i] if i in chosen else next(rest) for i in range(len(chosen) + len(others))]
        return self.function(*args, **kwargs)


class CustomJacobian:
    """A black box with an analytic Jacobian: what `custom_jacobian` returns.

    It keeps the name, doc and signature of fn, and pickles and copies where fn and jacobian do.
    """

    def __init__(self, problem: Problem, fn: Callable[..., Any], argnums: int | tuple[int, ...]) -> None:
        functools.update_wrapper(self, fn, updated=())
        self.problem, self.argnums = problem, argnums

    def __repr__(self) -> str:
        return f"{self.problem.caller}({_name(self.__wrapped__)})"

    def __call__(self, *args: Tree, **kwargs: Any) -> Tree:
        """fn(*args, **kwargs)."""
        numbers = self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)
        if max(numbers) >= len(args):
            raise TypeError(
                f"`{self.problem.caller}`: argnums={self.argnums} needs {max(numbers) + 1} positional arguments, "
                f"{len(args)} arrived. Pass the arguments to differentiate by position."
            )
        chosen = tuple(args[i] for i in numbers)
        others = tuple(arg for i, arg in enumerate(args) if i not in numbers)
        return solve(self.problem, chosen if isinstance(self.argnums, tuple) else chosen[0], others, kwargs)


def custom_jacobian(
    fn: Callable[..., Any],
    jacobian: Callable[..., Any],
    *,
    argnums: int | tuple[int, ...] = 0,
    event_dim: Tree = None,
    out_event_dim: Tree = None,
    vmap_method: VmapMethod | None = None,
    has_aux: bool = False,
) -> CustomJacobian:
    """TODO"""
    caller = "custom_jacobian"
    check_callables(caller, fn=fn, jacobian=jacobian)
    check_vmap_method(caller, vmap_method)
    check_argnums(caller, argnums)
    problem = JacobianProblem(
        caller=caller,
        g=Chosen(fn, argnums),
        evidence=Chosen(jacobian, argnums),
        event_dim=event_dim,
        out_event_dim=out_event_dim,
        vmap_method=vmap_method,
        has_aux=has_aux,
    )
    return CustomJacobian(problem, fn, argnums)


def check_callables(caller: str, **functions: Any) -> None:
    """TypeError for anything that cannot be called."""
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"`{caller}`: `{name}` is {function!r}; a callable is needed.")


def check_argnums(caller: str, argnums: Any) -> None:
    """ValueError unless argnums is a position or a tuple of different positions."""
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    if not numbers or len(set(numbers)) < len(numbers) or not all(type(i) is int and i >= 0 for i in numbers):
        raise ValueError(f"`{caller}`: `argnums` is {argnums!r}; choose 0, 1, 2, ... or a tuple of different ones.")
