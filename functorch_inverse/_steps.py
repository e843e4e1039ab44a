"""One step of an iteration, from what f was found to be: in eager as it is, in a trace as one operator.

A step is some hundred small operations without derivative. As an operator it costs a trace one node, so that many
steps can be unrolled; f stays in the open graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _anderson, _chandrupatla, _newton, _torch
from functorch_inverse._status import RUNNING, Options, chosen

__all__ = ["advance"]

# (state, x, residual at its trial, the Jacobian there, options) -> state
Step = Callable[[Any, Tensor, Tensor, Callable[[], Tensor], Options], Any]
_METHODS: dict[str, tuple[Any, Step]] = {
    "newton": (_newton.NewtonState, _newton.advanced),
    "chandrupatla": (_chandrupatla.BracketState, _chandrupatla.advanced),
    "anderson": (_anderson.AndersonState, _anderson.advanced),
}


def advance(
    method: str, state: Any, x: Tensor, residual: Tensor, jacobian: Callable[[], Tensor] | None, options: Options
) -> Any:
    """The next state of the samples that are still running; the others stay as they are."""
    if not _torch.can_inspect(residual):
        matrix = [] if jacobian is None else [jacobian().detach()]
        tensors = [t.contiguous() for t in (*state, x, residual, *matrix)]
        return type(state)(*_operator(tensors, method, list(options)))
    return _advance(method, state, x, residual, jacobian, options)


def _advance(method: str, state: Any, x: Tensor, residual: Tensor, jacobian: Any, options: Options) -> Any:
    new = _METHODS[method][1](state, x, residual, jacobian, options)
    running = state.status == RUNNING
    return type(state)(*(chosen(running, b, a) for a, b in zip(state, new, strict=True)))


@torch.library.custom_op("functorch_inverse::step", mutates_args=())
def _operator(tensors: list[Tensor], method: str, options: list[float]) -> list[Tensor]:
    kind = _METHODS[method][0]
    n = len(kind._fields)
    x, residual, *matrix = tensors[n:]
    state = _advance(method, kind(*tensors[:n]), x, residual, lambda: matrix[0], Options(*options))
    return [t.contiguous() for t in state]


@_operator.register_fake
def _(tensors: list[Tensor], method: str, options: list[float]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors[: len(_METHODS[method][0]._fields)]]


def _vmap(info: Any, in_dims: Any, tensors: list[Tensor], method: str, options: list[float]) -> Any:
    led = [
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[0], strict=True)
    ]
    results = _operator([t.contiguous() for t in led], method, options)
    return results, [0] * len(results)


_operator.register_vmap(_vmap)
