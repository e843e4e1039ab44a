"""chunk_size: the same derivative, however many rows are pulled back at once; and memory that stays bounded."""

import pytest
import torch
from fresh import run_fresh
from helpers import assert_close
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import functorch_inverse as fi
from functorch_inverse._chunks import chunk_of
from functorch_inverse._rows import _Rows

N = 5
W = torch.linspace(-1.2, 1.1, N * N, dtype=torch.float64).cos().reshape(N, N) / 4
SYMMETRIC = W @ W.T
XS = torch.linspace(-0.9, 1.3, 3 * N, dtype=torch.float64).sin().reshape(3, N)
CHUNKS = (1, 3, N, N + 4)


def square(y):
    return 2 * y + torch.tanh(y @ W)


def like_a_minimum(y):
    return 3 * y + torch.tanh(y @ SYMMETRIC) @ SYMMETRIC


def autoregressive(y):
    return 2 * y + y.sin().cumsum(-1).tanh()


def wide(y):
    """Fewer equations than unknowns: the branch of least norm."""
    return square(y)[..., :3]


SOLVERS = {
    "LU": (fi.LU, square, N),
    "Cholesky": (fi.Cholesky, like_a_minimum, N),
    "Triangular": (fi.Triangular, autoregressive, N),
    "LeastSquares": (fi.LeastSquares, wide, 3),
}


def plain(h, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(h(x).sin().sum(), x)[0]


def twice(h, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(h(x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(first.cos().sum(), x)[0]


TRANSFORMS = {
    "autograd": plain,
    "double backward": twice,
    "grad": lambda h, x: grad(lambda x: h(x).sin().sum())(x),
    "jacrev": lambda h, x: jacrev(h)(x[0]),
    "jacfwd": lambda h, x: jacfwd(h)(x[0]),
    "hessian": lambda h, x: hessian(lambda x: h(x).sin().sum())(x[0]),
    "vmap": lambda h, x: vmap(jacrev(h))(x),
    "vmap of forward mode": lambda h, x: vmap(jacfwd(h), -1)(x.T),
}


def solution(f, x):
    """y with f(y) = x, by iteration; f stretches every direction."""
    y = torch.zeros(*x.shape[:-1], N, dtype=x.dtype)
    for _ in range(200):
        residual = x - f(y)
        y = y + 0.3 * torch.nn.functional.pad(residual, (0, N - x.shape[-1]))
    return y


def derivative(name, transform, chunk_size):
    solver, f, size = SOLVERS[name]
    h = fi.custom_inverse(lambda x: solution(f, x), f, event_dim=1, linear_solver=solver(chunk_size=chunk_size))
    return TRANSFORMS[transform](h, XS[:, :size])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_derivative(name, transform):
    want = derivative(name, transform, None)
    for chunk_size in CHUNKS:
        assert_close(derivative(name, transform, chunk_size), want, 1e-12)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("out", [2, N, 9])
def test_batch_jacobian(out, chunk_size):
    """Rows where there are fewer, columns where there are fewer of those; and a tree with several leaves."""
    B = torch.linspace(-1.1, 1.3, N * out, dtype=torch.float64).cos().reshape(N, out)
    got = fi.batch_jacobian(lambda y: torch.sinh(y) @ B, XS, chunk_size=chunk_size)
    want = B.T * XS.cosh().unsqueeze(-2)
    assert_close(got, want)
    tree = fi.batch_jacobian(lambda y: (y["a"].sin() @ B, y["b"] ** 2), {"a": XS, "b": XS}, chunk_size=chunk_size)
    assert_close(tree[0]["a"], B.T * XS.cos().unsqueeze(-2))
    assert_close(tree[1]["b"], torch.diag_embed(2 * XS))
    assert not tree[0]["b"].any()
    assert not tree[1]["a"].any()


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("transform", [lambda h, x: h(x), plain, twice, lambda h, x: vmap(jacrev(h))(x)])
def test_log_abs_det(transform, chunk_size):
    want = transform(lambda y: torch.linalg.slogdet(2 * torch.eye(N) + W.T * (1 / torch.cosh(y @ W) ** 2).unsqueeze(-1))[1], XS)
    assert_close(transform(lambda y: fi.log_abs_det_jacobian(square, y, chunk_size=chunk_size), XS), want)


def test_the_keyword_takes_the_place_of_the_solvers_own():
    """The solver itself stays as it is."""
    solver = fi.Triangular(lower=True, chunk_size=2)
    got = fi.log_abs_det_jacobian(autoregressive, XS, linear_solver=solver, chunk_size=1)
    assert_close(got, fi.log_abs_det_jacobian(autoregressive, XS), 1e-12)
    assert solver == fi.Triangular(chunk_size=2)


def test_solvers_are_equal_by_value():
    assert fi.LU(chunk_size=3) == fi.LU("raise", chunk_size=3) != fi.LU()
    assert hash(fi.LU(chunk_size=3)) == hash(fi.LU(chunk_size=3))
    assert fi.Triangular("nan", False) == fi.Triangular(on_singular="nan", lower=False)  # the order of before
    with pytest.raises(TypeError):
        fi.LU("raise", 3)


# --- memory --------------------------------------------------------------------------------------------

HIDDEN, BATCH = 2048, 4


def perceptron(n, act):
    """Its hidden layer is much larger than a sample."""
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(n, HIDDEN, generator=draw) / n, torch.randn(HIDDEN, n, generator=draw) / HIDDEN
    return lambda y: y + act(y @ first) @ second


class Largest(TorchDispatchMode):
    """How many numbers the largest piece of memory held."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _Rows in types:  # look inside
            with self:
                return _Rows.__torch_dispatch__(func, types, args, kwargs)
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def backward(f, y, chunk_size):
    x = f(y).detach().requires_grad_()
    h = fi.custom_inverse(lambda x: y.clone(), f, event_dim=1, linear_solver=fi.LU(chunk_size=chunk_size))
    with Largest() as seen:
        h(x).sum().backward()
    return seen.numbers


def by_func(f, y, chunk_size):
    h = fi.custom_inverse(lambda x: y.clone(), f, event_dim=1, linear_solver=fi.LU(chunk_size=chunk_size))
    with Largest() as seen:
        torch.func.vjp(h, f(y))[1](y)
    return seen.numbers


def by_batch_jacobian(f, y, chunk_size):
    with Largest() as seen:
        fi.batch_jacobian(f, y, chunk_size=chunk_size)
    return seen.numbers


def by_log_abs_det(f, y, chunk_size):
    with Largest() as seen, torch.no_grad():
        fi.log_abs_det_jacobian(f, y, chunk_size=chunk_size)
    return seen.numbers


WAYS = {
    # act: one that has a rule in _rows.py, or one that has none, which takes more than 64 rows to be mapped
    "all at once": (backward, 16, torch.tanh),
    "mapped": (backward, 80, lambda t: t.logcumsumexp(-1)),
    "torch.func": (by_func, 16, torch.tanh),
    "batch_jacobian": (by_batch_jacobian, 16, torch.tanh),
    "log_abs_det": (by_log_abs_det, 80, torch.tanh),
}


@pytest.mark.parametrize("way", WAYS)
def test_memory_stays_bounded(way, monkeypatch):
    """Unless told otherwise, within four times the Jacobian (or the weights of f, or the few numbers that are never many)."""
    measure, n, act = WAYS[way]
    monkeypatch.setattr("functorch_inverse._chunks._FEW", 2 * BATCH * HIDDEN)
    f, y = perceptron(n, act), torch.randn(BATCH, n)
    rows = lambda k: k * BATCH * HIDDEN  # noqa: E731
    bound = max(4 * BATCH * n * n, n * HIDDEN, rows(2))
    assert rows(n) > 2 * bound, "nothing to bound"
    assert measure(f, y, n) >= rows(n)
    assert measure(f, y, None) <= bound
    assert measure(f, y, 1) <= max(BATCH * n * n, n * HIDDEN, rows(1))


def test_how_many():
    wide, narrow = (lambda: 2**22), (lambda: 10)
    assert chunk_of(None, 100, 10**4, wide) == 1
    assert chunk_of(None, 100, 10**4, narrow) == 100
    assert chunk_of(None, 4096, 2**24, lambda: 2**16) == 2**10
    assert chunk_of(None, 100, 10**4, lambda: None) == 100
    assert chunk_of(7, 100, 10**4, wide) == 7
    assert chunk_of(700, 100, 10**4, wide) == 100
    assert chunk_of(None, 0, 0, wide) == 1


# --- torch.compile -------------------------------------------------------------------------------------


def compiled(chunk_size):
    """In a process of its own."""
    h = fi.custom_inverse(lambda x: x / 2, square, event_dim=1, linear_solver=fi.LU(chunk_size=chunk_size))
    for stack in (plain, TRANSFORMS["grad"]):
        got = torch.compile(lambda x: stack(h, x), fullgraph=stack is not plain, backend="aot_eager")(XS)  # noqa: B023
        assert_close(got, stack(h, XS))
    got = torch.compile(lambda y: fi.batch_jacobian(square, y, chunk_size=chunk_size), fullgraph=True, backend="aot_eager")(XS)
    assert_close(got, fi.batch_jacobian(square, XS))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_compile(chunk_size):
    run_fresh(compiled, chunk_size)
