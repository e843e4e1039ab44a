"""NaN, infinity, nothing, integers, folds: each confined to its sample, none of them silent."""

import numpy as np
import pytest
import torch
from helpers import all_of, assert_close, every_batchable_problem, every_problem, live, loss, total
from problems import VECTOR, vector_exact, vector_f, vector_g
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functorch_inverse as fi

X, C, B = VECTOR.inputs()
XS = VECTOR.stacked(4)[0]
GOOD, BAD = [0, 2, 3], 1

DERIVATIVES = {
    "autograd": lambda h: lambda xs: torch.autograd.grad(h(xs := live((xs,))[0]).sin().sum(), xs)[0],
    "double": lambda h: lambda xs: _double(h, xs),
    "jacrev_of_batch": lambda h: lambda xs: _blocks(jacrev(h)(xs)),
    "jacfwd_of_batch": lambda h: lambda xs: _blocks(jacfwd(h)(xs)),
    "vmap_jacrev": lambda h: vmap(jacrev(h)),
    "vmap_jacfwd": lambda h: vmap(jacfwd(h)),
    "vmap_hessian": lambda h: vmap(hessian(h)),
    "vmap_jacfwd_jacfwd": lambda h: vmap(jacfwd(jacfwd(h))),
}
every_derivative = pytest.mark.parametrize("derivative", DERIVATIVES)


def _double(h, xs):
    (xs,) = live((xs,))
    (first,) = torch.autograd.grad(h(xs).sin().sum(), xs, create_graph=True)
    return torch.autograd.grad(first.sin().sum(), xs)[0]


def _blocks(jacobian):
    """The diagonal of (b, y, b, x): what one sample does to itself."""
    return torch.stack([jacobian[i, :, i] for i in range(jacobian.shape[0])])


# --- NaN and infinity ------------------------------------------------------------------------------


@every_derivative
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("event_dim", [0, 1])
def test_not_a_number_stays_in_its_sample(derivative, bad, event_dim):
    """And is no singular Jacobian."""
    if event_dim:
        h = fi.custom_inverse(lambda x: vector_exact(x, C, B), lambda y: vector_f(y, C, B), event_dim=1)
    else:
        h = fi.custom_inverse(lambda x: np.arcsinh(x.numpy()), torch.sinh, event_dim=0)
    xs = XS.clone()
    xs[BAD, 0] = bad
    got, want = DERIVATIVES[derivative](h)(xs), DERIVATIVES[derivative](h)(XS)
    assert_close([got[GOOD]], [want[GOOD]])
    assert not (got[BAD] == want[BAD]).all()
    assert not (event_dim and got[BAD].isfinite().any())


def test_not_a_number_does_not_reach_other_samples_by_a_shared_theta():
    """theta receives the sum over samples, which one nan makes nan: as for any torch function."""
    xs = XS.clone()
    xs[BAD] = torch.nan
    h = fi.custom_inverse(vector_g, vector_f, event_dim=1)
    got = vmap(jacrev(h, 1), (0, None, None))(xs, C, B)
    assert got[BAD].isnan().all()
    assert_close([got[GOOD]], [vmap(jacrev(vector_exact, 1), (0, None, None))(XS, C, B)[GOOD]])


def test_infinite_y():
    """y = log 0 = -inf: f'(y) = 0, so dy/dx = 1/0 = inf elementwise, as torch's log has it."""
    h = fi.custom_inverse(torch.log, torch.exp, event_dim=0)
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert torch.equal(vmap(grad(h))(x), 1 / x)


# --- folds -----------------------------------------------------------------------------------------

POINTS = torch.tensor([1.0, 0.0, 4.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("mode", ["grad", "jacfwd", "autograd"])
def test_elementwise_one_over_zero_is_infinite(mode):
    h = fi.custom_inverse(torch.sqrt, torch.square, event_dim=0)
    got = {
        "grad": lambda: vmap(grad(h))(POINTS),
        "jacfwd": lambda: vmap(jacfwd(h))(POINTS),
        "autograd": lambda: _sum(h),
    }[mode]()
    assert torch.equal(got, 0.5 / POINTS.sqrt())


def _sum(h):
    (x,) = live((POINTS,))
    return torch.autograd.grad(h(x).sum(), x)[0]


@every_derivative
def test_nan_where_singular_and_right_elsewhere(derivative):
    h = fi.custom_inverse(torch.sqrt, torch.square, event_dim=1, linear_solver=fi.LU(on_singular="nan"))
    got, want = (DERIVATIVES[derivative](f)(POINTS[:, None]) for f in (h, torch.sqrt))
    regular = POINTS > 0
    assert_close([got[regular]], [want[regular]])
    assert got[~regular].isnan().all()


def test_nan_where_singular_for_theta_too():
    nan = fi.LU(on_singular="nan")
    h = fi.custom_inverse(lambda x, c: (x / c).sqrt(), lambda y, c: c * y**2, event_dim=1, linear_solver=nan)
    c = torch.tensor([1.5], dtype=torch.float64)
    got = vmap(jacrev(h, 1), (0, None))(POINTS[:, None], c)
    want = -0.5 * POINTS.sqrt() * 1.5**-1.5
    assert_close([got.flatten()[POINTS > 0]], [want[POINTS > 0]])
    assert got.flatten()[POINTS == 0].isnan().all()


# --- nothing ---------------------------------------------------------------------------------------


def empty(problem, *batch):
    n, single = problem.x_count, problem.inputs()
    return tuple(t.new_empty(*batch, *t.shape) if i < n else t for i, t in enumerate(single))


@every_batchable_problem
@pytest.mark.parametrize("batch", [(0,), (0, 2), (2, 0)])
def test_empty_batches(problem, batch):
    inputs = live(empty(problem, *batch))
    y = problem.custom()(*inputs)
    want = problem.closed_form()(*inputs)
    assert [t.shape for t in y] == [t.shape for t in want]
    grads = torch.autograd.grad(total(y), inputs, create_graph=True)
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    assert all(not g.any() for g in grads)  # the sum over no samples
    seconds = torch.autograd.grad(total(grads), inputs, allow_unused=True)
    assert all(g is None or not g.any() for g in seconds)


@every_batchable_problem
@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_empty_batches_under_transforms(problem, transform):
    inputs = empty(problem, 0)
    got = transform(loss(problem.custom()), all_of(inputs))(*inputs)
    want = transform(loss(problem.closed_form()), all_of(inputs))(*inputs)
    torch.testing.assert_close(got, want)


@every_batchable_problem
def test_vmap_over_an_empty_batch(problem):
    """With a known event_dim g takes it at once."""
    n, inputs = problem.x_count, empty(problem, 0)
    dims = (0,) * n + (None,) * (len(inputs) - n)
    got = vmap(problem.custom(), dims)(*inputs)
    torch.testing.assert_close(got, problem.closed_form()(*inputs))


def test_vmap_over_an_empty_batch_one_by_one():
    """No call, no shape: an error that names the ways out."""
    h = fi.custom_inverse(lambda x: np.arcsinh(x.numpy()), torch.sinh)
    with pytest.raises(fi.StructureError, match=r"empty batch.*'broadcast' or 'vmap'.*event_dim"):
        vmap(h)(X.new_empty(0, 3))


def test_an_event_without_elements():
    x = torch.zeros(2, 0, dtype=torch.float64, requires_grad=True)
    y = fi.custom_inverse(lambda x: x.numpy(), lambda y: y * 2, event_dim=1)(x)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert got.shape == (2, 0)


# --- integers and what is no tensor ----------------------------------------------------------------


@pytest.mark.parametrize("x", [torch.tensor([1, 2, 3]), torch.tensor([True, False])])
def test_integer_input_gives_values(x):
    y = fi.custom_inverse(lambda x: np.arcsinh(x.numpy().astype(float)), torch.sinh, event_dim=0)(x)
    assert torch.equal(y, x.double().asinh())
    assert not y.requires_grad


def test_integer_input_with_a_live_theta():
    x = torch.tensor([1, 2, 3])
    h = fi.custom_inverse(lambda x, c: np.arcsinh(x.numpy()) / c.numpy(), lambda y, c: torch.sinh(c * y), event_dim=0)
    got = torch.autograd.functional.jacobian(lambda c: h(x, c), C)
    assert_close([got], [torch.autograd.functional.jacobian(lambda c: x.double().asinh() / c, C)])


def test_integers_pass_through_beside_floats():
    """x = (number of the power, base): the integer leaf comes back and f sees it."""
    k = torch.tensor(3)
    g = lambda x: {"k": x["k"], "t": np.cbrt(x["t"].numpy())}  # noqa: E731
    f = lambda y: {"k": y["k"], "t": y["t"] ** y["k"]}  # noqa: E731
    h = fi.custom_inverse(g, f)
    y = h({"k": k, "t": X})
    assert torch.equal(y["k"], k)
    got = jacrev(lambda t: h({"k": k, "t": t})["t"])(X)
    assert_close([got], [torch.diag(1 / (3 * y["t"] ** 2))])


def test_what_is_no_tensor_passes_through():
    def g(x, options):
        assert options["name"] == "asinh"
        return {"y": np.arcsinh(x["y"].numpy() * options["scale"]), "note": x["note"], "none": None}

    h = fi.custom_inverse(g, lambda y, options: {"y": torch.sinh(y["y"]) / options["scale"], "note": y["note"], "none": None})
    x = {"y": X.clone().requires_grad_(), "note": "text", "none": None}
    y = h(x, {"name": "asinh", "scale": 2.0})
    assert (y["note"], y["none"]) == ("text", None)
    (got,) = torch.autograd.grad(y["y"].sum(), x["y"])
    assert_close([got], [2 / (4 * X**2 + 1).sqrt()])


@pytest.mark.parametrize("x", [2.0, 2])
def test_a_python_number(x):
    """x without a tensor: values, and theta's derivative."""
    c = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    h = fi.custom_inverse(lambda x, c: np.arcsinh(x) / c.numpy(), lambda y, c: torch.sinh(c * y))
    (got,) = torch.autograd.grad(h(x, c), c)
    assert_close([got], [-torch.tensor(2.0, dtype=torch.float64).asinh() / 1.5**2])


# --- strides ---------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.ndim else t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "flipped view": lambda t: t.flip(0).flip(0) if t.ndim else t,
}


@every_problem
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_strides(problem, layout):
    inputs = tuple(LAYOUTS[layout](t) for t in problem.stacked(3))
    transform = lambda h: vmap(jacrev(h, all_of(inputs)))(*inputs)  # noqa: E731
    assert_close(transform(problem.custom()), transform(problem.closed_form()))
