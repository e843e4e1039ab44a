"""The inverters by themselves: how fast, how safe, what they refuse."""

import itertools
import math
import pickle
import sys
import types

import pytest
import torch
from torch.func import vmap

import functorch_inverse as fi
from functorch_inverse import _chandrupatla
from functorch_inverse._status import DONE, RUNNING, Options, chosen

double = {"dtype": torch.float64}
EPS = torch.finfo(torch.float64).eps


def counted(f):
    """f, and a list that grows with every evaluation."""
    calls = []

    def g(y, *args):
        calls.append(y.detach().clone())
        return f(y, *args)

    return g, calls


# --- options ---------------------------------------------------------------------------------------

INVERTERS = [fi.Newton, fi.Chandrupatla, fi.FixedPoint]


@pytest.mark.parametrize("kind", INVERTERS)
def test_options(kind):
    assert kind() == kind(rtol=None)
    assert hash(kind(max_steps=7)) == hash(kind(max_steps=7))
    assert pickle.loads(pickle.dumps(kind(atol=1e-3))) == kind(atol=1e-3)
    for bad in ({"on_failure": "ignore"}, {"max_steps": -1}, {"max_steps": 2.5}, {"rtol": -1.0}, {"atol": math.nan}):
        with pytest.raises(ValueError, match="choose"):
            kind(**bad)
    with pytest.raises(TypeError):
        kind(unknown=1)


def test_options_of_their_own():
    with pytest.raises(ValueError, match="must be below"):
        fi.Chandrupatla(lower=1.0, upper=1.0)
    with pytest.raises(ValueError, match="choose 0, 1, 2"):
        fi.FixedPoint(memory=-1)


@pytest.mark.parametrize("kind", INVERTERS)
def test_a_loose_tolerance_saves_evaluations_and_is_kept(kind):
    x = torch.linspace(-2, 2, 9, **double)
    errors, steps = [], []
    for rtol in (1e-3, None):
        f, calls = counted(lambda y: y + 0.6 * torch.tanh(y))
        y = fi.invert(f, inverter=kind(rtol=rtol), event_dim=0)(x)
        errors.append((y + 0.6 * torch.tanh(y) - x).abs().max().item())
        steps.append(len(calls))
    assert errors[0] <= 1e-2
    assert errors[1] <= 1e-11
    assert steps[0] < steps[1]


@pytest.mark.parametrize("kind", INVERTERS)
def test_steps_used_up(kind):
    x = torch.tensor([0.0, 40.0], **double)
    with pytest.raises(fi.NotConvergedError, match=r"samples \[1\].*") as caught:
        fi.invert(lambda y: y + 0.9 * torch.sin(y), inverter=kind(max_steps=1), event_dim=0)(x)
    assert "after at most 1 steps: the steps were used up" in str(caught.value)
    never = fi.invert(torch.sinh, inverter=kind(max_steps=0, on_failure="nan"), event_dim=0)
    torch.testing.assert_close(never(x), torch.tensor([0.0, torch.nan], **double), equal_nan=True)


@pytest.mark.parametrize("kind", INVERTERS)
def test_converged_samples_are_left_alone(kind):
    """Whether a sample is solved for by itself or beside a hard one: the same numbers, bit by bit."""
    x = torch.tensor([0.3, 2.0, 30.0], **double)
    g = fi.invert(lambda y: y + 0.9 * torch.sin(y), inverter=kind(), event_dim=0)
    assert torch.equal(g(x), torch.cat([g(t) for t in x.split(1)]))


def test_progress(monkeypatch):
    seen = []

    class Bar:
        def __init__(self, total, desc):
            seen.append((total, desc))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n):
            seen.append(n)

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    fi.invert(torch.sinh, inverter=fi.Newton(progress=True), event_dim=1)(torch.randn(5, 2, **double))
    assert seen[0] == (5, "invert")
    assert sum(seen[1:]) == 5
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        fi.invert(torch.sinh, inverter=fi.Newton(progress=True), event_dim=1)(torch.ones(2))


# --- Newton ----------------------------------------------------------------------------------------


def test_newton_is_quadratic():
    w = torch.tensor([[3.0, 0.5], [0.9, 2.5]], **double)
    solution = torch.tensor([0.7, -0.4], **double)
    f, calls = counted(lambda y: torch.sinh(y) @ w.T)
    fi.invert(f, event_dim=1)(torch.sinh(solution) @ w.T, init=solution + 0.3)
    errors = [(y - solution).abs().max().item() for y in calls]
    late = [(a, b) for a, b in itertools.pairwise(errors) if a < 0.1 and b > 1e-14]
    assert len(late) >= 2
    assert all(b <= 2 * a**2 for a, b in late)


def test_newton_needs_the_line_search():
    """The full step from 3 overshoots further every time."""
    f, calls = counted(torch.atan)
    y = fi.invert(f, inverter=fi.Newton(), event_dim=1)(torch.zeros(1, **double), init=torch.full((1,), 3.0, **double))
    assert y.abs() < 1e-12
    assert max(t.abs().item() for t in calls) < 13
    start = torch.tensor([-1.2, 1.0], **double)

    def rosenbrock(y):
        return torch.stack([10 * (y[..., 1] - y[..., 0] ** 2), 1 - y[..., 0]], -1)

    y = fi.invert(rosenbrock, event_dim=1)(torch.zeros(2, **double), init=start)
    torch.testing.assert_close(y, torch.ones(2, **double), rtol=1e-9, atol=1e-9)


def test_newton_where_the_jacobian_is_singular_on_the_way():
    def f(y):
        return torch.stack([y[..., 0] ** 3 + y[..., 1], 2 * y[..., 1] + y[..., 1] * y[..., 0] ** 2], -1)

    solution = torch.tensor([[1.0, 2.0], [0.5, -1.5]], **double)
    y = fi.invert(f, event_dim=1)(f(solution), init=torch.zeros(2, 2, **double))
    torch.testing.assert_close(f(y), f(solution), rtol=1e-9, atol=1e-9)
    cube = fi.invert(lambda y: y**3, inverter=fi.Newton(), event_dim=1)
    y = cube(torch.tensor([8.0], **double), init=torch.zeros(1, **double))
    torch.testing.assert_close(y, torch.tensor([2.0], **double))


def test_newton_says_where_it_is_stuck_or_undefined():
    with pytest.raises(fi.NotConvergedError, match=r"no step makes .* smaller in samples \[0\]. The Jacobian is singular"):
        fi.invert(lambda y: y**2, event_dim=1)(torch.full((1, 1), -1.0, **double), init=torch.ones(1, 1, **double))
    with pytest.raises(fi.NotConvergedError, match=r"nan or infinite at the start .* in samples \[1\]. Pass an `init`"):
        fi.invert(torch.log, event_dim=1)(torch.tensor([[1.0], [-1.0]], **double))


def test_newton_in_badly_scaled_and_ill_conditioned_problems():
    scale = torch.tensor([1e-150, 1.0, 1e150], **double)
    y = torch.tensor([0.3, -2.0, 1.0], **double)
    torch.testing.assert_close(fi.invert(lambda y: scale * torch.sinh(y), event_dim=1)(scale * y.sinh(), init=0 * y), y)
    hilbert = 1 / (torch.arange(8)[:, None] + torch.arange(8) + 1).double()
    g, truth = fi.invert(lambda y: y @ hilbert, event_dim=1), torch.ones(8, **double)
    torch.testing.assert_close(g(truth @ hilbert) @ hilbert, truth @ hilbert, rtol=1e-12, atol=0)


def test_newton_with_more_than_one_backward_at_once():
    """Many numbers a sample: the rows come from one vmapped backward."""
    w = torch.eye(70, **double) + 0.1 * torch.randn(70, 70, **double) / 8
    x = torch.randn(2, 70, **double)
    y = fi.invert(lambda y: torch.sinh(y @ w.T), event_dim=1)(x)
    torch.testing.assert_close(torch.sinh(y @ w.T), x, rtol=1e-10, atol=1e-10)


def test_newton_sees_each_number_by_itself():
    """A large number, or an offset, does not hide an equation that does not hold."""

    def f(y):
        return torch.stack([y[..., 0], torch.atan(y[..., 1])], -1)

    for dtype, big in ((torch.float64, 1e9), (torch.float32, 1e5)):
        x = torch.tensor([big, 0.0], dtype=dtype)
        y = fi.invert(f, event_dim=1)(x, init=torch.tensor([big, 2.0], dtype=dtype))
        torch.testing.assert_close(y, x, rtol=0, atol=1e-9)
    y = fi.invert(lambda y: torch.atan(y - 1e9), event_dim=1)(
        torch.zeros(1, **double), init=torch.full((1,), 1e9 + 2, **double)
    )
    torch.testing.assert_close(y, torch.full((1,), 1e9, **double), rtol=1e-15, atol=0)


def test_newton_from_far_away():
    g = fi.invert(lambda y: y + 20 * torch.atan(3 * y), event_dim=1)
    for dtype, init in ((torch.float32, 1e7), (torch.float64, 1e15)):
        y = g(torch.tensor([5.0], dtype=dtype), init=torch.tensor([init], dtype=dtype))
        torch.testing.assert_close(y + 20 * torch.atan(3 * y), torch.tensor([5.0], dtype=dtype))


# f, x outside of its range or beyond where it overflows, init.
UNSOLVABLE = {
    "below": (torch.sigmoid, [-1e-13], [-1e-13]),
    "square": (lambda y: y**2, [-1e-13], [1.0]),
    "overflow": (torch.exp, [1e3], [1e3]),
    "overflow of some": (lambda y: torch.sinh(y) + 0.5 * y.sum(-1, keepdim=True), [1e3, 2.0], [1e3, 2.0]),
    "overflow of the derivative": (lambda y: y**3, [1e103], [1e103]),
    "infinite derivative": (lambda y: (y - 1).sqrt(), [5.0], [1.0]),
}


@pytest.mark.parametrize("name", UNSOLVABLE)
def test_newton_does_not_take_failure_for_success(name):
    f, x, init = UNSOLVABLE[name]
    with pytest.raises(fi.NotConvergedError):
        fi.invert(f, event_dim=1)(torch.tensor(x, **double), init=torch.tensor(init, **double))


def test_newton_in_float32_does_not_take_failure_for_success():
    for f, x, init in ((torch.sigmoid, -1e-6, -1e-6), (lambda y: y**2, -1e-6, 1.0), (lambda y: y**3, 1e15, 1e15)):
        with pytest.raises(fi.NotConvergedError):
            fi.invert(f, event_dim=1)(torch.tensor([x]), init=torch.tensor([init]))
    with pytest.raises(fi.NotConvergedError, match=r"samples \[0\]"):
        fi.invert(torch.exp, event_dim=0, inverter=fi.Newton())(torch.tensor([100.0, 2.0]))


def test_newton_at_zero_and_where_f_loses_digits():
    """x = 0 gives residuals no scale; a sum with a large number leaves f only some digits."""
    w, y0 = torch.eye(4, **double) + 0.2 * torch.randn(4, 4, **double), torch.randn(4, **double)
    y = fi.invert(lambda y: torch.sinh(y @ w), event_dim=1)(torch.zeros(4, **double), init=y0)
    assert y.abs().max() < 1e-300
    x = torch.tensor([0.3, -7.0], **double)
    y = fi.invert(lambda y: (y + 1e4) - 1e4 + y, event_dim=1)(x)
    torch.testing.assert_close(y, x / 2, rtol=0, atol=2e4 * EPS)


def test_newton_beside_a_pole():
    """|A||y| is huge there, but f is not linear over what that allows."""
    y = fi.invert(lambda y: 1 / (y - 1), event_dim=1)(torch.tensor([5.0], **double), init=torch.tensor([1 + 1e-13], **double))
    torch.testing.assert_close(y, torch.tensor([1.2], **double), rtol=1e-13, atol=0)


# --- Chandrupatla ----------------------------------------------------------------------------------

# f, its inverse in closed form, x.
MONOTONE = {
    "exp": (torch.exp, torch.log, [1e-300, 1e-3, 1.0, 1e3, 1e300]),
    "falling": (lambda y: -torch.sinh(y), lambda x: torch.asinh(-x), [-1e5, -1.0, 0.0, 2.0, 1e100]),
    "cubic": (lambda y: y**3, lambda x: x.sign() * x.abs() ** (1 / 3), [-27.0, 1e-9, 8.0]),
    "ninth": (lambda y: (y - 1) ** 9, lambda x: 1 + x.sign() * x.abs() ** (1 / 9), [1e-9, -1e-3, 512.0]),
    "power": (lambda y: y**21, lambda x: x.sign() * x.abs() ** (1 / 21), [1e-3, -5.0, 1e10]),
    "root": (lambda y: y.sign() * y.abs() ** 0.1, lambda x: x.sign() * x.abs() ** 10, [0.77, -2.0, 1e-2]),
    "atan": (lambda y: torch.atan(1e3 * (y - 0.7)), lambda x: 0.7 + torch.tan(x) / 1e3, [-1.5, 0.0, 1.0]),
    "step": (lambda y: torch.tanh(1e6 * (y - 0.3)), lambda x: 0.3 + torch.atanh(x) / 1e6, [0.2, -0.9]),
    "sigmoid": (torch.sigmoid, torch.logit, [1e-12, 0.3, 0.5, 1 - 1e-9]),
}


@pytest.mark.parametrize("name", MONOTONE)
def test_chandrupatla_on_nasty_functions(name):
    f, exact, x = MONOTONE[name]
    x = torch.tensor(x, **double)
    for init in (None, torch.full_like(x, 0.9), torch.full_like(x, -0.1)):
        y = fi.invert(f, event_dim=0)(x, init=init)
        # As exact as f lets anyone see: y, or f(y).
        y_error, x_error = (y - exact(x)).abs() / exact(x).abs().clamp_min(1e-9), (f(y) - x).abs() / x.abs().clamp_min(1e-9)
        assert torch.minimum(y_error, x_error).max() < 1e-12


def steps(f, lower, upper):
    """(steps of Chandrupatla inside a bracket, steps that bisection needs for the same width)."""
    options = Options(EPS, 2 * EPS, 0.0)
    a, b = torch.tensor([lower], **double), torch.tensor([upper], **double)
    s = _chandrupatla.started(b.unsqueeze(-1), f(b).unsqueeze(-1), None, None)
    width = b - a
    s = s._replace(
        a=a, fa=f(a), b=b, fb=f(b), bracketed=torch.ones(1, dtype=torch.bool), budget=width * 2.0 ** (_chandrupatla.SLACK - 1),
        m=(a + b) / 2, span=(f(a) - f(b)).abs(), near=(f(a) - f(b)).abs(), trial=((a + b) / 2).unsqueeze(-1),
    )  # fmt: skip
    count = 0
    while (s.status == RUNNING).any():
        new = _chandrupatla.advanced(s, torch.zeros(1, 1, **double), f(s.trial.squeeze(-1)).unsqueeze(-1), None, options)
        s = type(s)(*(chosen(s.status == RUNNING, n, o) for n, o in zip(new, s, strict=True)))
        count += 1
    assert s.status == DONE
    return count, math.ceil(math.log2(width.item() / (4 * EPS * s.y.abs().item() or 1e-300)))


BRACKETS = {
    "cubic": (lambda y: y**3 - 2, 0.0, 4.0),
    "exp": (lambda y: torch.exp(y) - 1e5, -1.0, 100.0),
    "ninth": (lambda y: (y - 1) ** 9 - 1e-9, -3.0, 5.0),
    "power": (lambda y: y**21 - 1e-3, -0.5, 3.0),
    "step": (lambda y: torch.tanh(1e6 * (y - 0.3)) - 0.2, -1.0, 2.0),
    "atan": (lambda y: torch.atan(1e3 * (y - 0.7)) + 1.5, -3.0, 2.0),
    "root": (lambda y: y.sign() * y.abs() ** 0.1 - 0.77, -1.0, 7.0),
    "hook": (lambda y: torch.where(y < 0.7, 1e-9 * (y - 0.7), 1e9 * (y - 0.7)), -1.0, 2.0),
    "lambert": (lambda y: y * torch.exp(y) - 1e6, 0.0, 700.0),
}


@pytest.mark.parametrize("name", BRACKETS)
def test_chandrupatla_is_never_worse_than_bisection(name):
    found, bisection = steps(*BRACKETS[name])
    # The slope of "hook" changes by 1e18 at the very solution.
    assert found <= bisection + (_chandrupatla.SLACK if name == "hook" else 0)
    if name in ("cubic", "lambert", "root"):
        assert found <= bisection / 2


@pytest.mark.parametrize("seed", range(5))
def test_chandrupatla_and_an_adversary(seed):
    """Monotone functions with random slopes over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    knots = torch.rand(20, generator=generator, **double).sort().values * 4 - 2
    slopes = 10 ** (torch.rand(20, generator=generator, **double) * 12 - 6)

    def f(y):
        return (slopes * torch.clamp(y[..., None] - knots, min=0)).sum(-1) + 1e-6 * y - slopes.sum() * 0.01

    found, bisection = steps(f, -3.0, 3.0)
    assert found <= bisection + _chandrupatla.SLACK


def test_chandrupatla_counts():
    f, calls = counted(torch.sinh)
    fi.invert(f, event_dim=0)(torch.linspace(-3, 3, 100, **double))
    assert len(calls) <= 16


def test_chandrupatla_inside_a_domain():
    """f is only ever asked between the bounds; nan beyond unstated ones is found out."""
    p = torch.tensor([-700.0, -3.0, 0.0, 5.0, 30.0], **double)
    f, calls = counted(torch.logit)
    y = fi.invert(f, inverter=fi.Chandrupatla(lower=0.0, upper=1.0), event_dim=0)(p)
    torch.testing.assert_close(y, torch.sigmoid(p), rtol=1e-12, atol=0)
    assert all(((t >= 0) & (t <= 1)).all() for t in calls[1:])
    unstated = fi.invert(torch.log, event_dim=0)(torch.tensor([-20.0, 0.5, 3.0], **double), init=1.0)
    torch.testing.assert_close(unstated, torch.tensor([-20.0, 0.5, 3.0], **double).exp(), rtol=1e-13, atol=0)
    half = fi.invert(torch.log, inverter=fi.Chandrupatla(lower=0.0), event_dim=0)(p)
    torch.testing.assert_close(half, p.exp(), rtol=1e-13, atol=0)
    below = fi.invert(lambda y: (-y).log(), inverter=fi.Chandrupatla(upper=0.0), event_dim=0)(p)
    torch.testing.assert_close(below, -p.exp(), rtol=1e-13, atol=0)
    edge = fi.invert(torch.sqrt, inverter=fi.Chandrupatla(lower=0.0), event_dim=0)(torch.tensor([0.0, 2.0], **double))
    torch.testing.assert_close(edge, torch.tensor([0.0, 4.0], **double))


def test_chandrupatla_refuses():
    x = torch.tensor([0.5, 2.0], **double)
    with pytest.raises(fi.BracketError, match=r"one sign everywhere that was looked in samples \[1\]"):
        fi.invert(torch.tanh, event_dim=0)(x)
    with pytest.raises(fi.BracketError, match="check x, `lower` and `upper`"):
        fi.invert(torch.exp, inverter=fi.Chandrupatla(lower=-1.0, upper=0.6), event_dim=0)(x)
    with pytest.raises(fi.NotConvergedError, match=r"f is not monotone in samples \[1\]. Use Newton"):
        fi.invert(lambda y: y**2, event_dim=0)(torch.tensor([4.0, -4.0], **double), init=torch.tensor([1.0, -3.0], **double))
    with pytest.raises(fi.NotConvergedError, match="f jumps over x in samples"):
        fi.invert(lambda y: y + 10 * (y > 0.37), event_dim=0)(x + 2)
    with pytest.raises(fi.NotConvergedError, match=r"State f's domain by Chandrupatla\(lower, upper\)"):
        fi.invert(torch.log, event_dim=0)(-x)
    with pytest.raises(fi.StructureError, match="one real number a sample"):
        fi.invert(torch.sin, inverter=fi.Chandrupatla(), event_dim=0)(x + 0j)


# f, its inverse, x in float64, x in float32.
SMALL_ROOTS = {
    "cube": (lambda y: y.sign() * y.abs() ** (1 / 3), lambda x: x**3, [1e-1, -1e-3, 1e-6, 1e-20], [1e-1, 1e-3, 1e-5, -1e-9]),
    "steep": (lambda y: torch.sinh(1e10 * y), lambda x: torch.asinh(x) / 1e10, [1.0, -8.0, 0.0, 1e-9], [1.0, -8.0, 0.0, 1e-5]),
    "linear": (lambda y: 1e23 * y, lambda x: x / 1e23, [1.38, -3e7, 1e-200], [1.38, 1e-5]),
}


@pytest.mark.parametrize("name", SMALL_ROOTS)
def test_chandrupatla_finds_small_roots(name):
    f, exact, *inputs = SMALL_ROOTS[name]
    for dtype, x in zip((torch.float64, torch.float32), inputs, strict=True):
        x = torch.tensor(x, dtype=dtype)
        for init in (None, 0.7):
            g, calls = counted(f)
            y = fi.invert(g, event_dim=0)(x, init=init)
            torch.testing.assert_close(y, exact(x), rtol=64 * torch.finfo(dtype).eps, atol=0)
            assert len(calls) <= 60


def test_chandrupatla_where_f_overflows_on_the_way():
    x = torch.tensor([1.0, -8.0], **double)
    y = fi.invert(lambda y: torch.sinh(1e25 * y), event_dim=0)(x)
    torch.testing.assert_close(y, x.asinh() / 1e25, rtol=1e-14, atol=0)


# f, x with no y for it, init.
JUMPS = {
    "at 0": (lambda y: y + y.sign(), [0.5, -0.25], None),
    "close to 0": (lambda y: y + torch.sign(y - 1e-12), [0.5], None),
    "floor": (torch.floor, [2.5, 2.0001], None),
    "small beside f": (lambda y: y**3 + 10 * torch.sign(y - 5), [130.0], None),
    "overflow on the way": (lambda y: y.exp() + 1000 * (y > 7), [1500.0], None),
    "small beside x": (lambda y: 10 * y + torch.sign(y - 5), [50.5], None),
    "very small": (lambda y: y + 1e-5 * (y > 0.37), [0.370005], None),
    "far away": (lambda y: torch.sinh(y) + 10 * (y > 0.37), [5.0], 700.0),
    "at 0, far away": (lambda y: torch.sinh(y) + 10 * y.sign(), [5.0], 700.0),
    "to infinity": (lambda y: 1 / (1 - y), [1e20], 0.5),
}


@pytest.mark.parametrize("name", JUMPS)
def test_chandrupatla_sees_jumps(name):
    f, values, init = JUMPS[name]
    # Beside the largest changes of f a tolerance hides the smallest.
    loose = [] if name in ("very small", "at 0, far away") else [{"rtol": 1e-6}, {"atol": 1e-6}]
    for options in ({}, {"rtol": 0.0}, *loose):
        for x in values:
            with pytest.raises(fi.NotConvergedError, match="f jumps over x"):
                fi.invert(f, inverter=fi.Chandrupatla(**options), event_dim=0)(torch.tensor([x], **double), init=init)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chandrupatla_sees_jumps_in_lower_precision(dtype):
    for f, x in ((lambda y: 10 * y + torch.sign(y - 5), 50.5), (lambda y: y + torch.sign(y - 5), 5.5)):
        with pytest.raises(fi.NotConvergedError, match="f jumps over x"):
            fi.invert(f, event_dim=0)(torch.tensor([x], dtype=dtype))


def test_steep_functions_and_rounding_are_no_jumps():
    for slope, dtype in ((1e4, torch.float32), (1e6, torch.float64), (1e10, torch.float64)):
        x, eps = torch.tensor([0.2, -0.9], dtype=dtype), torch.finfo(dtype).eps
        y = fi.invert(lambda y, slope=slope: torch.tanh(slope * (y - 0.3)), event_dim=0)(x)
        torch.testing.assert_close(y, 0.3 + x.atanh() / slope, rtol=8 * eps, atol=0)
    x = torch.tensor([0.0, 1e-3], **double)
    y = fi.invert(lambda y: y**3 - 3 * y**2 + 3 * y - 1, event_dim=0)(x, init=3.7)
    torch.testing.assert_close((y - 1) ** 3, x, rtol=1e-9, atol=1e-14)
    y = fi.invert(lambda y: (y + 1e6) - 1e6, event_dim=0)(torch.tensor([0.3, -7.0], **double))
    torch.testing.assert_close(y, torch.tensor([0.3, -7.0], **double), rtol=0, atol=2e6 * EPS)
    noise = fi.invert(lambda y: torch.sinh(y) + 0.3 - 0.1 - 0.2, event_dim=0)(x[:1], init=1.0)
    assert noise.abs() < 1e-15


@pytest.mark.parametrize("options", [{"rtol": 1e-6}, {"atol": 1e-6}, {"rtol": 0.0}])
def test_chandrupatla_keeps_a_tolerance(options):
    x = torch.tensor([0.3, -5.0, 1e4], **double)
    y = fi.invert(torch.sinh, inverter=fi.Chandrupatla(**options), event_dim=0)(x)
    rtol = max(options.get("rtol", 0.0), 4 * EPS)
    torch.testing.assert_close(y, x.asinh(), rtol=rtol, atol=options.get("atol", 0.0))


def test_bounds_that_are_none():
    assert fi.Chandrupatla(lower=-math.inf, upper=math.inf) == fi.Chandrupatla()
    with pytest.raises(ValueError, match="choose None, for no bound"):
        fi.Chandrupatla(upper=math.nan)


def test_a_flat_start():
    """Nothing but rounding to go by at first: both sides are tried."""
    x = torch.tensor([0.1, 0.9], **double)
    for start in (-60.0, 60.0):
        y = fi.invert(torch.special.ndtr, event_dim=0)(x, init=start)
        torch.testing.assert_close(torch.special.ndtr(y), x, rtol=1e-12, atol=0)


# --- FixedPoint ------------------------------------------------------------------------------------


def residual_block(size, contraction):
    w = torch.randn(size, size, **double)
    w *= contraction / torch.linalg.matrix_norm(w, 2)
    return lambda y: y + torch.tanh(y @ w.T)


@pytest.mark.parametrize("memory", [0, 1, 5, 20])
def test_fixed_point(memory):
    f, x = residual_block(6, 0.7), torch.randn(10, 6, **double)
    y = fi.invert(f, inverter=fi.FixedPoint(memory=memory, max_steps=300), event_dim=1)(x)
    torch.testing.assert_close(f(y), x, rtol=1e-10, atol=1e-10)


def test_anderson_pays():
    x, counts = torch.randn(10, 6, **double), []
    for memory in (0, 5):
        f, calls = counted(residual_block(6, 0.95))
        fi.invert(f, inverter=fi.FixedPoint(memory=memory, max_steps=2000), event_dim=1)(x)
        counts.append(len(calls))
    assert counts[1] < counts[0] / 2


def test_fixed_point_takes_no_derivative():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y + 0.5 * torch.tanh(y)

        @staticmethod
        def backward(ctx, v):
            raise AssertionError

    for inverter in (fi.FixedPoint(), fi.Chandrupatla()):
        x = torch.randn(4, **double)
        y = fi.invert(NoBackward.apply, inverter=inverter, event_dim=0)(x)
        torch.testing.assert_close(y + 0.5 * torch.tanh(y), x, rtol=1e-10, atol=1e-10)


def test_fixed_point_refuses():
    with pytest.raises(fi.NotConvergedError, match=r"f - identity must be a contraction .* use Newton\(\)"):
        fi.invert(lambda y: y + 3 * torch.sinh(y), inverter=fi.FixedPoint(memory=0), event_dim=1)(torch.ones(2, **double))
    with pytest.raises(fi.StructureError, match="y must have the shapes of x"):
        fi.invert(lambda y: y["p"], inverter=fi.FixedPoint())(torch.ones(2, 2), init={"p": torch.ones(4)})


def test_fixed_point_under_vmap_is_one_batch():
    f, x = residual_block(6, 0.7), torch.randn(10, 6, **double)
    g, calls = counted(f)
    h = fi.invert(g, inverter=fi.FixedPoint(), event_dim=1)
    one = h(x)
    count = len(calls)
    assert count < 30
    torch.testing.assert_close(vmap(h)(x), one, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2 * count


def test_fixed_point_sees_each_number_by_itself():
    def f(y):
        return y + torch.sin(3 * y) / 6

    for dtype, big in ((torch.float32, 1e6), (torch.float64, 1e11)):
        y = torch.tensor([big, 0.2], dtype=dtype)
        found = fi.invert(f, event_dim=1, inverter=fi.FixedPoint())(f(y))
        torch.testing.assert_close(found, y, rtol=torch.finfo(dtype).eps ** 0.75, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_point_where_large_numbers_round_the_small_ones(dtype):
    w = 0.3 * torch.linalg.qr(torch.randn(3, 3, **double))[0]
    y = torch.tensor([1e6, 1.0, 1e-3], dtype=dtype)
    g, calls = counted(lambda y: y + y @ w.to(dtype))
    found = fi.invert(g, event_dim=1, inverter=fi.FixedPoint())(y + y @ w.to(dtype))
    torch.testing.assert_close(found, y, rtol=0, atol=4e6 * torch.finfo(dtype).eps)
    assert len(calls) <= 12
