"""One long vector with a tridiagonal Jacobian: a reaction-diffusion step, f(y)_i = 3 y_i + y_i^3 - 0.8 y_(i-1) - 1.2 y_(i+1).

g is a lookup, as in benchmarks/_vectors.py. The limit hands the three bands to scipy.linalg.solve_banded.
"""

import numpy as np
import torch
from torch.func import vjp

import functorch_inverse as fi
from benchmarks import _peers
from benchmarks._report import main, measured
from benchmarks._timing import AFTERNOON, LIMIT, OURS, Workload, both_ways

BELOW, ABOVE = -0.8, -1.2  # of the diagonal of J
SIZES = (10**4, 10**5)


def f(y):
    zero = torch.zeros_like(y[..., :1])
    before, after = torch.cat([zero, y[..., :-1]], -1), torch.cat([y[..., 1:], zero], -1)
    return 3 * y + y**3 + BELOW * before + ABOVE * after


def residual(y, x):
    return f(y) - x


def solve_transposed(y, v):
    """J^-T v by NumPy and SciPy."""
    from scipy.linalg import solve_banded

    bands = np.empty((3, y.size), y.dtype)
    bands[0], bands[1], bands[2] = BELOW, 3 + 3 * y * y, ABOVE
    return solve_banded((1, 1), bands, v, overwrite_ab=True, check_finite=False)


class Handwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g):
        y = g(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, v):
        return torch.from_numpy(solve_transposed(ctx.saved_tensors[0].numpy(), v.numpy())), None


class Iterative(torch.autograd.Function):
    """The afternoon: GMRES of SciPy with the products of any f."""

    @staticmethod
    def forward(ctx, x, g, f):
        y = g(x)
        ctx.f = f
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, v):
        from scipy.sparse.linalg import LinearOperator, gmres

        (y,) = ctx.saved_tensors
        _, pull = vjp(ctx.f, y)

        def product(u):
            return pull(torch.from_numpy(u.ravel()).to(v.dtype))[0].numpy()

        operator = LinearOperator((y.numel(),) * 2, matvec=product, dtype=v.numpy().dtype)
        u, failed = gmres(operator, v.numpy(), rtol=_peers.RTOL[v.dtype])
        if failed:
            raise RuntimeError(f"gmres: {failed}")
        return torch.from_numpy(u), None, None


def workload(n, dtype):
    generator = torch.Generator().manual_seed(0)
    y, v = (torch.randn(n, dtype=dtype, generator=generator) for _ in range(2))
    x = f(y).requires_grad_()

    def g(x):
        return y.clone()

    calls = {LIMIT: lambda x: Handwritten.apply(x, g)}
    if hasattr(fi, "Banded"):
        calls[OURS] = fi.custom_inverse(g, f, event_dim=1, linear_solver=fi.Banded(1, 1))
    calls[AFTERNOON] = lambda x: Iterative.apply(x, g, f)
    calls |= _peers.torchopt(g, residual, v) | _peers.xitorch(g, residual, v)
    contenders = both_ways(calls, (x,), v) + _in_jax(x, y, v)
    truth = y.double().numpy(), solve_transposed(y.double().numpy(), v.double().numpy())
    name = f"tridiagonal, {n:.0e}".replace("e+0", "e")
    return Workload("banded", name, dtype, contenders, truth, {OURS: 2.0})


def _in_jax(x, y, v):
    """Its tridiagonal solver wants the diagonals, which nothing finds for it: GMRES."""

    def residual(xp, y, x, _table):
        around = xp.pad(y, 1)
        return 3 * y + y**3 + BELOW * around[:-2] + ABOVE * around[2:] - x

    return _peers.optimistix(residual, lambda x, y: y, (x,), v, constants=(y,), axes=None, solver=_peers.gmres)


def rows(effort):
    sizes = (5,) if effort.tiny else SIZES
    return measured((workload(n, dtype) for dtype in effort.dtypes for n in sizes), effort)


if __name__ == "__main__":
    main(__doc__, rows)
