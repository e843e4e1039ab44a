"""Values shown to a function that may raise, wherever transforms hide them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from functorch_inverse import _torch

__all__ = ["inspect"]


def inspect(report: Callable[..., None], *tensors: Tensor) -> None:
    """report(*tensors), with all vmapped dims in place, outermost first; nothing where values cannot be looked at."""
    call = _Inspect.apply if _torch.transforms_active() else _Inspect.forward  # without one, apply would only cost time
    call(report, *(t.detach() for t in tensors))


class _Inspect(Function):
    @staticmethod
    def forward(report: Callable[..., None], *tensors: Tensor) -> Tensor:
        if all(map(_torch.can_inspect, tensors)):
            report(*tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, report: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, None]:
        moved = [
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, in_dims[1:], strict=True)
        ]
        return _Inspect.apply(report, *moved), None
