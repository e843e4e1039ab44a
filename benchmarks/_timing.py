"""A fair race: contenders are checked first, take turns, and every figure is the median of ratios to the limit in the same
round.
"""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

LIMIT, OURS, AFTERNOON = "limit", "functorch_inverse", "afternoon"
OURS_COMPILED, LIMIT_COMPILED = "functorch_inverse, compiled", "limit, compiled"

# Far above the rounding and stopping errors of all contenders, far below what a forgotten term does.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}


@dataclass(frozen=True)
class Effort:
    """How much to measure."""

    name: str
    seconds: float  # for each contender in each workload
    rounds: int  # at least
    dtypes: tuple[torch.dtype, ...]
    compiler: str | None = "inductor"
    clock: Callable[[], float] = time.process_time  # what others do on the machine does not count

    @property
    def tiny(self) -> bool:
        return self.name == "tiny"


TINY = Effort("tiny", 0.0, 1, (torch.float64,), compiler=None)
QUICK = Effort("quick", 0.3, 5, (torch.float64, torch.float32))
FULL = Effort("full", 3.0, 15, (torch.float64, torch.float32))


@dataclass(frozen=True)
class Contender:
    """run() does the whole work once and returns the value and the gradients."""

    name: str
    run: Callable[[], Sequence[Any]]


@dataclass(frozen=True)
class Workload:
    """The same work for everyone. The first contender is the limit; truth is what each must return."""

    claim: str
    name: str
    dtype: torch.dtype
    contenders: Sequence[Contender]
    truth: Sequence[Any]
    target: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Cell:
    """One contender's figure, "right", "wrong" or "fails", and why."""

    value: float | None
    status: str = "right"
    note: str = ""


@dataclass
class Row:
    """One line of the table."""

    claim: str
    workload: str
    dtype: str
    unit: str
    target: dict[str, float]
    cells: dict[str, Cell]
    limit_seconds: float | None = None

    def met(self, name: str = OURS) -> bool | None:
        """Whether the target is met; None where there is none or nothing to compare."""
        cell = self.cells.get(name)
        if name not in self.target or cell is None:
            return None
        return cell.status == "right" and cell.value is not None and cell.value <= self.target[name]


def measure(workload: Workload, effort: Effort) -> Row:
    """Check everyone, then race everyone who finishes."""
    verdicts = {c.name: judge(c, workload.truth, TOLERANCE[workload.dtype]) for c in workload.contenders}
    finishers = [c for c in workload.contenders if verdicts[c.name].status != "fails"]
    limit = verdicts[workload.contenders[0].name]
    if limit.status != "right":
        what = "failed" if limit.status == "fails" else "is wrong"
        raise RuntimeError(f"{workload.claim}, {workload.name}: the limit {what}: {limit.note}")
    times = race(finishers, effort)
    for name, pairs in times.items():
        verdicts[name].value = statistics.median(own / reference for own, reference in pairs)
    seconds = statistics.median(own for own, _ in times[finishers[0].name])
    dtype = str(workload.dtype).removeprefix("torch.")
    return Row(workload.claim, workload.name, dtype, "times the limit", dict(workload.target), verdicts, seconds)


# --- right or wrong --------------------------------------------------------------------------------


def judge(contender: Contender, truth: Sequence[Any], tolerance: float) -> Cell:
    """Whether every value and gradient is right."""
    try:
        found = contender.run()
    except Exception as error:
        return Cell(None, "fails", _summary(error))
    errors = [error_of(got, want) for got, want in zip(found, truth, strict=True)]
    if all(error <= tolerance for error in errors):
        return Cell(None)
    told = ("no gradient" if got is None else f"error {error:.0e}" for got, error in zip(found, errors, strict=True))
    return Cell(None, "wrong", ", ".join(told))


def _summary(error: Exception) -> str:
    """One line; JAX hides what happened behind a traceback of its own."""
    first, *rest = f"{type(error).__name__}: {error}".splitlines()
    inner = [line.lstrip("_") for line in rest if line.partition(":")[0].endswith("Error")]
    return (inner[-1] if inner else first)[:200]


def error_of(got: Any, want: Any) -> float:
    """The largest error, relative to the largest true value; inf for a missing gradient, nan or another shape."""
    if got is None:
        return float("inf")
    got, want = to_numpy(got), to_numpy(want)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-300))


def to_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    return np.asarray(value, dtype=np.float64)


# --- the race --------------------------------------------------------------------------------------


def race(contenders: Sequence[Contender], effort: Effort) -> dict[str, list[tuple[float, float]]]:
    """(seconds a call, the limit's seconds a call in the same round) for each contender.

    A block of calls makes short work measurable. Who has used up the time leaves the race, the limit runs in every round.
    """
    blocks = {c.name: _block(c, effort.clock) if effort.seconds else 1 for c in contenders}
    times: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    used = dict.fromkeys(times, 0.0)
    racing, turn = list(contenders), 0
    while racing:
        order = racing[turn % len(racing) :] + racing[: turn % len(racing)]
        own = {c.name: _clock(c, blocks[c.name], effort.clock) for c in order}
        limit = contenders[0].name
        reference = own[limit] if limit in own else _clock(contenders[0], blocks[limit], effort.clock)
        for name, seconds in own.items():
            times[name].append((seconds, reference))
            used[name] += seconds * blocks[name]
        racing = [c for c in racing if not _has_enough(len(times[c.name]), used[c.name], effort)]
        turn += 1
    return times


def _has_enough(rounds: int, used: float, effort: Effort) -> bool:
    too_slow = used > 5 * effort.seconds and rounds >= min(3, effort.rounds)
    return too_slow or (used >= effort.seconds and rounds >= effort.rounds)


def _block(contender: Contender, clock: Callable[[], float]) -> int:
    """How many calls take about two milliseconds."""
    contender.run()
    return max(1, int(2e-3 / max(_clock(contender, 1, clock), 1e-7)))


def _clock(contender: Contender, calls: int, clock: Callable[[], float]) -> float:
    """Seconds a call, without garbage collection in between."""
    run = contender.run
    if gc.get_count()[0] > 5000:
        gc.collect(0)
    collecting = gc.isenabled()
    gc.disable()
    start = clock()
    for _ in range(calls):
        run()
    seconds = clock() - start
    if collecting:
        gc.enable()
    return seconds / calls


# --- calls -----------------------------------------------------------------------------------------


def there_and_back(
    call: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], v: torch.Tensor
) -> Callable[[], Sequence[Any]]:
    """One forward and one backward: (value, gradients of inputs)."""

    def run() -> Sequence[Any]:
        y = call(*inputs)
        return (y, *torch.autograd.grad(y, inputs, v))

    return run


def both_ways(
    calls: Mapping[str, Callable[..., torch.Tensor]], inputs: Sequence[torch.Tensor], v: torch.Tensor
) -> list[Contender]:
    """Contenders that go forward and backward."""
    return [Contender(name, there_and_back(call, inputs, v)) for name, call in calls.items()]


def compiled(function: Callable[..., Any], effort: Effort) -> Callable[..., Any]:
    """torch.compile; what cannot be compiled whole is an error."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend=effort.compiler)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """For XLA, which makes as many threads as there are cores when it starts."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
