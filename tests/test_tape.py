"""Products read off the graph once: as the engine would give them, for every function, and only where they are right."""

import pytest
import torch
from helpers import assert_close
from test_rows import FUNCTIONS, A, N

import functorch_inverse as fi
from functorch_inverse import _torch
from functorch_inverse._tape import tape_of_graph

RECORDED = {"layer", "network", "linear", "scaled", "quotient", "products", "elementwise"}
BATCHES = [(), (5,), (2, 3), (0,)]


def jacobians(f, y):
    rows = [torch.autograd.functional.jacobian(f, sample) for sample in y.reshape(-1, N)]
    return torch.stack(rows).reshape(*y.shape, N)


def taped(f, y):
    y = y.detach().requires_grad_()
    with torch.enable_grad():
        out = f(y)
    with torch.no_grad():
        return tape_of_graph(out, y)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_products(name, batch):
    f, y = FUNCTIONS[name], torch.randn(*batch, N, dtype=torch.float64)
    tape = None if name == "python" else taped(f, y)
    assert tape is not None or name not in RECORDED
    if tape is None or not y.numel():
        return
    J, v = jacobians(f, y), torch.randn_like(y)
    assert_close([tape.push(v), tape.pull(v)], [(M @ v.unsqueeze(-1)).squeeze(-1) for M in (J, J.mT)], 1e-12)
    several = torch.randn(4, *y.shape, dtype=torch.float64)
    want = [(M @ several.unsqueeze(-1)).squeeze(-1) for M in (J, J.mT)]
    assert_close([torch.vmap(tape.push)(several), torch.vmap(tape.pull)(several)], want, 1e-12)


SERIES = {
    "layer": lambda y: y + 0.3 * torch.tanh(y @ A),
    "layer first": lambda y: torch.tanh(y @ A) / 4 + y,
    "less": lambda y: y - torch.tanh(y @ A),
    "network": lambda y: y + torch.tanh(torch.tanh(y @ A) @ A.mT) @ A,
    "one product, two sums": lambda y: y + (z := torch.tanh(y @ A)) + z * y,
    "elementwise": lambda y: y + 0.2 * y.sin(),
    "twice": lambda y: y + y,
}
OTHERS = {"scaled": lambda y: 2 * y + torch.tanh(y @ A), "linear": lambda y: y @ A, "same": lambda y: y.view_as(y)}


@pytest.mark.parametrize("batch", BATCHES[:3])
@pytest.mark.parametrize("name", SERIES)
def test_ahead(name, batch):
    """b + w - A^T w, by fewer operations; pull and push with sums and products in one."""
    y = torch.randn(*batch, N, dtype=torch.float64)
    tape, (b, w) = taped(SERIES[name], y), torch.randn(2, *y.shape, dtype=torch.float64)
    J = jacobians(SERIES[name], y)
    pulled = (J.mT @ w.unsqueeze(-1)).squeeze(-1)
    assert_close([tape.pull(w), tape.push(w)], [pulled, (J @ w.unsqueeze(-1)).squeeze(-1)], 1e-12)
    assert (tape.ahead is None) == (name == "one product, two sums")
    if tape.ahead is not None:
        kept = b.clone(), w.clone()
        assert_close([tape.ahead(b, w)], [b + w - pulled], 1e-12)
        assert all(map(torch.equal, (b, w), kept))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_series(name):
    assert taped(OTHERS[name], torch.randn(4, N, dtype=torch.float64)).ahead is None


def test_a_product_that_goes_two_ways_is_taken_once():
    """It is part of a sum only where nothing else needs it."""
    matrices = [torch.randn(N, N, dtype=torch.float64) for _ in range(2)]
    y = torch.randn(3, N, dtype=torch.float64)
    for f in (
        lambda y: (z := y @ matrices[0]) + torch.tanh(z) + (y @ matrices[1]) * 2 + y,
        lambda y: (y + torch.tanh(y)) @ matrices[0],
        lambda y: y + (y + torch.tanh(y @ matrices[1])) @ matrices[0],
    ):
        tape, w, J = taped(f, y), torch.randn(3, N, dtype=torch.float64), jacobians(f, y)
        assert_close([tape.pull(w), tape.push(w)], [(M @ w.unsqueeze(-1)).squeeze(-1) for M in (J.mT, J)], 1e-12)


def test_numbers_stay_numbers():
    """Also those that are no floats, and where a division by zero is a number that is none."""
    y = torch.randn(3, N, dtype=torch.float64)
    for f in (lambda y: (2 * y / 4) * 3, lambda y: -(y * 0.5) / 5 + torch.tanh(3 * y) * 2, lambda y: (y * 2) @ A * 3):
        tape, w, J = taped(f, y), torch.randn(3, N, dtype=torch.float64), jacobians(f, y)
        assert_close([tape.pull(w), tape.push(w)], [(M @ w.unsqueeze(-1)).squeeze(-1) for M in (J.mT, J)], 1e-12)
    assert taped(lambda y: (y * 2) / 0, y) is None


def inverse(f, y, solver):
    return fi.custom_inverse(lambda x: y, f, event_dim=1, linear_solver=solver)


@pytest.mark.parametrize("solver", [fi.GMRES, fi.BiCGStab, fi.NormalCG])
@pytest.mark.parametrize("batch", BATCHES[:3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name, batch, solver):
    f, y = FUNCTIONS[name], torch.randn(*batch, N, dtype=torch.float64)
    x, v = f(y).detach().requires_grad_(), torch.randn_like(y)
    options = {"rtol": 1e-5} if name == "precision" else {"max_steps": 1000}
    got = torch.autograd.grad(inverse(f, y, solver(**options))(x), x, v)
    want = torch.linalg.solve(jacobians(f, y).mT, v.unsqueeze(-1)).squeeze(-1)
    assert_close(got, (want,), 1e-4 if name == "precision" else 1e-7)


def layer(y, A=A):
    return 2 * y + torch.tanh(y @ A.to(y.dtype))


def test_the_engine_runs_once(monkeypatch):
    """However many products there are."""
    runs = []
    engine = _torch.graph_grad
    monkeypatch.setattr(_torch, "graph_grad", lambda *args: runs.append(args) or engine(*args))
    y = torch.randn(4, N, dtype=torch.float64)
    x = layer(y).requires_grad_()
    for solver in (fi.GMRES(), fi.NormalCG()):
        runs.clear()
        torch.autograd.grad(inverse(layer, y, solver)(x).sum(), x)
        assert len(runs) == 1


def test_many_cotangents_and_higher_orders():
    y = torch.randn(N, dtype=torch.float64)
    x, solvers = layer(y), (fi.GMRES(), None)
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        got, want = (transform(inverse(layer, y, solver))(x) for solver in solvers)
        assert_close(got, want, 1e-8)
    samples = torch.randn(3, N, dtype=torch.float64)
    calls = [fi.custom_inverse(torch.clone, layer, event_dim=1, linear_solver=s) for s in solvers]
    assert_close(*[torch.vmap(torch.func.jacrev(call))(samples) for call in calls], 1e-8)
    twice = []
    for call in calls:
        x = samples.clone().requires_grad_()
        (once,) = torch.autograd.grad(call(x).sin().sum(), x, create_graph=True)
        twice.append(torch.autograd.grad(once.square().sum(), x))
    assert_close(*twice, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.complex128])
def test_dtypes(dtype):
    """Half precision is computed in float32; complex numbers are no vectors, and go by the engine."""
    y = torch.randn(4, N, dtype=dtype)
    x, v = layer(y).requires_grad_(), torch.randn(4, N, dtype=dtype)
    got, want = (torch.autograd.grad(inverse(layer, y, solver)(x), x, v) for solver in (fi.GMRES(), None))
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.complex128: 1e-8}.get(dtype, 1e-4)
    assert got[0].dtype == dtype
    assert_close([t.to(torch.complex128) for t in got], [t.to(torch.complex128) for t in want], tolerance)


def test_a_function_that_returns_another_dtype_goes_by_the_engine():
    y = torch.randn(4, N, dtype=torch.float64)
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)
    f, solvers = (lambda y: layer(y.double())), (fi.GMRES(rtol=1e-6), None)
    got, want = (torch.autograd.grad(inverse(f, y.float(), solver)(x).sum(), x) for solver in solvers)
    assert_close(got, want, 1e-5)


def test_non_contiguous():
    y = torch.randn(N, 4, dtype=torch.float64).T
    x, v = layer(y).requires_grad_(), torch.randn(N, 8, dtype=torch.float64).T[::2].T.reshape(-1, N)[:4].flip(0)
    got, want = (torch.autograd.grad(inverse(lambda y: layer(y, A.T), y, s)(x), x, v) for s in (fi.GMRES(), None))
    assert_close(got, want, 1e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_sample(bad):
    y = torch.randn(4, N, dtype=torch.float64)
    x, y[1, 2] = layer(y).requires_grad_(), bad
    (got,) = torch.autograd.grad(inverse(lambda y: y + layer(y) * y.exp(), y, fi.GMRES())(x).sum(), x)
    assert got[1].isnan().all() and got[[0, 2, 3]].isfinite().all()


def test_singular_samples_are_named():
    def f(y):
        return y * torch.tensor([[1.0], [0.0], [2.0]], dtype=y.dtype)

    x = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    with pytest.raises(fi.NotConvergedError, match=r"1 of 3 linear systems .*flat indices over all leading dims: 1;"):
        torch.autograd.grad(inverse(f, x.detach(), fi.GMRES())(x).sum(), x)


def test_f_that_is_the_identity():
    """The product is what was given, so nobody may write into it."""
    for solver in (fi.GMRES(), fi.BiCGStab(), fi.NormalCG(), fi.CG()):
        x, v = torch.randn(3, N, dtype=torch.float64, requires_grad=True), torch.randn(3, N, dtype=torch.float64)
        kept = v.clone()
        (got,) = torch.autograd.grad(inverse(lambda y: y.view_as(y), x.detach(), solver)(x), x, v)
        assert_close([got, v], [kept, kept], 1e-12)
