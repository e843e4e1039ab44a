"""What functions read by name, in closures and globals, themselves and in the functions that they call by name."""

import dis
import functools
import numbers
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Named", "content", "in_library", "reads"]

# What belongs to these holds no tensor of the user's, except in instances and closures.
_LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy", "scipy", "optree", "functorch_inverse"}
# Where a wrapper keeps what it calls, if not in its closure.
_WRAPPED = ("__wrapped__", "_torchdynamo_orig_callable")
_OURS = "functorch_inverse."
# Equal is as good as the same.
_VALUES = (numbers.Number, str, bytes, frozenset, torch.device, types.MethodType)
_MANY = 500


class Read(NamedTuple):
    """A name that a function reads, where that is (a cell, or some globals), and what stands there."""

    name: str
    place: Any
    value: Any


class Named(NamedTuple):
    """What each function met in a walk reads, by its code, how often that was met before, and the name; and what they set."""

    reads: dict[tuple[types.CodeType, int, str], Read]
    written: frozenset[Any]

    @classmethod
    def of(cls, functions: Iterable[Any]) -> "Named":
        queue, reads, written = list(functions), {}, set[Any]()
        seen: dict[int, Any] = {}
        met: dict[int, int] = {}
        for part in queue:  # grows while it is walked
            if id(part) in seen or len(seen) > _MANY:
                continue
            seen[id(part)] = part
            if not isinstance(part, types.FunctionType):
                queue += _called(part)
                continue
            code, found = part.__code__, _read(part)
            count = met[id(code)] = met.get(id(code), 0) + 1
            if not in_library(part.__globals__.get("__name__")):
                reads.update({(code, count, read.name): read for read in found})
                written |= _set_by(part)
            defaults = (*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values())
            queue += filter(callable, (*[read.value for read in found], *defaults, *_wrapped(part)))
        return cls(reads, frozenset(written))

    def exchanged(self, now: "Named") -> str | None:
        """The first name that means something else now.

        What f sets by itself, to count its calls for example, is its own matter. Tensors are that of others, who know
        whether they are read.
        """
        for key, before in self.reads.items():
            after = now.reads.get(key)
            if after is not None and before.place not in self.written and not _same(before.value, after.value):
                return before.name
        return None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor stands under one of the names."""
        return any(read.value is tensor for read in self.reads.values())

    def without(self, dropped: set[int]) -> "Named":
        """The same, holding some tensors no longer, by their ids."""
        return Named({key: read for key, read in self.reads.items() if id(read.value) not in dropped}, self.written)


def _called(found: Any) -> Iterator[Any]:
    """The functions behind something that can be called."""
    kind: Any = type(found)
    if isinstance(found, types.MethodType):
        yield found.__func__
    elif isinstance(found, functools.partial):
        yield from filter(callable, (found.func, *found.args, *found.keywords.values()))
    elif isinstance(found, nn.Module):
        yield from (type(module).forward for module in found.modules() if not in_library(type(module).__module__))
    elif in_library(kind.__module__) and not isinstance(found, type):  # a wrapper, torch's or ours
        held = getattr(found, "__dict__", {}).values()
        yield from (part for part in held if callable(part) or type(part).__module__.startswith(_OURS))
    elif callable(found):
        yield from (*_wrapped(found), kind.__call__)


def _wrapped(found: Any) -> list[Any]:
    held = getattr(found, "__dict__", {})
    return [held[name] for name in _WRAPPED if name in held]


def _read(fn: types.FunctionType) -> list[Read]:
    space, cells = fn.__globals__, fn.__closure__ or ()
    own = [Read(name, id(cell), content(cell)) for name, cell in zip(fn.__code__.co_freevars, cells, strict=True)]
    if in_library(space.get("__name__")):  # its globals are its own
        return own
    return [*own, *[Read(name, (id(space), name), space.get(name)) for name in _globals_read(fn.__code__)]]


def _set_by(fn: types.FunctionType) -> set[Any]:
    """The places outside of it that a function sets."""
    cells = dict(zip(fn.__code__.co_freevars, map(id, fn.__closure__ or ()), strict=True))
    return {cells.get(name, (id(fn.__globals__), name)) for name in _written(fn.__code__)}


def content(cell: types.CellType) -> Any:
    """What stands in a cell; None where it is not filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


@functools.lru_cache(maxsize=4096)
def _globals_read(code: types.CodeType) -> tuple[str, ...]:
    inner = [name for part in _inside(code) for name in _globals_read(part)]
    own = [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    return tuple(dict.fromkeys((*own, *inner)))


@functools.lru_cache(maxsize=4096)
def _written(code: types.CodeType) -> frozenset[str]:
    """The globals and the variables of functions outside that code sets."""
    stores = [step for step in dis.get_instructions(code) if step.opname in ("STORE_GLOBAL", "STORE_DEREF")]
    own = [step.argval for step in stores if step.opname == "STORE_GLOBAL" or step.argval in code.co_freevars]
    return frozenset(own).union(*map(_written, _inside(code)))


def reads(function: Any, name: str) -> bool:
    """Whether the code of a function, as far as it can be seen, does something with one of its parameters."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None or name in code.co_cellvars:
        return True
    loads = [step.argval for step in dis.get_instructions(code) if step.opname.startswith("LOAD_FAST")]
    return any(name in (found if isinstance(found, tuple) else (found,)) for found in loads)


def _inside(code: types.CodeType) -> list[types.CodeType]:
    return [const for const in code.co_consts if isinstance(const, types.CodeType)]


def _same(a: Any, b: Any) -> bool:
    """Whether one thing is as good as another that has its place."""
    if a is b or (isinstance(b, Tensor) and (a is None or isinstance(a, Tensor))):
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, types.FunctionType):  # defined again
        here, there = ([f.__defaults__, f.__kwdefaults__, *map(content, f.__closure__ or ())] for f in (a, b))
        return a.__code__ == b.__code__ and a.__globals__ is b.__globals__ and _same(here, there)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return isinstance(a, _VALUES) and bool(a == b or (a != a and b != b))


def in_library(name: Any) -> bool:
    """Whether a module of this name is no code of the user's."""
    return isinstance(name, str) and name.partition(".")[0] in _LIBRARIES
