"""Banded systems: values and derivatives against the dense inverse, both backends, every nesting, singular samples."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fresh import run_fresh
from helpers import assert_close, live, total
from problems import DEVICE, Draw
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functorch_inverse as fi
from functorch_inverse import _lapack
from functorch_inverse._bands import Width, inside, outer, product, transposed
from functorch_inverse._reduction import reduced_log_abs_det, reduced_solve
from functorch_inverse.banded import BandedFactors
from functorch_inverse.errors import SingularJacobianError, StructureError

float64 = {"dtype": torch.float64, "device": DEVICE}
WIDTHS = [(0, 0), (1, 1), (0, 2), (2, 0), (1, 3), (3, 2)]
BATCHES = [(), (1,), (4,), (2, 3)]
MODES = {"rev": jacrev, "fwd": jacfwd}

either = pytest.mark.parametrize("transpose", [False, True])
every_width = pytest.mark.parametrize(("lower", "upper"), WIDTHS)


@pytest.fixture(params=["LAPACK", "torch"])
def backend(request, monkeypatch):
    """As with SciPy, and as without."""
    if request.param == "torch":
        monkeypatch.setattr(_lapack, "_lapack", lambda: None)
    else:
        pytest.importorskip("scipy")
    return request.param


def systems(*batch, n=5, lower=1, upper=1, dtype=torch.float64, seed=0):
    """A well-conditioned banded A, compressed, with noise at the places outside; b."""
    draw = Draw(seed)
    bands, b = draw.normal(*batch, lower + upper + 1, n), draw.normal(*batch, n)
    if dtype.is_complex:
        bands, b = draw.complex(*batch, lower + upper + 1, n), draw.complex(*batch, n)
    bands[..., upper, :] += lower + upper + 1
    return bands.to(dtype), b.to(dtype)


def dominant(bands, upper=1):
    """With a diagonal that outweighs its column."""
    bands = bands.clone()
    bands[..., upper, :] += 2 * bands.abs().sum(-2)
    return bands


def dense(bands, lower, upper):
    """By its definition: bands[..., upper + i - j, j] = A[i, j]."""
    n = bands.shape[-1]
    i, j = torch.arange(n, device=bands.device).unsqueeze(-1), torch.arange(n, device=bands.device)
    row = (upper + i - j).clamp(0, lower + upper)
    picked = bands[..., row, j.expand(n, n)]
    return torch.where((i - j <= lower) & (j - i <= upper), picked, 0)


def solve(lower=1, upper=1, transpose=False):
    return lambda bands, b: BandedFactors.of(bands, lower, upper).solve(b, transpose=transpose)


def exact(lower=1, upper=1, transpose=False):
    """By the inverse, which torch differentiates rightly in every nesting."""

    def function(bands, b):
        inverse = torch.linalg.inv(dense(bands, lower, upper))
        return ((inverse.mT if transpose else inverse) @ b.unsqueeze(-1)).squeeze(-1)

    return function


def log_abs_det(lower=1, upper=1):
    return lambda bands: BandedFactors.of(bands, lower, upper).log_abs_det()


def exact_log_abs_det(lower=1, upper=1):
    """By elimination without pivots, row after row."""

    def function(bands):
        A, result = dense(bands, lower, upper), 0
        while A.shape[-1]:
            result = result + A[..., 0, 0].abs().log()
            A = A[..., 1:, 1:] - A[..., 1:, :1] * A[..., :1, 1:] / A[..., :1, :1]
        return result

    return function


# --- values ----------------------------------------------------------------------------------------


@either
@every_width
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 17])
def test_values(backend, transpose, lower, upper, batch, n):
    bands, b = systems(*batch, n=n, lower=lower, upper=upper)
    assert_close([solve(lower, upper, transpose)(bands, b)], [exact(lower, upper, transpose)(bands, b)])
    assert_close([log_abs_det(lower, upper)(bands)], [exact_log_abs_det(lower, upper)(bands)])


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
@pytest.mark.parametrize(("lower", "upper"), [(1, 1), (1, 2)])
def test_dtypes(backend, transpose, dtype, lower, upper):
    bands, b = systems(2, n=9, lower=lower, upper=upper, dtype=dtype)
    got = [solve(lower, upper, transpose)(bands, b), log_abs_det(lower, upper)(bands)]
    want = [exact(lower, upper, transpose)(bands, b), exact_log_abs_det(lower, upper)(bands)]
    assert_close(got, want, 1e-9 if dtype == torch.complex128 else 2e-5)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3, 4), (0, 3, 0), (2, 3, 0)])
def test_nothing_to_solve(backend, shape):
    bands = torch.zeros(shape, **float64, requires_grad=True)
    b = torch.zeros(*shape[:-2], shape[-1], **float64, requires_grad=True)
    factors = BandedFactors.of(bands, 1, 1)
    x, log = factors.solve(b), factors.log_abs_det()
    assert x.shape == b.shape and log.shape == shape[:-2] and (log == 0).all()
    assert torch.autograd.grad(x.sum() + log.sum(), bands)[0].shape == shape


@either
@pytest.mark.parametrize("n", [200, 401])
def test_zero_pivots_are_no_obstacle(backend, transpose, n):
    """Nothing on the diagonal, where every scheme that does not exchange equations divides by zero."""
    bands, b = systems(2, n=2 * (n // 2))
    bands[..., 1, :] = 0
    bands[..., 0, 1::2] += 3
    bands[..., 2, 0::2] += 3
    assert_close([solve(1, 1, transpose)(bands, b)], [exact(1, 1, transpose)(bands, b)])


@either
@every_width
def test_random_bands_have_small_residuals(backend, transpose, lower, upper):
    """Not dominant, often ill-conditioned: what can be asked for is a small residual, as of LAPACK."""
    bands, b = systems(40, n=60, lower=lower, upper=upper)
    bands[..., upper, :] -= lower + upper + 1
    A = dense(bands, lower, upper)
    A = A.mT if transpose else A
    x = BandedFactors.of(bands, lower, upper, "nan").solve(b, transpose=transpose)
    residual = ((A @ x.unsqueeze(-1)).squeeze(-1) - b).abs().amax(-1)
    kept = ~x.isnan().any(-1)
    assert kept.any() and (residual <= 1e-13 * (A.abs().sum(-1).amax(-1) * x.abs().amax(-1)))[kept].all()


@pytest.mark.parametrize("exponent", [-4, 4, -100, 100])
def test_scaled_rows(backend, exponent):
    """Bad pivots, such as LAPACK then chooses, lose digits; the verdict that A has an inverse stays."""
    bands, b = systems(n=12)
    scale = 10.0 ** (exponent * torch.rand(12, **float64))
    A = scale.unsqueeze(-1) * dense(bands, 1, 1)
    scaled = torch.stack([torch.cat([r, r.new_zeros(abs(o))]) if o >= 0 else torch.cat([r.new_zeros(-o), r])
                          for o, r in ((-1, A.diagonal(1)), (0, A.diagonal()), (1, A.diagonal(-1)))])  # fmt: skip
    assert_close([solve()(scaled, scale * b)], [exact()(bands, b)], 1e-9 if backend == "torch" or abs(exponent) < 10 else 1e-3)


# --- dominant matrices, which are solved from their bands ------------------------------------------


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize(("lower", "upper"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("n", [1, 3, 16])
def test_dominant(backend, transpose, dtype, lower, upper, batch, n):
    bands, b = systems(*batch, n=n, lower=lower, upper=upper, dtype=dtype)
    bands = dominant(bands, upper)
    got = [solve(lower, upper, transpose)(bands, b), log_abs_det(lower, upper)(bands)]
    want = [exact(lower, upper, transpose)(bands, b), exact_log_abs_det(lower, upper)(bands)]
    assert_close(got, want, 1e-11 if dtype in (torch.float64, torch.complex128) else 2e-5)


@either
@pytest.mark.parametrize("modes", [m for k in (1, 2) for m in itertools.product(MODES, repeat=k)], ids="_".join)
def test_every_nesting_of_dominant(backend, transpose, modes):
    bands, b = systems(2, n=3)
    bands = dominant(bands)

    def derivative(f, log):
        h = lambda bands, b: total((f(1, 1, transpose)(bands, b), log()(bands)))  # noqa: E731
        for mode in reversed(modes):
            h = MODES[mode](h, (0, 1))
        return h(bands, b), vmap(h, (0, 0))(bands, b), vmap(h, (None, 0))(bands[0], b)

    for got, want in zip(derivative(solve, log_abs_det), derivative(exact, exact_log_abs_det), strict=True):
        assert_close(got, want)


@either
def test_dominant_with_cotangents_in_batches(backend, transpose):
    """is_grads_batched does not ask a Function for its rule."""
    bands, b = systems(2, n=4)

    def rows(f):
        inputs = live((dominant(bands), b))
        out = f(1, 1, transpose)(*inputs)
        return torch.autograd.grad(out, inputs, torch.stack([out.detach().sin(), out.detach().cos()]), is_grads_batched=True)

    assert_close(rows(solve), rows(exact))


@either
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_sample_of_dominant(backend, transpose, bad):
    bands, b = systems(2, 2, n=6)
    bands = dominant(bands)
    want = exact(1, 1, transpose)(bands, b)
    b[0, 1, 2] = bad
    got = BandedFactors.of(bands, 1, 1).solve(b, transpose=transpose)
    assert not got[0, 1].isfinite().all()
    got[0, 1] = want[0, 1]
    assert_close([got], [want])


@either
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_nan_of_a_dominant_matrix_stays_in_its_sample(backend, transpose, bad, row):
    bands, b = systems(3, n=6)
    bands = dominant(bands)
    want = exact(1, 1, transpose)(bands, b)
    bands[1, row, 3] = bad
    factors = BandedFactors.of(bands, 1, 1)
    got, log = factors.solve(b, transpose=transpose), factors.log_abs_det()
    assert got[1].isnan().all() and log[1].isnan() and log[::2].isfinite().all()
    assert_close([got[::2]], [want[::2]])


def test_what_is_not_contiguous(backend):
    bands, b = systems(3, n=6)
    bands = dominant(bands)
    want = exact()(bands, b)
    assert_close([solve()(bands.mT.contiguous().mT, b.mT.contiguous().mT)], [want])
    assert_close([solve()(bands.flip(0), b.flip(0)).flip(0)], [want])


# --- the compressed form ---------------------------------------------------------------------------


@every_width
@pytest.mark.parametrize("n", [4, 9])
def test_products_and_transposes(lower, upper, n):
    width = Width(lower, upper)
    bands = inside(systems(2, n=n, lower=lower, upper=upper)[0], width)
    A, x, u = dense(bands, lower, upper), Draw(1).normal(2, 3, n), Draw(2).normal(2, 3, n)
    assert_close([product(bands, width, x, False), product(bands, width, x, True)], [x @ A.mT, x @ A])
    assert_close([dense(transposed(bands, width), upper, lower)], [A.mT])
    inside_band = dense(torch.ones_like(bands), lower, upper)
    assert_close([dense(outer(u, x, width), lower, upper)], [inside_band * (u.mT @ x)])


def test_places_outside_the_matrix_are_ignored(backend):
    bands, b = systems(n=4, lower=2, upper=1)
    outside = inside(torch.ones_like(bands), Width(2, 1)) == 0
    spoiled = bands.masked_fill(outside, torch.nan).requires_grad_()
    factors = BandedFactors.of(spoiled, 2, 1)
    x = factors.solve(b)
    assert_close([x.detach()], [exact(2, 1)(bands, b)])
    gradient = torch.autograd.grad(x.sum() + factors.solve(b, transpose=True).sum() + factors.log_abs_det(), spoiled)[0]
    assert (gradient[outside] == 0).all() and gradient.isfinite().all()


# --- derivatives -----------------------------------------------------------------------------------


@either
@pytest.mark.parametrize("batch", [(), (2, 2)])
@pytest.mark.parametrize("modes", [m for k in (1, 2, 3) for m in itertools.product(MODES, repeat=k)], ids="_".join)
def test_every_nesting(backend, transpose, batch, modes):
    """Along lines through the bands and b, so that the third order stays small."""
    bands, b = systems(*batch, n=3)

    def derivative(function):
        h = lambda s, t: total((function(bands + s * bands.sin() + t * bands.cos(), b + s * b.sin() + t * b.cos()),))  # noqa: E731
        for mode in reversed(modes):
            h = MODES[mode](h, (0, 1))
        return h(bands.new_tensor(0.1), bands.new_tensor(0.2))

    assert_close(derivative(solve(1, 1, transpose)), derivative(exact(1, 1, transpose)))


@pytest.mark.parametrize("batch", [(), (4,)])
@pytest.mark.parametrize("modes", [m for k in (1, 2, 3) for m in itertools.product(MODES, repeat=k)], ids="_".join)
def test_every_nesting_of_the_determinant(backend, batch, modes):
    bands = systems(*batch, n=4, lower=1, upper=2)[0]

    def derivative(function):
        h = lambda s, t: total((function(bands + s * bands.sin() + t * bands.cos()),))  # noqa: E731
        for mode in reversed(modes):
            h = MODES[mode](h, (0, 1))
        return h(bands.new_tensor(0.1), bands.new_tensor(0.2))

    assert_close(derivative(log_abs_det(1, 2)), derivative(exact_log_abs_det(1, 2)))


@either
@pytest.mark.parametrize("modes", [m for k in (1, 2) for m in itertools.product(MODES, repeat=k)], ids="_".join)
@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, -1)])
def test_vmap_of_every_nesting(backend, transpose, modes, dims):
    bands, b = systems(3, n=3)
    inputs = [t.movedim(0, d) if d is not None else t[0] for t, d in zip((bands, b), dims, strict=True)]

    def derivative(function):
        for mode in reversed(modes):
            function = MODES[mode](function, (0, 1))
        return vmap(function, dims)(*inputs)

    assert_close(derivative(solve(1, 1, transpose)), derivative(exact(1, 1, transpose)))


@pytest.mark.parametrize("modes", [m for k in (1, 2) for m in itertools.product(MODES, repeat=k)], ids="_".join)
@pytest.mark.parametrize("dim", [0, -1])
def test_vmap_of_every_nesting_of_the_determinant(backend, modes, dim):
    bands = systems(3, n=3)[0].movedim(0, dim)

    def derivative(function):
        for mode in reversed(modes):
            function = MODES[mode](function)
        return vmap(function, dim)(bands)

    assert_close(derivative(log_abs_det()), derivative(exact_log_abs_det()))


@either
@every_width
def test_whole_jacobians(backend, transpose, lower, upper):
    bands, b = systems(2, n=5, lower=lower, upper=upper)
    for mode in MODES.values():
        got, want = (mode(f(lower, upper, transpose), (0, 1))(bands, b) for f in (solve, exact))
        assert_close(got, want)
    assert_close(jacrev(log_abs_det(lower, upper))(bands), jacrev(exact_log_abs_det(lower, upper))(bands))


@either
@pytest.mark.parametrize(("bands_batch", "b_batch"), [((3,), (3, 2)), ((3, 2), (3,)), ((), (3, 2))])
def test_factors_meet_right_hand_sides_of_another_batch_shape(backend, transpose, bands_batch, b_batch):
    bands, b = systems(*bands_batch)[0], systems(*b_batch)[1]
    both = [vmap(f(1, 1, transpose), (0 if bands_batch else None, 0)) for f in (solve, exact)]
    if len(bands_batch) != len(b_batch):
        both = [vmap(f, (1 if len(bands_batch) > 1 else None, 1 if len(b_batch) > 1 else None)) for f in both]
    assert_close([both[0](bands, b)], [both[1](bands, b)])


@either
def test_many_right_hand_sides_nested(backend, transpose):
    bands, bs = systems()[0], systems(2, 3)[1]
    h = lambda f: vmap(vmap(jacrev(f(1, 1, transpose), (0, 1)), (None, 0)), (None, 0))(bands, bs)  # noqa: E731
    assert_close(h(solve), h(exact))


def test_many_cotangents_are_columns_of_one_solve(monkeypatch):
    """jacrev with respect to b alone: two calls of LAPACK, one of them with all rows of the Jacobian."""
    pytest.importorskip("scipy")
    shapes, real = [], _lapack._columns
    monkeypatch.setattr(_lapack, "_columns", lambda b: shapes.append(b.shape) or real(b))
    bands, b = systems(n=6)
    factors = BandedFactors.of(bands, 1, 1)
    jacrev(factors.solve)(b)
    assert shapes == [(1, 6), (6, 6)]


def test_a_batch_is_one_call(monkeypatch):
    pytest.importorskip("scipy")
    shapes, real = [], _lapack._columns
    monkeypatch.setattr(_lapack, "_columns", lambda b: shapes.append(b.shape[:-2]) or real(b))
    bands, b = systems(7, 9)
    vmap(vmap(solve()))(bands, b)
    assert shapes == [(7, 9)] * 2, "one to see whether A is singular, one to solve"
    shapes.clear()
    vmap(vmap(solve()))(dominant(bands), b)
    assert shapes == [(7, 9)], "nothing to see where A is dominant"


@either
def test_plain_autograd_to_the_third_order(backend, transpose):
    def derivative(f, log):
        bands, b = live(systems(2, n=4))
        out = total((f(1, 1, transpose)(bands, b), log()(bands)))
        for _ in range(2):
            out = total(torch.autograd.grad(out, (bands, b), create_graph=True))
        return torch.autograd.grad(out, (bands, b))

    assert_close(derivative(solve, log_abs_det), derivative(exact, exact_log_abs_det))


@pytest.mark.parametrize("of", [solve(1, 2), solve(1, 2, True), lambda bands, b: log_abs_det(1, 2)(bands)])
def test_gradcheck(backend, of):
    inputs = live(systems(n=3, lower=1, upper=2))
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(of, inputs, **options)
    assert torch.autograd.gradgradcheck(of, inputs, check_fwd_over_rev=True)


@either
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_the_other_vmap_of_torch(backend, transpose, strategy):
    """is_grads_batched and torch.autograd.functional do not ask a Function for its rule."""
    bands, b = systems(2, n=4)

    def value(f, log):
        return lambda bands, b: total((f(1, 1, transpose)(bands, b), log()(bands)))

    options = {"vectorize": True, "outer_jacobian_strategy": strategy}
    got = torch.autograd.functional.hessian(value(solve, log_abs_det), (bands, b), **options)
    assert_close(tuple(map(tuple, got)), hessian(value(exact, exact_log_abs_det), (0, 1))(bands, b))


@either
def test_complex_derivatives(backend, transpose):
    bands, b = systems(2, n=4, dtype=torch.complex128)

    def derivative(f, log):
        inputs = live((bands, b))
        out = f(1, 1, transpose)(*inputs)
        return torch.autograd.grad((out * out.conj()).real.sum() + out.imag.sum() + log()(inputs[0]).sin().sum(), inputs)

    assert_close(derivative(solve, log_abs_det), derivative(exact, exact_log_abs_det))
    tangents = (bands.cos(), b.cos())
    got, want = (torch.func.jvp(f(1, 1, transpose), (bands, b), tangents) for f in (solve, exact))
    assert_close(got, want)


def test_both_backends_agree_where_n_is_large():
    pytest.importorskip("scipy")
    bands, b = systems(n=20_000, lower=2, upper=1)
    bands = inside(bands, Width(2, 1))
    for transpose in (False, True):
        got = solve(2, 1, transpose)(bands, b)
        assert_close([got], [reduced_solve(bands, Width(2, 1), b.unsqueeze(-2), transpose).squeeze(-2)])
    assert_close([log_abs_det(2, 1)(bands)], [reduced_log_abs_det(bands, Width(2, 1))])


def test_the_gradient_of_the_determinant_where_n_is_large():
    """Tr(A^-1 dA), in a direction, by a difference quotient."""
    bands = inside(systems(n=3000, lower=2, upper=2)[0], Width(2, 2))
    along = inside(bands.cos(), Width(2, 2))
    log, h = log_abs_det(2, 2), 1e-5
    slope = (log(bands + h * along) - log(bands - h * along)) / (2 * h)
    torch.testing.assert_close((grad(log)(bands) * along).sum(), slope, rtol=1e-7, atol=0)


# --- singular, nan, wrong --------------------------------------------------------------------------


def neumann(n):
    """Second differences without a boundary value: constants are mapped to zero."""
    bands = torch.tensor([-1.0, 2, -1], **float64).unsqueeze(-1).repeat(1, n)
    bands[1, 0] = bands[1, -1] = 1
    return bands


SINGULAR = {
    "zero": lambda n: torch.zeros(3, n, **float64),
    "zero column": lambda n: systems(n=n)[0] * (torch.arange(n, device=DEVICE) != n // 2),
    "neumann": neumann,
}


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("n", [3, 8, 100, 5000])
def test_singular_samples_are_named(backend, kind, n):
    bands, b = systems(2, 2, n=n)
    bands[1, 0] = SINGULAR[kind](n)
    with pytest.raises(SingularJacobianError, match=r"singular in 1 of 4 samples \(.*: 2\)"):
        BandedFactors.of(bands, 1, 1)
    with pytest.raises(SingularJacobianError, match=r"in 1 of 4 samples \(.*: 1\)"):
        vmap(solve(), 1)(bands, b.mT if b.ndim == 2 else b.movedim(0, 1))
    factors = BandedFactors.of(bands, 1, 1, on_singular="nan")
    good = torch.tensor([[True, True], [False, True]], device=DEVICE)
    for got in (factors.solve(b), factors.solve(b, transpose=True), factors.log_abs_det().unsqueeze(-1)):
        assert got[~good].isnan().all() and got[good].isfinite().all()
    if n <= 100:
        assert_close([factors.solve(b)[good]], [exact()(bands[good], b[good])])


@pytest.mark.parametrize("n", [100, 10_000])
def test_ill_conditioned_is_not_singular(backend, n):
    """The condition number of second differences is n^2."""
    bands = neumann(n)
    bands[1, 0] = bands[1, -1] = 2
    ones = torch.ones(n, **float64)
    x = BandedFactors.of(bands, 1, 1).solve(inside_product(bands, ones))
    torch.testing.assert_close(x, ones, rtol=0, atol=n * n * 1e-15)
    scale = 10.0 ** torch.linspace(-30, 30, n, **float64)
    BandedFactors.of(bands * scale, 1, 1)


def inside_product(bands, x):
    return product(inside(bands, Width(1, 1)), Width(1, 1), x.unsqueeze(-2), False).squeeze(-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e308])
@pytest.mark.parametrize("place", ["bands", "b"])
def test_nan_stays_in_its_sample(backend, bad, place):
    bands, b = systems(4)
    want = exact()(bands, b)
    (bands[1, 1] if place == "bands" else b[1])[:] = bad
    if bad == 1e308 and place == "b":
        bands[1] *= 1e-3
    bands.requires_grad_()
    factors = BandedFactors.of(bands, 1, 1)
    good = torch.tensor([0, 2, 3], device=DEVICE)
    got = [factors.solve(b), factors.solve(b, transpose=True)]
    if bad != 1e308:
        assert all(t[1].isnan().any() for t in got)
    assert_close([got[0][good].detach()], [want[good]])
    gradient = torch.autograd.grad((got[0] + got[1]).sum() + factors.log_abs_det().sum(), bands)[0]
    assert gradient[good].isfinite().all()


@pytest.mark.parametrize(("shape", "lower", "upper"), [((2, 5), 1, 1), ((5,), 1, 1), ((3, 5), -1, 3), ((4, 5), 1, 1)], ids=str)
def test_bands_of_a_wrong_shape(shape, lower, upper):
    with pytest.raises(StructureError, match=r"lower=.*upper=.*need"):
        BandedFactors.of(torch.ones(shape, **float64), lower, upper)


def test_wrong_dtypes_and_options():
    bands, b = systems()
    with pytest.raises(StructureError, match="int64"):
        BandedFactors.of(torch.ones(3, 5, dtype=torch.int64), 1, 1)
    with pytest.raises(StructureError, match="float16"):
        BandedFactors.of(bands.half(), 1, 1)
    with pytest.raises(ValueError, match="'raise' or 'nan'"):
        BandedFactors.of(bands, 1, 1, on_singular="warn")
    factors = BandedFactors.of(bands, 1, 1)
    for wrong in (b[:4], b.unsqueeze(0), b.float()):
        with pytest.raises(StructureError, match=r"the factors need \(5,\) and torch.float64"):
            factors.solve(wrong)


@either
def test_a_wrong_transpose_is_caught(transpose):
    """Planted: the tests above see which of A and A^T was used, in values and in derivatives."""
    bands, b = systems(n=4)
    for of in (lambda f: f, lambda f: jacrev(f, (0, 1)), lambda f: jacfwd(f, 1)):
        with pytest.raises(AssertionError):
            assert_close(of(solve(1, 1, transpose))(bands, b), of(exact(1, 1, not transpose))(bands, b))


# --- traces ----------------------------------------------------------------------------------------


def compiled():
    """One merge, one reduction at the root, and the transposed bands."""
    bands, b = systems(2, n=3)

    def value(f, log):
        return lambda bands, b: total((f(1, 1, True)(bands, b), log()(bands)))

    got = torch.compile(grad(value(solve, log_abs_det), (0, 1)), backend="aot_eager", fullgraph=True)(bands, b)
    assert_close(got, grad(value(exact, exact_log_abs_det), (0, 1))(bands, b))


def test_compile():
    run_fresh(compiled)


@pytest.mark.parametrize("hooks", ["hooks", "checkpoint"])
def test_under_saved_tensor_hooks(backend, hooks):
    """torch.func's reverse mode raises there, so no forward may use it."""
    bands, b = live(systems(2))
    value = lambda bands, b: total((solve()(bands, b), log_abs_det()(bands)))  # noqa: E731
    if hooks == "hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            out = value(bands, b)
    else:
        out = torch.utils.checkpoint.checkpoint(value, bands, b, use_reentrant=False)
    want = lambda bands, b: total((exact()(bands, b), exact_log_abs_det()(bands)))  # noqa: E731
    assert_close(torch.autograd.grad(out, (bands, b)), grad(want, (0, 1))(*(t.detach() for t in (bands, b))))


def test_reverse_mode_from_many_threads(backend):
    problems = [systems(3, n=6, seed=i) for i in range(8)]
    value = lambda f, log: lambda bands, b: total((f()(bands, b), log()(bands)))  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        inputs = [live(p) for p in problems]
        got = list(pool.map(lambda p: torch.autograd.grad(value(solve, log_abs_det)(*p), p), inputs))
    assert_close(got, [grad(value(exact, exact_log_abs_det), (0, 1))(*p) for p in problems])


def test_make_fx():
    bands, b = systems(2)
    traced = torch.fx.experimental.proxy_tensor.make_fx(solve())(bands, b)
    other = systems(2, seed=3)
    assert_close([traced(*other)], [exact()(*other)])


def test_hessians(backend):
    bands, b = systems(n=3)
    h = lambda f, log: hessian(lambda t: total((f()(t, b), log()(t))))(bands)  # noqa: E731
    assert_close(h(solve, log_abs_det), h(exact, exact_log_abs_det))


@pytest.mark.parametrize("on_singular", ["raise", "nan"])
def test_vmap_of_no_samples(on_singular):
    factored = lambda bands, b: BandedFactors.of(bands, 1, 1, on_singular).solve(b)  # noqa: E731
    assert vmap(factored)(torch.zeros(0, 3, 5), torch.zeros(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("widths", [(1, 1), (2, 1)])
@pytest.mark.parametrize(("dtype", "unit"), [("float32", 1e-9), ("float32", 1e9), ("float64", 1e-20), ("float64", 1e20)])
def test_units_of_equations_and_unknowns(widths, dtype, unit):
    """Pivots are chosen by size; a unit makes no number more reliable."""
    n, dtype = 40, getattr(torch, dtype)
    pad = torch.nn.functional.pad

    def base(u):
        return 4 * u + 0.5 * pad(u, (1, 0))[..., :-1] - 0.7 * pad(u, (0, 1))[..., 1:]

    A = torch.func.jacrev(base)(torch.zeros(n, dtype=torch.float64))
    b, v = (torch.linspace(-3, k, n, dtype=torch.float64).sin() for k in (20, 30))
    units = torch.ones(n, dtype=dtype)
    units[5], tolerance = unit, 50 * torch.finfo(dtype).eps
    solution, one = torch.linalg.solve(A, b), torch.tensor(1.0, dtype=dtype)
    h = fi.custom_root(
        lambda t: t * solution.to(dtype), lambda y, t: units * (base(y) - b.to(dtype) * t), linear_solver=fi.Banded(*widths)
    )
    assert_close([torch.func.jvp(h, (one,), (one,))[1].double()], [solution], tolerance)
    solver = fi.Banded(*widths)
    g = fi.custom_inverse(torch.zeros_like, lambda y: base(units * y), event_dim=1, linear_solver=solver)
    x = torch.zeros(n, dtype=dtype, requires_grad=True)
    (got,) = torch.autograd.grad(g(x) @ (v.to(dtype) * units), x)
    assert_close([got.double()], [torch.linalg.solve(A.mT, v)], tolerance)
    ladj = fi.log_abs_det_jacobian(lambda y: base(units * y), torch.zeros(n, dtype=dtype), linear_solver=solver)
    assert_close([ladj.double()], [torch.linalg.slogdet(A)[1] + units.double().log().sum()], tolerance)
    slope = torch.func.grad(lambda t: fi.log_abs_det_jacobian(lambda y: base(t * y), x.detach(), linear_solver=solver))
    assert_close([(slope(units) * units).double()], [torch.ones(n, dtype=torch.float64)], tolerance)
