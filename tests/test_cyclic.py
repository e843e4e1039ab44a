"""Cyclic reduction of dominant tridiagonal systems, down to nothing and down to LAPACK."""

import pytest
import torch
from helpers import assert_close
from problems import DEVICE, Draw

from functorch_inverse import _cyclic, _lapack
from functorch_inverse._bands import Width, inside, product
from functorch_inverse._cyclic import dominant_solve
from functorch_inverse.banded import BandedFactors

either = pytest.mark.parametrize("transpose", [False, True])
TRIDIAGONAL = Width(1, 1)
TIGHT = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float64: 1e-12, torch.complex128: 1e-12}


@pytest.fixture(params=["LAPACK", "torch"])
def backend(request, monkeypatch):
    """A hand-over to LAPACK at few unknowns, and no SciPy."""
    if request.param == "torch":
        monkeypatch.setattr(_lapack, "_lapack", lambda: None)
    else:
        pytest.importorskip("scipy")
        monkeypatch.setattr(_cyclic, "_FEW", 30)
    return request.param


def systems(*batch, n, width=TRIDIAGONAL, k=1, dtype=torch.float64):
    """Dominant by columns and by little, the solution u and b = A u."""
    draw = Draw(n)
    normal = draw.complex if dtype.is_complex else draw.normal
    bands, u = normal(*batch, width.diagonals, n).to(dtype), normal(*batch, k, n).to(dtype)
    bands[..., width.upper, :] = 0
    bands[..., width.upper, :] = (1.05 * bands.abs().sum(-2) + 0.1) * (1j if dtype.is_complex else -1)
    return inside(bands, width), u


@either
@pytest.mark.parametrize("width", [Width(0, 0), Width(0, 1), Width(1, 0), Width(1, 1)])
@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [*range(1, 10), 32, 61])
def test_values(backend, transpose, width, batch, k, n):
    bands, u = systems(*batch, n=n, width=width, k=k)
    assert_close([dominant_solve(bands, width, product(bands, width, u, transpose), transpose)], [u], 1e-11)


@either
@pytest.mark.parametrize("dtype", TIGHT)
@pytest.mark.parametrize("n", [31, 50_001, 65_536])
def test_dtypes(transpose, dtype, n):
    """Also with the real hand-over."""
    bands, u = systems(n=n, dtype=dtype)
    b = product(bands, TRIDIAGONAL, u, transpose)
    x = dominant_solve(bands, TRIDIAGONAL, b, transpose)
    assert x.dtype == dtype
    residual = product(bands, TRIDIAGONAL, x, transpose) - b
    assert residual.abs().max() <= TIGHT[dtype] * b.abs().max()
    assert_close([x], [u], 100 * TIGHT[dtype])


@either
def test_hardly_dominant(backend, transpose):
    """Second differences, and a little: the condition number is 4e9."""
    bands = torch.tensor([-1.0, 2 + 1e-9, -1], dtype=torch.float64, device=DEVICE).unsqueeze(-1).repeat(1, 100_000)
    bands = inside(bands, TRIDIAGONAL)
    factors = BandedFactors.of(bands, 1, 1)
    assert factors.parts[0].shape[0] == 0, "dominant"
    u = 1 + torch.rand(1, 100_000, dtype=torch.float64, device=DEVICE)
    b = product(bands, TRIDIAGONAL, u, transpose).squeeze(0)
    x = factors.solve(b, transpose=transpose)
    residual = product(bands, TRIDIAGONAL, x.unsqueeze(0), transpose).squeeze(0) - b
    assert residual.abs().max() <= 1e-15 * 4 * x.abs().max() * 4


@either
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_sample(backend, transpose, bad):
    bands, u = systems(2, 2, n=21)
    b = product(bands, TRIDIAGONAL, u, transpose)
    b[0, 1, :, 7] = bad
    x = dominant_solve(bands, TRIDIAGONAL, b, transpose)
    assert not x[0, 1].isfinite().all()
    x[0, 1] = u[0, 1]
    assert_close([x], [u], 1e-11)


def test_inputs_stay_as_they_are(backend):
    bands, u = systems(2, n=21)
    copies = bands.clone(), u.clone()
    dominant_solve(bands, TRIDIAGONAL, u, True)
    assert torch.equal(bands, copies[0]) and torch.equal(u, copies[1])


@either
@pytest.mark.parametrize("size", [1e-307, 1e307])
def test_numbers_near_the_end_of_the_range(backend, transpose, size):
    """Their reciprocals have no digits left."""
    bands, u = systems(2, n=21)
    b = product(bands, TRIDIAGONAL, u, transpose)
    assert_close([dominant_solve(bands * size, TRIDIAGONAL, b * size, transpose)], [u], 1e-11)
