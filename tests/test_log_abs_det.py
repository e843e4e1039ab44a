"""log_abs_det_jacobian against determinants written out by hand, in every nesting, for every solver that has one."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from fresh import run_fresh
from helpers import assert_close, live, total
from problems import DEVICE, Draw, W, constant
from test_roots import TRANSFORMS
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import functorch_inverse as fi

DRAW = Draw(0)
Y, C, YS = DRAW.normal(3), DRAW.positive(3), DRAW.normal(4, 3)


def f(y, c):
    return torch.sinh(c * y) @ constant(W, y).T + 0.3 * y.roll(1, -1) ** 2


def det3(J):
    def minor(i, j):
        return J[..., 1, i] * J[..., 2, j] - J[..., 1, j] * J[..., 2, i]

    return J[..., 0, 0] * minor(1, 2) - J[..., 0, 1] * minor(0, 2) + J[..., 0, 2] * minor(0, 1)


def exact(y, c):
    """d/dy_j of 0.3 y_(i-1)^2 is 0.6 y_j where j = i - 1."""
    shift = torch.eye(3, dtype=y.dtype, device=y.device).roll(1, 0)
    return (det3(constant(W, y) * (c * torch.cosh(c * y)).unsqueeze(-2) + 0.6 * shift * y.unsqueeze(-2)).abs().log(),)


def under_test(y, c):
    return (fi.log_abs_det_jacobian(f, y, c),)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("y", [Y, YS, YS.reshape(2, 2, 3)], ids=lambda y: str(tuple(y.shape)))
def test_transform(transform, y):
    assert_close(TRANSFORMS[transform](under_test, (y, C)), TRANSFORMS[transform](exact, (y, C)))


@pytest.mark.parametrize("dims", [(0, None), (0, 0), (None, 0), (1, -1)])
@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
def test_vmap_of_second_order(dims, outer, inner):
    inputs = [(t if d == 0 else t.T) if d is not None else t[0] for t, d in zip((YS, YS.cosh()), dims, strict=True)]
    got, want = (vmap(outer(inner(h, (0, 1)), (0, 1)), dims)(*inputs) for h in (under_test, exact))
    assert_close(got, want)
    assert_close(*(vmap(h, dims)(*inputs) for h in (under_test, exact)))


def test_third_order():
    along = lambda h: lambda t: h(Y + t * Y.cos(), C + t * C.sin())[0]  # noqa: E731
    for a, b, c in [(jacrev, jacfwd, jacrev), (jacfwd, jacfwd, jacfwd), (jacfwd, jacrev, jacrev)]:
        t = Y.new_tensor(0.1)
        assert_close([a(b(c(along(under_test))))(t)], [a(b(c(along(exact))))(t)])


def test_the_value_with_it():
    y, c = live((YS, C))
    value, ladj = fi.log_abs_det_jacobian(f, y, c, has_value=True)
    assert_close([value, ladj], [f(y, c), *exact(y, c)])
    got = torch.autograd.grad(total((value, ladj)), (y, c))
    assert_close(got, torch.autograd.grad(total((f(y, c), *exact(y, c))), (y, c)))


def test_one_factorisation_serves_everything(monkeypatch):
    shapes, factorise = [], torch.linalg.lu_factor_ex
    monkeypatch.setattr(torch.linalg, "lu_factor_ex", lambda a: shapes.append(tuple(a.shape)) or factorise(a))
    y, c = live((YS, C))
    total(fi.log_abs_det_jacobian(f, y, c, has_value=True)).backward()
    assert shapes == [(4, 3, 3)]


def test_volume_preserving_and_reversing():
    """det = 1, det = -1, and a stretched reflection."""
    swap = lambda y: y.flip(-1) + torch.zeros_like(y)  # noqa: E731
    shear = lambda y: y + torch.stack([torch.zeros_like(y[..., 0]), y[..., 0] ** 2], -1)  # noqa: E731
    y = YS[:, :2]
    assert_close([fi.log_abs_det_jacobian(lambda y: -2 * swap(y), y)], [y.new_full((4,), 4.0).log()])
    for h in (swap, shear, lambda y: swap(shear(y))):
        assert fi.log_abs_det_jacobian(h, y).abs().max() < 1e-15
    assert_close([fi.log_abs_det_jacobian(lambda y: -y.exp(), y, event_dim=0)], [y])


# --- structure --------------------------------------------------------------------------------------


def autoregressive(y, c):
    return torch.sinh(c * y) + 0.5 * torch.tanh(y.cumsum(-1) - y)


def exact_autoregressive(y, c):
    return ((c * torch.cosh(c * y)).log().sum(-1),)


def gradient(y, c):
    return torch.func.grad(lambda y: (torch.cosh(c * y).sum(-1) + torch.logsumexp(y, -1)).sum())(y)


def exact_gradient(y, c):
    p = torch.softmax(y, -1)
    diagonal = torch.diag_embed(c**2 * torch.cosh(c * y) + p)
    return (det3(diagonal - p.unsqueeze(-1) * p.unsqueeze(-2)).log(),)


STRUCTURES = {
    "triangular": (autoregressive, exact_autoregressive, {"linear_solver": fi.Triangular()}),
    "upper": (lambda y, c: autoregressive(y.flip(-1), c).flip(-1), lambda y, c: exact_autoregressive(y.flip(-1), c),
              {"linear_solver": fi.Triangular(lower=False)}),
    "cholesky": (gradient, exact_gradient, {"linear_solver": fi.Cholesky()}),
    "banded": (lambda y, c: torch.sinh(c * y), exact_autoregressive, {"linear_solver": fi.Banded(0, 0)}),
    "lower_banded": (autoregressive, exact_autoregressive, {"linear_solver": fi.Banded(2, 0)}),
    "elementwise": (lambda y, c: -torch.sinh(c * y), lambda y, c: ((c * torch.cosh(c * y)).log(),), {"event_dim": 0}),
    "whole": (lambda y, c: torch.sinh(c * y), lambda y, c: ((c * torch.cosh(c * y)).log().sum(),), {"event_dim": None}),
}  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("transform", ["plain_twice", "jvp_jvp", "hessian", "rev_rev"])
def test_structure(structure, transform):
    function, want, options = STRUCTURES[structure]
    h = lambda y, c: (fi.log_abs_det_jacobian(function, y, c, **options),)  # noqa: E731
    for y in (Y, YS):
        assert_close(TRANSFORMS[transform](h, (y, C)), TRANSFORMS[transform](want, (y, C)))
    got, wanted = (vmap(jacfwd(jacrev(a)), (0, None))(YS, C) for a in (h, want))
    assert_close(got, wanted)


def test_pytrees():
    def h(y, c):
        return torch.cat([y["a"] * c, y["b"].unsqueeze(-1)], -1) @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=c.dtype))

    y = {"a": YS, "b": YS[:, 0]}
    got = fi.log_abs_det_jacobian(h, y, C, event_dim={"a": 1, "b": 0})
    assert_close([got], [(C.log().sum() + C.new_tensor(24.0).log()).expand(4)])


def test_complex_numbers_count_twice():
    y = Draw(3).complex(4, 3)
    got = fi.log_abs_det_jacobian(lambda y: torch.sinh(y), y)
    assert_close([got], [2 * torch.cosh(y).abs().log().sum(-1)])


# --- modes ------------------------------------------------------------------------------------------


def module():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double().to(DEVICE)
    return net, lambda y: 2 * y + 0.3 * net(y)


def by_torch(h, y):
    return torch.stack([torch.autograd.functional.jacobian(h, row, create_graph=True).det().abs().log() for row in y])


def test_a_module_receives_gradients():
    net, h = module()
    y = YS.clone().requires_grad_()
    got = torch.autograd.grad(total((fi.log_abs_det_jacobian(h, y),)), (y, *net.parameters()), allow_unused=True)
    want = torch.autograd.grad(total((by_torch(h, y),)), (y, *net.parameters()), allow_unused=True)
    assert_close(got[:-1], want[:-1])  # the last bias plays no part
    assert want[-1] is None and (got[-1] is None or not got[-1].any())


def test_functional_call():
    net, h = module()
    parameters = dict(net.named_parameters())
    call = lambda p: fi.log_abs_det_jacobian(lambda y: 2 * y + 0.3 * functional_call(net, p, (y,)), YS).sum()  # noqa: E731
    got = grad(call)({k: v.detach() for k, v in parameters.items()})
    want = torch.autograd.grad(by_torch(h, YS).sum(), list(parameters.values()), allow_unused=True)
    assert_close(tuple(got.values())[:-1], want[:-1])


def test_what_f_reads_may_depend_on_y():
    """J is the derivative in y alone, although the shift comes from y too."""
    y = YS.clone().requires_grad_()
    shift = (y**2).detach() + (y**2 - (y**2).detach())
    got = fi.log_abs_det_jacobian(lambda y: y + torch.sin(y) * shift, y, event_dim=0)
    assert_close([got], [(1 + torch.cos(y) * y**2).abs().log()])
    slope = torch.autograd.grad(got.sum(), y)
    want = torch.autograd.grad((1 + torch.cos(y) * y**2).abs().log().sum(), y)
    assert_close(slope, want)


def test_no_graph_where_nobody_asked():
    value, ladj = fi.log_abs_det_jacobian(f, YS, C, has_value=True)
    assert not (value.requires_grad or ladj.requires_grad)


def test_dual_numbers():
    y, c = YS, C
    with fwAD.dual_level():
        for dual_y, dual_c in [
            (fwAD.make_dual(y, y.cos()), c),
            (y, fwAD.make_dual(c, c.sin())),
            (fwAD.make_dual(y, y.cos()), c),
        ]:
            got = fi.log_abs_det_jacobian(lambda y, c=dual_c: f(y, c), dual_y, has_value=True)
            want = f(dual_y, dual_c), *exact(dual_y, dual_c)
            assert_close(*(tuple(fwAD.unpack_dual(t).tangent for t in leaves) for leaves in (got, want)))
    for options in ({"event_dim": 0}, {"linear_solver": fi.Banded(0, 0)}, {}):
        numbers = live((Y,))
        assert torch.autograd.gradcheck(
            lambda y, o=options: fi.log_abs_det_jacobian(torch.sinh, y, **o), numbers, check_forward_ad=True
        )


def test_no_grad_and_hooks_and_checkpoint():
    net, h = module()
    with torch.no_grad():
        assert not fi.log_abs_det_jacobian(h, YS).requires_grad
    with torch.inference_mode():
        inferred = fi.log_abs_det_jacobian(h, YS)
    assert_close([inferred.clone()], [by_torch(h, YS).detach()])
    first = net[0].weight
    want = torch.autograd.grad(by_torch(h, YS).sum(), first)
    for reentrant in (False, True):
        out = checkpoint(lambda y: fi.log_abs_det_jacobian(h, y), YS.clone().requires_grad_(), use_reentrant=reentrant)
        assert_close(torch.autograd.grad(out.sum(), first) if not reentrant else (_backward(out.sum(), first),), want)
    with torch.autograd.graph.save_on_cpu():
        out = fi.log_abs_det_jacobian(h, YS)
    assert_close(torch.autograd.grad(out.sum(), first), want)


def _backward(out, leaf):
    leaf.grad = None
    out.backward()
    return leaf.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_precision(dtype, tolerance):
    got = fi.log_abs_det_jacobian(lambda y: torch.sinh(y) @ constant(W, y).T, YS.to(dtype))
    assert got.dtype == dtype
    want = torch.cosh(YS.to(dtype).double()).log().sum(-1) + torch.linalg.det(W.to(DEVICE)).log()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * want.abs().max().item())


def test_empty_batches_and_nan():
    assert fi.log_abs_det_jacobian(f, YS[:0], C).shape == (0,)
    y = YS.clone()
    y[1, 2] = torch.nan
    got = fi.log_abs_det_jacobian(f, y, C)
    assert got.isnan().tolist() == [False, True, False, False]


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "options", "error", "text"),
    [
        (lambda y: y[..., :2], {}, fi.StructureError, "makes 2 numbers out of the 3"),
        (lambda y: y.sum(0), {}, fi.StructureError, "batch dims of y"),
        (lambda y: y.detach(), {}, fi.NoDerivativeError, "does not depend on y"),
        (lambda y: (y[..., :1], torch.ones(4, 2)), {}, fi.SingularJacobianError, "4 of 4 samples"),
        (lambda y: y.long(), {}, fi.StructureError, "int64"),
        (lambda y: y.sum(-1, keepdim=True) + 0 * y, {}, fi.SingularJacobianError, "4 of 4 samples"),
        (lambda y: y, {"linear_solver": fi.GMRES()}, ValueError, "linear_solver"),
        (lambda y: y, {"linear_solver": fi.LeastSquares()}, ValueError, "determinant"),
        (lambda y: y.cumsum(-1).flip(-1), {"linear_solver": fi.Triangular()}, fi.StructureError, "not lower triangular"),
        (lambda y: y.cumsum(-1), {"linear_solver": fi.Cholesky()}, fi.StructureError, "not symmetric"),
        (lambda y: -y, {"linear_solver": fi.Cholesky()}, fi.SingularJacobianError, "not positive definite"),
        (lambda y: y, {"event_dim": 3}, fi.StructureError, "event_dim"),
    ],
)
def test_bad_input(function, options, error, text):
    with pytest.raises(error, match=text):
        fi.log_abs_det_jacobian(function, YS, **options)


def test_y_without_tensors():
    for nothing in (3, None, [], torch.ones(3, dtype=torch.long)):
        with pytest.raises(fi.StructureError, match="without a floating tensor"):
            fi.log_abs_det_jacobian(torch.sin, nothing)


def test_a_planted_error_is_caught():
    with pytest.raises(AssertionError):
        assert_close([fi.log_abs_det_jacobian(lambda y: f(y, C) + 0.1 * y, YS)], exact(YS, C))


# --- torch.compile ----------------------------------------------------------------------------------


def check_compiled():
    def compiled(h):
        torch._dynamo.reset()
        return torch.compile(h, fullgraph=True, backend="aot_eager")

    transforms = [
        lambda h: h,
        lambda h: grad(lambda y, c: h(y, c).sum(), (0, 1)),
        lambda h: vmap(grad(h, (0, 1)), (0, None)),
        lambda h: lambda y, c: jvp(h, (y, c), (y.cos(), c.sin())),
        lambda h: lambda y, c: hessian(h)(y[0], c),
    ]
    h, want = (lambda y, c: fi.log_abs_det_jacobian(f, y, c)), (lambda y, c: exact(y, c)[0])
    for transform in transforms:
        assert_close(_tuple(compiled(transform(h))(YS, C)), _tuple(transform(want)(YS, C)))
    inputs = live((YS, C))
    got = torch.autograd.grad(compiled(h)(*inputs).sum(), inputs)
    assert_close(got, torch.autograd.grad(want(*inputs).sum(), inputs))


def _tuple(out):
    return out if isinstance(out, tuple) else (out,)


def test_compiled():
    run_fresh(check_compiled)
