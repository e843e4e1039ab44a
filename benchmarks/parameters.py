"""An MLP block and its parameters: f(y) = y + W2 tanh(W1 y + b1) + b2, forward and backward to x and to all parameters.

g is a lookup, as in benchmarks/_vectors.py. The limit writes J = I + W2 diag(1 - h^2) W1, one LU, and all gradients by
their formulas.
"""

import functools

import numpy as np
import torch
from torch import nn

import functorch_inverse as fi
from benchmarks import _afternoon, _peers
from benchmarks._report import main, measured
from benchmarks._timing import AFTERNOON, LIMIT, OURS, Contender, Workload, both_ways


class Block(nn.Module):
    """y + W2 tanh(W1 y + b1) + b2."""

    def __init__(self, n, hidden, dtype):
        super().__init__()
        self.first, self.second = nn.Linear(n, hidden, dtype=dtype), nn.Linear(hidden, n, dtype=dtype)

    def forward(self, y):
        return y + self.second(torch.tanh(self.first(y)))


class Handwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g, W1, b1, W2, b2):
        y = g(x)
        ctx.save_for_backward(y, W1, b1, W2)
        return y

    @staticmethod
    def backward(ctx, v):
        y, W1, b1, W2 = ctx.saved_tensors
        h = torch.tanh(torch.addmm(b1, y, W1.T))
        slope = 1 - h * h
        J = (W2 * slope.unsqueeze(-2)) @ W1
        J.diagonal(dim1=-2, dim2=-1).add_(1)
        lu, pivots, _ = torch.linalg.lu_factor_ex(J.mT)
        u = torch.linalg.lu_solve(lu, pivots, v.unsqueeze(-1)).squeeze(-1)
        inner = (u @ W2).mul_(slope)
        return u, None, -(inner.T @ y), -inner.sum(0), -(u.T @ h), -u.sum(0)


def truth(x, y, v, W1, b1, W2, b2):
    """In float64 by NumPy."""
    y, v, W1, b1, W2 = (t.detach().double().numpy() for t in (y, v, W1, b1, W2))
    h = np.tanh(y @ W1.T + b1)
    J = np.eye(y.shape[-1]) + np.einsum("ih,bh,hj->bij", W2, 1 - h**2, W1)
    u = np.linalg.solve(J.swapaxes(-1, -2), v[..., None])[..., 0]
    inner = (u @ W2) * (1 - h**2)
    return y, u, -inner.T @ y, -inner.sum(0), -u.T @ h, -u.sum(0)


def workload(b, n, hidden, dtype):
    torch.manual_seed(0)
    block = Block(n, hidden, dtype)
    y, v = torch.randn(b, n, dtype=dtype), torch.randn(b, n, dtype=dtype)
    x = block(y).detach().requires_grad_()
    inputs = x, *block.parameters()
    contenders = [*both_ways(_calls(block, y, v), inputs, v), *_in_jax(inputs, y, v)]
    return Workload("x and parameters", f"MLP block, {b} x {n}", dtype, contenders, truth(x, y, v, *inputs[1:]), {OURS: 1.75})


def _calls(block, y, v):
    def g(x, *parameters):
        return y.clone()

    def residual(y, x, W1, b1, W2, b2):
        return y + torch.tanh(y @ W1.T + b1) @ W2.T + b2 - x

    ours = fi.custom_inverse(g, block, event_dim=1)
    return {
        LIMIT: lambda x, *parameters: Handwritten.apply(x, g, *parameters),
        OURS: lambda x, *_: ours(x),  # it finds the parameters of the module by itself
        AFTERNOON: lambda x, *_: _afternoon.implicit_trick(g(x), block, x),
        **_peers.torchopt(g, residual, v),
        **_peers.xitorch(g, residual, v),
    }


def _in_jax(inputs, y, v) -> list[Contender]:
    def residual(xp, y, x, W1, b1, W2, b2, _table):
        return y + W2 @ xp.tanh(W1 @ y + b1) + b2 - x

    return _peers.optimistix(residual, lambda *given: given[-1], inputs, v, constants=(y,), axes=(0, None, None, None, None))


def rows(effort):
    sizes = (2, 3, 4) if effort.tiny else (1024, 8, 32)
    return measured(map(functools.partial(workload, *sizes), effort.dtypes), effort)


if __name__ == "__main__":
    main(__doc__, rows)
