"""vmap over, and under, second derivatives."""

import pytest
from helpers import MAPPED, all_of, assert_close_to_exact, every_problem, loss, mapped, total
from torch.func import grad, hessian, jacfwd, jacrev, vmap

MODES = [(jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacrev), (jacfwd, jacfwd)]


@every_problem
@pytest.mark.parametrize("over", MAPPED)
def test_vmap_hessian(problem, over):
    dims, inputs = mapped(problem, over, 3)
    assert_close_to_exact(lambda h, inputs: vmap(hessian(loss(h), all_of(inputs)), dims)(*inputs), problem, inputs)


@every_problem
@pytest.mark.parametrize(("outer", "inner"), MODES, ids=lambda t: t.__name__)
def test_vmap_of_every_nesting(problem, outer, inner):
    def transform(h, inputs):
        return vmap(outer(inner(h, all_of(inputs)), all_of(inputs)))(*inputs)

    assert_close_to_exact(transform, problem, problem.stacked(2))


@every_problem
@pytest.mark.parametrize(("outer", "inner"), MODES, ids=lambda t: t.__name__)
def test_vmap_between(problem, outer, inner):
    def transform(h, inputs):
        return outer(vmap(inner(h, all_of(inputs))), all_of(inputs))(*inputs)

    assert_close_to_exact(transform, problem, problem.stacked(2))


@every_problem
def test_nested_vmap_hessian(problem):
    assert_close_to_exact(lambda h, inputs: vmap(vmap(hessian(loss(h))))(*inputs), problem, problem.stacked(2, 2))


@every_problem
def test_hessian_vmap(problem):
    def transform(h, inputs):
        return hessian(lambda *inputs: total(vmap(h)(*inputs)), all_of(inputs))(*inputs)

    assert_close_to_exact(transform, problem, problem.stacked(2))


@every_problem
@pytest.mark.parametrize("over", MAPPED)
def test_grad_vmap_grad(problem, over):
    dims, inputs = mapped(problem, over, 3)

    def transform(h, inputs):
        inner = vmap(grad(loss(h), all_of(inputs)), dims)
        return grad(lambda *inputs: total(inner(*inputs)), all_of(inputs))(*inputs)

    assert_close_to_exact(transform, problem, inputs)
