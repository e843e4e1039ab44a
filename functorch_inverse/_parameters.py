"""Which parameters f has: keyword arguments reach g alone, and one that f has as well would silently keep its default there."""

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from functorch_inverse.errors import StructureError

__all__ = ["Parameters"]


@dataclass(frozen=True)
class Parameters:
    """The names of the parameters of a function, as far as they can be told: in their order, and keyword-only ones."""

    positional: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, function: Any) -> "Parameters":
        if torch.compiler.is_dynamo_compiling():
            return cls()
        try:
            found = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters.values()
        except (TypeError, ValueError):  # some builtins have none
            return cls()
        # What was given to a partial is meant to be so.
        given = function.keywords if isinstance(function, functools.partial) else {}
        kinds = inspect.Parameter
        if any(p.kind is kinds.VAR_KEYWORD for p in found):
            return cls()
        positional = [p for p in found if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        others = [p.name for p in found if p.kind is kinds.KEYWORD_ONLY and p.name not in given]
        return cls(tuple(p.name for p in positional), tuple(others))

    def check(self, caller: str, keywords: Iterable[str], filled: int) -> None:
        """StructureError where a keyword is a parameter that got nothing, as only so many were passed by position."""
        missed = [name for name in keywords if name in (*self.positional[filled:], *self.others)]
        if missed:
            raise StructureError(
                f"`{caller}`: the keyword argument {missed[0]!r} reaches g alone; f has a parameter of this name too, and "
                "would take its own default: a derivative at another point. Pass it by position, g(x, value) with "
                "f(y, value), or give it another name in f if another thing is meant."
            )
