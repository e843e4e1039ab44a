"""Single and half precision: the dtype of the input comes out, with an error of the size of its rounding."""

import numpy as np
import pytest
import torch
from helpers import all_of, assert_close, every_problem, live, loss, some_problems, total
from problems import ELEMENTWISE, MATRIX, TREE, VECTOR, WHOLE, W
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functorch_inverse as fi

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
half_problems = pytest.mark.parametrize("problem", [ELEMENTWISE, VECTOR, WHOLE, MATRIX, TREE], ids=repr)


def rounded(problem, dtype, *batch):
    """Inputs that both precisions hold exactly."""
    inputs = problem.stacked(*batch) if batch else problem.inputs()
    return tuple(t.to(dtype) for t in inputs)


def assert_precise(transform, problem, dtype, *batch, steps=64):
    """Against the closed form in float64, at the same inputs; the dtype is kept."""
    inputs = rounded(problem, dtype, *batch)
    got = transform(problem.custom(), inputs)
    want = transform(problem.closed_form(), tuple(t.double() for t in inputs))
    leaves, truth = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)
    assert {t.dtype for t in leaves} == {dtype}
    assert_close([t.double() for t in leaves], truth, steps * EPS[dtype])


# --- float32 ---------------------------------------------------------------------------------------

TRANSFORMS = {
    "values": lambda h, inputs: h(*inputs),
    "autograd": lambda h, inputs: torch.autograd.grad(loss(h)(*(live_ := live(inputs))), live_),
    "jacrev": lambda h, inputs: jacrev(h, all_of(inputs))(*inputs),
    "jacfwd": lambda h, inputs: jacfwd(h, all_of(inputs))(*inputs),
    "hessian": lambda h, inputs: hessian(loss(h), all_of(inputs))(*inputs),
    "jacfwd_jacfwd": lambda h, inputs: jacfwd(jacfwd(h))(*inputs),
    "third": lambda h, inputs: jacfwd(jacrev(jacfwd(loss(h))))(*inputs),
}


@every_problem
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_float32(problem, transform):
    assert_precise(TRANSFORMS[transform], problem, torch.float32, steps=512)


@every_problem
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian"])
def test_float32_under_vmap(problem, transform):
    def mapped(h, inputs):
        return vmap(lambda *inputs: TRANSFORMS[transform](h, inputs))(*inputs)

    assert_precise(mapped, problem, torch.float32, 3, steps=512)


@pytest.mark.parametrize("transform", [jacfwd, jacrev])
def test_float32_stays_float32_with_python_numbers(transform):
    """A Python number times a 0-d dual gives a float64 tangent in torch's own forward mode (torch_facts 1.15)."""

    def f(y):
        first = y[0] + 0.5 * y[0] * y[1]
        return torch.stack([first, y[1]]) @ torch.eye(2)

    g = lambda x: torch.stack([x[0] / (1 + 0.5 * x[1]), x[1]])  # noqa: E731
    x = torch.tensor([0.7, 0.4])
    got, want = transform(fi.custom_inverse(g, f))(x), transform(g)(x.double())
    assert got.dtype == torch.float32
    assert_close([got.double()], [want], 16 * EPS[torch.float32])


@some_problems
@pytest.mark.parametrize("inside", ["forward", "forward and backward"])
def test_float32_under_autocast(problem, inside):
    """Neither f nor the solve runs in bfloat16."""

    def transform(h, inputs):
        inputs, kind = live(inputs), inputs[0].device.type
        with torch.autocast(kind, dtype=torch.bfloat16):
            y = loss(h)(*inputs)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=inside != "forward"):
            first = torch.autograd.grad(y, inputs, create_graph=True)
        return first, torch.autograd.grad(total(first), inputs)

    inputs = rounded(problem, torch.float32)
    got = transform(problem.custom(), inputs)
    want = transform(problem.closed_form(), tuple(t.double() for t in inputs))
    double = torch.utils._pytree.tree_map(lambda t: t.double(), got)
    assert_close(double, want, 512 * EPS[torch.float32])


def test_float32_parameters_under_autocast():
    """A Linear layer in f would run in bfloat16; its derivative does not."""
    layer = torch.nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(W)
    g = lambda x: np.arcsinh(np.linalg.solve(layer.weight.numpy(), (x - layer.bias).numpy()))  # noqa: E731
    h = fi.custom_inverse(g, lambda y: layer(torch.sinh(y)))
    x = VECTOR.inputs()[0].float().requires_grad_()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = h(x)
        assert y.dtype == torch.float32
        got = torch.autograd.grad(y.sin().sum(), (x, layer.weight, layer.bias))
    weight, bias, x = (t.detach().double().requires_grad_() for t in (layer.weight, layer.bias, x))
    y = torch.asinh(torch.linalg.inv(weight) @ (x - bias))
    want = torch.autograd.grad(y.sin().sum(), (x, weight, bias))
    assert_close([t.double() for t in got], list(want), 64 * EPS[torch.float32])


# --- half precision --------------------------------------------------------------------------------


@half_problems
@halves
@pytest.mark.parametrize("transform", ["values", "autograd", "jacrev", "jacfwd", "hessian"])
def test_half(problem, dtype, transform):
    assert_precise(TRANSFORMS[transform], problem, dtype, steps=16)


@half_problems
@halves
def test_half_under_vmap(problem, dtype):
    def mapped(h, inputs):
        return vmap(jacrev(h, all_of(inputs)))(*inputs)

    assert_precise(mapped, problem, dtype, 3, steps=16)


@halves
def test_half_jacobian_is_solved_in_float32(dtype):
    """J has condition number 1e3: solved in half precision nothing would be left of it."""
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-7]])
    g = lambda x: torch.linalg.solve(matrix.double(), x.double())  # noqa: E731
    x = torch.tensor([1.0, 1.0], dtype=dtype)
    got = jacrev(fi.custom_inverse(g, lambda y: matrix.to(y.dtype) @ y))(x)
    assert got.dtype == dtype
    assert_close([got.double()], [torch.linalg.inv(matrix.double())], 2 * EPS[dtype])


@halves
def test_half_parameters(dtype):
    """A module in half precision inside f: it runs widened, its gradient comes back in its own dtype."""
    layer = torch.nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(W)
    layer.to(dtype)
    weight, bias = (p.detach().double().requires_grad_() for p in layer.parameters())
    g = lambda x: np.arcsinh(np.linalg.solve(weight.detach().numpy(), (x.double() - bias.detach()).numpy()))  # noqa: E731
    h = fi.custom_inverse(g, lambda y: layer(torch.sinh(y)))
    x = VECTOR.inputs()[0].to(dtype).requires_grad_()
    got = torch.autograd.grad(h(x).sum(), (x, layer.weight, layer.bias))
    assert {t.dtype for t in got} == {dtype}
    exact = x.detach().double().requires_grad_()
    y = torch.asinh(torch.linalg.inv(weight) @ (exact - bias))
    assert_close([t.double() for t in got], list(torch.autograd.grad(y.sum(), (exact, weight, bias))), 16 * EPS[dtype])


# --- mixed -----------------------------------------------------------------------------------------


def test_theta_of_another_precision_gets_a_gradient_of_its_own():
    x, c, b = VECTOR.inputs()
    inputs = (x.float().requires_grad_(), c.clone().requires_grad_(), b.clone().requires_grad_())
    y = fi.custom_inverse(VECTOR.g, lambda y, c, b: VECTOR.f(y.double(), c, b).float(), event_dim=1)(*inputs)
    assert y.dtype == torch.float32
    got = torch.autograd.grad(y.sin().sum(), inputs)
    assert [t.dtype for t in got] == [torch.float32, torch.float64, torch.float64]
    exact = live(tuple(t.detach().double() for t in inputs))
    want = torch.autograd.grad(VECTOR.exact(*exact).sin().sum(), exact)
    assert_close([t.double() for t in got], list(want), 64 * EPS[torch.float32])


def test_numpy_results_take_the_dtype_of_x():
    """g computes in float64; y is float32 because x is."""
    x = VECTOR.inputs()[0].float()
    y = fi.custom_inverse(lambda x: np.arcsinh(x.numpy().astype(np.float64)), torch.sinh, event_dim=0)(x)
    assert y.dtype == torch.float32
    assert grad(lambda x: fi.custom_inverse(torch.asinh, torch.sinh, event_dim=0)(x).sum())(x).dtype == torch.float32
