"""Saved-tensor hooks, save_on_cpu and both checkpoints: the forward must not run torch.func's reverse mode."""

import pytest
import torch
from helpers import all_of, assert_close, assert_close_to_exact, every_problem, live, loss, some_problems, tangents, total
from torch.autograd import forward_ad, graph
from torch.func import jacfwd, jvp, vmap
from torch.utils.checkpoint import checkpoint

import functorch_inverse as fi

HOOKS = {
    "saved_tensors_hooks": lambda: graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "save_on_cpu": graph.save_on_cpu,
}
every_hook = pytest.mark.parametrize("hook", HOOKS)


def order(number, y, inputs):
    for _ in range(number - 1):
        y = total(torch.autograd.grad(y, inputs, create_graph=True))
    return torch.autograd.grad(y, inputs)


@every_problem
@every_hook
@pytest.mark.parametrize("number", [1, 2, 3])
def test_forward_inside(problem, hook, number):
    def transform(h, inputs):
        inputs = live(inputs)
        with HOOKS[hook]():
            y = loss(h)(*inputs)
        return order(number, y, inputs)

    assert_close_to_exact(transform, problem)


@every_problem
@every_hook
def test_forward_and_backward_inside(problem, hook):
    def transform(h, inputs):
        inputs = live(inputs)
        with HOOKS[hook]():
            return order(1, loss(h)(*inputs), inputs)

    assert_close_to_exact(transform, problem)


@some_problems
@every_hook
@pytest.mark.parametrize("number", [2, 3])
def test_higher_derivatives_inside(problem, hook, number):
    """Plain autograd differentiates the backward pass; torch.func's reverse mode would not support hooks."""

    def transform(h, inputs):
        inputs = live(inputs)
        with HOOKS[hook]():
            return order(number, loss(h)(*inputs), inputs)

    assert_close_to_exact(transform, problem)


@every_problem
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(problem, use_reentrant):
    def transform(h, inputs):
        inputs = live(inputs)
        y = checkpoint(loss(h), *inputs, use_reentrant=use_reentrant)
        return torch.autograd.grad(y, inputs) if not use_reentrant else _backward(y, inputs)

    assert_close_to_exact(transform, problem)


def _backward(y, inputs):
    """The reentrant checkpoint knows only backward()."""
    y.backward()
    return tuple(t.grad for t in inputs)


@some_problems
def test_checkpoint_and_higher_orders(problem):
    def transform(h, inputs):
        inputs = live(inputs)
        return order(2, checkpoint(loss(h), *inputs, use_reentrant=False), inputs)

    assert_close_to_exact(transform, problem)


@some_problems
def test_hooks_on_the_tensors_themselves(problem):
    def transform(h, inputs):
        inputs = live(inputs)
        middle = [t.clone() for t in inputs]
        for t in middle:
            t.register_hook(lambda g: g.sin())
        return torch.autograd.grad(loss(h)(*middle), inputs)

    assert_close_to_exact(transform, problem)


# --- hooks that give back something else, which is nothing to what is computed here and now -------

LOSSY = {
    "half": lambda: graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.double() * 2),
    "twice": lambda: graph.saved_tensors_hooks(lambda t: t, lambda t: 2 * t),
    "two of them": lambda: graph.saved_tensors_hooks(lambda t: 3 * t, lambda t: t),
}


def by_dual_numbers(h, inputs):
    with forward_ad.dual_level():
        outputs = h(*map(forward_ad.make_dual, inputs, tangents(inputs)))
        return tuple(forward_ad.unpack_dual(t).tangent for t in outputs)


FORWARD = {
    "jvp": lambda h, inputs: jvp(h, inputs, tangents(inputs)),
    "jvp of the first": lambda h, inputs: jvp(lambda x: h(x, *inputs[1:]), inputs[:1], tangents(inputs[:1])),
    "jvp of the last": lambda h, inputs: jvp(lambda t: h(*inputs[:-1], t), inputs[-1:], tangents(inputs[-1:])),
    "jacfwd": lambda h, inputs: jacfwd(h, all_of(inputs))(*inputs),
    "jacfwd(jacfwd)": lambda h, inputs: jacfwd(jacfwd(h))(*inputs),
    "vmap(jvp)": lambda h, inputs: vmap(lambda *i: jvp(h, i, tangents(i)))(*(torch.stack([t, 1.1 * t]) for t in inputs)),
    "dual numbers": by_dual_numbers,
}
forward_mode = pytest.mark.parametrize("mode", FORWARD.values(), ids=FORWARD)


@some_problems
@forward_mode
@pytest.mark.parametrize("hook", LOSSY)
def test_forward_mode_inside_lossy_hooks(problem, mode, hook):
    def transform(h, inputs):
        with LOSSY["twice"](), LOSSY[hook]():
            return mode(h, inputs)

    assert_close(transform(problem.custom(), problem.inputs()), mode(problem.closed_form(), problem.inputs()))


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="the checkpoint of torch 2.11 has no forward mode")
@some_problems
@forward_mode
def test_forward_mode_of_a_checkpoint(problem, mode):
    function = problem.custom()
    got = mode(lambda *inputs: checkpoint(function, *inputs, use_reentrant=False), problem.inputs())
    assert_close(got, mode(problem.closed_form(), problem.inputs()))


@pytest.mark.parametrize("event_dim", [0, 1, None])
def test_jvp_with_respect_to_what_f_closes_over_inside_lossy_hooks(event_dim):
    x, c = torch.tensor([0.3, -0.7], dtype=torch.float64), torch.tensor([0.8, 1.3], dtype=torch.float64)

    def closed(c):
        return fi.custom_inverse(lambda x: torch.asinh(x) / c, lambda y: torch.sinh(c * y), event_dim=event_dim)(x)

    with LOSSY["half"]():
        found = jvp(closed, (c,), (c.cos(),))[1]
    assert_close(found, -torch.asinh(x) / c**2 * c.cos())


@some_problems
@pytest.mark.parametrize("hook", LOSSY)
@pytest.mark.parametrize("graph_asked", [False, True])
def test_backward_inside_lossy_hooks(problem, hook, graph_asked):
    """The graph of f that a backward makes and goes through is nobody else's."""
    inputs = live(problem.inputs())
    y = total(problem.custom()(*inputs))
    with LOSSY[hook]():
        found = torch.autograd.grad(y, inputs, create_graph=graph_asked)
    want = torch.autograd.grad(total(problem.closed_form()(*inputs)), inputs)
    assert_close(tuple(t.detach() for t in found), want)


@pytest.mark.parametrize("is_live", [False, True])
@pytest.mark.parametrize("hook", LOSSY)
def test_log_abs_det_inside_lossy_hooks(hook, is_live):
    A = torch.tensor([[0.3, 0.2], [-0.4, 0.1]], dtype=torch.float64)
    y = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2).requires_grad_(is_live)
    with LOSSY[hook]():
        found = fi.log_abs_det_jacobian(lambda y: y + 0.5 * torch.tanh(y @ A.T), y)
    J = torch.eye(2, dtype=y.dtype) + 0.5 * (1 - torch.tanh(y @ A.T) ** 2)[..., None] * A
    assert_close(found, torch.linalg.det(J).abs().log())


def test_the_hooks_are_there_again():
    """In the order in which they were set, also after an error."""
    seen = []
    x = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    outer = graph.saved_tensors_hooks(lambda t: seen.append("outer") or t, lambda t: t)
    inner = graph.saved_tensors_hooks(lambda t: seen.append("inner") or t, lambda t: t)
    broken = fi.custom_inverse(torch.asinh, lambda y: y.detach(), event_dim=1)
    with outer:
        with inner:
            with pytest.raises(fi.NoDerivativeError):
                jvp(broken, (x.detach(),), (x.detach(),))
            x.sin()
        x.cos()
    x.exp()
    assert seen == ["inner", "outer"]
