"""Other values in the places of parameters and buffers, while a function runs that reads them there."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._reach import Slots
from functorch_inverse._tree import PLAIN
from functorch_inverse.errors import NoDerivativeError

__all__ = ["swapped", "unswapped"]

# A module's parameters are swapped in place: two threads must not do so at once, and none may take what another
# thread put there for the parameters themselves.
_SWAPPING = threading.RLock()


def unswapped(modules: Sequence[Any]) -> AbstractContextManager[Any]:
    """While modules are looked into, no other thread swaps their parameters."""
    return _SWAPPING if modules and not torch.compiler.is_dynamo_compiling() else nullcontext()


@contextmanager
def swapped(slots: Sequence[Slots], values: Sequence[Tensor]) -> Iterator[None]:
    """Other values in the places of parameters and buffers, also where the module's own forward is running."""
    if not all(isinstance(space, dict) for places in slots for space, _ in places):
        raise NoDerivativeError(
            "f reaches a module of torch.jit.script, whose parameters cannot be given other values. Use the module that it was "
            "made from."
        )
    with _SWAPPING:
        own = [(space, name, space.get(name)) for places in slots for space, name in places]
        # Weights that were computed from other values are not to be read, and those of these are not to be kept.
        weights = _torch.exchange_cached_weights({})
        try:
            for places, value in zip(slots, values, strict=True):
                for space, name in places:
                    space[name] = value
            before = _memory(values)
            yield
            _refuse_exchange(slots, values, before)
        finally:
            _torch.exchange_cached_weights(weights)
            for space, name, tensor in own:
                space[name] = tensor


def _memory(tensors: Sequence[Tensor]) -> list[int | None]:
    """Where those are that have values of their own."""
    if _torch.recorded():
        return [None] * len(tensors)
    return [t.data_ptr() if type(t) in PLAIN and not _torch.is_wrapped(t) else None for t in tensors]


def _refuse_exchange(slots: Sequence[Slots], values: Sequence[Tensor], before: list[int | None]) -> None:
    """What a function puts in the place of a parameter would go with what stood in for it."""
    for places, value, then, now in zip(slots, values, before, _memory(values), strict=True):
        space, name = places[0]
        if then != now or space.get(name) is not value:
            raise NoDerivativeError(
                f"g or f gives its parameter {name!r} another tensor, or other `.data`, while it runs with others in "
                "the place of its parameters; it would be lost. Run it once by itself, where it sets them up so, or change "
                "the values in place (copy_)."
            )
