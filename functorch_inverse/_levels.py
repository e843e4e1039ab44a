"""Down through the open transforms, to where somebody follows what is computed."""

import inspect
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function

from functorch_inverse import _torch
from functorch_inverse._hooks import unhooked
from functorch_inverse._legacy import through_vmap
from functorch_inverse._transforms import Transform, alive, follows, innermost

__all__ = ["Attached", "Dims", "Task", "announced", "followed", "memory_of", "plain_apply", "run", "signed", "sink"]

Tensors: TypeAlias = Sequence[Tensor]
Optional: TypeAlias = Sequence[Tensor | None]
Dims: TypeAlias = Sequence[int | None]


class _Peeled(NamedTuple):
    """Tensors with and without what the innermost transform put around them, the dims that it maps, and whether it follows one.

    The transform is None where only plain autograd can follow.
    """

    tensors: list[Tensor]
    inner: list[Tensor]
    dims: Dims
    followed: bool

    @staticmethod
    def of(tensors: Tensors, transform: Transform | None, has_derivative: bool = True) -> "_Peeled":
        with _torch.no_functions():  # a mode would answer for what stands in for a tensor
            return _peel(tensors, transform, follows(transform) if has_derivative else _never)


def _never(_: Tensor) -> bool:
    return False


def _peel(tensors: Tensors, transform: Transform | None, is_followed: Callable[[Tensor], bool]) -> _Peeled:
    tensors = [alive(t) for t in tensors]
    if transform is None:
        return _Peeled(tensors, tensors, _nothing(tensors), any(map(is_followed, tensors)))
    now, maps = transform.level, transform.maps
    own = [_torch.level(t) == now for t in tensors]
    inner = [_torch.unwrapped(t) if here else t for t, here in zip(tensors, own, strict=True)]
    if maps:
        dims = [_torch.batch_dim(t) if here else None for t, here in zip(tensors, own, strict=True)]
        return _Peeled(tensors, inner, dims, False)
    return _Peeled(tensors, inner, _nothing(tensors), any(map(is_followed, itertools.compress(tensors, own))))


def _nothing(tensors: Tensors) -> Dims:
    return (None,) * len(tensors)


class Task(Protocol):
    """What is computed of some tensors, whatever is open."""

    # If not, the values are what they are, whoever follows the tensors.
    has_derivative: ClassVar[bool]

    def itself(self, tensors: Tensors) -> Tensors | None:
        """The outputs by operations that everybody can differentiate; None from an `Attached` one."""
        ...

    def values(self, tensors: Tensors) -> Tensors:
        """The outputs of plain tensors that nobody follows."""
        ...

    def mapped(self, dims: Dims, size: int, randomness: str, tensors: Tensors) -> "tuple[Tensors, Dims]":
        """The outputs beneath a vmap, and where they have its dim."""
        ...


class Attached(Task, Protocol):
    """A task that knows the derivatives of what it computes."""

    def keep(self, ctx: Any, tensors: Tensors, output: Tensors) -> Tensors:
        """What the derivatives of one level will need: tensors to be saved, and in `ctx` the rest."""
        ...

    def backward(self, ctx: Any, needed: Sequence[bool], v: Optional) -> Optional:
        """What the tensors receive, where they need it."""
        ...

    def jvp(self, ctx: Any, saved: Tensors, tangents: Optional) -> Optional:
        """The tangents of the outputs."""
        ...


def run(task: Task, tensors: Tensors) -> tuple[Tensor, ...]:
    """The outputs of a task: open transforms are taken off one by one, cheaper than torch does it."""
    top = _understood()
    tensors, inner, dims, is_followed = _Peeled.of(tensors, top, task.has_derivative)
    if is_followed:
        itself = task.itself(tensors)
        if itself is not None:
            return tuple(itself)
        attached = cast(Attached, task)
        if top is None or not top.pushes or any(t.requires_grad for t, own in zip(tensors, inner, strict=True) if own is not t):
            return followed(attached, top, inner, tensors)
        return _pushed(attached, top, inner, tensors)
    if top is None:
        with torch.no_grad(), _torch.forward_mode(False):
            return tuple(task.values(inner))
    return _beneath(task, top, inner, dims)


def _beneath(task: Task, top: Transform, inner: Tensors, dims: Dims) -> tuple[Tensor, ...]:
    """The outputs by what is beneath the innermost transform."""
    found: Tensors
    places: Dims | None = None
    with top.lowered():
        if not top.maps or all(d is None for d in dims):
            found = run(task, inner)
        else:
            found, places = _Followed.vmap(top, (None, None, None, *dims), task, top, (), *inner)
    return _wrapped(found, places, top)


def followed(task: Attached, top: Transform | None, inner: Tensors, tensors: Tensors) -> tuple[Tensor, ...]:
    """The outputs, with their derivatives for the innermost transform, or for plain autograd."""
    if top is None:
        return _apply(task, None, (), *tensors)
    # What a tensor of a lower level has of tangents and graphs is that level's: here it is a constant.
    here = [_torch.wrap_for_grad(t, top.level) if t is below else t for t, below in zip(tensors, inner, strict=True)]
    before = _torch.single_level_allowed()
    _torch.allow_single_level(True)
    try:
        return _apply(task, top, inner, *here)
    finally:
        _torch.allow_single_level(before)


def _pushed(task: Attached, top: Transform, inner: Tensors, tensors: Tensors) -> tuple[Tensor, ...]:
    """The outputs with their tangents, which are values like any other to all that is beneath a jvp.

    torch would compute them inside of it, where the saved tensors have tangents, too.
    """
    tangents = [_torch.tangent(t) for t in tensors]
    given = [t if t is None or _torch.level(t) != top.level else _torch.unwrapped(t) for t in tangents]
    with top.lowered():
        found, ctx = run(task, inner), types.SimpleNamespace()
        with unhooked():
            moved = task.jvp(ctx, task.keep(ctx, inner, found), given)
    outputs, now = _wrapped(found, None, top), top.level
    pairs = zip(outputs, moved, strict=True)
    return tuple([out if t is None else _torch.dual(out, _torch.wrap_for_grad(t, now)) for out, t in pairs])


class _Followed(Function):
    """A task at one level. For torch.func, torch would make such a class at every call and at every level."""

    @staticmethod
    def forward(task: Attached, top: Transform | None, inner: Tensors, *tensors: Tensor) -> Tensors:
        if top is None:
            values = task.values(tensors)
            # What is a view there, torch wants to have a tangent of the same strides.
            return tuple([t.clone() if t._is_view() else t for t in values] if _torch.dual_level_open() else values)
        with torch.enable_grad(), _torch.forward_mode(True):
            return _beneath(task, top, inner, ())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        task, _, _, *tensors = inputs
        ctx.task = task
        saved = task.keep(ctx, tensors, output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    @through_vmap
    def backward(ctx: Any, *v: Tensor | None) -> Optional:
        needed = ctx.needs_input_grad[3:]
        if all(c is None for c in v):
            return (None,) * len(ctx.needs_input_grad)
        with unhooked():
            return (None, None, None, *ctx.task.backward(ctx, needed, v))

    @staticmethod
    @through_vmap
    def jvp(ctx: Any, _task: None, _top: None, _inner: None, *tangents: Tensor | None) -> Optional:
        with _torch.forward_mode_again(), unhooked():
            saved, given = ([_torch.primal(t) for t in part] for part in (map(alive, ctx.saved_tensors), tangents))
            return tuple(ctx.task.jvp(ctx, saved, given))

    @staticmethod
    def vmap(info: Any, in_dims: Dims, task: Task, _top: Any, _inner: Any, *tensors: Tensor) -> "tuple[Tensors, Dims]":
        return task.mapped(in_dims[3:], info.batch_size, info.randomness, tensors)


def plain_apply(function: Any) -> Any:
    """The apply of an autograd.Function for those who look for open transforms by themselves.

    Torch does at every call, and hands over to a class of this base that it makes for one level.
    """
    rules = {name: rule for name, rule in vars(function).items() if isinstance(rule, staticmethod)}
    single: Any = type(function.__name__, (_torch.SingleLevelFunction,), rules | _torch.for_compiled_autograd)
    return single.apply


# What `Function.apply` does before, it does for other classes.
_apply: Callable[..., tuple[Tensor, ...]] = plain_apply(_Followed)


def announced(function: Callable[..., Any], tensors: Tensors, *args: Any) -> Any:
    """function(tensors, *args), announced as a torch function, so that a rule inside another rule's f can be followed."""
    if not _torch.function_mode_active():
        return function(tensors, *args)
    return handle_torch_function(announced, tensors, function, tensors, *args)


def _understood() -> Transform | None:
    top = innermost()
    if top is not None and top.functionalizes:
        raise NotImplementedError(
            "a black box inside torch.func.functionalize: that has no rule for functions of one's own. Leave functionalize "
            "out; f and g may change tensors of their own in place without it."
        )
    return top


def sink(function: Callable[..., Tensors], *groups: Tensors) -> Tensors:
    """function(whether a plain graph will do, *groups of tensors), below all the open transforms that have no part in them."""
    top, sizes = _understood(), [len(group) for group in groups]
    tensors, inner, dims, is_followed = _Peeled.of([t for group in groups for t in group], top)
    if is_followed or any(d is not None for d in dims):
        return function(False, *_split(tensors, sizes))
    if top is None:
        with torch.no_grad(), _torch.forward_mode(False):
            return function(_torch.can_record(), *_split(inner, sizes))
    with top.lowered():
        found = sink(function, *_split(inner, sizes))
    return _wrapped(found, None, top)


def _split(tensors: list[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(tensors)
    return [list(itertools.islice(rest, size)) for size in sizes]


def _wrapped(tensors: Tensors, dims: Dims | None, transform: Transform) -> tuple[Tensor, ...]:
    """Tensors from beneath a transform as they are inside of it; where it is a vmap, `dims` are what it maps."""
    now = transform.level
    if not transform.maps:
        return tuple([_torch.wrap_for_grad(t, now) for t in tensors])
    if dims is None:
        return tuple(tensors)
    return tuple([t if d is None else _torch.add_batch_dim(t, d, now) for t, d in zip(tensors, dims, strict=True)])


def signed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of an autograd.Function with its signature at hand, which torch asks for at every call under a transform."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


def memory_of(tensors: Tensors) -> "Memory | None":
    """Equal for tensors that share memory, which nobody has written to in between; None where nobody can tell."""
    marks = [_torch.mark(t) for t in tensors]
    return None if None in marks else Memory(marks, tensors)


class Memory:
    """Where some values lie; it keeps them, so that nothing else can take their place."""

    def __init__(self, marks: list[Any], tensors: Tensors) -> None:
        self.marks, self.tensors = marks, tensors

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Memory) and self.marks == other.marks

    __hash__ = None  # type: ignore[assignment]
