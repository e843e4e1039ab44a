"""Flows and samplers by `invert`, each checked against its own values.

Every test is one recipe, complete in itself: copy it together with the imports.
"""

import torch
from torch import nn
from torch.func import grad, jacrev, vmap
from torch.nn.utils.parametrizations import spectral_norm

import functorch_inverse as fi

double = {"dtype": torch.float64}


# --- residual flows --------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """y + h(y) with a Lipschitz constant of h below 0.7: one to one, whatever the weights."""

    def __init__(self, size, width):
        super().__init__()
        layers = (spectral_norm(nn.Linear(size, width, **double)), spectral_norm(nn.Linear(width, size, **double)))
        self.net = nn.Sequential(layers[0], nn.Tanh(), layers[1])

    def forward(self, y):
        return y + 0.7 * self.net(y)


def test_a_residual_flow_trained_through_its_inverse():
    """Samples are the inverse of the flow at noise; they are moved to where the data are, by their mean and covariance.

    eval() keeps the power iteration of spectral_norm from changing the weights between values and derivatives.
    """
    torch.manual_seed(0)
    flow = nn.Sequential(ResidualBlock(2, 16), ResidualBlock(2, 16)).eval()
    sampler = fi.InverseModule(flow, event_dim=1, inverter=fi.FixedPoint())
    noise = torch.randn(128, 2, **double)
    mean = torch.tensor([0.5, -0.3], **double)
    covariance = torch.tensor([[1.3, 0.3], [0.3, 0.8]], **double)

    def distance():
        y = sampler(noise)
        return (y.mean(0) - mean).square().sum() + (y.T.cov() - covariance).square().sum()

    optimizer, start = torch.optim.Adam(sampler.parameters(), lr=0.02), distance().item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = distance()
        loss.backward()
        optimizer.step()
    assert distance() < 0.05 * start
    torch.testing.assert_close(flow(sampler(noise)), noise, rtol=1e-9, atol=1e-9)

    # One number of the gradient against differences of the values.
    bias = flow[0].net[2].bias
    (got,) = torch.autograd.grad(distance(), bias)
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            bias[0] += step
            ends.append(distance())
            bias[0] -= step
    torch.testing.assert_close(got[0], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-8)


# --- implicit reparameterisation -------------------------------------------------------------------


def mixture_cdf(y, logits, means, scales):
    """The distribution function of a mixture of normals, elementwise in y."""
    return (logits.softmax(-1) * torch.special.ndtr((y.unsqueeze(-1) - means) / scales)).sum(-1)


def test_samples_of_a_mixture_with_gradients():
    """y = cdf^-1(u): samples of a mixture that are differentiable in weights, means and scales."""
    sample = fi.invert(mixture_cdf, event_dim=0)
    u = torch.rand(50, **double)
    logits, means = torch.tensor([0.3, -0.2, 0.5], **double), torch.tensor([-2.0, 0.5, 3.0], **double)
    theta = (logits, means, torch.tensor([0.4, 1.0, 0.7], **double))
    start = (logits.softmax(-1) * means).sum()

    y = sample(u, *theta, init=start)
    torch.testing.assert_close(mixture_cdf(y, *theta), u)

    def expectation(*theta):
        return sample(u, *theta, init=start).sin().mean()

    got = grad(expectation, (0, 1, 2))(*theta)
    for i, part in enumerate(theta):
        for k in range(3):
            moved = [part.clone(), part.clone()]
            moved[0][k] += 1e-5
            moved[1][k] -= 1e-5
            ends = [expectation(*theta[:i], m, *theta[i + 1 :]) for m in moved]
            torch.testing.assert_close(got[i][k], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-9)

    # The derivative to u is one over the density, sample by sample.
    weights = logits.softmax(-1)
    density = (weights * torch.distributions.Normal(means, theta[2]).log_prob(y.unsqueeze(-1)).exp()).sum(-1)
    slope = vmap(grad(lambda u: sample(u, *theta, init=start)))(u)
    torch.testing.assert_close(slope, 1 / density)


def test_a_batch_of_mixtures():
    """One mixture for each row, all samples of all rows in one solve."""
    sample = fi.invert(mixture_cdf, event_dim=0)
    u = torch.rand(4, 10, **double)
    theta = (torch.randn(4, 1, 3, **double), torch.randn(4, 1, 3, **double), torch.rand(4, 1, 3, **double) + 0.5)
    y = sample(u, *theta, init=0.0)
    each = torch.stack([sample(u[i], *(t[i] for t in theta), init=0.0) for i in range(4)])
    torch.testing.assert_close(y, each)
    rows = vmap(jacrev(lambda u, *theta: sample(u, *theta, init=0.0), argnums=2))(u, *theta)
    assert rows.shape == (4, 10, 1, 3)
    # Moving all means by one number moves all samples by it.
    torch.testing.assert_close(rows.sum(-1), torch.ones(4, 10, 1, **double))
