"""torch.func.linearize, which traces the derivative into a graph and replays it."""

import pytest
import torch
from helpers import assert_close, assert_close_to_exact, every_batchable_problem, every_problem, tangents, with_batch
from torch.func import grad, linearize, vmap

import functorch_inverse as fi


def transform(h, inputs):
    y, push = linearize(h, *inputs)
    return y, push(*tangents(inputs)), push(*(t.cos() for t in tangents(inputs)))


@every_problem
def test_one_sample(problem):
    assert_close_to_exact(transform, problem)


@every_batchable_problem
def test_leading_batch_dims(problem):
    assert_close_to_exact(transform, problem, with_batch(problem, 3))


@every_problem
def test_of_vmap(problem):
    assert_close_to_exact(lambda h, inputs: transform(vmap(h), inputs), problem, problem.stacked(2))


@every_problem
@pytest.mark.parametrize("count", [1, 4])
def test_replayed_for_many_tangents(problem, count):
    def many(h, inputs):
        _, push = linearize(h, *inputs)
        return vmap(push)(*(torch.stack([t * k for k in range(1, count + 1)]) for t in tangents(inputs)))

    assert_close_to_exact(many, problem)


def test_of_grad():
    """Of jacrev torch 2.13 makes a constant, whatever the function is."""
    h, x = fi.custom_inverse(torch.asinh, torch.sinh, event_dim=1), torch.tensor([0.3, -0.7], dtype=torch.float64)
    _, push = linearize(grad(lambda x: h(x).sum()), x)
    assert_close(push(x.cos()), -x * (1 + x**2) ** -1.5 * x.cos())
