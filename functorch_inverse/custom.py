"""Black boxes with a derivative: the function first, what is known about it second."""

import functools
from collections.abc import Callable
from typing import Any

from functorch_inverse._call import Problem, solve
from functorch_inverse._tree import Tree
from functorch_inverse._values import VmapMethod, check_vmap_method
from functorch_inverse.linear_solvers import LU, LinearSolver

__all__ = ["CustomInverse", "custom_inverse"]


class CustomInverse:
    """A black box with the derivatives of its inverse: what `custom_inverse` returns.

    It keeps the name, doc and signature of g, and pickles and copies where g and f do.
    """

    def __init__(self, problem: Problem) -> None:
        functools.update_wrapper(self, problem.g, updated=())
        self.problem = problem

    def __repr__(self) -> str:
        return f"custom_inverse({_name(self.problem.g)}, {_name(self.problem.f)})"

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
    for name, function in (("g", g), ("f", f)):
        if not callable(function):
            raise TypeError(f"`{caller}`: `{name}` is {function!r}; a callable is needed.")
    check_vmap_method(caller, vmap_method)
    solver = LU() if linear_solver is None else linear_solver
    if not hasattr(solver, "factorise"):
        raise ValueError(f"`{caller}`: `linear_solver` is {solver!r}; choose LU() or an object with its methods.")
    return CustomInverse(Problem(caller, g, f, event_dim, out_event_dim, solver, vmap_method, has_aux, check))
