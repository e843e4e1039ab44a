"""What f is given stays as it is: a value that f overwrites would be another one in the next line, or the caller's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_inverse.errors import NoDerivativeError

__all__ = ["check_unchanged", "explain", "keeping", "versions"]


def keeping(tensors: Sequence[Tensor], f: Any, *args: Any) -> Any:
    """f(*args), or NoDerivativeError where it changes some tensors in place."""
    before = versions(tensors)
    try:
        result = f(*args)
    except RuntimeError as error:
        explain(error)
        raise
    check_unchanged(before, tensors)
    return result


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often tensors were changed in place, where torch counts it."""
    if torch.compiler.is_dynamo_compiling():
        return []
    return [0 if t.is_inference() else t._version for t in tensors]


def check_unchanged(before: list[int], tensors: Sequence[Tensor]) -> None:
    """NoDerivativeError where tensors have been changed in place since."""
    if before != versions(tensors):
        raise NoDerivativeError(_TEXT)


def explain(error: RuntimeError) -> None:
    """NoDerivativeError instead of what torch says of a change in place."""
    if "is being used in an in-place operation" in str(error):
        raise NoDerivativeError(_TEXT) from error


_TEXT = (
    "f (or the residual, step or Jacobian) changes y, or another of its arguments, in place, which has to stay as it is "
    "for the derivative. Write y.sinh() for y.sinh_() and y = y + 1 for y += 1, or begin with y = y.clone()."
)
