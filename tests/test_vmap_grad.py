"""vmap over gradients (per-sample gradients) and gradients of vmap."""

import pytest
import torch
from helpers import MAPPED, all_of, assert_close_to_exact, every_problem, live, loss, mapped, total
from torch.func import grad, vmap

over = pytest.mark.parametrize("over", MAPPED)


@every_problem
@over
@pytest.mark.parametrize("dim", [0, -1])
def test_vmap_grad(problem, over, dim):
    dims, inputs = mapped(problem, over, 3, dim)
    assert_close_to_exact(lambda h, inputs: vmap(grad(loss(h), all_of(inputs)), dims)(*inputs), problem, inputs)


@every_problem
@over
def test_grad_vmap(problem, over):
    dims, inputs = mapped(problem, over, 3)

    def transform(h, inputs):
        return grad(lambda *inputs: total(vmap(h, dims)(*inputs)), all_of(inputs))(*inputs)

    assert_close_to_exact(transform, problem, inputs)


@every_problem
@over
def test_backward_through_vmap(problem, over):
    dims, inputs = mapped(problem, over, 3)

    def transform(h, inputs):
        inputs = live(inputs)
        grads = torch.autograd.grad(total(vmap(h, dims)(*inputs)), inputs, create_graph=True)
        return grads, torch.autograd.grad(total(grads), inputs)

    assert_close_to_exact(transform, problem, inputs)


@every_problem
def test_backward_through_vmap_grad(problem):
    def transform(h, inputs):
        inputs = live(inputs)
        return torch.autograd.grad(total(vmap(grad(loss(h), all_of(inputs)))(*inputs)), inputs)

    assert_close_to_exact(transform, problem, problem.stacked(2))
