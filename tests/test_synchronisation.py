"""Forward and backward wait for no value, so that a GPU is kept busy; only a singular matrix is worth a look."""

import numpy as np
import pytest
import torch
from helpers import assert_close
from problems import VECTOR, vector_exact, vector_f, vector_g
from torch.utils._python_dispatch import TorchDispatchMode

import functorch_inverse as fi
from functorch_inverse import _rows, linear_solvers

X, C, B = VECTOR.inputs()
_aten = torch.ops.aten
LOOKS = {_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.nonzero.default, _aten.equal.default}


class NoLook(TorchDispatchMode):
    """Values may be computed with, and not be looked at; nor may anybody swallow the error.

    A mode is off while a tensor subclass computes; so the methods that look are watched, too.
    """

    METHODS = ("__bool__", "__float__", "__int__", "item", "tolist")

    def __init__(self):
        super().__init__()
        self.looks = []

    def refuse(self, what, *_):
        self.looks.append(what)
        raise AssertionError(f"{what} waits for a value")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.refuse(func) if func in LOOKS else func(*args, **(kwargs or {}))

    def __enter__(self):
        for name in self.METHODS:
            setattr(torch.Tensor, name, lambda _, name=name: self.refuse(name))
        return super().__enter__()

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        for name in self.METHODS:
            delattr(torch.Tensor, name)
        assert kind is not None or not self.looks, f"{self.looks} waited for a value"


def numbers(x, *_):
    return fi.custom_inverse(torch.asinh, torch.sinh, event_dim=0)(x)


def vectors(x, c, b, solver="nan"):
    solver = fi.LU(on_singular=solver)
    return fi.custom_inverse(vector_g, vector_f, event_dim=1, linear_solver=solver)(x, c, b)


V, W = (torch.linspace(-1, 1, n * m, dtype=torch.float64).cos().reshape(n, m) / 4 for n, m in ((3, 8), (8, 3)))


def layers(x, *_, solver="nan"):
    """Two, with an activation in between; y is x."""
    f = lambda y: y + torch.tanh(y @ V.to(y)) @ W.to(y)  # noqa: E731
    return fi.custom_inverse(lambda x: x * 1, f, event_dim=1, linear_solver=fi.LU(on_singular=solver))(x)


class Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, v):
        (x,) = ctx.saved_tensors
        slope = 1 - torch.tanh(x @ V) ** 2
        J = torch.eye(3, dtype=x.dtype) + W.T @ (slope.unsqueeze(-1) * V.T)
        return torch.linalg.solve(J.mT, v)


def exact_layers(x, *_):
    return Layers.apply(x)


def exact_numbers(x, *_):
    return torch.asinh(x)


CASES = {"numbers": (numbers, exact_numbers), "vectors": (vectors, vector_exact), "layers": (layers, exact_layers)}


def leaves(batch, device="cpu"):
    return [t.to(device).requires_grad_() for t in (X.expand(batch, 3).clone(), C.clone(), B.clone())]


def gradients(function, inputs):
    return torch.autograd.grad(function(*inputs).sin().sum(), inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 7, 400, 3000])
def test_nothing_waits(case, batch, monkeypatch):
    """As on a GPU: the CPU, where a look is cheap, has short cuts."""
    for module in (linear_solvers, _rows):
        monkeypatch.setattr(module, "has_to_wait", lambda tensor: True)
    function, exact = CASES[case]
    inputs = leaves(batch)
    with NoLook():
        got = gradients(function, inputs)
    assert_close(got, gradients(exact, leaves(batch)))


def test_singular_samples_are_nan_without_a_look(monkeypatch):
    monkeypatch.setattr(linear_solvers, "has_to_wait", lambda tensor: True)
    M = torch.stack([torch.eye(2), torch.ones(2, 2), torch.diag(torch.tensor([1.0, torch.inf]))])
    solver = fi.LU(on_singular="nan")
    h = fi.custom_inverse(lambda x: x, lambda y: (M @ y[..., None])[..., 0], event_dim=1, linear_solver=solver)
    x = torch.ones(3, 2, requires_grad=True)
    with NoLook():
        (got,) = torch.autograd.grad(h(x).sum(), x)
    assert_close(got[0], torch.ones(2))
    assert got[1:].isnan().all()


def test_an_error_needs_a_look(monkeypatch):
    """The test of this test: what is to be raised has to be known."""
    monkeypatch.setattr(linear_solvers, "has_to_wait", lambda tensor: True)
    inputs = leaves(7)
    with pytest.raises(AssertionError, match="waits for a value"), NoLook():
        gradients(lambda *t: vectors(*t, solver="raise"), inputs)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("case", CASES)
def test_nothing_synchronises(case):
    solver = fi.LU(on_singular="nan")  # vector_g computes by NumPy
    any_y = fi.custom_inverse(lambda x, c, b: x * 1, vector_f, event_dim=1, linear_solver=solver)
    function = {"numbers": numbers, "vectors": any_y, "layers": layers}[case]
    gradients(function, leaves(64, "cuda"))  # handles of libraries are made once
    inputs = leaves(64, "cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = gradients(function, inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(np.isfinite(t.cpu().numpy()).all() for t in got)


@gpu
def test_a_captured_graph_gives_the_derivative_again():
    x = torch.linspace(-1, 1, 64, device="cuda", dtype=torch.float64, requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients(numbers, (x,))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (got,) = gradients(numbers, (x,))
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    assert_close(got.cpu(), (torch.asinh(x).cos() * (1 + x**2).rsqrt()).detach().cpu())
