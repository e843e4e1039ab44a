"""An f that overwrites what it is given: an error that says so, and never other numbers."""

import pytest
import torch
from helpers import assert_close
from problems import VECTOR
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import functorch_inverse as fi

X, C, _ = VECTOR.inputs()
SAYS = r"changes y, or another of its arguments, in place.*y\.sinh\(\)"


def no_graph(f):
    """An f that autograd does not stop."""

    def changing(y, *rest):
        with torch.no_grad():
            y.mul_(1)
        return f(y, *rest)

    return changing


def step_in_place(y, x):
    return y.sub_((y.sinh() - x) / y.cosh())


RULES = {
    "inverse": lambda n: fi.custom_inverse(torch.asinh, torch.sinh_, event_dim=n),
    "inverse, 1": lambda n: fi.custom_inverse(torch.asinh, torch.sinh_, event_dim=1),
    "inverse, GMRES": lambda n: fi.custom_inverse(torch.asinh, torch.sinh_, event_dim=1, linear_solver=fi.GMRES()),
    "inverse, unseen": lambda n: fi.custom_inverse(torch.asinh, no_graph(torch.sinh), event_dim=n),
    "root": lambda n: fi.custom_root(torch.asinh, lambda y, x: y.sinh_() - x, event_dim=n),
    "root, of x": lambda n: fi.custom_root(torch.asinh, lambda y, x: x.neg_() + y.sinh(), event_dim=n),
    "root, unseen": lambda n: fi.custom_root(torch.asinh, no_graph(lambda y, x: y.sinh() - x), event_dim=n),
    "fixed point": lambda n: fi.custom_fixed_point(torch.asinh, step_in_place, event_dim=n),
    "Jacobian": lambda n: fi.custom_jacobian(torch.asinh, lambda x: x.mul_(x).add_(1).rsqrt_(), event_dim=0),
    "inverted": lambda n: fi.invert(torch.sinh_, event_dim=n),
}
TRANSFORMS = {
    "backward": lambda h, x: torch.autograd.grad(h(x).sum(), x),
    "create_graph": lambda h, x: torch.autograd.grad(h(x).sum(), x, create_graph=True),
    "grad": lambda h, x: grad(lambda x: h(x).sum())(X),
    "jacrev": lambda h, x: jacrev(h)(X),
    "jacfwd": lambda h, x: jacfwd(h)(X),
    "hessian": lambda h, x: hessian(lambda x: h(x).sum())(X),
    "jvp": lambda h, x: jvp(h, (X,), (X,)),
    "vmap_grad": lambda h, x: vmap(grad(lambda x: h(x).sum()))(torch.stack([X, 2 * X])),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("event_dim", [0, 1])
def test_a_derivative_says_so(rule, transform, event_dim):
    h, x = RULES[rule](event_dim), X.clone().requires_grad_()
    with pytest.raises(fi.NoDerivativeError, match=SAYS):
        TRANSFORMS[transform](h, x)


@pytest.mark.parametrize("order", [False, True])
def test_an_argument_without_derivative(order):
    a, x = torch.ones_like(X), X.clone().requires_grad_()
    h = fi.custom_inverse(lambda x, a: x.asinh(), lambda y, a: y.sinh() + 0 * a.add_(1).detach(), event_dim=0)
    y = h(x, a)
    with pytest.raises(fi.NoDerivativeError, match=SAYS):
        torch.autograd.grad(y.sum(), x, create_graph=order)


@pytest.mark.parametrize("options", [{"check": True}, {"check": True, "event_dim": 0}])
@pytest.mark.parametrize("rule", [
    lambda **o: fi.custom_inverse(torch.asinh, torch.sinh_, **o),
    lambda **o: fi.custom_root(torch.asinh, lambda y, x: y.sinh_() - x, **o),
])  # fmt: skip
def test_check(rule, options):
    with pytest.raises(fi.NoDerivativeError, match=SAYS):
        rule(**options)(X)


class Unseen:
    """Reads its weight where no walk goes."""

    __slots__ = ("weight",)

    def __init__(self):
        self.weight = iter([])

    def __call__(self, y):
        return y.sinh_()


def test_the_look_for_what_f_reads():
    h = fi.custom_inverse(torch.asinh, Unseen(), event_dim=0)
    with pytest.raises(fi.NoDerivativeError, match=SAYS):
        torch.autograd.grad(h(x := X.clone().requires_grad_()).sum(), x)


@pytest.mark.parametrize("y", [X, X.clone().requires_grad_(), X.clone().requires_grad_() * 1], ids=["plain", "leaf", "node"])
@pytest.mark.parametrize("function", [fi.batch_jacobian, fi.log_abs_det_jacobian])
@pytest.mark.parametrize("event_dim", [0, 1])
def test_jacobians(function, y, event_dim):
    with pytest.raises(fi.NoDerivativeError, match=SAYS):
        function(torch.sinh_, y, event_dim=event_dim)


def test_check_inverse():
    x = X.clone()
    with pytest.raises(fi.NoDerivativeError, match=SAYS):
        fi.check_inverse(torch.asinh, torch.sinh_, x)
    assert torch.equal(x, X)


def test_what_f_makes_itself_may_change_in_place():
    h, x = fi.custom_inverse(torch.asinh, lambda y: y.clone().sinh_(), event_dim=0), X.clone().requires_grad_()
    for order in (False, True):
        assert_close(torch.autograd.grad(h(x).sum(), x, create_graph=order)[0].detach(), (1 + X * X).rsqrt())
