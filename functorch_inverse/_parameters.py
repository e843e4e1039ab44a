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
    def of(cls, function: Any) -> "Parameters":
        if torch.compiler.is_dynamo_compiling():
            return cls()
        function = function.forward if isinstance(function, nn.Module) else function
        try:
            found = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # some builtins have none
            return cls()
        # What was given to a partial is meant to be so.
        given = function.keywords if isinstance(function, functools.partial) else {}
        kinds = inspect.Parameter
        takes_all = any(p.kind is kinds.VAR_KEYWORD and reads(function, p.name) for p in found)
        called = filter(callable, map(content, getattr(function, "__closure__", None) or ())) if takes_all else ()
        positional = [p for p in found if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        others = [p.name for p in found if p.kind is kinds.KEYWORD_ONLY and p.name not in given]
        return cls(tuple(p.name for p in positional), tuple(others), takes_all, tuple(map(cls.of, called)))

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
