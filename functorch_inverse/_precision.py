"""Autocast stays outside: derivatives are computed in the precision of their inputs."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocasts", "full_precision"]

_NO_CONTEXT = nullcontext()


def autocasts(tensor: Tensor) -> bool:
    """Whether operations with a tensor change its precision."""
    kind = tensor.device.type
    return (kind == "cpu" or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast switched off on a tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else _NO_CONTEXT
