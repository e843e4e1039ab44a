"""invert: problems x transform stacks against closed forms, with nothing but f given."""

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import optree
import pytest
import torch
from fresh import run_fresh
from helpers import MAPPED, all_of, assert_close, assert_close_to_exact, every_problem, live, loss, mapped, tangents, total
from problems import ELEMENTWISE, PROBLEMS, RESHAPED, TREE, VECTOR, WHOLE, Draw
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import functorch_inverse as fi

double = {"dtype": torch.float64}
W = torch.tensor([[3.0, 0.5, -0.4], [0.9, 2.5, 0.3], [-0.2, 0.7, 2.0]], **double)
W_INVERSE = torch.linalg.inv(W)


def inverted(problem, **more):
    """The inverse of the problem's f as a function of the inputs; g of the problem is never called."""
    x, theta = problem.draw(Draw(0))
    start = optree.tree_map(lambda y: torch.full_like(y, 0.1), problem.exact(x, *theta))
    needed = "out_event_dim" in problem.options or problem.name == "whole_reshaped"

    def rule(g, f, **options):
        solve = fi.invert(f, **options, **more)
        return partial(solve, init=start) if needed else solve

    return problem._function(rule)


def check(transform, problem, inputs=None):
    assert_close_to_exact(transform, problem, inputs, inverted(problem))


some_problems = pytest.mark.parametrize("problem", [ELEMENTWISE, VECTOR, WHOLE, TREE, RESHAPED], ids=repr)
few_problems = pytest.mark.parametrize("problem", [ELEMENTWISE, VECTOR, PROBLEMS[-7]], ids=repr)
over = pytest.mark.parametrize("over", MAPPED)


# --- problems x transform stacks -------------------------------------------------------------------


@every_problem
def test_values(problem):
    check(lambda h, inputs: h(*inputs), problem)


@every_problem
def test_grad(problem):
    check(lambda h, inputs: grad(loss(h), all_of(inputs))(*inputs), problem)


@every_problem
def test_backward_twice(problem):
    def transform(h, inputs):
        inputs = live(inputs)
        grads = torch.autograd.grad(total(h(*inputs)), inputs, create_graph=True)
        return grads, torch.autograd.grad(total(grads), inputs)

    check(transform, problem)


@some_problems
@pytest.mark.parametrize("mode", [jacrev, jacfwd])
def test_jacobian(problem, mode):
    check(lambda h, inputs: mode(h, all_of(inputs))(*inputs), problem)


@some_problems
def test_hessian(problem):
    check(lambda h, inputs: hessian(loss(h), all_of(inputs))(*inputs), problem)


@some_problems
def test_jvp_of_grad(problem):
    def transform(h, inputs):
        return jvp(lambda *i: grad(loss(h), all_of(inputs))(*i), inputs, tangents(inputs))

    check(transform, problem)


@few_problems
def test_third_order(problem):
    check(lambda h, inputs: jacfwd(jacrev(grad(loss(h))))(*inputs), problem)


@every_problem
@over
def test_vmap_grad(problem, over):
    dims, inputs = mapped(problem, over, 3)
    check(lambda h, inputs: vmap(grad(loss(h), all_of(inputs)), dims)(*inputs), problem, inputs)


@some_problems
@over
def test_vmap(problem, over):
    dims, inputs = mapped(problem, over, 3, -1)
    check(lambda h, inputs: vmap(h, dims)(*inputs), problem, inputs)


@some_problems
def test_nested_vmap_over_different_inputs(problem):
    n, stacked, single = problem.x_count, problem.stacked(2), problem.inputs()
    inner = tuple(0 if i < n else None for i in range(len(single)))
    outer = tuple(None if i < n else 0 for i in range(len(single)))
    check(lambda h, inputs: vmap(vmap(grad(loss(h), all_of(inputs)), inner), outer)(*inputs), problem, stacked)


@few_problems
def test_vmap_hessian_and_grad_of_vmap(problem):
    inputs = problem.stacked(2)
    check(lambda h, inputs: vmap(hessian(loss(h)))(*inputs), problem, inputs)
    check(lambda h, inputs: grad(lambda *i: total(vmap(h)(*i)), all_of(inputs))(*inputs), problem, inputs)


@few_problems
def test_under_saved_tensor_hooks_and_checkpoint(problem):
    """The iteration's own graphs keep away from the user's hooks."""
    from torch.utils.checkpoint import checkpoint

    def transform(h, inputs):
        inputs = live(inputs)
        with torch.autograd.graph.save_on_cpu():
            first = torch.autograd.grad(total(h(*inputs)), inputs)
        again = torch.autograd.grad(total(checkpoint(h, *inputs, use_reentrant=False)), inputs)
        return first, again

    check(transform, problem)


# --- how f gets what it needs ----------------------------------------------------------------------


def test_closed_over_tensor_of_a_transform():
    x, a = torch.linspace(-1, 2, 4, **double), torch.tensor([0.5, 1.5], **double)

    def through(a):
        return fi.invert(lambda y: torch.sinh(a * y), event_dim=0)(x).sum()

    torch.testing.assert_close(vmap(grad(through))(a), -(x.asinh().sum() / a**2))
    torch.testing.assert_close(vmap(hessian(through))(a), 2 * x.asinh().sum() / a**3)
    a = a[0].clone().requires_grad_()
    (got,) = torch.autograd.grad(through(a), a)
    torch.testing.assert_close(got, -x.asinh().sum() / a.detach() ** 2)


def test_tensor_that_no_walk_finds():
    """f reads it by a name that only exists when it runs; then f is watched once."""
    x, space = torch.linspace(-1, 2, 4, **double), {}

    def f(y):
        return torch.sinh(eval("space['a']", {"space": space}) * y)

    g = fi.invert(f, event_dim=0)

    def through(a):
        space["a"] = a
        return g(x).sum()

    a = torch.tensor([0.5, 1.5], **double)
    torch.testing.assert_close(vmap(through)(a), x.asinh().sum() / a)
    torch.testing.assert_close(grad(lambda a: vmap(through)(a).sum())(a), -x.asinh().sum() / a**2)


def test_functional_call_of_a_module_that_holds_an_inverse():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3, **double)

        def forward(self, x):
            return fi.invert(self.run, event_dim=1)(x)

        def run(self, y):
            return torch.sinh(self.linear(y))

    flow, x = Flow(), torch.randn(2, 3, **double)
    weights = torch.stack([W, W.T])
    bias = flow.linear.bias.detach()

    def through(w):
        return functional_call(flow, {"linear.weight": w, "linear.bias": bias}, (x,)).sin().sum()

    def exact(w):
        return ((x.asinh() - bias) @ torch.linalg.inv(w).T).sin().sum()

    torch.testing.assert_close(vmap(grad(through))(weights), torch.stack([grad(exact)(w) for w in weights]))


def test_rule_inside_f():
    """f uses a custom_inverse and another inverse; all derivatives go through both."""
    asinh = fi.custom_inverse(lambda x: torch.asinh(x), torch.sinh, event_dim=0)

    def f(y, c):
        return asinh(fi.invert(lambda z: c * z, event_dim=0)(y))

    g = fi.invert(f, event_dim=0)
    x, c = torch.linspace(-1, 2, 4, **double), torch.tensor(1.7, **double)
    torch.testing.assert_close(g(x, c), c * x.sinh())
    torch.testing.assert_close(vmap(grad(g, (0, 1)), (0, None))(x, c), (c * x.cosh(), x.sinh()))
    torch.testing.assert_close(hessian(lambda c: g(x, c).sin().sum())(c), -((c * x.sinh()).sin() * x.sinh() ** 2).sum())


def test_vmap_is_one_batch():
    calls = []

    def f(y, a):
        calls.append(y.shape)
        return torch.sinh(y) + a * y

    x, a = torch.randn(50, 3, **double), torch.rand(50, 1, **double)
    fi.invert(f, event_dim=1)(x, a)
    together = len(calls)
    calls.clear()
    vmap(fi.invert(f, event_dim=1))(x, a)
    assert len(calls) == together


def test_evaluations():
    """One evaluation a step and nothing besides, except the one where the derivative is attached."""
    count = [0]

    def f(y):
        count[0] += 1
        return torch.sinh(y) @ W.T

    x = torch.randn(5, 3, **double)
    with torch.no_grad():
        fi.invert(f, event_dim=1)(x)
    values, count[0] = count[0], 0
    assert values <= 9
    y = fi.invert(f, event_dim=1)(x.requires_grad_())
    assert count[0] == values
    y.sum().backward()
    assert count[0] == values + 1


# --- init ------------------------------------------------------------------------------------------


def test_init_chooses_the_branch_and_has_no_derivative():
    g = fi.invert(lambda y: y**2, event_dim=1)
    x, init = torch.tensor([4.0, 9.0], **double), torch.tensor([-1.0, 2.0], **double)
    torch.testing.assert_close(g(x, init=init), torch.tensor([-2.0, 3.0], **double))
    assert not grad(lambda init: g(x, init=init).sum())(init).any()
    y = vmap(lambda x, i: g(x, init=i), (None, 0))(x, torch.stack([init, -init]))
    torch.testing.assert_close(y, torch.tensor([[-2.0, 3], [2, -3]], **double))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(init, torch.ones_like(init))
        assert torch.autograd.forward_ad.unpack_dual(g(x, init=dual)).tangent is None


def test_init_broadcasts_and_may_be_a_number():
    g = fi.invert(lambda y, a: torch.exp(a * y), event_dim=0)
    x, a = torch.tensor([[0.5], [2.0]], **double), torch.tensor([1.0, 2.0, 3.0], **double)
    torch.testing.assert_close(g(x, a, init=0.0), x.log() / a)
    torch.testing.assert_close(vmap(g, (0, None))(x, a, init=0), (x.log() / a))


def test_init_is_asked_for():
    x = torch.ones(2, 2, **double)
    with pytest.raises(fi.StructureError, match="Pass init="):
        fi.invert(RESHAPED.f, **RESHAPED.options)(x, torch.ones(3, **double))
    with pytest.raises(fi.StructureError, match=r"f raised .*If y looks different, pass init="):
        fi.invert(RESHAPED.f)(x, torch.ones(3, **double))
    with pytest.raises(fi.StructureError, match=r"has 3 real numbers.*one of x has 4"):
        fi.invert(lambda y: y)(x, init=torch.ones(3, **double))
    with pytest.raises(fi.StructureError, match="gave shape"):
        fi.invert(lambda y: y.sum(-1), event_dim=1)(x)
    with pytest.raises(fi.StructureError, match="without a floating tensor"):
        fi.invert(lambda y: y)(x, init={"n": 3})
    with pytest.raises(fi.StructureError, match="without a number"):
        fi.invert(lambda y: y)(None)
    with pytest.raises(fi.StructureError, match="do not broadcast"):
        fi.invert(lambda y: y, event_dim=1)(x, init=torch.ones(3, 2, **double))


# --- which inputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("event_dim", [0, 1])
def test_precision(dtype, event_dim):
    """Half precision is solved in float32, closures and args included; the result has x's dtype."""
    w, x, a = W.to(dtype), torch.tensor([[0.5, -1.0, 2.0]], dtype=dtype), torch.tensor(1.5, dtype=dtype)
    f = (lambda y, a: torch.sinh(a * y)) if event_dim == 0 else (lambda y, a: torch.sinh(a * y) @ w.T)
    g = fi.invert(f, event_dim=event_dim)
    y, pull = vjp(g, x, a)
    assert y.dtype == dtype
    dx, da = pull(torch.ones_like(y))
    assert dx.dtype == da.dtype == dtype

    def exact(x, a):
        return torch.asinh(x if event_dim == 0 else x @ torch.linalg.inv(w.double()).T) / a

    want, pull = vjp(exact, x.double(), a.double())
    tolerance = 8 * torch.finfo(dtype).eps
    for got, true in zip((y, dx, da), (want, *pull(torch.ones_like(want))), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=tolerance, atol=tolerance)


def test_autocast_and_inference_mode():
    x = torch.randn(2, 3)
    g = fi.invert(lambda y: torch.sinh(y) @ W.float().T, event_dim=1)
    want = torch.asinh(x @ W_INVERSE.float().T)
    with torch.autocast("cpu"):
        torch.testing.assert_close(g(x), want)
    with torch.inference_mode():
        torch.testing.assert_close(g(x.clone()), want)
        torch.testing.assert_close(vmap(g)(x.clone()), want)


@pytest.mark.parametrize("inverter", [None, fi.FixedPoint()], ids=repr)
@pytest.mark.parametrize("event_dim", [0, 1])
def test_nan_stays_in_its_sample(event_dim, inverter):
    x = torch.tensor([[0.5, 1.0], [torch.nan, 1.0], [torch.inf, 2.0], [3.0, -torch.inf]], **double)
    g = fi.invert(lambda y: y + 0.1 * y.sin(), event_dim=event_dim, inverter=inverter)
    y, pull = vjp(g, x)
    (dx,) = pull(torch.ones_like(y))
    expected = x.isfinite() if event_dim == 0 else x.isfinite().all(-1, keepdim=True).expand(4, 2)
    assert torch.equal(y.isfinite(), expected)
    assert torch.equal(dx.isfinite(), expected)


@pytest.mark.parametrize("event_dim, shape", [(0, (0,)), (1, (0, 3)), (1, (2, 0)), (None, (0,))])
@pytest.mark.parametrize("inverter", [None, fi.FixedPoint()], ids=repr)
def test_emptiness(event_dim, shape, inverter):
    x = torch.zeros(shape, **double, requires_grad=True)
    y = fi.invert(lambda y: y + 0.1 * y.sin(), event_dim=event_dim, inverter=inverter)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert vmap(fi.invert(torch.sinh, event_dim=1))(torch.zeros(0, 3)).shape == (0, 3)


def test_numbers_and_passengers():
    assert abs(fi.invert(torch.sinh, event_dim=0)(0.5).item() - 0.48121183) < 1e-6
    x = {"a": torch.tensor([0.5, 2.0], **double), "n": torch.tensor(3), "s": "name"}

    def f(y):
        return {"a": y["a"] ** y["n"], "n": y["n"], "s": y["s"]}

    y = fi.invert(f, inverter=fi.Newton())(x)
    torch.testing.assert_close(y["a"], x["a"] ** (1 / 3))
    assert y["n"] == 3
    assert y["s"] == "name"
    a, n = x["a"].expand(4, 2), torch.tensor([1, 2, 3, 4])
    y = vmap(lambda a, n: fi.invert(f)({"a": a, "n": n, "s": None})["a"])(a, n)
    torch.testing.assert_close(y, a ** (1 / n[:, None]))


# --- errors ----------------------------------------------------------------------------------------


def test_the_error_names_the_samples():
    g = fi.invert(lambda y: y**2 + 1, event_dim=1)
    x = torch.tensor([[5.0], [0.5], [2.0], [-3.0]], **double)
    text = r"`invert`: Newton .* in 2 of 4 samples.* worst is sample 3.*in samples \[1, 3\].*init"
    with pytest.raises(fi.NotConvergedError, match=text) as caught:
        g(x, init=torch.ones_like(x))
    assert isinstance(caught.value, RuntimeError)
    with pytest.raises(fi.NotConvergedError, match=r"in samples \[1, 3\]"):
        vmap(lambda x, i: g(x, init=i))(x, torch.ones_like(x))
    with pytest.raises(fi.BracketError, match=r"in 1 of 6 samples.*\[3\]\. There is no solution inside the bounds"):
        vmap(fi.invert(torch.exp, event_dim=0))(torch.tensor([[1.0, 2, 3], [-1, 5, 6]]))


def test_failures_as_nan_or_warning():
    x = torch.tensor([[5.0], [0.5]], **double)
    g = fi.invert(lambda y: y**2 + 1, event_dim=1, inverter=fi.Newton(on_failure="nan"))
    y, pull = vjp(partial(g, init=torch.ones_like(x)), x)
    torch.testing.assert_close(y, torch.tensor([[2.0], [torch.nan]], **double), equal_nan=True)
    torch.testing.assert_close(pull(torch.ones_like(y))[0], torch.tensor([[0.25], [torch.nan]], **double), equal_nan=True)
    g = fi.invert(lambda y: y**2 + 1, event_dim=1, inverter=fi.Newton(on_failure="warn"))
    for h in (g, lambda x, init: vmap(lambda x, i: g(x, init=i))(x, init)):
        with pytest.warns(RuntimeWarning, match=r"\[1\]") as caught:
            y = h(x, init=torch.ones_like(x))
        assert y.isfinite().all()
        assert caught[0].filename == __file__


def test_bad_arguments():
    with pytest.raises(TypeError, match="a callable is needed"):
        fi.invert(3)
    with pytest.raises(ValueError, match=r"choose Newton\(\)"):
        fi.invert(torch.sin, inverter="newton")
    with pytest.raises(ValueError, match=r"choose Newton\(\)"):
        fi.invert(torch.sin, inverter=fi.Newton)
    with pytest.raises(ValueError, match="linear_solver"):
        fi.invert(torch.sin, linear_solver=3)
    with pytest.raises(ValueError, match="event_dim"):
        fi.invert(torch.sin, event_dim=-1)(torch.ones(2))
    with pytest.raises(fi.StructureError, match="use Newton"):
        fi.invert(torch.sin, inverter=fi.Chandrupatla(), event_dim=1)(torch.ones(2))
    with pytest.raises(fi.NoDerivativeError, match="does not depend on y"):
        fi.invert(lambda y: y.detach(), event_dim=1)(torch.ones(2))
    with pytest.raises(TypeError):
        fi.invert(torch.sin)(torch.ones(2), power=2)


def test_singular_at_the_solution():
    """The values exist, the derivative does not: that error belongs to the derivative."""
    g = fi.invert(lambda y: y**3, event_dim=1, inverter=fi.Newton(atol=1e-40, max_steps=200))
    x = torch.tensor([[0.0], [8.0]], **double, requires_grad=True)
    y = g(x)
    torch.testing.assert_close(y.detach(), torch.tensor([[0.0], [2.0]], **double), rtol=1e-9, atol=1e-9)
    with pytest.raises(fi.SingularJacobianError, match="outermost: 0"):
        y.sum().backward()


def test_wrong_values_would_be_seen():
    """Planted: an inverter that stops early gives derivatives that the closed form contradicts."""
    early = inverted(VECTOR, inverter=fi.Newton(rtol=0.1))
    with pytest.raises(AssertionError):
        assert_close_to_exact(lambda h, inputs: grad(loss(h))(*inputs), VECTOR, None, early)


def test_f_may_change_its_argument():
    """Every call gets a copy of its own."""

    def f(y):
        y.mul_(2.0)
        return y

    for event_dim, inverter in ((0, None), (1, fi.Newton()), (1, fi.FixedPoint(memory=1, max_steps=200, on_failure="nan"))):
        x = torch.tensor([0.5, -1.0], **double)
        y = fi.invert(f, event_dim=event_dim, inverter=inverter)(x)
        assert y.isnan().all() if isinstance(inverter, fi.FixedPoint) else torch.equal(y, x / 2)
        assert torch.equal(x, torch.tensor([0.5, -1.0], **double))


def test_an_error_of_f_on_the_way_is_its_own():
    count = itertools.count()

    def f(y):
        if next(count) == 3:
            raise ZeroDivisionError
        return y.exp()

    with pytest.raises(ZeroDivisionError):
        fi.invert(f, event_dim=0)(torch.tensor([0.5, 2.0]))


# --- the object ------------------------------------------------------------------------------------


def sinh(y, a):
    return torch.sinh(a * y)


def test_inverse_of_an_inverse():
    assert fi.invert(fi.invert(sinh)) is sinh
    assert fi.invert(fi.invert(sinh, event_dim=0), event_dim=0) is sinh
    assert fi.invert(fi.invert(sinh, event_dim=2, out_event_dim={"a": 1}), event_dim={"a": 1}, out_event_dim=2) is sinh
    once = fi.invert(sinh, event_dim=0)
    numeric = fi.invert(once, event_dim=0, inverter=fi.Chandrupatla())
    assert numeric is not sinh
    y, a = torch.linspace(-1, 1, 3, **double), torch.tensor(1.5, **double)
    torch.testing.assert_close(numeric(y, a), sinh(y, a))
    torch.testing.assert_close(grad(lambda a: numeric(y, a).sum())(a), (y * (a * y).cosh()).sum())
    assert fi.invert(once, event_dim=1) is not sinh


def test_it_copies_and_pickles():
    g = fi.invert(sinh, event_dim=0, inverter=fi.Chandrupatla(lower=-50.0))
    x, a = torch.linspace(-1, 1, 3, **double), torch.tensor(1.5, **double)
    for other in (copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        assert torch.equal(other(x, a), g(x, a))
    assert repr(g) == "invert(sinh)"


def test_no_grad_costs_nothing_else():
    x = torch.linspace(-1, 1, 3, **double, requires_grad=True)
    with torch.no_grad():
        assert not fi.invert(torch.sinh, event_dim=0)(x).requires_grad
    assert not fi.invert(torch.sinh, event_dim=0)(x.detach()).requires_grad


def test_gradcheck():
    g = fi.invert(lambda y, a: torch.sinh(a * y) + y, event_dim=0)
    inputs = (torch.randn(3, **double, requires_grad=True), (torch.rand(3, **double) + 0.5).requires_grad_())
    assert torch.autograd.gradcheck(g, inputs, check_forward_ad=True, check_batched_grad=True)


def test_chunks_threads_and_a_fake_trace():
    x, g = torch.linspace(-2, 2, 7, **double), fi.invert(torch.sinh, event_dim=0)
    torch.testing.assert_close(vmap(g, chunk_size=2)(x), x.asinh())
    linear = nn.Linear(3, 3, **double)
    inverse = fi.InverseModule(linear, event_dim=1)

    def residual(i):
        x = torch.full((2, 3), float(i + 1), **double)
        return (linear(inverse(x)) - x).abs().max().item()

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(residual, range(24))) < 1e-9
    h = fi.invert(lambda y: torch.sinh(y) + 0.1 * y.sum(-1, keepdim=True), event_dim=1, inverter=fi.Newton(max_steps=8))
    traced = make_fx(h)(torch.randn(4, 2, **double))
    x = torch.randn(4, 2, **double)
    torch.testing.assert_close(traced(x), h(x))


def check_export():
    class Net(nn.Module):
        def __init__(self, event_dim, inverter=None):
            super().__init__()
            self.solve = fi.invert(lambda y: y + torch.tanh(0.3 * y), event_dim=event_dim, inverter=inverter)

        def forward(self, x):
            return self.solve(x)

    x = torch.randn(4, 2, **double)
    for net in (Net(0, fi.Chandrupatla(max_steps=16)), Net(1, fi.FixedPoint(max_steps=12))):
        torch.testing.assert_close(torch.export.export(net, (x,), strict=False).module()(x), net(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(NotImplementedError, match=r"Use Chandrupatla\(\) or FixedPoint\(\)"):
        torch.export.export(Net(1), (x,), strict=False)


def test_export():
    run_fresh(check_export)


# --- torch.compile(fullgraph=True), in processes of their own --------------------------------------


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def backward(h, inputs):
    inputs = live(inputs)
    return torch.autograd.grad(total(h(*inputs)), inputs)


# One stack for each inverter, and as few steps as will do: each of them is traced.
def check_compiled_chandrupatla():
    problem = ELEMENTWISE
    h, inputs = inverted(problem, inverter=fi.Chandrupatla(max_steps=12)), problem.inputs()
    assert_close(backward(compiled(h), inputs), backward(problem.closed_form(), inputs))


def check_compiled_newton():
    problem, many = VECTOR, VECTOR.stacked(2)
    h, exact = inverted(problem, inverter=fi.Newton(max_steps=6)), problem.closed_form()
    assert_close(compiled(vmap(grad(loss(h), all_of(many))))(*many), vmap(grad(loss(exact), all_of(many)))(*many))


def check_compiled_fixed_point():
    """A closed-over parameter, and samples that do not converge."""
    w = (0.1 * W).requires_grad_()
    g = fi.invert(lambda y: y + y @ w.T, event_dim=1, inverter=fi.FixedPoint(max_steps=8))
    x = torch.randn(4, 3, **double)
    exact = x @ torch.linalg.inv(torch.eye(3, **double) + w).T
    assert_close(torch.autograd.grad(compiled(g)(x).sin().sum(), w), torch.autograd.grad(exact.sin().sum(), w))
    never = fi.invert(lambda y: 1.5 * y, event_dim=1, inverter=fi.FixedPoint(max_steps=2, memory=0))
    y = compiled(never)(torch.tensor([[0.0], [0.5]], **double))
    torch.testing.assert_close(y, torch.tensor([[0.0], [torch.nan]], **double), equal_nan=True)


def check_compiled():
    """All in one process, since torch.compile takes longer to load than any of them to compile."""
    check_compiled_chandrupatla()
    check_compiled_newton()
    check_compiled_fixed_point()


def test_compiled():
    run_fresh(check_compiled)
