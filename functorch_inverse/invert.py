"""The inverse of a function: its values by iteration, its derivatives by the inverse function theorem."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from functorch_inverse import _torch
from functorch_inverse._call import merge, solve
from functorch_inverse._capture import Captured, watch
from functorch_inverse._evidence import Evidence
from functorch_inverse._inverse import InverseProblem, Pick, target_of
from functorch_inverse._iterate import Inversion, Inverter
from functorch_inverse._reach import Reach
from functorch_inverse._sight import Sight
from functorch_inverse._solvers import SolverLike, as_solver
from functorch_inverse._transforms import is_open
from functorch_inverse._tree import Partition, Tree, event_dims, is_differentiable
from functorch_inverse._vectors import Layout, real_dtype, same_precision
from functorch_inverse.custom import check_callables
from functorch_inverse.errors import FunctorchInverseError, StructureError
from functorch_inverse.inverters import Chandrupatla, Newton

__all__ = ["Inverted", "invert"]

_CALLER = "invert"


@dataclass(frozen=True, eq=False)
class _Values:
    """g(x, *args, init=None) by an inverter: the black box whose evidence is f.

    `seen` are tensors that f reads and that no walk through it finds.
    """

    f: Callable[..., Any]
    inverter: Inverter | None
    event_dim: Tree
    out_event_dim: Tree
    seen: tuple[Tensor, ...] = ()

    def __call__(self, x: Tree, *args: Tree, init: Tree = None) -> Tree:
        target, wanted = target_of(x)
        wanted = _floating(wanted)
        if not wanted:
            raise StructureError(f"`{_CALLER}`: x is {x!r}, without a number or tensor in it. Pass tensors (torch.as_tensor).")
        x_dims = event_dims(self.event_dim, target, wanted, _CALLER, "event_dim")
        whole, tensors = Partition.of(target.join(wanted) if init is None else _like(init, wanted))
        chosen = tuple(is_differentiable(t) for t in tensors)
        y = tuple(t for t in tensors if is_differentiable(t))
        if not y:
            raise StructureError(f"`{_CALLER}`: init is {init!r}, without a floating tensor in it. Pass values of y.")
        y_dims = self._y_dims(whole, tensors, chosen, given=init is not None)
        rest, values = Partition.of(args)
        captured = self._captured(wanted, rest)
        constants = [t for t in tensors if not is_differentiable(t)]
        f = Evidence(_Guarded(self.f, [init is None]), whole, chosen, rest, captured, Pick(_CALLER, target), on_copies=True)
        inverter = self._chosen(Layout.of(y, y_dims), y_dims + x_dims)
        inversion = Inversion(_CALLER, inverter, f, y_dims, x_dims)
        found = inversion(y, wanted, (*values, *constants, *captured.tensors))
        return whole.join(merge(chosen, found, constants))

    def _y_dims(self, whole: Partition, tensors: tuple[Tensor, ...], chosen: Sequence[bool], *, given: bool) -> tuple[int, ...]:
        same = self.out_event_dim is None
        if not (same or given or self.out_event_dim == self.event_dim):
            raise StructureError(
                f"`{_CALLER}`: out_event_dim={self.out_event_dim!r} says that y does not look like x (event_dim="
                f"{self.event_dim!r}), so x is no place to start. Pass init=, values of y's structure and shapes."
            )
        name = "event_dim` (also for init, as there is no `out_event_dim`), `event_dim" if same else "out_event_dim"
        dims = event_dims(self.event_dim if same else self.out_event_dim, whole, tensors, _CALLER, name)
        return tuple(d for d, floating in zip(dims, chosen, strict=True) if floating)

    def _chosen(self, y: Layout, dims: tuple[int, ...]) -> Inverter:
        """What is right for most f: a bracket for single real numbers, else Newton."""
        single = y.size == 1 and not any(dims) and not any(d.is_complex for d in y.dtypes)
        return self.inverter or (Chandrupatla() if self.event_dim == 0 and single else Newton())

    def _captured(self, x: tuple[Tensor, ...], args: Partition) -> Captured:
        """What f reaches as explicit inputs, where f runs at another level or precision than this code."""
        tracing = torch.compiler.is_dynamo_compiling()
        half = any(real_dtype(t.dtype) in _HALF for t in x)
        if tracing or not (_torch.transforms_active() or half or torch.is_inference_mode_enabled()):
            return Captured()
        sight = Sight(self.f, self.seen, *args.others)
        captured = Captured.of(sight, lambda t: is_open(t) or t.is_inference() or t.dtype in _HALF)
        return replace(captured, sight=None)  # nothing is exchanged while this runs


_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class _Guarded:
    """f, which says where the values came from that it cannot take, while `first` holds True."""

    f: Callable[..., Any]
    first: list[bool]

    def __call__(self, y: Tree, *args: Tree) -> Tree:
        if torch.compiler.is_dynamo_compiling() or not self.first[0]:
            return self.f(y, *args)
        self.first[0] = False
        try:
            return self.f(y, *args)
        except FunctorchInverseError:
            raise
        except Exception as error:
            raise StructureError(
                f"`{_CALLER}`: f raised {type(error).__name__} ({error}) at y of the structure and shapes of x, where the "
                "search starts without init. If y looks different, pass init=, values of its structure and shapes."
            ) from error


_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)


@dataclass(frozen=True, eq=False)
class _InEvalMode:
    """f, as long as some of its modules are in eval mode: in train mode they change with each call.

    So the derivative would belong to another function than the values, and the running statistics of batch norm would be
    those of points that a search has tried.
    """

    f: Callable[..., Any]
    parts: tuple[nn.Module, ...]

    @staticmethod
    def of(f: Callable[..., Any]) -> Callable[..., Any]:
        if torch.compiler.is_dynamo_compiling():
            return f
        inside = [part for module in Reach.of(f).modules for part in module.modules()]
        random = [part for part in inside if isinstance(part, _RANDOM) and getattr(part, "p", 1.0) > 0]
        parts = (*random, *[part for part in inside if isinstance(part, _BATCH_NORM)])
        return _InEvalMode(f, parts).checked() if parts else f

    def checked(self) -> "_InEvalMode":
        """The same, or StructureError."""
        part = next((part for part in self.parts if part.training), None)
        if part is None:
            return self
        raise StructureError(
            f"`{_CALLER}`: f runs {part!r} in train mode, where it changes with each call and has no inverse. Call eval() "
            "on it, before the derivative too, or hand over what changes, such as a mask, as a further argument of f."
        )

    def __call__(self, *args: Tree) -> Tree:
        return self.checked().f(*args)


def _floating(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    default = torch.get_default_dtype()
    return tuple(t if is_differentiable(t) else t.to(default) for t in leaves)


def _like(init: Tree, x: tuple[Tensor, ...]) -> Tree:
    """init in the precision of x; a lone number is a tensor."""
    if isinstance(init, int | float | complex):
        init = torch.as_tensor(init)
        init = init if is_differentiable(init) else init.to(torch.get_default_dtype())
    part, leaves = Partition.of(init, is_differentiable)
    like = x[0]
    return part.join([t.to(device=like.device, dtype=same_precision(t.dtype, like.dtype)) for t in leaves])


class Inverted:
    """The inverse of a function: what `invert` returns. It pickles and copies where f does."""

    def __init__(self, problem: InverseProblem) -> None:
        self.problem = problem
        name = getattr(problem.evidence, "__name__", None) or type(problem.evidence).__name__
        self.__name__ = f"inverse_of_{name}" if name.isidentifier() else "inverse"

    def __repr__(self) -> str:
        f = self.problem.evidence
        return f"invert({getattr(f, '__name__', None) or repr(f)})"

    def __call__(self, x: Tree, /, *args: Tree, init: Tree = None) -> Tree:
        """y with f(y, *args) = x; the search starts at init."""
        part, tensors = Partition.of(init)
        init = part.join([t.detach() for t in tensors])
        problem, f = self._seeing(x, args, init), self.problem.evidence
        steady = _InEvalMode.of(f)
        return solve(problem if steady is f else replace(problem, evidence=steady), x, args, {"init": init})

    def _seeing(self, x: Tree, args: tuple[Tree, ...], init: Tree) -> InverseProblem:
        """The problem, with the tensors that f reads where no walk finds them."""
        if torch.compiler.is_dynamo_compiling() or Sight(self.problem.g).reach().complete:
            return self.problem
        start, f = x if init is None else init, self.problem.evidence
        seen = watch(lambda: f(start, *args), Partition.of((start, args))[1])
        values: Any = self.problem.g
        return replace(self.problem, g=replace(values, seen=tuple(seen)))

    @property
    def inverse(self) -> Callable[..., Any]:
        """f."""
        return self.problem.evidence

    def undoes(self, event_dim: Tree, out_event_dim: Tree) -> bool:
        """Whether these describe the samples of the inverse of this: y for x and x for y."""
        own, other = _both(self.problem.event_dim, self.problem.out_event_dim), _both(event_dim, out_event_dim)
        return own == other[::-1]


def _both(event_dim: Tree, out_event_dim: Tree) -> tuple[Tree, Tree]:
    return event_dim, event_dim if out_event_dim is None else out_event_dim


def invert(
    f: Callable[..., Any],
    *,
    inverter: Inverter | None = None,
    event_dim: Tree = None,
    out_event_dim: Tree = None,
    linear_solver: SolverLike = None,
) -> Any:
    r"""The inverse g of a differentiable function f, with all its derivatives.

    .. math:: f(g(x, \theta), \theta) = x, \qquad
              \frac{\partial y}{\partial x} = A^{-1}, \quad
              \frac{\partial y}{\partial \theta} = -A^{-1} \frac{\partial f}{\partial \theta}, \quad
              A = \frac{\partial f}{\partial y}

    Values come from an iteration that nobody differentiates; derivatives of any order, in every transform of
    torch.func, autograd and torch.compile, from the theorem. They flow to x, to the floating tensors in args, and to
    modules and tensors that f closes over. All samples, those of vmap too, are solved for at once.

    Args:
        f: ``f(y, *args) -> x``, made of differentiable torch operations; one to one where it is inverted.
        inverter: `Newton()`, `Chandrupatla()` or `FixedPoint()`, with their tolerances. None: Chandrupatla() for
            event_dim=0, which asks for a monotone f, else (also where x is complex or a tree) Newton().
        event_dim: how many trailing dims of each leaf of x make up one sample. None: all of x is one sample; write for
            one, batch with torch.vmap. 1: vectors, x of shape (*batch, n). 0: elementwise. A pytree prefix of those where
            leaves differ.
        out_event_dim: the same for y, where it differs from that of x.
        linear_solver: solves with A in the derivatives; `LU()` unless given.

    Returns:
        A callable ``g(x, *args, init=None)``. init is where the search starts, values of y's structure and shapes
        without derivative; x itself without it. Where f has several inverses, init chooses one.
        ``invert(invert(f))`` is f, where no inverter or linear_solver is asked for and the dims agree.

    Raises:
        NotConvergedError: some samples were not solved; names them, how far they are, and what to try.
        BracketError: the same, where f(y) - x does not change its sign inside the bounds of Chandrupatla.
        StructureError: structures or sizes do not match, init is needed, or f runs dropout or batch norm in train mode.
        SingularJacobianError, NoDerivativeError: as for `custom_inverse`, when a derivative is taken.

    Under torch.compile a fixed number of steps is unrolled (see the inverters), and samples that have not converged
    are nan. Samples of x that are not finite give nan.

    Example:
        >>> g = invert(lambda y, a: torch.sinh(a * y), event_dim=0)
        >>> x, a = torch.tensor([0.5, -1.0, 2.0]), torch.tensor(1.5)
        >>> dx, da = torch.func.grad(lambda x, a: g(x, a).sum(), argnums=(0, 1))(x, a)
        >>> torch.allclose(dx, 1 / (a * (1 + x**2).sqrt())), torch.allclose(da, -(torch.asinh(x) / a**2).sum())
        (True, True)

    Source: Krantz and Parks, The Implicit Function Theorem (2002), theorem 3.3.1; for the iterations see the inverters.
    """
    check_callables(_CALLER, f=f)
    if isinstance(inverter, type) or (inverter is not None and not hasattr(inverter, "traced_steps")):
        raise ValueError(f"`{_CALLER}`: `inverter` is {inverter!r}; choose Newton(), Chandrupatla(), FixedPoint() or None.")
    if isinstance(f, Inverted) and inverter is None and linear_solver is None and f.undoes(event_dim, out_event_dim):
        return f.inverse
    return Inverted(
        InverseProblem(
            caller=_CALLER,
            g=_Values(f, inverter, event_dim, out_event_dim),
            evidence=f,
            event_dim=event_dim,
            out_event_dim=out_event_dim,
            vmap_method="vmap",
            linear_solver=as_solver(_CALLER, linear_solver),
        )
    )
