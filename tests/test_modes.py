"""no_grad, inference_mode, autocast, anomaly mode and deterministic mode."""

import pytest
import torch
from helpers import (
    RELATIVE_ERROR,
    assert_close,
    assert_close_to_exact,
    every_problem,
    inference_tensors_in_transforms,
    live,
    loss,
    some_problems,
    total,
)
from torch.func import hessian, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import functorch_inverse as fi


@every_problem
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_without_grad(problem, mode):
    def transform(h, inputs):
        with mode():
            y = h(*live(inputs))
        assert not any(t.requires_grad for t in y)
        return y

    assert_close_to_exact(transform, problem)


@every_problem
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_vmap_without_grad(problem, mode):
    def transform(h, inputs):
        with mode():
            return torch.vmap(h)(*inputs)

    assert_close_to_exact(transform, problem, problem.stacked(2))


@some_problems
def test_inference_tensors_as_inputs(problem):
    """An inference tensor can be no input of autograd; its values can, and other inputs can be live."""
    with torch.inference_mode():
        made = tuple(t + 0 for t in problem.inputs())

    def transform(h, inputs):
        return h(*made)

    assert_close_to_exact(transform, problem)


def pulled(function, x):
    return vjp(function, x)[1](x.cos())[0]


NESTED = {
    "vjp(vjp)": lambda h, x: pulled(lambda x: pulled(h, x), x),
    "vjp(vjp(vjp))": lambda h, x: pulled(lambda x: pulled(lambda x: pulled(h, x), x), x),
    "vjp(jvp)": lambda h, x: pulled(lambda x: jvp(h, (x,), (x,))[1], x),
    "jvp(vjp)": lambda h, x: jvp(lambda x: pulled(h, x), (x,), (x,)),
    "vmap(jacrev(jacrev))": lambda h, x: vmap(jacrev(jacrev(h)))(x[None]),
    "hessian": lambda h, x: hessian(lambda x: h(x).sum())(x),
}
every_nesting = pytest.mark.parametrize("nesting", NESTED.values(), ids=NESTED)
A, B = (torch.tensor(t, dtype=torch.float64) for t in ([0.3, -0.7], [0.8, 1.3]))
RULES = {
    "inverse": lambda dim: fi.custom_inverse(scaled, lambda y, b: torch.sinh(b * y), event_dim=dim),
    "root": lambda dim: fi.custom_root(scaled, lambda y, a, b: torch.sinh(b * y) - a, event_dim=dim),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
every_event_dim = pytest.mark.parametrize("event_dim", [0, 1, None])


def scaled(a, b):
    return torch.asinh(a) / b


@inference_tensors_in_transforms
@every_nesting
@every_rule
@every_event_dim
def test_transforms_in_inference_mode(nesting, rule, event_dim):
    """What was found where there is no graph serves backward passes, where there is one."""
    h = rule(event_dim)
    with torch.inference_mode():
        found = nesting(lambda a: h(a, B), A)
    assert_close(found, nesting(lambda a: scaled(a, B), A))


@inference_tensors_in_transforms
@every_nesting
@every_rule
@every_event_dim
@pytest.mark.parametrize("which", ["a", "b"])
def test_transforms_with_inference_tensors_beside(nesting, rule, event_dim, which):
    """What is saved of them is what torch's own operations save: something that can be."""

    def calls(h, a, b):
        return nesting(lambda t: h(t, b) if which == "a" else h(a, t), (a if which == "a" else b).detach().clone())

    with torch.inference_mode():
        found = calls(rule(event_dim), A + 0, B + 0)
    assert_close(found, calls(scaled, A, B))


@every_problem
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_everything(problem, dtype):
    """matmul would run in half precision there; the derivative of a black box does not."""
    want = _second(problem.closed_form(), problem.inputs())
    with torch.autocast(problem.inputs()[0].device.type, dtype=dtype):
        got = _second(problem.custom(), problem.inputs())
    assert_close(got, want, RELATIVE_ERROR)


def _second(h, inputs):
    inputs = live(inputs)
    first = torch.autograd.grad(loss(h)(*inputs), inputs, create_graph=True)
    return first, torch.autograd.grad(total(first), inputs)


@every_problem
def test_autocast_around_transforms(problem):
    jacobians = lambda h: torch.func.jacfwd(torch.func.jacrev(h))(*problem.inputs())  # noqa: E731
    want = jacobians(problem.closed_form())
    with torch.autocast(problem.inputs()[0].device.type, dtype=torch.bfloat16):
        got = jacobians(problem.custom())
    assert_close(got, want, RELATIVE_ERROR)


@some_problems
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode(problem):
    def transform(h, inputs):
        with torch.autograd.detect_anomaly():
            return _second(h, inputs)

    assert_close_to_exact(transform, problem)


@some_problems
def test_multithreading_switched_off(problem):
    def transform(h, inputs):
        with torch.autograd.set_multithreading_enabled(False):
            return _second(h, inputs)

    assert_close_to_exact(transform, problem)


@some_problems
def test_default_device_mode(problem):
    """torch.device as a context is a torch function mode, like those that watch what f reads."""

    def transform(h, inputs):
        with inputs[0].device:
            return _second(h, inputs)

    assert_close_to_exact(transform, problem)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("event_dim", [0, 1, None])
def test_traced_by_make_fx(mode, event_dim):
    h = fi.custom_inverse(torch.asinh, lambda y: torch.sinh(y) + 0 * y.sum(-1, keepdim=True), event_dim=event_dim)
    x = torch.linspace(-1, 1, 20).double()
    derivative = torch.func.grad(lambda x: h(x).sin().sum())
    want = torch.func.grad(lambda x: torch.asinh(x).sin().sum())(x)
    torch.testing.assert_close(make_fx(derivative, tracing_mode=mode)(x)(x), want)


def test_functionalize_is_refused():
    h, x = fi.custom_inverse(torch.asinh, torch.sinh, event_dim=0), torch.linspace(-1, 1, 3)
    for call in (torch.func.functionalize(h), torch.vmap(torch.func.functionalize(h)), torch.func.functionalize(torch.vmap(h))):
        with pytest.raises(NotImplementedError, match="functionalize"):
            call(x)
