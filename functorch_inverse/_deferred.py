"""f evaluated for its graph alone: what nobody looks at is not computed.

The derivative of numbers needs what the operations of f keep for their backward, and not f(y), which is x. Where the last
operation does not keep its result, torch gets a tensor that has no values before somebody looks: sin costs as much as its
derivative. Which one is the last shows in the evaluation before.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._tree import PLAIN

__all__ = ["SMALL", "Deferred", "ForGraph"]

_aten = torch.ops.aten
# Operations that keep no result for their derivative; and how many bytes, for each operation of f, make it worth while.
SMALL, _MANY = 2**16, 2**18
FORGETFUL: dict[Any, int] = {
    **dict.fromkeys((
        _aten.sin.default, _aten.cos.default, _aten.sinh.default, _aten.cosh.default, _aten.asin.default, _aten.acos.default,
        _aten.atan.default, _aten.asinh.default, _aten.acosh.default, _aten.atanh.default, _aten.log.default,
        _aten.log2.default, _aten.log10.default, _aten.log1p.default, _aten.erf.default, _aten.erfc.default,
        _aten.erfinv.default, _aten.lgamma.default, _aten.digamma.default, _aten.logit.default, _aten.softplus.default,
        _aten.silu.default, _aten.gelu.default, _aten.logaddexp.default, _aten.atan2.default, _aten.pow.Tensor_Scalar,
    ), SMALL),
    **dict.fromkeys((_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor), _MANY),
}  # fmt: skip


class ForGraph:
    """An elementwise f, in grad mode; the value of the result may be left out."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.last: tuple[Any, int] = (None, 0)  # the last operation of the evaluation before, and how many there were
        self.worth = SMALL

    def __call__(self, y: Tensor, *args: Tensor) -> Any:
        """f(y, *args)."""
        if y.nbytes < self.worth or _torch.dispatch_modes_open():
            return self.f(y, *args)
        run = _Run(y, *self.last)
        _torch.push_dispatch_mode(run)
        try:
            result = self.f(y, *args)
        except Exception:
            if run.deferred is None:
                raise
            result = None
        finally:
            _torch.pop_dispatch_mode(None)
        if result is None:
            self.worth = sys.maxsize  # f may look in a way that nobody sees
            return self.f(y, *args)
        self.last = run.func, run.count
        self.worth = FORGETFUL.get(run.func, sys.maxsize) * run.count
        # What f keeps may outlive what the value is made of.
        if run.deferred is not None and (result is not run.deferred or sys.getrefcount(result) > 4):
            run.deferred.value()
        return result


# No TorchDispatchMode, which tells a compiler by variables that all threads share that somebody watches.
class _Run:
    """One evaluation: counts operations, and defers the one that is expected to be the last."""

    def __init__(self, y: Tensor, expected: Any, at: int) -> None:
        self.y, self.expected, self.at = y, expected, at
        self.func, self.count = None, 0
        self.deferred: Deferred | None = None
        self.waiting: Deferred | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting.value()  # before anything changes
        self.func, self.count = func, self.count + 1
        if func is self.expected and func in FORGETFUL and self.count == self.at and not kwargs and self._fits(args):
            self.deferred = self.waiting = Deferred(self.y, func, args)
            return self.deferred
        return func(*args, **(kwargs or {}))

    def _fits(self, args: Any) -> bool:
        """Whether the result has the shape and the dtype of y, and its order of memory."""
        tensors, y = [arg for arg in args if isinstance(arg, Tensor)], self.y
        return (
            all(isinstance(arg, Tensor | int | float) for arg in args)
            and any(t.shape == y.shape for t in tensors)
            and all(type(t) in PLAIN and t.dtype is y.dtype for t in tensors)
            and all(t.is_contiguous() and (t.shape == y.shape or not t.ndim) for t in tensors)
        )


class Deferred(Tensor):
    """The result of an operation, computed when somebody looks."""

    __torch_function__ = _torch.no_torch_function
    operation: tuple[Any, Any]
    found: Tensor | None

    @staticmethod
    def __new__(cls: Any, like: Tensor, func: Any, args: Any) -> "Deferred":
        self: Deferred = _torch.wrapper(cls, like.shape, like)
        self.operation, self.found = (func, args), None
        return self

    def value(self) -> Tensor:
        """The tensor."""
        if self.found is None:
            func, args = self.operation
            with torch.no_grad():
                found = func(*args)
            # Somebody who watches operations may have looked by now.
            self.found = found if self.found is None else self.found
        return self.found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = _torch.tree_map(lambda leaf: leaf.value() if isinstance(leaf, cls) else leaf, (args, kwargs or {}))
        return func(*args, **kwargs)

    def tolist(self) -> Any:
        """Torch reads the memory."""
        return self.value().tolist()

    def data_ptr(self) -> int:
        """That of the value."""
        return self.value().data_ptr()
