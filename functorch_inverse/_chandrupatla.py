r"""Roots of monotone functions of one number: a bracket found by expansion, shrunk by Chandrupatla's method.

Three points that enclose the root give an inverse quadratic interpolation; it is used where it is known to be
monotone between them, else the bracket is halved. No step may leave a bracket wider than bisection would have
left `SLACK` steps ago, so that there is no function for which this is much slower than bisection. Brackets that
span orders of magnitude are halved geometrically first.

Source: Chandrupatla, A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear function
without using derivatives (1997); Oliveira and Takahashi, An Enhancement of the Bisection Method Average
Performance Preserving Minmax Optimality (2020), for the bound.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from functorch_inverse._status import DONE, JUMPS, NO_BRACKET, NOT_MONOTONE, RUNNING, UNDEFINED, Options, chosen

__all__ = ["SLACK", "BracketState", "advanced", "inside", "started"]

SLACK = 3


class BracketState(NamedTuple):
    """While a bracket is sought, a and b are the lowest and highest point; then a is the last one, b across the root."""

    y: Tensor
    residual: Tensor
    trial: Tensor
    status: Tensor
    a: Tensor
    fa: Tensor
    b: Tensor
    fb: Tensor
    c: Tensor
    fc: Tensor
    # The next point of a bracket.
    m: Tensor
    # Between these f is defined, as far as is known.
    lower: Tensor
    upper: Tensor
    # The next expansion: up or down, the unit of its length, how many there were.
    up: Tensor
    size: Tensor
    tries: Tensor
    # Whether f rises (1), falls (-1), or nothing is known (0).
    rising: Tensor
    bracketed: Tensor
    # How wide a bracket may be after the next step.
    budget: Tensor
    # The width of the first bracket, 1 at most: what is large and small for a root close to 0.
    unit: Tensor
    # By how much f differed at the ends of the last bracket that was as wide as y is large, and half that exactly known.
    span: Tensor
    near: Tensor


def inside(y: Tensor, lower: float | None, upper: float | None) -> Tensor:
    """y where it lies between the bounds, some point between them elsewhere."""
    if lower is None and upper is None:
        return y
    if lower is not None and upper is not None:
        other = lower + (upper - lower) / 2
    else:
        other = lower + 1.0 if lower is not None else (upper or 0.0) - 1.0
    below = y <= lower if lower is not None else torch.zeros_like(y, dtype=torch.bool)
    above = y >= upper if upper is not None else torch.zeros_like(y, dtype=torch.bool)
    return torch.where(below | above, other, y)


def started(y: Tensor, residual: Tensor, lower: float | None, upper: float | None) -> BracketState:
    """Nothing but one point."""
    a, fa = y.squeeze(-1), residual.squeeze(-1)
    limit = torch.finfo(y.dtype).max / 4  # no difference overflows
    zero, no = torch.zeros_like(a), torch.zeros_like(a, dtype=torch.bool)
    status = torch.where(fa == 0, DONE, torch.where(fa.isnan() | ~a.isfinite(), UNDEFINED, RUNNING))
    state = BracketState(
        y=y, residual=residual, trial=y, status=status, a=a, fa=fa, b=a, fb=fa, c=a, fc=fa, m=a,
        lower=zero + (-limit if lower is None else lower), upper=zero + (limit if upper is None else upper),
        up=~no, size=(a.abs() / 2).clamp_min(2.0**-7), tries=zero + 1, rising=zero, bracketed=no, budget=zero,
        unit=zero, span=zero, near=zero,
    )  # fmt: skip
    return state._replace(trial=_outside(state).unsqueeze(-1))


def advanced(state: BracketState, x: Tensor, residual: Tensor, jacobian: object, options: Options) -> BracketState:
    """What one point outside or inside the bracket tells."""
    s, p, fp = state, state.trial.squeeze(-1), residual.squeeze(-1)
    # What is flat within rounding is neither rising nor falling.
    noise = options.eps**0.5 * (x.squeeze(-1).abs() + s.fa.abs() + s.fb.abs())
    grown, shrunk = _expanded(s, p, fp, noise), _shrunk(s, p, fp, noise)
    s = BracketState(*(chosen(s.bracketed, i, o) for i, o in zip(shrunk, grown, strict=True)))
    s = _interpolating(s, x.squeeze(-1), options)
    trial = torch.where(s.bracketed, s.m, _outside(s))
    return s._replace(trial=trial.unsqueeze(-1))


# --- outside: expansion ----------------------------------------------------------------------------


# Steps grow faster than a geometric series, so that any number is reached soon, and are cut off where the domain
# ends: there the distance to the bound shrinks in the same way.
def _outside(s: BracketState) -> Tensor:
    """The next point above b or below a."""
    far = s.size * torch.exp2(s.tries * (s.tries + 1) / 2)
    near = torch.exp2(-s.tries)
    above = torch.minimum(s.b + far, s.upper - (s.upper - s.b) * near)
    below = torch.maximum(s.a - far, s.lower + (s.a - s.lower) * near)
    return torch.where(s.up, above, below)


def _expanded(s: BracketState, p: Tensor, fp: Tensor, noise: Tensor) -> BracketState:
    """A new lowest or highest point, or a bracket between it and the one before."""
    unknown = fp.isnan()
    e, fe = torch.where(s.up, s.b, s.a), torch.where(s.up, s.fb, s.fa)
    crossed = (fp.sign() != fe.sign()) & ~unknown
    way = torch.where((fp - fe).abs() > noise, torch.where(s.up, fp - fe, fe - fp).sign(), 0).nan_to_num()
    turned = (way * s.rising < 0) & ~unknown
    # Neither a step nor a bound is left where the point does not move, or f stays undefined on the way to the bound.
    over = (p == e) | (p == torch.where(s.up, s.upper, s.lower)) & ~crossed
    a, fa = (torch.where(unknown | s.up, old, new) for old, new in ((s.a, p), (s.fa, fp)))
    b, fb = (torch.where(unknown | ~s.up, old, new) for old, new in ((s.b, p), (s.fb, fp)))
    up = torch.where(unknown, s.up, torch.where(fa.abs() == fb.abs(), ~s.up, fb.abs() < fa.abs()))
    status = torch.where(over & (up == s.up), NO_BRACKET, s.status)
    status = torch.where(turned, NOT_MONOTONE, status)
    width = (p - e).abs()
    return s._replace(
        a=torch.where(crossed, p, a), fa=torch.where(crossed, fp, fa),
        b=torch.where(crossed, e, b), fb=torch.where(crossed, fe, fb),
        up=up, tries=torch.where(unknown, 1, s.tries + 1), rising=torch.where(s.rising == 0, way, s.rising),
        lower=torch.where(unknown & ~s.up, p, s.lower), upper=torch.where(unknown & s.up, p, s.upper),
        bracketed=crossed, budget=width * 2.0 ** (SLACK - 1), status=status, unit=width.clamp_max(1.0),
        span=(fp - fe).abs(), near=(fp - fe).abs(),
    )  # fmt: skip


# --- inside: inverse quadratic interpolation or bisection ------------------------------------------


def _shrunk(s: BracketState, p: Tensor, fp: Tensor, noise: Tensor) -> BracketState:
    """The part of the bracket that holds the root, with p as its newest end."""
    same = fp.sign() == s.fa.sign()
    between = (fp >= torch.minimum(s.fa, s.fb) - noise) & (fp <= torch.maximum(s.fa, s.fb) + noise)
    status = torch.where(between, s.status, torch.where(fp.isnan(), UNDEFINED, NOT_MONOTONE))
    return s._replace(
        a=p, fa=fp, b=torch.where(same, s.b, s.a), fb=torch.where(same, s.fb, s.fa),
        c=torch.where(same, s.a, s.b), fc=torch.where(same, s.fa, s.fb), budget=s.budget / 2, status=status,
    )  # fmt: skip


def _interpolating(s: BracketState, x: Tensor, options: Options) -> BracketState:
    """The better end of the bracket, whether it will do, and where to look next."""
    s = _measured(s, options)
    first = s.fa.abs() < s.fb.abs()
    y, error = torch.where(first, s.a, s.b), torch.where(first, s.fa, s.fb)
    width, exact = (s.b - s.a).abs(), error.abs() <= 4 * options.eps * x.abs()
    atol = torch.where(exact, s.unit * options.eps**1.5, 0) if options.atol < 0 else options.atol
    allowed = atol + max(options.rtol, options.eps) * y.abs()
    t, reach = _interpolated(s), s.budget / width
    middle, wide = _middle(s, options)
    far = wide & ((t == 0.5) | (reach < 1))
    edge = (allowed / width).clamp_max(0.5)
    t = torch.minimum(torch.maximum(t, edge), 1 - edge)
    t = torch.where(reach < 0.5, 0.5, torch.minimum(torch.maximum(t, 1 - reach), reach))
    m, budget = torch.where(far, middle, s.a + t * (s.b - s.a)), torch.where(far, width * 2.0**SLACK, s.budget)
    s = s._replace(y=y.unsqueeze(-1), residual=error.unsqueeze(-1), m=m, budget=budget)
    return s._replace(status=_status(s, x, exact, width <= 2 * allowed, options))


def _measured(s: BracketState, options: Options) -> BracketState:
    """By how much f differs over brackets that are still wide; infinite differences say nothing."""
    width, height, big = (s.b - s.a).abs(), (s.fb - s.fa).abs(), torch.maximum(s.a.abs(), s.b.abs())
    span = torch.where((width > torch.maximum(big, s.unit) / 4) | ~s.span.isfinite(), height, s.span)
    return s._replace(span=span, near=torch.where((width > options.eps**0.5 * big) | ~s.near.isfinite(), height, s.near))


# A sign change in a narrow bracket is no solution yet: f may jump there. It does not where it changes over the bracket
# no faster than over wider ones, or by rounding errors; or, where no narrower bracket exists, by much less than it
# did over one of half as many digits. f as steep as to fail that cannot be told from a jump.
def _status(s: BracketState, x: Tensor, exact: Tensor, narrow: Tensor, options: Options) -> Tensor:
    """DONE or JUMPS where the bracket is narrow enough to say so."""
    width, height, big = (s.b - s.a).abs(), (s.fb - s.fa).abs(), torch.maximum(s.a.abs(), s.b.abs())
    zero = big <= 4 * torch.finfo(x.dtype).tiny
    last = zero | (width <= 4 * options.eps * big)
    # Around 0 nothing but x tells how large the terms of f are.
    span = torch.where(zero, s.span.clamp_max(1.0), s.span)
    smooth = height <= 16 * s.span * width / torch.maximum(big, s.unit) + 100 * options.eps * (x.abs() + span)
    smooth = (smooth | (last & (height <= options.eps**0.125 * s.near))) & height.isfinite()
    # Half the digits of x are more than a jump beside x leaves, and f may lose the others.
    error = s.residual.squeeze(-1).abs()
    holds = smooth | exact | (last & (error <= options.eps**0.5 * x.abs()))
    ended = s.bracketed & (s.status == RUNNING) & (narrow | last)
    status = torch.where(ended & holds, DONE, torch.where(ended & last, JUMPS, s.status))
    return torch.where((error == 0) & (s.status == RUNNING), DONE, status)


def _interpolated(s: BracketState) -> Tensor:
    """Where the inverse parabola through a, b, c has its zero, or the middle."""
    xi, phi = (s.a - s.b) / (s.c - s.b), (s.fa - s.fb) / (s.fc - s.fb)
    monotone = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
    t = s.fa / (s.fb - s.fa) * s.fc / (s.fb - s.fc)
    t = t + (s.c - s.a) / (s.b - s.a) * s.fa / (s.fc - s.fa) * s.fb / (s.fc - s.fb)
    return torch.where(monotone & t.isfinite(), t, 0.5)


# A bracket from 1 to 1e100 would be halved some 300 times before anything happens near 1; so would one around 0.
def _middle(s: BracketState, options: Options) -> tuple[Tensor, Tensor]:
    """The geometric middle of a bracket (0 between different signs), and whether it spans orders of magnitude."""
    small, big = torch.minimum(s.a.abs(), s.b.abs()), torch.maximum(s.a.abs(), s.b.abs())
    opposite = s.a.sign() * s.b.sign() < 0
    deep = (s.b - s.a).abs() <= options.eps**0.5 * s.unit
    small = torch.where(deep, small.clamp_min(torch.finfo(small.dtype).tiny), small.clamp_min(1.0))
    sign = torch.where(s.a.abs() > s.b.abs(), s.a, s.b).sign()
    return torch.where(opposite, 0, sign * small.sqrt() * big.sqrt()), (big > 2.0**10 * small) | (deep & opposite)
