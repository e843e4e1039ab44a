"""vmap over Jacobians by jacfwd: over x, over theta, over both; torch's own solve is wrong here (torch_facts 1.4)."""

import pytest
from helpers import MAPPED, all_of, assert_close_to_exact, every_batchable_problem, every_problem, mapped
from torch.func import jacfwd, vmap


@every_problem
@pytest.mark.parametrize("over", MAPPED)
@pytest.mark.parametrize("dim", [0, -1])
def test_in_dims(problem, over, dim):
    dims, inputs = mapped(problem, over, 3, dim)
    assert_close_to_exact(lambda h, inputs: vmap(jacfwd(h, all_of(inputs)), dims)(*inputs), problem, inputs)


@every_problem
def test_nested_vmap(problem):
    def transform(h, inputs):
        return vmap(vmap(jacfwd(h, all_of(inputs))))(*inputs)

    assert_close_to_exact(transform, problem, problem.stacked(2, 3))


@every_problem
def test_of_vmap(problem):
    assert_close_to_exact(lambda h, inputs: jacfwd(vmap(h), all_of(inputs))(*inputs), problem, problem.stacked(2))


@every_batchable_problem
def test_over_leading_batch_dims(problem):
    """vmap outside, a batch dim of x's own inside."""

    def transform(h, inputs):
        inner = (1,) * problem.x_count + (0,) * (len(inputs) - problem.x_count)
        return vmap(jacfwd(h, all_of(inputs)), inner)(*inputs)

    n = problem.x_count
    inputs = (*problem.stacked(2, 3)[:n], *problem.stacked(3)[n:])
    assert_close_to_exact(transform, problem, inputs)
