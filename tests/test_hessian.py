"""Second derivatives: forward over reverse, and reverse over either."""

import pytest
from helpers import (
    all_of,
    assert_close_to_exact,
    every_batchable_problem,
    every_problem,
    loss,
    tangents,
    with_batch,
)
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp

NESTINGS = [(jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacrev)]
nestings = pytest.mark.parametrize(("outer", "inner"), NESTINGS, ids=lambda t: t.__name__)


@every_problem
def test_of_a_loss(problem):
    assert_close_to_exact(lambda h, inputs: hessian(loss(h), all_of(inputs))(*inputs), problem)


@every_problem
@nestings
def test_of_all_outputs(problem, outer, inner):
    def transform(h, inputs):
        return outer(inner(h, all_of(inputs)), all_of(inputs))(*inputs)

    assert_close_to_exact(transform, problem)


@every_batchable_problem
def test_leading_batch_dims(problem):
    inputs = with_batch(problem, 3)
    assert_close_to_exact(lambda h, inputs: hessian(loss(h), all_of(inputs))(*inputs), problem, inputs)


@every_problem
def test_hessian_vector_products(problem):
    def transform(h, inputs):
        gradient = lambda *inputs: grad(loss(h), all_of(inputs))(*inputs)  # noqa: E731
        forward = jvp(gradient, inputs, tangents(inputs))
        reverse = vjp(gradient, *inputs)[1](tangents(inputs))
        return forward, reverse

    assert_close_to_exact(transform, problem)
