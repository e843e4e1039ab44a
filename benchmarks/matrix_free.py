"""Vectors, matrix-free: GMRES with vector-Jacobian products of f, against a Neumann series written for this one Jacobian.

The problem stands in benchmarks/_vectors.py. J = I + B with |B| < 1, so the limit needs no more than u <- v - B^T u, with
B^T by its formula, until nothing changes to the same tolerance as the others have.
"""

import torch
from torch.func import vjp

import functorch_inverse as fi
from benchmarks._peers import RTOL, gmres
from benchmarks._report import main, measured
from benchmarks._timing import AFTERNOON, LIMIT, OURS, Workload, both_ways
from benchmarks._vectors import Vectors, jax_peers, torch_peers

SIZES = ((256, 32), (32, 128), (4, 512))


class Neumann(torch.autograd.Function):
    """The limit."""

    @staticmethod
    def forward(ctx, x, problem):
        y = problem.g(x)
        ctx.problem = problem
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, v):
        (y,), A = ctx.saved_tensors, ctx.problem.A
        slope = torch.tanh(y @ A.T).square_().mul_(0.3).sub_(0.3)
        return fixed_point(lambda u: torch.addmm(v, slope * u, A), v), None


class Series(torch.autograd.Function):
    """The afternoon: the same series with the products of any f."""

    @staticmethod
    def forward(ctx, g, f, x):
        y = g(x)
        ctx.f = f
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, v):
        _, pull = vjp(ctx.f, ctx.saved_tensors[0])
        return None, None, fixed_point(lambda u: v + u - pull(u)[0], v)


def fixed_point(step, u):
    enough = RTOL[u.dtype] * torch.linalg.vector_norm(u)
    while True:
        new = step(u)
        if torch.linalg.vector_norm(new - u) <= enough:
            return new
        u = new


def workload(b, n, dtype):
    p = Vectors.draw(b, n, dtype)
    calls = {LIMIT: lambda x: Neumann.apply(x, p)}
    if hasattr(fi, "GMRES"):
        calls[OURS] = fi.custom_inverse(p.g, p.f, event_dim=1, linear_solver=fi.GMRES())
    calls[AFTERNOON] = lambda x: Series.apply(p.g, p.f, x)
    contenders = both_ways(calls | torch_peers(p), (p.x,), p.v) + jax_peers(p, solver=gmres)
    return Workload("vectors, GMRES", f"{b} x {n}", dtype, contenders, p.truth(), {OURS: 1.5})


def rows(effort):
    sizes = [(2, 3)] if effort.tiny else SIZES
    return measured((workload(b, n, dtype) for dtype in effort.dtypes for b, n in sizes), effort)


if __name__ == "__main__":
    main(__doc__, rows)
