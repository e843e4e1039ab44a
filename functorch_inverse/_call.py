"""One call of a black box: its values first, then the derivative that the evidence gives them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._batching import evaluate
from functorch_inverse._capture import Captured, standing_for, watch
from functorch_inverse._in_place import keeping
from functorch_inverse._rules import poisoned
from functorch_inverse._sight import Sight
from functorch_inverse._transforms import is_live, is_open
from functorch_inverse._tree import Partition, Tree, event_dims, is_differentiable, prefix_values
from functorch_inverse._values import BlackBox, Loop, Outcome, VmapMethod
from functorch_inverse.errors import NoDerivativeError

__all__ = ["Given", "Problem", "Values", "live", "merge", "solve"]

Tensors = Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A black box g(x, *args, **kwargs), and a differentiable function that is evidence of its derivative."""

    caller: str
    g: Callable[..., Any]
    evidence: Callable[..., Any] | None = None
    event_dim: Tree = None
    out_event_dim: Tree = None
    vmap_method: VmapMethod | None = None
    has_aux: bool = False
    check: bool | float = False
    loop: Loop | None = None
    keeps_dtypes: bool = False
    # Whether the evidence may be evaluated once more, to see which tensors it reads.
    probes: ClassVar[bool] = True
    # Whether nothing but x has a derivative.
    x_alone: ClassVar[bool] = False
    # Whether y depends on all arguments alike, and there is no x.
    rooted: ClassVar[bool] = False

    @functools.cached_property
    def sees(self) -> tuple[Sight, Sight]:
        """What g reaches by itself, and what the evidence does."""
        return Sight(self.g), Sight(self.evidence)

    @property
    def returns_more(self) -> bool:
        """Whether g returns (y, something else)."""
        return self.has_aux

    def refuse_lost(self, given: "Given") -> None:
        """NoDerivativeError where a derivative flows into something that the evidence says nothing about."""

    def probe(self, given: "Given", values: "Values") -> Any:
        """The evidence at this point, as the derivative will evaluate it."""
        raise NotImplementedError

    def attach(self, given: "Given", values: "Values", captured: Captured) -> tuple[Tensor, ...]:
        """The leaves of y with their derivatives; `captured` is what the evidence reads by itself."""
        raise NotImplementedError


@_torch.called_eagerly
def solve(problem: Problem, x: Tree, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> Tree:
    """g(x, *args, **kwargs) with its derivatives to x, args and whatever the evidence closes over."""
    given = Given.of(x, args, kwargs)
    if torch.compiler.is_dynamo_compiling():
        return _traced(problem, given)
    return _eager(problem, given)


@dataclass(frozen=True, eq=False)
class Given:
    """The arguments of one call, taken apart into tensors and the rest."""

    x: Partition
    args: Partition
    keywords: tuple[str, ...]
    kwargs: Partition
    x_tensors: tuple[Tensor, ...]
    arg_tensors: tuple[Tensor, ...]
    kwarg_tensors: tuple[Tensor, ...]
    # What y takes after: the first floating tensor, those of x before the others.
    like: Tensor | None

    @classmethod
    def of(cls, x: Tree, args: tuple[Tree, ...], kwargs: dict[str, Any]) -> "Given":
        parts = [Partition.of(tree) for tree in (x, args, tuple(kwargs.values()))]
        xs, others, more = [tuple([standing_for(t) for t in found]) for _, found in parts]
        like = next((t for t in (*xs, *others, *more) if is_differentiable(t)), None)
        return cls(parts[0][0], parts[1][0], tuple(kwargs), parts[2][0], xs, others, more, like)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.x_tensors, *self.arg_tensors, *self.kwarg_tensors)

    def sight(self, problem: "Problem", which: int) -> Sight:
        """What g (0) or the evidence (1) reaches by itself, and in x and arguments that are modules, functions or objects."""
        others = (*self.x.others, *self.args.others, *(() if which else self.kwargs.others))
        return Sight(*problem.sees[which].functions, *others) if others else problem.sees[which]

    def call(self, g: Callable[..., Any], tensors: Tensors) -> Any:
        """g at other values of the tensors."""
        n, m = len(self.x_tensors), len(self.x_tensors) + len(self.arg_tensors)
        args, values = self.args.join(tensors[n:m]), self.kwargs.join(tensors[m:])
        return g(self.x.join(tensors[:n]), *args, **dict(zip(self.keywords, values, strict=True)))


# --- the order of things --------------------------------------------------------------------------


def _eager(problem: Problem, given: Given) -> Tree:
    if _torch.plain() and not problem.check:
        return _evaluate(problem, given).result()
    if live(given.kwarg_tensors) or (given.kwargs.others and live(Captured.of(Sight(*given.kwargs.others)).tensors)):
        _refuse_live_keyword(problem.caller)
    problem.refuse_lost(given)
    captured = Captured.of(given.sight(problem, 1), _wanted(given))
    values = _evaluate(problem, given)
    captured = captured.after_g()
    if captured.doubtful and problem.probes:
        captured = captured.reading(_watched(problem, given, values, ()))
    captured.refuse_memos()
    if not captured.complete and problem.probes:
        captured = captured.including(_watched(problem, given, values, captured.tensors))
    if not (problem.check or live((*given.x_tensors, *given.arg_tensors, *captured.tensors))):
        return values.result()
    return values.result(problem.attach(given, values, captured))


def _traced(problem: Problem, given: Given) -> Tree:
    """The same under Dynamo, where f runs in the open graph and nothing has to be captured."""
    if problem.check:
        raise NotImplementedError(
            f"`{problem.caller}`: check=True looks at values, which torch.compile cannot; leave it out of the "
            "compiled region, or call check_inverse beside it."
        )
    parameters = [p for leaf in given.kwargs.others if isinstance(leaf, torch.nn.Module) for p in leaf.parameters()]
    if any(t.requires_grad for t in (*given.kwarg_tensors, *parameters)):
        _refuse_live_keyword(problem.caller)
    values = _evaluate(problem, given)
    if not _torch.traced_derivatives_possible():
        return values.result()
    leaves = problem.attach(given, values, Captured())
    return values.result(poisoned(leaves, [t for t in given.kwarg_tensors if is_differentiable(t)]))


def live(tensors: Tensors) -> bool:
    """Whether a derivative flows through any of the tensors."""
    return bool(tensors) and any(is_differentiable(t) and is_live(t) for t in tensors)


_HALF = (torch.float16, torch.bfloat16)


def _wanted(given: Given) -> Callable[[Tensor], bool]:
    """Which captured tensors become inputs; in half precision all, since f runs in float32."""
    if given.like is None or given.like.dtype not in _HALF:
        return is_open
    return lambda t: t.dtype in _HALF or is_open(t)


def _watched(problem: Problem, given: Given, values: "Values", captured: Tensors) -> list[Tensor]:
    """What the evidence reads by itself besides what is known to be captured."""
    known = (*given.x_tensors, *given.arg_tensors, *values.tensors, *captured)
    return watch(lambda: keeping(known, problem.probe, given, values), known)


def _refuse_live_keyword(caller: str) -> None:
    raise NoDerivativeError(
        f"`{caller}`: a keyword argument carries a derivative, but keyword arguments reach g alone and f never sees "
        "them, so the derivative would be lost. Pass the tensor by position, g(x, tensor) with f(y, tensor), or "
        "detach it."
    )


# --- values ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Values:
    """What g returned, taken apart."""

    y: Partition
    tensors: tuple[Tensor, ...]
    differentiable: tuple[bool, ...]
    aux: tuple[Tree, ...]
    traced: tuple[Tensor, ...] = ()

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """The leaves of y without derivative."""
        return tuple([t for t, flag in zip(self.tensors, self.differentiable, strict=True) if not flag])

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The leaves of y with derivative."""
        return tuple([t for t, flag in zip(self.tensors, self.differentiable, strict=True) if flag])

    @property
    def differentiable_part(self) -> Partition:
        """The structure of y, with the leaves that have a derivative as its chosen ones."""
        return Partition.of(self.y.join(self.tensors), is_differentiable)[0]

    def result(self, leaves: Tensors | None = None) -> Tree:
        """What the caller gets: y, or (y, aux)."""
        y = self.y.join(self.tensors if leaves is None else merge(self.differentiable, leaves, self.constants))
        return (y, *self.aux) if self.aux else y


def merge(first: Sequence[bool], yes: Tensors, no: Tensors) -> list[Tensor]:
    """Two sequences put back into one order."""
    if not no:
        return list(yes)
    ones, others = iter(yes), iter(no)
    return [next(ones) if flag else next(others) for flag in first]


def _evaluate(problem: Problem, given: Given) -> Values:
    tracing = torch.compiler.is_dynamo_compiling()
    captured = Captured() if tracing else Captured.of(given.sight(problem, 0))
    part, x = Partition.of(given.x.join(given.x_tensors), is_differentiable)
    event_dim = None if problem.rooted else problem.event_dim
    dims = event_dims(event_dim, part, x, problem.caller, "event_dim")
    # A leaf without an event dim beside leaves with one is shared by all samples, like a further argument.
    said = prefix_values(event_dim, part, x, problem.caller, "event_dim")
    counts = [None if s is None else t.ndim - d for t, d, s in zip(x, dims, said, strict=True)]
    own = {place: count for place, count in zip(part.places, counts, strict=True) if count is not None}
    x_places = tuple(k for k, place in enumerate(given.x.places) if place in own or not own)
    batch_dims = tuple(own.get(given.x.places[k], 0) for k in x_places)
    if problem.rooted:
        x_places, batch_dims = tuple(range(len(given.tensors))), (0,) * len(given.tensors)
    default: VmapMethod = "sequential" if event_dim is None else "broadcast"
    box = BlackBox(
        caller=problem.caller,
        call=lambda tensors: given.call(problem.g, tensors),
        captured=captured,
        has_aux=problem.returns_more,
        method=problem.vmap_method or default,
        x_only=problem.vmap_method is None,
        x_places=x_places,
        batch_dims=batch_dims,
        like=None if problem.keeps_dtypes else given.like,
        outcome=Outcome(),
        loop=problem.loop,
        blind=len(given.x_tensors) if problem.x_alone else len(given.tensors),
    )
    outputs = evaluate(box, (*given.tensors, *captured.tensors))
    return _unpack(box, outputs)


def _unpack(box: BlackBox, outputs: Tensors) -> Values:
    y, aux = box.outcome.y, box.outcome.aux
    assert y is not None
    n = len(y.places)
    tensors = tuple(outputs[:n])
    extra = () if aux is None else (aux.join(outputs[n:]),)
    return Values(y, tensors, tuple(map(is_differentiable, tensors)), extra, box.outcome.traced)
