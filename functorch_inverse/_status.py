"""What becomes of the samples of an iteration, and what is said of those that fail."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "DONE",
    "JUMPS",
    "NOT_MONOTONE",
    "NO_BRACKET",
    "RUNNING",
    "STUCK",
    "UNDEFINED",
    "Options",
    "State",
    "chosen",
    "describe_failure",
]

RUNNING, DONE, NO_BRACKET, NOT_MONOTONE, UNDEFINED, STUCK, JUMPS = range(7)

_REASONS = {
    RUNNING: "the steps were used up",
    NO_BRACKET: "f(y) - x has one sign everywhere that was looked",
    NOT_MONOTONE: "f is not monotone",
    UNDEFINED: "f(y) is nan or infinite at the start (init; x without one) or on the way",
    JUMPS: "f jumps over x",
    STUCK: "no step makes f(y) - x smaller",
}


class Options(NamedTuple):
    """The precision of the numbers, and the tolerances."""

    eps: float
    rtol: float
    atol: float


class State(Protocol):
    """A named tuple of tensors with leading batch dims, which every method extends by what it remembers."""

    @property
    def y(self) -> Tensor:
        """The best values so far, (*batch, n)."""
        ...

    @property
    def residual(self) -> Tensor:
        """f(y) - x there."""
        ...

    @property
    def trial(self) -> Tensor:
        """Where f is evaluated next."""
        ...

    @property
    def status(self) -> Tensor:
        """One of the integers above for each sample."""
        ...


def chosen(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """torch.where for a mask of samples."""
    return torch.where(mask.reshape(mask.shape + (1,) * (yes.ndim - mask.ndim)), yes, no)


class _Advises(Protocol):
    @property
    def max_steps(self) -> int: ...
    def advice(self, status: int) -> str: ...


def describe_failure(caller: str, inverter: _Advises, state: State) -> str:
    """Which samples have failed and why, how far the worst is, and what to try."""
    status = state.status.flatten()
    error = state.residual.abs().amax(-1).flatten().nan_to_num(nan=torch.inf)
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
