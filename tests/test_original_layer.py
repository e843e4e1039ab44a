"""implicit_inverse_layer and its two classes: batch first, one Jacobian a sample."""

import numpy as np
import pytest
import torch
from fresh import run_fresh
from helpers import assert_close, total
from problems import P_INVERSE, W_INVERSE, P, W, array
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from functorch_inverse import NoDerivativeError, ResidualError, SingularJacobianError, StructureError
from functorch_inverse.layers import ImplicitInverseLayer, ImplicitInverseLayerAuto, implicit_inverse_layer

SIZES = {"vectors": (4, 3), "one": (1, 3), "numbers": (4, 1), "matrices": (2, 2, 3), "vector": (3,), "number": ()}


def points(kind):
    size = SIZES[kind]
    return torch.linspace(-0.9, 1.1, int(np.prod(size)), dtype=torch.float64).add(0.2).reshape(size)


def mix(p, w, y):
    """Three numbers of a sample by w, and the rows of a matrix by p."""
    y = p.to(y.dtype) @ y if y.ndim > 2 else y
    return y @ w.to(y.dtype).T if y.shape[-1:] == (3,) else y


def inverse_func(x):
    return np.arcsinh(mix(P_INVERSE, W_INVERSE, torch.as_tensor(array(x))).numpy())


def forward_func(y):
    return mix(P, W, torch.sinh(y))


def exact(x):
    return torch.asinh(mix(P_INVERSE, W_INVERSE, x))


def jacobian(y):
    """df/dy of each sample, (batch, *event, *event), written by hand."""
    cosh = torch.cosh(y)
    if y.shape[-1:] != (3,):
        return cosh if y.ndim < 2 else cosh[..., None]
    w = W.to(y.dtype)
    if y.ndim == 3:
        return torch.einsum("ik,jl,bkl->bijkl", P, w, cosh)
    return w * cosh[..., None, :]


def by_function(x):
    return implicit_inverse_layer(x, inverse_func, forward_func=forward_func)


def by_jacobian(x):
    return implicit_inverse_layer(x, inverse_func, forward_jacobian=jacobian)


def by_tensor(x):
    # Known beforehand for the x of the test.
    known = jacobian(exact(points(KIND_OF[x.shape])))
    return implicit_inverse_layer(x, inverse_func, forward_jacobian=known)


KIND_OF = {torch.Size(size): kind for kind, size in SIZES.items()}
every_kind = pytest.mark.parametrize("kind", SIZES)
every_way = pytest.mark.parametrize("layer", [by_function, by_jacobian, by_tensor], ids=lambda w: w.__name__)
differentiable_ways = pytest.mark.parametrize("layer", [by_function, by_jacobian], ids=lambda w: w.__name__)


def loss(h):
    return lambda x: total((h(x),))


def backward(h, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(h)(x), x)


def double_backward(h, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(h)(x), x, create_graph=True)
    return torch.autograd.grad(total((first,)), x)


FIRST = {
    "backward": backward,
    "grad": lambda h, x: grad(loss(h))(x),
    "vjp": lambda h, x: vjp(h, x)[1](x.cos()),
    "jvp": lambda h, x: jvp(h, (x,), (x.cos(),)),
    "jacrev": lambda h, x: jacrev(h)(x),
    "jacfwd": lambda h, x: jacfwd(h)(x),
    "vmap": lambda h, x: jacrev(vmap(h))(torch.stack([x, x])),
    "vmap(grad)": lambda h, x: vmap(grad(loss(h)))(torch.stack([x, x])),
    "vmap(jacrev)": lambda h, x: vmap(jacrev(h))(torch.stack([x, x])),
    "vmap(jacfwd)": lambda h, x: vmap(jacfwd(h))(torch.stack([x, x])),
}
SECOND = {
    "double backward": double_backward,
    "hessian": lambda h, x: hessian(loss(h))(x),
    "jacrev(jacrev)": lambda h, x: jacrev(jacrev(h))(x),
    "jacfwd(jacfwd)": lambda h, x: jacfwd(jacfwd(h))(x),
    "jacfwd(jacrev)": lambda h, x: jacfwd(jacrev(h))(x),
    "jacrev(jacfwd)": lambda h, x: jacrev(jacfwd(h))(x),
    "vmap(hessian)": lambda h, x: vmap(hessian(loss(h)))(torch.stack([x, x])),
}
first_order = pytest.mark.parametrize("stack", FIRST.values(), ids=FIRST)
second_order = pytest.mark.parametrize("stack", SECOND.values(), ids=SECOND)


@every_kind
@every_way
@first_order
def test_first_order(kind, layer, stack):
    x = points(kind)
    assert_close(stack(layer, x), stack(exact, x))


@every_kind
@differentiable_ways
@second_order
def test_second_order(kind, layer, stack):
    x = points(kind)
    assert_close(stack(layer, x), stack(exact, x))


@pytest.mark.parametrize("kind", ["vectors", "vector", "number"])
@differentiable_ways
def test_third_order(kind, layer):
    x = points(kind)
    assert_close(jacfwd(jacrev(grad(loss(layer))))(x), jacfwd(jacrev(grad(loss(exact))))(x))


@every_kind
@second_order
def test_the_second_derivative_of_a_constant_jacobian(kind, stack):
    with pytest.raises(NoDerivativeError, match="function of y, or forward_func"):
        stack(by_tensor, points(kind))


@differentiable_ways
def test_distinct_samples_under_vmap(layer):
    xs = torch.stack([points("vectors"), points("vectors") * 0.5, -points("vectors")], 1)
    got = vmap(hessian(loss(layer)), in_dims=1, out_dims=2)(xs)
    assert_close(got, vmap(hessian(loss(exact)), in_dims=1, out_dims=2)(xs))


@every_way
@pytest.mark.parametrize("name", ["backward", "jacrev", "jacfwd"])
def test_the_black_box_is_called_once(layer, name, monkeypatch):
    calls = []
    monkeypatch.setitem(globals(), "inverse_func", lambda x: calls.append(x.shape) or COUNTED(x))
    FIRST[name](layer, points("vectors"))
    assert calls == [(4, 3)]


COUNTED = inverse_func


def test_a_black_box_that_insists_on_its_rank():
    def g(x):
        assert x.ndim == 2
        return inverse_func(x)

    xs = torch.stack([points("vectors"), -points("vectors")])
    layer = vmap(grad(loss(lambda x: implicit_inverse_layer(x, g, forward_func=forward_func))))
    assert_close(layer(xs), vmap(grad(loss(exact)))(xs))


@pytest.mark.parametrize("shape", [(3, 3), (3,), (3, 1, 1)])
def test_jacobians_of_a_vector(shape):
    x = points("vector")

    def g(x):
        return np.arcsinh(array(x))

    slope = (1 + x**2).sqrt()
    given = torch.diag(slope) if shape == (3, 3) else slope.reshape(shape)
    got = jacrev(lambda x: implicit_inverse_layer(x, g, forward_jacobian=given))(x)
    assert_close(got, torch.diag(1 / slope))


def test_an_empty_batch():
    x = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(by_function(x).sum(), x)
    assert gradient.shape == (0, 3)


@every_way
def test_precision_is_kept(layer):
    x = points("vectors").float()
    y = layer(x)
    assert y.dtype == torch.float32
    (gradient,) = backward(layer, x)
    assert_close(gradient, backward(exact, points("vectors"))[0].float(), tolerance=1e-5)


@every_way
def test_the_classes_are_the_function(layer):
    x = points("vectors")
    known = jacobian(exact(x))
    last = {
        by_function: lambda x: ImplicitInverseLayerAuto.apply(x, inverse_func, forward_func),
        by_jacobian: lambda x: ImplicitInverseLayer.apply(x, inverse_func, jacobian),
        by_tensor: lambda x: ImplicitInverseLayer.apply(x, inverse_func, known),
    }[layer]
    assert_close(last(x), exact(x))
    assert_close(backward(last, x), backward(exact, x))


# --- f made of transforms --------------------------------------------------------------------------


def potential(y):
    return torch.cosh(y).sum()


GRADIENTS = {
    "grad": grad(potential),
    "vjp": lambda y: vjp(potential, y)[1](torch.ones((), dtype=y.dtype))[0],
    "jacrev": jacrev(potential),
    "jacfwd": jacfwd(potential),
    "vmap(grad)": vmap(grad(potential)),
    "vmap(jacrev)": vmap(jacrev(potential)),
}


@pytest.mark.parametrize("name", ["backward", "jacfwd", "hessian", "vmap(grad)", "vmap(hessian)"])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_a_function_that_is_a_derivative(gradient, name):
    """f = sinh, written as the derivative of cosh."""

    def layer(x):
        return implicit_inverse_layer(x, lambda x: np.arcsinh(x.numpy()), forward_func=gradient)

    stack, x = (FIRST | SECOND)[name], points("vectors")
    assert_close(stack(layer, x), stack(torch.asinh, x))


# --- modules --------------------------------------------------------------------------------------


class Wave(nn.Module):
    """f and g with parameters; g reads them through NumPy."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(W.clone())
        self.scale = nn.Parameter(torch.tensor([1.0, 1.3, 0.7], dtype=torch.float64))

    def f(self, y):
        return torch.sinh(self.scale * y) @ self.mix.T

    def g(self, x):
        return np.arcsinh(array(x) @ np.linalg.inv(self.mix.numpy()).T) / self.scale.numpy()

    def forward(self, x):
        return implicit_inverse_layer(x, self.g, forward_func=self.f)


class ExactWave(Wave):
    def forward(self, x):
        return torch.asinh(x @ torch.linalg.inv(self.mix).T) / self.scale


def test_parameters_receive_gradients():
    x = points("vectors")
    waves = (Wave(), ExactWave())
    for wave in waves:
        total((wave(x),)).backward()
    assert_close(*([p.grad for p in wave.parameters()] for wave in waves))


def test_parameters_under_transforms():
    x = points("vectors")
    wave, true = Wave(), ExactWave()
    theta = {name: p.detach() for name, p in wave.named_parameters()}

    def of(module):
        gradient = grad(lambda theta, x: total((functional_call(module, theta, (x,)),)), argnums=(0, 1))
        return vmap(gradient, in_dims=(None, 0))(theta, x.unflatten(0, (2, 2)))

    assert_close(of(wave), of(true))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"forward_func": forward_func, "forward_jacobian": jacobian}], ids=len)
def test_exactly_one_keyword(given):
    arrived = "both" if given else "neither"
    with pytest.raises(ValueError, match=f"exactly one of `forward_func` and `forward_jacobian` is needed, {arrived}"):
        implicit_inverse_layer(points("vectors"), inverse_func, **given)


def test_check_needs_a_function():
    with pytest.raises(ValueError, match="pass forward_func"):
        implicit_inverse_layer(points("vectors"), inverse_func, forward_jacobian=jacobian, check=True)


def test_check():
    x = points("vectors")
    x[2] *= 1.5

    def wrong(y):
        return torch.where(y[..., :1] == exact(x)[2, 0], 1.01, 1.0) * forward_func(y)

    assert_close(implicit_inverse_layer(x, inverse_func, forward_func=forward_func, check=True), exact(x))
    assert_close(implicit_inverse_layer(x, inverse_func, forward_func=wrong, check=0.02), exact(x))
    with pytest.raises(ResidualError, match=r"1 of 4 samples; worst is sample 2"):
        implicit_inverse_layer(x, inverse_func, forward_func=wrong, check=True)


@pytest.mark.parametrize("known", ["function", "jacobian", "tensor"])
def test_singular_samples_are_named(known):
    x = torch.tensor([[0.3, 0.2], [0.0, 0.5], [0.4, -0.1]], dtype=torch.float64, requires_grad=True)

    def slope(y):
        return torch.diag_embed(3 * y**2)

    evidence = {
        "function": {"forward_func": lambda y: y**3},
        "jacobian": {"forward_jacobian": slope},
        "tensor": {"forward_jacobian": slope(x.detach().sign() * x.detach().abs() ** (1 / 3))},
    }[known]
    y = implicit_inverse_layer(x, lambda x: np.cbrt(x.numpy()), **evidence)
    with pytest.raises(SingularJacobianError, match=r"1 of 3 samples .*: 1\)"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (3, 4, 3), (2, 3, 3), (5, 4, 3, 3), (5, 1, 3, 3)])
def test_jacobians_of_the_wrong_shape(shape):
    x = points("vectors").requires_grad_()
    known = torch.eye(shape[-2], shape[-1], dtype=x.dtype).expand(shape)
    with pytest.raises(StructureError, match=r"`jacobian` returned"):
        implicit_inverse_layer(x, inverse_func, forward_jacobian=known).sum().backward()


@pytest.mark.parametrize("shape", [(3, 3), (1, 3, 3), (4, 3, 3)])
def test_one_jacobian_may_serve_all_samples(shape):
    def g(x):
        return x.numpy() @ W_INVERSE.T.numpy()

    x = points("vectors")
    got = jacrev(lambda x: implicit_inverse_layer(x, g, forward_jacobian=W.expand(shape)))(x)
    assert_close(got, jacrev(lambda x: x @ W_INVERSE.T)(x))


def test_a_jacobian_that_closes_over_something_live():
    c = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = points("vectors").requires_grad_()
    with pytest.raises(NoDerivativeError):
        implicit_inverse_layer(x, inverse_func, forward_jacobian=lambda y: c * jacobian(y)).sum().backward()


# --- torch.compile ---------------------------------------------------------------------------------

COMPILED = ("backward", "vmap(grad)", "jacfwd", "hessian")


def compiled_in_turn(*names):
    for name in names:
        torch._dynamo.reset()
        compiled(name)


def compiled(name):
    """In a process of its own; Dynamo has to trace the black box, so there it is the closed form."""

    def by_traced_function(x):
        return implicit_inverse_layer(x, exact, forward_func=forward_func)

    def by_traced_jacobian(x):
        return implicit_inverse_layer(x, exact, forward_jacobian=jacobian)

    stack = (FIRST | SECOND)[name]
    for layer in (by_traced_function, by_traced_jacobian):
        x = points("vectors")
        if name == "backward":
            got = backward(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
        else:
            got = torch.compile(lambda x: stack(layer, x), fullgraph=True, backend="aot_eager")(x)  # noqa: B023
        assert_close(got, stack(exact, x))


def test_compile():
    run_fresh(compiled_in_turn, *COMPILED)


def compiled_tensor():
    x, known = points("vectors"), jacobian(exact(points("vectors")))

    def layer(x, known):
        return implicit_inverse_layer(x, exact, forward_jacobian=known)

    one = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(backward(lambda x: one(x, known), x), backward(exact, x))
    two = torch.compile(hessian(lambda x: layer(x, known).sum()), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="second derivative needs to know"):
        two(x)


def test_compile_a_constant_jacobian():
    run_fresh(compiled_tensor)
