"""The meta device: shapes without values go through everything that does not have to look at values."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import functorch_inverse as fi

DIRECT = [
    fi.LU(), fi.LU(on_singular="nan"), fi.Cholesky(), fi.Triangular(lower=True), fi.Banded(1, 1), fi.LeastSquares(),
]  # fmt: skip
ITERATED = [fi.GMRES(), fi.CG(), fi.NormalCG(), fi.BiCGStab()]


def f(y):
    return y.sinh() + y.roll(1, -1) / 10


def inverse(event_dim, solver=None, **options):
    return fi.custom_inverse(torch.empty_like, f, event_dim=event_dim, linear_solver=solver, **options)


def assert_meta(found, *shape):
    assert found.is_meta
    assert (found.shape, found.dtype) == (shape, torch.float32)


@pytest.mark.parametrize("solver", DIRECT, ids=repr)
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 1), (0, 5)])
@pytest.mark.parametrize("order", [False, True])
def test_backward(solver, shape, order):
    x = torch.empty(shape, device="meta", requires_grad=True)
    y = inverse(1, solver)(x)
    assert_meta(y, *shape)
    assert_meta(torch.autograd.grad(y.sum(), x, create_graph=order)[0], *shape)


@pytest.mark.parametrize("solver", DIRECT, ids=repr)
def test_transforms(solver):
    h, x = inverse(1, solver), torch.empty(5, device="meta")
    assert_meta(jacrev(h)(x), 5, 5)
    assert_meta(jacfwd(h)(x), 5, 5)
    assert_meta(hessian(lambda x: h(x).sum())(x), 5, 5)
    assert_meta(jvp(h, (x,), (x,))[1], 5)
    assert_meta(vmap(jacrev(h))(x.expand(3, 5)), 3, 5, 5)


FUNCTIONS = {
    "whole": inverse(None),
    "elementwise": inverse(0),
    "checked": inverse(1, check=True),
    "root": fi.custom_root(torch.empty_like, lambda y, x: f(y) - x, event_dim=1, check=True),
    "Jacobian": fi.custom_jacobian(torch.empty_like, torch.diag_embed, event_dim=1),
    "differences": fi.finite_difference(torch.asinh, event_dim=0),
    "differences, auto": fi.finite_difference(torch.asinh, event_dim=0, order="auto"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_rules(name):
    h, x = FUNCTIONS[name], torch.empty(5, device="meta", requires_grad=True)
    assert_meta(torch.autograd.grad(h(x).sum(), x)[0], 5)
    assert_meta(grad(lambda x: h(x).sum())(x.detach()), 5)


@pytest.mark.parametrize("solver", ITERATED, ids=repr)
def test_an_iteration_says_what_it_lacks(solver):
    x = torch.empty(5, device="meta", requires_grad=True)
    with pytest.raises(NotImplementedError, match="meta tensors"):
        inverse(1, solver)(x).sum().backward()
