"""The vector problem that several claims share: f(y) = y + 0.3 tanh(A y) for each sample.

g is a lookup: y is drawn first, x = f(y), and g(x) hands out a copy of y. So g costs nothing, is the same for everyone, and
the figures are those of the derivative alone. A is random with entries of variance 1/n, so that f is a bijection with a
well conditioned Jacobian J = I + 0.3 diag(1 - tanh(A y)^2) A.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks import _afternoon, _peers
from benchmarks._timing import AFTERNOON, LIMIT, OURS, Contender, both_ways


@dataclass(frozen=True, eq=False)
class Vectors:
    """b samples of n numbers, a cotangent v, and the closed form of everything."""

    A: Tensor
    x: Tensor
    y: Tensor
    v: Tensor

    @staticmethod
    def draw(b: int, n: int, dtype: torch.dtype, device: str = "cpu") -> "Vectors":
        generator = torch.Generator().manual_seed(0)
        A, y, v = (torch.randn(shape, n, dtype=dtype, generator=generator) for shape in (n, b, b))
        A, y, v = (A / n**0.5).to(device), y.to(device), v.to(device)
        x = y + 0.3 * torch.tanh(y @ A.T)
        return Vectors(A, x.requires_grad_(), y, v)

    # Functions that hold what they read and no more: a method would hold x, too, and every contender with it.
    @property
    def f(self) -> Callable[[Tensor], Tensor]:
        A = self.A
        return lambda y: y + 0.3 * torch.tanh(y @ A.T)

    @property
    def g(self) -> Callable[[Tensor], Tensor]:
        y = self.y
        return lambda x: y.clone()

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        return self.f(y) - x

    def jacobian(self, y: Tensor) -> Tensor:
        return formula(y, self.A)

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """y and J^-T v in float64 by NumPy."""
        y, A, v = (t.double().cpu().numpy() for t in (self.y, self.A, self.v))
        J = np.eye(A.shape[0]) + 0.3 * (1 - np.tanh(y @ A.T) ** 2)[..., None] * A
        return y, np.linalg.solve(J.swapaxes(-1, -2), v[..., None])[..., 0]


def formula(y: Tensor, A: Tensor) -> Tensor:
    """J, with as few passes over it as torch allows."""
    J = torch.tanh(y @ A.T).square_().mul_(-0.3).add_(0.3).unsqueeze(-1) * A
    J.diagonal(dim1=-2, dim2=-1).add_(1)
    return J


class Handwritten(torch.autograd.Function):
    """The limit: J by its formula, one LU."""

    @staticmethod
    def forward(ctx, x, problem):
        y = problem.g(x)
        ctx.problem = problem
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, v):
        (y,) = ctx.saved_tensors
        # LAPACK stores columns: J^T of a J stored by rows is factorised without a copy.
        lu, pivots, _ = torch.linalg.lu_factor_ex(ctx.problem.jacobian(y).mT)
        return torch.linalg.lu_solve(lu, pivots, v.unsqueeze(-1)).squeeze(-1), None


def contenders(p: Vectors, ours) -> list[Contender]:
    """Everyone, for a forward and a backward; `ours` is the custom_inverse to race."""
    return both_ways(own_calls(p, ours) | torch_peers(p), (p.x,), p.v) + jax_peers(p)


def own_calls(p: Vectors, ours) -> _peers.Calls:
    return {
        LIMIT: lambda x: Handwritten.apply(x, p),
        OURS: ours,
        AFTERNOON: lambda x: _afternoon.Vectors.apply(p.g, p.f, x),
    }


def torch_peers(p: Vectors) -> _peers.Calls:
    return _peers.torchopt(p.g, p.residual, p.v) | _peers.xitorch(p.g, p.residual, p.v)


def jax_peers(p: Vectors, **options) -> list[Contender]:
    return _peers.optimistix(residual, lambda x, A, y: y, (p.x,), p.v, constants=(p.A, p.y), axes=(0,), **options)


def residual(xp, y, x, A, _table):
    """f(y) - x for one sample, in JAX."""
    return y + 0.3 * xp.tanh(A @ y) - x
