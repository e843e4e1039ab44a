"""Which parameters f has: keyword arguments reach g alone, and one that f has as well would silently keep its default there."""

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from functorch_inverse._named import content, reads
from functorch_inverse.errors import StructureError

__all__ = ["Parameters"]


@dataclass(frozen=True)
class Parameters:
    """The names of the parameters of a function, as far as they can be told: in their order, and keyword-only ones."""

    positional: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    # With **keywords: the functions that it may hand them to; without any, it reads them itself.
    takes_all: bool = False
    inner: "tuple[Parameters, ...]" = ()

    @classmethod
    def of(cls, function: Any, met: tuple[Any, ...] = ()) -> "Parameters":
        """`met` are the functions that hand their keywords on to this one."""
        if torch.compiler.is_dynamo_compiling():
            return cls()
        whole, function = function, function.forward if isinstance(function, nn.Module) else function
        try:
            found = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # some builtins have none
            return cls()
        # What was given to a partial is meant to be so.
        given = function.keywords if isinstance(function, functools.partial) else {}
        kinds = inspect.Parameter
        takes_all = any(p.kind is kinds.VAR_KEYWORD and reads(function, p.name) for p in found)
        called = [part for part in _called(whole, function) if all(part is not one for one in met)] if takes_all else []
        positional = [p for p in found if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        others = [p.name for p in found if p.kind is kinds.KEYWORD_ONLY and p.name not in given]
        inner = tuple([cls.of(part, (*met, whole)) for part in called])
        return cls(tuple(p.name for p in positional), tuple(others), takes_all, inner)

    def takes(self, name: str, filled: int) -> bool:
        """Whether a keyword of this name would mean something, where so many parameters were passed by position."""
        if name in (*self.positional[filled:], *self.others):
            return True
        return self.takes_all and (not self.inner or any(part.takes(name, filled) for part in self.inner))

    def check(self, caller: str, keywords: Iterable[str], filled: int) -> None:
        """StructureError where a keyword is a parameter that got nothing, as only so many were passed by position."""
        missed = [name for name in keywords if self.takes(name, filled)]
        if missed:
            has = "has" if missed[0] in (*self.positional, *self.others) else "takes any keyword, so it may have"
            raise StructureError(
                f"`{caller}`: the keyword argument {missed[0]!r} reaches g alone; f {has} a parameter of this name too, and "
                "would take its own default: a derivative at another point. Pass it by position, g(x, value) with "
                "f(y, value), or give it another name in f if another thing is meant."
            )


def _called(whole: Any, function: Any) -> list[Any]:
    """What a function with any keywords, which may be a module's, may hand them to."""
    if isinstance(whole, nn.Module):
        return list(whole.children())
    inside = [*map(content, getattr(function, "__closure__", None) or ()), *getattr(function, "__dict__", {}).values()]
    return [part for part in inside if callable(part) and part is not whole]
