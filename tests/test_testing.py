"""check_inverse and check_derivatives: silent where all is right, loud where a mistake is planted."""

import numpy as np
import pytest
import torch
from problems import PROBLEMS, W_INVERSE, Draw, W
from torch.autograd import Function

from functorch_inverse import DerivativeError, ResidualError, custom_inverse
from functorch_inverse.testing import check_derivatives, check_inverse


def ramp(*shape):
    return torch.linspace(-0.8, 1.1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def g(x, c):
    return np.arcsinh(x.numpy() @ W_INVERSE.numpy().T) / c.numpy()


def f(y, c):
    return torch.sinh(c * y) @ W.T


C = torch.tensor([1.0, 1.3, 0.8], dtype=torch.float64)


def with_derivative(value, slope):
    """The values of one expression with the derivatives of another one."""
    return value.detach() + slope - slope.detach()


# --- all is right ------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.way == "args"], ids=repr)
def test_every_problem(problem):
    x, theta = problem.draw(Draw(0))
    check_inverse(problem.g, problem.f, x, *theta, **problem.options)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 2, 3)])
def test_batches(shape):
    check_inverse(g, f, ramp(*shape), C, event_dim=1)


def test_has_aux():
    check_inverse(lambda x, c: (g(x, c), {"steps": 3}), f, ramp(4, 3), C, event_dim=1, has_aux=True)


def test_single_precision():
    check_inverse(g, lambda y, c: torch.sinh(c * y) @ W.float().T, ramp(4, 3).float(), C.float(), event_dim=1)


def test_a_noisy_black_box_may_ask_for_less():
    noise = np.random.default_rng(0)

    def noisy(x, c):
        return g(x, c) + 1e-10 * noise.standard_normal(x.shape)

    with pytest.raises(DerivativeError):
        check_inverse(noisy, f, ramp(4, 3), C, event_dim=1, rtol=1e-9)
    check_inverse(noisy, f, ramp(4, 3), C, event_dim=1, rtol=1e-5, step=1e-2)


def test_right_where_the_value_is_zero():
    check_inverse(lambda x: np.arcsinh(x.numpy()), torch.sinh, torch.zeros(3, dtype=torch.float64), event_dim=0)


def test_an_empty_batch():
    check_inverse(g, f, ramp(0, 3), C, event_dim=1)


def test_numbers_of_every_size():
    def root(x):
        assert (x > 0).all(), "outside the domain"
        return np.cbrt(x.numpy())

    check_inverse(root, lambda y: y**3, torch.logspace(-8, 8, 9, dtype=torch.float64), event_dim=0)


def test_calls():
    calls = []
    check_inverse(lambda x, c: calls.append(x.shape) or g(x, c), f, ramp(4, 3), C, event_dim=1)
    assert calls == [(4, 3)] * 7


@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders(order):
    check_derivatives(custom_inverse(g, f, event_dim=1), ramp(2, 3), C, order=order)


def test_trees():
    x = {"a": ramp(3), "n": torch.tensor(2), "b": (ramp(2), None)}
    check_derivatives(lambda x, power: [x["a"] ** x["n"], {"c": x["b"][0] ** power}], x, 3)


# --- planted mistakes --------------------------------------------------------------------------------


def scaled(y, c):
    return 1.001 * f(y, c)


def shifted(y, c):
    return f(y, c) + 1e-6


def negated(y, c):
    return -f(y, c)


def nan_in_one_sample(y, c):
    x = f(y, c)
    return torch.where(x == x[..., -1:, :1].detach(), torch.nan, x)


@pytest.mark.parametrize("wrong", [scaled, shifted, negated, nan_in_one_sample], ids=lambda w: w.__name__)
def test_a_wrong_inverse(wrong):
    with pytest.raises(ResidualError, match=r"f\(g\(x\)\) is not x"):
        check_inverse(g, wrong, ramp(4, 3), C, event_dim=1)


def test_the_worst_sample_is_named():
    def wrong(y, c):
        factor = torch.tensor([[1.0], [1.0], [1.01], [1.001]], dtype=y.dtype)
        return factor * f(y, c)

    with pytest.raises(ResidualError, match=r"in 2 of 4 samples; worst is sample 2 "):
        check_inverse(g, wrong, ramp(4, 3), C, event_dim=1)


def slope_off_by_a_permille(y, c):
    return with_derivative(f(y, c), 1.001 * f(y, c))


def slope_of_the_wrong_sign(y, c):
    return with_derivative(f(y, c), -f(y, c))


def slope_off_in_one_column(y, c):
    factor = torch.tensor([1.0, 1.0, 1.001], dtype=y.dtype)
    return with_derivative(f(y, c), f(y * factor, c))


def slope_transposed(y, c):
    return with_derivative(f(y, c), torch.sinh(c * y) @ W)


def no_slope_to_theta(y, c):
    return f(y, c.detach())


def slope_to_theta_off_by_a_permille(y, c):
    return f(y, with_derivative(c, 1.001 * c))


def slope_to_theta_of_the_wrong_sign(y, c):
    return f(y, with_derivative(c, -c))


SLOPES = [
    slope_off_by_a_permille,
    slope_of_the_wrong_sign,
    slope_off_in_one_column,
    slope_transposed,
    no_slope_to_theta,
    slope_to_theta_off_by_a_permille,
    slope_to_theta_of_the_wrong_sign,
]


@pytest.mark.parametrize("event_dim", [1, None])
@pytest.mark.parametrize("wrong", SLOPES, ids=lambda w: w.__name__)
def test_a_wrong_derivative_of_the_inverse(wrong, event_dim):
    with pytest.raises(DerivativeError, match="forward mode in output 0 differs from finite differences"):
        check_inverse(g, wrong, ramp(4, 3), C, event_dim=event_dim)


# x - mean(x) / 10 = sinh(y), so that x = sinh(y) + mean(sinh(y)) / 9: each sample depends on all.
def coupled_g(x):
    return np.arcsinh(x.numpy() - x.numpy().mean(0, keepdims=True) / 10)


def coupled_f(y):
    return torch.sinh(y) + torch.sinh(y).mean(0, keepdim=True) / 9


@pytest.mark.parametrize("event_dim", [0, 1])
def test_coupled_samples(event_dim):
    check_inverse(coupled_g, coupled_f, ramp(4, 3))
    with pytest.raises(DerivativeError, match="event_dim calls independent"):
        check_inverse(coupled_g, coupled_f, ramp(4, 3), event_dim=event_dim)


def test_coupled_numbers():
    """Numbers of one vector that event_dim=0 would call independent."""
    with pytest.raises(DerivativeError, match="event_dim calls independent"):
        check_inverse(g, f, ramp(4, 3), C, event_dim=0)


# --- wrong derivatives of any function ---------------------------------------------------------------


def sine(forward_factor=1.0, backward_factor=1.0):
    """sin with derivatives that are wrong by a factor, where x is below zero."""

    class Sine(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return torch.sin(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, v):
            (x,) = ctx.saved_tensors
            return v * torch.cos(x) * torch.where(x < 0, backward_factor, 1.0)

        @staticmethod
        def jvp(ctx, t):
            (x,) = ctx.saved_tensors
            return t * torch.cos(x) * torch.where(x < 0, forward_factor, 1.0)

    return Sine.apply


X = torch.tensor([0.4, -0.5, 1.1], dtype=torch.float64)


def test_a_right_function():
    check_derivatives(sine(), X)


@pytest.mark.parametrize("factor", [1.001, 0.999, 0.0, -1.0])
@pytest.mark.parametrize(
    ("mode", "match"), [("forward_factor", "forward mode in output 0"), ("backward_factor", "reverse mode")]
)
def test_wrong_in_one_mode(mode, match, factor):
    with pytest.raises(DerivativeError, match=match):
        check_derivatives(sine(**{mode: factor}), X)


def test_wrong_in_both_modes():
    with pytest.raises(DerivativeError, match="forward mode in output 0"):
        check_derivatives(sine(1.001, 1.001), X)


def test_the_output_is_named():
    with pytest.raises(DerivativeError, match="output 1 "):
        check_derivatives(lambda x: {"a": x**2, "b": sine(1.001)(x)}, X)


def test_one_of_a_thousand():
    x = torch.linspace(0.1, 1.0, 1000, dtype=torch.float64)
    x[700] = -0.5
    for wrong in (sine(forward_factor=1.001), sine(backward_factor=1.001)):
        with pytest.raises(DerivativeError):
            check_derivatives(wrong, x)


def test_a_wrong_backward_of_a_small_output():
    with pytest.raises(DerivativeError, match="reverse mode"):
        check_derivatives(lambda x: (1e3 * x, 1e-4 * sine(backward_factor=-1.0)(x)), X)


def test_a_wrong_backward_where_the_value_is_zero():
    wrong = sine(backward_factor=-1.0)
    with pytest.raises(DerivativeError, match="reverse mode"):
        check_derivatives(lambda x: (x, wrong(x) - torch.sin(X)), X)


def test_a_second_derivative_is_wrong():
    """Right at first order; the derivative of the derivative is lost."""

    class Cube(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, v):
            return 3 * v * ctx.saved_tensors[0].detach() ** 2

        @staticmethod
        def jvp(ctx, t):
            return 3 * t * ctx.saved_tensors[0].detach() ** 2

    check_derivatives(Cube.apply, X)
    with pytest.raises(DerivativeError):
        check_derivatives(Cube.apply, X, order=2)


def test_a_constant_inverse_jacobian_is_caught_at_second_order():
    def frozen(y, c):
        a = torch.func.vmap(torch.func.jacrev(f), (0, None))(y.detach(), c.detach())
        return with_derivative(f(y, c), (a @ (y - y.detach())[..., None])[..., 0])

    h = custom_inverse(g, frozen, event_dim=1)
    check_derivatives(lambda x: h(x, C), ramp(2, 3))
    with pytest.raises(DerivativeError):
        check_derivatives(lambda x: h(x, C), ramp(2, 3), order=2)
