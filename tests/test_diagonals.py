"""The diagonals of a Jacobian from the graph of f: every operation with a rule, and that nothing else gets through."""

import pytest
import torch
from helpers import assert_close
from problems import DEVICE, Draw
from torch.nn import functional as F

import functorch_inverse as fi
from functorch_inverse import _coloured
from functorch_inverse._bands import Width
from functorch_inverse._coloured import bands_of
from functorch_inverse.operators import Equation, JacobianOperator

N = 6
MASK = torch.tensor([True, False, True, True, False, True], device=DEVICE)
BATCHES = [(), (1,), (2, 3)]


def padded(y, before=1, behind=1):
    return F.pad(y, (before, behind))


def neighbours(y):
    p = padded(y)
    return p[..., :-2], p[..., 2:]


# Values between 0 and 1, no sample like another.
KNOWN = {
    "sin": torch.sin,
    "polynomial": lambda y: 3 * y + y**3 - y.square() / 2 + 1,
    "powers": lambda y: y**y + 2**y + y**-1.5,
    "quotients": lambda y: y / (1 + y) + 1 / (2 + y) - (1 - y) / 3,
    "exponentials": lambda y: y.exp() + y.expm1() + y.log1p() + y.sqrt() + y.rsqrt() + y.reciprocal(),
    "hyperbolic": lambda y: y.sinh() + y.cosh() + y.tanh() + y.asinh() + y.erf() + y.atan(),
    "activations": lambda y: F.gelu(y) + F.silu(y) + F.softplus(y) + F.elu(y - 0.5) + F.leaky_relu(y - 0.5) + F.relu(y - 0.5),
    "sigmoids": lambda y: y.sigmoid() + F.logsigmoid(y) + F.hardtanh(y, 0.2, 0.6) + F.relu6(y - 0.3),
    "choices": lambda y: torch.where(MASK, y.sin(), y.cos()) + y.masked_fill(MASK, 2.0) + y.clamp(0.3, 0.7),
    "kinks": lambda y: (y - 0.4).abs() + y.clamp_min(0.4) + y.clamp_max(0.6),
    "views": lambda y: y.view_as(y) + y.clone() * y.contiguous() + y.reshape(y.shape).sin() + y.expand(y.shape),
    "negative": lambda y: -y.sin() + y.neg(),
    "double": lambda y: y.double().sin().to(y.dtype),
    "in place": lambda y: y.clone().mul_(2).add_(y).sin_(),
    "slices": lambda y: padded(y[..., 1:].sin(), 0) + padded(y[..., :-1].cos(), 1, 0) * y,
    "slices from behind": lambda y: padded(y[..., -5:], 0) + padded(y[..., -9:-1], 1, 0) + padded(y[..., 1:99], 0),
    "narrow": lambda y: padded(y.narrow(-1, 1, 5), 0) * 2 + y[..., 2:2].sum(-1, keepdim=True).detach(),
    "pads": lambda y: neighbours(y)[0].sin() * neighbours(y)[1] + y,
    "pads that cut": lambda y: F.pad(F.pad(y.sin(), (2, 1)), (-1, -2)) + F.pad(padded(y), (-2, 0)),
    "pads with numbers": lambda y: F.pad(y, (1, 1), value=2.0)[..., 2:] * y,
    "cat": lambda y: torch.cat([y[..., :1], y[..., :-1].sin()], -1) - torch.cat([y[..., 1:], 0 * y[..., :1]], -1) ** 2,
    "cat of parts": lambda y: torch.cat([y[..., :2].sin(), y[..., 2:3].detach(), y[..., 3:].exp()], -1),
    "diff": lambda y: torch.diff(padded(y), dim=-1)[..., 1:].sin() + torch.diff(y, dim=-1, append=y[..., -1:]),
    "energy": lambda y: y + F.pad(torch.diff(y, dim=-1).tanh(), (1, 0)) - F.pad(torch.diff(y, dim=-1).tanh(), (0, 1)),
    "far and back": lambda y: padded(padded(y, 9, 9).sin()[..., 4:-2], 0, 3)[..., 5 : 5 + y.shape[-1]] + 2 * y,
    "corner": lambda y: y + torch.cat([y[..., 1:2].sin(), 0 * y[..., 1:]], -1),
    "numbers": lambda y: 3 * y - neighbours(y)[0] / 2 + 2 * neighbours(y)[1],
    "one number": lambda y: -2 * y,
    "a number for each sample": lambda y: 2 * y * y.detach()[..., :1] + (y * y.detach().sum(-1, keepdim=True)).sin(),
    "a number for each place": lambda y: 2 * y * torch.arange(1, N + 1, device=y.device).to(y.dtype) + neighbours(y)[1],
    "full slices": lambda y: y[:][..., 0:][..., : y.shape[-1]] * 2,
}
UNKNOWN = {
    "maximum": lambda y: torch.maximum(y.sin(), 0.5 * y + 0.2),
    "roll": lambda y: y.roll(1, -1) * (torch.arange(N, device=y.device) > 0) + 2 * y,
    "flip": lambda y: y.flip(-1).flip(-1).sin(),
    "matmul": lambda y: y @ (2 * torch.eye(N, dtype=y.dtype, device=y.device)),
    "every other": lambda y: 2 * y + torch.stack([0 * y[..., ::2], y[..., ::2]], -1).flatten(-2),
    "sum": lambda y: y + 0 * y.sum(-1, keepdim=True),
    "broadcast": lambda y: y + y[..., :1] * torch.eye(N, dtype=y.dtype, device=y.device)[0],
    "unsqueezed": lambda y: y.unsqueeze(-1).sin().squeeze(-1),
    "index": lambda y: y[..., torch.arange(N, device=y.device)],
    "samples": lambda y: torch.cat([y.unsqueeze(0), y.unsqueeze(0)])[0],
    "written": lambda y: y.clone().index_copy(-1, torch.tensor([0], device=y.device), y[..., :1].sin()),
    "split": lambda y: torch.cat([part.sin() for part in y.split(2, -1)], -1),
}


@pytest.fixture
def coloured(monkeypatch):
    """How often the colours were asked."""
    calls, real = [], _coloured._coloured
    monkeypatch.setattr(_coloured, "_coloured", lambda *a: calls.append(a) or real(*a))
    return calls


def points(*batch, dtype=torch.float64):
    return (0.1 + 0.8 * Draw(0).normal(*batch, N).sigmoid()).to(dtype)


def bands(f, y, lower=1, upper=1):
    with torch.no_grad():
        equation = Equation("test", lambda y, theta: (f(*y, *theta),), (1,), (1,))
        return bands_of(JacobianOperator(equation, (y,), ()), Width(lower, upper))


def exact(f, y, lower=1, upper=1):
    """From whole Jacobians, one for each sample."""
    samples = [torch.func.jacrev(f)(sample) for sample in y.reshape(-1, N)]
    J = torch.stack(samples) if samples else y.new_zeros(0, N, N)
    rows = [F.pad(J.diagonal(-d, -2, -1), (max(-d, 0), max(d, 0))) for d in range(-upper, lower + 1)]
    return torch.stack(rows, -2).view(*y.shape[:-1], lower + upper + 1, N)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_rule(coloured, name, batch):
    y = points(*batch)
    assert_close([bands(KNOWN[name], y)], [exact(KNOWN[name], y)])
    assert not coloured


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_empty_batches(batch):
    assert bands(KNOWN["cat"], points(*batch)).shape == (*batch, 3, N)


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_what_has_no_rule_is_left_to_the_colours(coloured, name, batch):
    y = points(*batch)
    assert_close([bands(UNKNOWN[name], y)], [exact(UNKNOWN[name], y)])
    assert coloured


@pytest.mark.parametrize(("lower", "upper"), [(1, 1), (0, 2), (2, 0), (2, 3), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_width(coloured, lower, upper, dtype):
    def f(y):
        total = 2 * y
        for shift in range(-lower, upper + 1):
            total = total + (shift + 3) * F.pad(y.sin(), (-shift, shift)) ** 2
        return total

    y = points(2, dtype=dtype)
    assert_close([bands(f, y, lower, upper)], [exact(f, y, lower, upper)], 1e-11 if dtype == torch.float64 else 1e-5)
    assert not coloured
    if lower + upper < 10:
        with pytest.raises(fi.StructureError, match="outside"):
            bands(f, y, max(lower - 1, 0), upper if lower else upper - 1)


@pytest.mark.parametrize("far", [2, -3, 5])
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_what_is_outside_is_an_error(far, size):
    y = points(2, 2)
    f = lambda y: 2 * y + size * F.pad(y.sin(), (far, -far)) * (torch.arange(4, device=y.device) == 2).view(2, 2, 1)  # noqa: E731
    with pytest.raises(fi.StructureError, match=r"1 of 4 samples \(.*: 2\)"):
        bands(f, y)
    assert_close([bands(lambda y: 3 * y + 0 * f(y), y)], [bands(lambda y: 3 * y, y)])


def test_what_cancels_is_not_outside(coloured):
    y = points(2)
    f = lambda y: 2 * y + F.pad(y, (3, -3)) - F.pad(y, (3, -3))  # noqa: E731
    assert_close([bands(f, y)], [bands(lambda y: 2 * y, y)])
    assert not coloured


def test_what_is_no_number_stays_in_its_sample():
    y = points(3)
    y[1, 2] = torch.inf
    f = lambda y: y**2 + neighbours(y)[0] * y  # noqa: E731
    got = bands(f, y)
    assert not got[1].isfinite().all()
    assert_close([got[::2]], [exact(f, y[::2])])
    y[1, 2] = torch.nan
    assert bands(f, y)[1].isnan().any()


def test_an_infinite_derivative_beside_the_matrix():
    """Sqrt' at the zeros of a pad."""
    y = points(2)
    f = lambda y: y + F.pad(y, (1, 0)).sqrt()[..., :-1]  # noqa: E731
    got = bands(f, y)
    assert_close([got], [exact(f, y)])


def test_what_is_not_contiguous(coloured):
    y = points(2, 3)
    f = KNOWN["cat"]
    assert_close([bands(f, y.mT.contiguous().mT), bands(f, y.flip(0)).flip(0)], [exact(f, y)] * 2)
    assert_close([bands(f, y[:, :1].expand(2, 3, N))], [exact(f, y[:, :1]).expand(2, 3, 3, N)])
    assert not coloured


def test_hooks_are_heard(coloured):
    """They stand in no formula; the pass is one of torch's own."""

    def f(y):
        t = y.sin()
        if t.requires_grad:
            t.register_hook(lambda g: 3 * g)
        return t + y

    y = points(2)
    assert_close([bands(f, y)[:, 1]], [3 * y.cos() + 1])
    assert not coloured


def test_hooks_that_leave_torch(coloured):
    def f(y):
        t = y.sin()
        if t.requires_grad:
            t.register_hook(lambda g: torch.from_numpy(3 * g.numpy()))
        return t + y

    y = points(2)
    assert_close([bands(f, y)[:, 1]], [3 * y.cos() + 1])
    assert coloured


class Looks(torch.autograd.Function):
    """A backward that looks at the values of its cotangent."""

    @staticmethod
    def forward(ctx, y):
        return 2 * y

    @staticmethod
    def backward(ctx, g):
        assert type(g) is torch.Tensor and g.isfinite().all()
        return torch.from_numpy(2 * g.numpy())


def test_a_backward_in_python_sees_plain_tensors(coloured):
    y = points(2)
    assert_close([bands(lambda y: Looks.apply(y) + y, y)[:, 1]], [torch.full_like(y, 3)])
    assert coloured


@pytest.mark.parametrize("wrong", [lambda y: 3 * y[..., :1].expand(y.shape), lambda y: y.flip(-1), lambda y: y.cumsum(-1)])
def test_moved_numbers_are_no_diagonals(wrong):
    with pytest.raises(fi.StructureError, match="outside"):
        bands(wrong, points(2))


# --- from g to its derivative --------------------------------------------------------------------


def stencil(y, c=1.0):
    before, behind = neighbours(y)
    return 4 * y + c * y**3 - 0.8 * before - 1.2 * behind.tanh()


def inverse(**options):
    def search(x, c=1.0):
        y = x / 4
        for _ in range(200):
            y = y - (stencil(y, c) - x) / (4 + 3 * c * y**2 + 2)
        return y

    return fi.custom_inverse(search, stencil, event_dim=1, linear_solver=fi.Banded(1, 1), **options)


def transposed_solve(y, v, c=1.0):
    """J^-T v, one sample at a time."""
    samples = zip(y.view(-1, N), v.view(-1, N), strict=True)
    found = [torch.linalg.solve(torch.func.jacrev(stencil)(s, c).mT, t) for s, t in samples]
    return torch.stack(found).view(y.shape)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_gradients(coloured, batch):
    """To x and to a parameter, again from kept factors, and of the second order."""
    g = inverse()
    y = points(*batch)
    c = torch.tensor(0.7, dtype=y.dtype, device=DEVICE, requires_grad=True)
    x = stencil(y, c.detach()).requires_grad_()
    v, w = y.sin(), y.cos()
    out = g(x, c)
    want = transposed_solve(y, v, c.detach())
    for t in (v, v):
        gx, gc = torch.autograd.grad(out, (x, c), t, retain_graph=True)
        assert_close([gx, gc], [want, -(want * y**3).sum()], 1e-9)
    assert not coloured
    (first,) = torch.autograd.grad(out, x, v, create_graph=True)
    (second,) = torch.autograd.grad((first * w).sum(), x)
    h = 1e-5

    def slope(sign):
        moved = (x.detach() + sign * h * w).requires_grad_()
        return torch.autograd.grad(g(moved, c.detach()), moved, v)[0]

    # The derivative of J^-T v along w, and w^T of the derivative: one symmetric form in the moved and the moving direction.
    along = (slope(1) - slope(-1)) / (2 * h)
    assert_close([(second * w).sum()], [(along * w).sum()], 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precisions(coloured, dtype):
    y = points(2)
    x = stencil(y).to(dtype).requires_grad_()
    g = fi.custom_inverse(lambda x: y.to(dtype), stencil, event_dim=1, linear_solver=fi.Banded(1, 1))
    (got,) = torch.autograd.grad(g(x), x, y.cos().to(dtype))
    assert got.dtype == dtype and not coloured
    rounded, v = y.to(dtype).double(), y.cos().to(dtype).double()
    torch.testing.assert_close(got.double(), transposed_solve(rounded, v), rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_singular_samples_are_named():
    y = points(3)
    y[1] = 0
    x = (y**2).requires_grad_()
    square = lambda y: y**2 + 0 * neighbours(y)[0]  # noqa: E731
    for on_singular in ("raise", "nan"):
        g = fi.custom_inverse(lambda x: y.clone(), square, event_dim=1, linear_solver=fi.Banded(1, 1, on_singular))
        if on_singular == "raise":
            with pytest.raises(fi.SingularJacobianError, match=r"1 of 3 samples \(.*: 1\)"):
                g(x).sum().backward()
        else:
            (got,) = torch.autograd.grad(g(x).sum(), x)
            assert got[1].isnan().all()
            assert_close([got[::2]], [1 / (2 * y[::2])])


def test_traces(coloured):
    """Nothing can be looked at there."""
    y = points(2)
    g = fi.custom_inverse(lambda x: y.clone(), stencil, event_dim=1, linear_solver=fi.Banded(1, 1))

    def gradient(x, v):
        return torch.autograd.grad(g(x), x, v)[0]

    x = stencil(y).requires_grad_()
    traced = torch.fx.experimental.proxy_tensor.make_fx(gradient)(x, y.sin())
    assert_close([traced(x, y.cos())], [transposed_solve(y, y.cos())], 1e-9)
    assert coloured
