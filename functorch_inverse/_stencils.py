r"""Finite-difference stencils: which points, which weights, how far apart.

    f'(x) = (1/h) sum_c w_c f(x + c h) + O(h^p)

Where values are right to a relative precision eps, a k-fold difference is best at a step of about
eps^(1/(p+k)) times the length over which f changes. Source: Press et al., Numerical Recipes, 3rd
edition, section 5.7; Fornberg, Generation of Finite Difference Formulas on Arbitrarily Spaced Grids
(1988), tables 1 and 3; Ridders, Accurate computation of F'(x) and F'(x)F''(x) (1982).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Estimate", "Method", "Order", "Stencil", "stencil"]

Method: TypeAlias = Literal["central", "forward", "backward", "complex"]
Order: TypeAlias = Literal["auto"] | int

# Weights of f(x + c h) for c > 0; those of -c are their negatives.
_CENTRAL = {
    2: (1 / 2,),
    4: (2 / 3, -1 / 12),
    6: (3 / 4, -3 / 20, 1 / 60),
    8: (4 / 5, -1 / 5, 4 / 105, -1 / 280),
}
# Weights of f(x + c h) for c = 0, 1, ...
_ONE_SIDED = {
    1: (-1.0, 1.0),
    2: (-3 / 2, 2.0, -1 / 2),
    3: (-11 / 6, 3.0, -3 / 2, 1 / 3),
    4: (-25 / 12, 4.0, -3.0, 4 / 3, -1 / 4),
}
_RICHARDSON_LEVELS = 10


@dataclass(frozen=True)
class Stencil:
    """Points c in units of the step, and how values there become a derivative and its error.

    `rows` hold the weights of the derivative, and of one of a higher order that shows its error. Those of
    Richardson extrapolation are the plain differences with steps h, h/2, h/4, ...
    """

    order: int
    points: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    growth: int = 0

    def step(self, eps: float, times: int) -> float:
        """The relative step for a difference taken `times` times of values of precision eps."""
        return 0.25 if self.growth else eps ** (1 / (self.order + times))

    def bare(self) -> "Stencil":
        """Without what only the error estimate needs."""
        if self.growth:
            return self
        used = [(c, w) for c, w in zip(self.points, self.rows[0], strict=True) if w]
        return Stencil(self.order, tuple(c for c, _ in used), (tuple(w for _, w in used),))

    def combine(self, values: Tensor, h: Tensor, eps: Tensor, noise: Tensor | float) -> "Estimate":
        """The derivative and its error from values (points, ...) of relative precision eps, and an absolute error."""
        rows = values.new_tensor(self.rows)[(...,) + (None,) * (values.ndim - 1)]
        # A point outside the domain spoils only the estimates that use it: 0 * nan is nan.
        used = torch.where(rows != 0, values, 0)
        estimates = (rows * used).sum(1) / h
        rounding = ((eps * used.abs().amax(1) + noise) * rows.abs().sum(1) / h).to(h.dtype)
        step = h.expand(values.shape[1:])
        if self.growth:
            return Estimate(*_extrapolate(estimates, rounding, self.growth), step)
        return Estimate(estimates[0], (estimates[0] - estimates[-1]).abs() + rounding.amax(0), step)


class Estimate(NamedTuple):
    """A derivative, its estimated error and the step that it was made with."""

    value: Tensor
    error: Tensor
    step: Tensor

    def or_else(self, other: "Estimate") -> "Estimate":
        """For each number that of the shorter step, or that of the longer one where it refines it.

        The error of a short step is rounding, which can be bounded. A long one may miss what changes fast, and
        then its own estimate looks splendid: so it is believed within the error of the short one alone.
        """
        swap = other.step < self.step
        short = [torch.where(swap, b, a) for a, b in zip(self, other, strict=True)]
        long = [torch.where(swap, a, b) for a, b in zip(self, other, strict=True)]
        refines = ((long[0] - short[0]).abs() <= short[1]) & (long[1] < short[1])
        # A step below the last place of what it moves sees no change at all.
        blind = ~short[0].isfinite() | ((short[0] == 0) & (short[1] == 0))
        refines = refines | blind
        return Estimate(*(torch.where(refines, b, a) for a, b in zip(short, long, strict=True)))


def stencil(caller: str, method: str, order: Any) -> Stencil:
    """The stencil of a method and order; ValueError naming the choices."""
    if method not in ("central", "forward", "backward", "complex"):
        raise ValueError(f"`{caller}`: `method` is {method!r}; choose 'central', 'forward', 'backward' or 'complex'.")
    choices = (1, 2, 3, "auto") if method in ("forward", "backward") else (2, 4, 6, "auto")
    if order not in choices or isinstance(order, float):
        raise ValueError(f"`{caller}`: `order` is {order!r}; for method={method!r} choose {', '.join(map(repr, choices))}.")
    if method in ("central", "complex"):
        return _richardson_central() if order == "auto" else _central(order)
    forward = _richardson_forward() if order == "auto" else _one_sided(order)
    return forward if method == "forward" else _mirrored(forward)


def _central(order: int) -> Stencil:
    points = tuple(c for n in range(1, order // 2 + 2) for c in (float(n), -float(n)))
    return Stencil(order, points, (_weights(points, _CENTRAL[order]), _weights(points, _CENTRAL[order + 2])))


def _weights(points: tuple[float, ...], positive: tuple[float, ...]) -> tuple[float, ...]:
    table = {c + 1: w for c, w in enumerate(positive)}
    return tuple(table.get(int(abs(c)), 0.0) * (1 if c > 0 else -1) for c in points)


def _one_sided(order: int) -> Stencil:
    points = tuple(float(c) for c in range(order + 2))
    return Stencil(order, points, ((*_ONE_SIDED[order], 0.0), _ONE_SIDED[order + 1]))


def _richardson_central() -> Stencil:
    steps = [2.0**-level for level in range(_RICHARDSON_LEVELS)]
    points = tuple(c for s in steps for c in (s, -s))
    rows = tuple(tuple(0.5 / c if abs(c) == s else 0.0 for c in points) for s in steps)
    return Stencil(2, points, rows, growth=4)


def _richardson_forward() -> Stencil:
    steps = [2.0**-level for level in range(_RICHARDSON_LEVELS)]
    rows = tuple((-1 / s, *(1 / s if c == s else 0.0 for c in steps)) for s in steps)
    return Stencil(1, (0.0, *steps), rows, growth=2)


def _mirrored(forward: Stencil) -> Stencil:
    points = tuple(-c for c in forward.points)
    rows = tuple(tuple(-w for w in row) for row in forward.rows)
    return replace(forward, points=points, rows=rows)


def _extrapolate(estimates: Tensor, rounding: Tensor, growth: int) -> tuple[Tensor, Tensor]:
    """The entry of Ridders' tableau with the smallest estimated error, for each number by itself.

    Each level removes the next term of the error: T_ij = T_i,j-1 + (T_i,j-1 - T_i-1,j-1) / (growth^j - 1). Long steps may
    agree by chance, whole periods apart: what shorter ones contradict, beyond their own error, is no agreement.
    """
    found, row = [], [estimates[0]]
    for i in range(1, len(estimates)):
        new, best, error = [estimates[i]], estimates[i], torch.full_like(rounding[0], torch.inf)
        for j in range(1, i + 1):
            new.append(new[-1] + (new[-1] - row[j - 1]) / (float(growth) ** j - 1))
            change = torch.maximum((new[j] - new[j - 1]).abs(), (new[j] - row[j - 1]).abs()) + rounding[i]
            better = change < error
            best, error = torch.where(better, new[j], best), torch.where(better, change, error)
        found.append((best, error))
        row = new
    best, error = estimates[0], torch.full_like(rounding[0], torch.inf)
    for i, (value, own) in enumerate(found):
        for other, its in found[i + 1 :]:
            own = torch.maximum(own, ((value - other).abs() - its).nan_to_num(nan=0.0))
        best, error = torch.where(own < error, value, best), torch.where(own < error, own, error)
    return best, error
