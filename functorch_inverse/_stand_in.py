"""Stand-ins for a cotangent: one goes backward through the graph of f once, and knows afterwards what happens to it there."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_inverse import _torch

__all__ = ["DIVISIONS", "ELEMENTWISE", "StandIn"]

_aten = torch.ops.aten
# Linear in one argument, element by element.
ELEMENTWISE = {
    _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar, _aten.neg.default, _aten.detach.default,
    _aten.alias.default, _aten.clone.default, _aten.tanh_backward.default, _aten.sigmoid_backward.default,
    _aten.threshold_backward.default, _aten.gelu_backward.default, _aten.silu_backward.default,
    _aten.softplus_backward.default, _aten.elu_backward.default, _aten.leaky_relu_backward.default,
}  # fmt: skip
DIVISIONS = (_aten.div.Tensor, _aten.div.Scalar)


class StandIn(Tensor):
    """A tensor without data, of which torch sees the shape; NotImplementedError at an operation that has no rule."""

    rules: ClassVar[Mapping[Any, Callable[[Any, Any, Any], Any]]]
    __torch_function__ = _torch.no_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        rule, kwargs = cls.rules.get(func), kwargs or {}
        found = None if rule is None else rule(func, args, kwargs)
        if found is None:
            found = cls.otherwise(func, args, kwargs)
            if found is None:
                raise NotImplementedError(f"no rule for {cls.__name__} through {func}")
        return found

    @classmethod
    def otherwise(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation makes of it where no rule tells, or None."""
        return None
