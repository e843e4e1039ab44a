"""Values under vmap: over any input, along any dim, nested, in chunks."""

import pytest
import torch
from helpers import MAPPED, assert_close, assert_close_to_exact, every_problem, mapped, some_problems

over = pytest.mark.parametrize("over", MAPPED)


@every_problem
@over
@pytest.mark.parametrize("dim", [0, -1])
def test_in_dims(problem, over, dim):
    dims, inputs = mapped(problem, over, 3, dim)
    assert_close_to_exact(lambda h, inputs: torch.vmap(h, dims)(*inputs), problem, inputs)


@some_problems
@pytest.mark.parametrize("out_dim", [0, -1])
def test_out_dims(problem, out_dim):
    _, inputs = mapped(problem, "both", 3)
    assert_close_to_exact(lambda h, inputs: torch.vmap(h, out_dims=out_dim)(*inputs), problem, inputs)


@every_problem
@pytest.mark.parametrize(("outer", "inner"), [("x", "theta"), ("theta", "x"), ("both", "x"), ("both", "both")])
def test_nested(problem, outer, inner):
    inputs = problem.stacked(2, 3)
    n = problem.x_count

    def dims(over):
        return tuple(0 if over == "both" or (i < n) == (over == "x") else None for i in range(len(inputs)))

    first, second = dims(outer), dims(inner)
    inputs = tuple(
        t[(slice(None) if a == 0 else 0, slice(None) if b == 0 else 0)] for t, a, b in zip(inputs, first, second, strict=True)
    )
    assert_close_to_exact(lambda h, inputs: torch.vmap(torch.vmap(h, second), first)(*inputs), problem, inputs)


@every_problem
def test_three_levels(problem):
    inputs = problem.stacked(2, 1, 2)
    assert_close_to_exact(lambda h, inputs: torch.vmap(torch.vmap(torch.vmap(h)))(*inputs), problem, inputs)


@some_problems
@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks(problem, chunk_size):
    inputs = problem.stacked(5)
    assert_close_to_exact(lambda h, inputs: torch.vmap(h, chunk_size=chunk_size)(*inputs), problem, inputs)


@some_problems
@pytest.mark.parametrize("randomness", ["error", "different", "same"])
def test_randomness_is_handed_on(problem, randomness):
    inputs = problem.stacked(2)

    def transform(h, inputs):
        return torch.vmap(torch.func.jacrev(h), randomness=randomness)(*inputs)

    assert_close_to_exact(transform, problem, inputs)


@every_problem
def test_equals_a_loop(problem):
    inputs, h = problem.stacked(3), problem.custom()
    loop = [torch.stack(ys) for ys in zip(*(h(*row) for row in zip(*inputs, strict=True)), strict=True)]
    assert_close(list(torch.vmap(h)(*inputs)), loop)
