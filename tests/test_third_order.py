"""Third derivatives by every nesting of reverse and forward mode, and one of the fourth."""

import itertools

import pytest
from helpers import all_of, assert_close_to_exact, every_problem, loss, some_problems, tangents
from torch.func import grad, jacfwd, jacrev, jvp, vmap

MODES = {"rev": jacrev, "fwd": jacfwd}


@every_problem
@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=3)), ids="_".join)
def test_of_a_loss(problem, modes):
    def transform(h, inputs):
        derivative = loss(h)
        for mode in reversed(modes):
            derivative = MODES[mode](derivative, all_of(inputs))
        return derivative(*inputs)

    assert_close_to_exact(transform, problem)


@some_problems
@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=3)), ids="_".join)
def test_vmapped(problem, modes):
    def transform(h, inputs):
        derivative = loss(h)
        for mode in reversed(modes):
            derivative = MODES[mode](derivative)
        return vmap(derivative)(*inputs)

    assert_close_to_exact(transform, problem, problem.stacked(2))


@some_problems
@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=4)), ids="_".join)
def test_fourth_order(problem, modes):
    """One direction each time, so that it stays small."""

    def along(mode, function):
        if mode == "fwd":
            return lambda *inputs: jvp(function, inputs, tangents(inputs))[1]

        def reverse(*inputs):
            grads = grad(function, all_of(inputs))(*inputs)
            return sum((g * t).sum() for g, t in zip(grads, tangents(inputs), strict=True))

        return reverse

    def transform(h, inputs):
        derivative = loss(h)
        for mode in reversed(modes):
            derivative = along(mode, derivative)
        return derivative(*inputs)

    assert_close_to_exact(transform, problem)
