"""Black boxes of real life, each differentiated by what is known about it and checked against its own values.

Every test is one recipe, complete in itself: copy it together with the imports.
"""

import math

import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import functorch_inverse as fi

torch_double = {"dtype": torch.float64}


# --- quantiles -----------------------------------------------------------------------------------------


def test_normal_quantile():
    """SciPy's quantile with the distribution function of torch: derivatives to p, the mean and the deviation."""
    stats = pytest.importorskip("scipy.stats")

    def ppf(p, mean, deviation):
        return stats.norm.ppf(p.numpy(), mean.numpy(), deviation.numpy())

    def cdf(y, mean, deviation):
        return torch.special.ndtr((y - mean) / deviation)

    quantile = fi.custom_inverse(ppf, cdf, event_dim=0)
    p = torch.linspace(0.01, 0.99, 7, **torch_double)
    mean, deviation = torch.tensor(0.5, **torch_double), torch.tensor(2.0, **torch_double)

    fi.check_inverse(ppf, cdf, p, mean, deviation, event_dim=0)
    y = quantile(p, mean, deviation)
    density = torch.distributions.Normal(mean, deviation).log_prob(y).exp()
    torch.testing.assert_close(vmap(grad(quantile), (0, None, None))(p, mean, deviation), 1 / density)
    d_deviation = jacfwd(quantile, argnums=2)(p, mean, deviation)
    torch.testing.assert_close(d_deviation, (y - mean) / deviation)


def test_student_t_quantile():
    """torch has no distribution function of Student's t, but its density is one derivative; the other one are differences."""
    special = pytest.importorskip("scipy.special")

    def stdtr(df, y):
        return special.stdtr(df.numpy(), y.numpy())

    by_values = fi.finite_difference(stdtr, argnums=(0, 1), order=6, event_dim=(0, 0))

    def derivatives(df, y):
        df, y = torch.broadcast_tensors(df, y)
        d_df = grad(lambda df: by_values(df, y).sum())(df)
        density = torch.exp(
            torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - (df * math.pi).log() / 2 - (df + 1) / 2 * (y**2 / df).log1p()
        )
        return d_df, density

    cdf = fi.custom_jacobian(stdtr, derivatives, argnums=(0, 1), event_dim=(0, 0))

    def ppf(p, df):
        return special.stdtrit(df.numpy(), p.numpy())

    quantile = fi.custom_inverse(ppf, lambda y, df: cdf(df, y), event_dim=0)
    p, df = torch.linspace(0.05, 0.95, 6, **torch_double), torch.full((6,), 4.5, **torch_double)

    fi.check_inverse(ppf, lambda y, df: cdf(df, y), p, df, event_dim=0)
    (dp, ddf), _ = fi.numerical_jacobian(ppf, p, df, argnums=(0, 1), order="auto", event_dim=(0, 0))
    torch.testing.assert_close(vmap(grad(quantile, (0, 1)))(p, df), (dp, ddf), rtol=1e-8, atol=1e-9)


def test_gamma_quantile_with_respect_to_its_shape():
    """torch.special.gammainc has no derivative in `a`: finite differences give that one, the density the other."""
    special = pytest.importorskip("scipy.special")

    def regularised_gamma(a, x):
        return special.gammainc(a.numpy(), x.numpy())

    by_values = fi.finite_difference(regularised_gamma, argnums=(0, 1), order=6, event_dim=(0, 0))

    def derivatives(a, x):
        a, x = torch.broadcast_tensors(a, x)
        d_a = grad(lambda a: by_values(a, x).sum())(a)
        d_x = torch.exp((a - 1) * x.log() - x - torch.lgamma(a))
        return d_a, d_x

    gammainc = fi.custom_jacobian(regularised_gamma, derivatives, argnums=(0, 1), event_dim=(0, 0))

    def ppf(p, a):
        return special.gammaincinv(a.numpy(), p.numpy())

    def cdf(y, a):
        return gammainc(a, y)

    quantile = fi.custom_inverse(ppf, cdf, event_dim=0)
    p, a = torch.linspace(0.1, 0.9, 5, **torch_double), torch.linspace(0.5, 4.0, 5, **torch_double)

    fi.check_inverse(ppf, cdf, p, a, event_dim=0)
    (dp, da), _ = fi.numerical_jacobian(ppf, p, a, argnums=(0, 1), order="auto", event_dim=(0, 0))
    torch.testing.assert_close(vmap(grad(quantile, (0, 1)))(p, a), (dp, da), rtol=1e-8, atol=1e-10)
    # The quantile of Gamma(1) is -log(1 - p): its second derivative is known.
    one = torch.ones(5, **torch_double)
    torch.testing.assert_close(vmap(hessian(quantile))(p, one), 1 / (1 - p) ** 2)


def test_reparametrised_gamma_samples():
    """Draws of a Gamma distribution that can be differentiated: the gradient of a mean is the mean of the gradients."""
    special = pytest.importorskip("scipy.special")

    def ppf(p, a):
        return special.gammaincinv(a.numpy(), p.numpy())

    quantile = fi.finite_difference(ppf, argnums=(0, 1), order=4, event_dim=(0, None))
    p = (torch.arange(20000, **torch_double) + 0.5) / 20000
    d_mean = grad(lambda a: quantile(p, a).mean())(torch.tensor(2.5, **torch_double))
    torch.testing.assert_close(d_mean, torch.ones_like(d_mean), rtol=0, atol=1e-3)  # the mean is a itself


# --- special functions ----------------------------------------------------------------------------------


def test_lambert_w():
    """W(x) exp(W(x)) = x, on both real branches: f is the same, g says which one."""
    special = pytest.importorskip("scipy.special")

    def f(w, k):
        return w * torch.exp(w)

    def g(x, k):
        return special.lambertw(x.numpy(), k).real

    lambert_w = fi.custom_inverse(g, f, event_dim=0)
    for k, x in ((0, torch.tensor([-0.3, -0.1, 0.5, 10.0], **torch_double)), (-1, torch.tensor([-0.3, -0.1], **torch_double))):
        fi.check_inverse(g, f, x, k, event_dim=0)
        w = lambert_w(x, k)
        first = w / (x * (1 + w))
        torch.testing.assert_close(vmap(grad(lambert_w), (0, None))(x, k), first)
        second = -(w**2) * (2 + w) / (x**2 * (1 + w) ** 3)
        torch.testing.assert_close(vmap(hessian(lambert_w), (0, None))(x, k), second)


def test_kepler():
    """The eccentric anomaly E of M = E - e sin E, by Newton's method in NumPy."""

    def solve(M, e):
        M, e = M.numpy(), e.numpy()
        E = M + e * np.sin(M)
        for _ in range(20):
            E = E - (E - e * np.sin(E) - M) / (1 - e * np.cos(E))
        return E

    def mean_anomaly(E, e):
        return E - e * torch.sin(E)

    eccentric_anomaly = fi.custom_inverse(solve, mean_anomaly, event_dim=0)
    M, e = torch.linspace(0.1, 6.0, 9, **torch_double), torch.tensor(0.3, **torch_double)

    fi.check_inverse(solve, mean_anomaly, M, e, event_dim=0)
    E = eccentric_anomaly(M, e)
    torch.testing.assert_close(jacfwd(eccentric_anomaly, argnums=1)(M, e), E.sin() / (1 - e * E.cos()))
    second = vmap(hessian(eccentric_anomaly), (0, None))(M, e)
    torch.testing.assert_close(second, -e * E.sin() / (1 - e * E.cos()) ** 3)


# --- functions of matrices ------------------------------------------------------------------------------


def positive_definite(seed, n=3):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(4, n, n, generator=generator, **torch_double)
    return B @ B.mT / n + torch.eye(n, **torch_double)


def test_matrix_square_root():
    """The square root Y of X, with Y Y = X."""
    linalg = pytest.importorskip("scipy.linalg")
    sqrtm = np.vectorize(linalg.sqrtm, signature="(n,n)->(n,n)")  # one call for each matrix of a batch

    def g(X):
        return sqrtm(X.numpy())

    def f(Y):
        return Y @ Y

    root = fi.custom_inverse(g, f, event_dim=2)
    X = positive_definite(0)

    fi.check_inverse(g, f, X, event_dim=2)
    gradient = grad(lambda X: (root(X) ** 2).sum())(X)  # X is symmetric, so that is the gradient of its trace
    torch.testing.assert_close(gradient, torch.eye(3, **torch_double).expand(4, 3, 3))
    J, _ = fi.numerical_jacobian(g, X, order=6, event_dim=2)
    torch.testing.assert_close(vmap(jacrev(root))(X), J, rtol=1e-9, atol=1e-10)


def test_matrix_logarithm():
    """The logarithm Y of X, with exp Y = X; log det X is its trace."""
    linalg = pytest.importorskip("scipy.linalg")
    logm = np.vectorize(linalg.logm, signature="(n,n)->(n,n)")

    def g(X):
        return logm(X.numpy())

    logarithm = fi.custom_inverse(g, torch.linalg.matrix_exp, event_dim=2)
    X = positive_definite(1)

    fi.check_inverse(g, torch.linalg.matrix_exp, X, event_dim=2)

    def log_det(X):
        return logarithm(X).diagonal(dim1=-2, dim2=-1).sum(-1)

    torch.testing.assert_close(vmap(grad(log_det))(X), torch.linalg.inv(X).mT)
    curvature = vmap(lambda X, D: jvp(lambda X: jvp(log_det, (X,), (D,))[1], (X,), (D,))[1])(X, X)
    torch.testing.assert_close(curvature, torch.full((4,), -3.0, **torch_double))  # log det((1 + t) X) = 3 log(1 + t) + ...


# --- finance, robotics, cameras -------------------------------------------------------------------------


def test_implied_volatility():
    """The volatility that explains the price of an option, by bracketing; its derivatives are inverse Greeks."""
    optimize = pytest.importorskip("scipy.optimize")

    def price(volatility, spot, strike, years):
        deviation = volatility * years.sqrt()
        d = (spot / strike).log() / deviation + deviation / 2
        return spot * torch.special.ndtr(d) - strike * torch.special.ndtr(d - deviation)

    def implied(value, spot, strike, years):
        def one(value, *market):
            market = [torch.tensor(float(m), **torch_double) for m in market]
            gap = lambda v: price(torch.tensor(v, **torch_double), *market).item() - value  # noqa: E731
            return optimize.brentq(gap, 1e-3, 5.0, xtol=1e-14, rtol=1e-14)

        return np.vectorize(one)(value.numpy(), spot.numpy(), strike.numpy(), years.numpy())

    volatility = fi.custom_inverse(implied, price, event_dim=0)
    spot, years = torch.tensor(100.0, **torch_double), torch.tensor(0.5, **torch_double)
    strike = torch.tensor([80.0, 95.0, 100.0, 120.0], **torch_double)
    value = price(torch.tensor([0.4, 0.3, 0.25, 0.2], **torch_double), spot, strike, years)

    fi.check_inverse(implied, price, value, spot, strike, years, event_dim=0)
    v = volatility(value, spot, strike, years)
    vega, delta = (vmap(grad(price, k), (0, None, 0, None))(v, spot, strike, years) for k in (0, 1))
    slopes = vmap(grad(volatility, (0, 1)), (0, None, 0, None))(value, spot, strike, years)
    torch.testing.assert_close(slopes, (1 / vega, -delta / vega))
    curvature = vmap(hessian(volatility), (0, None, 0, None))(value, spot, strike, years)
    volga = vmap(hessian(price), (0, None, 0, None))(v, spot, strike, years)
    torch.testing.assert_close(curvature, -volga / vega**3)


def test_inverse_kinematics():
    """The angles of a two-link arm that reach a point; velocity and acceleration of the joints along a path."""

    def reach(angles, lengths):
        upper, whole = angles[..., 0], angles.sum(-1)
        a, b = lengths[..., 0], lengths[..., 1]
        return torch.stack([a * upper.cos() + b * whole.cos(), a * upper.sin() + b * whole.sin()], -1)

    def joints(point, lengths):
        (x, y), (a, b) = np.moveaxis(point.numpy(), -1, 0), np.moveaxis(lengths.numpy(), -1, 0)
        elbow = np.arccos((x**2 + y**2 - a**2 - b**2) / (2 * a * b))
        shoulder = np.arctan2(y, x) - np.arctan2(b * np.sin(elbow), a + b * np.cos(elbow))
        return np.stack([shoulder, elbow], -1)

    angles = fi.custom_inverse(joints, reach, event_dim=1)
    lengths = torch.tensor([1.0, 0.7], **torch_double)
    points = torch.tensor([[1.2, 0.3], [0.5, 0.9], [-0.4, 1.1]], **torch_double)

    fi.check_inverse(joints, reach, points, lengths, event_dim=1)
    (J, J_lengths), _ = fi.numerical_jacobian(joints, points, lengths, argnums=(0, 1), order=6, event_dim=(1, None))
    found = vmap(jacrev(angles, (0, 1)), (0, None))(points, lengths)
    torch.testing.assert_close(found, (J, J_lengths), rtol=1e-9, atol=1e-10)

    def path(t):
        return torch.stack([1.0 + 0.2 * t.cos(), 0.5 + 0.2 * t.sin()])

    def velocity(t):
        return jvp(lambda t: angles(path(t), lengths), (t,), (torch.ones_like(t),))[1]

    t = torch.tensor(0.8, **torch_double)
    acceleration = jvp(velocity, (t,), (torch.ones_like(t),))[1]
    differences, _ = fi.numerical_jacobian(velocity, t, order=6)
    torch.testing.assert_close(acceleration, differences, rtol=1e-9, atol=1e-10)


def test_lens_undistortion():
    """Brown and Conrady's lens model is inverted by fixed-point iteration; a camera is calibrated through it."""

    def distort(point, k):
        x, y = point[..., 0], point[..., 1]
        r2 = x**2 + y**2
        radial = 1 + k[..., 0] * r2 + k[..., 1] * r2**2
        p1, p2 = k[..., 2], k[..., 3]
        return torch.stack(
            [
                x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2),
                y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y,
            ],
            -1,
        )

    def undistort(seen, k):
        seen, k = seen.numpy(), k.numpy()
        point = seen
        for _ in range(60):
            x, y = point[..., 0], point[..., 1]
            r2 = x**2 + y**2
            radial = 1 + k[..., 0] * r2 + k[..., 1] * r2**2
            p1, p2 = k[..., 2], k[..., 3]
            tangential = np.stack([2 * p1 * x * y + p2 * (r2 + 2 * x**2), p1 * (r2 + 2 * y**2) + 2 * p2 * x * y], -1)
            point = (seen - tangential) / radial[..., None]
        return point

    straight = fi.custom_inverse(undistort, distort, event_dim=1)
    k = torch.tensor([-0.2, 0.05, 0.001, -0.002], **torch_double)
    points = torch.tensor([[0.1, 0.2], [-0.3, 0.4], [0.5, -0.5], [0.0, 0.6]], **torch_double)
    seen = distort(points, k)

    fi.check_inverse(undistort, distort, seen, k, event_dim=1)
    differences, _ = fi.numerical_jacobian(undistort, seen, k, argnums=1, order=6, event_dim=None)
    torch.testing.assert_close(jacrev(straight, argnums=1)(seen, k), differences, rtol=1e-9, atol=1e-10)

    # Calibration: Gauss and Newton's step on where points are known to be.
    guess = torch.zeros(4, **torch_double)
    for _ in range(8):
        residual = (straight(seen, guess) - points).flatten()
        J = jacfwd(lambda k: (straight(seen, k) - points).flatten())(guess)
        guess = guess - torch.linalg.lstsq(J, residual[:, None]).solution[:, 0]
    torch.testing.assert_close(guess, k)


# --- the two examples that started this project -----------------------------------------------------------


def test_a_function_outside_of_torch():
    """exp(x) sin(2x), computed elsewhere: by central differences, and by its analytic derivative."""

    def outside(x):
        x = x.numpy()
        return np.exp(x) * np.sin(2 * x)

    def derivative(x):
        return torch.exp(x) * (torch.sin(2 * x) + 2 * torch.cos(2 * x))

    x = torch.linspace(-2, 2, 33)  # float32: a fixed step of 1e-6 would lose everything
    by_values = fi.finite_difference(outside, event_dim=0)
    by_derivative = fi.custom_jacobian(outside, derivative, event_dim=0)
    for g in (by_values, by_derivative):
        x.requires_grad_().grad = None
        g(x).sum().backward()
        torch.testing.assert_close(x.grad, derivative(x.detach()), rtol=1e-5, atol=1e-6)
        second = vmap(hessian(g))(x.detach())
        expected = vmap(grad(derivative))(x.detach())
        torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-5)


def test_several_outputs_from_one_number():
    """sin and cos of x, stacked: the product of any cotangent with the Jacobian, for a batch."""
    circle = fi.custom_jacobian(
        lambda x: np.stack([np.sin(x.numpy()), np.cos(x.numpy())], -1),
        lambda x: torch.stack([x.cos(), -x.sin()], -1),
        event_dim=0,
        out_event_dim=1,
    )
    x = torch.linspace(-3, 3, 5, **torch_double)
    v = torch.linspace(0.5, 2.0, 10, **torch_double).reshape(5, 2)

    y, pullback = vjp(circle, x)
    assert y.shape == (5, 2)
    torch.testing.assert_close(pullback(v)[0], v[:, 0] * x.cos() - v[:, 1] * x.sin())
    differences, _ = fi.numerical_jacobian(circle, x, order=6, event_dim=0, out_event_dim=1)
    torch.testing.assert_close(vmap(jacrev(circle))(x), differences)
    torch.testing.assert_close(vmap(hessian(circle))(x), -y)
