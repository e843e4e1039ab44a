"""torch.func.grad, vjp and value_and_grad."""

import pytest
from helpers import (
    all_of,
    assert_close_to_exact,
    every_batchable_problem,
    every_problem,
    loss,
    some_problems,
    tangents,
    total,
    with_batch,
)
from torch.func import grad, grad_and_value, vjp


def gradient(h, inputs):
    return grad(loss(h), all_of(inputs))(*inputs)


def of_gradient(h, inputs):
    return grad(lambda *inputs: total(gradient(h, inputs)), all_of(inputs))(*inputs)


def pulled_back(h, inputs):
    y, pull = vjp(h, *inputs)
    return pull(tangents(y))


TRANSFORMS = pytest.mark.parametrize("transform", [gradient, of_gradient, pulled_back])


@every_problem
@TRANSFORMS
def test_one_sample(problem, transform):
    assert_close_to_exact(transform, problem)


@every_batchable_problem
@TRANSFORMS
def test_leading_batch_dims(problem, transform):
    assert_close_to_exact(transform, problem, with_batch(problem, 2, 2))


@some_problems
def test_value_and_gradient(problem):
    assert_close_to_exact(lambda h, inputs: grad_and_value(loss(h), all_of(inputs))(*inputs), problem)


@some_problems
def test_has_aux(problem):
    def transform(h, inputs):
        return grad(lambda *inputs: (loss(h)(*inputs), h(*inputs)), all_of(inputs), has_aux=True)(*inputs)

    assert_close_to_exact(transform, problem)


@every_problem
def test_each_argnum_alone(problem):
    def transform(h, inputs):
        return [grad(loss(h), i)(*inputs) for i in range(len(inputs))]

    assert_close_to_exact(transform, problem)
