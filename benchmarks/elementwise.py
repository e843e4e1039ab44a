"""Numbers, one by one: the arcsine by its inverse, f(y) = sin y, forward and backward.

The limit knows f' = cos and computes v / cos(y); everyone else gets it by differentiating f. g is torch.asin for all.
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

TARGETS = {10**2: {OURS: 2.0}, 10**4: {OURS: 2.0}, 10**6: {OURS: 1.15, OURS_COMPILED: 0.6}}


class Handwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.asin(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, v):
        (y,) = ctx.saved_tensors
        return v / torch.cos(y)


OWN = {
    LIMIT: Handwritten.apply,
    OURS: fi.custom_inverse(torch.asin, torch.sin, event_dim=0),
    AFTERNOON: lambda x: _afternoon.Numbers.apply(torch.asin, torch.sin, x),
}


def draw(size, dtype, device="cpu"):
    """x, a cotangent, and the truth by NumPy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size, dtype=dtype, generator=generator) * 1.8 - 0.9
    v = torch.randn(size, dtype=dtype, generator=generator)
    exact = x.double().numpy()
    return x.to(device).requires_grad_(), v.to(device), (np.arcsin(exact), v.double().numpy() / np.sqrt(1 - exact**2))


def workload(size, dtype, effort):
    x, v, truth = draw(size, dtype)
    calls = OWN | _peers.torchopt(torch.asin, residual, v) | _peers.xitorch(torch.asin, residual, v)
    calls |= _peers.zuko(torch.asin, torch.sin)
    if effort.compiler and OURS_COMPILED in TARGETS.get(size, {}):
        calls |= {OURS_COMPILED: compiled(OWN[OURS], effort), LIMIT_COMPILED: compiled(OWN[LIMIT], effort)}
    contenders = both_ways(calls, (x,), v)
    contenders += _peers.optimistix(lambda xp, y, x: xp.sin(y) - x, _arcsine, (x,), v, axes=(0,))
    name = f"asin by sin, {size:.0e}".replace("e+0", "e")
    return Workload("elementwise", name, dtype, contenders, truth, TARGETS.get(size, {}))


def residual(y, x):
    return torch.sin(y) - x


def _arcsine(x):
    import jax

    return jax.numpy.arcsin(x)


def rows(effort):
    sizes = (7,) if effort.tiny else TARGETS
    return measured((workload(size, dtype, effort) for dtype in effort.dtypes for size in sizes), effort)


if __name__ == "__main__":
    main(__doc__, rows)
