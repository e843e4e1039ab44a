"""One tensor to one tensor in plain autograd: the short way gives what the long way gives, and calls g once."""

import gc
import weakref

import numpy as np
import pytest
import torch
from helpers import assert_close
from problems import VECTOR, vector_exact, vector_f, vector_g

import functorch_inverse as fi

X, C, B = VECTOR.inputs()
DTYPES = (torch.float64, torch.float32, torch.float16)


def sinh(a=1.0):
    return lambda y: torch.sinh(a * y)


def asinh(x):
    return torch.asinh(x)


def derivatives(h, *leaves, order=1):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = h(*leaves).sin().sum()
    for _ in range(order - 1):
        out = sum(t.sum() for t in torch.autograd.grad(out, leaves, create_graph=True))
    return torch.autograd.grad(out, leaves)


def long_way(g, f, **options):
    """The same by a call with a keyword argument, which the short way leaves alone."""
    return lambda *inputs: fi.custom_inverse(lambda *inputs, _: g(*inputs), f, **options)(*inputs, _=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)])
def test_numbers(shape, dtype):
    x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape).to(dtype)
    got = derivatives(fi.custom_inverse(asinh, torch.sinh, event_dim=0), x)
    assert got[0].dtype is dtype
    assert all(map(torch.equal, got, derivatives(long_way(asinh, torch.sinh, event_dim=0), x)))
    if x.numel():
        assert_close(got, derivatives(torch.asinh, x), 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("event_dim", [None, 1])
def test_vectors_with_arguments(event_dim, order):
    h = fi.custom_inverse(vector_g, vector_f, event_dim=event_dim)
    assert_close(derivatives(h, X, C, B, order=order), derivatives(vector_exact, X, C, B, order=order))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_numbers_with_arguments(order):
    g = lambda x, a: np.arcsinh(x.numpy()) / a.numpy()  # noqa: E731
    h = fi.custom_inverse(g, lambda y, a: torch.sinh(a * y), event_dim=0)
    x, a = torch.linspace(-1, 1, 6).double().reshape(2, 3), torch.tensor([1.0, 2.0, 3.0]).double()
    assert_close(derivatives(h, x, a, order=order), derivatives(lambda x, a: torch.asinh(x) / a, x, a, order=order))


@pytest.mark.parametrize("order", [1, 2])
def test_numbers_with_closures(order):
    x, a = torch.linspace(-1, 2, 6).double(), torch.tensor(1.5).double()

    def h(x, a):
        return fi.custom_inverse(lambda x: torch.asinh(x) / a, lambda y: torch.sinh(a * y), event_dim=0)(x)

    assert_close(derivatives(h, x, a, order=order), derivatives(lambda x, a: torch.asinh(x) / a, x, a, order=order))


RESULTS = {
    "numpy": lambda x: np.arcsinh(x.numpy()),
    "numpy in float32": lambda x: np.arcsinh(x.numpy()).astype(np.float32),
    "another precision": lambda x: torch.asinh(x.float()),
    "another layout": lambda x: torch.asinh(x.T.contiguous()).T,
    "a leaf of its own": lambda x: torch.asinh(x).requires_grad_(),
    "a graph of its own": lambda x: torch.asinh(x.requires_grad_()),
}


@pytest.mark.parametrize("name", RESULTS)
def test_what_g_may_return(name):
    calls = []
    h = fi.custom_inverse(lambda x: calls.append(x) or RESULTS[name](x), torch.sinh, event_dim=0)
    x = torch.linspace(-1, 1, 6).double().reshape(2, 3).requires_grad_()
    y = h(x)
    assert (y.dtype, y.shape, y.requires_grad, len(calls)) == (torch.float64, x.shape, True, 1)
    assert not calls[0].requires_grad or "graph" in name
    assert_close(torch.autograd.grad(y.sum(), x), ((1 + x**2).rsqrt().detach(),), 1e-6)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(2, 3), lambda x: x[:], lambda x: x.flip(0)])
def test_an_input_handed_back_is_copied(view):
    """Who changes y does not change x."""
    x = torch.randn(2, 3)
    y = fi.custom_inverse(view, view, event_dim=0)(x)
    before = x.clone()
    y.mul_(2)
    assert_close(x, before)


def test_memory_of_numpy_handed_back_is_copied():
    """The next call of g may write to it."""
    buffer = np.empty(3)
    h = fi.custom_inverse(lambda x: torch.from_numpy(np.arcsinh(x.numpy(), out=buffer)), torch.sinh, event_dim=0)
    x = torch.linspace(-1, 1, 3).double().requires_grad_()
    y = h(x)
    h(5 * x)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert_close(got, (1 + x**2).rsqrt().detach())


def test_an_argument_handed_back_is_copied():
    x, a = torch.randn(3), torch.randn(3)
    y = fi.custom_inverse(lambda x, a: a, lambda y, a: y, event_dim=0)(x, a)
    before = a.clone()
    y.mul_(2)
    assert_close(a, before)


BAD = {
    "more samples": (lambda x: torch.ones(4, 3), fi.StructureError),
    "another size": (lambda x: torch.ones(2, 4), fi.StructureError),
    "integers": (lambda x: x.long(), fi.StructureError),
    "a string": (lambda x: "y", fi.StructureError),
    "nothing": (lambda x: None, fi.StructureError),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_an_error_after_one_call(name):
    calls, (g, error) = [], BAD[name]
    h = fi.custom_inverse(lambda x: calls.append(x) or g(x), lambda y: y, event_dim=1)
    with pytest.raises(error, match="custom_inverse"):
        h(torch.randn(2, 3, requires_grad=True))
    assert len(calls) == 1


@pytest.mark.parametrize("f, error", [
    (lambda y: y.detach(), fi.NoDerivativeError),
    (lambda y: y.sum(-1), fi.StructureError),
    (lambda y: y.numpy(), fi.NoDerivativeError),
    (lambda y: y.to(torch.complex64), fi.StructureError),
    (lambda y: [y], fi.StructureError),
])  # fmt: skip
def test_an_f_that_will_not_do(f, error):
    y = fi.custom_inverse(lambda x: x.clone(), f, event_dim=0)(torch.randn(2, 3, requires_grad=True))
    with pytest.raises(error):
        y.sum().backward()


@pytest.mark.parametrize("event_dim", [0, None, 1])
def test_two_backwards_through_one_node(event_dim):
    x = torch.linspace(-1, 1, 3).double().requires_grad_()
    y = fi.custom_inverse(asinh, torch.sinh, event_dim=event_dim)(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    again = torch.autograd.grad((2 * y).sum(), x, retain_graph=True)
    last = torch.autograd.grad(y.sum(), x)
    assert_close((again[0] / 2, last[0]), first * 2)


def test_where_f_is_flat_and_where_x_is_no_number():
    x = torch.tensor([0.0, 1.0, torch.nan, torch.inf], requires_grad=True)
    y = fi.custom_inverse(lambda x: x.sign() * x.abs().sqrt(), lambda y: y * y.abs(), event_dim=0)(x)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert got[0] == torch.inf
    assert got[1] == 0.5
    assert got[2].isnan()


def test_autocast_is_off_inside():
    x = torch.randn(4, 3, requires_grad=True)
    w = torch.randn(3, 3) / 10 + torch.eye(3)
    h = fi.custom_inverse(lambda x: torch.linalg.solve(w, x.mT).mT, lambda y: y @ w.T, event_dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = h(x)
        (got,) = torch.autograd.grad(y.sum(), x)
    assert_close(got, torch.linalg.solve(w.T, torch.ones(4, 3).mT).mT, 1e-5)


def test_plain_values_where_nothing_is_live():
    calls = []
    h = fi.custom_inverse(asinh, lambda y: calls.append(y) or torch.sinh(y), event_dim=0)
    x = torch.randn(3)
    with torch.no_grad():
        assert not h(x.requires_grad_()).requires_grad
    with torch.inference_mode():
        assert not h(x).requires_grad
    assert not h(x.detach()).requires_grad
    assert not calls


def test_more_event_dims_than_x_has():
    with pytest.raises(fi.StructureError, match="at least 2 dims"), torch.no_grad():
        fi.custom_inverse(asinh, torch.sinh, event_dim=2)(torch.randn(3))


def test_one_function_for_many_shapes():
    """What is kept from a call fits the next one, or is not used."""
    h = fi.custom_inverse(vector_g, vector_f, event_dim=1)
    for batch in [(), (2,), (2, 2), (5,), ()]:
        x = X.expand(*batch, 3)
        assert_close(derivatives(h, x, C, B), derivatives(vector_exact, x, C, B))


def test_factors_go_with_the_graph():
    """They are larger than anything else, and the function lives on."""
    n, h = 64, fi.custom_inverse(lambda x: x.clone(), lambda y: y + y.tanh().cumsum(-1), event_dim=1)

    def backward():
        x = torch.randn(4, n, requires_grad=True)
        torch.autograd.grad(h(x).sum(), x)
        torch.autograd.grad(torch.autograd.grad(h(x).sin().sum(), x, create_graph=True)[0].sum(), x)
        torch.func.hessian(lambda x: h(x).sin().sum())(x.detach()[0])

    def large():
        gc.collect()
        return sum(type(t) is torch.Tensor and t.numel() >= n * n for t in gc.get_objects())

    before = large()
    backward()
    assert large() == before


def test_an_f_without_fast_rows():
    """Its rows come one after the other, from the same single evaluation."""
    calls = []

    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(z := y.tanh())
            return z

        @staticmethod
        def backward(ctx, v):
            return v * (1 - ctx.saved_tensors[0] ** 2)

    def f(y):
        calls.append(y)
        return y + Tanh.apply(y.flip(-1)).cumsum(-1)

    y = torch.randn(3, 8, dtype=torch.float64)
    x = f(y).detach().requires_grad_()
    calls.clear()
    (got,) = torch.autograd.grad(fi.custom_inverse(lambda x: y.clone(), f, event_dim=1)(x).sum(), x)
    assert len(calls) == 1
    J = torch.stack([torch.autograd.functional.jacobian(lambda y: y + y.flip(-1).tanh().cumsum(-1), row) for row in y])
    assert_close(got, torch.linalg.solve(J.mT, torch.ones_like(y)))


def test_a_first_order_after_a_second():
    """The factors of the one serve the other."""
    y, A = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64) / 3
    f = lambda y: y + 0.3 * torch.tanh(y @ A.T)  # noqa: E731
    x = f(y).detach().requires_grad_()
    z = fi.custom_inverse(lambda x: y.clone(), f, event_dim=1)(x)
    (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(z.sum(), x)
    assert_close(again, first.detach())


def test_nothing_stays_when_the_graph_has_been_used():
    """Though y lives on."""
    h = fi.custom_inverse(lambda x: torch.asinh(x), lambda y: torch.sinh(y) + 0 * y.flip(-1), event_dim=1)

    def large():
        gc.collect()
        return sum(type(t) is torch.Tensor and t.numel() >= 5 * 64**2 for t in gc.get_objects())

    before, kept = large(), []
    for _ in range(2):
        x = torch.randn(5, 64, requires_grad=True)
        y = h(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        first.sum().backward()
        kept.append(y)
        del first
    assert large() == before


class Sine(torch.autograd.Function):
    """An operation whose backward cannot be read off."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.sin()

    @staticmethod
    def backward(ctx, v):
        return v * ctx.saved_tensors[0].cos()


ITERATED = {
    "series": lambda y, A: y + torch.tanh(y @ A) / 3,
    "scaled": lambda y, A: 3 * y + torch.tanh(y @ A),
    "far from one": lambda y, A: torch.tanh(y) + y @ (A - A.mT) + y / 3,
    "no tape": lambda y, A: 2 * y + Sine.apply(y) / 2 + torch.tanh(y @ A),
    "symmetric": lambda y, A: 2 * y + y @ (A + A.mT) / 4 + y.tanh(),
    "symmetric, no tape": lambda y, A: 2 * y + y @ (A + A.mT) / 4 + Sine.apply(y) / 2,
}
SOLVERS = [fi.GMRES(), fi.BiCGStab(), fi.NormalCG(), fi.GMRES(preconditioner=torch.full((5,), 0.5, dtype=torch.float64))]


def iterated(name, batch=(4,), dtype=torch.float64):
    torch.manual_seed(0)
    A, y, v = torch.randn(5, 5), torch.randn(*batch, 5), torch.randn(*batch, 5)
    A, y, v = ((t / s).to(dtype) for t, s in ((A, 5), (y, 1), (v, 1)))
    return A, y, v, ITERATED[name](y, A).detach()


def solved_directly(name, y, A, v, transpose=True):
    """J^-T v by LAPACK, or J^-1 v."""
    f = lambda y: ITERATED[name](y, A)  # noqa: E731
    J = torch.stack([torch.autograd.functional.jacobian(f, row) for row in y.reshape(-1, 5)]).reshape(*y.shape, 5)
    return torch.linalg.solve(J.mT if transpose else J, v.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("solver", [*SOLVERS, fi.CG()], ids=repr)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("name", ITERATED)
def test_iterations(name, batch, solver):
    """One evaluation of f for all products, with A^T and with A."""
    if type(solver) is fi.CG and "symmetric" not in name:
        return
    A, y, v, x = iterated(name, batch)
    calls = []

    def f(y, A):
        calls.append(y)
        return ITERATED[name](y, A)

    h = fi.custom_inverse(lambda x, A: y.clone(), f, event_dim=1, linear_solver=solver)
    x = x.requires_grad_()
    out = h(x, A)
    calls.clear()
    (got,) = torch.autograd.grad(out, x, v, retain_graph=True)
    if not y.numel():
        assert got.shape == x.shape
        return
    assert len(calls) == 1
    (again,) = torch.autograd.grad(out, x, v)
    assert_close([got, again], [solved_directly(name, y, A, v)] * 2, 1e-8)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("name", ["series", "scaled", "no tape"])
def test_iterations_with_arguments(name, solver, order):
    A, _, _, x = iterated(name)
    f = ITERATED[name]

    def g(x, A):  # Newton's method
        y = x / 2
        for _ in range(12):
            y = y - solved_directly(name, y, A, f(y, A) - x, transpose=False)
        return y

    got, want = (derivatives(fi.custom_inverse(g, f, event_dim=1, linear_solver=s), x, A, order=order) for s in (solver, None))
    assert_close(got, want, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["series", "scaled", "no tape"])
def test_iterations_take_any_cotangent(name, dtype):
    """Expanded, transposed, with zeros in most samples, and very small ones."""
    A, y, v, x = iterated(name, dtype=dtype)
    x, one = x.requires_grad_(), torch.ones((), dtype=dtype)
    h = fi.custom_inverse(lambda x: y.clone(), lambda y: ITERATED[name](y, A), event_dim=1, linear_solver=fi.GMRES())
    for w in (one.expand(4, 5), v.mT.contiguous().mT, v * torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=dtype), v * 1e-30):
        kept = w.clone()
        (got,) = torch.autograd.grad(h(x), x, w)
        assert got.dtype is dtype
        assert torch.equal(w, kept)
        assert_close(got, solved_directly(name, y, A, kept), 1e-5 if dtype is torch.float32 else 1e-8)


@pytest.mark.parametrize("samples", [(), (1,), (5,), (70,), (3, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vectors_of_one_number(samples, dtype, monkeypatch):
    without_the_long_way(monkeypatch)
    y = torch.linspace(-1, 1, 120)[: torch.Size(samples).numel()].to(dtype).reshape(*samples, 1)
    x, v = y.clone().requires_grad_(), y.cos()
    h = fi.custom_inverse(lambda x: y.clone(), lambda y: torch.sinh(y) + y, event_dim=1)
    assert_close(torch.autograd.grad(h(x), x, v)[0], v / (y.cosh() + 1), 1e-5 if dtype is torch.float32 else 1e-12)


@pytest.mark.parametrize("samples", [5, 70])
def test_a_vector_of_one_number_may_be_singular_or_not_finite(samples):
    y = torch.linspace(1, 2, samples, dtype=torch.float64).unsqueeze(-1)
    scale = torch.ones_like(y)
    scale[3], x, v = 0, y.clone().requires_grad_(), y.cos()

    def pulled(scale, solver):
        h = fi.custom_inverse(lambda x: y.clone(), lambda y: scale * y * y, event_dim=1, linear_solver=solver)
        return torch.autograd.grad(h(x), x, v)[0]

    with pytest.raises(fi.SingularJacobianError, match=rf"singular in 1 of {samples} samples \(.*: 3\)"):
        pulled(scale, fi.LU())
    others = torch.arange(samples) != 3
    for bad, solver in ((0, fi.LU("nan")), (torch.nan, fi.LU()), (torch.inf, fi.LU()), (-torch.inf, fi.LU())):
        scale[3] = bad
        got = pulled(scale, solver)
        assert got[3].isnan()
        assert_close(got[others], (v / (2 * y))[others])


@pytest.mark.parametrize("solver", [fi.GMRES(), fi.BiCGStab(), fi.NormalCG()], ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_iterations_with_bad_numbers(solver, bad):
    A, y, v, x = iterated("series")
    f, x = (lambda y: y.exp() / 9 + ITERATED["series"](y, A)), x.requires_grad_()
    y[1, 2] = bad
    (got,) = torch.autograd.grad(fi.custom_inverse(lambda x: y.clone(), f, event_dim=1, linear_solver=solver)(x), x, v)
    assert got[1].isnan().all()
    assert got[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("solver", [fi.GMRES, fi.BiCGStab, fi.NormalCG])
def test_iterations_name_singular_samples(solver):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64)
    for f in (lambda y: y * scale, lambda y: y * scale + torch.tanh(y @ torch.ones(5, 5).double()) * 0.1 * scale):
        h = fi.custom_inverse(lambda x: x.clone(), f, event_dim=1, linear_solver=solver())
        with pytest.raises(fi.NotConvergedError, match=r"1 of 3 linear systems .*flat indices over all leading dims: 2;"):
            torch.autograd.grad(h(x).sum(), x)
        h = fi.custom_inverse(lambda x: x.clone(), f, event_dim=1, linear_solver=solver(on_failure="warn"))
        with pytest.warns(RuntimeWarning, match="1 of 3 linear systems"):
            torch.autograd.grad(h(x).sum(), x)


@pytest.mark.parametrize("name", ["series", "scaled"])
def test_iterations_begin_where_the_last_one_ended(name):
    A, y, v, x = iterated(name)
    h = fi.custom_inverse(
        lambda x: y.clone(), lambda y: ITERATED[name](y, A), event_dim=1, linear_solver=fi.GMRES(warm_start=True)
    )
    x = x.requires_grad_()
    for w in (v, v, 2 * v, v + 1e-3 * v.sin()):
        (got,) = torch.autograd.grad(h(x), x, w)
        assert_close(got, solved_directly(name, y, A, w), 1e-8)
        got.zero_()


@pytest.mark.parametrize("name", ["series", "no tape"])
def test_iterations_make_no_circles(name):
    A, y, _, x = iterated(name)
    h = fi.custom_inverse(lambda x: y.clone(), lambda y: ITERATED[name](y, A), event_dim=1, linear_solver=fi.GMRES())
    assert goes_with_its_output(lambda: h(x.requires_grad_()))


@pytest.mark.parametrize("event_dim", [0, None, 1])
def test_no_circles(event_dim):
    h = fi.custom_inverse(asinh, torch.sinh, event_dim=event_dim)
    assert goes_with_its_output(lambda: h(torch.randn(3, requires_grad=True)))


def goes_with_its_output(call):
    """Whether a graph that may be used again goes with its last output, not with the garbage collector."""
    y = call()
    gc.collect()
    gc.disable()
    try:
        y.sum().backward(retain_graph=True)
        node = weakref.ref(y.grad_fn)
        del y
        return node() is None
    finally:
        gc.enable()


# --- closures, and tridiagonal vectors, by the short way ------------------------------------------------


def without_the_long_way(monkeypatch):
    def linearised(*_, **__):
        raise AssertionError("the long way")

    monkeypatch.setattr("functorch_inverse._rules.Linearised", linearised)


def block(n=4, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(n, 6), torch.nn.Tanh(), torch.nn.Linear(6, n)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / 4)
    return net


def truth(net, y, v, c):
    """u and -C^T u of f(y) = 2 y + net(y) + c y^2."""
    J = torch.func.vmap(torch.func.jacrev(lambda y: 2 * y + net(y) + c * y**2))(y)
    u = torch.linalg.solve(J.mT, v.unsqueeze(-1)).squeeze(-1)
    return u, *torch.autograd.grad(2 * y + net(y) + c * y**2, (*net.parameters(), c), -u)


@pytest.mark.parametrize("solver", [fi.LU(), fi.Banded(3, 3)])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("batch", [(5,), (2000,)])
def test_modules_and_closures_by_the_short_way(batch, dtype, solver, monkeypatch):
    """Parameters and loose tensors; the samples are not contiguous."""
    net, c = block(dtype=dtype), torch.tensor(0.1, dtype=dtype, requires_grad=True)
    y, v = torch.randn(2, *batch, 8, dtype=dtype)[..., ::2]
    x = torch.zeros_like(y, requires_grad=True)
    want = truth(net, y, v, c)
    without_the_long_way(monkeypatch)
    f = lambda y: 2 * y + net(y) + c * y**2  # noqa: E731
    out = fi.custom_inverse(lambda x: y.clone(), f, event_dim=1, linear_solver=solver)(x)
    for scale in (1, 2):  # the second backward takes what the first has kept
        got = torch.autograd.grad(out, (x, *net.parameters(), c), scale * v, retain_graph=True)
        assert_close(got, tuple(scale * t for t in want), 1e-10 if dtype is torch.float64 else 1e-3)


def test_numbers_with_closures_by_the_short_way(monkeypatch):
    without_the_long_way(monkeypatch)
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = torch.linspace(-1, 1, 5, dtype=torch.float64)
    x = torch.sinh(2 * y).requires_grad_()
    h = fi.custom_inverse(lambda x: torch.asinh(x) / a, lambda y: torch.sinh(a * y), event_dim=0)
    slope = 1 / (2 * torch.cosh(2 * y))
    assert_close(torch.autograd.grad(h(x).sum(), (x, a)), (slope, -(y / 2).sum()), 1e-12)


def test_some_parameters_are_frozen_and_thaw(monkeypatch):
    """What is live is asked anew in each call, whatever an earlier one has kept."""
    without_the_long_way(monkeypatch)
    net, c = block(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    y, v = torch.randn(2, 3, 4, dtype=torch.float64)
    h = fi.custom_inverse(lambda x: y.clone(), lambda y: 2 * y + net(y) + c * y**2, event_dim=1)
    want = truth(net, y, v, c)
    for chosen in ([0, 3], [], [0, 1, 2, 3], [2]):
        for i, p in enumerate(net.parameters()):
            p.requires_grad_(i in chosen)
        x = torch.zeros_like(y, requires_grad=True)
        live = [p for p in net.parameters() if p.requires_grad]
        got = torch.autograd.grad(h(x), (x, *live, c), v)
        assert_close(got, (want[0], *(want[1 + i] for i in chosen), want[-1]), 1e-10)


def test_half_precision_in_a_closure_goes_the_long_way():
    """f is evaluated in float32 then."""
    W = (torch.eye(3) * 2 + torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) / 7).half().requires_grad_()
    x = torch.linspace(-1, 1, 12).reshape(4, 3).requires_grad_()
    f = lambda y: (y.to(W.dtype) @ W).to(y.dtype)  # noqa: E731
    ways = [way(lambda x: x / 2, f, event_dim=1) for way in (fi.custom_inverse, long_way)]
    got, want = (torch.autograd.grad(h(x).sum(), (x, W)) for h in ways)
    assert got[1].dtype is torch.float16
    assert all(map(torch.equal, got, want))
    assert_close(got[0], torch.linalg.solve(W.float(), torch.ones(3)).expand(4, 3), 1e-6)


def test_no_samples_with_closures():
    net, x = block(), torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    out = fi.custom_inverse(lambda x: x / 2, lambda y: 2 * y + net(y), event_dim=1)(x)
    got = torch.autograd.grad(out.sum(), (x, net[0].weight))
    assert got[0].shape == (0, 4) and not got[1].any()


@pytest.mark.parametrize("change", [lambda net: net[0].weight.add_(1), lambda net: setattr(net, "0", block()[0])])
def test_a_parameter_changed_in_between_is_an_error(change):
    net = block()
    x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    out = fi.custom_inverse(lambda x: x / 2, lambda y: 2 * y + net(y), event_dim=1)(x)
    with torch.no_grad():
        change(net)
    with pytest.raises(RuntimeError, match=r"nobody could see|modified by an inplace|changed in place"):
        out.sum().backward()


def tridiagonal(y):
    p = torch.nn.functional.pad(y, (1, 1))
    return 3 * y + y**3 - 0.8 * p[..., :-2] - 1.2 * p[..., 2:].sin()


def through(f, y, v, solver):
    x = torch.zeros_like(y, requires_grad=True)
    return torch.autograd.grad(fi.custom_inverse(lambda x: y.clone(), f, event_dim=1, linear_solver=solver)(x), x, v)[0]


BANDED = {
    "shifts": tridiagonal,
    "colours": lambda y: torch.maximum(tridiagonal(y), tridiagonal(y) - 9),
    "negative": lambda y: -tridiagonal(y),
    "both signs": lambda y: tridiagonal(y) * (torch.arange(7) - 2.5).sign().to(y.dtype),
    "not dominant": lambda y: torch.nn.functional.pad(y, (1, 1))[..., :-2].tanh() + 0.1 * y + y.roll(0) ** 3,
}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("name", BANDED)
def test_tridiagonal_vectors_by_the_short_way(name, batch, dtype, monkeypatch):
    """By one pass, or by three where an operation has no rule; f is evaluated once."""
    y, v = torch.randn(2, *batch, 14, dtype=dtype)[..., ::2]
    f, calls = BANDED[name], []
    J = torch.stack([torch.autograd.functional.jacobian(f, t) for t in y.reshape(-1, 7)]).reshape(*batch, 7, 7)
    want = torch.linalg.solve(J.mT, v.unsqueeze(-1)).squeeze(-1)
    without_the_long_way(monkeypatch)
    got = through(lambda y: calls.append(y) or f(y), y, v, fi.Banded(1, 1))
    assert len(calls) == 1
    assert_close([got], [want], 1e-11 if dtype is torch.float64 else 1e-4)


def test_no_banded_samples():
    y = torch.zeros(0, 7)
    assert through(tridiagonal, y, y, fi.Banded(1, 1)).shape == (0, 7)


@pytest.mark.parametrize("f", [tridiagonal, BANDED["colours"]])
def test_errors_of_banded_vectors(f):
    """The same as by the long way: outside of the bands, singular, not finite."""
    y, v = torch.randn(2, 3, 7, dtype=torch.float64)
    with pytest.raises(fi.StructureError, match="0 diagonals below and 1 above"):
        through(f, y, v, fi.Banded(0, 1))
    keep = torch.ones_like(y)
    keep[1, 3] = 0
    with pytest.raises(fi.SingularJacobianError, match=r"1 of 3 samples .*outermost: 1"):
        through(lambda y: f(y) * keep, y, v, fi.Banded(1, 1))


def test_undefined_samples_of_banded_vectors_stay_alone():
    y, v = torch.randn(2, 3, 7, dtype=torch.float64)
    want = through(tridiagonal, y, v, fi.Banded(1, 1))
    for bad in (torch.nan, torch.inf):
        y[1, 2] = bad
        # The second is infinite on the diagonal alone.
        for f in (tridiagonal, lambda y: y**3 + tridiagonal(y.nan_to_num(0, 0))):
            got = through(f, y, v, fi.Banded(1, 1))
            assert got[1].isnan().all()
            if f is tridiagonal:
                assert_close([got[0], got[2]], [want[0], want[2]], 1e-12)
    singular = lambda y: y * torch.tensor([[1.0], [0], [1]], dtype=torch.float64)  # noqa: E731
    got = through(singular, v, v, fi.Banded(1, 1, on_singular="nan"))
    assert got[1].isnan().all()
    assert_close([got[0], got[2]], [v[0], v[2]], 1e-12)


@pytest.mark.parametrize("solver", [fi.GMRES(), fi.NormalCG(), fi.BiCGStab(), fi.LU(), fi.Banded(5, 5)])
def test_a_constant_that_changes_between_two_backwards(solver):
    """The derivative is that of the values that g has seen, or there is an error."""
    W, U = 0.3 * torch.randn(6, 6, dtype=torch.float64), 0.3 * torch.randn(6, 6, dtype=torch.float64)
    f = lambda y: y + torch.tanh(y @ W) @ U  # noqa: E731
    y0, v = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    x = f(y0).requires_grad_()
    J = torch.stack([torch.autograd.functional.jacobian(f, row) for row in y0])
    want = torch.linalg.solve(J.mT, v)
    y = fi.custom_inverse(lambda x: y0.clone(), f, event_dim=1, linear_solver=solver)(x)
    assert_close(torch.autograd.grad(y, x, v, retain_graph=True), (want,), 1e-8)
    W.mul_(-2)
    try:
        got = torch.autograd.grad(y, x, v, retain_graph=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_close(got, (want,), 1e-8)


@pytest.mark.parametrize("event_dim", [0, 1, None])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("way", ["argument", "closure"])
def test_an_f_that_does_not_use_y(event_dim, order, way):
    """Also where it depends on something else that is live."""
    a = torch.tensor(1.5, requires_grad=True)
    if way == "argument":
        h = fi.custom_inverse(lambda x, a: x / a, lambda y, a: torch.sinh(y.detach()) * a, event_dim=event_dim)
    else:
        h = fi.custom_inverse(lambda x, _: x / a, lambda y, _: torch.sinh(y.detach()) * a, event_dim=event_dim)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(fi.NoDerivativeError, match="does not depend on y"):
        torch.autograd.grad(h(x, a).sum(), x, create_graph=order == 2)
    with pytest.raises(fi.NoDerivativeError, match="does not depend on y"):
        torch.func.grad(lambda x: h(x, a).sum())(x)
    with pytest.raises(fi.NoDerivativeError, match="does not depend on y"):
        torch.func.jvp(lambda x: h(x, a.detach()), (x.detach(),), (x.detach(),))


def test_an_error_of_f_in_a_backward_leaves_grad_mode_as_it_was():
    def f(y):
        if y.requires_grad:
            raise KeyError("broken")
        return torch.sinh(y)

    x = X.clone().requires_grad_()
    y = fi.custom_inverse(asinh, f, event_dim=0)(x)
    seen = []
    y.register_hook(lambda v: seen.append(torch.is_grad_enabled()))
    x.register_hook(lambda v: seen.append(torch.is_grad_enabled()))
    with pytest.raises(KeyError, match="broken"):
        torch.autograd.grad(y.sum(), x)
    assert torch.is_grad_enabled()
    with torch.no_grad(), pytest.raises(KeyError, match="broken"):
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert seen == [False, False]
    assert torch.is_grad_enabled()
