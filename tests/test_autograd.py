"""Plain autograd: backward to any order, from any output to any input."""

import pytest
import torch
from helpers import (
    assert_close,
    assert_close_to_exact,
    every_batchable_problem,
    every_problem,
    live,
    loss,
    some_problems,
    tangents,
    total,
    with_batch,
)
from problems import VECTOR
from torch.func import jvp

import functorch_inverse as fi


def first(h, inputs):
    inputs = live(inputs)
    return torch.autograd.grad(loss(h)(*inputs), inputs)


def second(h, inputs):
    inputs = live(inputs)
    grads = torch.autograd.grad(loss(h)(*inputs), inputs, create_graph=True)
    return torch.autograd.grad(total(grads), inputs)


def third(h, inputs):
    inputs = live(inputs)
    grads = torch.autograd.grad(loss(h)(*inputs), inputs, create_graph=True)
    grads = torch.autograd.grad(total(grads), inputs, create_graph=True)
    return torch.autograd.grad(total(grads), inputs)


ORDERS = pytest.mark.parametrize("transform", [first, second, third])


@every_problem
@ORDERS
def test_every_order(problem, transform):
    assert_close_to_exact(transform, problem)


@every_batchable_problem
@ORDERS
@pytest.mark.parametrize("batch", [(1,), (4,), (2, 3)])
def test_leading_batch_dims(problem, transform, batch):
    assert_close_to_exact(transform, problem, with_batch(problem, *batch))


@some_problems
def test_backward_accumulates(problem):
    def transform(h, inputs):
        inputs = live(inputs)
        for _ in range(2):
            loss(h)(*inputs).backward()
        return tuple(t.grad for t in inputs)

    assert_close_to_exact(transform, problem)


@some_problems
def test_retained_graph_serves_many_cotangents(problem):
    def transform(h, inputs):
        inputs = live(inputs)
        y = h(*inputs)
        return [torch.autograd.grad(y, inputs, [k * torch.ones_like(t) for t in y], retain_graph=True) for k in (1, 2)]

    assert_close_to_exact(transform, problem)


@every_problem
def test_each_input_alone(problem):
    def transform(h, inputs):
        grads = []
        for i, t in enumerate(inputs):
            (t,) = live((t,))
            grads += torch.autograd.grad(loss(h)(*inputs[:i], t, *inputs[i + 1 :]), (t,))
        return grads

    assert_close_to_exact(transform, problem)


@every_problem
def test_each_output_alone(problem):
    """The other outputs' cotangents are None."""

    def transform(h, inputs):
        inputs = live(inputs)
        y = h(*inputs)
        return [torch.autograd.grad(total([t]), inputs, retain_graph=True, allow_unused=True) for t in y]

    want, got = transform(problem.closed_form(), problem.inputs()), transform(problem.custom(), problem.inputs())
    # In closed form an output may not depend on an input at all; here it does, with the derivative zero.
    want = [
        [torch.zeros_like(a) if b is None else b for a, b in zip(g, w, strict=True)] for g, w in zip(got, want, strict=True)
    ]
    assert_close([list(g) for g in got], want)


@some_problems
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_cotangents_of_any_strides(problem, layout):
    def transform(h, inputs):
        inputs = live(inputs)
        y = h(*inputs)
        ones = [t.new_ones(()).expand(t.shape) for t in y]
        v = ones if layout == "expanded" else [torch.sin(t.mT.contiguous()).mT if t.ndim > 1 else t for t in y]
        return torch.autograd.grad(y, inputs, v)

    assert_close_to_exact(transform, problem, with_batch(problem, 2) if problem.batchable else None)


@every_batchable_problem
def test_is_grads_batched(problem):
    """autograd's own vmap does not ask the Function's vmap staticmethod."""

    def transform(h, inputs):
        inputs = live(inputs)
        y = h(*inputs)
        v = [torch.linspace(-1, 1, 3 * t.numel(), dtype=t.dtype, device=t.device).reshape(3, *t.shape) for t in y]
        return torch.autograd.grad(y, inputs, v, is_grads_batched=True)

    assert_close_to_exact(transform, problem, with_batch(problem, 2))


@some_problems
def test_is_grads_batched_of_a_derivative(problem):
    def transform(h, inputs):
        inputs = live(inputs)
        grads = torch.autograd.grad(loss(h)(*inputs), inputs, create_graph=True)
        basis = torch.eye(grads[0].numel(), dtype=grads[0].dtype, device=grads[0].device)
        return torch.autograd.grad(grads[0], inputs, basis.unflatten(-1, grads[0].shape), is_grads_batched=True)

    assert_close_to_exact(transform, problem)


def _batched(outputs, inputs, **options):
    """One pass for a few cotangents of each output, and those of a loss of what comes back."""
    v = [torch.stack([t.detach().cos(), t.detach().sin() + 1]) for t in outputs]
    found = torch.autograd.grad(outputs, inputs, v, is_grads_batched=True, create_graph=True, **options)
    return found, torch.autograd.grad(total(found), inputs)


@every_problem
@pytest.mark.parametrize("first", ["values", "grad", "jvp", "grad(jvp)", "grad(grad)"])
def test_is_grads_batched_with_create_graph(problem, first):
    """Its tensors hide their graphs: the derivative of A would be lost on the way, without a word."""

    def slope(outputs, inputs):
        return torch.autograd.grad(total(outputs), inputs, create_graph=True)

    def transform(h, inputs):
        inputs = live(inputs)
        outputs = jvp(h, inputs, tangents(inputs))[1] if "jvp" in first else h(*inputs)
        for _ in range(first.count("grad")):
            outputs = slope(outputs, inputs)
        return _batched(outputs, inputs)

    assert_close_to_exact(transform, problem)


SOLVERS = [fi.LU(), fi.LU(chunk_size=2), fi.LeastSquares(), fi.GMRES(), fi.NormalCG(), fi.Banded(2, 2)]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_is_grads_batched_with_every_kind_of_solver(solver):
    def transform(h, inputs):
        inputs = live(inputs)
        outputs = torch.autograd.grad(jvp(h, inputs, tangents(inputs))[1][0].sin().sum(), inputs, create_graph=True)
        return _batched(outputs, inputs)

    assert_close_to_exact(transform, VECTOR, function=VECTOR.root(solver))


@some_problems
def test_leaves_other_graphs_alone(problem):
    """A detour: the inputs are themselves results of differentiable operations."""

    def transform(h, inputs):
        inputs = live(inputs)
        y = h(*(t * t + 0.5 for t in inputs))
        return torch.autograd.grad(total(h(*(t * t + 0.1 for t in inputs))) * total(y), inputs)

    assert_close_to_exact(transform, problem)


def test_is_grads_batched_inside_of_itself():
    """There is no torch.vmap to hand it to from inside another; it says so."""
    h = fi.custom_inverse(torch.asinh, torch.sinh, event_dim=1)
    x = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64, requires_grad=True)
    y = h(x)

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, v):
            return torch.autograd.grad(y, x, torch.stack([v, 2 * v]), is_grads_batched=True, retain_graph=True)[0].sum(0)

    z = Nested.apply(x)
    with pytest.raises(NotImplementedError, match=r"inside of itself. Use torch\.func\.jacrev"):
        torch.autograd.grad(z, x, torch.eye(3, dtype=x.dtype), is_grads_batched=True)
