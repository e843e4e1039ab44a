"""Bad input: each a clear error that says what arrived, what is needed and what to do."""

import re

import numpy as np
import pytest
import torch
from problems import VECTOR, vector_exact, vector_f, vector_g
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import functorch_inverse as fi
from functorch_inverse._dense import _inverse

X, C, B = VECTOR.inputs()
XS = VECTOR.stacked(4)[0]


def words(*parts):
    """A pattern with these words in this order."""
    return re.compile(".*".join(parts), re.DOTALL)


def live(t=X):
    return t.clone().requires_grad_()


def g(x):
    return vector_g(x, C, B)


def f(y):
    return vector_f(y, C, B)


# --- the family ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "also"),
    [
        (fi.StructureError, ValueError),
        (fi.SingularJacobianError, torch.linalg.LinAlgError),
        (fi.NoDerivativeError, RuntimeError),
        (fi.NotConvergedError, RuntimeError),
        (fi.BracketError, fi.NotConvergedError),
        (fi.ResidualError, ValueError),
        (fi.DerivativeError, ValueError),
    ],
)
def test_errors_belong_to_the_family_and_to_the_builtin_kind(error, also):
    assert issubclass(error, fi.FunctorchInverseError)
    assert issubclass(error, also)


# --- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "pattern"),
    [
        ({"vmap_method": "loop"}, ValueError, words("vmap_method", "'loop'", "sequential", "broadcast", "vmap")),
        ({"check": 0.0}, ValueError, words("check", "0.0", "True", "False", "tolerance")),
        ({"linear_solver": "lu"}, ValueError, words("linear_solver", "'lu'", "LU()")),
        ({"event_dims": 1}, TypeError, "event_dims"),
    ],
)
def test_unknown_options(options, error, pattern):
    with pytest.raises(error, match=pattern):
        fi.custom_inverse(g, f, **options)


@pytest.mark.parametrize(("g", "f", "name"), [(3, f, "`g` is 3"), (g, None, "`f` is None")])
def test_something_that_cannot_be_called(g, f, name):
    with pytest.raises(TypeError, match=words("custom_inverse", name, "callable")):
        fi.custom_inverse(g, f)


@pytest.mark.parametrize("chunk_size", [0, -2, 2.5, True, "3"])
@pytest.mark.parametrize("solver", [fi.LU, fi.Cholesky, fi.Triangular, fi.LeastSquares])
def test_chunk_size_is_a_positive_int(solver, chunk_size):
    said = re.escape(f"`{solver.__name__}`: `chunk_size` is {chunk_size!r}")
    with pytest.raises(ValueError, match=words(said, "positive int", "None")):
        solver(chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [0, -2, 2.5, True, "3"])
@pytest.mark.parametrize("function", [fi.batch_jacobian, fi.log_abs_det_jacobian])
def test_chunk_size_of_a_jacobian_is_a_positive_int(function, chunk_size):
    said = re.escape(f"`{function.__name__}`: `chunk_size` is {chunk_size!r}")
    with pytest.raises(ValueError, match=words(said, "positive int", "None")):
        function(torch.sin, torch.ones(2), chunk_size=chunk_size)


@pytest.mark.parametrize("solver", [fi.Banded(1, 1), fi.GMRES()])
def test_chunk_size_where_there_are_no_rows(solver):
    with pytest.raises(ValueError, match=words("log_abs_det_jacobian", "chunk_size", "leave it out", r"LU\(\)")):
        fi.log_abs_det_jacobian(torch.sin, torch.ones(2), linear_solver=solver, chunk_size=3)


def test_unknown_option_of_lu():
    with pytest.raises(ValueError, match=words("LU", "on_singular", "'ignore'", "'raise'", "'nan'")):
        fi.LU(on_singular="ignore")


@pytest.mark.parametrize("name", ["event_dim", "out_event_dim"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", True])
def test_no_event_dim(name, value):
    options = {"event_dim": 1, name: value}
    with pytest.raises(ValueError, match=words(name, re.escape(repr(value)), "(choose None, 0, 1, 2|Give None, an int)")):
        fi.custom_inverse(g, f, **options)(live())


def test_event_dim_larger_than_the_tensor():
    with pytest.raises(fi.StructureError, match=words("event_dim.*=2", "at least 2 dims", r"\(3,\)", "smaller")):
        fi.custom_inverse(g, f, event_dim=2)(live())


@pytest.mark.parametrize("prefix", [{"b": 1}, (1, 1), {"a": {"c": 1}}])
def test_event_dim_that_is_no_prefix(prefix):
    h = fi.custom_inverse(lambda x: {"a": g(x["a"])}, lambda y: {"a": f(y["a"])}, event_dim=prefix)
    with pytest.raises(fi.StructureError, match=words("event_dim", "not a prefix", "'a'")):
        h({"a": live()})


# --- what g returns --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "pattern"),
    [
        (None, words("g returned NoneType", "tensor", "array")),
        ("done", words("g returned str", "tensor", "array")),
        ([], words("g returned list", "tensor", "array")),
        (torch.arange(3), words("g returned", "int64", r"\(3,\)", "floating", "has_aux")),
        (np.arange(3), words("g returned", "int64", r"\(3,\)", "floating", "astype")),
        (torch.ones(3) > 0, words("g returned", "bool", "floating")),
        (torch.zeros(4), words("x has 3 real numbers", "y has 4", "More outputs than inputs", "does not determine")),
        (torch.zeros(2), words("x has 3 real numbers", "y has 2", "Fewer outputs than inputs")),
        (torch.zeros(3, dtype=torch.complex128), words("x has 3 real numbers", "y has 6")),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, re.Pattern) else "",
)
def test_g_returns_something_else(returned, pattern):
    with pytest.raises(fi.StructureError, match=pattern):
        fi.custom_inverse(lambda x: returned, f)(live())


@pytest.mark.parametrize("transform", [jacrev, jacfwd, lambda h: vmap(jacrev(h))])
def test_more_outputs_than_inputs_under_transforms(transform):
    h = fi.custom_inverse(lambda x: torch.cat([x, x], -1), lambda y: y[..., :3])
    with pytest.raises(fi.StructureError, match=words("More outputs than inputs", "does not determine")):
        transform(h)(XS if transform not in (jacrev, jacfwd) else X)


def test_without_the_pair_that_has_aux_promises():
    with pytest.raises(fi.StructureError, match=words("has_aux=True", r"\(y, aux\)", "ndarray arrived")):
        fi.custom_inverse(g, f, has_aux=True)(X)


@pytest.mark.parametrize("batch", [(2,), (4, 1)])
def test_g_changes_the_batch_shape(batch):
    h = fi.custom_inverse(lambda x: torch.zeros(*batch, 3), f, event_dim=1)
    with pytest.raises(fi.StructureError, match=words("batch shape", re.escape(str(batch)), "event_dim")):
        h(live(XS[:3]))


def test_leaves_of_y_disagree_about_the_batch():
    h = fi.custom_inverse(lambda x: {"a": torch.zeros(2, 1), "b": torch.zeros(3, 2)}, f, event_dim=1)
    with pytest.raises(fi.StructureError, match=words("leaves of y", "batch shapes", r"\(2,\)", r"\(3,\)")):
        h(live(XS[:2]))


def test_an_error_inside_g_comes_through():
    def broken(x):
        raise ZeroDivisionError("inside g")

    with pytest.raises(ZeroDivisionError, match="inside g"):
        fi.custom_inverse(broken, f)(live())


# --- what f returns --------------------------------------------------------------------------------

SHAPE = words(r"`custom_inverse`: f\(y, \*args\) gave shape", "x asks for", "event_dim")
LEFT = (fi.StructureError, fi.NoDerivativeError)
UNUSED = fi.NoDerivativeError
F_PROBLEMS = {
    "another shape": (lambda y: f(y)[:2], fi.StructureError, SHAPE),
    "an extra dim": (lambda y: f(y)[None], fi.StructureError, SHAPE),
    "complex": (lambda y: f(y) + 0j, fi.StructureError, words("complex", "a real dtype")),
    "a dict": (lambda y: {"x": f(y)}, fi.StructureError, words("returned dict", "x has a tensor", "x's structure")),
    "a tuple": (lambda y: (f(y), 0), fi.StructureError, words("returned tuple", "x has a tensor")),
    "None": (lambda y: None, fi.StructureError, words("returned NoneType", "torch operations")),
    "NumPy": (lambda y: f(y).detach().numpy(), LEFT, words("(returned ndarray|left torch)", "torch operations")),
    "through NumPy": (lambda y: torch.from_numpy(np.sinh(y.numpy())), UNUSED, words("left torch", "only g may use")),
    "detach": (lambda y: f(y.detach()), UNUSED, words("does not depend on y", "detaches")),
    "a constant": (lambda y: B, UNUSED, words("does not depend on y", "does not use it")),
    "rounding": (lambda y: y.long().double(), UNUSED, words("does not depend on y", "integers")),
    "no_grad": (torch.no_grad()(f), UNUSED, words("does not depend on y")),
}
DERIVATIVES = {
    "backward": lambda h: h(live()).sum().backward(),
    "double": lambda h: torch.autograd.grad(h(x := live()).sum(), x, create_graph=True),
    "grad": lambda h: grad(lambda x: h(x).sum())(X),
    "jacfwd": lambda h: jacfwd(h)(X),
    "jacfwd_jacrev": lambda h: jacfwd(jacrev(h))(X),
    "vmap_grad": lambda h: vmap(grad(lambda x: h(x).sum()))(XS),
}


@pytest.mark.parametrize("fault", F_PROBLEMS)
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_f_returns_something_else(fault, derivative):
    wrong, error, pattern = F_PROBLEMS[fault]
    with pytest.raises(error, match=pattern):
        DERIVATIVES[derivative](fi.custom_inverse(g, wrong))


@pytest.mark.parametrize("returned", [lambda y: {"b": f(y["a"])}, lambda y: [f(y["a"])], lambda y: {}])
def test_f_returns_another_structure_than_x(returned):
    h = fi.custom_inverse(lambda x: {"a": g(x["a"])}, returned)
    with pytest.raises(fi.StructureError, match=words("structure", "needed is", "'a'", "same containers")):
        h({"a": live()})["a"].sum().backward()


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_f_detaches_a_part_of_y(derivative):
    """The Jacobian has a row or column of zeros: singular, not silently wrong."""
    half = lambda y: f(torch.cat([y[..., :1], y[..., 1:].detach()], -1))  # noqa: E731
    with pytest.raises(fi.SingularJacobianError, match=words("f ignores", "part of y")):
        DERIVATIVES[derivative](fi.custom_inverse(g, half))


def test_an_error_inside_f_comes_through():
    def broken(y):
        raise ZeroDivisionError("inside f")

    with pytest.raises(ZeroDivisionError, match="inside f"):
        fi.custom_inverse(g, broken)(live()).sum().backward()


def test_wrong_number_of_arguments_of_f():
    with pytest.raises(TypeError, match="argument"):
        fi.custom_inverse(lambda x, c: vector_g(x, c, B), lambda y: f(y))(live(), C).sum().backward()


# --- a derivative that would be lost ---------------------------------------------------------------

KEYWORD = fi.custom_inverse(lambda x, *, c: vector_g(x, c, B), f)
NESTED_KEYWORD = fi.custom_inverse(lambda x, *, options: vector_g(x, options["c"][0], B), f)
LOST = words("keyword", "derivative would be lost", "by position", "detach")


def test_a_keyword_that_requires_grad():
    with pytest.raises(fi.NoDerivativeError, match=LOST):
        KEYWORD(X, c=live(C))


def test_a_keyword_that_requires_grad_deep_inside():
    with pytest.raises(fi.NoDerivativeError, match=LOST):
        NESTED_KEYWORD(X, options={"c": [live(C)]})


@pytest.mark.parametrize("transform", [lambda h: grad(h)(C), lambda h: jvp(h, (C,), (C,)), lambda h: vmap(grad(h))(C[None])])
def test_a_keyword_that_a_transform_differentiates(transform):
    with pytest.raises(fi.NoDerivativeError, match=LOST):
        transform(lambda c: KEYWORD(X, c=c).sum())


def test_a_keyword_without_derivative_is_fine():
    with torch.no_grad():
        KEYWORD(X, c=live(C))
    assert torch.equal(KEYWORD(X, c=live(C).detach()), KEYWORD(X, c=C))
    vmap(lambda c: KEYWORD(X, c=c))(C[None])


# --- the singular Jacobian -------------------------------------------------------------------------


def fold(y):
    return y**2


FOLD = fi.custom_inverse(torch.sqrt, fold)  # J = 2 y, singular at 0
POINTS = torch.tensor([[1.0], [0.0], [4.0], [0.0]], dtype=torch.float64)
FOLDS = fi.custom_inverse(torch.sqrt, fold, event_dim=1)
NAN_FOLDS = fi.custom_inverse(torch.sqrt, fold, event_dim=1, linear_solver=fi.LU(on_singular="nan"))


def test_singular_names_the_samples():
    with pytest.raises(fi.SingularJacobianError, match=words("singular in 2 of 4 samples", "1, 3", "Likely causes", "nan")):
        FOLDS(live(POINTS)).sum().backward()


def test_singular_without_batch():
    with pytest.raises(fi.SingularJacobianError, match=words("singular in 1 of 1 samples", ": 0")):
        FOLD(live(torch.zeros(1, dtype=torch.float64))).sum().backward()


def test_singular_with_two_batch_dims():
    """Flat indices: sample (1, 0) of (2, 2) is number 2."""
    x = torch.tensor([[[1.0], [2.0]], [[0.0], [3.0]]], dtype=torch.float64)
    with pytest.raises(fi.SingularJacobianError, match=words("1 of 4", ": 2")):
        FOLDS(live(x)).sum().backward()


@pytest.mark.parametrize("derivative", [jacrev, jacfwd, lambda h: jacfwd(jacrev(h))])
def test_singular_under_vmap(derivative):
    with pytest.raises(fi.SingularJacobianError, match=words("2 of 4", "1, 3")):
        vmap(derivative(FOLD))(POINTS)


@pytest.mark.parametrize("derivative", [jacrev, jacfwd])
def test_vmapped_dims_are_outermost(derivative):
    """(vmapped 3, own batch 2), along whatever dim it is vmapped."""
    x = torch.ones(3, 2, 1, dtype=torch.float64)
    x[2, 1] = 0
    with pytest.raises(fi.SingularJacobianError, match=words("1 of 6", ": 5")):
        vmap(derivative(FOLDS))(x)
    with pytest.raises(fi.SingularJacobianError, match=words("1 of 6", ": 5")):
        vmap(derivative(FOLDS), in_dims=1)(x.movedim(0, 1))


def test_vmapped_dims_are_outermost_for_a_small_index():
    """(vmapped 3, own batch 2): sample (1, 0) is number 2; with the dims exchanged it would be number 1."""
    x = torch.ones(3, 2, 1, dtype=torch.float64)
    x[1, 0] = 0
    with pytest.raises(fi.SingularJacobianError, match=words("1 of 6", ": 2")):
        vmap(jacrev(FOLDS))(x)


def test_many_singular_samples_are_abbreviated():
    with pytest.raises(fi.SingularJacobianError, match=words("40 of 40", r"9, \.\.\.")):
        FOLDS(live(torch.zeros(40, 1, dtype=torch.float64))).sum().backward()


def test_singular_names_samples_in_theta_derivatives():
    h = fi.custom_inverse(lambda x, c: torch.sqrt(x / c), lambda y, c: c * y**2, event_dim=1)
    c = live(torch.ones(1, dtype=torch.float64))
    with pytest.raises(fi.SingularJacobianError, match=words("2 of 4", "1, 3")):
        h(POINTS, c).sum().backward()


def test_nothing_is_raised_where_no_derivative_is_asked_for():
    assert torch.equal(FOLDS(live(POINTS)), POINTS.sqrt())


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1.0, 1e8, 1e150])
def test_near_singular_is_singular_at_any_scale(scale):
    """Rank one up to rounding: the second pivot is noise."""
    M = scale * torch.tensor([[1.0, 1 / 3], [3.0, 1.0 + 1e-16]], dtype=torch.float64)
    h = fi.custom_inverse(lambda x: x, lambda y: y @ M.T, event_dim=1)
    with pytest.raises(fi.SingularJacobianError, match="singular"):
        h(live(X[:2])).sum().backward()


@pytest.mark.parametrize("scales", [(1e-150, 1e150), (1e-30, 1.0), (1.0, 1e-200)])
def test_badly_scaled_is_not_singular(scales):
    """Rows and columns of very different size have an exact inverse."""
    D = torch.tensor(scales, dtype=torch.float64)
    h = fi.custom_inverse(lambda x: x / D, lambda y: y * D, event_dim=1)
    x = live(D * X[:2])
    (got,) = torch.autograd.grad(h(x).sum(), x)
    torch.testing.assert_close(got, 1 / D, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [2, 5, 20, 60])
def test_an_ill_conditioned_but_regular_jacobian_is_solved(n):
    """A Jordan-like triangular matrix: condition number grows, every pivot is 1."""
    M = torch.eye(n, dtype=torch.float64) + torch.diag(torch.full((n - 1,), 0.9, dtype=torch.float64), 1)
    h = fi.custom_inverse(lambda x: np.linalg.solve(M.numpy(), x.numpy()), lambda y: M @ y)
    x = live(torch.ones(n, dtype=torch.float64))
    (got,) = torch.autograd.grad(h(x).sum(), x)
    torch.testing.assert_close(M.T @ got, torch.ones(n, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 8, 30])
def test_rank_deficient_is_singular_at_any_size(n):
    """Integers, so that the rank is exactly n - 1 and only elimination leaves noise in the last pivot."""
    generator = torch.Generator().manual_seed(n)
    left = torch.randint(-9, 10, (50, n, n - 1), generator=generator).double()
    M = left @ torch.randint(-9, 10, (50, n - 1, n), generator=generator).double()
    h = fi.custom_inverse(lambda x: x, lambda y: (M @ y[..., None])[..., 0], event_dim=1)
    with pytest.raises(fi.SingularJacobianError, match="50 of 50"):
        h(torch.zeros(50, n, dtype=torch.float64, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("n", [8, 16, 48, 64, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("on_singular", ["raise", "nan"])
def test_pivots_that_grow_hide_none_that_vanishes(n, dtype, on_singular):
    """The pivots of a large random matrix are larger than its entries, so that their product is, whatever the last one is."""
    M = torch.randn(3, n, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    M[1, -1] = M[1, :-1].sum(0) / n**0.5
    solver = fi.LU(on_singular=on_singular)
    h = fi.custom_inverse(lambda x: x, lambda y: (M @ y[..., None])[..., 0], event_dim=1, linear_solver=solver)
    x = torch.zeros(3, n, dtype=dtype, requires_grad=True)
    if on_singular == "raise":
        with pytest.raises(fi.SingularJacobianError, match=words("1 of 3", ": 1")):
            h(x).sum().backward()
    else:
        (got,) = torch.autograd.grad(h(x).sum(), x)
        assert got[1].isnan().all()
        for i in (0, 2):
            rounding = n * torch.finfo(dtype).eps * (M[i].T.abs() @ got[i].abs()).max().item()
            torch.testing.assert_close(M[i].T @ got[i], torch.ones(n, dtype=dtype), rtol=0, atol=rounding)


DUPLICATES = {
    "equal columns": lambda M: M[..., 0].copy_(M[..., -1]),
    "equal rows": lambda M: M[..., 0, :].copy_(M[..., -1, :]),
    "a column twice as large": lambda M: M[..., 0].copy_(2 * M[..., -1]),
    "a column negated": lambda M: M[..., 1].copy_(-M[..., 0]),
    "a column that is a sum": lambda M: M[..., -1].copy_(M[..., 0] + M[..., 1]),
}


@pytest.mark.parametrize("n", [3, 17, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", DUPLICATES)
def test_an_f_that_duplicates_a_part_of_y_is_singular_everywhere(name, dtype, n):
    """What a pattern of signs may cancel."""
    M = torch.randn(200, n, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    DUPLICATES[name](M)
    h = fi.custom_inverse(lambda x: x, lambda y: (M @ y[..., None])[..., 0], event_dim=1)
    with pytest.raises(fi.SingularJacobianError, match="200 of 200"):
        h(torch.zeros(200, n, dtype=dtype, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("n", [8, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_values_cannot_be_looked_at_only_singular_matrices_are_nan(n, dtype):
    """What a trace computes with: the inverse, judged by its own rounding errors."""
    M = torch.randn(8, n, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    M[1, -1] = M[1, :-1].sum(0) / n**0.5
    inverse = _inverse(M)
    assert inverse[1].isnan().all()
    rest = [i for i in range(8) if i != 1]
    rounding = n * torch.finfo(dtype).eps * (M[rest].abs() @ inverse[rest].abs()).max().item()
    torch.testing.assert_close(M[rest] @ inverse[rest], torch.eye(n, dtype=dtype).expand(7, n, n), rtol=0, atol=rounding)


@pytest.mark.parametrize("n", [2, 3, 16, 40])
@pytest.mark.parametrize("batch", [1, 3, 400])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(n, batch, value):
    """Wherever it stands in the Jacobian: above the diagonal no pivot shows it. It is not called singular."""
    last = batch - 1
    for row, column in ((0, n - 1), (n - 1, 0), (n - 1, n - 1)):
        M = torch.eye(n, dtype=torch.float64).repeat(batch, 1, 1)
        M[last, row, column] = value
        h = fi.custom_inverse(lambda x: x, lambda y, M=M: (M @ y[..., None])[..., 0], event_dim=1)
        x = torch.zeros(batch, n, dtype=torch.float64, requires_grad=True)
        (got,) = torch.autograd.grad(h(x).sum(), x)
        assert got[last].isnan().all()
        assert torch.equal(got[:last], torch.ones(last, n, dtype=torch.float64))


# --- check=True ------------------------------------------------------------------------------------


def slightly_wrong(y):
    return 1.001 * f(y)


@pytest.mark.parametrize("event_dim", [None, 1])
@pytest.mark.parametrize("x", [X, live(X)], ids=["plain", "live"])
def test_check_finds_a_wrong_f(event_dim, x):
    h = fi.custom_inverse(g, slightly_wrong, event_dim=event_dim, check=True)
    with pytest.raises(fi.ResidualError, match=words(r"f\(g\(x\)\) is not x", "1 of 1 samples", "relative", "Either f")):
        h(x)


def one_wrong(y):
    """Wrong where y0 is large."""
    return f(y) + torch.where(y[..., :1] > 0.9 * YS[..., 0].max(), 0.1, 0.0)


YS = vector_exact(XS, C, B)


def test_check_names_the_worst_sample():
    worst = int(YS[:, 0].argmax())
    h = fi.custom_inverse(g, one_wrong, event_dim=1, check=True)
    with pytest.raises(fi.ResidualError, match=words("1 of 4 samples", f"worst is sample {worst}")):
        h(XS)


@pytest.mark.parametrize("wrap", [vmap, lambda h: vmap(jacrev(h)), lambda h: vmap(jacfwd(h)), lambda h: jacrev(vmap(h))])
def test_check_names_the_worst_sample_under_transforms(wrap):
    worst = int(YS[:, 0].argmax())
    h = fi.custom_inverse(g, one_wrong, check=True)
    with pytest.raises(fi.ResidualError, match=words("1 of 4 samples", f"worst is sample {worst}")):
        wrap(h)(XS)


@pytest.mark.parametrize(("check", "passes"), [(1e-2, True), (1e-3, False), (1e-5, False), (True, False), (False, True)])
def test_check_with_a_tolerance(check, passes):
    h = fi.custom_inverse(g, lambda y: 1.005 * f(y), check=check)
    if passes:
        h(X)
        return
    with pytest.raises(fi.ResidualError):
        h(X)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_check_looks_without_grad_too(mode):
    with mode(), pytest.raises(fi.ResidualError):
        fi.custom_inverse(g, slightly_wrong, check=True)(X)


def test_check_accepts_the_right_f():
    h = fi.custom_inverse(g, f, check=True, event_dim=1)
    for call in (h, jacrev(h), jacfwd(jacrev(h)), vmap(jacrev(h))):
        call(XS)


def test_check_accepts_nan_in_nan_out():
    xs = XS.clone()
    xs[1] = torch.nan
    assert fi.custom_inverse(g, f, event_dim=1, check=True)(xs)[1].isnan().all()


def test_check_finds_a_nan_that_g_made():
    """The usual way in which a solver says that it failed."""

    def broken(x):
        y = g(x)
        y[1] = np.nan
        return y

    with pytest.raises(fi.ResidualError, match=words("1 of 4", "worst is sample 1")):
        fi.custom_inverse(broken, f, event_dim=1, check=True)(XS)


def test_check_finds_a_nan_that_f_made():
    broken = lambda y: torch.where(y[..., :1] == YS[1, 0], torch.nan, f(y))  # noqa: E731
    with pytest.raises(fi.ResidualError, match=words("1 of 4", "worst is sample 1")):
        fi.custom_inverse(lambda x: YS, broken, event_dim=1, check=True)(XS)


def test_check_close_to_zero():
    """x = 0 has no relative error of its own; rounding must not be called a mistake."""
    x = torch.zeros(3, dtype=torch.float64)
    shifted = fi.custom_inverse(lambda x: x.numpy() + 1.0, lambda y: y - 1.0, check=True)
    assert torch.equal(shifted(x), x + 1)


# --- options of other functions --------------------------------------------------------------------

MISUSED = {
    "too few arguments": (lambda: fi.numerical_jacobian(torch.sin), TypeError, words("argnums=0", "0 arrived", "position")),
    "noise in words": (lambda: fi.finite_difference(torch.sin, noise="a"), TypeError, words("noise='a'", "number")),
    "much noise": (lambda: fi.finite_difference(torch.sin, noise=2.0), ValueError, words("noise=2.0", "below 1")),
    "endless step": (lambda: fi.finite_difference(torch.sin, step=float("inf")), ValueError, words("step=inf", "finite")),
    "lost step": (
        lambda: jacrev(fi.finite_difference(torch.sin, step=1e-30))(torch.ones(2)),
        ValueError,
        words("lost beside x = 1", "larger"),
    ),
    "lower in words": (lambda: fi.Triangular(lower="no"), ValueError, words("lower='no'", "lower=True")),
    "half a thread": (lambda: fi.black_box(np.sin, threads=1.5), ValueError, words("threads=1.5", "positive number")),
    "half a diagonal": (lambda: fi.Banded(1, 0.5), ValueError, words("upper=0.5", "0, 1, 2")),
    "nothing returned": (lambda: fi.black_box(lambda x: None)(torch.ones(2)), fi.StructureError, words("black_box", "return")),
    "no determinant": (
        lambda: fi.log_abs_det_jacobian(torch.sin, torch.ones(2, 2), linear_solver=fi.GMRES()),
        ValueError,
        words("is GMRES", "LU"),
    ),
    "integers": (lambda: fi.batch_jacobian(torch.sin, torch.ones(2, 2).int()), fi.StructureError, words("floating tensor")),
    "a residual without y": (
        lambda: jacrev(fi.custom_root(lambda x: x, lambda y, x: x))(torch.ones(2)),
        fi.NoDerivativeError,
        words("residual", "depend on y"),
    ),
}


@pytest.mark.parametrize(("misuse", "error", "pattern"), MISUSED.values(), ids=MISUSED)
def test_misuse_of_other_functions(misuse, error, pattern):
    with pytest.raises(error, match=pattern):
        misuse()
