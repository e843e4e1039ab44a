"""Saved-tensor hooks, save_on_cpu and both checkpoints: the forward must not run torch.func's reverse mode."""

import pytest
import torch
from helpers import assert_close_to_exact, every_problem, live, loss, some_problems, total
from torch.autograd import graph
from torch.utils.checkpoint import checkpoint

HOOKS = {
    "saved_tensors_hooks": lambda: graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "save_on_cpu": graph.save_on_cpu,
}
every_hook = pytest.mark.parametrize("hook", HOOKS)


def order(number, y, inputs):
    for _ in range(number - 1):
        y = total(torch.autograd.grad(y, inputs, create_graph=True))
    return torch.autograd.grad(y, inputs)


@every_problem
@every_hook
@pytest.mark.parametrize("number", [1, 2, 3])
def test_forward_inside(problem, hook, number):
    def transform(h, inputs):
        inputs = live(inputs)
        with HOOKS[hook]():
            y = loss(h)(*inputs)
        return order(number, y, inputs)

    assert_close_to_exact(transform, problem)


@every_problem
@every_hook
def test_forward_and_backward_inside(problem, hook):
    def transform(h, inputs):
        inputs = live(inputs)
        with HOOKS[hook]():
            return order(1, loss(h)(*inputs), inputs)

    assert_close_to_exact(transform, problem)


@some_problems
@every_hook
def test_second_derivative_inside(problem, hook):
    """Plain autograd differentiates the backward pass; torch.func's reverse mode would not support hooks."""

    def transform(h, inputs):
        inputs = live(inputs)
        with HOOKS[hook]():
            return order(2, loss(h)(*inputs), inputs)

    assert_close_to_exact(transform, problem)


@every_problem
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(problem, use_reentrant):
    def transform(h, inputs):
        inputs = live(inputs)
        y = checkpoint(loss(h), *inputs, use_reentrant=use_reentrant)
        return torch.autograd.grad(y, inputs) if not use_reentrant else _backward(y, inputs)

    assert_close_to_exact(transform, problem)


def _backward(y, inputs):
    """The reentrant checkpoint knows only backward()."""
    y.backward()
    return tuple(t.grad for t in inputs)


@some_problems
def test_checkpoint_and_higher_orders(problem):
    def transform(h, inputs):
        inputs = live(inputs)
        return order(2, checkpoint(loss(h), *inputs, use_reentrant=False), inputs)

    assert_close_to_exact(transform, problem)


@some_problems
def test_hooks_on_the_tensors_themselves(problem):
    def transform(h, inputs):
        inputs = live(inputs)
        middle = [t.clone() for t in inputs]
        for t in middle:
            t.register_hook(lambda g: g.sin())
        return torch.autograd.grad(loss(h)(*middle), inputs)

    assert_close_to_exact(transform, problem)
