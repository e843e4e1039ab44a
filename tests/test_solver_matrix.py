"""linear solvers x transform stacks, each cell against a closed form; and what each solver says of a wrong Jacobian."""

import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from fresh import run_fresh
from helpers import all_of, assert_close, counted, loss, mapped, tangents, total
from problems import PREFIX, TREE, VECTOR, Draw, W, constant
from test_roots import TRANSFORMS
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import functorch_inverse as fi

KRYLOV = {
    "GMRES": fi.GMRES(rtol=1e-13),
    "BiCGStab": fi.BiCGStab(rtol=1e-13),
    "NormalCG": fi.NormalCG(rtol=1e-13),
}


def neumann(mv, rhs):
    """A solver of the user's own: A = D (I - N) with a small N, after scaling by a number."""
    u = torch.zeros_like(rhs)
    for _ in range(400):
        u = u + 0.2 * (rhs - mv(u))
    return u


class Inverting:
    """A solver object of the user's own."""

    def factorise(self, operator):
        self.inverse = torch.linalg.inv(operator.as_matrix())
        return self

    def solve(self, b, *, transpose=False):
        return ((self.inverse.mT if transpose else self.inverse) @ b.unsqueeze(-1)).squeeze(-1)


# --- problems whose Jacobian has the structure that a solver asks for -------------------------------

T = torch.tensor([[1.5, 0.0, 0.0], [0.8, 2.0, 0.0], [-0.5, 0.6, 1.2]], dtype=torch.float64)
D = torch.tensor([[1.5, -0.7, 0.0], [0.8, 2.0, 0.4], [0.0, 0.6, 1.2]], dtype=torch.float64)
S = torch.tensor([[2.0, 0.4, -0.2], [0.4, 1.5, 0.3], [-0.2, 0.3, 1.8]], dtype=torch.float64)


def mixing(M):
    """f(y, c, b) = M sinh(c y) + b, whose inverse is known."""

    def f(y, c, b):
        return torch.sinh(c * y) @ constant(M, y).T + b

    def exact(x, c, b):
        return torch.asinh((x - b) @ constant(torch.linalg.inv(M), x).T) / c

    return f, exact


def gradient(M):
    """f = d/dy of y M y / 2 + sum(cosh), after a change of variables that is known: f(y) = M y c with a symmetric A."""

    def f(y, c, b):
        return (y @ constant(M, y)) * c[..., :1] + b

    def exact(x, c, b):
        return ((x - b) / c[..., :1]) @ constant(torch.linalg.inv(M), x)

    return f, exact


X, C, B = VECTOR.inputs()
CASES = {
    "LU": (mixing(W), fi.LU()),
    "Inverting": (mixing(W), Inverting()),
    "LeastSquares": (mixing(W), fi.LeastSquares()),
    "Triangular": (mixing(T), fi.Triangular()),
    "Banded": (mixing(D), fi.Banded(1, 1)),
    "Banded_full": (mixing(W), fi.Banded(2, 5)),
    "Banded_lower": (mixing(T), fi.Banded(2, 0)),
    "Triangular_upper": (mixing(T.T), fi.Triangular(lower=False)),
    "Cholesky": (gradient(S), fi.Cholesky()),
    "CG": (gradient(S), fi.CG(rtol=1e-13)),
    "callable": (mixing(W), neumann),
    **{name: (mixing(W), solver) for name, solver in KRYLOV.items()},
}
every_solver = pytest.mark.parametrize("name", CASES)


def pair(name, form="inverse", **options):
    """What is under test, and the truth; g knows nothing of derivatives."""
    (f, exact), solver = CASES[name]
    if form == "inverse":
        h = fi.custom_inverse(lambda *i: exact(*i).detach(), f, event_dim=1, linear_solver=solver, **options)
    else:
        h = fi.custom_root(
            lambda *i: exact(*i), lambda y, x, c, b: f(y, c, b) - x, event_dim=1, linear_solver=solver, **options
        )
    return (lambda *i: (h(*i),)), (lambda *i: (exact(*i),))


@every_solver
@pytest.mark.parametrize("form", ["inverse", "root"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(name, form, transform):
    h, exact = pair(name, form)
    assert_close(TRANSFORMS[transform](h, (X, C, B)), TRANSFORMS[transform](exact, (X, C, B)))


@every_solver
@pytest.mark.parametrize("transform", ["plain_twice", "jvp", "hessian", "jvp_jvp"])
def test_batches(name, transform):
    h, exact = pair(name)
    inputs = (*VECTOR.stacked(2, 2)[:1], C, B)
    assert_close(TRANSFORMS[transform](h, inputs), TRANSFORMS[transform](exact, inputs))


@every_solver
@pytest.mark.parametrize("over", ["x", "theta", "both"])
@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
def test_vmap_of_second_order(name, over, outer, inner):
    dims, inputs = mapped(VECTOR, over)
    h, exact = pair(name)
    got, want = (vmap(outer(inner(loss(k), all_of(inputs)), all_of(inputs)), dims)(*inputs) for k in (h, exact))
    assert_close(got, want)


@every_solver
def test_nested_vmap_and_gradients_through_vmap(name):
    h, exact = pair(name)
    inputs = VECTOR.stacked(2, 2)
    assert_close(*(vmap(vmap(jacrev(k, (0, 1, 2))))(*inputs) for k in (h, exact)))
    assert_close(*(grad(lambda *i, k=k: total(vmap(vmap(k))(*i)), (0, 1, 2))(*inputs) for k in (h, exact)))


@every_solver
def test_third_order(name):
    """Along a line, so that it stays small."""
    h, exact = pair(name)

    def third(k):
        along = lambda t: total(k(X + t * X.cos(), C + t * C.sin(), B - t))  # noqa: E731
        return jacfwd(jacrev(jacfwd(along)))(X.new_tensor(0.1)), jacrev(jacfwd(jacrev(along)))(X.new_tensor(0.1))

    assert_close(third(h), third(exact))


@pytest.mark.parametrize("name", ["GMRES", "BiCGStab", "NormalCG", "LeastSquares"])
@pytest.mark.parametrize("problem", [TREE, PREFIX], ids=repr)
def test_trees(name, problem):
    h, exact = problem.root(CASES[name][1]), problem.closed_form()
    inputs = problem.inputs()
    for transform in ("plain_twice", "hessian", "jvp"):
        assert_close(TRANSFORMS[transform](h, inputs), TRANSFORMS[transform](exact, inputs))


@every_solver
def test_planted_transpose_is_caught(name):
    """A derivative with A^T in place of A, or of another sign, is far from the truth."""
    (f, exact), solver = CASES[name]
    if name in ("Cholesky", "CG"):
        wrong = lambda y, c, b: f(-y, c, b) * -1.5  # noqa: E731
    elif name.startswith(("Triangular", "Banded")):
        wrong = lambda y, c, b: f(y, c, b) * 1.01  # noqa: E731
    else:
        wrong = lambda y, c, b: torch.sinh(c * y) @ constant(W, y) + b  # noqa: E731
    h = fi.custom_inverse(exact, wrong, event_dim=1, linear_solver=solver)
    with pytest.raises(AssertionError):
        assert_close([jacrev(h)(X, C, B)], [jacrev(exact)(X, C, B)])


@every_solver
def test_solvers_are_values(name):
    solver = CASES[name][1]
    if isinstance(solver, Inverting) or solver is neumann:
        return
    for copy in (pickle.loads(pickle.dumps(solver)), deepcopy(solver)):
        assert copy == solver and hash(copy) == hash(solver)
    assert solver != fi.LU(on_singular="nan")


def test_hooks():
    """The first-order backward works where torch.func.vjp does not."""
    for name in CASES:
        h, exact = pair(name)
        inputs = tuple(t.clone().requires_grad_() for t in (X, C, B))
        with torch.autograd.graph.save_on_cpu():
            y = total(h(*inputs))
        assert_close(torch.autograd.grad(y, inputs), torch.autograd.grad(total(exact(*inputs)), inputs))


# --- more unknowns than equations, and fewer --------------------------------------------------------

WIDE = Draw(5).normal(2, 4)


def test_minimum_norm():
    """f(y) = M y with 2 equations for 4 unknowns: the branch of least norm is the pseudo-inverse."""
    g = fi.custom_inverse(
        lambda x, c: (torch.linalg.pinv(WIDE) @ x) / c, lambda y, c: WIDE @ (c * y), linear_solver=fi.LeastSquares()
    )
    exact = lambda x, c: (torch.linalg.pinv(WIDE) @ x) / c  # noqa: E731
    x, c = Draw(6).normal(2), Draw(6).positive()
    got, want = ((jacrev(h, (0, 1))(x, c), jacfwd(h, (0, 1))(x, c), hessian(h, (0, 1))(x, c)) for h in (g, exact))
    assert_close(got, want)


def test_a_curved_branch_of_least_norm():
    """f(y) = |y|^2 / 2 along a ray: y' = y / |y|^2, the shortest way to the next sphere."""
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    g = fi.custom_inverse(
        lambda x: direction * (2 * x).sqrt(), lambda y: (y**2).sum(-1) / 2, event_dim=0, out_event_dim=1,
        linear_solver=fi.LeastSquares(),
    )  # fmt: skip
    exact = lambda x: direction * (2 * x).sqrt()  # noqa: E731
    x = torch.tensor(1.3, dtype=torch.float64)
    for transform in (
        jacrev,
        jacfwd,
        lambda h: jacrev(jacfwd(h)),
        lambda h: jacfwd(jacfwd(h)),
        lambda h: jacrev(jacrev(jacrev(h))),
    ):
        assert_close([transform(g)(x)], [transform(exact)(x)])


def test_more_equations_than_unknowns():
    """r(y, t) = 0 is three equations that agree: y^3 = t, with weights."""
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    h = fi.custom_root(
        lambda t: t.sign() * t.abs() ** (1 / 3), lambda y, t: weights * (y**3 - t).unsqueeze(-1), event_dim=0,
        linear_solver=fi.LeastSquares(),
    )  # fmt: skip
    t = torch.tensor([0.5, 2.0], dtype=torch.float64)
    exact = lambda t: t.sign() * t.abs() ** (1 / 3)  # noqa: E731
    assert_close([jacrev(h)(t), jacfwd(jacrev(h))(t)], [jacrev(exact)(t), jacfwd(jacrev(exact))(t)])


def test_without_full_rank():
    h = fi.custom_inverse(lambda x: torch.cat([x, x]), lambda y: y[:2].sum() * torch.ones(2), linear_solver=fi.LeastSquares())
    with pytest.raises(fi.SingularJacobianError, match="1 of 1"):
        jacrev(h)(torch.ones(2))


def test_more_unknowns_need_the_assertion():
    h = fi.custom_inverse(lambda x: torch.cat([x, x]), lambda y: y[:2] + y[2:])
    with pytest.raises(fi.StructureError, match="LeastSquares"):
        jacrev(h)(torch.ones(2))


# --- what A is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "solver", "error", "text"),
    [
        (lambda y: y @ W, fi.Cholesky(), fi.StructureError, "Cholesky.* not symmetric in 2 of 2"),
        (lambda y: -y, fi.Cholesky(), fi.SingularJacobianError, "not positive definite in 2 of 2"),
        (lambda y: y @ W, fi.Triangular(), fi.StructureError, "not lower triangular"),
        (lambda y: y @ T.T, fi.Triangular(lower=False), fi.StructureError, "not upper triangular"),
        (lambda y: y * torch.tensor([1.0, 0.0, 1.0]), fi.Triangular(), fi.SingularJacobianError, "2 of 2 samples"),
        (lambda y: y @ W, fi.Banded(1, 1), fi.StructureError, "outside of 1 diagonals below and 1 above .* 2 of 2"),
        (lambda y: y @ (D + 1e-9 * W), fi.Banded(1, 1), fi.StructureError, "outside of 1 diagonals"),
        (lambda y: y @ T.T, fi.Banded(0, 2), fi.StructureError, "outside of 0 diagonals below"),
        (lambda y: y * torch.tensor([1.0, 0.0, 1.0]), fi.Banded(0, 0), fi.SingularJacobianError, "2 of 2 samples"),
        (lambda y: y @ W, fi.CG(), fi.StructureError, "CG.*transpose"),
        (lambda y: -y, fi.CG(), fi.NotConvergedError, "positive definite"),
        (lambda y: y * torch.tensor([1.0, 0.0, 1.0]), fi.GMRES(), fi.NotConvergedError, "GMRES.*2 of 2"),
        (lambda y: y @ W, fi.GMRES(preconditioner=torch.ones(5)), fi.StructureError, "preconditioner"),
        (lambda y: y @ W, lambda mv, b: 0 * b, fi.NotConvergedError, r"solve\(mv, rhs\) left a relative residual of 1"),
        (lambda y: y @ W, lambda mv, b: b[..., :2], fi.StructureError, r"solve\(mv, rhs\) returned"),
        (lambda y: y @ W, lambda mv, b: None, fi.StructureError, "NoneType"),
    ],
)
def test_wrong_solver(f, solver, error, text):
    x = torch.stack([X, 2 * X]).requires_grad_()
    y = fi.custom_inverse(lambda x: x, f, event_dim=1, linear_solver=solver)(x)
    with pytest.raises(error, match=text):
        y.sum().backward()


@pytest.mark.parametrize(
    "solver", [fi.Triangular(on_singular="nan"), fi.LU(on_singular="nan"), fi.LeastSquares(on_singular="nan")]
)
def test_nan_for_singular_samples_alone(solver):
    x = torch.stack([X, 0 * X, 2 * X]).requires_grad_()
    y = fi.custom_inverse(lambda x: x.sign() * x.abs().sqrt(), lambda y: y * y.abs(), event_dim=1, linear_solver=solver)(x)
    y.sum().backward()
    assert x.grad.isnan().any(-1).tolist() == [False, True, False]
    assert_close([x.grad[::2]], [0.5 / x.detach()[::2].abs().sqrt()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("large", ["entry", "row", "column"])
def test_entries_outside_of_bands_are_seen_beside_large_ones(dtype, large):
    """A penalty of 1e6 in one place must not hide a one in another."""
    A = 3 * torch.eye(6, dtype=dtype) - torch.diag(torch.ones(5, dtype=dtype), 1) - torch.diag(torch.ones(5, dtype=dtype), -1)
    A[{"entry": (1, 1), "row": 1, "column": (slice(None), 1)}[large]] *= 1e6
    h = fi.custom_inverse(lambda x: torch.linalg.solve(A, x), lambda y: y @ A.T, event_dim=1, linear_solver=fi.Banded(1, 1))
    x = torch.ones(6, dtype=dtype)
    jacrev(h)(x)
    A[4, 1] = -1.0
    with pytest.raises(fi.StructureError, match="outside of 1"):
        jacrev(h)(x)


@pytest.mark.parametrize(
    "solver",
    [fi.LU(), fi.LeastSquares(), fi.GMRES(), fi.BiCGStab(), fi.Banded(0, 0), fi.Triangular(), fi.CG(), fi.Cholesky()],
    ids=repr,
)
def test_a_residual_in_another_precision_than_y(solver):
    """y is float32, as the first argument; the residual float64, as the second."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5], dtype=torch.float64)
    root = fi.custom_root(lambda a, b: a / b, lambda y, a, b: y * b - a, event_dim=1, linear_solver=solver, check=1e-5)
    pushed = jvp(root, (a, b), (a.cos(), b.sin()))[1]
    pulled = grad(lambda a, b: root(a, b).sum(), (0, 1))(a, b)
    assert pushed.dtype == torch.float32 and [t.dtype for t in pulled] == [torch.float32, torch.float64]
    torch.testing.assert_close(pushed.double(), a.cos() / b - a * b.sin() / b**2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pulled[1], -a / b**2, rtol=1e-6, atol=1e-6)


def relaxed(mv, rhs):
    """A fixed number of Richardson steps, as a user may write them."""
    u = torch.zeros_like(rhs)
    for _ in range(100):
        u = u + 0.3 * (rhs - mv(u))
    return u


@pytest.mark.parametrize("solver", [fi.GMRES(), fi.BiCGStab(), fi.NormalCG(), fi.CG(), relaxed], ids=lambda s: type(s).__name__)
def test_a_singular_jacobian_that_has_solutions(solver):
    """A tangent of a root lies in the range of A by its making; which of many solutions is meant, nobody knows."""
    S = torch.ones(2, 2, dtype=torch.float64)
    branch = fi.custom_root(lambda a: torch.stack([a.sum(), 0 * a.sum()]), lambda y, a: S @ y - S @ a, linear_solver=solver)
    with pytest.raises(fi.NotConvergedError, match="singular"):
        jacfwd(branch)(torch.tensor([1.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("solver", KRYLOV.values(), ids=repr)
def test_preconditioners_of_the_wrong_kind(solver):
    for wrong in (2.0, [1.0], "Jacobi"):
        with pytest.raises(ValueError, match="preconditioner"):
            replace(solver, preconditioner=wrong)

    def slope(a, M):
        root = fi.custom_root(lambda a: a, lambda y, a: (y - a) @ W, linear_solver=replace(solver, preconditioner=M))
        return grad(lambda a: root(a).sum())(a)

    with pytest.raises(fi.StructureError, match=r"torch\.vmap batches"):
        vmap(slope)(torch.stack([X, X]), torch.stack([X, X]))


@pytest.mark.parametrize("solver", KRYLOV.values(), ids=repr)
def test_torchs_own_batching(solver):
    """is_grads_batched does not ask a Function for its rule, and hides the values that an iteration looks at."""
    h = fi.custom_inverse(lambda x: x @ torch.linalg.inv(W), lambda y: y @ W, event_dim=1, linear_solver=solver)
    x = X.clone().requires_grad_()
    (got,) = torch.autograd.grad(h(x), x, torch.eye(3, dtype=X.dtype), is_grads_batched=True)
    assert_close([got], [torch.linalg.inv(W).mT], 1e-8)


def test_a_trace_has_no_values():
    h = fi.custom_inverse(lambda x: x * 1, lambda y: y @ W, event_dim=1, linear_solver=fi.GMRES())
    with pytest.raises(NotImplementedError, match="looks at values"):
        torch.func.linearize(h, X)


def test_a_callable_that_returns_nan():
    h = fi.custom_inverse(lambda x: x, lambda y: y @ W, event_dim=1, linear_solver=lambda mv, b: b * torch.nan)
    with pytest.raises(fi.NotConvergedError, match="inf"):
        grad(lambda x: h(x).sum())(X)


@every_solver
def test_empty_samples_and_empty_batches(name):
    solver = CASES[name][1]
    for shape in ((3, 0), (0, 3), (2, 0, 3)):
        h = fi.custom_root(lambda a: 2 * a, lambda y, a: y / 2 - a, event_dim=1, linear_solver=solver)
        a = torch.zeros(shape, dtype=torch.float64)
        assert grad(lambda a, h=h: h(a).sum())(a).shape == a.shape
        assert jvp(h, (a,), (a,))[1].shape == a.shape


def test_banded_options():
    for wrong in ({"lower": -1, "upper": 0}, {"lower": 1, "upper": 1, "on_singular": "inf"}):
        with pytest.raises(ValueError, match="Banded"):
            fi.Banded(**wrong)


def test_bands_take_few_passes():
    """lower + upper + 1 cotangents and one to check, whatever n is."""
    through, count = counted()

    def f(y):
        y = through(y)
        before, after = torch.nn.functional.pad(y, (1, 0))[..., :-1], torch.nn.functional.pad(y, (0, 1))[..., 1:]
        return 3 * y + torch.sin(before) - after**2

    x = Draw(8).normal(2, 500).requires_grad_()
    fi.custom_inverse(lambda x: 0.1 * x, f, event_dim=1, linear_solver=fi.Banded(1, 1))(x).sum().backward()
    assert count[0] <= 4


@pytest.mark.parametrize("with_scipy", [True, False])
def test_bands_without_scipy(with_scipy, monkeypatch):
    if not with_scipy:
        monkeypatch.setattr("functorch_inverse._lapack._lapack", lambda: None)
    h, exact = pair("Banded")
    assert_close(*(jacrev(k, (0, 1, 2))(X, C, B) for k in (h, exact)))


def test_warnings_instead_of_errors():
    h = fi.custom_inverse(lambda x: x, lambda y: y @ W, event_dim=1, linear_solver=fi.GMRES(max_steps=1, on_failure="warn"))
    with pytest.warns(RuntimeWarning, match="GMRES"):
        jvp(h, (X,), (X,))


# --- large systems ----------------------------------------------------------------------------------


def test_no_matrix_is_built():
    """n = 1e6: a few vectors; a matrix would take 8 TB."""
    n = 1_000_000
    x = torch.linspace(-1, 1, n, dtype=torch.float64).requires_grad_()

    def f(y):
        return 2 * y + 0.5 * torch.tanh(y.roll(1)) - 0.3 * torch.sin(y.roll(-1))

    y = fi.custom_inverse(lambda x: x / 2, f, event_dim=1, linear_solver=fi.BiCGStab())(x)
    (got,) = torch.autograd.grad(y.sum(), x)
    at = y.detach()
    slope = 0.5 / torch.cosh(at) ** 2, -0.3 * torch.cos(at)
    again = 2 * got + slope[0] * got.roll(-1) + slope[1] * got.roll(1)  # A^T u = 1
    assert (again - 1).abs().max() < 1e-8


def test_warm_start_saves_products():
    through, calls = counted()
    steps = []
    h = fi.custom_inverse(lambda x: torch.asinh(x), lambda y: through(torch.sinh(y)) @ constant(W, y), event_dim=1,
                          linear_solver=fi.GMRES(warm_start=True))  # fmt: skip

    for _ in range(2):
        x = X.clone().requires_grad_()
        calls[0] = 0
        h(x).sum().backward()
        steps.append(calls[0])
    assert steps[1] < steps[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["GMRES", "LeastSquares", "Triangular", "CG"])
def test_precision(name, dtype):
    (f, exact), solver = CASES[name]
    solver = fi.GMRES() if name == "GMRES" else fi.CG() if name == "CG" else solver
    h = fi.custom_inverse(exact, f, event_dim=1, linear_solver=solver)
    inputs = tuple(t.to(dtype) for t in (X, C, B))
    got = grad(lambda *i: h(*i).float().sum(), (0, 1, 2))(*inputs)
    want = grad(lambda *i: exact(*i).sum(), (0, 1, 2))(*(t.double() for t in inputs))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=(1e-5 if dtype == torch.float32 else 3e-2) * b.abs().max().item()
        )


def test_a_tangent_alone():
    """jvp along x, along theta, along both."""
    for name in CASES:
        h, exact = pair(name)
        for k in range(3):
            only = [i == k for i in range(3)]
            along = lambda f, only=only: jvp(  # noqa: E731
                lambda *chosen: f(
                    *(next(it) if o else t for it in [iter(chosen)] for o, t in zip(only, (X, C, B), strict=True))
                ),
                tuple(t for o, t in zip(only, (X, C, B), strict=True) if o),
                tuple(t for o, t in zip(only, tangents((X, C, B)), strict=True) if o),
            )
            assert_close(along(h), along(exact))


# --- torch.compile ----------------------------------------------------------------------------------


def check_compiled(name):
    def compiled(h):
        torch._dynamo.reset()
        return torch.compile(h, fullgraph=True, backend="aot_eager")

    (f, exact), solver = CASES[name]
    h = fi.custom_inverse(exact, f, event_dim=1, linear_solver=solver)
    inputs = tuple(t.clone().requires_grad_() for t in (X, C, B))
    got = torch.autograd.grad(total((compiled(h)(*inputs),)), inputs)
    assert_close(got, torch.autograd.grad(total((exact(*inputs),)), inputs))
    dims, stacked = mapped(VECTOR, "x")
    per_sample = lambda k: vmap(grad(lambda *i: total((k(*i),)), (0, 1, 2)), dims)  # noqa: E731
    assert_close(compiled(per_sample(h))(*stacked), per_sample(exact)(*stacked))
    assert_close([compiled(jacfwd(h))(X, C, B)], [jacfwd(exact)(X, C, B)])


@pytest.mark.parametrize("name", ["Banded", "Triangular"])
def test_compiled(name):
    run_fresh(check_compiled, name)


def check_compiled_without_values():
    """An iteration looks at values; bands that are too narrow cannot raise, so the derivative is nan."""
    (f, exact), solver = CASES["GMRES"]
    x = X.clone().requires_grad_()
    iterative = fi.custom_inverse(exact, f, event_dim=1, linear_solver=solver)
    with pytest.raises(Exception, match="iterative linear solver looks at values"):
        torch.compile(iterative, fullgraph=True, backend="aot_eager")(x, C, B)
    torch._dynamo.reset()
    narrow = fi.custom_inverse(exact, f, event_dim=1, linear_solver=fi.Banded(1, 1))
    y = torch.compile(narrow, fullgraph=True, backend="aot_eager")(x, C, B)
    assert_close([y.detach()], [exact(X, C, B)])
    y.sum().backward()
    assert x.grad.isnan().all()
    # A matrix that is singular only up to rounding: no pivot of it is zero.
    S = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], dtype=torch.float64)
    torch._dynamo.reset()
    blind = torch.compile(fi.custom_inverse(lambda x: x * 1, lambda y: y @ S, event_dim=1), fullgraph=True, backend="aot_eager")
    assert_close([blind(X)], [X])  # nothing requires grad
    torch._dynamo.reset()
    x.grad = None
    blind(x).sum().backward()
    assert x.grad.isnan().all()


def test_compiled_without_values():
    run_fresh(check_compiled_without_values)
