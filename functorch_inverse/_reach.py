"""What a function can reach without being given it: modules and tensors in closures, globals, objects.

The walk follows references as the garbage collector sees them, and globals by the names that the code
mentions. Where it meets something that it cannot look into, it says so.
"""

import functools
import gc
import operator
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from functorch_inverse._named import Named, content, in_library

__all__ = ["Opaque", "Reach", "Slots", "slots_of"]

_ATOMS = frozenset({
    type(None), bool, int, float, complex, str, bytes, bytearray, range, type(...), type(NotImplemented),
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, types.CodeType,
})  # fmt: skip
# Names that reach what no walk can follow.
_DYNAMIC = frozenset({
    "eval", "exec", "globals", "locals", "vars", "__import__", "import_module", "__globals__", "__dict__",
    "f_locals", "f_globals", "modules", "_getframe", "get_objects", "get_referrers",
})  # fmt: skip
_STATE = ("_parameters", "_buffers", "_modules")
_BUDGET = 5000
_HAVE_GC = 1 << 14  # Py_TPFLAGS_HAVE_GC


# Where a module keeps a parameter or buffer; several places where it is tied.
Slots: TypeAlias = list[tuple[dict[str, Any], str]]


def slots_of(modules: Iterable[nn.Module]) -> list[tuple[Tensor, Slots]]:
    """The parameters and buffers of modules, each with its places."""
    found: dict[int, tuple[Tensor, Slots]] = {}
    for module in modules:
        for part in module.modules():
            for space in (part._parameters, part._buffers):
                for name, tensor in space.items():
                    if tensor is not None:
                        found.setdefault(id(tensor), (tensor, []))[1].append((space, name))
    return list(found.values())


@dataclass(eq=False)
class Reach:
    """The modules and loose tensors that functions reach, and whether the walk saw everything.

    `trail` tells whether another walk would see the same; None where only another walk can tell.
    """

    modules: list[nn.Module] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    complete: bool = True
    trail: "_Trail | None" = None
    named: Named = field(default_factory=lambda: Named.of(()))

    @classmethod
    def of(cls, *functions: Any) -> "Reach":
        """Walk from some functions, breadth first."""
        reach = cls()
        seen: dict[int, Any] = {}  # keeps what it holds alive, so that ids stay unique
        queue, walk = list(functions), _Walk(reach)
        for found in queue:  # grows while it is walked
            if type(found) in _ATOMS or id(found) in seen:
                continue
            seen[id(found)] = found
            if len(seen) > _BUDGET:
                reach.complete = False
                break
            queue.extend(walk.inside(found))
        reach.trail = walk.end()
        reach.named = Named.of(functions)
        return reach


class Opaque:
    """Bookkeeping of this package: a walk goes on with `functions` alone."""

    functions: tuple[Any, ...] = ()


_SHORT = 500


class _Trail:
    """What a walk looked into and what it found there; it met nothing else that can change."""

    def __init__(self, holders: list[Any], spaces: Iterable[tuple[dict[str, Any], Iterable[str]]]) -> None:
        self.holders, self.parts = holders, gc.get_referents(*holders)
        self.looks = [(space.get, tuple(names), [space.get(name) for name in names]) for space, names in spaces]

    def holds(self) -> bool:
        """Whether everything is where it was."""
        now, same = gc.get_referents(*self.holders), operator.is_
        if len(now) != len(self.parts) or not all(map(same, now, self.parts)):
            return False
        for get, names, found in self.looks:  # noqa: SIM110 (a generator takes as long again)
            if not all(map(same, map(get, names), found)):
                return False
        return True


class _Walk:
    """One walk; remembers names and namespaces, which belong together wherever each was met."""

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.names: set[str] = set()
        self.spaces: list[types.ModuleType] = []
        self.holders: list[Any] = []
        self.looked: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self.can_be_traced = True

    def end(self) -> _Trail | None:
        """The trail of the whole walk, where it is worth keeping."""
        if not (self.can_be_traced and self.reach.complete and len(self.holders) < _SHORT):
            return None
        for space in self.spaces:
            self.look(vars(space), self.names)
        return _Trail(self.holders, self.looked.values())

    def look(self, space: dict[str, Any], names: Iterable[str]) -> list[Any]:
        """What stands under some names, noted whether it is there or not."""
        self.looked.setdefault(id(space), (space, set()))[1].update(names)
        return [space[name] for name in names if name in space]

    def referents(self, found: Any) -> list[Any]:
        """What the garbage collector sees in an object, noted."""
        self.holders.append(found)
        return gc.get_referents(found)

    def inside(self, found: Any) -> Iterable[Any]:
        """What an object refers to."""
        if isinstance(found, types.FunctionType):
            return self._function(found)
        if isinstance(found, types.BuiltinFunctionType):
            return [found.__self__]
        if isinstance(found, types.ModuleType):
            return self._namespace(found)
        if isinstance(found, Tensor):
            self.reach.tensors.append(found)
            return self.referents(vars(found))
        if isinstance(found, nn.Module):
            self.reach.modules.append(found)
            return self._module(found)
        if isinstance(found, type):
            return () if _library_class(found) else self._class(found)
        if isinstance(found, Opaque):
            return found.functions
        return self._object(found)

    def _module(self, module: nn.Module) -> list[Any]:
        """What the module and those inside it hold besides parameters, buffers and one another."""
        parts: list[Any] = []
        for inner in module.modules():
            held = vars(inner)
            if isinstance(inner, torch.jit.ScriptModule):
                self.can_be_traced = False
            else:
                self.holders += (held, inner._modules)
            parts.append(type(inner))
            parts += [v for k, v in held.items() if k not in _STATE and type(v) not in _ATOMS]
        return parts

    def _class(self, cls: type) -> list[Any]:
        spaces = [space for base in cls.__mro__ if not _library_class(base) for space in gc.get_referents(vars(base))]
        hidden = ("__dict__", "__weakref__")
        for holder in (cls, *spaces):
            self.referents(holder)
        return [type(cls), *(v for space in spaces for k, v in space.items() if k not in hidden)]

    def _function(self, fn: types.FunctionType) -> list[Any]:
        cells = fn.__closure__ or ()
        parts = [*map(content, cells), fn.__defaults__, fn.__kwdefaults__, fn.__dict__]
        for holder in (fn, *cells):
            self.referents(holder)
        space, modules = fn.__globals__, sys.modules
        if in_library(space.get("__name__")):
            return parts
        names = _names(fn.__code__)
        if not names.isdisjoint(_DYNAMIC):
            self.reach.complete = False
        parts += self.look(space, names)
        parts += self.look(modules, names)
        if not names <= self.names:
            new = names - self.names
            self.names |= new
            parts += [part for space in self.spaces for part in self._attributes(space, new)]
        return parts

    def _namespace(self, module: types.ModuleType) -> list[Any]:
        if in_library(module.__name__):
            return []
        if "__getattr__" in vars(module):  # finds what is not there
            self.reach.complete = False
        self.spaces.append(module)
        return list(self._attributes(module, self.names))

    def _attributes(self, module: types.ModuleType, names: Iterable[str]) -> Iterator[Any]:
        if "getattr" in self.names or "attrgetter" in self.names:
            self.reach.complete = False
        space = vars(module)
        yield from (space[name] for name in names if name in space)

    def _object(self, found: Any) -> list[Any]:
        kind = type(found)
        if kind.__name__ == "ndarray" and getattr(found, "dtype", None) is not None and not found.dtype.hasobject:
            return []
        hidden = self._hidden(found, kind)
        if hidden is not None:
            self.can_be_traced = False
            return hidden
        if isinstance(found, operator.attrgetter | operator.methodcaller) or kind.__name__.endswith("ProxyType"):
            self.reach.complete = False
        if kind.__flags__ & _HAVE_GC:
            return [part for part in self.referents(found) if part is not found]
        if not _library_class(kind):  # type: ignore[arg-type]
            self.reach.complete = False
        return []

    def _hidden(self, found: Any, kind: type) -> list[Any] | None:
        """What an object holds where the garbage collector does not look."""
        if kind.__name__ == "ndarray" and getattr(found, "dtype", None) is not None:
            return list(found.flat)
        if isinstance(found, weakref.ref):
            return [found()]
        if isinstance(found, ContextVar):
            return [found.get(None)]
        if kind.__module__ == "_thread" and kind.__name__ == "_local":
            return list(vars(found).values())
        return None


@functools.lru_cache(maxsize=4096)
def _library_class(cls: Any) -> bool:
    """Whether a class is what its library calls by its name; classes made at run time borrow modules."""
    if not in_library(cls.__module__):
        return False
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    # C classes often hide from their module; they have no Python attributes to look at.
    return found is cls or not cls.__flags__ & (1 << 9)  # Py_TPFLAGS_HEAPTYPE


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    """Every name and string that code, or a function defined inside it, mentions."""
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, str) and const.isidentifier():
            names.add(const)
        elif isinstance(const, types.CodeType):
            names |= _names(const)
    return frozenset(names)
