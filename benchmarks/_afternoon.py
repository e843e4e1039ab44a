"""What a competent user writes in an afternoon: right, general, and with no more thought about cost than is sensible."""

import torch
from torch.func import jacrev, vmap


class Numbers(torch.autograd.Function):
    """y = g(x, *args) elementwise, derivatives from f(y, *args) = x by autograd."""

    @staticmethod
    def forward(ctx, g, f, x, *args):
        y = g(x, *args)
        ctx.f = f
        ctx.save_for_backward(y, *args)
        return y

    @staticmethod
    def backward(ctx, v):
        y, *args = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            x = ctx.f(y, *args)
        slope, *_ = torch.autograd.grad(x, y, torch.ones_like(x), retain_graph=True)
        u = v / slope
        return None, None, u, *(torch.autograd.grad(x, args, -u) if args else ())


class Vectors(torch.autograd.Function):
    """y = g(x, *constants) for vectors (b, n), derivatives from f(y) = x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g, f, x, *constants):
        return g(x, *constants)

    @staticmethod
    def setup_context(ctx, inputs, y):
        _, ctx.f, _, *constants = inputs
        ctx.unused = (None,) * len(constants)
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)

    @staticmethod
    def backward(ctx, v):
        (y,) = ctx.saved_tensors
        return None, None, torch.linalg.solve(_jacobian(ctx.f, y).mT, v.unsqueeze(-1)).squeeze(-1), *ctx.unused

    @staticmethod
    def jvp(ctx, _g, _f, dx, *_constants):
        (y,) = ctx.saved_tensors
        return torch.linalg.solve(_jacobian(ctx.f, y), dx.unsqueeze(-1)).squeeze(-1)


def _jacobian(f, y):
    jacobian = jacrev(f)
    return vmap(jacobian)(y) if y.ndim > 1 else jacobian(y)


def implicit_trick(y, f, x):
    """y - J^-1 (f(y) - x) with J constant: the value y, and its first derivatives to x and to all that f contains."""
    y = y.detach()
    J = vmap(jacrev(f))(y).detach()
    return y - torch.linalg.solve(J, (f(y) - x).unsqueeze(-1)).squeeze(-1)
