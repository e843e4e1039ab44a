"""Complex conjugates and signs that torch has put off: g sees the numbers themselves."""

import numpy as np
import pytest
import torch
from helpers import assert_close
from torch.func import grad, vmap

import functorch_inverse as fi

Z = torch.tensor([0.5 + 1j, -1.0 + 0.2j], dtype=torch.complex128)


def g(x):
    return np.arcsinh(x.numpy())


@pytest.fixture(params=[0, None])
def h(request):
    return fi.custom_inverse(g, torch.sinh, event_dim=request.param)


@pytest.mark.parametrize("bit", [torch.conj, lambda z: z.conj().imag], ids=["conjugated", "negated"])
def test_numpy(h, bit):
    x = bit(Z)
    assert x.is_conj() or x.is_neg()
    assert_close(h(x), bit(Z).clone().asinh())
    z = Z.clone().requires_grad_()
    assert_close(torch.autograd.grad(h(bit(z)).abs().sum(), z), torch.autograd.grad(bit(z).asinh().abs().sum(), z))


@pytest.mark.parametrize("vmap_method", ["sequential", "broadcast"])
def test_vmap(vmap_method):
    h, x = fi.custom_inverse(g, torch.sinh, event_dim=0, vmap_method=vmap_method), torch.stack([Z, 2 * Z]).conj()
    assert_close(vmap(h)(x), x.clone().asinh())
    assert_close(vmap(grad(lambda x: h(x).sum()))(x.imag), (1 + x.imag**2).rsqrt())


def test_vmap_of_torch():
    h, x = fi.custom_inverse(torch.asinh, torch.sinh, vmap_method="vmap"), torch.stack([Z, 2 * Z]).conj()
    assert_close(vmap(h)(x), x.clone().asinh())


def test_other_rules():
    x = Z.conj().imag
    for h in (
        fi.custom_root(g, lambda y, x: y.sinh() - x),
        fi.custom_jacobian(g, lambda x: torch.diag((1 + x * x).rsqrt())),
        fi.finite_difference(g),
        fi.black_box(np.arcsinh),
    ):
        assert_close(h(x), x.clone().asinh())
