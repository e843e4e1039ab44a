"""torch.autograd.forward_ad: dual numbers without torch.func, alone and together with backward."""

import torch
from helpers import (
    assert_close_to_exact,
    every_batchable_problem,
    every_problem,
    live,
    loss,
    tangents,
    total,
    with_batch,
)
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import vmap


def forward(h, inputs):
    with dual_level():
        duals = map(make_dual, inputs, tangents(inputs))
        return [tuple(unpack_dual(t)) for t in h(*duals)]


def reverse_over_forward(h, inputs):
    inputs = live(inputs)
    with dual_level():
        duals = map(make_dual, inputs, tangents(inputs))
        moved = [unpack_dual(t).tangent for t in h(*duals)]
        return torch.autograd.grad(total(moved), inputs)


def forward_over_reverse(h, inputs, create_graph=True):
    inputs = live(inputs)
    with dual_level():
        duals = tuple(map(make_dual, inputs, tangents(inputs)))
        grads = torch.autograd.grad(loss(h)(*duals), inputs, create_graph=create_graph)
        return [tuple(unpack_dual(g)) for g in grads]


@every_problem
def test_forward(problem):
    assert_close_to_exact(forward, problem)


@every_batchable_problem
def test_leading_batch_dims(problem):
    assert_close_to_exact(forward, problem, with_batch(problem, 2, 2))


@every_problem
def test_one_dual_among_plain_inputs(problem):
    def transform(h, inputs):
        with dual_level():
            first, *rest = inputs
            return [tuple(unpack_dual(t)) for t in h(make_dual(first, tangents(inputs)[0]), *rest)]

    assert_close_to_exact(transform, problem)


@every_problem
def test_reverse_over_forward(problem):
    assert_close_to_exact(reverse_over_forward, problem)


@every_problem
def test_forward_over_reverse(problem):
    assert_close_to_exact(forward_over_reverse, problem)


@every_problem
def test_forward_over_reverse_without_a_graph_of_it(problem):
    """Tangents flow through a backward pass whether or not it is recorded."""
    assert_close_to_exact(lambda h, inputs: forward_over_reverse(h, inputs, create_graph=False), problem)


@every_problem
def test_vmap_inside(problem):
    assert_close_to_exact(lambda h, inputs: forward(vmap(h), inputs), problem, problem.stacked(3))
