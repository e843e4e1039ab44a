"""LU alone: right under every nesting and batch shape, one factorisation for many right-hand sides."""

import itertools

import numpy as np
import pytest
import torch
from helpers import assert_close, live, total
from problems import Draw
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functorch_inverse as fi
from functorch_inverse._dense import factorised


def systems(*batch, n=3):
    """A well-conditioned non-symmetric A of shape (*batch, n, n), and b of shape (*batch, n)."""
    draw = Draw(0)
    return draw.normal(*batch, n, n) + 3 * torch.eye(n, dtype=torch.float64), draw.normal(*batch, n)


def solve(transpose=False):
    return lambda A, b: factorised(fi.LU(), A).solve(b, transpose=transpose)


def exact(transpose=False):
    """By the inverse, which torch differentiates rightly in every nesting (torch_facts 1.4)."""

    def function(A, b):
        inverse = torch.linalg.inv(A)
        return ((inverse.mT if transpose else inverse) @ b.unsqueeze(-1)).squeeze(-1)

    return function


MODES = {"rev": jacrev, "fwd": jacfwd}
either = pytest.mark.parametrize("transpose", [False, True])
BATCHES = [(), (1,), (4,), (2, 3), (1, 4)]


# --- values and derivatives ------------------------------------------------------------------------


@either
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_values(transpose, batch, n):
    A, b = systems(*batch, n=n)
    assert_close([solve(transpose)(A, b)], [exact(transpose)(A, b)])


@either
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("modes", [m for k in (1, 2, 3) for m in itertools.product(MODES, repeat=k)], ids="_".join)
def test_every_nesting(transpose, batch, modes):
    """Along lines through A and b, so that the third order stays small."""
    A, b = systems(*batch, n=2)

    def derivative(function):
        h = lambda s, t: total((function(A + s * A.sin() + t * A.cos(), b + s * b.sin() + t * b.cos()),))  # noqa: E731
        for mode in reversed(modes):
            h = MODES[mode](h, (0, 1))
        return h(A.new_tensor(0.1), A.new_tensor(0.2))

    assert_close(derivative(solve(transpose)), derivative(exact(transpose)))


@either
@pytest.mark.parametrize("modes", [m for k in (1, 2) for m in itertools.product(MODES, repeat=k)], ids="_".join)
@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, -1)])
def test_vmap_of_every_nesting(transpose, modes, dims):
    """torch's own linalg.solve is wrong here by factors of a hundred and more."""
    A, b = systems(4)
    inputs = [t.movedim(0, d) if d is not None else t[0] for t, d in zip((A, b), dims, strict=True)]

    def derivative(function):
        for mode in reversed(modes):
            function = MODES[mode](function, (0, 1))
        return vmap(function, dims)(*inputs)

    assert_close(derivative(solve(transpose)), derivative(exact(transpose)))


@either
@pytest.mark.parametrize(("A_batch", "b_batch"), [((4,), (4, 5)), ((4, 5), (4,)), ((), (4, 5))])
def test_factors_meet_right_hand_sides_of_another_batch_shape(transpose, A_batch, b_batch):
    """vmap over the surplus dim; torch's lu_solve returns garbage for LU (4, 1, 3, 3) and B (4, 5, 3, 1)."""
    A, b = systems(*A_batch)[0], systems(*b_batch)[1]
    both = [vmap(f, (0 if A_batch else None, 0)) for f in (solve(transpose), exact(transpose))]
    if len(A_batch) != len(b_batch):
        outer = (1 if len(A_batch) > 1 else None, 1 if len(b_batch) > 1 else None)
        both = [vmap(f, outer) for f in both]
    assert_close([both[0](A, b)], [both[1](A, b)])


@either
def test_many_right_hand_sides_nested(transpose):
    A, bs = systems()[0], systems(2, 3)[1]
    h = lambda f: vmap(vmap(jacrev(f, (0, 1)), (None, 0)), (None, 0))(A, bs)  # noqa: E731
    assert_close(h(solve(transpose)), h(exact(transpose)))


@either
def test_plain_autograd_to_the_third_order(transpose):
    def derivative(function):
        A, b = live(systems(2))
        out = total((function(A, b),))
        for _ in range(2):
            out = total(torch.autograd.grad(out, (A, b), create_graph=True))
        return torch.autograd.grad(out, (A, b))

    assert_close(derivative(solve(transpose)), derivative(exact(transpose)))


def test_factors_serve_many_solves():
    A, b = systems(4)
    factors = factorised(fi.LU(), A)
    got = [factors.solve(b), factors.solve(b, transpose=True), factors.solve(2 * b)]
    assert_close(got, [exact()(A, b), exact(True)(A, b), 2 * exact()(A, b)])


def test_gradients_through_shared_factors():
    A, b = live(systems(4))
    factors = factorised(fi.LU(), A)
    got = torch.autograd.grad(total((factors.solve(b), factors.solve(b, transpose=True))), (A, b))
    assert_close(got, torch.autograd.grad(total((exact()(A, b), exact(True)(A, b))), (A, b)))


# --- one factorisation -----------------------------------------------------------------------------

N = 12
MATRIX = Draw(1).normal(N, N) + 5 * torch.eye(N, dtype=torch.float64)


def box(**options):
    inverse = torch.linalg.inv(MATRIX)
    return fi.custom_inverse(
        lambda x, c: torch.asinh((inverse @ x[..., None])[..., 0]) / c,
        lambda y, c: (MATRIX @ torch.sinh(c * y)[..., None])[..., 0],
        **options,
    )


X, C = Draw(2).normal(N), Draw(3).positive(N)
XS = Draw(4).normal(6, N)


@pytest.fixture
def factorisations(monkeypatch):
    """The shapes of all matrices that are factorised."""
    shapes, factorise = [], torch.linalg.lu_factor_ex

    def counted(matrix, *args, **kwargs):
        shapes.append(tuple(matrix.shape))
        return factorise(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "lu_factor_ex", counted)
    for name in ("lu_factor", "lu", "inv", "inv_ex", "solve", "solve_ex"):
        monkeypatch.setattr(torch.linalg, name, None)
    return shapes


@pytest.mark.parametrize("event_dim", [None, 1])
@pytest.mark.parametrize("transform", [jacrev, jacfwd, lambda h, a: vmap(jacrev(h, a), (0, None))])
def test_one_factorisation_for_a_whole_jacobian(event_dim, transform, request):
    """N cotangents, or 2 N tangents of x and theta, are columns of one system."""
    h = box(event_dim=event_dim)
    shapes = request.getfixturevalue("factorisations")
    mapped = transform not in (jacrev, jacfwd)
    transform(h, (0, 1))(XS if mapped else X, C)
    assert shapes == [(6, N, N) if mapped else (N, N)]


def test_x_and_theta_share_the_factors(request):
    h, inputs = box(event_dim=1), live((XS, C))
    shapes = request.getfixturevalue("factorisations")
    h(*inputs).sum().backward()
    assert shapes == [(6, N, N)]


def test_the_next_backward_of_the_same_node_shares_the_factors(request):
    """A Jacobian by a loop over autograd.grad factorises once."""
    h, inputs = box(event_dim=1), live((XS, C))
    shapes = request.getfixturevalue("factorisations")
    y = h(*inputs).sum(0)
    for i in range(N):
        torch.autograd.grad(y[i], inputs, retain_graph=True)
    assert shapes == [(6, N, N)]


def test_batched_gradients_share_the_factors(request):
    h, inputs = box(event_dim=1), live((XS, C))
    shapes = request.getfixturevalue("factorisations")
    y = h(*inputs)
    torch.autograd.grad(y, inputs, torch.stack([y.detach()] * 7), is_grads_batched=True)
    assert shapes == [(6, N, N)]


@pytest.mark.parametrize("order", [grad, hessian])
def test_no_factorisation_a_tangent_in_higher_orders(order, request):
    """A handful, not one for each of N directions."""
    h = box()
    shapes = request.getfixturevalue("factorisations")
    order(lambda x: h(x, C).sin().sum())(X)
    assert 1 <= len(shapes) <= 3
    assert set(shapes) == {(N, N)}


def test_elementwise_builds_no_matrix(request):
    h = fi.custom_inverse(torch.asinh, torch.sinh, event_dim=0)
    shapes = request.getfixturevalue("factorisations")
    hessian(lambda x: h(x).sin().sum())(XS)
    assert shapes == []


# --- a solver of the user's own --------------------------------------------------------------------


class Inverting:
    """What `linear_solver=` takes: an object with `factorise`, whose result has `solve`."""

    def factorise(self, operator):
        self.inverse = torch.linalg.inv(operator.as_matrix())
        return self

    def solve(self, b, *, transpose=False):
        return ((self.inverse.mT if transpose else self.inverse) @ b.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_another_linear_solver(transform):
    assert_close(transform(box(linear_solver=Inverting()), (0, 1))(X, C), transform(box(), (0, 1))(X, C))


class ByValues(Inverting):
    """One that says that it solves, and needs no derivative of its own."""

    exact = True

    def factorise(self, operator):
        self.inverse = torch.from_numpy(np.linalg.inv(operator.as_matrix().numpy()))
        return self


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_a_linear_solver_of_values_alone(transform):
    assert_close(transform(box(linear_solver=ByValues()), (0, 1))(X, C), transform(box(), (0, 1))(X, C))


# Of few numbers the factors are a copy, of many they lie in the memory of the matrix, and are judged by other means.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [4, 2**16 // 20**2 + 1])
@pytest.mark.parametrize("spoiled", ["equal rows", "a zero column", "nearly", "tiny", "nan", "inf"])
def test_few_and_many_matrices_are_judged_alike(spoiled, batch, dtype):
    n, i = 20, 2
    A, b = (t.to(dtype) for t in systems(batch, n=n))
    A[i] = {
        "equal rows": lambda a: torch.cat([a[:-1], a[:1]]),
        "a zero column": lambda a: torch.cat([a[:, :-1], 0 * a[:, :1]], 1),
        "nearly": lambda a: torch.cat([a[:-1], a[:1] * (1 + torch.finfo(dtype).eps)]),
        "tiny": lambda a: a * 1e-30,
        "nan": lambda a: a.index_fill(1, torch.tensor([3]), torch.nan),
        "inf": lambda a: a.index_fill(1, torch.tensor([3]), torch.inf),
    }[spoiled](A[i])
    singular = spoiled not in ("tiny", "nan", "inf")
    with torch.no_grad():
        if singular:
            with pytest.raises(fi.SingularJacobianError, match=f"1 of {batch} samples"):
                factorised(fi.LU(), A.clone(), owned=True)
        found = factorised(fi.LU(on_singular="nan"), A.clone(), owned=True).solve(b)
        kept = A.clone()
        factorised(fi.LU(on_singular="nan"), kept).solve(b)
    assert torch.equal(kept.nan_to_num(), A.nan_to_num())
    assert found[i].isnan().all() == (spoiled != "tiny")
    others = [k for k in range(batch) if k != i or spoiled == "tiny"]
    residual = (A[others] @ found[others][..., None])[..., 0] - b[others]
    assert (residual.abs().amax(-1) <= 100 * torch.finfo(dtype).eps * b[others].abs().amax(-1) * n).all()


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e6), (torch.float64, 1e14)])
def test_cholesky_judges_each_entry_in_its_own_units(dtype, large):
    """A large number elsewhere hides no asymmetry; and one in a row of its own units is none."""
    A = torch.tensor([[large, 0, 0], [0, 2, 1], [0, 0.5, 2]], dtype=dtype)
    h = fi.custom_root(lambda t: torch.zeros_like(t), lambda y, t: A @ y - t, linear_solver=fi.Cholesky())
    with pytest.raises(fi.StructureError, match="not symmetric"):
        torch.func.jacrev(h)(torch.zeros(3, dtype=dtype))
    A = torch.tensor([[large, large**0.5, 0], [large**0.5, 2, 1], [0, 1, 2]], dtype=dtype)
    J = torch.func.jacrev(h)(torch.zeros(3, dtype=dtype))
    assert_close([J], [torch.linalg.inv(A.double()).to(dtype)], 1e3 * torch.finfo(dtype).eps)
