"""torch.func.jvp in every direction."""

import pytest
import torch
from helpers import assert_close_to_exact, every_batchable_problem, every_problem, tangents, with_batch
from torch.func import jvp, vmap


@every_problem
def test_all_inputs(problem):
    assert_close_to_exact(lambda h, inputs: jvp(h, inputs, tangents(inputs)), problem)


@every_problem
def test_each_input_alone(problem):
    """The other tangents are None inside."""

    def transform(h, inputs):
        moved = []
        for i, t in enumerate(inputs):
            alone = lambda s, i=i: h(*inputs[:i], s, *inputs[i + 1 :])  # noqa: E731
            moved.append(jvp(alone, (t,), (tangents(inputs)[i],)))
        return moved

    assert_close_to_exact(transform, problem)


@every_batchable_problem
@pytest.mark.parametrize("batch", [(1,), (2, 3)])
def test_leading_batch_dims(problem, batch):
    inputs = with_batch(problem, *batch)
    assert_close_to_exact(lambda h, inputs: jvp(h, inputs, tangents(inputs)), problem, inputs)


@every_problem
def test_vmap_jvp(problem):
    def transform(h, inputs):
        return vmap(lambda *inputs: jvp(h, inputs, tangents(inputs)))(*inputs)

    assert_close_to_exact(transform, problem, problem.stacked(3))


@every_problem
def test_jvp_vmap(problem):
    def transform(h, inputs):
        return jvp(vmap(h), inputs, tangents(inputs))

    assert_close_to_exact(transform, problem, problem.stacked(3))


@every_problem
def test_many_tangents_at_one_point(problem):
    def transform(h, inputs):
        basis = [torch.stack([t, t.cos(), -t]) for t in tangents(inputs)]
        return vmap(lambda *v: jvp(h, inputs, v)[1])(*basis)

    assert_close_to_exact(transform, problem)
