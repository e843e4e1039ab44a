"""Black boxes with a derivative: the function first, what is known about it second."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from functorch_inverse._call import Problem, solve
from functorch_inverse._check import check_tolerance
from functorch_inverse._direct import solve_inverse
from functorch_inverse._explicit import JacobianProblem
from functorch_inverse._inverse import InverseProblem
from functorch_inverse._parameters import Parameters
from functorch_inverse._solvers import SolverLike, as_solver
from functorch_inverse._tree import Tree
from functorch_inverse._values import VmapMethod, check_vmap_method

__all__ = ["CustomInverse", "CustomJacobian", "custom_inverse", "custom_jacobian"]


class CustomInverse:
    """A black box with the derivatives of its inverse: what `custom_inverse` returns.

    It keeps the name, doc and signature of g, and pickles and copies where g and f do.
    """

    def __init__(self, problem: InverseProblem) -> None:
        functools.update_wrapper(self, problem.g, updated=())
        self.problem, self.parameters = problem, Parameters.of(problem.evidence)

    def __repr__(self) -> str:
        return f"custom_inverse({_name(self.problem.g)}, {_name(self.problem.evidence)})"

    def __call__(self, x: Tree, /, *args: Tree, **kwargs: Any) -> Tree:
        """g(x, *args, **kwargs)."""
        if kwargs:
            self.parameters.check(self.problem.caller, kwargs, 1 + len(args))
        return solve_inverse(self.problem, x, args, kwargs)


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or repr(function)


def custom_inverse(
    g: Callable[..., Any],
    f: Callable[..., Any],
    *,
    event_dim: Tree = None,
    out_event_dim: Tree = None,
    linear_solver: SolverLike = None,
    vmap_method: VmapMethod | None = None,
    has_aux: bool = False,
    check: bool | float = False,
) -> CustomInverse:
    r"""Give a black box g the derivatives of its inverse f.

    .. math:: f(g(x, \theta), \theta) = x \;\Rightarrow\;
              \frac{\partial y}{\partial x} = A^{-1}, \quad
              \frac{\partial y}{\partial \theta} = -A^{-1} \frac{\partial f}{\partial \theta}, \quad
              A = \frac{\partial f}{\partial y}, \; y = g(x, \theta)

    Derivatives of any order, in every transform of torch.func, autograd and torch.compile, flow to x, to the
    floating tensors in args, and to modules and tensors that f closes over. g is called once per forward (once
    per sample under vmap where `vmap_method` says so) and never by a derivative.

    Args:
        g: the black box, ``g(x, *args, **kwargs) -> y``. It sees plain detached tensors and returns tensors, floating
            NumPy arrays, or a pytree of those. The tensors share the caller's memory: where g writes to it, hand
            over ``black_box(g)``, which gets copies.
        f: its inverse, ``f(y, *args) -> x``, made of differentiable torch operations.
        event_dim: how many trailing dims of each leaf of x make up one sample. None: all of x is one sample; write for
            one, batch with torch.vmap. 1: vectors, x of shape (*batch, n). 0: elementwise, no matrix is built. A
            pytree prefix of those where leaves differ. Unless None, g and f take any number of leading dims. That no
            sample influences another is asserted, not looked at in a call; `check_inverse` does.
        out_event_dim: the same for y, where it differs from that of x.
        linear_solver: solves with A; `LU()` unless given.
        vmap_method: how vmap calls g: "sequential", one call a sample (the default without event_dim); "broadcast", one
            call with a leading batch dim (the default with event_dim, while only x is batched); "vmap", torch.vmap(g)
            for a g written in torch. f is always batched by torch.vmap.
        has_aux: g returns ``(y, aux)``, and so does the result; aux has no derivative.
        check: compare f(g(x)) with x at every call: True for a relative tolerance of sqrt(eps), or the tolerance.

    Returns:
        A callable with the signature of g, x by position. Keyword arguments reach g alone and carry no derivative.

    Raises:
        StructureError: structures, sizes or dtypes do not match; more outputs than inputs; f has a parameter of the name of
            a keyword argument.
        SingularJacobianError: A has no inverse in some samples; names them.
        NoDerivativeError: f does not depend on y, or a derivative would be lost (a live keyword argument, a tensor that
            f closes over and that was exchanged in the meantime).
        ResidualError: with `check`, f(g(x)) is not x.
        ValueError: an unknown option.

    Example:
        >>> import numpy as np
        >>> g = custom_inverse(lambda x, a: np.arcsinh(x.numpy()) / a.numpy(), lambda y, a: torch.sinh(a * y), event_dim=0)
        >>> x, a = torch.tensor([0.5, -1.0, 2.0]), torch.tensor(1.5)
        >>> dx, da = torch.func.grad(lambda x, a: g(x, a).sum(), argnums=(0, 1))(x, a)
        >>> torch.allclose(dx, 1 / (a * (1 + x**2).sqrt())), torch.allclose(da, -(torch.asinh(x) / a**2).sum())
        (True, True)

    Source: Krantz and Parks, The Implicit Function Theorem (2002), theorems 1.3.1 and 3.3.1; Blondel et al.,
    Efficient and Modular Implicit Differentiation (2022).
    """
    caller = "custom_inverse"
    check_callables(caller, g=g, f=f)
    check_tolerance(caller, check)
    check_vmap_method(caller, vmap_method)
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
            linear_solver=as_solver(caller, linear_solver),
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
        self.__wrapped__: Callable[..., Any]
        functools.update_wrapper(self, fn, updated=())
        self.problem, self.argnums = problem, argnums
        self.parameters = Parameters.of(problem.evidence.function) if isinstance(problem.evidence, Chosen) else Parameters()

    def __repr__(self) -> str:
        return f"{self.problem.caller}({_name(self.__wrapped__)})"

    def __call__(self, *args: Tree, **kwargs: Any) -> Tree:
        """fn(*args, **kwargs)."""
        numbers = places_of(self.problem.caller, self.argnums, len(args))
        if kwargs:
            self.parameters.check(self.problem.caller, kwargs, len(args))
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
    r"""Give a black box its analytic Jacobian.

    .. math:: dy = J\, dx, \qquad J = \mathtt{jacobian}(\ldots)

    All transforms and orders as for `custom_inverse`; higher orders differentiate `jacobian`, which is therefore
    made of torch operations (or has a derivative given to it in turn). One that does not depend on x says that fn is
    linear: its second derivative is zero.

    Args:
        fn: the black box, ``fn(*args, **kwargs) -> y``, as g of `custom_inverse`.
        jacobian: takes the positional arguments and returns what ``torch.func.jacrev(fn, argnums)`` would: for one
            argument a tensor of shape (*batch, *out_event, *in_event), for a tuple of argnums a tuple of those, for
            pytrees a tree of y's structure with trees of x's structure as leaves. Batch dims may be missing or 1.
            Instead of a matrix also an object with ``mv(dx) -> dy`` and ``T``, the same for its transpose.
        argnums: the position, or tuple of positions, to differentiate.
        event_dim: how many trailing dims of these arguments make up one sample, as for `custom_inverse`; for a tuple of
            argnums a tuple, in which None means shared by all samples. 0: `jacobian` returns the plain derivative.
        out_event_dim: the same for y, where it differs.
        vmap_method, has_aux: as for `custom_inverse`.

    Returns:
        A callable with the signature of fn.

    Raises:
        StructureError: `jacobian` returned another shape or structure.
        NoDerivativeError: a derivative flows into an argument outside argnums, or into what fn or jacobian closes over.

    A complex Jacobian is taken as holomorphic: vjp multiplies by its conjugate transpose.

    Example:
        >>> circle = custom_jacobian(
        ...     lambda x: torch.stack([x.sin(), x.cos()], -1),
        ...     lambda x: torch.stack([x.cos(), -x.sin()], -1),
        ...     event_dim=0,
        ...     out_event_dim=1,
        ... )
        >>> _, vjp = torch.func.vjp(circle, torch.zeros(2))
        >>> vjp(torch.tensor([[3.0, 5.0], [7.0, 9.0]]))
        (tensor([3., 7.]),)

    Source: the chain rule; for the order of indices see torch.func.jacrev.
    """
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


def places_of(caller: str, argnums: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """argnums as a tuple, or TypeError where so many positional arguments are too few."""
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    if max(numbers) >= count:
        raise TypeError(
            f"`{caller}`: argnums={argnums} needs {max(numbers) + 1} positional arguments, {count} arrived. Pass the arguments "
            "to differentiate by position."
        )
    return numbers


def check_argnums(caller: str, argnums: Any) -> None:
    """ValueError unless argnums is a position or a tuple of different positions."""
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    valid = numbers and all(type(i) is int and i >= 0 for i in numbers)
    if not valid or len(set(numbers)) < len(numbers):
        raise ValueError(f"`{caller}`: `argnums` is {argnums!r}; choose 0, 1, 2, ... or a tuple of different ones.")
