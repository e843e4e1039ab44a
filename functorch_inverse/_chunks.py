"""How many rows of a Jacobian are pulled back at once: one by one is slow, all at once takes memory.

Pulling k rows back through f makes tensors of k times the size of its own. The Jacobian itself has to exist, so that
a few times its size is what the rows may take.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._vectors import real_dtype

__all__ = ["check_chunk_size", "chunk_of", "in_chunks", "jacobian", "nodes_below", "rooted", "widest"]


def check_chunk_size(caller: str, chunk_size: Any) -> None:
    """ValueError, unless it is None or a positive int."""
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1):
        raise ValueError(
            f"`{caller}`: `chunk_size` is {chunk_size!r}; choose a positive int, how many rows of the Jacobian are computed "
            "at once, or None for as many as bounded memory allows."
        )


# In multiples of the Jacobian; so many numbers, and so many rows, are never too many.
_SHARE, _FEW, _AT_ONCE = 4, 2**20, 3


def chunk_of(chunk_size: int | None, rows: int, numbers: int, width: Callable[[], int | None]) -> int:
    """How many of `rows` rows to pull back at once, for a Jacobian of so many numbers and an f that makes tensors of
    `width()` numbers on its way.
    """
    if chunk_size is None:
        wide = None if rows <= _AT_ONCE or torch.compiler.is_dynamo_compiling() else width()
        chunk_size = max(_SHARE * numbers, _FEW) // wide if wide else rows
    return max(1, min(chunk_size, rows))


def widest(nodes: Sequence[Any]) -> int:
    """How many numbers the largest tensor holds that a backward pass through a graph makes."""
    return max([prod(shape) for node in nodes for shape in _torch.shapes_into(node)], default=0)


def rooted(outputs: tuple[Tensor, ...], roots: list[Any]) -> tuple[Tensor, ...]:
    """The outputs of an f that torch.func.vjp evaluates; where their graph begins can be seen only inside of it."""
    if not torch.compiler.is_dynamo_compiling():
        roots[:] = [out.grad_fn for out in outputs]
    return outputs


def nodes_below(roots: Sequence[Any]) -> list[Any]:
    """The graph that ends in some nodes."""
    nodes = list(dict.fromkeys(roots))
    seen: set[Any] = {None, *nodes}
    for node in nodes:  # grows while it is walked
        new = [following for following, _ in node.next_functions if following not in seen] if node else []
        seen.update(new)
        nodes += dict.fromkeys(new)
    return nodes


def in_chunks(function: Callable[[Tensor], Any], basis: Tensor, chunk: int) -> Any:
    """torch.vmap of a function that returns a tensor or a tuple of those, over so many of its arguments at once."""
    mapped = torch.vmap(function)
    if chunk >= len(basis):
        return mapped(basis)
    parts = [mapped(part) for part in basis.split(chunk)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(found) for found in zip(*parts, strict=True))


def jacobian(
    pull: Callable[[Tensor], Tensor],
    batch: Sequence[int],
    rows: int,
    like: Tensor,
    *,
    chunk: int | None = None,
    plain: bool = False,
) -> Tensor:
    """All rows of a per-sample Jacobian, (*batch, rows, columns), so many at once.

    `pull` takes cotangents of shape (*batch, rows) to (*batch, columns). Each row is one unit cotangent
    expanded over all samples at once: f is evaluated for the whole batch, never per sample. `plain`: although a
    graph is being built, no transform has to look at it.
    """
    basis = torch.eye(rows, dtype=real_dtype(like.dtype), device=like.device)
    chunk = chunk or max(rows, 1)
    one_by_one = (plain or _torch.plain()) and rows > 0 and (rows <= _LOOP_UP_TO or chunk < _MANY)
    if not one_by_one:
        return in_chunks(lambda e: pull(e.expand(*batch, rows)), basis, chunk).movedim(0, -2)
    return torch.stack([pull(e.expand(*batch, rows)) for e in basis], -2)


# Below, one plain backward a row is faster than a vmapped one; measured in benchmarks/.
_LOOP_UP_TO, _MANY = 64, 8
