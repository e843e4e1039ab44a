"""The values of a black box: plain tensors in, plain tensors out, batched by `vmap_method`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function

from functorch_inverse import _torch
from functorch_inverse._capture import Captured
from functorch_inverse._tree import Partition, Tree, flatten, is_differentiable
from functorch_inverse.errors import StructureError

__all__ = ["BlackBox", "VmapMethod", "check_vmap_method", "evaluate"]

VmapMethod: TypeAlias = Literal["sequential", "broadcast", "vmap"]


def check_vmap_method(caller: str, method: str | None) -> None:
    """ValueError unless the method is one of the choices."""
    if method not in (None, "sequential", "broadcast", "vmap"):
        raise ValueError(f"`{caller}`: `vmap_method` is {method!r}; choose 'sequential', 'broadcast', 'vmap' or None.")


@dataclass
class Outcome:
    """What a call found out about the structure of its results; filled while g runs."""

    y: Partition | None = None
    aux: Partition | None = None


@dataclass(frozen=True, eq=False)
class BlackBox:
    """One call of g, as a function of all the tensors that it reads.

    With `x_only`, "broadcast" holds while only x is batched, and other levels go one by one.
    `call` takes the given tensors; the rest are those that g captures. `x_places` are the places of x among
    them, `batch_dims` counts the leading dims of each leaf of x that are no part of a sample, and `like`
    sets the device and the precision of y.
    """

    caller: str
    call: Callable[[Sequence[Tensor]], Any]
    captured: Captured
    has_aux: bool
    method: VmapMethod
    x_only: bool
    x_places: tuple[int, ...]
    batch_dims: tuple[int, ...]
    like: Tensor | None
    batched_as: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    tensors_only: bool = False
    outcome: Outcome = field(default_factory=Outcome)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The leaves of y and the tensors of aux."""
        function = self._call if self.batched_as is None else self.batched_as(self._call)
        return function(*tensors)

    def _call(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = len(tensors) - self.captured.count
        with torch.enable_grad(), self.captured.running(tensors[given:]):
            result = self.call(tensors[:given])
        y, aux = split_aux(self.caller, result, self.has_aux)
        self.outcome.y, leaves = self._outputs(y, tensors)
        if not self.has_aux:
            return leaves
        if self.tensors_only:
            aux = _numbers_to_tensors(aux)
        self.outcome.aux, extra = Partition.of(aux)
        return (*leaves, *(t.detach() for t in extra))

    def _outputs(self, y: Tree, inputs: Sequence[Tensor]) -> tuple[Partition, tuple[Tensor, ...]]:
        leaves, spec = flatten(y)
        places = tuple(i for i, leaf in enumerate(leaves) if _is_array(leaf))
        mould = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
        taken = {t.untyped_storage().data_ptr() for t in inputs if _has_storage(t)}
        tensors = tuple(self._output(leaves[i], taken) for i in places)
        if not tensors:
            raise StructureError(
                f"`{self.caller}`: g returned {type(y).__name__} without any tensor or array in it. Return the value "
                "y as a tensor, a floating NumPy array, or a pytree of those."
            )
        return Partition(spec, mould, places), tensors

    def _output(self, leaf: Any, taken: set[int]) -> Tensor:
        array = not isinstance(leaf, Tensor)
        tensor = torch.as_tensor(leaf) if array else leaf.detach()
        if self.like is not None and is_differentiable(tensor):
            real = self.like.dtype.to_real()
            dtype = real.to_complex() if tensor.is_complex() else real
            tensor = tensor.to(device=self.like.device, dtype=dtype)
        # A NumPy buffer may be written to by the next call of g, and an input belongs to the caller.
        fresh = not _has_storage(tensor) or tensor.untyped_storage().data_ptr() not in taken
        return tensor if fresh and not array else tensor.clone()


def _has_storage(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.numel() > 0


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) or (hasattr(leaf, "__array_interface__") and hasattr(leaf, "dtype"))


def split_aux(caller: str, result: Any, has_aux: bool) -> tuple[Tree, Tree]:
    """(y, aux) of what g returned."""
    if not has_aux:
        return result, None
    if not (isinstance(result, tuple) and len(result) == 2):
        raise StructureError(
            f"`{caller}`: with has_aux=True g returns a pair (y, aux); {type(result).__name__} arrived. "
            "Return (y, aux), or leave has_aux=False."
        )
    return result


def _numbers_to_tensors(aux: Tree) -> Tree:
    """Under vmap every number becomes a tensor, so that samples can be stacked."""
    partition, leaves = Partition.of(aux, lambda leaf: _is_array(leaf) or isinstance(leaf, bool | int | float | complex))
    return partition.join([torch.as_tensor(leaf) for leaf in leaves])


def evaluate(box: BlackBox, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """g once (a sample, for "sequential"), with every transform seeing only values."""
    plain = tuple(t.detach() for t in tensors)
    # Announced as a torch function, so that a rule inside another rule's f can be followed.
    if torch._C._is_torch_function_mode_enabled():
        return handle_torch_function(_evaluate, plain, box, plain)
    return _evaluate(box, plain)


def _evaluate(box: BlackBox, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not _torch.transforms_active():
        return box(*tensors)
    return _Values.apply(box, *tensors)


class _Values(Function):
    """Values without derivative; its only rule is how they are batched."""

    @staticmethod
    def forward(box: BlackBox, *tensors: Tensor) -> tuple[Tensor, ...]:
        return box(*(t.detach() for t in tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], box: BlackBox, *tensors: Tensor) -> tuple[Any, Any]:
        box = replace(box, tensors_only=True)
        dims = in_dims[1:]
        batched = [d is not None for d in dims]
        moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
        if box.method == "vmap":
            results = _Values.apply(_vmapped(box, batched, info.randomness), *moved)
        elif box.method == "broadcast" and _can_broadcast(box, batched):
            results = _Values.apply(*_broadcast(box, moved, batched, info.batch_size))
        else:
            results = _one_by_one(box, moved, batched, info.batch_size)
        return results, (0,) * len(results)


def _vmapped(box: BlackBox, batched: Sequence[bool], randomness: str) -> BlackBox:
    dims, inner = tuple(0 if b else None for b in batched), box.batched_as

    def batch(call: Callable[..., Any]) -> Callable[..., Any]:
        return torch.vmap(call if inner is None else inner(call), in_dims=dims, randomness=randomness)

    return replace(box, batched_as=batch)


def _can_broadcast(box: BlackBox, batched: Sequence[bool]) -> bool:
    """One call serves all where the new leading dim cannot be taken for another dim.

    That is where only x is batched, or where x has no batch dims that a batched argument would have
    to line up with.
    """
    others = any(b for i, b in enumerate(batched) if i not in box.x_places)
    return not others or not (box.x_only or any(box.batch_dims))


def _broadcast(box: BlackBox, tensors: Sequence[Tensor], batched: Sequence[bool], size: int) -> tuple[Any, ...]:
    led = [
        t.expand(size, *t.shape) if i in box.x_places and not b else t
        for i, (t, b) in enumerate(zip(tensors, batched, strict=True))
    ]
    return replace(box, batch_dims=tuple(n + 1 for n in box.batch_dims)), *led


def _one_by_one(box: BlackBox, tensors: Sequence[Tensor], batched: Sequence[bool], size: int) -> tuple[Tensor, ...]:
    if size == 0:
        raise StructureError(
            f"`{box.caller}`: vmap over an empty batch needs a call of g to know its shapes. Use "
            "vmap_method='broadcast' or 'vmap', or `event_dim` with leading batch dims."
        )
    columns = [t.unbind(0) if b else (t,) * size for t, b in zip(tensors, batched, strict=True)]
    rows = [_Values.apply(box, *row) for row in zip(*columns, strict=True)]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))
