"""torch.func.jacrev."""

import pytest
import torch
from helpers import all_of, assert_close_to_exact, every_batchable_problem, every_problem, some_problems, with_batch
from torch.func import jacrev


@every_problem
def test_one_sample(problem):
    assert_close_to_exact(lambda h, inputs: jacrev(h, all_of(inputs))(*inputs), problem)


@every_batchable_problem
@pytest.mark.parametrize("batch", [(1,), (2, 2)])
def test_leading_batch_dims(problem, batch):
    inputs = with_batch(problem, *batch)
    assert_close_to_exact(lambda h, inputs: jacrev(h, all_of(inputs))(*inputs), problem, inputs)


@some_problems
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks(problem, chunk_size):
    assert_close_to_exact(lambda h, inputs: jacrev(h, all_of(inputs), chunk_size=chunk_size)(*inputs), problem)


@some_problems
def test_without_grad_mode(problem):
    """torch.func differentiates inside no_grad: it switches grad mode on for what it tracks."""

    def transform(h, inputs):
        with torch.no_grad():
            return jacrev(h, all_of(inputs))(*inputs)

    assert_close_to_exact(transform, problem)
