"""The open transforms of torch.func, and what they have put around a tensor."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch

__all__ = ["Transform", "alive", "follows", "has_history", "in_front", "innermost", "is_live", "is_open", "mapped"]

_KINDS = _torch.TransformType
_VMAP, _GRAD, _JVP, _FUNCTIONALIZE = _KINDS.Vmap, _KINDS.Grad, _KINDS.Jvp, _KINDS.Functionalize
_RANDOMNESS = {kind: kind.name.lower() for kind in _torch.RandomnessType.__members__.values()}


class Transform:
    """The innermost open transform; torch's own class for it takes several times as long to make."""

    __slots__ = ("interpreter", "kind", "level", "maps")

    def __init__(self, interpreter: Any) -> None:
        self.interpreter, self.kind, self.level = interpreter, interpreter.key(), interpreter.level()
        self.maps = bool(self.kind == _VMAP)

    @property
    def pushes(self) -> bool:
        """Whether it is torch.func.jvp."""
        return bool(self.kind == _JVP)

    @property
    def functionalizes(self) -> bool:
        """Whether it is torch.func.functionalize."""
        return bool(self.kind == _FUNCTIONALIZE)

    @property
    def batch_size(self) -> int:
        """How many samples a vmap has."""
        return int(_torch.VmapInterpreter(self.interpreter).batchSize())

    @property
    def randomness(self) -> str:
        """How a vmap treats random numbers."""
        return _RANDOMNESS[_torch.VmapInterpreter(self.interpreter).randomness()]

    def lowered(self) -> AbstractContextManager[Any]:
        """Without this transform; where it was opened under no_grad, so it is beneath."""
        if self.maps:
            as_it_was = True
        elif self.kind == _GRAD:
            as_it_was = _torch.GradInterpreter(self.interpreter).prevGradMode()
        else:
            as_it_was = self.kind != _JVP or _torch.JvpInterpreter(self.interpreter).prevFwdGradMode()
        return _Lowered() if as_it_was else _torch.interpreter_in_python(self.interpreter).lower()


class _Lowered:
    """The innermost transform taken off: a class, because a generator costs several times as much."""

    __slots__ = ("layer",)

    def __enter__(self) -> None:
        self.layer = _torch.pop_transform()

    def __exit__(self, *error: Any) -> None:
        _torch.push_transform(self.layer)


def innermost() -> Transform | None:
    """The innermost open transform."""
    interpreter = _torch.peek_transform()
    return None if interpreter is None else Transform(interpreter)


def alive(tensor: Tensor) -> Tensor:
    """A tensor without what transforms that are closed left around it."""
    while _torch.level(tensor) < -1:
        tensor = _torch.unwrapped(tensor)
    return tensor


def in_front(tensor: Tensor, dim: int) -> Tensor:
    """A tensor with this dim as the first one."""
    return tensor.movedim(dim, 0) if dim else tensor


def follows(transform: Transform | None) -> Callable[[Tensor], bool]:
    """Whether a derivative of this innermost transform (None: of plain autograd) flows through a tensor of its level."""
    return _torch.is_recorded if transform is None and _torch.in_jvp() else _torch.is_tracked


def is_live(tensor: Tensor) -> bool:
    """Whether a derivative of any open level flows through a tensor."""
    with _torch.no_functions():  # a mode would answer for what stands in for the tensor
        return _is_live(tensor)


def _is_live(tensor: Tensor) -> bool:
    if not (_torch.dual_level_open() or _torch.is_wrapped(tensor)):
        return tensor.requires_grad and torch.is_grad_enabled()
    if _torch.in_jvp() and not (tensor.requires_grad or _torch.is_wrapped(tensor)):
        return False
    # Tangents show only at their own level: step down through the open transforms to it.
    top, tensor = innermost(), alive(tensor)
    if top is None:
        return follows(None)(tensor)
    own = _torch.level(tensor) == top.level
    if own and not top.maps and follows(top)(tensor):
        return True
    with top.lowered():
        return _is_live(_torch.unwrapped(tensor) if own else tensor)


def is_open(tensor: Tensor) -> bool:
    """Whether a transform or autograd has a hold on a tensor, so that it must be an explicit input."""
    with _torch.no_functions():
        return tensor.requires_grad or _torch.is_wrapped(tensor) or _is_live(tensor)


def has_history(tensor: Tensor) -> bool:
    """Whether a tensor keeps a graph alive."""
    with _torch.no_functions():
        return _torch.is_wrapped(tensor) or tensor.grad_fn is not None


def mapped(
    function: Callable[..., tuple[Tensor, ...]], dims: Sequence[int | None], randomness: str, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """torch.vmap of a function from tensors to tensors, which it spares the search through pytrees and the checks."""
    if torch.compiler.is_dynamo_compiling() or _torch.function_mode_active():
        return torch.vmap(function, in_dims=tuple(dims), randomness=randomness)(*tensors)
    size = next(t.shape[d] for t, d in zip(tensors, dims, strict=True) if d is not None)
    level = _torch.open_vmap(size, randomness)
    try:
        inside = [t if d is None else _torch.add_batch_dim(t, d, level) for t, d in zip(tensors, dims, strict=True)]
        return tuple([_torch.remove_batch_dim(t, level, size, 0) for t in function(*inside)])
    finally:
        _torch.close_vmap()
