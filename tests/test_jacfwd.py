"""torch.func.jacfwd."""

import pytest
import torch
from helpers import all_of, assert_close_to_exact, every_batchable_problem, every_problem, some_problems, with_batch
from torch.func import jacfwd


@every_problem
def test_one_sample(problem):
    assert_close_to_exact(lambda h, inputs: jacfwd(h, all_of(inputs))(*inputs), problem)


@every_batchable_problem
@pytest.mark.parametrize("batch", [(1,), (2, 2)])
def test_leading_batch_dims(problem, batch):
    inputs = with_batch(problem, *batch)
    assert_close_to_exact(lambda h, inputs: jacfwd(h, all_of(inputs))(*inputs), problem, inputs)


@some_problems
@pytest.mark.parametrize("randomness", ["error", "different", "same"])
def test_randomness_is_handed_on(problem, randomness):
    assert_close_to_exact(lambda h, inputs: jacfwd(h, all_of(inputs), randomness=randomness)(*inputs), problem)


@some_problems
def test_without_grad_mode(problem):
    def transform(h, inputs):
        with torch.no_grad():
            return jacfwd(h, all_of(inputs))(*inputs)

    assert_close_to_exact(transform, problem)
