"""The shared assertion itself: planted wrong derivatives must not get through it."""

from dataclasses import replace

import pytest
import torch
from helpers import all_of, assert_close, assert_close_to_exact, live, loss
from problems import ELEMENTWISE, MATRIX, TREE, VECTOR, W, constant, vector_exact, vector_f
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

# A loop over the stacks: what the wrong derivative does not reach, it cannot show.
REVERSE = {
    "grad": lambda h, inputs: grad(loss(h), all_of(inputs))(*inputs),
    "jacrev": lambda h, inputs: jacrev(h, all_of(inputs))(*inputs),
    "autograd": lambda h, inputs: torch.autograd.grad(loss(h)(*(live_ := live(inputs))), live_),
    "vmap_grad": lambda h, inputs: vmap(grad(loss(h), all_of(inputs)))(*(t[None] for t in inputs)),
}
FORWARD = {
    "jvp": lambda h, inputs: jvp(h, inputs, tuple(t.cos() for t in inputs)),
    "jacfwd": lambda h, inputs: jacfwd(h, all_of(inputs))(*inputs),
    "hessian": lambda h, inputs: hessian(loss(h), all_of(inputs))(*inputs),
}


def mistake(name):
    """The rule of the vector problem by hand, with one mistake."""

    class Rule(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, c, b):
            return vector_exact(x, c, b)

        @staticmethod
        def setup_context(ctx, inputs, output):
            _, c, _ = inputs
            ctx.save_for_backward(output, c)
            ctx.save_for_forward(output, c)

        @staticmethod
        def jacobian(y, c):
            A = constant(W, y) * (c * torch.cosh(c * y))
            return torch.linalg.inv(A * 1.001 if name == "a thousandth" else A)

        @staticmethod
        def theta(y, c, J):
            """dy = J (dx - C dc - db)."""
            C = constant(W, y) * (y * torch.cosh(c * y))
            return -J @ C, -J

        @staticmethod
        def backward(ctx, v):
            y, c = ctx.saved_tensors
            J = Rule.jacobian(y, c)
            to_c, to_b = Rule.theta(y, c, J)
            if name == "transpose":
                J = J.T
            gx, gc, gb = J.T @ v, to_c.T @ v, to_b.T @ v
            if name == "sign":
                gx = -gx
            if name == "missing theta":
                gc = torch.zeros_like(gc)
            if name == "sign of theta":
                gb = -gb
            return gx, gc, gb

        @staticmethod
        def jvp(ctx, dx, dc, db):
            y, c = ctx.saved_tensors
            J = Rule.jacobian(y, c)
            to_c, to_b = Rule.theta(y, c, J)
            if name == "transpose":
                J = J.T
            if name == "sign":
                J = -J
            if name == "missing theta":
                to_c = torch.zeros_like(to_c)
            if name == "sign of theta":
                to_b = -to_b
            return J @ dx + to_c @ dc + to_b @ db

    return lambda *inputs: (Rule.apply(*inputs),)


MISTAKES = ["transpose", "sign", "missing theta", "sign of theta", "a thousandth"]


@pytest.mark.parametrize("transform", [t for t in REVERSE if t != "vmap_grad"])
def test_the_rule_by_hand_is_right_without_a_mistake(transform):
    assert_close_to_exact(REVERSE[transform], VECTOR, function=mistake(None))


@pytest.mark.parametrize("transform", ["jvp", "jacfwd"])
def test_the_forward_rule_by_hand_is_right_without_a_mistake(transform):
    assert_close_to_exact(FORWARD[transform], VECTOR, function=mistake(None))


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("transform", {**REVERSE, **FORWARD})
def test_a_wrong_rule_is_caught(name, transform):
    with pytest.raises(AssertionError, match="not close"):
        assert_close_to_exact({**REVERSE, **FORWARD}[transform], VECTOR, function=mistake(name))


@pytest.mark.parametrize("problem", [ELEMENTWISE, VECTOR, MATRIX], ids=repr)
@pytest.mark.parametrize("transform", {**REVERSE, **FORWARD})
def test_an_f_wrong_by_a_thousandth_is_caught(problem, transform):
    wrong = replace(problem, f=lambda y, *theta: 1.001 * problem.f(y, *theta))
    with pytest.raises(AssertionError, match="not close"):
        assert_close_to_exact({**REVERSE, **FORWARD}[transform], problem, function=wrong.custom())


@pytest.mark.parametrize("transform", {**REVERSE, **FORWARD})
def test_an_f_wrong_in_one_leaf_is_caught(transform):
    def f(y, c):
        x = TREE.f(y, c)
        return {"a": x["a"], "b": x["b"] * (1 + 1e-6 * y["a"].sum())}

    with pytest.raises(AssertionError, match="not close"):
        assert_close_to_exact({**REVERSE, **FORWARD}[transform], TREE, function=replace(TREE, f=f).custom())


@pytest.mark.parametrize("order", [2, 3])
def test_a_rule_that_is_right_only_to_the_first_order_is_caught(order):
    """backward without a graph of its own: the usual once-differentiable Function."""

    def detached(*inputs):
        first_order = mistake(None)
        (y,) = first_order(*inputs)
        return (_FirstOrder.apply(y, *inputs),)

    def transform(h, inputs):
        derivative = loss(h)
        for _ in range(order):
            derivative = jacrev(derivative)
        return derivative(*inputs)

    with pytest.raises(AssertionError, match="not close"):
        assert_close_to_exact(transform, VECTOR, function=detached)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(y, x, c, b):
        return y.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, v):
        _, x, c, b = (t.detach() for t in ctx.saved_tensors)
        gx, gc, gb = jacrev(lambda *i: (vector_exact(*i) * v.detach()).sum(), (0, 1, 2))(x, c, b)
        return None, gx, gc, gb


@pytest.mark.parametrize("problem", [VECTOR, TREE], ids=repr)
def test_a_silent_zero_is_caught(problem):
    """theta detached inside f: what every other library does with closures."""
    blind = replace(problem, f=lambda y, *theta: problem.f(y, *(t.detach() for t in theta)))
    with pytest.raises(AssertionError, match="not close"):
        assert_close_to_exact(REVERSE["grad"], problem, function=blind.custom())


ONE = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        ([ONE], [ONE + 2e-9]),
        ([ONE, ONE], [ONE]),
        ((ONE,), [ONE]),
        ([ONE[:1]], [ONE]),
        ([ONE[None]], [ONE]),
        ([ONE.float()], [ONE]),
        ([ONE * torch.nan], [ONE]),
        ([ONE * 0], [ONE * 0]),
        ([ONE * 1e-12, ONE], [ONE * 2e-12, ONE]),
        ([ONE * 1e-8, ONE], [ONE * 0, ONE]),
    ],
    ids=["error", "leaves", "structure", "shape", "dims", "dtype", "nan", "only zeros", "small leaf", "zero leaf"],
)
def test_assert_close_is_strict(got, want):
    with pytest.raises(AssertionError):
        assert_close(got, want)


def test_assert_close_accepts_what_is_close():
    assert_close([ONE, ONE * 5e-10], [ONE + 5e-10, ONE * 0])


def test_problems_are_what_they_promise():
    """A is non-symmetric and depends on y: else a missing transpose or a first order would not show."""
    x, c, b = VECTOR.inputs()
    y = vector_exact(x, c, b)
    A, other = (jacrev(vector_f)(t, c, b) for t in (y, 2 * y))
    assert not torch.allclose(A, A.T)
    assert not torch.allclose(A, other)
