"""finite_difference and numerical_jacobian: how accurate, in which shapes, with how many calls."""

import copy
import inspect
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optree
import pytest
import torch
from fresh import run_fresh
from helpers import all_of, assert_close, live, loss, tangents
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from functorch_inverse import (
    NoDerivativeError,
    StructureError,
    black_box,
    check_derivatives,
    custom_inverse,
    finite_difference,
    numerical_jacobian,
)

EPS = torch.finfo(torch.float64).eps
W = torch.tensor([[1.2, -0.7, 0.4], [0.3, 0.9, -1.1], [0.8, 0.2, 0.5], [-0.6, 1.0, 0.1]], dtype=torch.float64)


def ramp(*shape, start=-0.9, end=1.3, **options):
    options = {"dtype": torch.float64} | options
    return torch.linspace(start, end, int(np.prod(shape)), **options).reshape(shape)


def opaque(fn):
    """The same function, computed where torch cannot see it."""

    def outside(*args, **kwargs):
        with torch.no_grad():
            return optree.tree_map(lambda t: t.numpy() if isinstance(t, torch.Tensor) else t, fn(*args, **kwargs))

    return outside


class Recorded:
    """A function that remembers what it was called with."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, x, *args, **kwargs):
        self.seen.append(x)
        return self.function(x, *args, **kwargs)


def slope(fn, x, **options):
    """The derivative of an elementwise function by finite_difference."""
    h = finite_difference(opaque(fn), event_dim=0, **options)
    return grad(lambda x: h(x).sum())(x)


def exact_slope(fn, x):
    return grad(lambda x: fn(x).sum())(x)


def relative_error(got, want):
    return ((got - want).abs() / want.abs()).max().item()


# --- how accurate: every method and order -----------------------------------------------------------------


def wave(x):
    return torch.exp(x) * torch.sin(2 * x)


# The largest errors of the first, second and third derivative of `wave`, relative to |value| + mean |value|.
ACCURACY = {
    ("central", 2): (3e-10, 1e-7, 2e-5),
    ("central", 4): (1e-12, 1e-10, 5e-8),
    ("central", 6): (2e-13, 1e-11, 5e-9),
    ("central", "auto"): (2e-13, 1e-10, 5e-8),
    ("forward", 1): (2e-7, 1e-4, 5e-3),
    ("forward", 2): (5e-10, 5e-7, 5e-4),
    ("forward", 3): (5e-11, 5e-8, 5e-4),
    ("forward", "auto"): (1e-12, 5e-8, 5e-4),
    ("backward", 1): (2e-7, 1e-4, 5e-3),
    ("backward", 2): (5e-10, 5e-7, 5e-4),
    ("backward", 3): (5e-11, 5e-8, 5e-4),
    ("backward", "auto"): (1e-12, 5e-8, 5e-4),
    ("complex", 2): (5 * EPS, 5e-12, 5e-9),
}
every_method = pytest.mark.parametrize(("method", "order"), ACCURACY, ids=str)


def scaled_error(got, want):
    return ((got - want).abs() / (want.abs() + want.abs().mean())).max().item()


@every_method
@pytest.mark.parametrize("times", [1, 2, 3])
def test_accuracy_of_each_derivative(method, order, times):
    x = ramp(41, start=-2.0, end=2.0).requires_grad_()
    got, want = finite_difference(opaque(wave), event_dim=0, method=method, order=order)(x), wave(x)
    for _ in range(times):
        got, want = (torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in (got, want))
    assert scaled_error(got, want) < ACCURACY[method, order][times - 1]


POWERS_OF_TEN = 10.0 ** torch.arange(-8, 9, dtype=torch.float64)
SMOOTH = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "x^1.5": lambda x: x**1.5,
    "1/x": lambda x: 1 / x,
    "x^2+x": lambda x: x * x + x,
    "sin": torch.sin,
}
RANGE = {("central", 2): 1e-8, ("central", 4): 1e-9, ("central", 6): 1e-10, ("central", "auto"): 1e-11, ("complex", 2): 1e-14}


@pytest.mark.parametrize("fn", SMOOTH)
@pytest.mark.parametrize(("method", "order"), RANGE, ids=str)
def test_sixteen_orders_of_magnitude(method, order, fn):
    got = slope(SMOOTH[fn], POWERS_OF_TEN, method=method, order=order)
    assert relative_error(got, exact_slope(SMOOTH[fn], POWERS_OF_TEN)) < RANGE[method, order]


@pytest.mark.parametrize("fn", SMOOTH)
@pytest.mark.parametrize("method", ["forward", "backward"])
def test_one_sided_over_sixteen_orders_of_magnitude(method, fn):
    got = slope(SMOOTH[fn], POWERS_OF_TEN, method=method, order=3)
    assert relative_error(got, exact_slope(SMOOTH[fn], POWERS_OF_TEN)) < 1e-8


@pytest.mark.parametrize("fn", ["log", "sqrt", "1/x", "x^1.5"])
@pytest.mark.parametrize("method", ["central", "forward", "backward", "complex"])
def test_tiny_and_negative_numbers(method, fn):
    x = 10.0 ** torch.tensor([-100.0, -30.0, -20.0, -12.0], dtype=torch.float64)
    order = 4 if method in ("central", "complex") else 3
    got = slope(SMOOTH[fn], x, method=method, order=order)
    assert relative_error(got, exact_slope(SMOOTH[fn], x)) < 1e-8
    mirrored = {"forward": "backward", "backward": "forward"}.get(method, method)
    assert_close(slope(lambda x: SMOOTH[fn](-x), -x, method=mirrored, order=order), -got)


# A fast part of length 1 and a slow one, seen from far away: 1e6 is far for a step relative to x.
TWO_LENGTHS = {
    "x + sin x": (lambda x: x + x.sin(), lambda x: 1 + x.cos()),
    "1e6 + sin x": (lambda x: 1e6 + x.sin(), lambda x: x.cos()),
    "1 + sin x": (lambda x: 1 + x.sin(), lambda x: x.cos()),
    "x/1e3 + log x": (lambda x: x / 1e3 + x.log(), lambda x: 1e-3 + 1 / x),
}


@pytest.mark.parametrize("order", [2, 4, 6, "auto"])
@pytest.mark.parametrize("fn", TWO_LENGTHS)
def test_functions_of_two_lengths(fn, order):
    fn, derivative = TWO_LENGTHS[fn]
    x = 10.0 ** torch.arange(-4, 6.6, 0.5, dtype=torch.float64)
    assert (slope(fn, x, order=order) - derivative(x)).abs().max() < 2e-4
    _, error = numerical_jacobian(opaque(fn), x, event_dim=0, order=order)
    assert ((slope(fn, x, order=order) - derivative(x)).abs() <= 10 * error + EPS * derivative(x).abs()).all()


@every_method
def test_float32_input_and_a_numpy_function(method, order):
    """Evaluated in float64, the error is that of rounding the result."""
    x = ramp(41, start=-2.0, end=2.0)
    got = slope(wave, x.float(), method=method, order=order)
    assert got.dtype == torch.float32
    assert scaled_error(got.double(), exact_slope(wave, x.float().double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input(dtype):
    x = torch.tensor([-1.5, 0.25, 0.5, 2.0], dtype=dtype)
    h = finite_difference(torch.sin, event_dim=0)
    assert_close(grad(lambda x: h(x).sum())(x), x.double().cos().to(dtype))


# --- functions that compute in float32 only ------------------------------------------------------------------


def in_float32(fn):
    """Refuses float64 as Cython does."""

    def narrow(x):
        if x.dtype != torch.float32:
            raise ValueError("Buffer dtype mismatch, expected 'float' but got 'double'")
        return fn(x)

    return narrow


def asserting(x):
    assert x.dtype == torch.float32
    return torch.sin(x)


def linear():
    layer = torch.nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3) * 1.25)
        layer.bias.fill_(0.5)
    return layer.requires_grad_(False)


LAYER = linear()
NARROW = {
    "module": (lambda x: torch.sin(LAYER(x)), lambda x: torch.cos(1.25 * x + 0.5) * 1.25),
    "casts": (lambda x: x.float().sin().numpy(), torch.cos),
    "ValueError": (in_float32(torch.sin), torch.cos),
    "AssertionError": (asserting, torch.cos),
}
# Of the values' precision, 1.2e-7, a difference of order p loses all but the power p / (p + 1).
NARROW_ACCURACY = {
    ("central", 2): 3e-4,
    ("central", 4): 3e-5,
    ("central", 6): 3e-5,
    ("central", "auto"): 2e-5,
    ("forward", 2): 3e-4,
    ("forward", 3): 2e-4,
}


@pytest.mark.parametrize("fn", NARROW)
@pytest.mark.parametrize(("method", "order"), NARROW_ACCURACY, ids=str)
def test_float32_only(method, order, fn):
    fn, derivative = NARROW[fn]
    x, h = ramp(5, 3, dtype=torch.float32), finite_difference(fn, event_dim=0, method=method, order=order)
    got = grad(lambda x: h(x).sum())(x)
    assert got.dtype == torch.float32
    assert scaled_error(got.double(), derivative(x.double())) < NARROW_ACCURACY[method, order]


@pytest.mark.parametrize("order", [2, 4, 6])
def test_float64_input_and_float32_values(order):
    x, h = ramp(15), finite_difference(lambda x: x.float().sin(), event_dim=0, order=order)
    got = grad(lambda x: h(x).double().sum())(x)
    assert got.dtype == torch.float64
    assert scaled_error(got, x.cos()) < 3e-4


def test_an_error_of_fn_is_not_hidden():
    def broken(x):
        raise RuntimeError("out of order")

    h = finite_difference(Recorded(lambda x: x if x.dtype == torch.float32 and x.ndim == 1 else broken(x)), event_dim=0)
    with pytest.raises(RuntimeError, match="out of order"):
        grad(lambda x: h(x).sum())(ramp(3, dtype=torch.float32))


@pytest.mark.parametrize("x", [0.0, 1e-17, 1e-5, 0.0099, 0.0101, 0.02, 0.125, 0.5, 1.0, 2.0], ids=str)
@pytest.mark.parametrize(("method", "order"), [m for m in ACCURACY if m[0] != "backward"], ids=str)
def test_higher_derivatives_wherever_x_is(method, order, x):
    """The steps of one nested difference are the same for all its points."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    got, want = finite_difference(opaque(wave), event_dim=0, method=method, order=order)(x), wave(x)
    for times, bound in enumerate(ACCURACY[method, order], start=1):
        got, want = (torch.autograd.grad(y, x, create_graph=True)[0] for y in (got, want))
        assert (got - want).abs() < bound * (want.abs() + 5 ** (times / 2) * x.exp())  # its amplitude


# --- noise, step, and the edge of a domain ----------------------------------------------------------------------


def noisy(level):
    def fn(x):
        return x.sin() * (1 + level * torch.sin(1e9 * x))

    return fn


@pytest.mark.parametrize(("order", "bound"), [(2, 5e-4), (4, 1e-4), (6, 1e-4), ("auto", 1e-4)])
def test_noise_sets_the_step(order, bound):
    x = ramp(21)
    error = (slope(noisy(1e-6), x, order=order, noise=1e-6) - x.cos()).abs().max()
    assert error < bound
    assert error < (slope(noisy(1e-6), x, order=order) - x.cos()).abs().max() / 20


def test_noise_is_part_of_the_error_estimate():
    x = ramp(21)
    J, error = numerical_jacobian(opaque(noisy(1e-6)), x, event_dim=0, order=4, noise=1e-6)
    assert ((J - x.cos()).abs() <= 10 * error).all()
    assert (error > 1e-7).all()


POINTS = {
    ("central", 2): (-1, 1),
    ("central", 4): (-2, -1, 1, 2),
    ("central", 6): (-3, -2, -1, 1, 2, 3),
    ("forward", 1): (0, 1),
    ("forward", 2): (0, 1, 2),
    ("forward", 3): (0, 1, 2, 3),
    ("backward", 1): (-1, 0),
    ("backward", 2): (-2, -1, 0),
    ("backward", 3): (-3, -2, -1, 0),
}


@pytest.mark.parametrize("step", [0.25, torch.tensor([0.25, 0.5, 0.125], dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize(("method", "order"), POINTS, ids=str)
def test_a_step_of_ones_own(method, order, step):
    fn, x = Recorded(torch.sin), torch.tensor([0.5, 1.0, 100.0], dtype=torch.float64)
    h = finite_difference(fn, event_dim=0, method=method, order=order, step=step)
    got = grad(lambda x: h(x).sum())(x)
    seen = torch.cat([t.reshape(-1, 3) for t in fn.seen])
    moves = torch.tensor(POINTS[method, order], dtype=torch.float64)[:, None]
    assert torch.equal(seen.unique(dim=0), torch.cat([x + moves * step, x[None]]).unique(dim=0))
    # A quadratic is exact from order 2 on, and a line always.
    line = finite_difference(lambda x: 3 * x + x**2 * (order > 1), event_dim=0, method=method, order=order, step=step)
    assert_close(grad(lambda x: line(x).sum())(x), 3 + 2 * x * (order > 1), 1e-12)
    assert (got - x.cos()).abs().max() < 0.3


def test_a_step_for_each_number_of_a_vector():
    step = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64)
    J = jacrev(finite_difference(lambda x: x**3, step=step, event_dim=1))(ramp(3))
    assert_close(J, torch.diag(3 * ramp(3) ** 2 + step**2), 1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, "auto"])
def test_the_edge_of_a_domain(order):
    x = torch.tensor([0.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    root = slope(torch.sqrt, x, method="forward", order=order)
    assert not root.isnan().any() and (root[:2] > 1).all()  # the derivative is infinite there
    assert_close(root[2:], 0.5 / x[2:].sqrt(), 1e-7)
    power = slope(lambda x: x**1.5, x, method="forward", order=order)
    assert power[:2].abs().max() < 0.02
    mirrored = slope(lambda x: (-x) ** 1.5, -x, method="backward", order=order)
    assert_close(mirrored, -power)


@pytest.mark.parametrize("method", ["central", "forward", "backward"])
def test_richardson_near_the_edge_of_a_domain(method):
    """The first steps leave it; the later ones do not."""
    x = torch.tensor([-0.99, -0.9, 0.0, 0.5, 0.9, 0.99], dtype=torch.float64)
    assert_close(slope(torch.asin, x[1:-1], method=method, order="auto"), exact_slope(torch.asin, x[1:-1]), 1e-8)
    J, error = numerical_jacobian(torch.asin, x, event_dim=0, method=method, order="auto")
    assert ((J - exact_slope(torch.asin, x)).abs() <= 10 * error).all()


@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("order", [1, 2, 3, "auto"])
def test_one_sided_looks_at_one_side(method, order):
    sign = 1 if method == "forward" else -1
    fn = Recorded(torch.sin)
    x = torch.tensor([0.0, 1e-7, -3.0, 1e5], dtype=torch.float64)
    h = finite_difference(fn, event_dim=0, method=method, order=order)
    grad(lambda x: grad(lambda x: h(x).sum())(x).sum())(x)
    assert all((sign * (t - x) >= 0).all() for t in fn.seen)
    assert any((t != x).any() for t in fn.seen)


def test_special_values_stay_where_they_are():
    x = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-300, 2.0], dtype=torch.float64)
    for options in ({"order": 4}, {"method": "forward", "order": 3}, {"method": "complex"}):
        got = slope(torch.sin, x, **options)
        assert got[2:5].isnan().all()
        assert_close(got[[0, 1, 5, 6]], x[[0, 1, 5, 6]].cos())


# --- the complex step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [1e-60, 1e-3, 1.0, 1e8, 1e15, 1e18, 1e22])
def test_the_complex_step_is_exact_everywhere(x):
    x = torch.tensor(x, dtype=torch.float64)
    for fn in (torch.sin, torch.sqrt, torch.log):
        assert_close(slope(fn, x, method="complex"), exact_slope(fn, x), 4 * EPS)


@pytest.mark.parametrize("fn", [torch.abs, lambda x: x.real * 2, lambda x: x.imag], ids=["abs", "real", "imag"])
def test_the_complex_step_needs_the_imaginary_part(fn):
    with pytest.raises(NoDerivativeError, match="drops the imaginary part"):
        slope(lambda x: fn(torch.complex(x, 0 * x)) if not x.is_complex() else fn(x), ramp(3), method="complex")


def spiral(x):
    return torch.exp(1j * x)


def test_complex_outputs():
    x = ramp(5)
    h = finite_difference(opaque(spiral), event_dim=0, order=4)
    assert_close(grad(lambda x: h(x).imag.sum())(x), x.cos())
    assert_close(jvp(h, (x,), (x,))[1], 1j * x * spiral(x))
    with pytest.raises((NoDerivativeError, StructureError), match="complex"):
        slope(lambda x: spiral(x).real if not x.is_complex() else spiral(x), x, method="complex")
        grad(lambda x: finite_difference(opaque(spiral), event_dim=0, method="complex")(x).imag.sum())(x)


# --- shapes and transforms ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """fn in torch operations, and arguments all of whose tensors are differentiated."""

    name: str
    fn: Callable[..., Any]
    arguments: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self):
        return self.name

    @property
    def inputs(self):
        return tuple(optree.tree_leaves(self.arguments))

    def function(self, fn):
        spec = optree.tree_structure(self.arguments)
        return lambda *inputs: tuple(optree.tree_leaves(fn(*spec.unflatten(inputs))))

    def exact(self):
        return self.function(self.fn)

    def differenced(self, order=4, fn=None):
        argnums = tuple(range(len(self.arguments)))
        options = {"argnums": argnums if len(argnums) > 1 else 0, "order": order} | self.options
        return self.function(finite_difference(fn or opaque(self.fn), **options))


def product(x, c):
    return torch.sin(x * c)


def vector(x, c):
    return torch.sin((x * c[..., None] if c.ndim else x * c) @ W.T)


def matrix(x):
    return torch.sin(x @ x.mT @ x)


def tree(d):
    return {"u": torch.sinh(d["a"]) * d["b"][0][..., None], "w": (d["a"] ** 3).sum(-1) * d["b"][0]}


def circle(x):
    return torch.stack([x.sin(), x.cos()], -1)


def total(x):
    return (x**3).sum((-1, -2)) + x[..., 0, 1] * x[..., 1, 2]


CASES = [
    Case("number", torch.sin, (ramp(1)[0],)),
    Case("whole", vector, (ramp(3), ramp(1)[0] + 1.5)),
    Case("elementwise", product, (ramp(3), ramp(3) + 1.5), {"event_dim": 0}),
    Case("vectors", vector, (ramp(3), ramp(1)[0] + 1.5), {"event_dim": (1, 0)}),
    Case("shared", vector, (ramp(3), ramp(1)[0] + 1.5), {"event_dim": (1, None)}),
    Case("matrix", matrix, (ramp(2, 3),), {"event_dim": 2}),
    Case("circle", circle, (ramp(2),), {"event_dim": 0, "out_event_dim": 1}),
    Case("to a number", total, (ramp(2, 3),), {"event_dim": 2, "out_event_dim": 0}),
    Case(
        "tree",
        tree,
        ({"a": ramp(3), "b": [ramp(1)[0]]},),
        {"event_dim": {"a": 1, "b": 0}, "out_event_dim": {"u": 1, "w": 0}},
    ),
    Case("broadcast", vector, (ramp(3), ramp(1)[0] + 1.5), {"event_dim": (1, 0), "vmap_method": "broadcast"}),
    Case("whole broadcast", vector, (ramp(3), ramp(1)[0] + 1.5), {"vmap_method": "broadcast"}),
    Case("sequential", matrix, (ramp(2, 3),), {"event_dim": 2, "vmap_method": "sequential"}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=repr)

# (transform of a function and inputs, how often it differentiates)
STACKS = {
    "autograd": (lambda h, i: torch.autograd.grad(loss(h)(*(i := live(i))), i), 1),
    "grad": (lambda h, i: grad(loss(h), all_of(i))(*i), 1),
    "vjp": (lambda h, i: vjp(h, *i)[1](tangents(h(*i))), 1),
    "jvp": (lambda h, i: jvp(h, i, tangents(i)), 1),
    "jacrev": (lambda h, i: jacrev(h, all_of(i))(*i), 1),
    "jacfwd": (lambda h, i: jacfwd(h, all_of(i))(*i), 1),
    "hessian": (lambda h, i: hessian(loss(h), all_of(i))(*i), 2),
    "jacfwd(jacfwd)": (lambda h, i: jacfwd(jacfwd(loss(h), all_of(i)), all_of(i))(*i), 2),
    "jacrev(jacrev)": (lambda h, i: jacrev(jacrev(loss(h), all_of(i)), all_of(i))(*i), 2),
    "jvp(jvp)": (lambda h, i: jvp(lambda *i: jvp(h, i, tangents(i))[1], i, tangents(i)), 2),
}
TOLERANCE = {1: 1e-9, 2: 1e-7, 3: 1e-6}


@every_case
@pytest.mark.parametrize("stack", STACKS)
def test_transforms(case, stack):
    transform, times = STACKS[stack]
    assert_close(transform(case.differenced(), case.inputs), transform(case.exact(), case.inputs), TOLERANCE[times])


MAPPED = {
    "vmap(grad)": (lambda h, i: grad(loss(h), all_of(i))(*i), 1),
    "vmap(jacrev)": (lambda h, i: jacrev(h, all_of(i))(*i), 1),
    "vmap(jacfwd)": (lambda h, i: jacfwd(h, all_of(i))(*i), 1),
    "vmap(hessian)": (lambda h, i: hessian(loss(h), all_of(i))(*i), 2),
}


def batch(inputs, which, size=2):
    """(in_dims, inputs) with a leading dim for some of the inputs."""
    dims = tuple(0 if which == "all" or k == which else None for k in range(len(inputs)))
    spread = [torch.stack([t * (1 + 0.1 * n) for n in range(size)]) for t in inputs]
    return dims, tuple(t if d is None else s for t, s, d in zip(inputs, spread, dims, strict=True))


@every_case
@pytest.mark.parametrize("stack", MAPPED)
@pytest.mark.parametrize("over", ["all", 0, 1])
def test_vmapped_transforms(case, stack, over):
    if over != "all" and over >= len(case.inputs):
        pytest.skip("has no such input")
    dims, inputs = batch(case.inputs, over)
    (transform, times), h, exact = MAPPED[stack], case.differenced(), case.exact()
    got = vmap(lambda *i: transform(h, i), dims)(*inputs)
    assert_close(got, vmap(lambda *i: transform(exact, i), dims)(*inputs), TOLERANCE[times])


BATCHED = ["elementwise", "vectors", "matrix", "circle", "to a number", "tree"]


@pytest.mark.parametrize("case", [c for c in CASES if c.name in BATCHED], ids=repr)
@pytest.mark.parametrize("stack", ["autograd", "vjp", "jvp", "jvp(jvp)"])
def test_leading_dims_of_ones_own(case, stack):
    inputs = batch(batch(case.inputs, "all")[1], "all", 3)[1]
    transform, times = STACKS[stack]
    assert_close(transform(case.differenced(), inputs), transform(case.exact(), inputs), TOLERANCE[times])


THIRD = {
    "jacrev(jacfwd(jacrev))": lambda h, i: jacrev(jacfwd(jacrev(loss(h))))(*i),
    "jacfwd^3": lambda h, i: jacfwd(jacfwd(jacfwd(loss(h))))(*i),
}


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("number", "elementwise", "vectors", "tree")], ids=repr)
@pytest.mark.parametrize("stack", THIRD)
def test_third_order(case, stack):
    transform = THIRD[stack]
    got = transform(case.differenced(6), case.inputs)
    assert_close(got, transform(case.exact(), case.inputs), TOLERANCE[3])


def test_torch_function_by_torch_vmap():
    h = finite_difference(lambda x: torch.sin(x @ W.T), order=4, vmap_method="vmap")
    exact = vmap(hessian(lambda x: torch.sin(x @ W.T).sum()))(ramp(2, 3))
    assert_close(vmap(jacrev(h))(ramp(2, 3)), vmap(jacrev(lambda x: torch.sin(x @ W.T)))(ramp(2, 3)))
    assert_close(vmap(hessian(lambda x: h(x).sum()))(ramp(2, 3)), exact, TOLERANCE[2])


@pytest.mark.parametrize("argnums", [0, 1, (0,), (1,), (0, 1), (1, 0), (2, 0)], ids=str)
def test_argnums(argnums):
    def fn(x, c, s):
        return torch.sin(x * c) * s

    arguments = (ramp(3), ramp(3) + 1.5, ramp(3) - 2)
    h = finite_difference(opaque(fn), argnums=argnums, order=4)
    assert_close(jacrev(h, argnums)(*arguments), jacrev(fn, argnums)(*arguments))
    assert_close(jacfwd(h, argnums)(*arguments), jacfwd(fn, argnums)(*arguments))


def test_arguments_outside_argnums_and_keywords():
    def fn(x, n, c, *, k, names=("a",)):
        assert names == ("b",) and n in (2, 3)
        return torch.sin(c * x) ** n * k

    x, c, k = ramp(3), ramp(3) + 2, ramp(3) + 3
    h = finite_difference(opaque(fn), order=4, event_dim=0)
    for n in (2, 3):
        got = grad(lambda x: h(x, n, c, k=k, names=("b",)).sum())(x)  # noqa: B023
        assert_close(got, grad(lambda x: fn(x, n, c, k=k, names=("b",)).sum())(x))  # noqa: B023


def test_leaves_without_derivative():
    def fn(d):
        assert d["text"] == "text" and d["nothing"] is None
        return {"y": torch.sin(d["x"] * d["n"]), "count": (d["x"] > 0).sum(-1), "rest": [d["x"].exp(), None]}

    x, n = ramp(3), torch.tensor([1, 2, 3])
    h = finite_difference(opaque(fn), event_dim=1, order=4, out_event_dim={"y": 1, "count": 0, "rest": 1})

    def loss(h, x):
        y = h({"x": x, "n": n, "nothing": None, "text": "text"})
        assert y["count"].dtype == torch.int64 and y["rest"][1] is None
        return y["y"].sum() + y["rest"][0].sin().sum()

    assert_close(grad(lambda x: loss(h, x))(x), grad(lambda x: loss(fn, x))(x))
    assert_close(hessian(lambda x: loss(h, x))(x), hessian(lambda x: loss(fn, x))(x), TOLERANCE[2])


def test_aux():
    def fn(x):
        return np.sin(x.numpy()), {"sum": x.sum(-1), "steps": torch.tensor(7)}

    h = finite_difference(fn, order=4, event_dim=1, has_aux=True)
    J, aux = jacrev(h, has_aux=True)(ramp(3))
    assert_close((J, aux["sum"]), (torch.diag(ramp(3).cos()), ramp(3).sum()))
    J, aux = vmap(jacfwd(h, has_aux=True))(ramp(2, 3))
    assert_close((J, aux["sum"]), (torch.diag_embed(ramp(2, 3).cos()), ramp(2, 3).sum(-1)))
    assert aux["steps"].tolist() == [7, 7]
    assert_close(hessian(lambda x: h(x)[0].sum())(ramp(3)), torch.diag(-ramp(3).sin()), TOLERANCE[2])


def test_empty():
    assert grad(lambda x: finite_difference(torch.sin, event_dim=0)(x).sum())(ramp(0)).shape == (0,)
    assert vjp(finite_difference(torch.sin, event_dim=1), ramp(0, 3))[1](ramp(0, 3))[0].shape == (0, 3)
    assert vjp(finite_difference(torch.sin, event_dim=1), ramp(2, 0))[1](ramp(2, 0))[0].shape == (2, 0)
    J, error = numerical_jacobian(torch.sin, ramp(0, 3), event_dim=1)
    assert J.shape == error.shape == (0, 3, 3)


def test_inside_other_rules():
    """f of a custom_inverse from values alone, and the other way round."""
    sinh = finite_difference(opaque(torch.sinh), order=6, event_dim=0)
    asinh = custom_inverse(opaque(torch.asinh), sinh, event_dim=0)
    for transform, times in (STACKS[name] for name in ("autograd", "jvp", "hessian")):
        got = transform(lambda x: (asinh(x),), (ramp(3),))
        assert_close(got, transform(lambda x: (torch.asinh(x),), (ramp(3),)), TOLERANCE[times])
    outer = finite_difference(lambda x: asinh(x) ** 2, order=4, event_dim=0)
    assert_close(jacrev(outer)(ramp(3)), jacrev(lambda x: torch.asinh(x) ** 2)(ramp(3)))


def test_check_derivatives_to_the_third_order():
    check_derivatives(finite_difference(opaque(wave), order=6, event_dim=0), ramp(5), order=3)


# --- how many calls ------------------------------------------------------------------------------------------------


def calls_of_backward(x, **options):
    """The shapes of x in each call that one backward makes."""
    fn = Recorded(opaque(torch.sin))
    y = finite_difference(fn, **options)(x.requires_grad_())
    assert len(fn.seen) == 1
    fn.seen.clear()
    y.sum().backward()
    return [tuple(t.shape) for t in fn.seen]


NEAR, FAR = ramp(7), torch.tensor([1e-6, -1e-3, 0.0, 1.0, 1e4], dtype=torch.float64)


@every_method
@pytest.mark.parametrize("x", [NEAR, FAR], ids=["near", "far"])
def test_two_calls_serve_all_elements(x, method, order):
    assert len(calls_of_backward(x.clone(), event_dim=0, method=method, order=order)) <= 2


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"event_dim": 0}, [(4, 5, 3)]),
        ({"event_dim": 1}, [(12, 5, 3)]),
        ({"event_dim": 1, "vmap_method": "broadcast"}, [(12, 5, 3)]),
        ({"event_dim": 1, "vmap_method": "sequential"}, [(5, 3)] * 12),
        ({"event_dim": 2}, [(60, 5, 3)]),
        ({}, [(5, 3)] * 60),
        ({"vmap_method": "broadcast"}, [(60, 5, 3)]),
    ],
    ids=str,
)
def test_one_batched_call(options, shapes):
    assert calls_of_backward(ramp(5, 3), order=4, **options) == shapes


def test_calls_under_vmap():
    fn = Recorded(opaque(torch.sin))
    vmap(grad(finite_difference(fn, event_dim=0, order=4)))(NEAR)
    assert [tuple(t.shape) for t in fn.seen] == [(7,), (4, 7)]


def test_no_derivative_costs_nothing():
    fn = Recorded(opaque(torch.sin))
    h = finite_difference(fn, event_dim=0)
    with torch.no_grad():
        h(ramp(3).requires_grad_())
    h(ramp(3))
    vmap(h)(ramp(3))
    assert len(fn.seen) == 3


# --- numerical_jacobian ----------------------------------------------------------------------------------------------


@every_case
def test_structure_and_shapes_of_both_results(case):
    argnums = tuple(range(len(case.arguments)))
    argnums = argnums if len(argnums) > 1 else 0
    J, error = numerical_jacobian(opaque(case.fn), *case.arguments, argnums=argnums, order=4, **case.options)
    elementwise = case.options.get("event_dim") == 0
    want = jacrev(case.fn, argnums)(*case.arguments)
    if elementwise:  # the batch dims of y and x are the same
        want = optree.tree_map(lambda t: t.diagonal(dim1=0, dim2=-1).mT if t.ndim == 3 else t.diagonal(), want)
    assert_close(J, want)
    assert optree.tree_structure(error) == optree.tree_structure(J)
    assert [e.shape for e in optree.tree_leaves(error)] == [j.shape for j in optree.tree_leaves(J)]
    assert all((e >= 0).all() and not e.requires_grad for e in optree.tree_leaves(error))


@every_method
def test_both_functions_agree(method, order):
    """Also where only the points of the error estimate lie outside of the domain."""
    h = 2.0**-8
    x = torch.tensor([0.5, 1 - 1.5 * h, 1 - 2.5 * h, 1 - 3.5 * h, 1.5 * h - 1, 2.5 * h - 1], dtype=torch.float64)
    J, _ = numerical_jacobian(opaque(torch.asin), x, event_dim=0, method=method, order=order, step=h)
    assert torch.equal(J.nan_to_num(7.0), slope(torch.asin, x, method=method, order=order, step=h).nan_to_num(7.0))
    assert J.isfinite().any()


def test_batch_dims_come_first():
    J, error = numerical_jacobian(circle, ramp(4, 5), event_dim=0, out_event_dim=1)
    assert J.shape == error.shape == (4, 5, 2)
    J, error = numerical_jacobian(lambda x, c: x @ (c * W).T, ramp(5, 3), ramp(1)[0], argnums=(0, 1), event_dim=(1, None))
    assert [t.shape for t in J] == [t.shape for t in error] == [(5, 4, 3), (5, 4)]


JUDGED = {
    **SMOOTH,
    "wave": wave,
    "tanh": torch.tanh,
    "x^3+2x": lambda x: x**3 + 2 * x,
    "1/(1+x^2)": lambda x: 1 / (1 + x * x),
    "constant": lambda x: 0 * x + 3.0,
    "line": lambda x: 3 * x + 1,
    "erf": torch.erf,
}


@pytest.mark.parametrize("fn", JUDGED)
@every_method
def test_the_error_estimate_bounds_the_error(method, order, fn):
    if method == "complex" and fn == "erf":
        pytest.skip("torch has no complex erf")
    fn, x = JUDGED[fn], torch.cat([ramp(100, start=0.05, end=4.0), ramp(50, start=1e-7, end=1e-3)])
    J, error = numerical_jacobian(opaque(fn), x, event_dim=0, method=method, order=order)
    wrong, rounding = (J - exact_slope(fn, x)).abs(), 4 * EPS * exact_slope(fn, x).abs()
    assert (wrong <= 10 * error + rounding).all()


def test_the_error_estimate_says_something():
    """It is not merely large: at order 4 it knows ten digits of these."""
    for fn in SMOOTH.values():
        J, error = numerical_jacobian(opaque(fn), POWERS_OF_TEN, event_dim=0, order=4)
        assert (error <= 1e-7 * J.abs()).all()


def test_numerical_jacobian_of_live_tensors():
    w, x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), ramp(3).requires_grad_()
    J, error = numerical_jacobian(lambda x: w * x.sin(), x, event_dim=0, order=4)
    assert not J.requires_grad and not error.requires_grad
    assert_close(J, 2 * x.detach().cos())


# --- the object ----------------------------------------------------------------------------------------------------


def named(x, k=1.0):
    """What it does."""
    return torch.sin(k * x)


def test_it_keeps_its_name_and_pickles():
    h = finite_difference(named, order=4, event_dim=0)
    assert (h.__name__, h.__doc__, repr(h)) == ("named", "What it does.", "finite_difference(named)")
    assert inspect.signature(h) == inspect.signature(named)
    for other in (copy.deepcopy(h), pickle.loads(pickle.dumps(h))):
        assert_close(grad(lambda x: other(x).sum())(ramp(3)), ramp(3).cos())  # noqa: B023


# --- what is refused -------------------------------------------------------------------------------------------------

both_entries = pytest.mark.parametrize(
    "call",
    [
        lambda fn, x, **options: grad(lambda x: finite_difference(fn, **options)(x).sum())(x),
        lambda fn, x, **options: numerical_jacobian(fn, x, **options),
    ],
    ids=["finite_difference", "numerical_jacobian"],
)


@both_entries
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "sideways"}, "choose 'central', 'forward', 'backward' or 'complex'"),
        ({"method": None}, "choose 'central'"),
        ({"order": 3}, "choose 2, 4, 6, 'auto'"),
        ({"order": 4.0}, "choose 2, 4, 6, 'auto'"),
        ({"order": None}, "choose 2, 4, 6, 'auto'"),
        ({"order": "best"}, "choose 2, 4, 6, 'auto'"),
        ({"order": [2]}, "choose 2, 4, 6, 'auto'"),
        ({"method": "forward", "order": 4}, "choose 1, 2, 3, 'auto'"),
        ({"method": "backward", "order": 6}, "choose 1, 2, 3, 'auto'"),
        ({"step": 0.0}, "`step` is .*positive"),
        ({"step": -1e-3}, "`step` is .*positive"),
        ({"step": float("nan")}, "`step` is .*positive"),
        ({"noise": -1.0}, "`noise` not negative"),
        ({"noise": float("nan")}, "`noise` not negative"),
        ({"argnums": -1}, "`argnums` is -1; choose"),
        ({"argnums": (0, 0)}, "`argnums` is .*; choose"),
        ({"argnums": [0]}, "`argnums` is .*; choose"),
        ({"vmap_method": "parallel"}, "choose 'sequential', 'broadcast', 'vmap'"),
        ({"event_dim": -1}, "choose None, 0, 1, 2"),
    ],
    ids=str,
)
def test_bad_options(call, options, match):
    with pytest.raises(ValueError, match=match):
        call(torch.sin, ramp(3), **options)


@both_entries
def test_a_step_that_does_not_broadcast(call):
    with pytest.raises(StructureError, match="step"):
        call(torch.sin, ramp(3), step=ramp(2, start=0.1))


@both_entries
def test_inputs_that_cannot_be_moved(call):
    z = torch.complex(ramp(3), ramp(3))
    with pytest.raises(StructureError, match=r"complex input.* torch\.view_as_real"):
        call(lambda z: z.real, z)


def test_integers_have_no_derivative():
    with pytest.raises(StructureError, match="no floating input arrived"):
        numerical_jacobian(torch.sin, torch.arange(3))
    assert not finite_difference(torch.sin)(torch.arange(3)).requires_grad


def test_integer_values_have_no_derivative():
    def fn(x):
        return np.floor(x.numpy()).astype(int)

    assert finite_difference(fn)(ramp(3)).tolist() == [-1, 0, 1]
    with pytest.raises(StructureError, match="returned no floating"):
        grad(lambda x: finite_difference(fn)(x).sum() * 1.0)(ramp(3))


def test_argnums_beyond_the_arguments():
    with pytest.raises(TypeError, match="needs 2 positional arguments, 1 arrived"):
        finite_difference(torch.sin, argnums=1)(ramp(3))


def test_not_callable():
    with pytest.raises(TypeError, match="`fn` is 3"):
        finite_difference(3)


W_LIVE = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
LOST = {
    "closure": lambda x, w: finite_difference(lambda x: w * x)(x),
    "module": lambda x, w: finite_difference(torch.nn.Linear(3, 3).double())(x),
    "argument": lambda x, w: finite_difference(lambda x, w: w * x)(x, w),
    "keyword": lambda x, w: finite_difference(lambda x, w: w * x)(x, w=w),
}


@pytest.mark.parametrize("how", LOST)
def test_a_derivative_that_would_be_lost(how):
    with pytest.raises(NoDerivativeError, match="would be lost"):
        LOST[how](ramp(3), W_LIVE)
    if how != "module":
        with pytest.raises(NoDerivativeError, match="would be lost"):
            grad(lambda w: LOST[how](ramp(3), w).sum())(W_LIVE.detach())
        assert_close(grad(lambda x: LOST[how](x, W_LIVE.detach()).sum())(ramp(3)), 2 + 0 * ramp(3))


# --- torch.compile -------------------------------------------------------------------------------------------------------

BOXES = {
    "traceable": torch.sin,
    "sequential": black_box(np.sin),
    "broadcast": black_box(np.sin, vmap_method="broadcast"),
}
COMPILED = {
    "backward": None,
    "grad": lambda h, x: grad(lambda x: h(x).sum())(x),
    "jvp": lambda h, x: jvp(h, (x,), (x + 1,)),
    "vmap(grad)": lambda h, x: vmap(grad(h))(x),
    "jacrev": lambda h, x: jacrev(h)(x),
}


def compiled(fn, event_dim, *names):
    fn, x = BOXES[fn], ramp(3)
    h = finite_difference(fn, event_dim=event_dim, order=4)
    for name in names:
        transform = COMPILED[name]
        if transform is None:
            y = torch.compile(h, fullgraph=True, backend="aot_eager")(x.requires_grad_())
            assert_close(torch.autograd.grad(y.sum(), x)[0], x.detach().cos())
        else:
            got = torch.compile(lambda x: transform(h, x), fullgraph=True, backend="aot_eager")(x.detach())  # noqa: B023
            assert_close(got, transform(torch.sin, x.detach()))


@pytest.mark.parametrize("fn", BOXES)
def test_compile(fn):
    run_fresh(compiled, fn, 0, "backward", "grad", "jvp", "vmap(grad)")


def test_compile_one_sample():
    run_fresh(compiled, "traceable", None, "grad", "jacrev")


def compiled_float32():
    """A trace evaluates fn in the precision of x, with the steps of that precision."""
    x = ramp(5, dtype=torch.float32)
    for order in (2, 4, 6):
        h = finite_difference(torch.sin, event_dim=0, order=order)
        got = torch.compile(grad(lambda x: h(x).sum()), fullgraph=True, backend="aot_eager")(x)  # noqa: B023
        assert got.dtype == torch.float32
        assert scaled_error(got, x.cos()) < 5e-4


def test_compile_float32():
    run_fresh(compiled_float32)


# --- far from one ----------------------------------------------------------------------------------

FAR = {
    "log": (np.log, lambda x: (1 / x, -1 / x**2, 2 / x**3)),
    "sqrt": (np.sqrt, lambda x: (0.5 * x**-0.5, -0.25 * x**-1.5, 0.375 * x**-2.5)),
    "cube": (lambda x: x**3, lambda x: (3 * x**2, 6 * x, 6 + 0 * x)),
    "reciprocal": (lambda x: 1 / x, lambda x: (-1 / x**2, 2 / x**3, -6 / x**4)),
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize(("order", "tolerance"), [(2, 1e-5), (4, 1e-7), ("auto", 1e-7)])
def test_higher_derivatives_of_what_is_flat_far_out(name, order, tolerance):
    """f' is far below f there, and its rounding is that of f: a short step sees nothing else."""
    f, exact = FAR[name]
    h = finite_difference(lambda x: f(x.numpy()), event_dim=0, order=order)
    x = torch.tensor([2.0, 1e3, 1e4, 1e6, 1e9], dtype=torch.float64)
    for want in exact(x):
        h = torch.func.grad(h)
        torch.testing.assert_close(torch.vmap(h)(x), want, rtol=tolerance, atol=0)


def test_a_hessian_of_what_is_flat_far_out():
    h = finite_difference(lambda x: x.numpy()[..., 0] * np.log(x.numpy()[..., 1]), event_dim=1, out_event_dim=0)
    H = torch.func.hessian(h)(torch.tensor([1e4, 2e4], dtype=torch.float64))
    torch.testing.assert_close(H, torch.tensor([[0, 5e-5], [5e-5, -2.5e-5]], dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("method", "tolerance"), [("central", 1e-9), ("forward", 1e-6)])
@pytest.mark.parametrize("k", [1, 4, 8, 16])
def test_automatic_steps_and_periods(method, tolerance, k):
    """Steps of 1/4, 1/8, ... are whole periods here: the function looks constant, and two levels agree on that."""
    h = finite_difference(lambda x: np.sin(2 * np.pi * k * x.numpy()), event_dim=0, method=method, order="auto")
    x = torch.tensor([1.3, 2.9, 0.0], dtype=torch.float64)
    want = 2 * np.pi * k * torch.cos(2 * np.pi * k * x)
    torch.testing.assert_close(torch.vmap(torch.func.grad(h))(x), want, rtol=tolerance, atol=0)


def test_automatic_steps_are_honest():
    w = torch.linspace(1, 1000, 500, dtype=torch.float64)
    x = torch.linspace(0.1, 5, 500, dtype=torch.float64)
    J, error = numerical_jacobian(lambda x: torch.sin(w * x), x, order="auto", event_dim=0)
    off = (J - w * torch.cos(w * x)).abs()
    assert (off <= 100 * error + 1e-9 * w).all()
