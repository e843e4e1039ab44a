"""InverseModule: a module run backwards that trains, moves, saves, copies and distributes like any other."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import Block
from helpers import assert_close
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

import functorch_inverse as fi

double = {"dtype": torch.float64}


class Affine(nn.Module):
    """f(y) = (y * exp(scale)) W^T + shift, whose inverse is known."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, **double)
        self.linear.weight.data += 2 * torch.eye(3, **double)
        self.scale = nn.Parameter(0.3 * torch.randn(3, **double))
        self.register_buffer("unused", torch.zeros(1, **double))

    def forward(self, y):
        return self.linear(y * self.scale.exp())

    def exact(self, x):
        return torch.linalg.solve(self.linear.weight, (x - self.linear.bias).mT).mT / self.scale.exp()


def gradients(module, y):
    return torch.autograd.grad(y.sin().sum(), [p for p in module.parameters() if p.requires_grad])


def test_parameters_receive_the_right_gradients():
    module, x = Affine(), torch.randn(5, 3, **double)
    inverse = fi.InverseModule(module, event_dim=1)
    assert_close(inverse(x), module.exact(x))
    assert_close(gradients(inverse, inverse(x)), gradients(module, module.exact(x)))


def test_transforms():
    module, x = Affine(), torch.randn(3, **double)
    inverse = fi.InverseModule(module)
    state = {f"module.{k}": v for k, v in module.state_dict().items()}

    def through(scale, x):
        return functional_call(inverse, state | {"module.scale": scale}, (x,)).sin().sum()

    def exact(scale, x):
        inner = torch.linalg.inv(module.linear.weight.detach()) @ (x - module.linear.bias.detach())
        return (inner / scale.exp()).sin().sum()

    scales = torch.randn(4, 3, **double)
    for transform in (grad, hessian):
        got, want = (vmap(transform(h, argnums=(0, 1)), (0, None))(scales, x) for h in (through, exact))
        assert_close(got, want)


def test_it_trains():
    torch.manual_seed(1)
    truth, student = Block(), fi.InverseModule(Block(), event_dim=1)
    x = torch.randn(64, 3, **double)
    y = fi.invert(truth, event_dim=1)(x).detach()
    optimizer, losses = torch.optim.LBFGS(student.parameters(), line_search_fn="strong_wolfe", max_iter=30), []

    def closure():
        optimizer.zero_grad()
        loss = (student(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    assert losses[-1] < 1e-3 * losses[0]


def test_state_dict():
    first, second = fi.InverseModule(Affine(), event_dim=1), fi.InverseModule(Affine(), event_dim=1)
    names = {"module.linear.weight", "module.linear.bias", "module.scale", "module.unused"}
    assert first.state_dict().keys() == names
    assert dict(first.named_parameters()).keys() == names - {"module.unused"}
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 3, **double)
    assert torch.equal(first(x), second(x))


def test_copies_are_their_own():
    inverse, x = fi.InverseModule(Affine(), event_dim=1, inverter=fi.Newton(max_steps=20)), torch.randn(5, 3, **double)
    for other in (copy.deepcopy(inverse), pickle.loads(pickle.dumps(inverse))):
        assert torch.equal(other(x), inverse(x))
        with torch.no_grad():
            other.module.scale.add_(1.0)
        assert_close(other(x), inverse(x) / torch.e)
    assert "inverter=Newton(" in repr(inverse)


def test_to_another_dtype_and_module():
    inverse, x = fi.InverseModule(Affine(), event_dim=1), torch.randn(5, 3, **double)
    want = inverse(x).detach()
    y = inverse.to(torch.float32)(x.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-3)
    inverse.module = Affine()
    assert_close(inverse(x), inverse.module.exact(x))


def test_frozen_parameters_and_no_grad():
    inverse, x = fi.InverseModule(Affine(), event_dim=1), torch.randn(5, 3, **double)
    inverse.module.scale.requires_grad_(False)
    inverse(x).sum().backward()
    assert inverse.module.scale.grad is None
    assert inverse.module.linear.weight.grad is not None
    with torch.no_grad():
        assert not inverse(x).requires_grad


def test_arguments_and_init():
    class Power(nn.Module):
        def forward(self, y, a):
            return a * y**2

    inverse = fi.InverseModule(Power(), event_dim=1)
    x, a = torch.tensor([8.0, 18.0], **double), torch.tensor(2.0, **double)
    assert_close(inverse(x, a, init=-torch.ones_like(x)), torch.tensor([-2.0, -3.0], **double))
    assert_close(grad(lambda a: inverse(x, a, init=torch.ones_like(x)).sum())(a), torch.tensor(-5 / 4, **double))


def test_inverse_of_an_inverse():
    module, x = Affine(), torch.randn(5, 3, **double)
    twice = fi.InverseModule(fi.InverseModule(module, event_dim=1), event_dim=1)
    assert torch.equal(twice(x), module(x))
    assert torch.equal(twice(x, init=x), module(x))
    assert set(twice.state_dict()) == {f"module.module.{name}" for name in module.state_dict()}
    thrice = fi.InverseModule(twice, event_dim=1)
    assert_close(thrice(x), module.exact(x))
    numeric = fi.InverseModule(fi.InverseModule(module, event_dim=1), event_dim=1, inverter=fi.Newton())
    assert_close(numeric(x), module(x))
    assert_close(gradients(numeric, numeric(x)), gradients(module, module(x)))


def test_a_module_that_works_in_place():
    x = torch.tensor([-1.0, 2.0, 3.0], **double)
    for event_dim in (0, 1):
        y = fi.InverseModule(nn.Sequential(nn.LeakyReLU(0.5, inplace=True)), event_dim=event_dim)(x)
        assert_close(y, torch.tensor([-2.0, 2.0, 3.0], **double))
        assert torch.equal(x, torch.tensor([-1.0, 2.0, 3.0], **double))


def test_dropout_has_no_inverse():
    """The mask of the values would not be that of the derivative."""
    module, x = nn.Sequential(Affine(), nn.Dropout(0.5)), torch.randn(5, 3, **double)
    inverse = fi.InverseModule(module, event_dim=1)
    for run in (inverse, vmap(inverse), fi.invert(lambda y: module(y), event_dim=1), grad(lambda x: inverse(x).sum())):
        with pytest.raises(fi.StructureError, match=r"Dropout\(p=0.5.* in train mode.* Call eval"):
            run(x)
    inverse.eval()
    assert_close(inverse(x), module[0].exact(x))
    assert_close(gradients(inverse, inverse(x)), gradients(module, module[0].exact(x)))
    never = fi.InverseModule(nn.Sequential(module[0], nn.Dropout(0.0)), event_dim=1).train()
    assert_close(never(x), module[0].exact(x))


def test_batch_norm_keeps_its_statistics():
    norm, x = nn.BatchNorm1d(3, **double), torch.randn(5, 3, **double)
    inverse = fi.InverseModule(nn.Sequential(Affine(), norm), event_dim=1)
    with pytest.raises(fi.StructureError, match=r"BatchNorm1d.* in train mode.* Call eval"):
        inverse(x)
    assert norm.num_batches_tracked == 0
    norm.running_mean += 0.3
    inverse.eval()
    exact = inverse.module[0].exact(x * (1 + norm.eps) ** 0.5 + 0.3)
    assert_close(inverse(x), exact)


@pytest.mark.parametrize("part", [nn.BatchNorm1d(3, **double), nn.Dropout(0.5)], ids=repr)
@pytest.mark.parametrize("event_dim", [1, 2])
def test_train_mode_between_values_and_derivative(part, event_dim):
    """The derivative would be that of another function, and train the statistics."""
    inverse = fi.InverseModule(nn.Sequential(Affine(), part), event_dim=event_dim).eval()
    x = torch.randn(5, 3, **double, requires_grad=True)
    y, plain = inverse(x).sum(), fi.invert(lambda y: inverse.module(y), event_dim=event_dim)(x).sum()
    want = torch.autograd.grad(inverse(x).sum(), x)
    inverse.train()
    for total in (y, plain):
        with pytest.raises(fi.StructureError, match=r"in train mode.* Call eval"):
            torch.autograd.grad(total, x, retain_graph=True)
    assert getattr(part, "num_batches_tracked", 0) == 0
    inverse.eval()
    assert_close(torch.autograd.grad(y, x), want)


def test_weights_kept_by_parametrize():
    """Those that parametrize.cached() keeps were computed from other values than those that f is to read."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, **double))
    with torch.no_grad():
        layer.parametrizations.weight.original1.add_(2 * torch.eye(3, **double))
    x = torch.randn(5, 3, **double)

    def exact(x):
        return torch.linalg.solve(layer.weight, (x - layer.bias).mT).mT

    want, plain = gradients(layer, exact(x)), gradients(layer, layer(x))
    by_solving = fi.custom_inverse(exact, layer, event_dim=1)
    for h in (fi.invert(layer, event_dim=1), fi.InverseModule(layer, event_dim=1), by_solving):
        for before in (False, True):
            with nn.utils.parametrize.cached():
                if before:
                    layer(x)
                assert_close(gradients(layer, h(x)), want, 1e-7)
                assert_close(gradients(layer, layer(x)), plain)


class SetsItselfUp(nn.Module):
    """As flows are initialised by their first batch."""

    def __init__(self, set_up):
        super().__init__()
        self.shift, self.ready, self.set_up = nn.Parameter(torch.zeros(3, **double)), False, set_up

    def forward(self, y):
        if not self.ready:
            self.set_up(self, -y.detach().mean(0))
            self.ready = True
        return y + self.shift


def test_a_module_that_exchanges_its_parameters_while_it_runs():
    """It would do so to what stands in for them."""

    def data(module, value):
        module.shift.data = value

    def whole(module, value):
        module.shift = nn.Parameter(value)

    def in_place(module, value):
        module.shift.data.copy_(value)

    x = torch.randn(5, 3, **double) + 4
    for set_up, text in ((data, r"its parameter 'shift' another tensor.*Run it once by itself"), (whole, "live tensor")):
        module = SetsItselfUp(set_up)
        with pytest.raises(fi.NoDerivativeError, match=text):
            fi.InverseModule(module, event_dim=1)(x.clone().requires_grad_())
        module.ready = False
        module(x)
        assert_close(fi.InverseModule(module, event_dim=1)(x), x - module.shift)
    module = SetsItselfUp(in_place)
    assert_close(fi.InverseModule(module, event_dim=1)(x), x - module.shift)
    assert module.shift.abs().min() > 1


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"use invert\(\) for a function"):
        fi.InverseModule(torch.sin)
    with pytest.raises(ValueError, match="choose Newton"):
        fi.InverseModule(Affine(), inverter=3)


def test_distributed_data_parallel(tmp_path):
    """Two gloo processes, each with half of the data."""
    worker = Path(__file__).parent / "ddp_worker.py"
    ranks = [
        subprocess.Popen([sys.executable, str(worker), str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        results = [(rank.communicate(timeout=60)[1], rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(code == 0 for _, code in results), results
