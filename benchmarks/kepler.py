"""End to end: Kepler's equation M = E - e sin E solved by Newton, derivatives to M and to e, one of each for every value.

g is the same eight Newton steps in torch for all (zuko, TorchOpt, xitorch and optimistix included), and part of the figure:
what a derivative adds to a solver that people really run. The limit knows dE/dM = 1 / (1 - e cos E) and dE/de = sin E / (1
- e cos E).
"""

import numpy as np
import torch

import functorch_inverse as fi
from benchmarks import _afternoon, _peers
from benchmarks._report import main, measured
from benchmarks._timing import (
    AFTERNOON,
    LIMIT,
    LIMIT_COMPILED,
    OURS,
    OURS_COMPILED,
    Workload,
    both_ways,
    compiled,
)

STEPS = 8


def newton(M, e):
    """E with M = E - e sin E."""
    E = M + e * torch.sin(M)
    for _ in range(STEPS):
        E = E - (E - e * torch.sin(E) - M) / (1 - e * torch.cos(E))
    return E


def f(E, e):
    return E - e * torch.sin(E)


def residual(E, M, e):
    return E - e * torch.sin(E) - M


class Handwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, M, e):
        E = newton(M, e)
        ctx.save_for_backward(E, e)
        return E

    @staticmethod
    def backward(ctx, v):
        E, e = ctx.saved_tensors
        u = v / (1 - e * torch.cos(E))
        return u, u * torch.sin(E)


def workload(size, dtype, effort):
    generator = torch.Generator().manual_seed(0)
    M, e = (torch.rand(size, dtype=dtype, generator=generator) for _ in range(2))
    M, e = (M * 3).requires_grad_(), (e * 0.6).requires_grad_()
    v = torch.randn(size, dtype=dtype, generator=generator)
    calls = _calls(v, effort)
    in_jax = _peers.optimistix(lambda xp, E, M, e: E - e * xp.sin(E) - M, _newton_in_jax, (M, e), v, axes=(0, 0))
    targets = {OURS: 1.05} | ({OURS_COMPILED: 0.4} if effort.compiler else {})
    name = f"Newton and derivatives, {size:.0e}".replace("e+0", "e")
    return Workload("Kepler", name, dtype, both_ways(calls, (M, e), v) + in_jax, truth(M, e, v), targets)


def _calls(v, effort):
    ours = fi.custom_inverse(newton, f, event_dim=0)
    calls = {
        LIMIT: Handwritten.apply,
        OURS: ours,
        AFTERNOON: lambda M, e: _afternoon.Numbers.apply(newton, f, M, e),
        **_peers.torchopt(newton, residual, v),
        **_peers.xitorch(newton, residual, v),
        **_peers.zuko(newton, f),
    }
    if effort.compiler:
        calls |= {OURS_COMPILED: compiled(ours, effort), LIMIT_COMPILED: compiled(Handwritten.apply, effort)}
    return calls


def truth(M, e, v):
    """In float64, by bisection."""
    M, e, v = (t.detach().double().numpy() for t in (M, e, v))
    low, high = M - 1, M + 1
    for _ in range(54):
        E = (low + high) / 2
        above = E - e * np.sin(E) > M
        low, high = np.where(above, low, E), np.where(above, E, high)
    return E, v / (1 - e * np.cos(E)), v * np.sin(E) / (1 - e * np.cos(E))


def _newton_in_jax(M, e):
    import jax.numpy as jnp

    E = M + e * jnp.sin(M)
    for _ in range(STEPS):
        E = E - (E - e * jnp.sin(E) - M) / (1 - e * jnp.cos(E))
    return E


def rows(effort):
    size = 7 if effort.tiny else 10**6
    return measured((workload(size, dtype, effort) for dtype in effort.dtypes), effort)


if __name__ == "__main__":
    main(__doc__, rows)
