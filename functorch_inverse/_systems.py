r"""Many independent linear systems A u = b, solved in rounds until their true residuals are small.

The residual that a Krylov method carries along drifts away from b - A u. So a round ends where the
method believes it is done, the true residual is computed, and who was wrong starts again from it: iterative
refinement. Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd edition (2003), section 6.5;
van der Vorst and Ye, Residual replacement strategies for Krylov subspace iterative methods (2000).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from functorch_inverse._preconditioner import Apply, identity, probes
from functorch_inverse.errors import StructureError

__all__ = [
    "Ahead",
    "LinearSolution",
    "Maps",
    "Round",
    "Systems",
    "asymmetric",
    "conjugated",
    "dot",
    "flattened",
    "named",
    "norm",
    "refine",
]


class LinearSolution(NamedTuple):
    """What a Krylov solver found; every field but `value` has one entry for each system.

    value: u, shape (*lead, n).
    converged: whether ||b - A u|| <= max(rtol ||b||, atol); False where u is nan.
    steps: how many steps were taken.
    residual: ||b - A u||, from a real product with A.
    """

    value: Tensor
    converged: Tensor
    steps: Tensor
    residual: Tensor


Ahead: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Maps(NamedTuple):
    """A, its adjoint A^H (where known), M and M^H as maps of (k, n), and (b, u) -> b + u - A u where it costs less than A u."""

    mv: Apply
    adjoint: Apply | None
    precondition: Apply
    precondition_adjoint: Apply
    ahead: Ahead | None = None


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each row, the first conjugated."""
    return torch.linalg.vecdot(a, b)


def norm(a: Tensor) -> Tensor:
    """||a|| of each row."""
    return torch.linalg.vector_norm(a, dim=-1)


# Squares of very large or very small numbers would leave the range of the dtype: where there are such, each right-hand side
# is brought to the size of one by a power of two, which is exact.
class Systems:
    """k systems of n unknowns on the way to their solution; rounds change u and steps."""

    def __init__(self, maps: Maps, b: Tensor, init: Tensor | None, tolerances: tuple[float, float], max_steps: int) -> None:
        self.maps, self.max_steps = maps, max_steps
        size, (self.rtol, atol) = norm(b), tolerances
        self.scale = None if _moderate(size) else _size(b)
        self.b = b if self.scale is None else b / self.scale.unsqueeze(-1)
        size = size if self.scale is None else norm(self.b)
        self.target = self.rtol * size
        if atol:
            floor = torch.full_like(size, atol)
            self.target = torch.maximum(self.target, floor if self.scale is None else floor / self.scale)
        self.r, self.residual, self.untouched = self.b, size, init is None
        # M r and A M r, where they are known already.
        self.begun: tuple[Tensor, Tensor] | None = None
        if init is not None:
            self._begin_at(init if self.scale is None else init / self.scale.unsqueeze(-1))

    @functools.cached_property
    def u(self) -> Tensor:
        return torch.zeros_like(self.b)

    @functools.cached_property
    def steps(self) -> Tensor:
        return torch.zeros_like(self.residual, dtype=torch.int64)

    @functools.cached_property
    def hopeless(self) -> Tensor:
        return torch.zeros_like(self.residual, dtype=torch.bool)

    def _begin_at(self, init: Tensor) -> None:
        """From a guess, where it is better than nothing."""
        r = self.b - self.maps.mv(init)
        better = norm(r) < self.residual
        self.u = torch.where(better.unsqueeze(-1), init, self.u)
        self.r = torch.where(better.unsqueeze(-1), r, self.r)
        self.residual = norm(self.r)

    def begin(self) -> tuple[Tensor, Tensor]:
        """M r and A M r, taken once for those who look at them first and those who use them."""
        if self.begun is None:
            direction = self.maps.precondition(self.r)
            self.begun = direction, self.maps.mv(direction)
        return self.begun

    def value(self) -> Tensor:
        """u, in the units of the right-hand sides."""
        return self.u if self.scale is None else self.u.mul_(self.scale.unsqueeze(-1))

    def unsolved(self) -> Tensor:
        """Which systems another step could help; nan compares as False."""
        return (self.residual > self.target) & ~self.hopeless & (self.steps < self.max_steps)

    def solved(self) -> bool:
        """Whether all systems are, at a residual that is a number."""
        return bool((self.residual.isfinite() & (self.residual <= self.target)).all())

    def verify(self) -> None:
        """The true residual."""
        self.r = self.b - self.maps.mv(self.u)
        self.residual = norm(self.r)

    def at_rounding(self) -> Tensor:
        """Where the residual is that of rounding A u, so that a direct solver would leave as much."""
        probe = torch.cos(torch.arange(self.b.shape[-1], dtype=self.residual.dtype, device=self.b.device)).to(self.b.dtype)
        size = norm(self.maps.mv(probe.expand_as(self.b))) / norm(probe)
        floor = 8 * torch.finfo(self.residual.dtype).eps * size * norm(self.u)
        return self.residual <= torch.minimum(floor, 1e-3 * norm(self.b))

    def take_back(self, kept: Tensor, which: Tensor) -> None:
        """What made things worse."""
        if which.any():
            self.u = torch.where(which.unsqueeze(-1), kept, self.u)
            self.verify()

    def rescale(self, direction: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        """M r and A M r, with M from here on times the power of two that makes A M r as long as r."""
        scale, M = (_size(self.r) / _size(product)).unsqueeze(-1), self.maps.precondition
        self.maps = self.maps._replace(precondition=lambda v: M(v) * scale)
        return direction * scale, product * scale

    def undefined(self) -> Tensor:
        """Where A, M or b has nan or inf: only these make nan out of zero."""
        nothing = torch.zeros_like(self.b)
        parts = (self.b, self.maps.mv(nothing), self.maps.precondition(nothing))
        return ~torch.stack([t.isfinite().all(-1) for t in parts]).all(0)


def _moderate(size: Tensor) -> bool:
    """Whether squares of these, times those of A and A^T, keep their precision; not so for zero or nan."""
    most = torch.finfo(size.dtype).tiny ** -0.0625
    least, largest = torch.aminmax(size)
    return bool(least.item() > 1 / most and largest.item() < most)


def _size(b: Tensor) -> Tensor:
    largest = b.abs().amax(-1)
    exponent = torch.frexp(torch.where(largest.isfinite() & (largest > 0), largest, 1)).exponent
    return torch.ldexp(torch.ones_like(largest), exponent - 1)


# Updates s.u and s.steps of the active systems and says for which of them no further round can help.
Round = Callable[[Systems, Tensor, int], Tensor]


def refine(systems: Systems, step: Round, progress: float) -> None:
    """Rounds until every system is solved or has failed three times to bring its residual down by a factor."""
    failures, attempt = torch.zeros_like(systems.steps), 0
    active, systems.r = systems.unsolved(), systems.r.clone()  # rounds write into it
    while active.any():
        before, kept = systems.residual, systems.u.clone()
        systems.hopeless |= step(systems, active, attempt)
        systems.verify()
        systems.take_back(kept, active & ~(systems.residual <= before))
        failures += active & ~(systems.residual < progress * before)
        active = systems.unsolved() & (failures < 3)
        attempt += 1


def flattened(function: Callable[..., Tensor], shape: torch.Size, name: str) -> Callable[..., Tensor]:
    """A map of (*lead, n), or of several of them, as one of (k, n)."""
    if function is identity:
        return function

    def flat(v: Tensor, *more: Tensor) -> Tensor:
        out = function(*[t if t.shape == shape else t.reshape(shape) for t in (v, *more)])
        if out.shape != shape or out.dtype != v.dtype:
            raise StructureError(
                f"`{name}` was called with shape {tuple(shape)} and {v.dtype} and returned shape {tuple(out.shape)} and "
                f"{out.dtype}; it must return what it got: one product with A for each leading index."
            )
        out = out.detach() if out.requires_grad else out
        return out if v.shape == shape else out.reshape(v.shape)

    return flat


def conjugated(function: Apply) -> Apply:
    """A^H from A^T; for real numbers the same."""
    if function is identity:
        return function
    return lambda v: function(v.conj().resolve_conj()).conj().resolve_conj()


def named(which: Tensor) -> str:
    """The first of some flat indices, for a text."""
    return ", ".join(map(str, which[:10].tolist())) + (", ..." if len(which) > 10 else "")


def asymmetric(systems: Systems) -> Tensor:
    """Which A differ from A^H, as far as that is known, by one product with each."""
    if systems.maps.adjoint is None:
        return torch.zeros_like(systems.hopeless)
    probe = probes(systems.b)[0]
    there, back = systems.maps.mv(probe), systems.maps.adjoint(probe)
    return norm(there - back) > torch.finfo(systems.b.dtype).eps ** 0.5 * (norm(there) + norm(back))
