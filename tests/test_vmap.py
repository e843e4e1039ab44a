"""Values under vmap: over any input, along any dim, nested, in chunks."""

import math

import numpy as np
import pytest
import torch
from helpers import MAPPED, assert_close, assert_close_to_exact, every_problem, mapped, some_problems
from torch.func import jacfwd, jacrev, vmap

import functorch_inverse as fi

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


# --- several places with batch dims of their own --------------------------------------------------

PLACES = {
    "jacobian": lambda dim: fi.custom_jacobian(
        lambda x, c: x.asinh() / c,
        {
            0: lambda x, c: (1 / (1 + x * x).sqrt() / c, -x.asinh() / c**2),
            1: lambda x, c: ((1 / (1 + x * x).sqrt() / c).diag_embed(), (-x.asinh() / c**2).diag_embed()),
        }[dim],
        argnums=(0, 1),
        event_dim=dim,
    ),
    "differences": lambda dim: fi.finite_difference(lambda x, c: x.asinh() / c, argnums=(0, 1), event_dim=dim),
    "numpy": lambda dim: fi.finite_difference(
        lambda x, c: np.arcsinh(x.numpy()) / c.numpy(), argnums=(0, 1), event_dim=dim
    ),
}


@pytest.mark.parametrize("rule", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(("dim", "shapes"), [(0, ((2,), ())), (0, ((5,), ())), (0, ((2, 3), (3,))), (1, ((2, 3), (3,)))])
def test_places_with_other_batch_dims(rule, dim, shapes):
    """A new dim in front must not meet a batch dim of another place."""
    h, exact = rule(dim), lambda x, c: x.asinh() / c
    x, c = (torch.linspace(0.4, 1.9, 4 * math.prod(s), dtype=torch.float64).reshape(4, *s) for s in shapes)
    one = tuple(t[0].clone().requires_grad_() for t in (x, c))
    assert_close(*[torch.autograd.grad(f(*one).sin().sum(), one) for f in (h, exact)], 1e-7)
    for dims in ((0, 0), (None, 0), (0, None)):
        inputs = [t if d == 0 else t[0] for t, d in zip((x, c), dims, strict=True)]
        for transform in (lambda f: f, lambda f: jacrev(f, (0, 1)), lambda f: jacfwd(f, (0, 1))):
            got, want = (vmap(transform(f), dims)(*inputs) for f in (h, exact))
            assert_close(got, want, 1e-7)
    twice = vmap(vmap(h, (0, None)), (0, 0))
    assert_close(twice(torch.stack([x] * 3, 1), c), vmap(vmap(exact, (0, None)))(torch.stack([x] * 3, 1), c), 1e-7)
