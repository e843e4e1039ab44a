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
_CENTRAL = {2: (1 / 2,), 4: (2 / 3, -1 / 12), 6: (3 / 4, -3 / 20, 1 / 60)}
# Weights of f(x + c h) for c = 0, 1, ...
_ONE_SIDED = {1: (-1.0, 1.0), 2: (-3 / 2, 2.0, -1 / 2), 3: (-11 / 6, 3.0, -3 / 2, 1 / 3)}
_RICHARDSON_LEVELS = 10


@dataclass(frozen=True)
class Stencil:
    """Points c in units of the step, and how values there become a derivative and its error.

    `rows` hold the weights of one estimate each: one of order `other` to compare with, then the one that
    counts. Those of Richardson extrapolation are the plain differences with steps h, h/2, h/4, ...
    """

    order: int
    points: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    other: int = 1
    growth: int = 0

    def step(self, eps: float, times: int) -> float:
        """The relative step for a difference taken `times` times of values of precision eps."""
        return 0.25 if self.growth else eps ** (1 / (self.order + times))

    def bare(self) -> "Stencil":
        """Without what only the error estimate needs."""
        if self.growth:
            return self
        used = [(c, w) for c, w in zip(self.points, self.rows[-1], strict=True) if w]
        return Stencil(self.order, tuple(c for c, _ in used), (tuple(w for _, w in used),))

    def combine(self, values: Tensor, h: Tensor, eps: Tensor) -> "Estimate":
        """The derivative, and how far it can be trusted, from values (points, ...) of relative precision eps."""
        rows = values.new_tensor(self.rows)
        estimates = torch.tensordot(rows, values, 1) / h
        weight = rows.abs().sum(-1)[(...,) + (None,) * (values.ndim - 1)]
        rounding = (eps * values.abs().amax(0) * weight / h).to(h.dtype)
        if self.growth:
            return _extrapolate(estimates, rounding, self.growth)
        best, change = estimates[-1], (estimates[-1] - estimates[0]).abs()
        # Where (h/L)^q is the relative error of the other estimate, that of this one is its p/q-th power.
        power = max(0.0, self.order / self.other - 1)
        ratio = (change / best.abs()).nan_to_num(nan=0.0, posinf=1.0).clamp(max=1)
        beyond = (change - 4 * rounding[-1]).clamp(min=0) / (best.abs() + rounding[-1])
        return Estimate(best, change * ratio**power + rounding[-1], beyond.clamp(max=1) ** (1 + power), rounding[-1])


class Estimate(NamedTuple):
    """A derivative; its estimated error; its relative truncation error alone, and its rounding error alone."""

    value: Tensor
    error: Tensor
    truncation: Tensor
    rounding: Tensor

    def or_else(self, other: "Estimate") -> "Estimate":
        """For each number the more trustworthy of two; nan is not trusted at all.

        Rounding counts by the larger of both values: one that is right is small where the derivative is zero,
        and one that is wrong is small where the step is far too large.
        """
        size = torch.maximum(self.value.abs().nan_to_num(nan=0.0), other.value.abs().nan_to_num(nan=0.0))
        doubts = [e.truncation + (e.rounding / size).nan_to_num(nan=0.0) + 0 * e.error for e in (self, other)]
        first, second = (d.nan_to_num(nan=torch.inf) for d in doubts)
        return Estimate(*(torch.where(second < first, b, a) for a, b in zip(self, other, strict=True)))


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
    points = [0.0]
    for c in range(1, order // 2 + 1):
        points += [float(c), -float(c)]
    coarser = _weights(points, _CENTRAL[order - 2]) if order > 2 else _forward_weights(points)
    return Stencil(order, tuple(points), (coarser, _weights(points, _CENTRAL[order])), max(1, order - 2))


def _weights(points: list[float], positive: tuple[float, ...]) -> tuple[float, ...]:
    table = {c + 1: w for c, w in enumerate(positive)}
    return tuple(table.get(int(abs(c)), 0.0) * (1 if c > 0 else -1) for c in points)


def _forward_weights(points: list[float]) -> tuple[float, ...]:
    return tuple({0.0: -1.0, 1.0: 1.0}.get(c, 0.0) for c in points)


def _one_sided(order: int) -> Stencil:
    """With one more point where needed, so that two estimates can be compared."""
    orders = (order - 1, order) if order > 1 else (2, 1)
    points = tuple(float(c) for c in range(max(orders) + 1))
    rows = tuple(_ONE_SIDED[p] + (0.0,) * (len(points) - p - 1) for p in orders)
    return Stencil(order, points, rows, orders[0])


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


def _extrapolate(estimates: Tensor, rounding: Tensor, growth: int) -> Estimate:
    """The entry of Ridders' tableau with the smallest estimated error, for each number by itself.

    Each level removes the next term of the error: T_ij = T_i,j-1 + (T_i,j-1 - T_i-1,j-1) / (growth^j - 1).
    """
    best, error = estimates[0], torch.full_like(rounding[0], torch.inf)
    noise, row = rounding[0], [estimates[0]]
    for i in range(1, len(estimates)):
        new = [estimates[i]]
        for j in range(1, i + 1):
            new.append(new[-1] + (new[-1] - row[j - 1]) / (float(growth) ** j - 1))
            change = torch.maximum((new[j] - new[j - 1]).abs(), (new[j] - row[j - 1]).abs()) + rounding[i]
            better = change < error
            best, error = torch.where(better, new[j], best), torch.where(better, change, error)
            noise = torch.where(better, rounding[i], noise)
        row = new
    beyond = (error - 5 * noise).clamp(min=0) / (best.abs() + noise)
    return Estimate(best, error, beyond.clamp(max=1), noise)
