"""All rows of a Jacobian at once: right for every function, also where an operation has no rule of its own."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn

import functorch_inverse as fi
from functorch_inverse import _torch, operators
from functorch_inverse._graph import rows_together
from functorch_inverse._pullback import Pullback
from functorch_inverse._rows import jacobian_of_graph

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


MASK = torch.arange(N, dtype=torch.float64) % 2
INNER = nn.Sequential(nn.Linear(N // 2, 5), nn.ReLU(), nn.Linear(5, N)).double().requires_grad_(False)


def real_nvp(a, b):
    scale, shift = INNER(a).chunk(2, -1)
    return torch.cat([a, b * torch.exp(torch.tanh(scale)) + shift], -1)


def put(y):
    z = y.clone()
    z[..., 0] = y[..., 1]
    return z


SHALLOW = nn.Sequential(nn.Linear(N, 5), nn.Sigmoid(), nn.Linear(5, N)).double().requires_grad_(False)
DEEP = nn.Sequential(nn.Linear(N, 3), nn.Tanh(), nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, N)).double().requires_grad_(False)

FUNCTIONS = {
    "layer": lambda y: 2 * y + torch.tanh(y @ A),
    "network": lambda y: 3 * y + NET(y),
    "two networks": lambda y: 3 * y + SHALLOW(y) + torch.tanh(y @ A) * DEEP(y) + y.sin() @ A,
    "scaled network": lambda y: 2 * (3 + A[0]) * y + torch.tanh(0.5 * A[1] * DEEP(y) * A[2]) - DEEP(y).neg(),
    "activation first": lambda y: 3 * y + F.relu(y @ A).sigmoid() + y.tanh() @ A,
    "two activations": lambda y: 3 * y + torch.tanh(y @ A).sin() @ A.mT,
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
    "real NVP": lambda y: real_nvp(*y.chunk(2, -1)),
    "masked coupling": lambda y: MASK * y + (1 - MASK) * (y * torch.exp(torch.tanh((MASK * y) @ A)) + (MASK * y) @ A.mT),
    "planar": lambda y: y + A[0] * torch.tanh(y @ A[1]).unsqueeze(-1),
    "radial": lambda y: 2 * y + y / (1 + y.norm(dim=-1, keepdim=True)),
    "products by name": lambda y: 2 * y + torch.einsum("...i,ji->...j", y.sin(), A),
    "reversed": lambda y: 2 * y.flip(-1) + 0.1 * y.roll(1, -1) ** 2,
    "running sums": lambda y: 2 * y + y.cumsum(-1).tanh(),
    "neighbours": lambda y: torch.cat([2 * y[..., :1], 2 * y[..., 1:] + 0.1 * y[..., :-1] ** 2], -1),
    "one by one": lambda y: torch.stack([2 * y[..., 0] + y[..., 1].sin(), *(3 * y[..., i] for i in range(1, N))], -1),
    "clamped": lambda y: 2 * y + y.clamp(-0.5, 0.5) + y.masked_fill(y > 1, 0.0) * y.flip(-1),
    "pieces": lambda y: torch.cat([2 * t + t.prod(-1, keepdim=True) for t in y.split([1, 3, N - 4], -1)], -1),
    "as a matrix": lambda y: 2 * y + (torch.tanh(y.unflatten(-1, (2, -1))) @ A[:4, :4]).mT.flatten(-2),
    "heads": lambda y: 2 * y + torch.bmm(y.reshape(-1, 2, 4).sin(), A[:4, :4].expand(y.numel() // N, 4, 4)).reshape(y.shape),
    "two ways to mix": lambda y: (lambda h: h + torch.tanh(h @ A))(3 * y + y.flip(-1) + y.roll(1, -1)),
    "the mean of all": lambda y: 2 * y + y.sin().mean(-1, keepdim=True).expand_as(y) * y,
}
MIXING = list(FUNCTIONS)[-15:]
LAYERS = ["layer", "two networks", "scaled network", "activation first", "two activations"]


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (N,), (1, N), (4, 1, 5)])
@pytest.mark.parametrize("way", ["as one batch", "mixing all", "mixing much"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_by_autograd(name, batch, way, monkeypatch):
    """Also where there are as many samples as numbers in each, so that no dim may be taken for another."""
    if way != "as one batch":
        monkeypatch.setattr("functorch_inverse._graph._SMALL", 0)
        monkeypatch.setattr("functorch_inverse._rows._WORTH_MIXING", 1 if way == "mixing all" else 16)
    f = FUNCTIONS[name]
    y = torch.randn(*batch, N, dtype=torch.float64)
    x = f(y).detach().requires_grad_()
    v = torch.randn_like(y)
    got = torch.autograd.grad(fi.custom_inverse(lambda x: y, f, event_dim=1)(x), x, v)
    rows = [torch.autograd.functional.jacobian(f, sample) for sample in y.reshape(-1, N)]
    want = torch.linalg.solve(torch.stack(rows).mT, v.reshape(-1, N, 1)).reshape(v.shape)
    assert_close(got, (want,), 1e-5 if name == "precision" else 1e-9)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (20,)])
@pytest.mark.parametrize("chunk", [1, 3, N - 1, N, N + 2])
@pytest.mark.parametrize("name", [*LAYERS, "quotient", "elementwise", "linear", "scaled", "products"])
def test_some_rows_at_once(name, chunk, batch):
    """Each row is the same, with however many others it is pulled back."""
    f, y = FUNCTIONS[name], torch.randn(*batch, N, dtype=torch.float64)
    equation = operators.Equation("test", lambda y, _: (f(*y),), (1,), (1,))
    with torch.no_grad():
        got = operators.JacobianOperator(equation, (y,), ()).as_matrix(chunk)
    rows = [torch.autograd.functional.jacobian(f, sample) for sample in y.reshape(-1, N)]
    want = torch.stack(rows).reshape(*batch, N, N) if rows else y.new_zeros(*batch, N, N)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["layer", "linear", "scaled"])
@pytest.mark.parametrize("batch", [(1,), (3,)])
def test_the_rows_have_memory_of_their_own(name, batch):
    """They are overwritten by their factors: neither f's own matrices nor one row shared by all samples may lie there."""
    f, y, before = FUNCTIONS[name], torch.randn(*batch, N, dtype=torch.float64), A.clone()
    with torch.no_grad():
        graph = Pullback.of(lambda y, _: (f(*y),), (y,), (), ())
        first = jacobian_of_graph(graph.outputs[0], graph.y[0], N)
        want = first.clone()
        assert first.is_contiguous()
        first.fill_(torch.nan)
        torch.testing.assert_close(jacobian_of_graph(graph.outputs[0], graph.y[0], N), want, rtol=0, atol=0)
    assert torch.equal(A, before)


def test_one_pass_for_all_rows(monkeypatch):
    """n backward passes of f would be the cost of n samples."""
    monkeypatch.setattr(operators, "jacobian", None)
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)
    for name in ("layer", "network", "elementwise", "linear"):
        y = torch.randn(4, N, dtype=torch.float64)
        torch.autograd.grad(fi.custom_inverse(lambda x, y=y: y, FUNCTIONS[name], event_dim=1)(x).sum(), x)


@pytest.mark.parametrize("chunk", [1, 3, N])
@pytest.mark.parametrize("batch", [(4,), (N,), (2, 3)])
@pytest.mark.parametrize("name", MIXING)
def test_mixed_numbers_by_one_pass(name, batch, chunk, monkeypatch):
    """Slices, sums, permutations and products need no pass for each row either."""
    monkeypatch.setattr("functorch_inverse._rows._WORTH_MIXING", 1)
    f, y = FUNCTIONS[name], torch.randn(*batch, N, dtype=torch.float64)
    with torch.no_grad():
        graph = Pullback.of(lambda y, _: (f(*y),), (y,), (), ())
        got = jacobian_of_graph(graph.outputs[0], graph.y[0], chunk)
    assert got is not None
    rows = [torch.autograd.functional.jacobian(f, sample) for sample in y.reshape(-1, N)]
    torch.testing.assert_close(got, torch.stack(rows).reshape(*batch, N, N), rtol=0, atol=1e-12)


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


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (N,)])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("python", "network")])
def test_few_numbers_as_one_batch(name, batch):
    """A batch of cotangents for all rows; the memory is its own."""
    f, y = FUNCTIONS[name], torch.randn(*batch, N, dtype=torch.float64)
    with torch.no_grad():
        graph = Pullback.of(lambda y, _: (f(*y),), (y,), (), ())
        got = rows_together(graph.outputs[0], graph.y[0])
        rows = [torch.autograd.functional.jacobian(f, sample) for sample in y.reshape(-1, N)]
        torch.testing.assert_close(got, torch.stack(rows).reshape(*batch, N, N), rtol=0, atol=1e-12)
        got.fill_(torch.nan)
        assert torch.equal(f(y), graph.outputs[0])


def product(y):
    return y * y.prod(-1, keepdim=True)


@pytest.mark.parametrize("f", [product, lambda y: 2 * y + Doubled.apply(y), lambda y: y * y.detach()[..., :1].exp().item()])
def test_what_cannot_be_batched_goes_one_by_one(f):
    """The derivative of a product looks for zeros among its factors."""
    y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    x = f(y).detach().requires_grad_()
    (got,) = torch.autograd.grad(fi.custom_inverse(lambda x: y.clone(), f, event_dim=1)(x), x, torch.ones(3, dtype=y.dtype))
    J = torch.autograd.functional.jacobian(f, y)
    assert_close(got, torch.linalg.solve(J.mT, torch.ones_like(y)), 1e-13)


def test_a_failing_batch_leaves_no_transform_open():
    y = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    out = y * y.prod(-1, keepdim=True)
    out.register_hook(lambda g: g * g.sum().item())
    with pytest.raises(RuntimeError):
        rows_together(out, y)
    assert not _torch.transforms_active()


def test_a_shared_jacobian_is_not_changed():
    """A is the same for all samples, and in f's own memory."""
    before = A.clone()
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)
    y = fi.custom_inverse(lambda x: x, FUNCTIONS["linear"], event_dim=1)(x)
    torch.autograd.grad(y.sum(), x)
    assert torch.equal(A, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [(), (3,), (3000,), (0,)])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_small_vectors(n, batch, dtype):
    """Few numbers as one batch, few rows one by one; not contiguous, too."""
    y = torch.linspace(-1, 1, 2 * n * max(torch.Size(batch).numel(), 1), dtype=dtype)[: 2 * n * torch.Size(batch).numel()]
    y, B = y.reshape(*batch, 2 * n)[..., ::2], (A[:n, :n] / 8).to(dtype)
    x = y.clone().requires_grad_()
    v = y.cos()
    (got,) = torch.autograd.grad(fi.custom_inverse(lambda x: y.clone(), lambda y: y + y**3 @ B, event_dim=1)(x), x, v)
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    J = torch.eye(n, dtype=wide) + 3 * B.to(wide).mT * (y.to(wide) ** 2).unsqueeze(-2)
    want = torch.linalg.solve(J.mT, v.to(wide).unsqueeze(-1)).squeeze(-1).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kind", ["layer", "network", "both", "coupling"])
def test_many_small_vectors(n, kind, monkeypatch):
    """All rows at once, also where a pass of their own would be cheap; what mixes numbers goes one by one."""
    monkeypatch.setattr("functorch_inverse._graph._SMALL", 0)
    monkeypatch.setattr("functorch_inverse._graph._MANY_NUMBERS", 1)
    net = nn.Sequential(nn.Linear(n, 5), nn.Tanh(), nn.Linear(5, n)).double().requires_grad_(False)
    W = torch.randn(n, n, dtype=torch.float64) / 4
    f = {
        "layer": lambda y: 3 * y + torch.tanh(y @ W),
        "network": lambda y: 3 * y + net(y),
        "both": lambda y: 3 * y + torch.tanh(torch.tanh(y @ W) @ W.mT + y.sin()) + (y**3 * net(y).tanh()) @ W / 9,
        "coupling": lambda y: torch.cat([2 * y[..., :1], y[..., 1:] * y[..., :1].exp()], -1),
    }[kind]
    y = torch.randn(600, n, dtype=torch.float64)
    x, v = f(y).requires_grad_(), torch.randn_like(y)
    got = torch.autograd.grad(fi.custom_inverse(lambda x: y.clone(), f, event_dim=1)(x), x, v)
    J = torch.func.vmap(torch.func.jacrev(f))(y)
    assert_close(got, (torch.linalg.solve(J.mT, v.unsqueeze(-1)).squeeze(-1),), 1e-9)


def test_single_numbers_are_multiplied_in_full_precision(monkeypatch):
    """A product of matrices of float32 may be asked to round more."""
    W = torch.randn(3, 3) / 4
    y, x = torch.randn(2000, 3), torch.zeros(2000, 3, requires_grad=True)
    products = []
    monkeypatch.setattr("functorch_inverse._rows._combined", lambda *_: products.append(1))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        (got,) = torch.autograd.grad(fi.custom_inverse(lambda x: y, lambda y: 3 * y + (y @ W).sin(), event_dim=1)(x).sum(), x)
    finally:
        torch.set_float32_matmul_precision(before)
    J = 3 * torch.eye(3) + W.T * (y @ W).cos().unsqueeze(-1)
    assert_close(got, torch.linalg.solve(J.mT, torch.ones(2000, 3, 1)).squeeze(-1), 1e-5)
    assert not products


@pytest.mark.parametrize("n", [3, N])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_undefined_samples_stay_alone(bad, n):
    """Where samples are the rows of one product of matrices."""
    net = nn.Sequential(nn.Linear(n, 5), nn.SiLU(), nn.Linear(5, n)).double().requires_grad_(False)
    y = torch.randn(2000, n, dtype=torch.float64)

    def grad(y):
        x = torch.zeros_like(y, requires_grad=True)
        h = fi.custom_inverse(lambda x: y.clone(), lambda y: 3 * y + net(y) + y**3, event_dim=1)
        return torch.autograd.grad(h(x).sum(), x)[0]

    want = grad(y)
    y[7, 1] = bad
    got = grad(y)
    assert got[7].isnan().all()
    others = torch.arange(2000) != 7
    torch.testing.assert_close(got[others], want[others], rtol=1e-12, atol=1e-12)


HOOKS = {
    "shape": lambda g: g.reshape(-1, N).reshape(g.shape),
    "view": lambda g: g.view(-1).view(g.shape),
    "values": lambda g: torch.tensor(g.tolist(), dtype=g.dtype),
    "text": lambda g: g if str(g) else None,
    "kind": lambda g: {torch.Tensor: g}[type(g)],
}


@pytest.mark.parametrize("solver", [fi.LU(), fi.GMRES(), fi.Banded(N - 1, N - 1)])
@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("few", [True, False])
def test_a_hook_may_look_at_what_it_is_given(name, solver, few, monkeypatch):
    """It sees a tensor like any other in the end."""
    monkeypatch.setattr("functorch_inverse._graph._SMALL", 2**13 if few else 0)
    W = torch.randn(N, N, dtype=torch.float64) / N

    def f(y, hook=None):
        z = 2 * y
        if hook and z.requires_grad:
            z.register_hook(hook)
        return z + torch.tanh(z @ W)

    y = torch.randn(3, N, dtype=torch.float64)
    x = f(y).requires_grad_()
    h = fi.custom_inverse(lambda x: y.clone(), lambda y: f(y, HOOKS[name]), event_dim=1, linear_solver=solver)
    (got,) = torch.autograd.grad(h(x).sum(), x)
    J = torch.stack([torch.autograd.functional.jacobian(f, row) for row in y])
    assert_close([got], [torch.linalg.solve(J.mT, torch.ones_like(y))], 1e-8)


@pytest.mark.parametrize(
    "dtype, size, between",
    [(torch.float32, -22, 30), (torch.float32, 25, -30), (torch.float32, -20, 36), (torch.float64, -170, 200)],
)
@pytest.mark.parametrize("row", [slice(None), 0])
def test_weights_whose_products_would_leave_the_range(dtype, size, between, row):
    """Between two layers stands a factor that brings them back."""
    n, samples = 16, 128
    W, V = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    W[:, row] *= 10.0**size
    V[row] *= 10.0**size
    c = 10.0**between * (1 + torch.rand(samples, n, dtype=dtype))
    with torch.no_grad():
        graph = Pullback.of(lambda y, _: (((y[0] @ W) * c) @ V.mT,), (torch.zeros(samples, n, dtype=dtype),), (), ())
        got = jacobian_of_graph(graph.outputs[0], graph.y[0], n)
    want = V.double() @ (c.double().unsqueeze(-1) * W.double().mT)
    ok = want.abs() < torch.finfo(dtype).max / n
    assert ok.any()
    tolerance = 1e3 * torch.finfo(dtype).eps
    scale = (V.double().abs() @ (c.double().unsqueeze(-1) * W.double().mT.abs())).clamp(min=torch.finfo(dtype).tiny)
    assert ((got.double() - want).abs() / scale)[ok & (scale > 1e3 * torch.finfo(dtype).tiny)].max() < tolerance
