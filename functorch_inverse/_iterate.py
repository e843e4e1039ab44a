"""Solve f(y) = x for all samples of a batch at once: steps, frozen samples, failures."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function

from functorch_inverse import _torch
from functorch_inverse._equation import Equation, Point, largest
from functorch_inverse._pullback import Function as LeafFunction
from functorch_inverse._pullback import Tensors
from functorch_inverse._rules import vmapped, widen
from functorch_inverse._values import progress_bar
from functorch_inverse.errors import BracketError, NotConvergedError

__all__ = ["DONE", "NOT_MONOTONE", "NO_BRACKET", "RUNNING", "STUCK", "UNDEFINED", "Inversion", "Inverter", "OnFailure"]

OnFailure: TypeAlias = Literal["raise", "nan", "warn"]

# What has become of a sample.
RUNNING, DONE, NO_BRACKET, NOT_MONOTONE, UNDEFINED, STUCK = range(6)


class State(Protocol):
    """A named tuple of tensors with leading batch dims."""

    @property
    def y(self) -> Tensor:
        """The best values so far, (*batch, n)."""
        ...

    @property
    def residual(self) -> Tensor:
        """f(y) - x there."""
        ...

    @property
    def status(self) -> Tensor:
        """One of the integers above for each sample."""
        ...


class Inverter(Protocol):
    """What `inverter=` takes: one evaluation of f at the start and one in every step."""

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

    def start(self, equation: Equation, y: Tensor, point: Point) -> Any:
        """The first state, from f at y."""
        ...

    def step(self, equation: Equation, state: Any) -> Any:
        """The next state of all samples; what has been done with is thrown away."""
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
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if not torch.compiler.is_dynamo_compiling() and torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(_torch.full_precision(y[0]))
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
                state = _frozen(state, self.inverter.step(equation, state))
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
                state = _frozen(state, self.inverter.step(equation, state))
                if bar is not None:
                    bar.update(before - int((state.status == RUNNING).sum()))
        return state

    def _judged(self, state: State) -> Tensor:
        """The values where some samples have failed."""
        if self.inverter.on_failure == "nan":
            return _or_nan(state)
        text = failure(self.caller, self.inverter, state)
        if self.inverter.on_failure == "raise":
            raise (BracketError if (state.status == NO_BRACKET).any() else NotConvergedError)(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return state.y


def _usable(tensors: Tensors) -> list[Tensor]:
    """Tensors of inference mode take no part in any graph; their copies do."""
    if torch.compiler.is_dynamo_compiling():
        return list(tensors)
    return [t.clone() if t.is_inference() else t for t in tensors]


def _defined(state: Any, equation: Equation) -> Any:
    """Samples of x that are not finite give nan, and are done."""
    defined = equation.x.isfinite().all(-1)
    y = torch.where(defined.unsqueeze(-1), state.y, torch.nan)
    return state._replace(y=y, status=torch.where(defined, state.status, DONE))


def _frozen(old: Any, new: Any) -> Any:
    """The new state of the samples that are still running, the old one of the others."""
    running = old.status == RUNNING
    pairs = zip(old, new, strict=True)
    return type(old)(*(torch.where(running.reshape(running.shape + (1,) * (a.ndim - running.ndim)), b, a) for a, b in pairs))


def _or_nan(state: State) -> Tensor:
    return torch.where((state.status == DONE).unsqueeze(-1), state.y, torch.nan)


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


# --- what is said of a failure ---------------------------------------------------------------------

_REASONS = {
    RUNNING: "the steps were used up",
    NO_BRACKET: "f(y) - x has one sign everywhere that was looked",
    NOT_MONOTONE: "f is not monotone",
    UNDEFINED: "f(y) is nan or infinite at the start (init; x without one) or on the way",
    STUCK: "no step makes f(y) - x smaller",
}


def failure(caller: str, inverter: Inverter, state: State) -> str:
    """Which samples have failed and why, how far the worst is, and what to try."""
    status, error = state.status.flatten(), largest(state.residual).flatten().nan_to_num(nan=torch.inf)
    failed = (status != DONE).nonzero().flatten()
    worst = int(failed[error[failed].argmax()])
    parts = []
    for kind, reason in _REASONS.items():
        samples = (status == kind).nonzero().flatten().tolist()
        if samples:
            more = ", ..." if len(samples) > 10 else ""
            parts.append(f"{reason} in samples [{', '.join(map(str, samples[:10]))}{more}]. {inverter.advice(kind)}")
    return (
        f"`{caller}`: {type(inverter).__name__} did not solve f(y) = x in {len(failed)} of {len(status)} samples (flat indices "
        f"over all batch dims, vmapped ones outermost); the worst is sample {worst}, where f(y) - x is "
        f"{error[worst]:.3g} after at most {inverter.max_steps} steps: {' '.join(parts)}"
    )
