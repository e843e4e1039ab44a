"""The Jacobian of a whole batch: right-hand sides of one sample are solved there alone, and no others are taken for such."""

import pytest
import torch
from helpers import assert_close
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

import functorch_inverse as fi
from functorch_inverse._blocks import by_blocks

SAMPLES, N = 6, 3
JACOBIANS = pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
torch.manual_seed(0)
A = torch.randn(N, N, dtype=torch.float64) / 3


def f(y, scale=1.0):
    return 2 * y + scale * torch.tanh(y @ A.to(y.dtype).T)


def J_f(y):
    return 2 * torch.eye(N, dtype=y.dtype) + (1 - torch.tanh(y @ A.T) ** 2)[..., None] * A


def drawn(*batch, dtype=torch.float64, n=N):
    return torch.randn(*batch, n, dtype=dtype, generator=torch.Generator().manual_seed(1))


def looked_up(y, **options):
    return fi.custom_inverse(lambda x: y.clone(), f, event_dim=1, **options)


def whole(blocks):
    """(*batch, n, m) to (*batch, n, *batch, m), zero between samples."""
    batch, (n, m) = blocks.shape[:-2], blocks.shape[-2:]
    result = blocks.new_zeros(batch.numel(), n, batch.numel(), m)
    for i, block in enumerate(blocks.reshape(-1, n, m)):
        result[i, :, i] = block
    return result.reshape(*batch, n, *batch, m)


@JACOBIANS
@pytest.mark.parametrize("batch", [(SAMPLES,), (2, 4), (1,), (3,), (4, 1)])
def test_the_jacobian_of_a_whole_batch(jacobian, batch):
    y = drawn(*batch)
    assert_close(jacobian(looked_up(y))(f(y)), whole(torch.linalg.inv(J_f(y))))


@JACOBIANS
def test_an_empty_batch(jacobian):
    assert jacobian(looked_up(drawn(0)))(drawn(0)).shape == (0, N, 0, N)


@JACOBIANS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 4])
def test_other_precisions(jacobian, dtype, n):
    """Of three numbers, two do not fit into eight bytes; of four they do."""
    matrix = 2 * torch.eye(n) + torch.arange(n * n).reshape(n, n) / 16
    y = drawn(SAMPLES, dtype=dtype, n=n)
    g = fi.custom_inverse(lambda x: y.clone(), lambda y: y @ matrix.to(y.dtype).T, event_dim=1)
    found = jacobian(g)(y)
    assert found.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps
    want = whole(torch.linalg.inv(matrix.double()).expand(SAMPLES, n, n))
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)
    assert not (found.double() - want)[want == 0].any()


@JACOBIANS
def test_in_chunks_and_at_strides(jacobian):
    y = drawn(SAMPLES)
    want = whole(torch.linalg.inv(J_f(y)))
    for options in ({"chunk_size": 2 * N}, {"chunk_size": 5}) if jacobian is jacrev else ({"randomness": "same"},):
        assert_close(jacobian(looked_up(y), **options)(f(y)), want)
    strided = f(y).T.contiguous().T
    assert_close(jacobian(looked_up(y))(strided), want)


@JACOBIANS
def test_what_comes_before_and_after(jacobian):
    """The cotangents are then no units, and may have numbers in other samples."""
    y = drawn(SAMPLES)
    g, inverses = looked_up(y), torch.linalg.inv(J_f(y))
    assert_close(jacobian(lambda x: torch.sin(g(x)))(f(y)), whole(torch.cos(y)[..., None] * inverses))
    mixed = jacobian(lambda x: g(x).cumsum(0))(f(y))
    assert_close(mixed, whole(inverses).cumsum(0))
    assert_close(jacobian(lambda x: g(x.flip(0)))(f(y).flip(0)), whole(inverses).flip(2))


@JACOBIANS
def test_second_derivatives(jacobian):
    """d^2 y = -A^-1 f''[dy, dy], by differences of the first."""
    y, step = drawn(4), 1e-6
    direction = drawn(4).roll(1, 0)
    g = fi.invert(f, event_dim=1)

    def first(x):
        return jacobian(g)(x)

    x = f(y)
    _, change = jvp(first, (x,), (direction,))
    differences = (first(x + step * direction) - first(x - step * direction)) / (2 * step)
    torch.testing.assert_close(change, differences, rtol=1e-6, atol=1e-7)
    _, pull = vjp(first, x)
    v = torch.randn_like(differences)
    torch.testing.assert_close((pull(v)[0] * direction).sum(), (v * differences).sum(), rtol=1e-6, atol=1e-7)


# --- what is taken for blocks ----------------------------------------------------------------------


def units(samples, n=N, dtype=torch.float64):
    return torch.eye(samples * n, dtype=dtype).reshape(-1, samples, n)


class Counting:
    """Each sample's rows times its own matrix."""

    def __init__(self, matrices):
        self.matrices, self.columns = matrices, []

    def __call__(self, rows):
        self.columns.append(len(rows))
        return torch.einsum("kbn,bnm->kbm", rows, self.matrices.to(rows.dtype))


@pytest.fixture
def solve():
    return Counting(drawn(SAMPLES * N).reshape(SAMPLES, N, N) + 2)


def solved(solve, rows):
    with torch.no_grad():
        return by_blocks(solve, rows)


def test_where_somebody_differentiates_nothing_is_taken_apart(solve):
    rows = units(SAMPLES).requires_grad_()
    assert_close(by_blocks(solve, rows), solve(rows))
    assert solve.columns == [len(rows)] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_units_are_solved_in_their_own_samples(solve, dtype):
    rows = units(SAMPLES, dtype=dtype)
    found = solved(solve, rows)
    assert solve.columns == [N]
    assert_close(found, solve(rows))


@pytest.mark.parametrize("value", [1.0, 5e-324, 1e-200, float("nan"), float("inf")])
def test_one_number_in_another_sample_is_never_lost(solve, value):
    for k in range(SAMPLES * N):
        for sample in {0, 1, SAMPLES - 1} - {k // N}:
            rows = units(SAMPLES)
            rows[k, sample, k % N] = value
            found = solved(solve, rows)
            torch.testing.assert_close(found, solve(rows), rtol=0, atol=0, equal_nan=True)
            assert found[k, sample].abs().amax() > 0 or value != value


def test_numbers_that_cancel_are_seen(solve):
    rows = units(SAMPLES)
    rows[0, 1, :2] = torch.tensor([1.0, -1.0])
    rows[-1, 0, :2] = torch.tensor([1.0, -1.0])
    rows[-1, 0, 2] = 0.0
    assert_close(solved(solve, rows), solve(rows))
    moved = units(SAMPLES)
    moved[1], moved[-1] = moved[-1].clone(), moved[1].clone()  # as many numbers as before, elsewhere
    assert_close(solved(solve, moved), solve(moved))
    assert solve.columns[-2:] == [len(rows)] * 2


def test_odd_places_in_memory(solve):
    memory = torch.zeros(1 + SAMPLES * N * SAMPLES * 4, dtype=torch.float32)
    rows = memory[1:].view(SAMPLES * N, SAMPLES, 4)
    rows[..., :N] = units(SAMPLES, dtype=torch.float32)
    square = Counting(torch.randn(SAMPLES, 4, 4))
    assert_close(solved(square, rows), square(rows))
    assert square.columns[0] == N
    for other in (units(SAMPLES).mT.contiguous().mT, units(SAMPLES).flip(0), units(SAMPLES)[1:]):
        assert_close(solved(solve, other), solve(other))


def test_blocks_of_numbers(solve):
    """Not only units: any numbers in a sample's own right-hand sides, zeros among them."""
    rows = torch.zeros(SAMPLES, 7, SAMPLES, N, dtype=torch.float64)
    for i in range(SAMPLES):
        rows[i, :, i] = torch.randn(7, N, dtype=torch.float64)
    rows[2] = 0
    rows = rows.flatten(0, 1)
    assert_close(solved(solve, rows), solve(rows))
    assert solve.columns[0] == 7


def test_nan_of_a_factor_reaches_what_it_reached_before(solve):
    solve.matrices[1] = torch.nan
    rows = units(SAMPLES)
    found = solved(solve, rows)
    torch.testing.assert_close(found, solve(rows), rtol=0, atol=0, equal_nan=True)
    assert found[:, 1].isnan().all() and found[:, [0, 2, 3, 4, 5]].isfinite().all()


# --- singular samples ------------------------------------------------------------------------------


def folded(y):
    return y**2


@JACOBIANS
def test_a_singular_sample_is_named(jacobian):
    y = drawn(SAMPLES)
    y[3, 1] = 0
    g = fi.custom_inverse(lambda x: y.clone(), folded, event_dim=1)
    with pytest.raises(fi.SingularJacobianError, match=r"1 of 6 samples .*: 3"):
        jacobian(g)(y**2)


@JACOBIANS
def test_a_singular_sample_leaves_the_others_right(jacobian):
    y = drawn(SAMPLES)
    y[3, 1] = 0
    solver = fi.LU(on_singular="nan")
    found = jacobian(fi.custom_inverse(lambda x: y.clone(), folded, event_dim=1, linear_solver=solver))(y**2)
    others = [0, 1, 2, 4, 5]
    assert found[3, :, 3].isnan().all()
    want = whole(torch.diag_embed(1 / (2 * y)))
    assert_close(found[others][:, :, others], want[others][:, :, others])


@JACOBIANS
def test_beneath_another_vmap(jacobian):
    y = drawn(2, 5)
    scale = torch.tensor([0.5, 1.5], dtype=torch.float64)
    g = fi.custom_inverse(lambda x, s, y: y.clone(), lambda y, s, _: f(y, s), event_dim=1)
    x = f(y, scale[:, None, None])
    found = vmap(jacobian(g))(x, scale, y)
    for i in range(2):
        tanh = torch.tanh(y[i] @ A.T)
        A_i = 2 * torch.eye(N, dtype=torch.float64) + scale[i] * (1 - tanh**2)[..., None] * A
        assert_close(found[i], whole(torch.linalg.inv(A_i)))


@JACOBIANS
def test_other_solvers(jacobian):
    y = drawn(SAMPLES)
    lower = torch.tril(A) + 2 * torch.eye(N, dtype=A.dtype)
    g = fi.custom_inverse(lambda x: y.clone(), lambda y: y @ lower.T, event_dim=1, linear_solver=fi.Triangular(lower=True))
    assert_close(jacobian(g)(y @ lower.T), whole(torch.linalg.inv(lower).expand(SAMPLES, N, N)))
    wide = torch.cat([lower, A[:, :1]], 1)
    z = drawn(SAMPLES, n=N + 1)
    g = fi.custom_inverse(lambda x: z.clone(), lambda y: y @ wide.T, event_dim=1, linear_solver=fi.LeastSquares())
    found, inverse = jacobian(g)(z @ wide.T), torch.linalg.pinv(wide)
    assert found.shape == (SAMPLES, N + 1, SAMPLES, N)
    for i in range(SAMPLES):
        assert_close(found[i, :, i], inverse)
    assert torch.count_nonzero(found) <= SAMPLES * inverse.numel()
