"""Tensors to NumPy arrays and back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._tree import Partition, Tree, flatten, is_differentiable, unflatten
from functorch_inverse._values import from_array, is_array
from functorch_inverse._vectors import same_precision
from functorch_inverse.errors import StructureError

__all__ = ["OnArrays"]

_CALLER = "black_box"


@dataclass(frozen=True)
class OnArrays:
    """fn on plain tensors, as a function of (args, kwargs)."""

    fn: Callable[..., Any]
    result: Callable[..., Tree] | None

    def __call__(self, call: tuple[tuple[Tree, ...], dict[str, Tree]]) -> Tree:
        part, tensors = Partition.of(call)
        args, kwargs = part.join([_to_array(t) for t in tensors])
        output = self.fn(*args, **kwargs)
        if self.result is None:
            return _to_tensors(output, tensors)
        return _as_expected(output, self.expected(part, tensors), tensors)

    def expected(self, part: Partition, tensors: Sequence[Tensor]) -> Tree:
        """What `result` says of the output, as tensors without data."""
        assert self.result is not None
        with _torch.fake_mode():
            args, kwargs = part.join([torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors])
            return self.result(*args, **kwargs)

    def arranged(self, call: tuple[tuple[Tree, ...], dict[str, Tree]], outputs: Sequence[Tensor]) -> Tree:
        """What is returned, from the tensors in it; without `result` there is but one."""
        if self.result is None:
            return outputs[0]
        args, kwargs = call
        return Partition.of(self.result(*args, **kwargs))[0].join(outputs)


def _to_array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def _to_tensors(output: Tree, inputs: Sequence[Tensor]) -> Tree:
    leaves, spec = flatten(output)
    device = inputs[0].device if inputs else None
    like = next((t.dtype for t in inputs if is_differentiable(t)), None)
    return unflatten(spec, [_to_tensor(leaf, device, like) for leaf in leaves])


def _to_tensor(leaf: Any, device: Any, like: torch.dtype | None) -> Any:
    if not (is_array(leaf) or isinstance(leaf, bool | int | float | complex)):
        return leaf
    tensor = leaf.detach().clone().to(device) if isinstance(leaf, Tensor) else from_array(leaf, device)
    return tensor.to(same_precision(tensor.dtype, like)) if like and is_differentiable(tensor) else tensor


def _as_expected(output: Tree, expected: Tree, inputs: Sequence[Tensor]) -> Tree:
    part, wanted = Partition.of(expected)
    got = part.pick(output, _CALLER, "what fn returned, compared with `result`,")
    for leaf, said in zip(part.spec.flatten_up_to(output), part.mould, strict=True):
        if said is not None and is_array(leaf):
            raise StructureError(
                f"`{_CALLER}`: `result` returned {said!r} where fn returned an array of shape {tuple(leaf.shape)}. Make it "
                "return a tensor of that shape and of the dtype that is wanted."
            )
    device = inputs[0].device if inputs else None
    tensors = [_to_tensor(leaf, device, None) for leaf in got]
    for tensor, like in zip(tensors, wanted, strict=True):
        if tensor.shape != like.shape:
            raise StructureError(
                f"`{_CALLER}`: fn returned shape {tuple(tensor.shape)} where `result` says {tuple(like.shape)}. Make "
                "`result` return a tensor of the shape that fn returns for these arguments."
            )
    return part.join([t.to(like.dtype) for t, like in zip(tensors, wanted, strict=True)])
