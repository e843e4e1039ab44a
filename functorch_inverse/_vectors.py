"""Samples as real vectors: many leaves of any event shape, one last dimension.

A complex number counts as two real ones, as torch's gradient convention has it; so a function
that is not holomorphic has a derivative like any other.
"""

import functools
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from functorch_inverse.errors import StructureError

__all__ = ["Layout", "Like", "batch_shape", "lead", "real_dtype", "same_precision"]


class Like(NamedTuple):
    """What a layout needs to know of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


class Layout(NamedTuple):
    """The event shape and dtype of each leaf of a sample, and how many real numbers it holds."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, leaves: Sequence[Tensor | Like], event_dims: Sequence[int]) -> "Layout":
        shapes = [tuple(leaf.shape[len(leaf.shape) - dim :]) for leaf, dim in zip(leaves, event_dims, strict=True)]
        dtypes = [leaf.dtype for leaf in leaves]
        sizes = [prod(s) * (2 if t.is_complex else 1) for s, t in zip(shapes, dtypes, strict=True)]
        return cls(tuple(shapes), tuple(dtypes), tuple(sizes))

    @property
    def size(self) -> int:
        """How many real numbers one sample holds."""
        return sum(self.sizes)

    def pack(self, leaves: Sequence[Tensor], batch: Sequence[int]) -> Tensor:
        """Leaves of shape (*batch, *event), or broadcasting to it, to a tensor (*batch, size)."""
        if self.is_vector and leaves[0].shape[:-1] == batch:
            return leaves[0]
        rows = zip(leaves, self.shapes, self.sizes, strict=True)
        parts = [_real(leaf.expand((*batch, *shape)), shape).reshape(*batch, size) for leaf, shape, size in rows]
        if torch.compiler.is_dynamo_compiling():  # torch.cat under vmap makes a dynamic batch static
            return functools.reduce(torch.add, map(self._padded, parts, range(len(parts))))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @property
    def is_vector(self) -> bool:
        """One leaf that is a real vector as it is."""
        return len(self.shapes) == 1 and self.shapes[0] == self.sizes

    def _padded(self, part: Tensor, i: int) -> Tensor:
        return torch.nn.functional.pad(part, (sum(self.sizes[:i]), sum(self.sizes[i + 1 :])))

    def unpack(self, vector: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `pack`; each leaf in its own dtype."""
        if self.is_vector:
            return (vector if vector.dtype == self.dtypes[0] else vector.to(self.dtypes[0]),)
        parts = vector.split(self.sizes, -1) if len(self.sizes) > 1 else (vector,)
        return tuple(_leaf(p, s, t) for p, s, t in zip(parts, self.shapes, self.dtypes, strict=True))


def _real(leaf: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf


def _leaf(vector: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    batch = vector.shape[:-1]
    if not dtype.is_complex:
        return vector.reshape((*batch, *shape)).to(dtype)
    pairs = vector.reshape(*batch, *shape, 2)
    return torch.complex(pairs[..., 0], pairs[..., 1]).to(dtype)


def batch_shape(leaves: Sequence[Tensor], event_dims: Sequence[int], caller: str, what: str) -> torch.Size:
    """The leading dims that all leaves share."""
    # Compared one by one: a set would hash sizes, which makes them constants of a trace.
    shapes = [leaf.shape[: leaf.ndim - dim] for leaf, dim in zip(leaves, event_dims, strict=True)]
    if len(shapes) > 1 and any(shape != shapes[0] for shape in shapes):
        raise StructureError(
            f"`{caller}`: the leaves of {what} have the batch shapes {[tuple(shape) for shape in shapes]}; one sample "
            "takes a part of every leaf, so they must agree. Choose `event_dim` per leaf such that they do, "
            "or None to make the whole input one sample."
        )
    return shapes[0] if shapes else torch.Size()


def lead(caller: str, x: Tensor, dim: int, batch: Sequence[int]) -> Tensor:
    """x with all the batch dims of y; autograd sums over those it did not have."""
    event = x.shape[x.ndim - dim :]
    if x.shape == (*batch, *event):
        return x
    try:
        return x.expand((*batch, *event))
    except RuntimeError as error:
        raise StructureError(
            f"`{caller}`: x has the batch shape {tuple(x.shape[: x.ndim - dim])}, y = g(x) has {tuple(batch)}. g must "
            "keep the batch dims of x (or broadcast them against its further arguments); check `event_dim`."
        ) from error


# torch.dtype.to_real and to_complex do not trace.
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
_COMPLEX = {real: paired for paired, real in _REAL.items()} | {torch.bfloat16: torch.complex64}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parts of a complex number; a real dtype as it is."""
    return _REAL.get(dtype, dtype)


def same_precision(dtype: torch.dtype, like: torch.dtype) -> torch.dtype:
    """A real or complex dtype as it is, in the precision of another one."""
    real = real_dtype(like)
    return _COMPLEX[real] if dtype.is_complex else real
