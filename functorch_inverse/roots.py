"""Solutions of equations with a derivative: the solver first, the equation second."""

import functools
from collections.abc import Callable
from typing import Any

from functorch_inverse._call import solve as call
from functorch_inverse._check import check_tolerance
from functorch_inverse._parameters import Parameters
from functorch_inverse._root import RootProblem, StepResidual, WithoutX
from functorch_inverse._solvers import SolverLike, as_solver, with_jacobian
from functorch_inverse._tree import Tree
from functorch_inverse._values import VmapMethod, check_vmap_method
from functorch_inverse.custom import check_callables
from functorch_inverse.linear_solvers import LinearSolver

__all__ = ["CustomRoot", "custom_fixed_point", "custom_root"]


class CustomRoot:
    """A solver with the derivatives of what it solves: what `custom_root` and `custom_fixed_point` return.

    It keeps the name, doc and signature of `solve`, and pickles and copies where the functions do.
    """

    def __init__(self, problem: RootProblem, solve: Callable[..., Any]) -> None:
        functools.update_wrapper(self, solve, updated=())
        evidence = problem.evidence
        self.problem = problem
        self.parameters = Parameters.of(evidence.step if isinstance(evidence, StepResidual) else evidence)

    def __repr__(self) -> str:
        return f"{self.problem.caller}({getattr(self, '__name__', None) or repr(self.problem.g)})"

    def __call__(self, /, *args: Tree, **kwargs: Any) -> Tree:
        """solve(*args, **kwargs)."""
        if kwargs:
            self.parameters.check(self.problem.caller, kwargs, 1 + len(args))
        result = call(self.problem, (), args, kwargs)
        if not self.problem.has_jacobian:
            return result
        y, (*aux, _) = result
        return (y, *aux) if aux else y


def custom_root(
    solve: Callable[..., Any],
    residual: Callable[..., Any],
    *,
    event_dim: Tree = None,
    linear_solver: SolverLike = None,
    vmap_method: VmapMethod | None = None,
    has_aux: bool = False,
    has_jacobian: bool = False,
    check: bool | float = False,
) -> CustomRoot:
    r"""Give a solver the derivatives of the equation that it solves.

    .. math:: r(y, \theta) = 0 \;\Rightarrow\;
              \frac{\partial y}{\partial \theta} = -A^{-1} B, \quad
              A = \frac{\partial r}{\partial y}, \; B = \frac{\partial r}{\partial \theta}, \; y = \mathtt{solve}(\theta)

    A minimum is the root of a gradient: ``residual = torch.func.grad(objective)``, with A the (symmetric) Hessian.
    Derivatives of any order, in every transform, flow to all floating tensors in args, and to modules and tensors
    that the residual closes over. An argument that the residual ignores (a first guess, say) has the derivative zero.

    Args:
        solve: the black box, ``solve(*args, **kwargs) -> y``. It sees plain detached tensors and returns tensors,
            floating NumPy arrays (which take the precision and device of the first floating argument), or a pytree of those.
        residual: ``residual(y, *args)``, zero at the solution; differentiable torch operations, of any structure, with as
            many numbers in a sample as y has.
        event_dim: how many trailing dims of each leaf of y make up one sample. None: all of y is one sample; batch with
            torch.vmap. 1: vectors, y of shape (*batch, n). 0: elementwise, no matrix is built. A pytree prefix of those
            where leaves differ. The residual has the same batch dims; args may have them or not.
        linear_solver: solves with A; `LU()` unless given. Minima: `Cholesky()`, `CG()`; large systems: `GMRES()`.
        vmap_method: how vmap calls solve: "sequential", one call a sample (the default); "broadcast", one call in which
            every tensor of args has one more leading dim; "vmap", torch.vmap(solve).
        has_aux: solve returns ``(y, aux)``, and so does the result; aux has no derivative.
        has_jacobian: solve returns the Jacobian A at y last, ``(y, A)`` or ``(y, aux, A)``, of shape (*batch, n, n), or the
            pair (LU, pivots) of `torch.linalg.lu_factor`. It preconditions the linear solve, which then needs one or two
            products with A in place of n; so an A that is a little old costs a few products more, and never accuracy.
        check: at every call, compare a Newton step with y: True for a relative tolerance of sqrt(eps), or the tolerance.

    Returns:
        A callable with the signature of solve. Keyword arguments reach solve alone and carry no derivative.

    Raises:
        StructureError: structures, sizes or dtypes do not match.
        SingularJacobianError: A has no inverse in some samples; names them.
        NotConvergedError: an iterative linear solver did not reach its tolerance, or the A of `has_jacobian` is that of
            another residual.
        NoDerivativeError: the residual does not depend on y, or a derivative would be lost.
        ResidualError: with `check`, y is no root.

    Example:
        >>> from scipy.optimize import brentq
        >>> root = custom_root(lambda a: torch.tensor(brentq(lambda y: y**5 + y - a.item(), -9, 9)), lambda y, a: y**5 + y - a)
        >>> torch.func.grad(root)(torch.tensor(34.0))  # y = 2
        tensor(0.0123)
        >>> 1 / (5 * 2**4 + 1)
        0.012345679012345678

    Source: Krantz and Parks, The Implicit Function Theorem (2002), theorem 1.3.1; Blondel et al., Efficient and Modular
    Implicit Differentiation (2022), section 2.1.
    """
    caller = "custom_root"
    check_callables(caller, solve=solve, residual=residual)
    solver = with_jacobian(caller, linear_solver) if has_jacobian else as_solver(caller, linear_solver)
    shared = {"event_dim": event_dim, "vmap_method": vmap_method, "has_aux": has_aux, "check": check}
    return _rooted(caller, solve, residual, solver, has_jacobian=has_jacobian, **shared)


def custom_fixed_point(
    solve: Callable[..., Any],
    step: Callable[..., Any],
    *,
    event_dim: Tree = None,
    linear_solver: SolverLike = None,
    vmap_method: VmapMethod | None = None,
    has_aux: bool = False,
    check: bool | float = False,
) -> CustomRoot:
    r"""Give a solver the derivatives of the fixed point that it finds.

    .. math:: s(y, \theta) = y \;\Rightarrow\;
              \frac{\partial y}{\partial \theta} = (I - S)^{-1} \frac{\partial s}{\partial \theta}, \quad
              S = \frac{\partial s}{\partial y}

    That is `custom_root` with the residual s(y) - y; deep equilibrium layers are the usual case, with GMRES() or another
    matrix-free solver where y is large.

    Args:
        solve: the black box, ``solve(*args, **kwargs) -> y``, as for `custom_root`.
        step: ``step(y, *args)``, which is y at the solution: of the same structure and shapes, in differentiable torch
            operations.
        event_dim, linear_solver, vmap_method, has_aux, check: as for `custom_root`.

    Returns:
        A callable with the signature of solve.

    Raises:
        StructureError: step returned another structure or shape; and as for `custom_root`.

    Example:
        >>> def babylon(y, a):
        ...     return (y + a / y) / 2
        >>> sqrt = custom_fixed_point(lambda a: a.sqrt(), babylon, event_dim=0)
        >>> torch.func.vmap(torch.func.grad(sqrt))(torch.tensor([1.0, 4.0]))
        tensor([0.5000, 0.2500])

    Source: Blondel et al., Efficient and Modular Implicit Differentiation (2022), section 2.2; Bai et al., Deep Equilibrium
    Models (2019), theorem 1.
    """
    caller = "custom_fixed_point"
    check_callables(caller, solve=solve, step=step)
    shared = {"event_dim": event_dim, "vmap_method": vmap_method, "has_aux": has_aux, "check": check}
    return _rooted(caller, solve, StepResidual(step, caller), as_solver(caller, linear_solver), **shared)


def _rooted(
    caller: str,
    solve: Callable[..., Any],
    residual: Callable[..., Any],
    solver: LinearSolver,
    *,
    has_jacobian: bool = False,
    **options: Any,
) -> CustomRoot:
    check_vmap_method(caller, options["vmap_method"])
    check_tolerance(caller, options["check"])
    g = WithoutX(solve, caller, options["has_aux"], has_jacobian)
    problem = RootProblem(
        caller=caller, g=g, evidence=residual, linear_solver=solver, has_jacobian=has_jacobian, **options
    )
    return CustomRoot(problem, solve)
