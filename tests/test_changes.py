"""What f can reach and does not read may change between forward and backward; what it reads may not."""

import functools
import gc
import pickle
import threading
import types
import warnings
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from fresh import run_fresh
from helpers import assert_close
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import functorch_inverse as fi

X = torch.tensor([[0.5, -1.0, 2.0], [0.3, 0.1, -0.4]], dtype=torch.float64)
W = torch.tensor([[2.0, 0.3, 0.0], [0.1, 1.8, 0.2], [-0.4, 0.0, 2.2]], dtype=torch.float64)


def exact(x, w=W):
    return torch.linalg.solve(w, torch.asinh(x).unsqueeze(-1)).squeeze(-1)


class Layer(nn.Module):
    """f is a method, so it reaches everything in here."""

    def __init__(self, **options):
        super().__init__()
        self.W = nn.Parameter(W.clone())
        self.bn = nn.BatchNorm1d(3, dtype=torch.float64)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.held, self.seen, self.scale = None, [], 1.0
        self.h = fi.custom_inverse(self.g, self.f, **({"event_dim": 1} | options))

    def g(self, x):
        return exact(x, self.W)

    def f(self, y):
        return torch.sinh(y @ self.W.mT)

    def forward(self, x):
        return self.h(x)


def derivatives(layer, y, x):
    return torch.autograd.grad(y.sin().sum(), (x, layer.W), create_graph=True)


def right(layer, x):
    return torch.autograd.grad(exact(x, layer.W).sin().sum(), (x, layer.W), create_graph=True)


def normalised(layer, x):
    layer.bn(x.detach())
    y = layer.h(x)
    layer.bn(y.detach())
    return y


def counted(layer, x):
    y = layer.h(x)
    layer.steps += 1
    return y


def remembered(layer, x):
    layer.held = layer.h(x)
    layer.held.sum().backward(retain_graph=True)
    return layer.held


def remembered_without_graph(layer, x):
    y = layer.h(x)
    layer.held = y.detach()
    return y


def listed(layer, x):
    y = layer.h(x)
    layer.seen.append(y.sum())
    return y


def scaled(layer, x):
    y = layer.h(x)
    layer.scale *= 0.5
    return y


USES = [normalised, counted, remembered, remembered_without_graph, listed, scaled]


@pytest.mark.parametrize("event_dim", [1, None])
@pytest.mark.parametrize("use", USES)
def test_what_f_does_not_read_may_change(use, event_dim):
    """Again and again, to second order, for x and the parameter."""
    layer, x = Layer(event_dim=event_dim), X.clone().requires_grad_()
    for _ in range(3):
        first, want = derivatives(layer, use(layer, x), x), right(layer, x)
        assert_close(first, want)
        second, wanted = (torch.autograd.grad(sum(t.sin().sum() for t in part), (x, layer.W)) for part in (first, want))
        assert_close(second, wanted)


@pytest.mark.parametrize("use", [remembered, remembered_without_graph, listed, scaled])
def test_what_f_does_not_read_may_change_under_transforms(use):
    layer = Layer()

    def number(x):
        if use is remembered:
            layer.held = layer.h(x)
            return layer.held.sin().sum()
        return use(layer, x).sin().sum()

    for _ in range(2):
        assert_close(grad(number)(X), right(layer, X.clone().requires_grad_())[0])
        moved = jvp(number, (X,), (X.cos(),))[1]
        assert_close(moved, (right(layer, X.clone().requires_grad_())[0] * X.cos()).sum())
    layer.held = None
    layer.seen.clear()
    assert_close(vmap(jacrev(layer))(X), vmap(jacrev(exact))(X))


def test_a_graph_in_an_object_does_not_grow():
    """y of the last call stands in the object; its graph is used up, and f does not read it."""
    layer, x = Layer(), X.clone().requires_grad_()
    for _ in range(3):
        layer.held = layer.h(x)
        layer.held.sin().sum().backward()
    assert_close(x.grad, 3 * right(layer, x)[0])


def test_a_tensor_with_a_graph_in_an_object_is_followed_where_f_reads_it():
    c = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)

    class Holder:
        def f(self, y):
            return torch.sinh(self.c * y)

    holder, x = Holder(), X.clone().requires_grad_()
    holder.c = c.exp()
    h = fi.custom_inverse(lambda x: torch.asinh(x) / c.detach().exp(), holder.f, event_dim=1)
    want = torch.autograd.grad((torch.asinh(x) / c.exp()).sin().sum(), (x, c))
    assert_close(torch.autograd.grad(h(x).sin().sum(), (x, c)), want)


def test_a_warm_start():
    class Deq(nn.Module):
        def __init__(self):
            super().__init__()
            self.V = nn.Parameter(W / 10)
            self.start = None
            self.h = fi.custom_fixed_point(self.solve, self.step, event_dim=1)

        def step(self, y, x):
            return torch.tanh(y @ self.V.mT + x)

        def solve(self, x):
            y = torch.zeros_like(x) if self.start is None else self.start
            for _ in range(60):
                y = self.step(y, x)
            self.start = y
            return y

    deq = Deq()
    want = None
    for _ in range(3):
        y = deq.h(X)
        (got,) = torch.autograd.grad(y.sin().sum(), deq.V)
        z, V = torch.zeros_like(X), deq.V.detach().clone().requires_grad_()
        for _ in range(80):
            z = torch.tanh(z @ V.mT + X)
        want = torch.autograd.grad(z.sin().sum(), V)[0] if want is None else want
        assert_close(got, want)


READS = {
    "steps": lambda self, y: self.steps * y.sinh(),
    "a view": lambda self, y: self.held.data * y.sinh(),
    "held": lambda self, y: self.held * y.sinh(),
    "in vmap": lambda self, y: vmap(lambda c, y: c * y.sinh(), (0, -1), -1)(self.held, y),
    "item": lambda self, y: self.held[0].item() * y.sinh(),
}


@pytest.mark.parametrize("event_dim", [0, 1])
@pytest.mark.parametrize("how", ["in place", "exchanged"])
@pytest.mark.parametrize("name", READS)
def test_what_f_reads_must_not_change(name, how, event_dim):
    layer = Layer(event_dim=event_dim)
    layer.held, layer.steps = torch.full((3,), 2.0, dtype=torch.float64), torch.tensor(2)
    h = fi.custom_inverse(lambda x: torch.asinh(x / 2), lambda y: READS[name](layer, y), event_dim=event_dim)
    x = X.clone().requires_grad_()
    (got,) = torch.autograd.grad(h(x).sum(), x)
    assert_close(got, 1 / (2 * (1 + x * x / 4).sqrt()))
    y = h(x)
    if how == "in place":
        layer.held += 1
        layer.steps += 1
    else:
        layer.held = layer.held + 1
        del layer.steps
        layer.steps = torch.tensor(3)
    with pytest.raises(fi.NoDerivativeError, match=rf"changed in place|{how}"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("reads", [False, True])
def test_what_is_wrapped_by_a_transform_is_known_again(reads):
    """It is exchanged between a call and its derivative, both inside of torch.func.grad."""
    layer = Layer()
    f = (lambda y: torch.sinh(layer.held * y)) if reads else (lambda y: torch.sinh(2 * y))
    holder = types.SimpleNamespace(f=f, layer=layer)
    h = fi.custom_inverse(lambda x: torch.asinh(x) / 2, lambda y: holder.f(y), event_dim=1)

    def number(x):
        layer.held = 2 + 0 * x.sum()
        y = h(x)
        layer.held = 5 + 0 * x.sum()
        return y.sum()

    if reads:
        with pytest.raises(fi.NoDerivativeError, match="exchanged"):
            grad(number)(X)
    else:
        assert_close(grad(number)(X), 1 / (2 * (1 + X * X).sqrt()))


@pytest.mark.parametrize("event_dim", [1, None])
def test_a_frozen_scripted_module(event_dim):
    """It keeps its parameters in something that is no dict."""
    net = linear().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        scripted = torch.jit.script(net)
    x = X[0].clone().requires_grad_()
    h = fi.custom_inverse(lambda x: solved(x, net), lambda y: scripted(y), event_dim=event_dim)
    assert_close(torch.autograd.grad(h(x).sin().sum(), x), torch.autograd.grad(solved(x, net).sin().sum(), x))


def test_shapes_of_what_has_changed_may_be_read():
    held = torch.ones(2, 3, dtype=torch.float64)
    h = fi.custom_inverse(lambda x: torch.asinh(x / 6), lambda y: held.shape[0] * held.size(1) * y.sinh(), event_dim=0)
    x = X.clone().requires_grad_()
    assert_close(torch.autograd.grad(h(x).sum(), x)[0], 1 / (6 * (1 + x * x / 36).sqrt()))
    y = h(x)
    held += 1
    with pytest.raises(fi.NoDerivativeError, match="changed in place"):  # size is a function like others
        torch.autograd.grad(y.sum(), x)
    h = fi.custom_inverse(lambda x: torch.asinh(x / 6), lambda y: held.shape[0] * held.ndim * 1.5 * y.sinh(), event_dim=0)
    y = h(x)
    held += 1
    assert_close(torch.autograd.grad(y.sum(), x)[0], 1 / (6 * (1 + x * x / 36).sqrt()))


# --- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_dim", [0, 1])
@pytest.mark.parametrize("order", [1, 2])
def test_a_number_in_a_closure_that_changes_is_an_error(event_dim, order):
    """The loop variable of a closure is read when the backward comes."""
    x, total = X.clone().requires_grad_(), 0.0
    h = fi.custom_inverse(lambda x: torch.asinh(x) / c, lambda y: torch.sinh(c * y), event_dim=event_dim)
    for c in (1.0, 2.0, 3.0):  # noqa: B007
        total = total + h(x).sum()
    with pytest.raises(fi.NoDerivativeError, match=r"`c` .* exchanged"):
        torch.autograd.grad(total, x, create_graph=order == 2)


@pytest.mark.parametrize("event_dim", [0, 1])
def test_a_tensor_that_becomes_a_number_is_an_error(event_dim):
    c, x = torch.tensor(2.0, dtype=torch.float64), X.clone().requires_grad_()
    h = fi.custom_inverse(lambda x: torch.asinh(x) / 2, lambda y: torch.sinh(c * y), event_dim=event_dim)
    y = h(x)
    c = 3.0
    with pytest.raises(fi.NoDerivativeError, match=r"`c` .* exchanged"):
        torch.autograd.grad(y.sum(), x)


FROZEN = {
    "inverse": lambda f, g: fi.custom_inverse(g, f, event_dim=0),
    "vectors": lambda f, g: fi.custom_inverse(g, f, event_dim=1),
    "whole": lambda f, g: fi.custom_inverse(g, f),
    "root": lambda f, g: fi.custom_root(g, lambda y, x: f(y) - x, event_dim=1),
    "jacobian": lambda f, g: fi.custom_jacobian(g, lambda x: g(torch.ones_like(x)), event_dim=0),
    "differences": lambda f, g: fi.finite_difference(g, event_dim=0),
    "invert": lambda f, g: fi.invert(f, event_dim=0),
}


@pytest.mark.parametrize("rule", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("where", ["closure", "module"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_frozen_in_the_forward_pass_and_free_in_the_backward(rule, where, create_graph):
    """As networks that train in turn: what had no derivative then has none now; a change of it is told as ever."""
    net = nn.Module()
    net.c = nn.Parameter(torch.tensor([2.0, 3.0, 1.5], dtype=torch.float64), requires_grad=False)
    held = net if where == "module" else types.SimpleNamespace(c=net.c.detach())
    h, x = rule(lambda y: held.c * y, lambda x: x / held.c), X[0].clone().requires_grad_()
    y = h(x).sum()
    held.c.requires_grad_()
    assert_close(torch.autograd.grad(y, x, create_graph=create_graph)[0], 1 / held.c.detach(), 1e-7)
    assert held.c.grad is None
    held.c.requires_grad_(False)
    y = h(x).sum()
    held.c.add_(1).requires_grad_()
    with pytest.raises(fi.NoDerivativeError, match="changed in place"):
        torch.autograd.grad(y, x, create_graph=create_graph)


class Memo(nn.Module):
    """A weight that is computed once and kept."""

    def __init__(self, others=False):
        super().__init__()
        self.w, self.kept, self.mask, self.before = nn.Parameter(torch.tensor(0.7, dtype=torch.float64)), None, None, None
        self.others = nn.Linear(2, 2) if others else None

    def weight(self):
        if self.kept is None:
            self.kept = self.w.exp()
        return self.kept

    def masked(self, y):
        if self.mask is None:
            self.mask = torch.ones(3, dtype=torch.float64)
        return self.w.exp() * self.mask * y


@pytest.mark.parametrize("event_dim", [0, 1, None])
@pytest.mark.parametrize("create_graph", [False, True])
def test_what_was_computed_of_parameters_and_kept(event_dim, create_graph):
    """While g and f run, others stand in for the parameters, so what they keep has no way back to them."""

    def gradient(h):
        return torch.autograd.grad(h(X).sum(), memo.w, create_graph=create_graph)[0]

    memo = Memo()
    both = fi.custom_inverse(lambda x: x / memo.weight(), lambda y: memo.weight() * y, event_dim=event_dim)
    with pytest.raises(fi.NoDerivativeError, match="an earlier run of g or f has kept"):
        gradient(both)
    memo = Memo()
    memo.weight()
    assert_close(gradient(both), -(X / memo.w.exp()).sum())
    memo = Memo()
    by_f = fi.custom_inverse(lambda x: x / memo.w.exp(), lambda y: memo.weight() * y, event_dim=event_dim)
    error = None
    for _ in range(3):
        try:  # right as long as it can be
            assert_close(gradient(by_f), -(X / memo.w.exp()).sum())
        except fi.NoDerivativeError as found:
            error = str(found)
            break
    assert error is None or "an earlier run of g or f has kept" in error
    assert error or create_graph


def test_a_constant_that_is_made_once_and_kept():
    """It is no matter, as long as f reads the parameters besides."""

    def g(x):
        memo.before = x / memo.w.exp()
        memo.masked(memo.before)
        return memo.before.clone()

    x = X.clone().requires_grad_()
    for event_dim in (0, 1):
        memo = Memo()
        h = fi.custom_inverse(g, memo.masked, event_dim=event_dim)
        for _ in range(2):
            dw, dx = torch.autograd.grad(h(x).sum(), (memo.w, x))
            assert_close([dw, dx], [-(X / memo.w.exp()).sum(), (1 / memo.w.exp()).expand_as(X)])
        memo = Memo(others=True)
        h = fi.custom_inverse(g, memo.masked, event_dim=event_dim)
        with pytest.raises(fi.NoDerivativeError, match="an earlier run of g or f has kept"):
            torch.autograd.grad(h(x).sum(), memo.w)  # nobody can tell it from a weight of the other layer
        assert_close(torch.autograd.grad(h(x).sum(), memo.w)[0], -(X / memo.w.exp()).sum())


K = 2.0


def scaled(y):
    return K * y


@functools.wraps(scaled)
def decorated(*y):
    return scaled(*y)


class Scaled(nn.Module):
    def forward(self, y):
        return K * y

    def method(self, y):
        return K * y


class Called:
    def __call__(self, y):
        return K * y


READERS = {
    "helper": lambda y: scaled(y),
    "wrapper": decorated,
    "partial": functools.partial(lambda k, y: K * k * y, 1.0),
    "object": Called(),
    "method": Scaled().method,
    "module": Scaled(),
    "module by name": lambda y, net=Scaled(): net(y),  # noqa: B008
    "nested": lambda y: (lambda z: K * z)(y),
    "vmap": torch.vmap(scaled),
    "grad": grad(lambda y: (K / 2 * y * y).sum()),
    "compiled": torch.compile(scaled, backend="eager"),
    "rule": fi.custom_inverse(lambda x: x * K, lambda y: y / K, event_dim=0),
}
RULES = {
    "inverse": lambda f: fi.custom_inverse(lambda x: x / K, f, event_dim=0),
    "vectors": lambda f: fi.custom_inverse(lambda x: x / K, f, event_dim=1),
    "root": lambda f: fi.custom_root(lambda x: x / K, lambda y, x: f(y) - x, event_dim=1),
    "fixed point": lambda f: fi.custom_fixed_point(lambda x: x / K, lambda y, x: y - (f(y) - x) / 4, event_dim=1),
    "jacobian": lambda f: fi.custom_jacobian(lambda x: x / K, lambda x: 1 / f(torch.ones_like(x)), event_dim=0),
    "differences": lambda f: fi.finite_difference(lambda x: x * x / f(x), event_dim=0),
    "invert": lambda f: fi.invert(f, event_dim=0),
}


@pytest.fixture
def exchange_k(monkeypatch):
    yield lambda: monkeypatch.setitem(globals(), "K", 3.0)
    monkeypatch.undo()


@pytest.mark.parametrize("f", READERS.values(), ids=READERS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_global_that_is_read_far_inside(rule, f, exchange_k):
    """By whatever calls whatever: K is 2 in the forward pass, and the derivative of K = 3 is not asked for."""
    x = (X[0] + 1.5).requires_grad_()
    h = rule(f)
    assert_close(torch.autograd.grad(h(x).sum(), x)[0], torch.full_like(x, 0.5), 1e-7)
    y = h(x).sum()
    exchange_k()
    with pytest.raises(fi.NoDerivativeError, match=r"`K` .* exchanged"):
        torch.autograd.grad(y, x)


THINGS = {
    "function": (torch.sinh, torch.tanh),
    "str": ("sinh", "tanh"),
    "bool": (True, False),
    "tuple": ((1.0, "a"), (2.0, "a")),
    "np": (np.float64(2), np.float64(3)),
    "fraction": (Fraction(1, 2), Fraction(1, 3)),
    "module": (nn.Tanh(), nn.Softsign()),
    "array": (np.ones(3), np.zeros(3)),
    "object": (types.SimpleNamespace(k=1.0), types.SimpleNamespace(k=2.0)),
    "nothing": (None, 1.0),
}


@pytest.mark.parametrize(("before", "after"), THINGS.values(), ids=THINGS)
def test_anything_that_f_names_and_that_is_exchanged_is_an_error(before, after):
    thing, x = before, X.clone().requires_grad_()
    y = fi.custom_inverse(torch.asinh, lambda y: (thing, torch.sinh(y))[1], event_dim=0)(x)
    thing = after
    with pytest.raises(fi.NoDerivativeError, match=r"`thing` .* exchanged.*lambda y, thing=thing"):
        torch.autograd.grad(y.sum(), x)


EQUAL = [2.5, float("nan"), (1, (float("nan"), "a")), 10**30, torch.device("cpu"), None]
EQUAL += [{"a": [1, 2]}, frozenset("a"), np.ones(2)]


@pytest.mark.parametrize("value", EQUAL, ids=repr)
def test_an_equal_value_may_take_the_place(value):
    thing, x = value, X.clone().requires_grad_()
    y = fi.custom_inverse(torch.asinh, lambda y: (thing, torch.sinh(y))[1], event_dim=0)(x)
    thing = pickle.loads(pickle.dumps(value))
    assert_close(torch.autograd.grad(y.sum(), x)[0], 1 / (1 + X * X).sqrt())


def test_f_may_count_its_calls():
    """A name that f sets is its own matter; so is what g alone reads."""
    calls, of_g, last = 0, 0, None

    def f(y):
        nonlocal calls, last
        calls, last = calls + 1, y.detach()
        return torch.sinh(y)

    def g(x):
        nonlocal of_g
        of_g += 1
        return torch.asinh(x)

    h, x = fi.custom_inverse(g, f, event_dim=0), X.clone().requires_grad_()
    first, second = h(x).sum(), h(x).sum()
    for total in (second, first):
        (got,) = torch.autograd.grad(total, x, create_graph=True)
        assert_close(got, 1 / (1 + x * x).sqrt())
    assert calls > 1
    assert of_g == 2
    assert last is not None


def test_a_number_that_stays():
    x, want = X.clone().requires_grad_(), 0.0
    total = 0.0
    for c in (1.0, 2.0, 3.0):
        h = fi.custom_inverse(lambda x, c=c: torch.asinh(x) / c, lambda y, c=c: torch.sinh(c * y), event_dim=0)
        total = total + h(x).sum()
        want = want + (torch.asinh(x) / c).sum()
    assert_close(torch.autograd.grad(total, x)[0], torch.autograd.grad(want, x)[0])


step = 0


class Steps:
    step = 2.0


def test_a_global_of_the_name_of_an_attribute_may_change():
    global step
    x, held = X.clone().requires_grad_(), Steps()
    y = fi.custom_inverse(lambda x: torch.asinh(x) / 2, lambda y: torch.sinh(held.step * y), event_dim=0)(x)
    step += 1
    assert_close(torch.autograd.grad(y.sum(), x)[0], 0.5 / (1 + x * x).sqrt())


# --- arguments that are modules and functions ------------------------------------------------------


def linear():
    net = nn.Linear(3, 3, dtype=torch.float64)
    net.weight.data = W.clone()
    return net


def solved(x, net):
    return torch.linalg.solve(net.weight, (x - net.bias).unsqueeze(-1)).squeeze(-1)


RULES = {
    "inverse": lambda x, net: fi.custom_inverse(solved, lambda y, n: n(y), event_dim=1)(x, net),
    "inverse of all": lambda x, net: fi.custom_inverse(solved, lambda y, n: n(y))(x, net),
    "root": lambda x, net: fi.custom_root(solved, lambda y, x, n: n(y) - x, event_dim=1)(x, net),
    "fixed point": lambda x, net: fi.custom_fixed_point(solved, lambda y, x, n: y - 0.3 * (n(y) - x), event_dim=1)(x, net),
    "invert": lambda x, net: fi.invert(lambda y, n: n(y), event_dim=1)(x, net),
    "function": lambda x, net: fi.custom_inverse(solved_by, lambda y, n: n(y), event_dim=1)(x, lambda y: net(y)),
}


def solved_by(x, function):
    c = function(torch.zeros(3, dtype=x.dtype))
    A = torch.stack([function(e) - c for e in torch.eye(3, dtype=x.dtype)], -1)
    return torch.linalg.solve(A, (x - c).mT).mT


@pytest.mark.parametrize("live", [False, True], ids=["x is plain", "x is live"])
@pytest.mark.parametrize("name", RULES)
def test_a_module_as_argument_gets_its_derivative(name, live):
    net, x = linear(), X.clone().requires_grad_(live)
    leaves = (*net.parameters(), *([x] if live else []))
    got = torch.autograd.grad(RULES[name](x, net).sin().sum(), leaves, create_graph=True)
    want = torch.autograd.grad(solved(x, net).sin().sum(), leaves, create_graph=True)
    assert_close(got, want, 1e-8)
    twice, wanted = (torch.autograd.grad(sum(t.sin().sum() for t in part), leaves) for part in (got, want))
    assert_close(twice, wanted, 1e-7)


@pytest.mark.parametrize("name", RULES)
def test_a_module_as_argument_under_functional_call(name):
    net = linear()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return RULES[name](x, self.net)

    outer = Outer()
    given = {f"net.{k}": v.detach() for k, v in net.named_parameters()}
    got = grad(lambda p: functional_call(outer, p, (X,)).sin().sum())(given)
    want = grad(lambda p: torch.linalg.solve(p["net.weight"], (X - p["net.bias"]).mT).mT.sin().sum())(given)
    assert_close(tuple(got.values()), tuple(want.values()), 1e-8)


@pytest.mark.parametrize("call", [
    lambda x, net: fi.custom_jacobian(lambda x, n: n(x), lambda x, n: n.weight.expand(*x.shape, 3), event_dim=1)(x, net),
    lambda x, net: fi.finite_difference(lambda x, n: n(x), event_dim=1)(x, net),
    lambda x, net: fi.custom_inverse(lambda x, n: solved(x, n), lambda y: y @ W.mT, event_dim=1)(x, n=net),
], ids=["custom_jacobian", "finite_difference", "keyword"])  # fmt: skip
@pytest.mark.parametrize("live", [False, True], ids=["x is plain", "x is live"])
def test_a_module_whose_derivative_would_be_lost_is_an_error(call, live):
    net, x = linear(), X.clone().requires_grad_(live)
    with pytest.raises(fi.NoDerivativeError, match="lost"):
        call(x, net)
    net.requires_grad_(False)
    assert call(x, net).requires_grad == live


def test_the_error_says_that_it_is_an_argument():
    with pytest.raises(fi.NoDerivativeError, match="an argument outside `argnums`"):
        fi.finite_difference(lambda x, n: n(x), event_dim=1)(X, linear())


def test_tensors_in_an_array_of_objects_are_followed():
    """And arrays of numbers are data."""
    c, x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), X.clone().requires_grad_()
    held = np.empty(1, dtype=object)
    held[0] = c
    h = fi.custom_inverse(lambda x, a, b: torch.asinh(x) / a[0].detach() - b[0], lambda y, a, b: torch.sinh((y + b[0]) * a[0]))
    got = torch.autograd.grad(h(x, held, np.ones(1)).sum(), (x, c))
    assert_close(got, torch.autograd.grad((torch.asinh(x) / c - 1).sum(), (x, c)))


def check_compiled_module_as_keyword():
    net = linear()
    h = fi.custom_inverse(lambda x, n: solved(x, n), lambda y: y @ W.mT, event_dim=1)
    call = torch.compile(lambda x: h(x, n=net), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="keyword argument carries a derivative"):
        call(X.clone().requires_grad_())
    net.requires_grad_(False)
    x = X.clone().requires_grad_()
    torch._dynamo.reset()
    assert_close(torch.autograd.grad(call(x).sum(), x), torch.autograd.grad(solved(x, net).sum(), x))


def test_compiled_module_as_keyword():
    run_fresh(check_compiled_module_as_keyword)


# --- at the same time ------------------------------------------------------------------------------


def test_threads_that_change_what_f_does_not_read():
    layer, wrong = Layer(), []
    want = right(layer, X.clone().requires_grad_())[0]

    def work():
        x = X.clone().requires_grad_()
        for _ in range(20):
            y = layer.h(x)
            layer.steps += 1
            layer.held = y.detach()
            (got,) = torch.autograd.grad(y.sin().sum(), x)
            wrong.append((got - want).abs().max().item() > 1e-9)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 60
    assert not any(wrong)


# --- parameters that are read in two ways ----------------------------------------------------------


def slowly(f):
    def g(x):
        y = x
        for _ in range(100):
            y = x - (f(y) - y)
        return y

    return g


@pytest.mark.parametrize("rule", ["inverse", "root", "gmres", "invert"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_read_in_its_module_and_by_itself(rule, frozen):
    """Both ways count; and neither where it is frozen when the values are found."""
    net = nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(W / 4)
    weight = net.weight.requires_grad_(not frozen)
    f = lambda y: y + 0.1 * torch.tanh(net(y)) + 0.1 * torch.sin(y @ weight)  # noqa: E731
    h = {
        "inverse": lambda: fi.custom_inverse(slowly(f), f, event_dim=1),
        "root": lambda: fi.custom_root(slowly(f), lambda y, x: f(y) - x, event_dim=1),
        "gmres": lambda: fi.custom_inverse(slowly(f), f, event_dim=1, linear_solver=fi.GMRES()),
        "invert": lambda: fi.invert(f, event_dim=1),
    }[rule]()
    x = X.clone().requires_grad_()
    y = h(x)
    with torch.no_grad():
        J = torch.func.vmap(jacrev(lambda y: y + 0.1 * torch.tanh(y @ weight.T + net.bias) + 0.1 * torch.sin(y @ weight)))(y)
    u = torch.linalg.solve(J.mT, torch.cos(y).detach().unsqueeze(-1)).squeeze(-1)
    weight.requires_grad_()
    got = torch.autograd.grad(y.sin().sum(), (x, weight), allow_unused=True)
    at = y.detach()
    by_module = -0.1 * (u * (1 - torch.tanh(net(at)) ** 2)).T @ at
    by_itself = -0.1 * at.T @ (u * torch.cos(at @ weight))
    assert_close([got[0]], [u], 1e-7)
    if frozen:
        assert got[1] is None
    else:
        assert_close([got[1]], [(by_module + by_itself).detach()], 1e-7)


# --- what f keeps and does not read ----------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("where", ["hook", "list", "attribute"])
def test_what_f_keeps_and_does_not_read(where, create_graph):
    """Activations, logs and penalties of one run are no memo of the next."""
    net = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Tanh())
    kept, net.reg = [], None
    if where == "hook":
        net[0].register_forward_hook(lambda module, args, out: kept.append(out))

    def f(y):
        if where == "list":
            kept.append(net(y).norm())
        if where == "attribute":
            net.reg = (net[0].weight ** 2).sum()
        return y + 0.3 * net(y)

    x = X.clone().requires_grad_()
    for h in (fi.custom_inverse(slowly(f), f, event_dim=1), fi.invert(f, event_dim=1)):
        want = None
        for _ in range(3):
            got = torch.autograd.grad(h(h(x)).sum(), (x, *net.parameters()), create_graph=create_graph)
            want = got if want is None else want
            assert_close([t.detach() for t in got], [t.detach() for t in want], 1e-7)


def test_a_result_that_is_kept_does_not_keep_the_earlier_ones():
    class Keeping:
        def __init__(self):
            self.y = None
            self.h = fi.custom_inverse(torch.asinh, self.f, event_dim=0)

        def f(self, y):
            return torch.sinh(y)

    keeping, earlier = Keeping(), []
    for _ in range(5):
        keeping.y = keeping.h(X.clone().requires_grad_())
        keeping.y.sum().backward()
        earlier.append(weakref.ref(keeping.y))
    gc.collect()
    assert [ref() is not None for ref in earlier] == [False] * 4 + [True]
    whole = weakref.ref(keeping)
    keeping.y = None
    del keeping
    gc.collect()
    assert whole() is None


ONE, HALF, _fast = 1.0, 0.5, None


def lazily(y):
    global _fast
    if _fast is None:
        _fast = lambda y: torch.sinh(y) * ONE  # noqa: E731
    return _fast(y)


def halved():
    return HALF


def test_a_function_that_f_makes_at_its_first_run():
    """What comes after it in a walk stays what it was."""
    x = X.clone().requires_grad_()
    h = fi.custom_inverse(torch.asinh, lambda y: lazily(y) * (halved() * 2), event_dim=0)
    (got,) = torch.autograd.grad((h(x) + h(2 * x)).sum(), x)
    assert_close(got, 1 / (1 + X * X).sqrt() + 2 / (1 + 4 * X * X).sqrt())


def test_a_counter_of_a_wrapper_hides_no_global():
    K = 0

    def counting(function):
        def wrapper(*args):
            nonlocal K
            K += 1
            return function(*args)

        return wrapper

    x = X.clone().requires_grad_()
    y = fi.custom_inverse(lambda x: x / globals()["K"], counting(scaled), event_dim=0)(x).sum()
    before = globals()["K"]
    globals()["K"] = 3.0
    try:
        with pytest.raises(fi.NoDerivativeError, match=r"`K` .* exchanged"):
            torch.autograd.grad(y, x)
    finally:
        globals()["K"] = before
