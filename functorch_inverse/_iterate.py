"""Solve f(y) = x for all samples of a batch at once: steps, frozen samples, failures."""

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function

from functorch_inverse import _torch
from functorch_inverse._equation import Equation, Point
from functorch_inverse._precision import full_precision
from functorch_inverse._pullback import Function as LeafFunction
from functorch_inverse._pullback import Tensors
from functorch_inverse._rules import widen
from functorch_inverse._status import DONE, NO_BRACKET, RUNNING, Options, State, chosen, describe_failure
from functorch_inverse._steps import advance
from functorch_inverse._values import progress_bar
from functorch_inverse.errors import BracketError, NotConvergedError
from functorch_inverse.operators import vmapped

__all__ = ["Inversion", "Inverter", "OnFailure"]

OnFailure: TypeAlias = Literal["raise", "nan", "warn"]


class Inverter(Protocol):
    """What `inverter=` takes: how a sample starts, and the name and options of its steps (`_steps`)."""

    method: ClassVar[str]
    # Whether a step asks for the Jacobian of f.
    needs_jacobian: ClassVar[bool]
    # How many steps are unrolled where values cannot be looked at.
    traced_steps: ClassVar[int]

    @property
    def max_steps(self) -> int: ...
    @property
    def on_failure(self) -> OnFailure: ...
    @property
    def progress(self) -> bool: ...

    def options(self, eps: float) -> Options:
        """The tolerances in some precision."""
        ...

    def start(self, equation: Equation, y: Tensor, point: Point) -> Any:
        """The first state, from f at y."""
        ...

    def advice(self, status: int) -> str:
        """What to try after a failure."""
        ...


@dataclass(frozen=True, eq=False)
class Inversion:
    """(y, x, theta leaves) -> y leaves with f(y, theta) = x, by some inverter; values only."""

    caller: str
    inverter: Inverter
    f: LeafFunction
    y_dims: tuple[int, ...]
    x_dims: tuple[int, ...]
    levels: int = 0

    def batched(self, theta_is_batched: Sequence[bool], randomness: str) -> "Inversion":
        """The same where y, x and some of theta carry one more leading dim: one solve for all its samples."""
        return replace(self, f=vmapped(self.f, 0, theta_is_batched, randomness), levels=self.levels + 1)

    def __call__(self, y: Tensors, x: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        """Start at y."""
        if torch.compiler.is_dynamo_compiling() or not _torch.transforms_active():
            return self._solve(y, x, theta)
        return _announced(self, len(y), len(x), (*y, *x, *theta))

    def _solve(self, y: Tensors, x: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        with _outside_inference_mode(), torch.no_grad(), full_precision(y[0]):
            y, x, theta = (widen(_usable(group)) for group in (y, x, theta))
            dims = (self.y_dims, self.x_dims)
            equation, start = Equation.of(self.caller, self.f, y, x, theta, dims, self.levels)
            return equation.inputs.unpack(self._iterate(equation, start))

    def _iterate(self, equation: Equation, y: Tensor) -> Tensor:
        point = equation.at(y, self.inverter.needs_jacobian)
        fitting, y = equation.fitting(y, point)
        if fitting is not equation:
            equation, point = fitting, fitting.at(y, self.inverter.needs_jacobian)
        state = _defined(self.inverter.start(equation, y, point), equation)
        if not _torch.can_inspect(state.status):
            for _ in range(min(self.inverter.max_steps, self.inverter.traced_steps)):
                state = self._step(equation, state)
            return _or_nan(state)
        state = self._loop(equation, state)
        return self._judged(state) if (state.status != DONE).any() else state.y

    def _loop(self, equation: Equation, state: Any) -> Any:
        with ExitStack() as stack:
            bar: Any = None
            if self.inverter.progress:
                bar = stack.enter_context(progress_bar(self.caller)(total=state.status.numel(), desc=self.caller))
            for _ in range(self.inverter.max_steps):
                before = int((state.status == RUNNING).sum())
                if not before:
                    break
                state = self._step(equation, state)
                if bar is not None:
                    bar.update(before - int((state.status == RUNNING).sum()))
        return state

    def _step(self, equation: Equation, state: Any) -> Any:
        point = equation.at(state.trial, self.inverter.needs_jacobian)
        jacobian = point.jacobian if self.inverter.needs_jacobian else None
        options = self.inverter.options(equation.eps)
        return advance(self.inverter.method, state, equation.x, point.residual, jacobian, options)

    def _judged(self, state: State) -> Tensor:
        """The values where some samples have failed."""
        if self.inverter.on_failure == "nan":
            return _or_nan(state)
        text = describe_failure(self.caller, self.inverter, state)
        if self.inverter.on_failure == "raise":
            raise (BracketError if (state.status == NO_BRACKET).any() else NotConvergedError)(text)
        warnings.warn(text, RuntimeWarning, stacklevel=_outside())
        return state.y


def _outside() -> int:
    """The stacklevel of a warning, for the line that called this package."""
    own = tuple(os.path.dirname(module.__file__ or "") + os.sep for module in (torch, sys.modules[__package__ or ""]))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        level, frame = level + 1, frame.f_back
    return level


def _usable(tensors: Tensors) -> list[Tensor]:
    """Tensors of inference mode take no part in any graph; their copies do."""
    if torch.compiler.is_dynamo_compiling():
        return list(tensors)
    return [t.clone() if t.is_inference() else t for t in tensors]


def _defined(state: Any, equation: Equation) -> Any:
    """Samples of x that are not finite give nan, and are done."""
    defined = equation.x.isfinite().all(-1)
    y = chosen(defined, state.y, torch.full_like(state.y, torch.nan))
    return state._replace(y=y, status=torch.where(defined, state.status, DONE))


def _or_nan(state: State) -> Tensor:
    return chosen(state.status == DONE, state.y, torch.full_like(state.y, torch.nan))


# --- under transforms ------------------------------------------------------------------------------


def _announced(inversion: Inversion, n_y: int, n_x: int, tensors: Tensors) -> tuple[Tensor, ...]:
    # Announced as a torch function: modes that watch or exchange the tensors of f stay outside.
    if _torch.function_mode_active():
        return handle_torch_function(_announced, tensors, inversion, n_y, n_x, tensors)
    return _Solve.apply(inversion, n_y, n_x, *tensors)


class _Solve(Function):
    """Values without derivative; under vmap all samples are solved for at once."""

    @staticmethod
    def forward(inversion: Inversion, n_y: int, n_x: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        y, x, theta = tensors[:n_y], tensors[n_y : n_y + n_x], tensors[n_y + n_x :]
        return inversion._solve(y, x, [t.detach() for t in theta])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], inversion: Inversion, n_y: int, n_x: int, *tensors: Tensor
    ) -> tuple[Any, Any]:
        dims = in_dims[3:]
        led = [
            t.movedim(d, 0) if d is not None else t.expand(info.batch_size, *t.shape) if i < n_y + n_x else t
            for i, (t, d) in enumerate(zip(tensors, dims, strict=True))
        ]
        batched = inversion.batched([d is not None for d in dims[n_y + n_x :]], info.randomness)
        return _Solve.apply(batched, n_y, n_x, *led), (0,) * n_y


def _outside_inference_mode() -> AbstractContextManager[Any]:
    """What is computed inside can have a graph."""
    if torch.compiler.is_dynamo_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)
