"""Modules: their own parameters, functional_call, ensembles, tied weights, state dicts."""

import copy

import pytest
import torch
from helpers import assert_close, total
from problems import VECTOR, Parameters, vector_f, vector_g
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jvp, stack_module_state, vmap

import functorch_inverse as fi


class Layer(nn.Module):
    """A black box with its parameters, in a network; exact=True makes the same of torch operations."""

    def __init__(self, seed=0, exact=False):
        super().__init__()
        self.box = Parameters(VECTOR.inputs(seed)[1:])
        self.head = nn.Parameter(VECTOR.inputs(seed + 100)[0])
        rule = fi.custom_inverse(self.g, self.f, event_dim=1)
        self.solve = (lambda x: VECTOR.exact(x, *self.box.inner)) if exact else rule

    def g(self, x):
        return vector_g(x, *self.box.inner)

    def f(self, y):
        return vector_f(y, *self.box.inner)

    def forward(self, x):
        return torch.sin(self.solve(x) * self.head).sum(-1)


X = VECTOR.inputs()[0]
XS = VECTOR.stacked(4)[0]


def of_state(transform):
    """The transform of a number as a function of the module's state."""
    results = []
    for exact in (False, True):
        module = Layer(exact=exact)
        state = {k: t.detach() for k, t in module.named_parameters()}
        results.append(transform(lambda s, x, m=module: functional_call(m, s, (x,)).sum(), state))
    assert_close(*results)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_own_parameters(order):
    def derivatives(module):
        x = X.clone().requires_grad_()
        leaves, out = (x, *module.parameters()), module(x)
        for _ in range(order - 1):
            out = total(torch.autograd.grad(out, leaves, create_graph=True))
        return torch.autograd.grad(out, leaves)

    assert_close(derivatives(Layer()), derivatives(Layer(exact=True)))


def test_backward_fills_grad():
    modules = Layer(), Layer(exact=True)
    for module in modules:
        module(XS).sum().backward()
    assert_close(*({k: p.grad for k, p in m.named_parameters()} for m in modules))


def test_frozen_parameters_get_nothing():
    module = Layer()
    module.box.requires_grad_(False)
    module(XS).sum().backward()
    assert module.head.grad is not None
    assert all(p.grad is None for p in module.box.parameters())


def test_grad():
    of_state(lambda h, state: grad(h, (0, 1))(state, X))


def test_jvp():
    of_state(lambda h, state: jvp(lambda s: h(s, X), (state,), ({k: t.cos() for k, t in state.items()},)))


def test_hessian():
    of_state(lambda h, state: hessian(h, (0, 1))(state, X))


def test_jacfwd_jacfwd():
    of_state(lambda h, state: jacfwd(jacfwd(h))(state, X))


def test_per_sample_gradients():
    of_state(lambda h, state: vmap(grad(h), (None, 0))(state, XS))


def test_per_sample_hessians():
    of_state(lambda h, state: vmap(hessian(h), (None, 0))(state, XS))


def test_ensemble():
    """Many modules at once: vmap over stacked parameters."""

    def transform(exact):
        state, _ = stack_module_state([Layer(seed, exact) for seed in range(3)])
        module = Layer(exact=exact)
        h = lambda s, x: functional_call(module, s, (x,)).sum()  # noqa: E731
        state = {k: t.detach() for k, t in state.items()}
        return vmap(grad(h, (0, 1)), (0, None))(state, XS)

    assert_close(transform(False), transform(True))


def test_tied_weights():
    """One parameter under two names: each name alone would hide half of the derivative."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(VECTOR.inputs()[1])
            self.b = self.a
            self.solve = fi.custom_inverse(self.g, self.f, event_dim=1)

        def g(self, x):
            return vector_g(x, self.a, self.b)

        def f(self, y):
            return vector_f(y, self.a, self.b)

    module, c = Tied(), VECTOR.inputs()[1].requires_grad_()
    got = torch.autograd.grad(total((module.solve(X),)), module.a, create_graph=True)
    want = torch.autograd.grad(total((VECTOR.exact(X, c, c),)), c, create_graph=True)
    assert_close(got, want)
    assert_close(torch.autograd.grad(total(got), module.a), torch.autograd.grad(total(want), c))


def test_tied_weights_under_functional_call():
    class Tied(Layer):
        def __init__(self, exact=False):
            super().__init__(exact=exact)
            self.head = self.box.inner[0]

    results = []
    for exact in (False, True):
        module = Tied(exact)
        state = {k: t.detach() for k, t in module.named_parameters()}
        results.append(grad(lambda s, m=module: functional_call(m, s, (X,)))(state))
    assert_close(*results)


def test_buffers():
    """A live buffer gets its derivative like a parameter."""

    class Buffered(nn.Module):
        def __init__(self, solve=None):
            super().__init__()
            self.register_buffer("c", VECTOR.inputs()[1])
            g, f, shift = vector_g, vector_f, VECTOR.inputs()[2]
            rule = fi.custom_inverse(lambda x: g(x, self.c, shift), lambda y: f(y, self.c, shift), event_dim=1)
            self.solve = (lambda x: solve(x, self.c, shift)) if solve else rule

        def forward(self, x):
            return total((self.solve(x),))

    def transform(module):
        return hessian(lambda c, x: functional_call(module, {"c": c}, (x,)), (0, 1))(module.c.clone(), X)

    assert_close(transform(Buffered()), transform(Buffered(VECTOR.exact)))


def test_module_inside_a_container_of_modules():
    boxes = nn.ModuleDict({"one": nn.ModuleList([Parameters(VECTOR.inputs()[1:])])})
    theta = boxes["one"][0].inner
    solve = fi.custom_inverse(
        lambda x: vector_g(x, *boxes["one"][0].inner), lambda y: vector_f(y, *boxes["one"][0].inner), event_dim=1
    )
    got = torch.autograd.grad(total((solve(X),)), list(theta))
    assert_close(got, torch.autograd.grad(total((VECTOR.exact(X, *theta),)), list(theta)))


def test_training_step_moves_the_parameters_the_same_way():
    modules = Layer(), Layer(exact=True)
    for module in modules:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for seed in range(5):
            optimizer.zero_grad()
            module(VECTOR.inputs(seed)[0]).square().backward()
            optimizer.step()
    assert_close(*({k: p.detach() for k, p in m.named_parameters()} for m in modules))


def test_deepcopied_module_has_its_own_parameters():
    module = Layer()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    twin(X).backward()
    want = Layer(exact=True)
    want.load_state_dict(twin.state_dict())
    want(X).backward()
    assert_close({k: p.grad for k, p in twin.named_parameters()}, {k: p.grad for k, p in want.named_parameters()})
    assert all(p.grad is None for p in module.parameters())
