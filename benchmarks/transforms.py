"""All of the Jacobian, and Hessian-vector products, against the bare formula: no autograd at all, one LU, the fewest possible
solves.

The problem stands in benchmarks/_vectors.py. "jacrev" and "jacfwd" ask for the Jacobian of the whole batch, (b, n, b, n),
most of it zeros, which the formula just writes; "vmap(jacrev)" and "vmap(jacfwd)" for that of every sample, (b, n, n). The
Hessian is that of sum(sin(g(x))).
"""

import functools

import numpy as np
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import functorch_inverse as fi
from benchmarks import _afternoon
from benchmarks._report import main, measured
from benchmarks._timing import AFTERNOON, LIMIT, OURS, Contender, Workload
from benchmarks._vectors import Vectors, jax_peers, torch_peers

ORDERS = {"jacrev": jacrev, "jacfwd": jacfwd}

# --- Jacobians -------------------------------------------------------------------------------------


def jacobian(mode, each, b, n, dtype):
    """The Jacobian by torch.func.jacrev or jacfwd, of each sample or of the whole batch."""
    p, transform = Vectors.draw(b, n, dtype), ORDERS[mode]
    x, ours = p.x.detach(), fi.custom_inverse(p.g, p.f, event_dim=1)
    calls = {
        OURS: lambda: vmap(transform(ours))(x) if each else transform(ours)(x),
        AFTERNOON: lambda: vmap(transform(_looked_up(p)))(x, p.y) if each else transform(_looked_up(p))(x, p.y),
    }
    for peer, h in torch_peers(p).items():
        calls[peer] = functools.partial(_row_by_row if each and mode == "jacrev" else _transformed, h, transform, p.x)
    contenders = [Contender(name, lambda call=call: (call(),)) for name, call in calls.items()]
    contenders += jax_peers(p, work=functools.partial(_row_by_row_in_jax if each else _transformed_in_jax, mode))
    limit = Contender(LIMIT, lambda: (_inverse(p, each),))
    name = f"vmap({mode})" if each else mode
    return Workload("Jacobian", f"{name}, {b} x {n}", dtype, [limit, *contenders], (_truth(p, each),), {OURS: 3.0})


def _looked_up(p):
    """The afternoon's g under vmap sees one sample, so its row of the table travels with it."""
    return lambda x, y: _afternoon.Vectors.apply(lambda _, y: y.clone(), p.f, x, y)


def _transformed(h, transform, x):
    return transform(h)(x.detach())


def _row_by_row(h, _transform, x):
    """Who cannot be vmapped goes backward once for each output, for all samples together."""
    y = h(x)
    rows = [torch.autograd.grad(y, x, e.expand_as(y), retain_graph=True)[0] for e in torch.eye(x.shape[-1], dtype=x.dtype)]
    return torch.stack(rows, -2)


def _transformed_in_jax(mode, jax, h, inputs, _v):
    return (getattr(jax, mode)(h)(*inputs),)


def _row_by_row_in_jax(mode, jax, h, inputs, v):
    """One pass for each row or column, for all samples together, under vmap."""
    basis = jax.numpy.eye(v.shape[-1], dtype=v.dtype)
    if mode == "jacrev":
        _, pull = jax.vjp(h, *inputs)
        rows = jax.vmap(lambda e: pull(jax.numpy.broadcast_to(e, v.shape))[0])(basis)
        return (jax.numpy.moveaxis(rows, 0, 1),)
    columns = jax.vmap(lambda e: jax.jvp(h, inputs, (jax.numpy.broadcast_to(e, v.shape),))[1])(basis)
    return (jax.numpy.moveaxis(columns, 0, 2),)


def _inverse(p, each):
    """The limit: the inverses of J by its formula, scattered into zeros for the whole batch."""
    inverses = torch.linalg.inv(p.jacobian(p.y))
    if each:
        return inverses
    whole = p.y.new_zeros(*p.y.shape, *p.y.shape)
    whole.diagonal(dim1=0, dim2=2).copy_(inverses.permute(1, 2, 0))
    return whole


def _truth(p, each):
    y, A = p.y.double().numpy(), p.A.double().numpy()
    inverses = np.linalg.inv(np.eye(A.shape[0]) + 0.3 * (1 - np.tanh(y @ A.T) ** 2)[..., None] * A)
    if each:
        return inverses
    whole = np.zeros(2 * y.shape)
    for i, inverse in enumerate(inverses):
        whole[i, :, i] = inverse
    return whole


# --- Hessian-vector products -----------------------------------------------------------------------


def hessian(mode, b, n, dtype):
    """The product of the Hessian of sum(sin(g(x))) with v."""
    p = Vectors.draw(b, n, dtype)
    ours = fi.custom_inverse(p.g, p.f, event_dim=1)
    calls = {OURS: ours, AFTERNOON: lambda x: _afternoon.Vectors.apply(p.g, p.f, x), **torch_peers(p)}
    contenders = [Contender(name, lambda call=call: (PRODUCTS[mode](call, p.x, p.v),)) for name, call in calls.items()]
    limit = Contender(LIMIT, lambda: (product(p),))
    return Workload("Hessian-vector", f"{mode}, {b} x {n}", dtype, [limit, *contenders, *_in_jax(p)], (_exact(p),), {OURS: 4.0})


def forward_over_reverse(h, x, v):
    return jvp(grad(lambda x: torch.sin(h(x)).sum()), (x.detach(),), (v,))[1]


def twice(h, x, v):
    (first,) = torch.autograd.grad(torch.sin(h(x)).sum(), x, create_graph=True)
    return torch.autograd.grad(first, x, v)[0]


PRODUCTS = {"jvp of grad": forward_over_reverse, "backward twice": twice}


def product(p):
    """The limit. J^T s = cos y  =>  J^T ds = -sin(y) dy - dJ^T s with J dy = v."""
    tanh = torch.tanh(p.y @ p.A.T)
    lu, pivots, _ = torch.linalg.lu_factor_ex(p.jacobian(p.y).mT)

    def solve(b, transpose):
        return torch.linalg.lu_solve(lu, pivots, b.unsqueeze(-1), adjoint=not transpose).squeeze(-1)

    s, dy = solve(torch.cos(p.y), True), solve(p.v, False)
    slope = -0.6 * tanh * (1 - tanh * tanh) * (dy @ p.A.T)
    return solve(-torch.sin(p.y) * dy - (slope * s) @ p.A, True)


def _exact(p):
    """The same in float64."""
    return product(Vectors(*(t.detach().double() for t in (p.A, p.x, p.y, p.v))))


def _in_jax(p):
    def work(jax, h, inputs, v):
        return (jax.jvp(jax.grad(lambda x: jax.numpy.sin(h(x)).sum()), inputs, (v,))[1],)

    return jax_peers(p, work=work)


# --- all -------------------------------------------------------------------------------------------


def workloads(effort):
    small, large = [((2, 3), (2, 3))] * 2 if effort.tiny else (((64, 16), (64, 8)), ((1024, 32), (1024, 32)))
    for dtype in effort.dtypes:
        for each in (True, False):
            yield from (jacobian(mode, each, *small[0], dtype) for mode in ORDERS)
        yield from (hessian(mode, *small[1], dtype) for mode in PRODUCTS)
    for dtype in effort.dtypes:
        yield from (jacobian(mode, True, *large[0], dtype) for mode in ORDERS)
        yield from (hessian(mode, *large[1], dtype) for mode in PRODUCTS)


def rows(effort):
    return measured(workloads(effort), effort)


if __name__ == "__main__":
    main(__doc__, rows)
