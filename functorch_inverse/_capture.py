"""Live tensors and modules that a function reaches without being given them, made explicit.

`torch.autograd.Function` gives a tensor that f closes over a gradient of zero, silently. So what f
and g can reach is found and handed over as an input of its own:

1. A walk over closures, globals, bound objects and containers finds modules and tensors. Where it
   could look everywhere, nothing else can be live.
2. Where it met something that it cannot look into, f is evaluated once under a mode that watches
   which tensors it reads.
3. A live tensor that turns up later raises an error: its derivative would be lost.
"""

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from functorch_inverse import _torch
from functorch_inverse.errors import NoDerivativeError

__all__ = ["Captured", "Reach", "is_open", "watch"]


def is_open(tensor: Tensor) -> bool:
    """Whether a transform or autograd has a hold on a tensor, so that it must be an explicit input."""
    return tensor.requires_grad or _torch.is_wrapped(tensor) or _torch.is_live(tensor)


# --- 1. the walk ----------------------------------------------------------------------------------

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(...), torch.dtype, torch.device)
# Their module globals hold no tensor of the user's.
_LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "optree", "builtins", "functorch_inverse"}
_DYNAMIC = {"eval", "exec", "globals", "locals", "vars", "__import__", "import_module"}
_BUDGET = 3000


@dataclass
class Reach:
    """What a function can reach: modules, loose tensors, and whether the walk saw everything."""

    modules: list[nn.Module] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    complete: bool = True

    @classmethod
    def of(cls, *functions: Any) -> "Reach":
        """Walk from some functions, breadth first."""
        reach, seen, queue = cls(), {}, list(functions)
        for found in queue:  # grows while it is walked
            if isinstance(found, _PLAIN) or id(found) in seen:
                continue
            seen[id(found)] = found  # keeps it alive, so that ids stay unique
            if len(seen) > _BUDGET:
                reach.complete = False
                break
            if isinstance(found, Tensor):
                reach.tensors.append(found)
            elif isinstance(found, nn.Module):
                reach.modules.append(found)
            queue.extend(reach._inside(found))
        return reach

    def _inside(self, found: Any) -> Iterable[Any]:
        for kind, look in _LOOK.items():
            if isinstance(found, kind):
                return look(found)
        if isinstance(found, types.FunctionType):
            return self._function(found)
        return self._instance(found)

    def _function(self, fn: types.FunctionType) -> Iterator[Any]:
        for cell in fn.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
        yield fn.__defaults__
        yield fn.__kwdefaults__
        yield fn.__dict__
        if _library(fn.__module__):
            return
        names = _names(fn.__code__)
        if names & _DYNAMIC:
            self.complete = False
        for name in names:
            value = fn.__globals__.get(name, sys.modules.get(name))
            if isinstance(value, types.ModuleType):
                yield from _module_attributes(value, names)
            elif value is not None:
                yield value

    def _instance(self, found: Any) -> Iterator[Any]:
        kind = type(found)
        state = getattr(found, "__dict__", None)
        slots = [s for base in kind.__mro__ for s in _slots(base)]
        if state is None and not slots and not _library(kind.__module__):
            self.complete = False
        if kind.__module__ in _HIDING:
            self.complete = False
        yield state
        for slot in slots:
            yield getattr(found, slot, None)
        yield kind


def _slots(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


# C objects of these modules hold references that cannot be followed.
_HIDING = {"weakref", "_weakref", "_thread", "_threading_local", "_contextvars", "itertools"}


def _library(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _LIBRARIES


def _names(code: types.CodeType) -> frozenset[str]:
    """Every name and string that a function, or one defined inside it, mentions."""
    return _names_of(code)


@functools.lru_cache(maxsize=4096)
def _names_of(code: types.CodeType) -> frozenset[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, str) and const.isidentifier():
            names.add(const)
        elif isinstance(const, types.CodeType):
            names |= _names_of(const)
    return frozenset(names)


def _module_attributes(module: types.ModuleType, names: frozenset[str]) -> Iterator[Any]:
    if not _library(module.__name__):
        space = vars(module)
        yield from (space[name] for name in names if name in space)


def _class_attributes(cls: type) -> Iterator[Any]:
    for base in cls.__mro__:
        if not _library(base.__module__):
            yield from (v for k, v in vars(base).items() if k != "__dict__")


def _parts_of_module(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        yield type(part)
        yield from (v for k, v in vars(part).items() if k not in ("_parameters", "_buffers", "_modules"))


_LOOK: dict[Any, Callable[[Any], Iterable[Any]]] = {
    Tensor: lambda t: (),
    nn.Module: _parts_of_module,
    (list, tuple, set, frozenset): list,
    (dict, types.MappingProxyType): lambda d: list(d.values()),
    types.MethodType: lambda m: (m.__self__, m.__func__),
    functools.partial: lambda p: (p.func, p.args, p.keywords, vars(p)),
    (staticmethod, classmethod): lambda m: (m.__func__,),
    property: lambda p: (p.fget,),
    functools.cached_property: lambda p: (p.func,),
    (types.BuiltinFunctionType, types.MethodWrapperType): lambda b: (
        () if isinstance(b.__self__, types.ModuleType) else (b.__self__,)
    ),
    type: _class_attributes,
    (
        types.ModuleType,
        types.CodeType,
        types.GetSetDescriptorType,
        types.MemberDescriptorType,
        types.WrapperDescriptorType,
        types.MethodDescriptorType,
        types.ClassMethodDescriptorType,
        types.GenericAlias,
    ): lambda d: (),
}


# --- 2. what was found, as explicit inputs --------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Captured:
    """Tensors that functions read by themselves, as parameters that can be given other values.

    Parameters and buffers are known by their place in a module, because their value changes under
    functional_call; other tensors by identity.
    """

    modules: tuple[tuple[nn.Module, tuple[str, ...]], ...]
    loose: tuple[Tensor, ...]
    guarded: bool

    @classmethod
    def of(cls, reach: Reach, wanted: Callable[[Tensor], bool], watched: Sequence[Tensor] = ()) -> "Captured":
        """Those of the reached and the watched tensors that are wanted."""
        slots = tuple((m, tuple(n for n, t in _state(m).items() if wanted(t))) for m in reach.modules)
        modules = tuple((m, names) for m, names in slots if names)
        known = {id(t) for m in reach.modules for t in _state(m).values()}
        loose = {id(t): t for t in (*reach.tensors, *watched) if id(t) not in known and wanted(t)}
        return cls(modules, tuple(loose.values()), not reach.complete)

    @classmethod
    def nothing(cls) -> "Captured":
        return cls((), (), False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The present values, in the order in which `running` takes them."""
        found = [t for m, names in self.modules for t in map(_state(m).__getitem__, names)]
        return (*found, *self.loose)

    @property
    def count(self) -> int:
        """How many tensors were captured."""
        return sum(len(names) for _, names in self.modules) + len(self.loose)

    @contextmanager
    def running(self, values: Sequence[Tensor], known: Iterable[Tensor] = ()) -> Iterator[None]:
        """Let every function called inside read these values instead."""
        with ExitStack() as stack:
            rest = list(values)
            if self.modules:
                stack.enter_context(_SWAPPING)
            for module, names in self.modules:
                state = {name: rest.pop(0) for name in names}
                stack.enter_context(_torch.reparametrize(module, state, tie_weights=True))
            if self.loose or self.guarded:
                stack.enter_context(_Substitute(self.loose, rest, (*values, *known) if self.guarded else None))
            yield


# A module's parameters are swapped in place; two threads must not do so at once.
_SWAPPING = threading.RLock()


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _tensors_in(*trees: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _pytree.tree_leaves(trees) if isinstance(leaf, Tensor))


class _Substitute(TorchFunctionMode):
    """Hand other tensors to every torch function in place of the captured ones."""

    def __init__(self, captured: Sequence[Tensor], values: Sequence[Tensor], known: Iterable[Tensor] | None) -> None:
        super().__init__()
        self.table = {id(t): v for t, v in zip(captured, values, strict=True)}
        self.made = None if known is None else {id(t): t for t in known}
        self.level = max((_torch.level(t) for t in (*values, *(known or ()))), default=-1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def swap(leaf: Any) -> Any:
            return self.table.get(id(leaf), leaf)

        args, kwargs = _pytree.tree_map(swap, (tuple(args), kwargs or {}))
        if self.made is None:
            return func(*args, **kwargs)
        for tensor in _tensors_in(args, kwargs):
            if id(tensor) not in self.made and is_open(tensor) and _torch.level(tensor) < self.level:
                raise NoDerivativeError(
                    f"f read a live tensor of shape {tuple(tensor.shape)} that was not there when g was called, so "
                    "its derivative would be lost. Do not replace what f closes over between the forward and the "
                    "backward pass; better, hand it over as an argument: g(x, tensor) with f(y, tensor)."
                )
        result = func(*args, **kwargs)
        self.made.update((id(t), t) for t in _tensors_in(result))
        return result


# --- 3. what the walk could not see ---------------------------------------------------------------


class _Watch(TorchFunctionMode):
    """Collect the open tensors that a function reads, and read them detached."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.made = {id(t): t for t in known}
        self.read: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors_in(args, kwargs):
            if id(tensor) not in self.made and is_open(tensor):
                self.read[id(tensor)] = tensor
        result = func(*args, **(kwargs or {}))
        self.made.update((id(t), t) for t in _tensors_in(result))
        return result


def watch(function: Callable[[], Any], known: Iterable[Tensor]) -> list[Tensor]:
    """Evaluate a function once and tell which open tensors it read besides the known ones."""
    with torch.no_grad(), _Watch(known) as seen:
        function()
    return list(seen.read.values())
