"""What functions read by name, in closures and globals, themselves and in the functions that they call by name."""

import dis
import functools
import numbers
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Named", "content", "in_library", "reads"]

# What belongs to these holds no tensor of the user's, except in instances and closures.
_LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy", "scipy", "optree", "functorch_inverse"}
# Where a wrapper keeps what it calls, if not in its closure.
_WRAPPED = ("__wrapped__", "_torchdynamo_orig_callable")
_OURS = "functorch_inverse."
_MANY = 500


class Named(NamedTuple):
    """Names with what stands there, in the order of a walk from function to function; and those that the code itself sets."""

    pairs: tuple[tuple[str, Any], ...] = ()
    written: frozenset[str] = frozenset()

    @classmethod
    def of(cls, functions: Iterable[Any]) -> "Named":
        queue, pairs, written = list(functions), [], frozenset[str]()
        seen: dict[int, Any] = {}
        for part in queue:  # grows while it is walked
            if id(part) in seen or len(seen) > _MANY:
                continue
            seen[id(part)] = part
            if not isinstance(part, types.FunctionType):
                queue += _called(part)
                continue
            found = _read(part)
            if not in_library(part.__globals__.get("__name__")):
                pairs += found
                written |= _written(part.__code__)
            defaults = (*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values())
            queue += filter(callable, (*[value for _, value in found], *defaults, *_wrapped(part)))
        return cls(tuple(pairs), written)

    def exchanged(self, now: "Named") -> str | None:
        """The first name that means something else now.

        A name that f sets by itself, to count its calls for example, is its own matter. Tensors are that of others, who know
        whether they are read.
        """
        for (name, before), (other, after) in zip(self.pairs, now.pairs, strict=False):
            if name != other or not (name in self.written or _same(before, after)):
                return name
        return None


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


def _read(fn: types.FunctionType) -> list[tuple[str, Any]]:
    cells = zip(fn.__code__.co_freevars, map(content, fn.__closure__ or ()), strict=True)
    return [*cells, *[(name, fn.__globals__.get(name)) for name in _globals_read(fn.__code__)]]


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
    if a is b or all(part is None or isinstance(part, Tensor) for part in (a, b)):
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, numbers.Number | str | bytes | torch.device) and bool(a == b or (a != a and b != b))


def in_library(name: Any) -> bool:
    """Whether a module of this name is no code of the user's."""
    return isinstance(name, str) and name.partition(".")[0] in _LIBRARIES
