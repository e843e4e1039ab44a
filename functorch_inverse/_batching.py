"""The values of a black box under vmap: how many calls, with which dims in front."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._levels import Dims, announced, run
from functorch_inverse._transforms import in_front
from functorch_inverse._values import BlackBox, refuse_empty
from functorch_inverse.errors import StructureError

__all__ = ["evaluate"]


def evaluate(box: BlackBox, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """g once (a sample, for "sequential"), with every transform seeing only values."""
    if torch.compiler.is_dynamo_compiling():
        given = (*(t.detach() for t in tensors[: box.blind]), *tensors[box.blind :])
        return box.unpack([box.call(given)])
    found: tuple[Tensor, ...] = announced(_evaluate, tuple(tensors), box)
    return found


def _evaluate(tensors: Sequence[Tensor], box: BlackBox) -> tuple[Tensor, ...]:
    if not _torch.transforms_active():
        return box(*[t.detach() for t in tensors])
    if _torch.recorded_above_autograd():
        raise NotImplementedError(
            f"`{box.caller}`: torch.export records what transforms do to tensors, and would lose what is done inside of one "
            "here. Leave vmap and grad out of what is exported, and use leading batch dims."
        )
    return _values(box, tensors)


def _values(box: BlackBox, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return run(_Evaluation(box), tensors)


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """Values without derivative, whoever follows the tensors."""

    box: BlackBox
    has_derivative: ClassVar[bool] = False

    def itself(self, tensors: Sequence[Tensor]) -> None:
        """There is nothing to be followed."""

    def values(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.box(*[t.detach() for t in tensors])

    def mapped(self, dims: Dims, size: int, randomness: str, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Dims]:
        box, batched = self.box, [d is not None for d in dims]
        moved = [t if d is None else in_front(t, d) for t, d in zip(tensors, dims, strict=True)]
        if box.method == "vmap":
            results = _values(_vmapped(box, batched, randomness), moved)
        elif box.method == "sequential":
            results = _values(replace(box, tensors_only=True, levels=((tuple(batched), size), *box.levels)), moved)
        elif _can_broadcast(box, moved, batched):
            results = _broadcast(box, moved, batched, size)
        else:
            results = _sample_by_sample(replace(box, tensors_only=True), moved, batched, size)
        return results, _result_dims(box, results, size)


def _result_dims(box: BlackBox, results: Sequence[Tensor], size: int) -> tuple[int | None, ...]:
    """Where the results have the batch dim: in front, except for aux that is the same for all samples."""
    assert box.outcome.y is not None
    n = len(box.outcome.y.places)
    lacking = [t for t in results[:n] if not t.ndim or t.shape[0] != size]
    if lacking:
        raise StructureError(
            f"`{box.caller}`: one batched call for a vmap of {size} samples returned shape {tuple(lacking[0].shape)}; g must "
            "keep the leading dims of x. Make it do so, or pass vmap_method='sequential'."
        )
    return tuple(0 if t.ndim and t.shape[0] == size else None for t in results)


def _vmapped(box: BlackBox, batched: Sequence[bool], randomness: str) -> BlackBox:
    dims, inner = tuple(0 if b else None for b in batched), box.batched_as

    def batch(call: Callable[..., Any]) -> Callable[..., Any]:
        return torch.vmap(call if inner is None else inner(call), in_dims=dims, randomness=randomness)

    return replace(box, tensors_only=True, batched_as=batch)


# A new leading dim must not line up with a dim of an argument that has more dims than x: with x (n,) mapped to
# (B, n), an argument (b, n) would meet B where it meant b. So x becomes (B, 1, n), and the ones go again
# where no argument filled them. Leaves of x with fewer batch dims than others get ones in their place, too.


def _can_broadcast(box: BlackBox, tensors: Sequence[Tensor], batched: Sequence[bool]) -> bool:
    """Whether one call with a new leading dim of x says which dim is which."""
    others = [(t, b) for i, (t, b) in enumerate(zip(tensors, batched, strict=True)) if i not in box.x_places]
    if any(b for _, b in others):
        return not (box.x_only or any(box.batch_dims))
    surplus, fewest = _surplus(box, tensors, batched), _sample_dims(box, tensors, batched)
    return not surplus or all(1 not in t.shape[: max(0, t.ndim - fewest)] for t, _ in others)


def _sample_dims(box: BlackBox, tensors: Sequence[Tensor], batched: Sequence[bool]) -> int:
    """The fewest dims of a leaf of x, without the new one, when all have as many batch dims."""
    missing = _missing(box)
    return min((tensors[i].ndim - batched[i] + missing[i] for i in box.x_places), default=0)


def _missing(box: BlackBox) -> dict[int, int]:
    """How many batch dims each leaf of x has less than others."""
    most = max(box.batch_dims, default=0)
    return {i: most - count for i, count in zip(box.x_places, box.batch_dims, strict=True)}


def _surplus(box: BlackBox, tensors: Sequence[Tensor], batched: Sequence[bool]) -> int:
    """How many dims the largest unbatched argument has more than x."""
    others = [t.ndim for i, t in enumerate(tensors) if i not in box.x_places and not batched[i]]
    return max(0, max(others) - _sample_dims(box, tensors, batched)) if others else 0


def _broadcast(box: BlackBox, tensors: Sequence[Tensor], batched: Sequence[bool], size: int) -> tuple[Tensor, ...]:
    ones, missing = _surplus(box, tensors, batched), _missing(box)
    led = [
        (t if b else t.expand(size, *t.shape)).reshape(size, *(1,) * (ones + missing.get(i, 0)), *t.shape[int(b) :])
        if b or i in missing
        else t
        for i, (t, b) in enumerate(zip(tensors, batched, strict=True))
    ]
    now = tuple([count + missing[i] + 1 + ones for i, count in zip(box.x_places, box.batch_dims, strict=True)])
    results = _values(replace(box, tensors_only=True, batch_dims=now), led)
    unused = tuple(range(1, ones + 1))
    return tuple([t.squeeze(unused) if ones and t.ndim > ones else t for t in results])


def _sample_by_sample(box: BlackBox, tensors: Sequence[Tensor], batched: Sequence[bool], size: int) -> tuple[Tensor, ...]:
    """Each sample as a call of its own at the next level, where it may be batched in another way."""
    if not size:
        refuse_empty(box.caller)
    columns = [t.unbind(0) if b else (t,) * size for t, b in zip(tensors, batched, strict=True)]
    rows = [_values(box, row) for row in zip(*columns, strict=True)]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))
