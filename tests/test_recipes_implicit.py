"""Applications of roots, fixed points, inversion and large systems; each checked by differences or a closed form."""

import numpy as np
import pytest
import torch
from helpers import assert_close
from problems import Draw
from torch import nn
from torch.func import grad, jacrev, vmap

import functorch_inverse as fi

optimize = pytest.importorskip("scipy.optimize")
linalg = pytest.importorskip("scipy.linalg")


def agrees_with_differences(function, inputs, directions, tolerance=1e-6, step=1e-5):
    """The directional derivative of a number against a central difference of fourth order."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    slopes = torch.autograd.grad(function(*inputs), inputs)
    got = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True)).item()

    def at(c):
        return function(*(t.detach() + c * step * d for t, d in zip(inputs, directions, strict=True))).item()

    want = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
    assert abs(got - want) <= tolerance * abs(want), (got, want)


# --- the hyperparameter of ridge regression ---------------------------------------------------------


def test_ridge_regression():
    """d(validation loss)/d(log lambda) through the fitted weights, against the closed form."""
    d = Draw(0)
    A, b, A_val, b_val = d.normal(40, 6), d.normal(40), d.normal(20, 6), d.normal(20)

    def objective(w, log_lam):
        return ((A @ w - b) ** 2).sum() / 2 + log_lam.exp() * (w**2).sum() / 2

    def fit(log_lam):
        system = A.numpy().T @ A.numpy() + np.exp(log_lam.item()) * np.eye(6)
        return linalg.solve(system, A.numpy().T @ b.numpy(), assume_a="pos")

    ridge = fi.custom_root(fit, grad(objective), linear_solver=fi.Cholesky())

    def closed_form(log_lam):
        return torch.linalg.inv(A.T @ A + log_lam.exp() * torch.eye(6, dtype=A.dtype)) @ (A.T @ b)

    def validation(solve):
        return lambda log_lam: ((A_val @ solve(log_lam) - b_val) ** 2).mean()

    log_lam = torch.tensor(0.7, dtype=torch.float64)
    for transform in (grad, torch.func.hessian, lambda f: vmap(grad(f))):
        at = torch.stack([log_lam, 2 * log_lam]) if transform not in (grad, torch.func.hessian) else log_lam
        assert_close([transform(validation(ridge))(at)], [transform(validation(closed_form))(at)])


# --- a deep equilibrium layer -----------------------------------------------------------------------


class Equilibrium(nn.Module):
    """y = tanh(W y + U x + b), found by iteration, trained without its steps."""

    def __init__(self, inputs, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(inputs, width)
        with torch.no_grad():
            self.inner.weight.mul_(0.4)
        self.solve = fi.custom_fixed_point(self.iterate, self.step, event_dim=1, linear_solver=fi.GMRES())

    def step(self, y, x):
        return torch.tanh(self.inner(y) + self.outer(x))

    def iterate(self, x, steps=200):
        y = x.new_zeros(*x.shape[:-1], self.inner.out_features)
        for _ in range(steps):
            y = self.step(y, x)
        return y

    def forward(self, x):
        return self.solve(x)


def test_deep_equilibrium_layer():
    torch.manual_seed(0)
    layer, x = Equilibrium(4, 16).double(), Draw(1).normal(8, 4)
    got = torch.autograd.grad(layer(x).pow(2).sum(), tuple(layer.parameters()))
    want = torch.autograd.grad(layer.iterate(x).pow(2).sum(), tuple(layer.parameters()))  # through 200 steps
    assert_close(got, want)

    target, optimiser = Draw(2).normal(8, 16).tanh(), torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (layer(x) - target).pow(2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# --- a normalizing flow trained through its inverse --------------------------------------------------


class Residual(nn.Module):
    """x = y + h(y) with a contraction h: invertible, with no formula for the inverse."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)).double()
        with torch.no_grad():
            for layer in (self.net[0], self.net[2]):
                layer.weight.mul_(0.6 / torch.linalg.matrix_norm(layer.weight, 2))

    def forward(self, y):
        return y + self.net(y)


def target_energy(y):
    """Minus the logarithm of a density on a curved ridge."""
    return (y[..., 0] ** 2 / 4 + (y[..., 1] - 0.3 * y[..., 0] ** 2) ** 2).sum()


def test_flow_with_exact_likelihood():
    """KL(flow | target) by samples y = f^-1(x): the loss is energy(y) + log|det f'(y)|, exact, and its gradient too."""
    torch.manual_seed(0)
    block, x = Residual(8), Draw(3).normal(16, 2)
    sample = fi.invert(block, event_dim=1, inverter=fi.FixedPoint())

    def loss():
        y = sample(x)
        return target_energy(y) + fi.log_abs_det_jacobian(block, y).sum()

    parameters = tuple(block.parameters())
    got = torch.autograd.grad(loss(), parameters, allow_unused=True)
    direction = [torch.cos(torch.arange(p.numel(), dtype=p.dtype)).reshape(p.shape) for p in parameters]

    def moved(c):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(c * d)
            value = loss().item()
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(c * d)
        return value

    h = 1e-4
    want = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    slope = sum((g * d).sum() for g, d in zip(got, direction, strict=True) if g is not None).item()
    assert abs(slope - want) < 1e-7 * abs(want)

    # The density of the samples, from the other side: log p(y) = log N(f(y)) + log|det f'(y)|, value and determinant at once.
    y = sample(x).detach()
    value, ladj = fi.log_abs_det_jacobian(block, y, has_value=True)
    assert_close([value], [x])
    assert_close([ladj], [-torch.linalg.slogdet(vmap(jacrev(sample))(x))[1]])


# --- a power grid -----------------------------------------------------------------------------------


def ring_of_buses(n):
    """A ring with chords: admittances (from, to, conductance, susceptance)."""
    lines = [(i, (i + 1) % n) for i in range(n)] + [(i, (i + 7) % n) for i in range(0, n, 5)]
    i, j = (torch.tensor(t) for t in zip(*lines, strict=True))
    strength = 8 + torch.cos(torch.arange(len(lines), dtype=torch.float64))
    return i, j, 0.2 * strength, strength


def test_power_flow():
    """Angles and voltages where the power that flows off each bus is what is fed into it; bus 0 is the reference."""
    n = 60
    i, j, conductance, susceptance = ring_of_buses(n)

    def mismatch(state, power):
        angle, voltage = (torch.cat([torch.full_like(s[:1], first), s]) for s, first in zip(state, (0.0, 1.0), strict=True))
        gap = angle[i] - angle[j]

        def flow(own, other, gap):
            active = own**2 * conductance - own * other * (conductance * gap.cos() - susceptance * gap.sin())
            reactive = own**2 * susceptance - own * other * (conductance * gap.sin() + susceptance * gap.cos())
            return active, reactive

        there, back = flow(voltage[i], voltage[j], gap), flow(voltage[j], voltage[i], -gap)
        off = [torch.zeros_like(voltage).index_add(0, i, t).index_add(0, j, b) for t, b in zip(there, back, strict=True)]
        return tuple(o[1:] - p for o, p in zip(off, power, strict=True))

    def solve(power):
        def residual(z):
            state = torch.from_numpy(z).chunk(2)
            return torch.cat(mismatch(state, power)).numpy()

        found = optimize.root(residual, np.concatenate([np.zeros(n - 1), np.ones(n - 1)]), tol=1e-13)
        assert found.success
        return tuple(np.split(found.x, 2))

    grid = fi.custom_root(solve, mismatch, linear_solver=fi.GMRES(restart=120))
    power = 0.05 * Draw(4).normal(n - 1), 0.02 * Draw(5).normal(n - 1)

    def losses(active, reactive):
        angle, voltage = grid((active, reactive))
        return (angle**2).sum() + ((voltage - 1) ** 2).sum()

    directions = Draw(6).normal(n - 1), Draw(7).normal(n - 1)
    agrees_with_differences(losses, power, directions, step=1e-4)


# --- a boundary-value problem with a hundred thousand unknowns --------------------------------------


@pytest.mark.parametrize("n", [200, 100_000])
def test_boundary_value_problem(n):
    """-u'' + exp(u) = load on (0, 1), u = 0 at both ends: tridiagonal, O(n) for the solution and for its derivative."""
    h = 1 / (n + 1)

    def residual(u, load):
        padded = torch.nn.functional.pad(u, (1, 1))
        return (2 * u - padded[..., :-2] - padded[..., 2:]) + h**2 * (u.exp() - load)

    def solve(load):
        u, load = np.zeros(n), load.numpy()
        bands = np.zeros((3, n))
        bands[0, 1:] = bands[2, :-1] = -1
        for _ in range(20):
            bands[1] = 2 + h**2 * np.exp(u)
            step = linalg.solve_banded((1, 1), bands, residual(torch.from_numpy(u), torch.from_numpy(load)).numpy())
            u = u - step
            if np.abs(step).max() < 1e-13:
                break
        return u

    bvp = fi.custom_root(solve, residual, event_dim=1, linear_solver=fi.Banded(1, 1))
    place = torch.linspace(h, 1 - h, n, dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64)
    agrees_with_differences(
        lambda s: h * bvp(s * torch.sin(3 * place)).pow(2).sum(), (scale,), (torch.ones_like(scale),), step=1e-2
    )
