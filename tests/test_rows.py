"""All rows of a Jacobian at once: right for every function, also where an operation has no rule of its own."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

import functorch_inverse as fi
from functorch_inverse import operators

N = 8
torch.manual_seed(0)
A = torch.randn(N, N, dtype=torch.float64) / 4
NET = nn.Sequential(nn.Linear(N, 5), nn.Tanh(), nn.Linear(5, N), nn.GELU(), nn.Linear(N, N)).double()


class Doubled(torch.autograd.Function):
    """A backward written in Python, which looks at what it is given."""

    @staticmethod
    def forward(ctx, y):
        return 2 * y

    @staticmethod
    def backward(ctx, g):
        assert type(g) is torch.Tensor
        return 2 * g


def put(y):
    z = y.clone()
    z[..., 0] = y[..., 1]
    return z


FUNCTIONS = {
    "layer": lambda y: 2 * y + torch.tanh(y @ A),
    "network": lambda y: 3 * y + NET(y),
    "elementwise": lambda y: 3 * y + torch.sin(y) / (1 + y**2) - y.sigmoid() + F.softplus(y) + F.silu(y),
    "kinks": lambda y: 3 * y + F.relu(y) + F.elu(y) + F.leaky_relu(y) + y.clamp(-1, 1) + y.abs(),
    "branches": lambda y: torch.where(y > 0, 2 * y, y.exp()) @ (A + 2 * torch.eye(N)),
    "linear": lambda y: y @ (A + 2 * torch.eye(N)),
    "scaled": lambda y: 2 * y,
    "quotient": lambda y: (3 + y) / (4 + torch.tanh(y @ A)),
    "products": lambda y: 2 * y + torch.tanh(y @ A) * torch.tanh(y @ A.mT),
    "coupling": lambda y: torch.cat([y[..., :3], y[..., 3:] * y[..., :3].sum(-1, keepdim=True).exp()], -1),
    "sums": lambda y: 2 * y + y.sin().sum(-1, keepdim=True),
    "softmax": lambda y: y + F.softmax(y, -1),
    "sorted": lambda y: 2 * y + y.sort(-1).values,
    "in place": lambda y: 2 * y + put(y),
    "batched products": lambda y: 2 * y + (A @ y.sin().unsqueeze(-1)).squeeze(-1),
    "precision": lambda y: 2 * y + torch.tanh(y.float() @ A.float()).double(),
    "python": lambda y: y + Doubled.apply(y),
}


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_by_autograd(name, batch):
    f = FUNCTIONS[name]
    y = torch.randn(*batch, N, dtype=torch.float64)
    x = f(y).detach().requires_grad_()
    v = torch.randn_like(y)
    got = torch.autograd.grad(fi.custom_inverse(lambda x: y, f, event_dim=1)(x), x, v)
    rows = [torch.autograd.functional.jacobian(f, sample) for sample in y.reshape(-1, N)]
    want = torch.linalg.solve(torch.stack(rows).mT, v.reshape(-1, N, 1)).reshape(v.shape)
    assert_close(got, (want,), 1e-5 if name == "precision" else 1e-9)


def test_one_pass_for_all_rows(monkeypatch):
    """n backward passes of f would be the cost of n samples."""
    monkeypatch.setattr(operators, "jacobian", None)
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)
    for name in ("layer", "network", "elementwise", "linear"):
        y = torch.randn(4, N, dtype=torch.float64)
        torch.autograd.grad(fi.custom_inverse(lambda x, y=y: y, FUNCTIONS[name], event_dim=1)(x).sum(), x)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "python"])
def test_under_vmap(name):
    """f sees single samples; its graph has the dims that vmap puts in and takes out."""
    f, y = FUNCTIONS[name], torch.randn(4, N, dtype=torch.float64)
    got = torch.vmap(torch.func.jacrev(fi.custom_inverse(lambda x: y.clone(), f, event_dim=1)))(f(y).detach())
    rows = [torch.autograd.functional.jacobian(f, sample) for sample in y]
    assert_close([got], [torch.linalg.inv(torch.stack(rows))], 1e-5 if name == "precision" else 1e-9)


def test_one_pass_for_all_rows_under_vmap(monkeypatch):
    """The dims that vmap puts in and takes out cost no rows."""
    monkeypatch.setattr(operators, "jacobian", None)
    for name in ("layer", "network", "elementwise", "linear"):
        y = torch.randn(4, N, dtype=torch.float64)
        h = fi.custom_inverse(lambda x, y=y: y.clone(), FUNCTIONS[name], event_dim=1)
        assert torch.vmap(torch.func.jacrev(h))(torch.randn(4, N, dtype=torch.float64)).isfinite().all()


def test_a_shared_jacobian_is_not_changed():
    """A is the same for all samples, and in f's own memory."""
    before = A.clone()
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)
    y = fi.custom_inverse(lambda x: x, FUNCTIONS["linear"], event_dim=1)(x)
    torch.autograd.grad(y.sum(), x)
    assert torch.equal(A, before)
