"""Solves that are implicit equations of their own: one factorisation for all orders, and nothing that is out of date."""

import gc
import weakref

import pytest
import torch
from helpers import assert_close, inference_tensors_in_transforms
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import functorch_inverse as fi
from functorch_inverse._levels import memory_of

N = 5
torch.manual_seed(0)
A = torch.randn(N, N, dtype=torch.float64) / 4
X = torch.randn(3, N, dtype=torch.float64)
V = torch.randn(3, N, dtype=torch.float64)


def f(y, W):
    return 2 * y + torch.tanh(y @ W.T)


def g(x, W):
    """The inverse of f by Newton's method, differentiated by its last step."""
    y = x / 2
    for _ in range(40):
        residual = f(y, W) - x
        slope = 1 - torch.tanh(y @ W.T) ** 2
        J = 2 * torch.eye(N, dtype=x.dtype) + slope.unsqueeze(-1) * W
        y = y - (torch.linalg.inv(J) @ residual.unsqueeze(-1)).squeeze(-1)
    return y


def custom(solver=None, function=f):
    return fi.custom_inverse(g, function, event_dim=1, linear_solver=solver)


def loss(h):
    return lambda x, W: torch.sin(h(x, W)).sum()


def product(h):
    """The Hessian times V, forward over reverse."""
    return jvp(lambda x: grad(loss(h))(x, A), (X,), (V,))[1]


def twice(h):
    """The same by backward twice, also to W."""
    x, W = X.clone().requires_grad_(), A.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(h)(x, W), x, create_graph=True)
    return torch.autograd.grad(first, (x, W), V)


def thrice(h):
    """The third derivatives by plain autograd."""
    x, W = X.clone().requires_grad_(), A.clone().requires_grad_()
    first = torch.autograd.grad(loss(h)(x, W), (x, W), create_graph=True)
    second = torch.autograd.grad(sum((t * t).sum() for t in first), (x, W), create_graph=True)
    return torch.autograd.grad(sum(t.sin().sum() for t in second), (x, W))


class Counting(fi.LU):
    """LU that counts its factorisations."""

    def factor(self, matrix, **options):
        COUNT.append(matrix.shape)
        return super().factor(matrix, **options)


COUNT = []
STACKS = {
    "jvp of grad": product,
    "backward twice": twice,
    "backward thrice": thrice,
    "jacrev": lambda h: jacrev(h, (0, 1))(X, A),
    "jacfwd": lambda h: jacfwd(h, (0, 1))(X, A),
    "vmap(jacrev)": lambda h: vmap(jacrev(h, (0, 1)), (0, None))(X, A),
    "vmap(jacfwd)": lambda h: vmap(jacfwd(h, (0, 1)), (0, None))(X, A),
    "vmap over W": lambda h: vmap(jacfwd(jacrev(loss(h), (0, 1)), (0, 1)))(X, torch.stack([A, 2 * A, A.mT])),
    "vmap(hessian)": lambda h: vmap(hessian(loss(h), (0, 1)), (0, None))(X, A),
    "jacrev(jacfwd)": lambda h: jacrev(jacfwd(h))(X, A),
    "jacfwd(jacfwd)": lambda h: jacfwd(jacfwd(h, 1), 1)(X[0], A),
    "jacrev(jacrev)": lambda h: jacrev(jacrev(h, 1), 1)(X[0], A),
    "grad(vmap)": lambda h: grad(lambda W: grad(lambda W: vmap(loss(h), (0, None))(X, W).sum())(W).sin().sum())(A),
}


SOLVERS = {
    "LU": fi.LU(),
    "Banded": fi.Banded(lower=N - 1, upper=N - 1),
    "LeastSquares": fi.LeastSquares(),
    "GMRES": fi.GMRES(rtol=1e-13),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("stack", STACKS)
def test_every_stack_with_every_kind_of_solver(stack, solver):
    assert_close(STACKS[stack](custom(SOLVERS[solver])), STACKS[stack](g))


class Own:
    """A solver of a user's own, made of torch operations."""

    def factorise(self, operator):
        self_ = type("Factors", (), {})()
        inverse = torch.linalg.inv(operator.as_matrix() + 0.1 * torch.eye(N, dtype=torch.float64))
        self_.solve = lambda b, transpose=False: ((inverse.mT if transpose else inverse) @ b.unsqueeze(-1)).squeeze(-1)
        return self_


@pytest.mark.parametrize("stack", ["jvp of grad", "jacrev(jacrev)", "vmap(hessian)"])
def test_a_solver_that_does_not_solve_exactly_is_differentiated_as_it_is(stack):
    """The derivative of (A + 0.1)^-1 v is not that of A^-1 v."""
    damped = lambda y, W: f(y, W) + 0.1 * y  # noqa: E731
    want = STACKS[stack](fi.custom_inverse(g, damped, event_dim=1))
    assert_close(STACKS[stack](custom(Own())), want)


# --- how often -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["jvp of grad", "backward twice", "vmap(jacrev)", "vmap(jacfwd)", "vmap(hessian)"])
def test_one_factorisation_for_all_orders(stack):
    COUNT.clear()
    STACKS[stack](custom(Counting()))
    assert COUNT == [(3, N, N)]


def test_f_is_evaluated_once_for_a_product_with_the_hessian():
    calls = []

    def counted(y, W):
        calls.append(y.shape)
        return f(y, W)

    h = fi.custom_inverse(lambda x: g(x, A), lambda y: counted(y, A), event_dim=1)
    jvp(grad(lambda x: torch.sin(h(x)).sum()), (X,), (V,))
    once = len(calls)
    calls.clear()
    grad(lambda x: torch.sin(h(x)).sum())(X)
    assert once <= len(calls)


# --- nothing is out of date --------------------------------------------------------------------------


def test_backward_again_and_again():
    x, W = X.clone().requires_grad_(), A.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(custom())(x, W), x, create_graph=True)
    got = [torch.autograd.grad(first, (x, W), V, retain_graph=True) for _ in range(2)]
    assert_close(got, [twice(g)] * 2)


def test_a_parameter_that_changed_in_between_is_an_error():
    """As with any other operation that saved it."""
    x, W = X.clone().requires_grad_(), A.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(custom())(x, W), x, create_graph=True)
    with torch.no_grad():
        W.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first, x, V)


def test_other_memory_is_another_point():
    """Factors are kept for the values that lie somewhere, not for the place alone."""
    t = torch.zeros(3)
    before = memory_of([t])
    assert memory_of([t.detach()]) == before
    assert memory_of([t[:2]]) != before
    assert memory_of([t.clone()]) != before
    t.add_(1)
    assert memory_of([t]) != before
    with torch.inference_mode():
        assert memory_of([torch.zeros(3)]) is None


def test_nothing_is_left_behind():
    """Without the garbage collector: the factors go with the graph that they serve."""
    kept = []

    class Marked(fi.LU):
        def factor(self, matrix, **options):
            kept.append(weakref.ref(self.token))
            return super().factor(matrix, **options)

    gc.collect()
    gc.disable()
    try:

        def run():
            solver = Marked()
            object.__setattr__(solver, "token", torch.zeros(1))
            twice(custom(solver))

        run()
        assert kept
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


# --- samples apart -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["jvp of grad", "backward twice", "vmap(hessian)"])
def test_a_singular_sample_is_named_or_nan(stack):
    """f' = 0 at y = 0, in all of one sample of three."""
    y = X.clone()
    y[1] = 0
    flat = lambda y: y**3 + 0.1 * (y @ A.T) ** 3  # noqa: E731

    def derivative(solver, y):
        h = fi.custom_inverse(lambda x: y.clone(), flat, event_dim=1, linear_solver=solver, vmap_method="sequential")
        if stack == "vmap(hessian)":
            h = fi.custom_inverse(
                lambda x, i: y[i].clone(), lambda y, i: flat(y), event_dim=1, linear_solver=solver, vmap_method="sequential"
            )
            return vmap(hessian(lambda x, i: torch.sin(h(x, i)).sum()))(flat(y), torch.arange(len(y)))
        if stack == "jvp of grad":
            return jvp(grad(lambda x: torch.sin(h(x)).sum()), (flat(y),), (V[: len(y)],))[1]
        x = flat(y).requires_grad_()
        (first,) = torch.autograd.grad(torch.sin(h(x)).sum(), x, create_graph=True)
        return torch.autograd.grad(first, x, V[: len(y)])[0]

    with pytest.raises(fi.SingularJacobianError, match="1 of 3"):
        derivative(fi.LU(), y)
    got = derivative(fi.LU(on_singular="nan"), y)
    assert got[1].isnan().all()
    regular = derivative(fi.LU(), X)
    assert_close([got[[0, 2]]], [regular[[0, 2]]])


@pytest.mark.parametrize("stack", ["jvp of grad", "backward twice"])
def test_other_dtypes(stack):
    """float32, and half precision computed in it."""
    want = STACKS[stack](g)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        x, W, v = X.to(dtype), A.to(dtype), V.to(dtype)
        h = fi.custom_inverse(lambda x, W: g(x.double(), W.double()), f, event_dim=1)
        if stack == "jvp of grad":
            got = [jvp(lambda x, W=W, h=h: grad(loss(h))(x, W), (x,), (v,))[1]]
        else:
            x, W = x.requires_grad_(), W.requires_grad_()
            (first,) = torch.autograd.grad(loss(h)(x, W), x, create_graph=True)
            got = torch.autograd.grad(first, (x, W), v)
        assert all(t.dtype == dtype for t in got)
        assert_close([t.double() for t in got], [want] if stack == "jvp of grad" else list(want), tolerance)


def test_complex_numbers():
    """A holomorphic f: real pairs inside, torch's convention outside."""
    W = A + 0.3j * A.mT
    f = lambda y: 2 * y + torch.sin(y @ W.T) / 3  # noqa: E731
    y = (X + 0.5j * V) / 3
    h = fi.custom_inverse(lambda x: solved(x), f, event_dim=1)

    def solved(x):
        y = x / 2
        for _ in range(60):
            J = 2 * torch.eye(N) + torch.cos(y @ W.T).unsqueeze(-1) * W / 3
            y = y - (torch.linalg.inv(J) @ (f(y) - x).unsqueeze(-1)).squeeze(-1)
        return y

    number = lambda h: lambda x: (h(x) * h(x).conj()).real.sin().sum()  # noqa: E731
    v = torch.complex(V, X)
    for transform in (
        lambda h: jvp(grad(number(h)), (f(y),), (v,))[1],
        lambda h: vmap(lambda x, v: jvp(grad(number(h)), (x,), (v,))[1])(f(y), v),
        lambda h: grad(lambda x: (grad(number(h))(x) * v).real.sum())(f(y)),
    ):
        assert_close([transform(h)], [transform(solved)])


# --- where it runs -----------------------------------------------------------------------------------


@inference_tensors_in_transforms
@pytest.mark.parametrize("transform", [jacrev, jacfwd, lambda h: jacfwd(jacrev(h)), lambda h: jacrev(jacrev(h))])
def test_in_inference_mode(transform):
    """There is no graph to be had, and none is needed."""
    h = fi.custom_inverse(lambda x: g(x, A), lambda y: f(y, A), event_dim=1)
    want = transform(lambda x: g(x, A))(X[0])
    with torch.inference_mode():
        assert_close([transform(h)(X[0]).clone()], [want])


def test_second_order_under_autocast():
    """Not in bfloat16, wherever f is evaluated."""
    x, W, y = X.float(), A.float(), g(X, A).float()
    h = fi.custom_inverse(lambda x, W: y.clone(), f, event_dim=1)
    number = lambda x: grad(loss(h))(x, W)  # noqa: E731
    want = jvp(number, (x,), (V.float(),))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = jvp(number, (x,), (V.float(),))[1]
    assert_close([got], [want], 1e-6)


def test_a_tensor_of_a_closed_transform():
    """What is saved inside a vjp is used outside of it: its own level must not be mistaken for one that is open again."""
    h = fi.custom_inverse(lambda x: g(x, A), lambda y: f(y, A), event_dim=1)

    def third(h):
        def second(x):
            value, pull = torch.func.vjp(lambda x: torch.func.vjp(h, x)[1](x.sin())[0], x)
            return torch.func.vjp(lambda c: pull(c)[0], value)[1](x.cos())[0]

        return jacfwd(second)(X[0])

    assert_close([third(h)], [third(lambda x: g(x, A))])


def test_a_live_parameter_beneath_a_jacobian():
    """Only the transforms that follow nothing are taken off: plain autograd still follows W."""
    W = A.clone().requires_grad_()

    def derivative(h):
        J = vmap(jacrev(lambda x: h(x, W)))(X)
        return torch.autograd.grad(J.sin().sum(), W)

    assert_close(derivative(custom()), derivative(g))


class Handing:
    """Factors of the unit matrix."""

    def solve(self, b, *, transpose=False):
        return b


class Overwriting:
    def solve(self, b, *, transpose=False):
        return b.mul_(1)


class Unit:
    def __init__(self, factors, *, exact):
        self.factors, self.exact = factors, exact

    def factorise(self, operator):
        return self.factors()


UNIT = {
    "exact": Unit(Handing, exact=True),
    "not exact": Unit(Handing, exact=False),
    "in place": Unit(Overwriting, exact=True),
    "callable": lambda mv, b: b,
    "callable in place": lambda mv, b: b.mul_(1),
}


@pytest.mark.parametrize("solver", UNIT.values(), ids=UNIT)
def test_a_solver_that_hands_back_what_it_was_given(solver):
    """Tangents and cotangents belong to whoever gave them."""
    h = fi.custom_inverse(lambda x: x + 1, lambda y: y - 1, event_dim=1, linear_solver=solver)
    x, v = (torch.tensor(t, dtype=torch.float64) for t in ([0.3, -0.7], [1.0, 2.0]))
    given = v.clone()
    assert_close(jvp(lambda z: h(z).mul_(3) + z, (x,), (given,))[1], 4 * v)
    vjp(h, x)[1](given)[0].mul_(3)
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(h(leaf), leaf, given)[0].mul_(3)
    assert torch.equal(given, v)
    assert given._version == 0
