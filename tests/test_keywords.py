"""Keyword arguments reach g alone: one that f has as well is a mistake, which the call tells of."""

import copy
import functools
import pickle

import pytest
import torch
from helpers import assert_close
from problems import VECTOR

import functorch_inverse as fi

X, _, _ = VECTOR.inputs()


def g(x, a=2.0):
    return x.asinh() / a


def f(y, a=2.0):
    return (a * y).sinh()


class Module(torch.nn.Module):
    def forward(self, y, a=2.0):
        return (a * y).sinh()


RULES = {
    "inverse": fi.custom_inverse(g, f, event_dim=0),
    "inverse, keyword only": fi.custom_inverse(g, lambda y, *, a=2.0: f(y, a), event_dim=0),
    "inverse, module": fi.custom_inverse(g, Module(), event_dim=0),
    "inverse, partial": fi.custom_inverse(g, functools.partial(lambda b, y, a=2.0: f(y, a), None), event_dim=0),
    "inverse, pickled": pickle.loads(pickle.dumps(fi.custom_inverse(g, f, event_dim=0))),
    "inverse, copied": copy.deepcopy(fi.custom_inverse(g, f, event_dim=0)),
    "root": fi.custom_root(g, lambda y, x, a=2.0: f(y, a) - x, event_dim=0),
    "fixed point": fi.custom_fixed_point(g, lambda y, x, a=2.0: y - 0.1 * (f(y, a) - x), event_dim=0),
    "Jacobian": fi.custom_jacobian(g, lambda x, a=2.0: (1 + x * x).rsqrt() / a, event_dim=0),
    "Jacobian, tuple": fi.custom_jacobian(g, lambda x, a=2.0: ((1 + x * x).rsqrt() / a,), argnums=(0,), event_dim=0),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("live", [False, True])
def test_a_parameter_of_both(rule, live):
    h, x = RULES[rule], X.clone().requires_grad_(live)
    with pytest.raises(fi.StructureError, match=r"keyword argument 'a' reaches g alone.*by position"):
        h(x, a=3.0)
    if live and "only" not in rule:
        assert_close(torch.autograd.grad(h(x, 3.0).sum(), x)[0], (1 + X * X).rsqrt() / 3)


def passed_on(function):
    return lambda *args, **options: function(*args, **options)


class Passing(torch.nn.Module):
    def forward(self, y, **options):
        return (options.get("a", 2.0) * y).sinh()


@pytest.mark.parametrize("f", [passed_on(f), passed_on(passed_on(f)), Passing(), Passing().forward, passed_on(Module())])
def test_a_parameter_behind_others(f):
    h = fi.custom_inverse(g, f, event_dim=0)
    with pytest.raises(fi.StructureError, match=r"keyword argument 'a' reaches g alone.*by position"):
        h(X, a=3.0)
    x = X.clone().requires_grad_()
    assert_close(torch.autograd.grad(h(x).sum(), x)[0], (1 + X * X).rsqrt() / 2)


def recursive():
    def f(y, n=0, **options):
        return y.sinh() if n > 2 else f(y, n=n + 1, **options)

    return f


class AnyKeywords(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **options):
        return self.inner(*args, **options)


@pytest.mark.parametrize("f", [AnyKeywords(torch.nn.Tanhshrink()), torch.compile(torch.nn.Tanhshrink(), backend="eager")])
def test_a_module_around_one_without_the_keyword(f):
    h = fi.custom_inverse(lambda x, *, tol: x * 1, f, event_dim=0)
    assert_close(h(X, tol=1e-6), X)
    with pytest.raises(fi.StructureError, match="reaches g alone"):
        fi.custom_inverse(g, AnyKeywords(Module()), event_dim=0)(X, a=3.0)


def test_a_function_in_its_own_closure():
    h = fi.custom_inverse(torch.asinh, recursive(), event_dim=0)
    x = X.clone().requires_grad_()
    assert_close(torch.autograd.grad(h(x).sum(), x)[0], (1 + X * X).rsqrt())


def test_compiled():
    h = RULES["inverse"]
    compiled = torch.compile(lambda x: h(x, a=3.0), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="keyword argument 'a' reaches g alone"):
        compiled(X)


@pytest.mark.parametrize("f", [
    lambda y: y.sinh(),
    lambda steps: steps.sinh(),  # y itself
    lambda y, **options: y.sinh(),
    passed_on(lambda y, b=None: y.sinh()),
    functools.partial(lambda y, steps: y.sinh(), steps=None),
    torch.sinh,  # has no signature
])  # fmt: skip
def test_what_f_does_not_have_reaches_g(f):
    h, x = fi.custom_inverse(lambda x, steps: x.asinh() * steps, f, event_dim=0), X.clone().requires_grad_()
    y = h(x, steps=1)
    assert_close(y.detach(), X.asinh())
    assert_close(torch.autograd.grad(y.sum(), x)[0], (1 + X * X).rsqrt())


def test_a_name_that_was_filled_by_position():
    h = fi.custom_inverse(lambda x, b, a: x.asinh() / b * a, lambda y, a: (a * y).sinh(), event_dim=0)
    x = X.clone().requires_grad_()
    assert_close(torch.autograd.grad(h(x, 3.0, a=1.0).sum(), x)[0], (1 + X * X).rsqrt() / 3)


def test_differences_call_fn_with_them():
    h, x = fi.finite_difference(g, event_dim=0), X.clone().requires_grad_()
    assert_close(torch.autograd.grad(h(x, a=3.0).sum(), x)[0], (1 + X * X).rsqrt() / 3, 1e-7)
