"""Values alone: systems that contract move together, and what does not is left to those who watch each system."""

import warnings

import pytest
import torch
from helpers import assert_close
from problems import DEVICE, Draw
from test_krylov import GENERAL, exact, product, run, slowing, systems

from functorch_inverse import _krylov, _together
from functorch_inverse.errors import NotConvergedError
from functorch_inverse.krylov import GMRES

float64 = {"dtype": torch.float64, "device": DEVICE}
either_size = pytest.mark.parametrize("dear", [False, True])


@pytest.fixture
def alone(monkeypatch):
    """No system may be left to others."""
    monkeypatch.setattr(_krylov, "refine", lambda *_: pytest.fail("left to others"))


@pytest.fixture
def sizes(dear, monkeypatch):
    """Products that count for more than all else in a step, whatever their size."""
    if dear:
        monkeypatch.setattr(_together, "_DEAR", 0)


def contraction(*lead, n=30, c=1.0, spread=0.3, dtype=torch.float64, seed=0):
    """A = c (I + B) with |B| about `spread`, and b."""
    make = Draw(seed).complex if dtype.is_complex else Draw(seed).normal
    B, b = make(*lead, n, n) * spread / (4 * n) ** 0.5, make(*lead, n)
    return (c * (torch.eye(n, dtype=B.dtype, device=DEVICE) + B)).to(dtype), b.to(dtype)


class Counted:
    """A and how often it is applied, and b + u - A u if it is there."""

    def __init__(self, A):
        self.A, self.products = A, 0

    def mv(self, v):
        self.products += 1
        return product(self.A)(v)

    def ahead(self, b, u):
        return b + u - self.mv(u)

    def value(self, solver, b, *, ahead=True, **options):
        return solver.value(self.mv, b, ahead=self.ahead if ahead else None, **options)


def residuals(A, b, u):
    return (b - product(A)(u)).norm(dim=-1) / b.norm(dim=-1)


# --- what contracts ---------------------------------------------------------------------------------


@either_size
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("c", [1.0, 1.05, -2.5, 1e-4, 7e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_contractions(dtype, c, ahead, sizes, alone):
    """Each system has a true residual within the tolerance, for hardly more products than where each is watched."""
    for lead in [(), (7,), (2, 3), (1, 1)]:
        A, b = contraction(*lead, c=c, dtype=dtype)
        counted, rtol = Counted(A), 1e-10 if torch.finfo(dtype).eps < 1e-10 else 1e-6
        u = counted.value(GMRES(), b, ahead=ahead)
        assert u.shape == b.shape and u.dtype == dtype
        assert (residuals(A, b, u) <= 1.01 * rtol).all()
        wide = torch.complex128 if dtype.is_complex else torch.float64
        assert_close([u.to(wide)], [exact(A.to(wide), b.to(wide))], 1e-4 if rtol > 1e-8 else 1e-8)
        assert counted.products <= (16 if rtol < 1e-8 else 10)


def test_complex_multiples(alone):
    A, b = contraction(3, c=2 - 1j, dtype=torch.complex128)
    assert_close([Counted(A).value(GMRES(), b)], [exact(A, b)], 1e-8)


@either_size
@pytest.mark.parametrize("ahead", [False, True])
def test_a_multiple_of_one_needs_a_second_product_to_be_sure(ahead, sizes, alone):
    for c in (1.0, 3.0):
        b = Draw(1).normal(4, 9)
        counted = Counted(c * torch.eye(9, **float64))
        assert_close([counted.value(GMRES(), b, ahead=ahead)], [b / c], 1e-14)
        assert counted.products == 2


@pytest.mark.parametrize("transpose", [False, True])
def test_preconditioned(transpose, alone):
    """A M is a contraction where A is none; and `ahead`, which knows no M, is not asked."""
    A, b = contraction(4)
    scale = torch.logspace(0, 3, 30, **float64)
    A = scale[:, None] * A if transpose else A * scale
    M = torch.diag(1 / scale) + 0 * A
    solver, maps = GMRES(preconditioner=M), (product(A.mT if transpose else A), product(A if transpose else A.mT))
    u = solver.value(maps[0], b, transposed=maps[1], transpose=transpose, ahead=lambda b, u: pytest.fail("asked"))
    assert_close([u], [exact(A.mT if transpose else A, b)], 1e-7)


@pytest.mark.parametrize("ahead", [False, True])
def test_from_the_last_solution(ahead, alone):
    A, b = contraction(5)
    solver, counted = GMRES(warm_start=True), Counted(A)
    first = counted.value(solver, b, ahead=ahead)
    cold, counted.products = counted.products, 0
    again = counted.value(solver, b, ahead=ahead)
    assert_close([again], [first], 0)
    assert counted.products == 1
    solver = GMRES(warm_start=True)
    for taken in (counted.value(solver, b, ahead=ahead), counted.value(solver, b, ahead=ahead)):
        taken.zero_()  # what comes back is nobody else's
    near = b + 1e-6 * b.sin()
    counted.products = 0
    assert_close([counted.value(solver, near, ahead=ahead)], [exact(A, near)], 1e-8)
    assert counted.products < cold


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("exponent", [-300, -100, 100, 300])
def test_very_large_and_very_small_and_zero_right_hand_sides(exponent, ahead, alone):
    A, b = contraction(3)
    scales = torch.tensor([10.0**exponent, 1.0, 0.0], **float64)
    u = Counted(A).value(GMRES(), b * scales[:, None], ahead=ahead)
    assert_close([u[0] / 10.0**exponent, u[1]], [*exact(A, b)[:2]], 1e-8)
    assert (u[2] == 0).all()


def test_right_hand_sides_are_left_as_they_are(alone):
    A, b = contraction(3)
    for given in (b, b[:1].expand(3, 30), b.mT.contiguous().mT, torch.ones((), **float64).expand(3, 30)):
        kept = given.clone()
        u = Counted(A).value(GMRES(), given)
        assert_close([u], [exact(A, kept)], 1e-8)
        u.zero_()
        assert torch.equal(given, kept)


@pytest.mark.parametrize("solver", GENERAL)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_nothing_to_solve(solver, shape):
    assert solver().value(lambda v: v, torch.zeros(shape, **float64), transposed=lambda v: v).shape == shape


@pytest.mark.parametrize("solver", GENERAL)
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_the_value_of_a_run(solver, lead):
    """What does not contract is solved as ever; with the same products."""
    A, b = systems(solver, *lead, n=12)
    want = run(solver(), A, b)
    counted = Counted(A)
    got = counted.value(solver(), b, ahead=False, transposed=product(A.mT))
    assert torch.equal(got, want.value)
    if solver is GMRES:
        assert counted.products == want.steps.max() + 1


# --- what does not ----------------------------------------------------------------------------------


def chain(n, gains, start):
    """What contracts fast, and beside it a part that each step takes on by a gain of its own, and that is gone after them."""
    A, b = contraction(n=n, spread=0.1)
    m = len(gains) + 1
    A[:m], A[:, :m], b[:m] = 0, 0, 0
    A[:m, :m] = torch.eye(m, **float64) + torch.diag(torch.tensor(gains, **float64), -1)
    b[0] = start
    return A, b


UNEASY = {
    "slows down": lambda n: slowing(n, 1),
    "slow at first": lambda n: chain(n, [4] * 5, 1e-3),
    "slow later": lambda n: chain(n, [4] * 11, 1e-8),
    "runs away": lambda n: chain(n, [1] * 4 + [100] * 4, 1e-5),
    "does not begin": lambda n: (Draw(4).normal(n, n), Draw(5).normal(n)),
    "one direction": lambda n: (
        torch.diag(torch.cat([torch.tensor([40.0], **float64), torch.ones(n - 1, **float64)])),
        torch.cat([torch.tensor([1e-6], **float64), torch.ones(n - 1, **float64)]),
    ),
    "symmetric": lambda n: (torch.diag(torch.linspace(0.6, 1.4, n, **float64)), torch.ones(n, **float64)),
}


@either_size
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", UNEASY)
def test_systems_that_do_not_keep_pace(name, ahead, dear, sizes):
    """Alone, and beside others."""
    n = 40
    one = UNEASY[name](n)
    both = [torch.stack(t) for t in zip(one, contraction(n=n), strict=True)]
    for A, b in (one, both):
        counted, steps = Counted(A), int(run(GMRES(), A, b).steps.max())
        u = counted.value(GMRES(), b, ahead=ahead)
        assert (residuals(A, b, u) <= 1.01e-10).all()
        cheap = ahead and not dear
        assert counted.products <= (2 * steps if cheap else steps) + 10, "more only where they cost next to nothing"


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("turned", [1, 1j])
def test_symmetric_and_skew_systems_are_left_to_recurrences_where_products_are_dear(turned, ahead, monkeypatch):
    """Two look at it, and no more."""
    monkeypatch.setattr(_together, "_DEAR", 0)
    A = torch.diag_embed(1 + 0.3 * turned * torch.linspace(-1, 1, 40, **float64)).expand(3, 40, 40)
    b = Draw(6).normal(3, 40).to(A.dtype)
    counted = Counted(A)
    assert (residuals(A, b, counted.value(GMRES(), b, ahead=ahead)) <= 1.01e-10).all()
    assert counted.products <= run(GMRES(), A, b).steps.max() + 2


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name, kept", [("slow later", True), ("runs away", False)])
def test_what_is_reached_is_kept_where_it_is_good(name, kept, ahead, monkeypatch):
    """The true residual of it is what the others begin with, or b."""
    A, b = UNEASY[name](40)
    seen, refine = [], _krylov.refine
    monkeypatch.setattr(_krylov, "refine", lambda s, *more: seen.append((s.u.clone(), s.r.clone())) or refine(s, *more))
    assert residuals(A, b, Counted(A).value(GMRES(), b, ahead=ahead)) <= 1.01e-10
    ((u, r),) = seen
    assert (r[0] - b + product(A)(u[0])).norm() <= 1e-14 * b.norm()
    assert (0 < r.norm() < 0.1 * b.norm()) if kept else (u == 0).all()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["A", "b"])
def test_nan_stays_in_its_system(bad, place, ahead):
    A, b = contraction(3)
    want = exact(A, b)
    (A if place == "A" else b)[1].view(-1)[2] = bad
    u = Counted(A).value(GMRES(), b, ahead=ahead)
    assert u[1].isnan().all()
    assert_close([u[::2]], [want[::2]], 1e-8)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_singular_system_is_named(ahead):
    A, b = contraction(2, 2)
    A[1, 0] = torch.eye(30, **float64)
    A[1, 0, 3, 3] = 0
    b[1, 0, 3] = 1e-3  # a small part, so that the first steps look well
    with pytest.raises(NotConvergedError, match=r"1 of 4 .*flat indices over all leading dims: 2;"):
        Counted(A).value(GMRES(), b, ahead=ahead)


@either_size
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3, 4, 7])
def test_too_few_steps(most, ahead, sizes):
    A, b = contraction(2)
    counted = Counted(A)
    with pytest.raises(NotConvergedError, match=f"within {most} steps"):
        counted.value(GMRES(max_steps=most), b, ahead=ahead)
    assert counted.products <= most + 3
    with pytest.warns(RuntimeWarning, match="relative residuals reached"):
        u = counted.value(GMRES(max_steps=most, on_failure="warn"), b, ahead=ahead)
    assert (residuals(A, b, u) < 0.4**most).all()


@pytest.mark.parametrize("ahead", [False, True])
def test_tolerances_of_the_user(ahead, alone):
    A, b = contraction(3)
    for options, want in (({"rtol": 1e-3}, 1e-3), ({"rtol": 1e-13}, 1e-13), ({"rtol": 1e-12, "atol": 1e-5}, 1e-5)):
        counted = Counted(A)
        left = residuals(A, b, counted.value(GMRES(**options), b, ahead=ahead))
        assert (left <= 1.01 * want).all() and (left >= 1e-5 * want).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_far_as_rounding_allows(dtype):
    A, b = contraction(50, n=40, dtype=dtype)
    with pytest.warns(RuntimeWarning):
        u = Counted(A).value(GMRES(rtol=torch.finfo(dtype).eps / 100, on_failure="warn"), b)
    assert (residuals(A, b, u) <= 8 * torch.finfo(dtype).eps).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Counted(A).value(GMRES(), b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("ahead", [False, True])
def test_nan_after_a_solution_that_is_remembered(bad, ahead):
    """The other systems are solved before the first step."""
    A, b = contraction(3)
    solver, counted = GMRES(warm_start=True), Counted(A)
    assert_close(counted.value(solver, b, ahead=ahead), exact(A, b), 1e-8)
    b = b.clone()
    b[1, 2] = bad
    found = counted.value(solver, b, ahead=ahead)
    assert found[1].isnan().all()
    assert_close(found[::2], exact(A, b)[::2], 1e-8)


@pytest.mark.parametrize("most", range(16, 26))
def test_a_method_that_needs_more_steps_than_there_are_leaves_them_to_others(most):
    """The series would take some 40, GMRES no more than 16."""
    S = Draw(0).normal(200, 200)
    S = S + S.mT
    A = torch.eye(200, **float64) + 0.45 * S / torch.linalg.matrix_norm(S, 2)
    b = Draw(1).normal(3, 200)
    u = Counted(A).value(GMRES(max_steps=most), b)
    assert (residuals(A, b, u) <= 1e-10).all()


@pytest.mark.parametrize("size, atol", [(1e45, 1e40), (1e-55, 1e-60)])
def test_tolerances_beyond_single_precision(size, atol):
    A, b = contraction(2)
    b = size * b
    found = GMRES(rtol=0.0, atol=atol).run(product(A), b)
    assert found.converged.all()
    assert ((b - product(A)(found.value)).norm(dim=-1) <= 1.01 * atol).all()
    assert found.value.abs().max() > 0.01 * size


@pytest.mark.parametrize("solver", GENERAL)
@pytest.mark.parametrize("power", range(-6, 6))
def test_single_precision_of_any_size(solver, power):
    """Squares of what the methods compute on their way must stay in range."""
    A = (torch.eye(20, **float64) + 0.1 * Draw(0).normal(20, 20)).float() * 10.0**power
    for size in range(-9, 10):
        b = Draw(1).normal(2, 20).float() * 10.0**size
        u = solver().value(product(A), b, transposed=product(A.mT))
        assert (residuals(A.double(), b.double(), u.double()) < 1e-5).all()
