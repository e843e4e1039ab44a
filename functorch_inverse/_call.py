"""One call of a black box with known evidence: its values first, then the derivative of the evidence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._attach import attach
from functorch_inverse._capture import Captured, Reach, is_open, watch
from functorch_inverse._check import check_residual
from functorch_inverse._rules import ImplicitRule
from functorch_inverse._tree import Partition, Tree, event_dims, is_differentiable, is_number
from functorch_inverse._values import BlackBox, Outcome, VmapMethod, evaluate
from functorch_inverse._vectors import Layout, batch_shape
from functorch_inverse.errors import NoDerivativeError, StructureError
from functorch_inverse.linear_solvers import LinearSolver

__all__ = ["Problem", "solve"]

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Problem:
    """A black box g with the evidence f: f(g(x, *args), *args) = x."""

    caller: str
    g: Callable[..., Any]
    f: Callable[..., Any]
    event_dim: Tree
    out_event_dim: Tree
    linear_solver: LinearSolver
    vmap_method: VmapMethod | None
    has_aux: bool
    check: bool | float


def solve(problem: Problem, x: Tree, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> Tree:
    """g(x, *args, **kwargs) with its derivatives to x, args and whatever f closes over."""
    given = _Given.of(x, args, kwargs)
    if torch.compiler.is_dynamo_compiling():
        return _traced(problem, given)
    return _eager(problem, given)


@dataclass(frozen=True, eq=False)
class _Given:
    """The arguments of one call, taken apart into tensors and the rest."""

    x: Partition
    args: Partition
    keywords: tuple[str, ...]
    kwargs: Partition
    x_tensors: tuple[Tensor, ...]
    arg_tensors: tuple[Tensor, ...]
    kwarg_tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, x: Tree, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> "_Given":
        keys = tuple(kwargs)
        (x, x_t), (args, args_t), (values, kwargs_t) = map(Partition.of, (x, args, tuple(kwargs.values())))
        return cls(x, args, keys, values, x_t, args_t, kwargs_t)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.x_tensors, *self.arg_tensors, *self.kwarg_tensors)

    @property
    def like(self) -> Tensor | None:
        """What y takes after: the first floating tensor, those of x before the others."""
        return next((t for t in self.tensors if is_differentiable(t)), None)

    def call(self, g: Callable[..., Any], tensors: Tensors) -> Any:
        """g at other values of the tensors."""
        n, m = len(self.x_tensors), len(self.x_tensors) + len(self.arg_tensors)
        args, values = self.args.join(tensors[n:m]), self.kwargs.join(tensors[m:])
        return g(self.x.join(tensors[:n]), *args, **dict(zip(self.keywords, values, strict=True)))


# --- the order of things --------------------------------------------------------------------------


def _eager(problem: Problem, given: _Given) -> Tree:
    if not (_torch.derivatives_possible() or problem.check):
        return _evaluate(problem, given, Captured.nothing()).result()
    if _live(given.kwarg_tensors):
        _refuse_live_keyword(problem.caller)
    reach, wanted = Reach.of(problem.f), _wanted(given)
    captured = Captured.of(reach, wanted)
    surely_dead = reach.complete and not captured.count and not _live((*given.x_tensors, *given.arg_tensors))
    if surely_dead and not (problem.check or _torch.transforms_active()):
        return _evaluate(problem, given, Captured.nothing()).result()
    values = _evaluate(problem, given, Captured.of(Reach.of(problem.g), is_open))
    if not reach.complete:
        captured = Captured.of(reach, wanted, _watched(problem, given, values, captured))
    theta = (*given.arg_tensors, *values.constants, *captured.tensors)
    if not (problem.check or _live((*given.x_tensors, *theta))):
        return values.result()
    return _differentiable(problem, given, values, captured, theta)


def _traced(problem: Problem, given: _Given) -> Tree:
    """The same under Dynamo, where f runs in the open graph and nothing has to be captured."""
    if problem.check:
        raise NotImplementedError(
            f"`{problem.caller}`: check=True looks at values, which torch.compile cannot; leave it out of the "
            "compiled region, or call check_inverse beside it."
        )
    if any(t.requires_grad for t in given.kwarg_tensors):
        _refuse_live_keyword(problem.caller)
    values = _evaluate(problem, given, Captured.nothing())
    if not _torch.traced_derivatives_possible():
        return values.result()
    return _differentiable(problem, given, values, Captured.nothing(), (*given.arg_tensors, *values.constants))


def _live(tensors: Tensors) -> bool:
    return any(is_differentiable(t) and _torch.is_live(t) for t in tensors)


def _wanted(given: _Given) -> Callable[[Tensor], bool]:
    """Which captured tensors become inputs; in half precision all, since f runs in float32."""
    half = (torch.float16, torch.bfloat16)
    if given.like is None or given.like.dtype not in half:
        return is_open
    return lambda t: t.dtype in half or is_open(t)


def _watched(problem: Problem, given: _Given, values: "_Values", captured: Captured) -> list[Tensor]:
    """What f reads that the walk could not see; f may be undefined at x, so it is evaluated at y."""

    def run() -> Any:
        return problem.f(values.y.join(values.tensors), *given.args.join(given.arg_tensors))

    return watch(run, (*values.tensors, *given.arg_tensors, *captured.tensors))


def _refuse_live_keyword(caller: str) -> None:
    raise NoDerivativeError(
        f"`{caller}`: a keyword argument carries a derivative, but keyword arguments reach g alone and f never sees "
        "them, so the derivative would be lost. Pass the tensor by position, g(x, tensor) with f(y, tensor), or "
        "detach it."
    )


# --- values ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Values:
    """What g returned, taken apart."""

    y: Partition
    tensors: tuple[Tensor, ...]
    aux: tuple[Tree, ...]

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """The leaves of y without derivative."""
        return tuple(t for t in self.tensors if not is_differentiable(t))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The leaves of y with derivative."""
        return tuple(t for t in self.tensors if is_differentiable(t))

    @property
    def differentiable(self) -> tuple[bool, ...]:
        return tuple(is_differentiable(t) for t in self.tensors)

    def result(self, leaves: Tensors | None = None) -> Tree:
        """What the caller gets: y, or (y, aux)."""
        y = self.y.join(self.tensors if leaves is None else _merge(self.differentiable, leaves, self.constants))
        return (y, *self.aux) if self.aux else y


def _merge(first: Sequence[bool], yes: Tensors, no: Tensors) -> list[Tensor]:
    """Two sequences put back into one order."""
    ones, others = iter(yes), iter(no)
    return [next(ones) if flag else next(others) for flag in first]


def _evaluate(problem: Problem, given: _Given, captured: Captured) -> _Values:
    dims = event_dims(problem.event_dim, given.x, given.x_tensors, problem.caller, "event_dim")
    x = given.x_tensors
    default: VmapMethod = "sequential" if problem.event_dim is None else "broadcast"
    box = BlackBox(
        caller=problem.caller,
        call=lambda tensors: given.call(problem.g, tensors),
        captured=captured,
        has_aux=problem.has_aux,
        method=problem.vmap_method or default,
        x_only=problem.vmap_method is None,
        x_places=tuple(range(len(x))),
        batch_dims=tuple(t.ndim - d for t, d in zip(x, dims, strict=True)),
        like=given.like,
        outcome=Outcome(),
    )
    outputs = evaluate(box, (*given.tensors, *captured.tensors))
    return _unpack(box, outputs)


def _unpack(box: BlackBox, outputs: Tensors) -> _Values:
    y, aux = box.outcome.y, box.outcome.aux
    n = len(y.places)
    return _Values(y, tuple(outputs[:n]), (aux.join(outputs[n:]),) if box.has_aux else ())


# --- derivative -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Evidence:
    """f on leaves: (y leaves, theta leaves) -> x leaves, where theta = (args, constants of y, captured)."""

    problem: Problem
    y: Partition
    differentiable: tuple[bool, ...]
    args: Partition
    captured: Captured
    target: Partition

    def __call__(self, y: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        n = len(self.args.places)
        m = len(theta) - self.captured.count
        everything = self.y.join(_merge(self.differentiable, y, theta[n:m]))
        with self.captured.running(theta[m:], known=(*y, *theta)):
            result = self.problem.f(everything, *self.args.join(theta[:n]))
        leaves = self.target.pick(result, self.problem.caller, "f(y, *args)")
        _check_tensors(self.problem.caller, leaves)
        return leaves


def _check_tensors(caller: str, leaves: Sequence[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise StructureError(
                f"`{caller}`: f(y, *args) returned {type(leaf).__name__} where x has a tensor. f is what gets "
                "differentiated: it must be made of torch operations and return tensors in x's structure."
            )


def _differentiable(problem: Problem, given: _Given, values: _Values, captured: Captured, theta: Tensors) -> Tree:
    target, x = _target(given)
    x_dims = event_dims(problem.event_dim, target, x, problem.caller, "event_dim")
    y, y_dims = values.leaves, _y_dims(problem, given, values)
    batch = batch_shape(y, y_dims, problem.caller, "y")
    _check_sizes(problem.caller, Layout.of(x, x_dims), Layout.of(y, y_dims))
    x = tuple(_lead(problem.caller, t, d, batch) for t, d in zip(x, x_dims, strict=True))
    evidence = _Evidence(problem, values.y, values.differentiable, given.args, captured, target)
    if problem.check:
        got = evidence([t.detach() for t in y], [t.detach() for t in theta])
        check_residual(problem.caller, problem.check, got, x, y, (x_dims, y_dims))
    rule = ImplicitRule(problem.caller, evidence, y_dims, x_dims, problem.linear_solver)
    return values.result(attach(rule, y, x, theta))


def _target(given: _Given) -> tuple[Partition, tuple[Tensor, ...]]:
    """The leaves of x that f must give back: the floating ones, or all numbers where none is."""
    tree = given.x.join(given.x_tensors)
    target, x = Partition.of(tree, is_differentiable)
    if x:
        return target, x
    target, numbers = Partition.of(tree, is_number)
    return target, tuple(torch.as_tensor(n) for n in numbers)


def _y_dims(problem: Problem, given: _Given, values: _Values) -> tuple[int, ...]:
    _check_integers(problem.caller, given, values)
    prefix, name = problem.out_event_dim, "out_event_dim"
    if prefix is None:
        prefix, name = problem.event_dim, "event_dim` (also for y, as there is no `out_event_dim`), `event_dim"
    dims = event_dims(prefix, values.y, values.tensors, problem.caller, name)
    return tuple(d for d, floating in zip(dims, values.differentiable, strict=True) if floating)


def _check_integers(caller: str, given: _Given, values: _Values) -> None:
    """An integer leaf of y must be one that x passes through."""
    integers = {p: t for p, t in zip(values.y.places, values.tensors, strict=True) if not is_differentiable(t)}
    if not integers or values.y.spec == given.x.spec and not integers.keys() & set(_target(given)[0].places):
        return
    arrived = ", ".join(f"{t.dtype} of shape {tuple(t.shape)}" for t in integers.values())
    raise StructureError(
        f"`{caller}`: g returned {arrived}; an integer has no derivative. Return floating numbers (in NumPy: "
        ".astype(float)), or hand integers over as aux with has_aux=True."
    )


def _check_sizes(caller: str, x: Layout, y: Layout) -> None:
    if x.size == y.size:
        return
    more = (
        "More outputs than inputs: f(g(x)) = x does not determine the derivative of g"
        if y.size > x.size
        else "Fewer outputs than inputs: f(g(x)) = x cannot hold around x"
    )
    raise StructureError(
        f"`{caller}`: one sample of x has {x.size} real numbers (event shapes {list(x.shapes)}), one of y has {y.size} "
        f"({list(y.shapes)}). {more}. Give g and f equally many, state the missing equations in f, or describe the "
        "samples by `event_dim` and `out_event_dim`."
    )


def _lead(caller: str, x: Tensor, dim: int, batch: Sequence[int]) -> Tensor:
    """x with all the batch dims of y; autograd sums over those it did not have."""
    event = x.shape[x.ndim - dim :]
    if x.shape == (*batch, *event):
        return x
    try:
        return x.expand(*batch, *event)
    except RuntimeError as error:
        raise StructureError(
            f"`{caller}`: x has the batch shape {tuple(x.shape[: x.ndim - dim])}, y = g(x) has {tuple(batch)}. g must "
            "keep the batch dims of x (or broadcast them against its further arguments); check `event_dim`."
        ) from error
