"""Nested forward mode, which torch itself gets wrong through a Function (torch_facts 1.1)."""

from helpers import all_of, assert_close_to_exact, every_batchable_problem, every_problem, tangents, with_batch
from torch.func import jacfwd, jvp, vmap


def twice(h, inputs):
    return jvp(lambda *inputs: jvp(h, inputs, tangents(inputs))[1], inputs, tangents(inputs))


@every_problem
def test_jvp_jvp(problem):
    assert_close_to_exact(twice, problem)


@every_problem
def test_jacfwd_jacfwd(problem):
    def transform(h, inputs):
        return jacfwd(jacfwd(h, all_of(inputs)), all_of(inputs))(*inputs)

    assert_close_to_exact(transform, problem)


@every_batchable_problem
def test_leading_batch_dims(problem):
    assert_close_to_exact(twice, problem, with_batch(problem, 2, 2))


@every_problem
def test_vmap_jvp_jvp(problem):
    assert_close_to_exact(lambda h, inputs: vmap(lambda *i: twice(h, i))(*inputs), problem, problem.stacked(3))


@every_problem
def test_jvp_vmap_jvp(problem):
    def transform(h, inputs):
        inner = vmap(lambda *i: jvp(h, i, tangents(i))[1])
        return jvp(inner, inputs, tangents(inputs))

    assert_close_to_exact(transform, problem, problem.stacked(3))
