"""Saved-tensor hooks (of a checkpoint, say) belong to the graph of whoever set them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from functorch_inverse import _torch

__all__ = ["unhooked"]

_NO_CONTEXT = nullcontext()


def unhooked() -> AbstractContextManager[None]:
    """Graphs made inside, through which derivatives are taken here and now, save plain tensors.

    What a lossy hook gives back is good enough for whoever set it, not for a value; and a checkpoint counts what it saves.
    """
    if torch.compiler.is_dynamo_compiling() or _torch.top_hooks(False) is None:
        return _NO_CONTEXT
    return _unhooked()


@contextmanager
def _unhooked() -> Iterator[None]:
    taken = []
    while (pair := _torch.top_hooks(False)) is not None:
        taken.append(pair)
        _torch.pop_hooks()
    try:
        yield
    finally:
        for pair in reversed(taken):
            _torch.push_hooks(*pair)
