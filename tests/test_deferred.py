"""Large elementwise problems leave out the last operation of f: the derivative is what it is with all of it."""

import numpy as np
import pytest
import torch
from helpers import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode

import functorch_inverse as fi
from functorch_inverse import _deferred
from functorch_inverse._deferred import Deferred, ForGraph

_aten = torch.ops.aten
SIZE = 2**16
NAMES = sorted({op.overloadpacket.__name__ for op in _deferred.FORGETFUL})


def points(dtype=torch.float64, size=SIZE):
    return torch.linspace(0.1, 0.9, size, dtype=dtype)


class Recorder(TorchDispatchMode):
    """Which operations were carried out."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def last_value(monkeypatch):
    """What the evaluations of f in derivatives were."""
    found = []
    call = ForGraph.__call__

    def kept(self, y, *args):
        result = call(self, y, *args)
        found.append(type(result))
        return result

    monkeypatch.setattr(ForGraph, "__call__", kept)
    return found


def gradients(f, y, *args, calls=3):
    """Those of g with g(x) = y by its inverse f, at several calls: v / f'(y), and what args receive."""
    h = fi.custom_inverse(lambda x, *args: y.clone(), f, event_dim=0)
    x = y.detach().clone().requires_grad_()
    return [torch.autograd.grad(h(x, *args), (x, *args), torch.cos(3 * y)) for _ in range(calls)]


def expected(f, y, *args):
    y = y.detach().clone().requires_grad_()
    out = f(y, *args)
    (slope,) = torch.autograd.grad(out.sum(), y, retain_graph=True)
    u = torch.cos(3 * y.detach()) / slope
    return (u, *(torch.autograd.grad(out, args, -u) if args else ()))


TWO = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "logaddexp": torch.logaddexp, "atan2": torch.atan2,
}  # fmt: skip
FUNCTIONAL = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "softplus": torch.nn.functional.softplus}


def functions(name):
    """Functions of y that end in an operation."""
    if name in TWO:
        op = TWO[name]
        return [lambda y: op(y, y.exp()), lambda y: op(y.exp(), y + 2)]
    if name == "pow":
        return [lambda y: y.exp() ** 3]
    op = FUNCTIONAL.get(name) or getattr(torch, name)
    if name == "acosh":
        return [lambda y: op(2 * y + 3)]
    return [op, lambda y: op(y / 2 + y**2 / 4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation(name, dtype, monkeypatch):
    kinds = last_value(monkeypatch)
    for f in functions(name):
        y = points(dtype, 2**18)
        truth = expected(f, y)
        for got in gradients(f, y):
            assert all(map(torch.equal, got, truth))
        assert kinds[-3:] == [torch.Tensor, Deferred, Deferred]
        # Nobody may ever ask for the result that is not there.
        node = f(y.requires_grad_()).grad_fn
        assert not [a for a in dir(node) if a.startswith(("_saved_result", "_saved_out"))]


@pytest.mark.parametrize("f", [torch.exp, torch.tanh, torch.sqrt, torch.sigmoid, lambda y: y.sin().exp(), torch.Tensor.clone])
def test_results_that_are_needed_are_computed(f, monkeypatch):
    kinds = last_value(monkeypatch)
    y = points()
    assert all(torch.equal(got, expected(f, y)[0]) for (got,) in gradients(f, y))
    assert Deferred not in kinds


def test_closed_form():
    h = fi.custom_inverse(lambda x: np.arcsin(x.numpy()), torch.sin, event_dim=0)
    x = points().requires_grad_()
    for _ in range(3):
        (got,) = torch.autograd.grad(h(x).sum(), x)
        assert_close(got, (1 - x.detach() ** 2).rsqrt(), 1e-14)


def test_arguments(monkeypatch):
    kinds = last_value(monkeypatch)
    f = lambda y, a, b: torch.asinh(b * torch.sinh(a * y))  # noqa: E731
    y = points(size=2**16)
    a, b = torch.tensor(1.5, dtype=y.dtype), torch.linspace(1, 2, len(y), dtype=y.dtype)
    args = (a.requires_grad_(), b.requires_grad_())
    truth = expected(f, y, *args)
    for got in gradients(f, y, *args):
        assert_close(got, truth, 1e-14)
    assert kinds[-1] is Deferred


@pytest.mark.parametrize("order", [1, 2, 3])
def test_higher_orders_and_graphs_that_stay(order):
    h = fi.custom_inverse(torch.asin, torch.sin, event_dim=0)
    x = points().requires_grad_()
    exact = [lambda x: (1 - x**2) ** -0.5, lambda x: x * (1 - x**2) ** -1.5, lambda x: (1 + 2 * x**2) * (1 - x**2) ** -2.5]
    for _ in range(3):
        out = h(x)
        for k in range(order):
            (out,) = torch.autograd.grad(out.sum(), x, create_graph=k + 1 < order, retain_graph=True)
        assert_close(out, exact[order - 1](x.detach()), 1e-11)


def test_a_graph_that_stays_serves_twice():
    h = fi.custom_inverse(torch.asin, torch.sin, event_dim=0)
    x = points().requires_grad_()
    for _ in range(3):
        y = h(x)
        v = torch.ones_like(y)
        (first,), (second,) = (torch.autograd.grad(y, x, c * v, retain_graph=True) for c in (1, 2))
        assert torch.equal(2 * first, second)


FOUND = []


def looking(y):
    out = torch.sin(y)
    FOUND.append(out.sum().item())
    return out


def keeping(y):
    out = torch.sin(y)
    FOUND.append(out)
    return out


def swallowing(y):
    out = torch.sin(y)
    try:
        FOUND.append(out.tolist())
    except Exception:
        FOUND.append(None)
    return out


def trying(y):
    out = torch.sin(y)
    try:
        out = out * 1.5
    except Exception:
        out = torch.cos(y)
    return out


def something_else(y):
    torch.sin(y)
    return y * 1.5


def half(y):
    return torch.sin(y[: len(y) // 2].repeat(2)) + y


@pytest.mark.parametrize("way", [looking, keeping, swallowing, trying, something_else, half, lambda y: torch.sin(y) * 1.5])
def test_an_f_that_does_something_else_now_and_then(way, monkeypatch):
    """The operation that was the last one need not be it again: whatever f does, it finds values and gives its derivative."""
    kinds = last_value(monkeypatch)
    f = lambda y: torch.sin(y) if y[0] < 0.5 else way(y)  # noqa: E731
    h = fi.custom_inverse(torch.clone, f, event_dim=0)
    for start in (0.1, 0.2, 0.6, 0.3, 0.7):
        y = points() / 10 + start
        FOUND.clear()
        x = y.clone().requires_grad_()
        (got,) = torch.autograd.grad(h(x).sum(), x)
        seen = list(FOUND)
        (slope,) = torch.autograd.grad(f(x).sum(), x)
        assert torch.equal(got, 1 / slope)
        # f sees what it would see without us, once.
        assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(seen, FOUND[len(seen) :], strict=True))
    assert kinds[1] is Deferred


def test_errors_of_f_are_its_own():
    def f(y):
        if y[0] > 0.5:
            raise KeyError("broken")
        return torch.sin(y)

    h = fi.custom_inverse(torch.clone, f, event_dim=0)
    for start in (0.1, 0.2, 0.6):
        x = (points() / 10 + start).requires_grad_()
        y = h(x)
        if start < 0.5:
            torch.autograd.grad(y.sum(), x)
    with pytest.raises(KeyError, match="broken"):
        torch.autograd.grad(y.sum(), x)


def in_columns(y):
    return torch.sin(y.view(2, -1).t().contiguous().t()).reshape(-1)


@pytest.mark.parametrize("f", [lambda y: y.double() + y.exp(), in_columns])
def test_other_precisions_and_orders_of_memory(f):
    y = points(torch.float32, 2**17)
    truth = expected(lambda y: f(y).float(), y)
    for got in gradients(lambda y: f(y).float(), y):
        assert all(map(torch.equal, got, truth))


def test_not_contiguous():
    y = points(size=2**16).reshape(256, 256).t()
    for got in gradients(torch.sin, y):
        assert torch.equal(got[0], expected(torch.sin, y)[0])


def test_who_watches_sees_every_operation():
    h = fi.custom_inverse(torch.asin, torch.sin, event_dim=0)
    x = points().requires_grad_()
    for _ in range(3):
        with Recorder() as seen:
            torch.autograd.grad(h(x).sum(), x)
        assert seen.seen.count(_aten.sin.default) == 1


def test_a_value_comes_when_it_is_looked_at():
    f = ForGraph(torch.sin)
    y = points().requires_grad_()
    for _ in range(2):
        out = f(y)
    assert type(out) is Deferred
    assert out.found is None
    assert torch.equal(out + 1, torch.sin(y) + 1)
    assert torch.equal(torch.autograd.grad((out * out).sum(), y)[0], 2 * torch.cos(y) * torch.sin(y))
    assert out.tolist() == torch.sin(y).tolist()
    assert out.add_(1) is out
    assert torch.equal(out[3:], torch.sin(y)[3:] + 1)


def test_what_comes_after_may_change_its_arguments():
    def changed(y):
        with torch.no_grad():
            z = y.clone()
        out = torch.sin(z)
        with torch.no_grad():
            z.zero_()
        return out

    run = ForGraph(lambda y: torch.sin(y) if y[0] < 0.5 else changed(y))
    same_count = ForGraph(lambda y: torch.sin(y.clone()) if y[0] < 0.5 else changed(y))
    for start in (0.1, 0.1, 0.6):
        y = points() / 10 + start
        assert torch.equal(same_count(y), torch.sin(y))
        assert torch.equal(run(y), torch.sin(y))


def test_what_f_keeps_has_its_value_at_once():
    kept = []

    def f(y):
        z = y.exp()
        kept[:] = z, torch.sin(z)
        return kept[1]

    run, y = ForGraph(f), points().requires_grad_()
    for _ in range(3):
        out = run(y)
        with torch.no_grad():
            kept[0].zero_()
        assert torch.equal(out, torch.sin(y.exp()))


def test_the_order_of_memory_is_that_of_the_result():
    run, y = ForGraph(torch.sin), points().reshape(256, -1).t().requires_grad_()
    for _ in range(3):
        assert run(y).stride() == torch.sin(y).stride() == (1, 256)


def test_no_thread_is_told_of_a_mode_of_ours():
    """Torch keeps that in variables that all threads share; one that compiles meanwhile would set them wrong for good."""
    seen = []

    def f(y):
        seen.append((torch._C._len_torch_dispatch_stack(), is_in_torch_dispatch_mode()))
        return torch.sin(y)

    run = ForGraph(f)
    for _ in range(2):
        run(points().requires_grad_())
    assert seen == [(1, False)] * 2
    assert torch._C._len_torch_dispatch_stack() == 0


def test_an_error_of_f_leaves_no_mode_behind():
    def f(y):
        raise KeyError("broken")

    with pytest.raises(KeyError):
        ForGraph(f)(points().requires_grad_())
    assert torch._C._len_torch_dispatch_stack() == 0
