"""custom_root and custom_fixed_point: the catalogue again, as roots of f(y) - x and as fixed points."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from fresh import run_fresh
from helpers import (
    all_of,
    assert_close,
    assert_close_to_exact,
    counted,
    every_problem,
    live,
    loss,
    mapped,
    some_problems,
    tangents,
    total,
)
from problems import ELEMENTWISE, PROBLEMS, VECTOR, Damped, Draw, Minus, vector_exact, vector_f, vector_g
from test_closures import HIDING_PLACES, OUT_OF_SIGHT, B
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import functorch_inverse as fi

FORMS = {"root": lambda p: p.root(), "fixed_point": lambda p: p.fixed_point()}
LIKE_X = [p for p in PROBLEMS if p.name not in ("reshaped", "whole_reshaped", "polar", "x_shared", "x_broadcast")]
CASES = [("root", p) for p in PROBLEMS] + [("fixed_point", p) for p in LIKE_X]
every_case = pytest.mark.parametrize(("form", "problem"), CASES, ids=str)


def plain_twice(h, inputs):
    inputs = live(inputs)
    first = torch.autograd.grad(loss(h)(*inputs), inputs, create_graph=True)
    return first, torch.autograd.grad(total(first), inputs)


def push(h, inputs):
    return jvp(h, inputs, tangents(inputs))


def push_push(h, inputs):
    inner = lambda *i: jvp(loss(h), i, tangents(inputs))[1]  # noqa: E731
    return jvp(inner, inputs, tangents(inputs))


TRANSFORMS = {
    "plain_twice": plain_twice,
    "jvp": push,
    "jvp_jvp": push_push,
    "jacrev": lambda h, i: jacrev(h, all_of(i))(*i),
    "jacfwd": lambda h, i: jacfwd(h, all_of(i))(*i),
    "hessian": lambda h, i: hessian(loss(h), all_of(i))(*i),
    "rev_rev": lambda h, i: jacrev(grad(loss(h), all_of(i)), all_of(i))(*i),
    "fwd_fwd": lambda h, i: jacfwd(jacfwd(loss(h), all_of(i)), all_of(i))(*i),
}


@every_case
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(form, problem, transform):
    assert_close_to_exact(TRANSFORMS[transform], problem, function=FORMS[form](problem))


@every_case
@pytest.mark.parametrize("over", ["x", "theta", "both"])
def test_vmap(form, problem, over):
    dims, inputs = mapped(problem, over)

    def transform(h, inputs):
        return vmap(h, dims)(*inputs), vmap(jacrev(h, all_of(inputs)), dims)(*inputs)

    assert_close_to_exact(transform, problem, inputs, function=FORMS[form](problem))


@some_problems
def test_vmap_of_mixed_second_order_and_of_vmap(problem):
    dims, inputs = mapped(problem, "both", 3, -1)

    def transform(h, inputs):
        one = vmap(jacfwd(jacrev(loss(h), all_of(inputs)), all_of(inputs)), dims)(*inputs)
        return one, grad(lambda *i: total(vmap(h, dims)(*i)), all_of(inputs))(*inputs)

    assert_close_to_exact(transform, problem, inputs, function=problem.root())


@every_problem
def test_nested_vmap(problem):
    def transform(h, inputs):
        return vmap(vmap(jacrev(h, all_of(inputs))))(*inputs)

    assert_close_to_exact(transform, problem, problem.stacked(2, 2), function=problem.root())


# --- what is special about roots --------------------------------------------------------------------

X, *THETA = VECTOR.inputs()
assert torch.equal(THETA[1], B)  # the functions of test_closures have it built in
SOLVE = fi.custom_root(vector_g, lambda y, x, c, b: vector_f(y, c, b) - x, event_dim=1)


def test_a_first_guess_has_no_derivative():
    solve = fi.custom_root(lambda x, guess: vector_g(x, *THETA), lambda y, x, guess: vector_f(y, *THETA) - x, event_dim=1)
    guess = torch.ones(3, dtype=X.dtype)
    dx, dguess = grad(lambda x, guess: solve(x, guess).sum(), (0, 1))(X, guess)
    assert_close([dx], [grad(lambda x: vector_exact(x, *THETA).sum())(X)])
    assert not dguess.any()


def test_no_arguments_but_a_closure():
    c = THETA[0].clone().requires_grad_()
    solve = fi.custom_root(lambda: vector_g(X, c, THETA[1]), lambda y: vector_f(y, c, THETA[1]) - X, event_dim=1)
    got = torch.autograd.grad(total((solve(),)), c)
    want = torch.autograd.grad(total((vector_exact(X, c, THETA[1]),)), c)
    assert_close(got, want)


def rooted(place, c):
    f = HIDING_PLACES[place](c)
    return fi.custom_root(lambda x: vector_g(x, c, THETA[1]), Minus(f), event_dim=1)


def fixed(place, c):
    f = HIDING_PLACES[place](c)
    return fi.custom_fixed_point(lambda x: vector_g(x, c, THETA[1]), Damped(f), event_dim=1)


@pytest.mark.parametrize("place", HIDING_PLACES)
@pytest.mark.parametrize("make", [rooted, fixed])
def test_what_a_residual_closes_over(make, place):
    """Wherever the tensor hides, its derivative is right; an error only where nothing points to it."""
    truth = lambda place, c: lambda x: vector_exact(x, c, THETA[1])  # noqa: E731
    number = lambda make: lambda c, x: total((make(place, c)(x),))  # noqa: E731

    def derivatives(make):
        leaves = c, x = live((THETA[0], X))
        first = torch.autograd.grad(number(make)(c, x), leaves, create_graph=True)
        second = torch.autograd.grad(total(first), leaves)
        functional = hessian(number(make), (0, 1))(THETA[0], X)
        cs, xs = torch.stack([THETA[0], THETA[0] + 0.1]), torch.stack([X, X - 0.1])
        return first, second, functional, vmap(grad(number(make), (0, 1)))(cs, xs)

    want = derivatives(truth)
    try:
        got = derivatives(make)
    except fi.NoDerivativeError:
        assert place in OUT_OF_SIGHT
        return
    assert_close(got, want)


def test_the_argument_of_a_minimum():
    """residual = grad(objective): A is the Hessian, and symmetric."""
    S = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.5, -0.2], [0.1, -0.2, 1.0]], dtype=torch.float64)

    def objective(y, t):
        return 0.5 * y @ S @ y + torch.logsumexp(y, 0) - t @ y

    def minimise(t):
        y = torch.zeros_like(t)
        for _ in range(50):
            y = y - torch.linalg.solve(torch.func.hessian(objective)(y, t), grad(objective)(y, t))
        return y

    t = Draw(0).normal(3)
    for solver in (None, fi.Cholesky(), fi.CG(rtol=1e-13), fi.GMRES(rtol=1e-13)):
        argmin = fi.custom_root(minimise, grad(objective), linear_solver=solver)
        y = argmin(t)
        exact = torch.linalg.inv(torch.func.hessian(objective)(y, t))
        assert_close([jacrev(argmin)(t), jacfwd(argmin)(t)], [exact, exact])
        # The envelope theorem: the gradient of the least value is the partial one.
        assert_close([hessian(lambda t, a=argmin: objective(a(t), t))(t)], [-exact])


def test_a_module_is_trained_through_a_residual():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        net.weight.mul_(0.3)

    def iterate(x):
        y = torch.zeros_like(x)
        for _ in range(200):
            y = torch.tanh(net(y)) + x
        return y

    layer = fi.custom_fixed_point(iterate, lambda y, x: torch.tanh(net(y)) + x, event_dim=1)
    x = Draw(1).normal(4, 3)
    got = torch.autograd.grad(total((layer(x),)), tuple(net.parameters()))
    want = torch.autograd.grad(total((iterate(x),)), tuple(net.parameters()))
    assert_close(got, want)

    def through(state, f):
        return total((functional_call(Holder(net, f), {f"net.{k}": v for k, v in state.items()}, (x,)),))

    state = {k: v.detach() for k, v in net.named_parameters()}
    assert_close(grad(through)(state, layer), grad(through)(state, iterate))


class Holder(torch.nn.Module):
    def __init__(self, net, f):
        super().__init__()
        self.net, self.f = net, f

    def forward(self, x):
        return self.f(x)


def test_aux_and_keywords():
    def solve(x, c, b, *, twice=False):
        return vector_g(x, c, b), {"steps": 3, "twice": twice}

    h = fi.custom_root(solve, lambda y, x, c, b: vector_f(y, c, b) - x, event_dim=1, has_aux=True)
    y, aux = h(X, *THETA, twice=True)
    assert aux == {"steps": 3, "twice": True}
    got = grad(lambda x: total((h(x, *THETA)[0],)))(X)
    assert_close([y, got], [vector_exact(X, *THETA), grad(lambda x: total((vector_exact(x, *THETA),)))(X)])


def test_one_call_of_solve(monkeypatch):
    calls = []

    def solve(x, c, b):
        calls.append(x.shape)
        return vector_g(x, c, b)

    h = fi.custom_root(solve, lambda y, x, c, b: vector_f(y, c, b) - x, event_dim=1)
    jacfwd(jacrev(h))(X, *THETA)
    assert calls == [(3,)]
    calls.clear()
    vmap(h, (0, None, None))(torch.stack([X, X]), *THETA)
    assert calls == [(3,), (3,)]


@pytest.mark.parametrize("dims", [(0, None, None), (0, 0, None), (None, 0, 0)])
def test_broadcast_gives_every_argument_a_leading_dim(dims):
    shapes = []

    def solve(x, c, b):
        shapes.append((x.shape, c.shape, b.shape))
        return vector_g(x, c, b)

    h = fi.custom_root(solve, lambda y, x, c, b: vector_f(y, c, b) - x, event_dim=1, vmap_method="broadcast")
    inputs = [torch.stack([t, t + 0.1, t + 0.2]) if d == 0 else t for t, d in zip((X, *THETA), dims, strict=True)]
    assert_close([vmap(h, dims)(*inputs)], [vmap(vector_exact, dims)(*inputs)])
    assert shapes == [((3, 3),) * 3]


def test_vmap_method_vmap():
    h = fi.custom_root(vector_exact, lambda y, x, c, b: vector_f(y, c, b) - x, event_dim=1, vmap_method="vmap")
    inputs = VECTOR.stacked(4)
    assert_close(vmap(jacrev(h, (0, 1, 2)))(*inputs), vmap(jacrev(vector_exact, (0, 1, 2)))(*inputs))


def test_precisions():
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]:
        inputs = live(tuple(t.to(dtype) for t in (X, *THETA)))
        y = SOLVE(*inputs)
        got = torch.autograd.grad(y.float().sum(), inputs)
        assert y.dtype == dtype and all(g.dtype == dtype for g in got)
        wide = live(tuple(t.detach().double() for t in inputs))
        want = torch.autograd.grad(vector_exact(*wide).sum(), wide)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def solve_halves(x):
    return x / 2


def doubled(y, x):
    return 2 * y - x


def test_it_keeps_the_name_and_pickles():
    h = fi.custom_root(solve_halves, doubled, event_dim=0)
    assert h.__name__ == "solve_halves"
    assert "custom_root" in repr(h)
    again = pickle.loads(pickle.dumps(h))
    assert torch.func.grad(again)(torch.tensor(3.0)) == 0.5


# --- a Jacobian that solve has anyway ---------------------------------------------------------------

N = 20
MATRIX = Draw(1).normal(N, N) + 6 * torch.eye(N, dtype=torch.float64)


def equation(y, t):
    return MATRIX.to(y) @ torch.sinh(y) - t


def newton(t, form=lambda A: A):
    y = torch.asinh(torch.linalg.solve(MATRIX, t))
    return y, form(MATRIX * torch.cosh(y))


def exact_solution(t):
    return torch.asinh(torch.linalg.inv(MATRIX) @ t)


T = Draw(2).normal(N)
WAYS = {"matrix": lambda A: A, "factors": torch.linalg.lu_factor, "old": lambda A: A * 1.01 + 0.02}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("solver", [None, fi.BiCGStab(rtol=1e-12), fi.NormalCG(rtol=1e-12)], ids=repr)
def test_has_jacobian(way, solver):
    h = fi.custom_root(lambda t: newton(t, WAYS[way]), equation, has_jacobian=True, linear_solver=solver)
    assert_close([h(T)], [exact_solution(T)])
    twice = lambda f: jacfwd(jacfwd(lambda t: f(t)[:2]))  # noqa: E731
    for transform in (jacrev, jacfwd, lambda f: hessian(lambda t: total((f(t),))), twice):
        assert_close([transform(h)(T)], [transform(exact_solution)(T)])
    Ts = torch.stack([T, 2 * T])
    assert_close([vmap(jacrev(h))(Ts)], [vmap(jacrev(exact_solution))(Ts)])


def test_has_jacobian_beside_aux():
    h = fi.custom_root(lambda t: (newton(t)[0], "note", newton(t)[1]), equation, has_jacobian=True, has_aux=True)
    y, note = h(T.clone().requires_grad_())
    assert note == "note" and y.requires_grad


def test_has_jacobian_saves_products():
    """A backward takes a few products with A, not one for each of N rows."""
    through, calls = counted()
    h = fi.custom_root(newton, lambda y, t: equation(through(y), t), has_jacobian=True)
    t = T.clone().requires_grad_()
    h(t).sum().backward()
    assert 1 <= calls[0] <= 5
    assert_close([t.grad], [grad(lambda t: exact_solution(t).sum())(T)])


def test_a_jacobian_of_something_else_is_no_danger():
    """It costs steps, or an error, and never accuracy."""
    for wrong in (lambda A: torch.eye(N, dtype=A.dtype), torch.zeros_like, lambda A: A * float("nan"), lambda A: A.mT):
        h = fi.custom_root(lambda t, wrong=wrong: newton(t, wrong), equation, has_jacobian=True)
        assert_close([jacrev(h)(T)], [jacrev(exact_solution)(T)])
    h = fi.custom_root(lambda t: newton(t, torch.zeros_like), equation, has_jacobian=True, linear_solver=fi.GMRES(max_steps=2))
    with pytest.raises(fi.NotConvergedError):
        jacrev(h)(T)


# --- bad input --------------------------------------------------------------------------------------


def bad(text, error=fi.StructureError):
    return pytest.raises(error, match=text)


def test_residual_of_another_size():
    h = fi.custom_root(vector_g, lambda y, x, c, b: (vector_f(y, c, b) - x)[..., :2], event_dim=1)
    with bad("2 equations .* for 3 unknowns"):
        grad(lambda x: h(x, *THETA).sum())(X)


def test_residual_without_the_batch_dims():
    h = fi.custom_root(vector_g, lambda y, x, c, b: (vector_f(y, c, b) - x).sum(0), event_dim=1)
    with bad("batch dims of y"):
        grad(lambda x: h(x, *THETA).sum())(torch.stack([X, X]))


def test_residual_that_ignores_y():
    h = fi.custom_root(vector_g, lambda y, x, c, b: x, event_dim=1)
    with bad("does not depend on y", fi.NoDerivativeError):
        grad(lambda x: h(x, *THETA).sum())(X)


def test_residual_that_returns_no_tensors():
    h = fi.custom_root(vector_g, lambda y, x, c, b: np.zeros(3), event_dim=1)
    with bad("the residual returned ndarray"):
        grad(lambda x: h(x, *THETA).sum())(X)


def test_step_of_another_shape():
    h = fi.custom_fixed_point(vector_g, lambda y, x, c, b: y[..., :2], event_dim=1)
    with bad(r"step\(y, \*args\) returned \(2,\)"):
        grad(lambda x: h(x, *THETA).sum())(X)


def test_solve_that_returns_integers():
    h = fi.custom_root(lambda x: torch.ones(3, dtype=torch.long), lambda y, x: y - x)
    with bad("integer"):
        grad(lambda x: h(x).sum())(X)


def test_a_singular_residual_names_its_samples():
    h = fi.custom_root(lambda x: x * torch.tensor([[1.0], [0.0], [1.0]]), lambda y, x: y**2 - x, event_dim=1)
    with bad("1 of 3 samples .*: 1", fi.SingularJacobianError):
        grad(lambda x: h(x).sum())(torch.ones(3, 2))


def test_check_at_a_singular_root():
    h = fi.custom_root(lambda a: 0 * a, lambda y, a: y**2, event_dim=0, check=True)
    with bad("singular in 2 of 2", fi.SingularJacobianError):
        h(torch.ones(2))


def test_a_scripted_module():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(torch.nn.Linear(3, 3))
    h = fi.custom_root(lambda x: x, lambda y, x: scripted(y) - x, event_dim=1)
    with bad("torch.jit.script", fi.NoDerivativeError):
        h(torch.ones(3)).sum().backward()


def test_a_live_keyword():
    h = fi.custom_root(lambda x, *, c: x * c, lambda y, x: y - x)
    with bad("keyword", fi.NoDerivativeError):
        h(X, c=X.clone().requires_grad_())


@pytest.mark.parametrize("batch", [(), (4,)])
def test_check(batch):
    shift = torch.zeros(*batch, 3, dtype=X.dtype)
    shift[..., 1] = 1e-4 * (torch.arange(4) == 2) if batch else 1e-4
    h = fi.custom_root(lambda x: vector_exact(x, *THETA) + shift, lambda y, x: vector_f(y, *THETA) - x, event_dim=1, check=True)
    with bad("the residual is not zero at y in 1 of .* a Newton step moves y by 0.0001", fi.ResidualError):
        h(X.expand(*batch, 3))
    right = fi.custom_root(lambda x: vector_exact(x, *THETA), lambda y, x: vector_f(y, *THETA) - x, event_dim=1, check=True)
    assert_close([right(X.expand(*batch, 3))], [vector_exact(X.expand(*batch, 3), *THETA)])
    loose = fi.custom_root(h.problem.g.solve, lambda y, x: vector_f(y, *THETA) - x, event_dim=1, check=1e-2)
    loose(X.expand(*batch, 3))


def fitted(A, b):
    return torch.linalg.lstsq(A, b.unsqueeze(-1)).solution.squeeze(-1)


def test_check_of_equations_that_do_not_hold_together():
    """At a least-squares fit the Newton step is zero; the residual is not, and J would not be that of the fit."""
    draw = Draw(3)
    A, at, off = draw.normal(6, 2), draw.normal(4, 2), draw.normal(6)
    b = at @ A.mT
    b[2] += 1e-3 * off
    residual = lambda y, A, b: (A @ y.unsqueeze(-1)).squeeze(-1) - b  # noqa: E731
    h = fi.custom_root(fitted, residual, event_dim=1, linear_solver=fi.LeastSquares(), check=True)
    with bad(r"not zero at y in 1 of 4 samples; worst is sample 2 .* do not hold together", fi.ResidualError):
        h(A.expand(4, 6, 2), b)
    with bad(r"not zero at y in 1 of 4 samples; worst is sample 2", fi.ResidualError):
        vmap(fi.custom_root(fitted, residual, linear_solver=fi.LeastSquares(), check=True), (None, 0))(A, b)
    assert_close([grad(lambda b: h(A.expand(4, 6, 2), b).sum())(at @ A.mT)], [torch.linalg.pinv(A).sum(0).expand(4, 6)])
    fi.custom_root(fitted, residual, event_dim=1, linear_solver=fi.LeastSquares(), check=1e-2)(A.expand(4, 6, 2), b)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        *[({"check": c}, ValueError, "`check` is .* True") for c in (None, 0.0, -1e-3, float("nan"), float("inf"), "yes")],
        ({"vmap_method": "loop"}, ValueError, "vmap_method"),
        ({"linear_solver": 3}, ValueError, "linear_solver"),
        ({"linear_solver": fi.LU}, ValueError, "linear_solver"),
        ({"has_jacobian": True, "linear_solver": fi.LU()}, ValueError, "has_jacobian"),
    ],
)
def test_unknown_options(options, error, text):
    with pytest.raises(error, match=text):
        fi.custom_root(vector_g, lambda y, x: y - x, **options)


def test_no_functions():
    for make in (fi.custom_root, fi.custom_fixed_point):
        with pytest.raises(TypeError, match="callable"):
            make(vector_g, 3)


def test_what_solve_returns_with_has_jacobian():
    of_two, shape = "a tuple of 2", "Jacobian of shape"
    for result, text in [(X, of_two), ((X, X), shape), ((X, "A"), shape), ((X, X, X), of_two)]:
        h = fi.custom_root(lambda x, r=result: r, lambda y, x: y - x, has_jacobian=True)
        with bad(text):
            grad(lambda x, h=h: h(x).sum())(X)


def test_planted_errors_are_caught():
    """A wrong sign, and a residual of something else, are far away from the truth."""
    for wrong in (lambda y, x, c, b: vector_f(y, c, b) + x, lambda y, x, c, b: vector_f(y, c, b).flip(-1) - x):
        h = fi.custom_root(vector_g, wrong, event_dim=1)
        with pytest.raises(AssertionError):
            assert_close([jacrev(h)(X, *THETA)], [jacrev(vector_exact)(X, *THETA)])


def test_elementwise_builds_no_matrix(monkeypatch):
    for name in ("lu_factor_ex", "inv", "inv_ex", "solve"):
        monkeypatch.setattr(torch.linalg, name, None)
    h = ELEMENTWISE.root()
    x, a = ELEMENTWISE.inputs()
    assert_close(jacrev(h, (0, 1))(x, a), jacrev(ELEMENTWISE.closed_form(), (0, 1))(x, a))


# --- torch.compile ----------------------------------------------------------------------------------


def check_compiled():
    """Forward + backward, per-sample gradients, second order; roots and fixed points, traced."""

    def compiled(h):
        torch._dynamo.reset()
        return torch.compile(h, fullgraph=True, backend="aot_eager")

    residual = lambda y, x, c, b: vector_f(y, c, b) - x  # noqa: E731
    step = lambda y, x, c, b: y - 0.3 * residual(y, x, c, b)  # noqa: E731
    root = fi.custom_root(vector_exact, residual, event_dim=1)
    inputs = live((X, *THETA))
    for h in (root, fi.custom_fixed_point(vector_exact, step, event_dim=1)):
        got = torch.autograd.grad(total((compiled(h)(*inputs),)), inputs)
        assert_close(got, torch.autograd.grad(total((vector_exact(*inputs),)), inputs))
    curvature = lambda f: hessian(lambda *i: total((f(*i),)), (0, 1))(X, *THETA)  # noqa: E731
    assert_close(compiled(lambda: curvature(root))(), curvature(vector_exact))
    stacked = VECTOR.stacked(3)
    per_sample = lambda f: vmap(grad(lambda *i: total((f(*i),)), (0, 1, 2)))  # noqa: E731
    assert_close(compiled(per_sample(root))(*stacked), per_sample(vector_exact)(*stacked))
    handed_on = fi.custom_root(lambda t: newton(t), equation, has_jacobian=True)
    t = T.clone().requires_grad_()
    got = torch.autograd.grad(compiled(handed_on)(t).sum(), t)
    assert_close(got, (grad(lambda t: exact_solution(t).sum())(T),))


def test_compiled():
    run_fresh(check_compiled)
