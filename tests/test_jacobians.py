"""batch_jacobian: the Jacobian of each sample, against closed forms."""

import pytest
import torch
from fresh import run_fresh
from helpers import assert_close, total
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from functorch_inverse import StructureError, batch_jacobian

# Rows of f for three inputs: fewer outputs than inputs (reverse mode), as many, and more (forward mode).
MIXES = {out: torch.linspace(-1.1, 1.3, 3 * out, dtype=torch.float64).cos().reshape(out, 3) for out in (2, 3, 5)}
outputs = pytest.mark.parametrize("out", MIXES)


def ramp(*shape, start=-0.8):
    n = torch.Size(shape).numel()
    return torch.linspace(start, 1.1, n, dtype=torch.float64).reshape(shape)


def f_of(out):
    return lambda y: torch.sinh(y) @ MIXES[out].T * y.sum(-1, keepdim=True)


def jacobian_of(out):
    """df/dy by hand, (*batch, out, 3)."""

    def jacobian(y):
        mixed = torch.sinh(y) @ MIXES[out].T
        return MIXES[out] * torch.cosh(y)[..., None, :] * y.sum(-1)[..., None, None] + mixed[..., None]

    return jacobian


@outputs
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (0,)])
def test_vectors(out, batch):
    y = ramp(*batch, 3)
    got = batch_jacobian(f_of(out), y)
    assert got.shape == (*batch, out, 3)
    if y.numel():
        assert_close(got, jacobian_of(out)(y))


@outputs
def test_the_whole_input(out):
    y = ramp(2, 3)
    want = torch.zeros(2, out, 2, 3, dtype=y.dtype)
    for i in range(2):
        want[i, :, i] = jacobian_of(out)(y[i])
    assert_close(batch_jacobian(f_of(out), y, event_dim=None), want)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_numbers(shape):
    y = ramp(*shape, start=0.3)
    assert_close(batch_jacobian(lambda y: y**3, y, event_dim=0), 3 * y**2)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_numbers_to_vectors(shape):
    y = ramp(*shape, start=0.3)
    got = batch_jacobian(lambda y: torch.stack([y.sin(), y.cos(), y**2], -1), y, event_dim=0)
    assert_close(got, torch.stack([y.cos(), -y.sin(), 2 * y], -1))


# f_i = p_kl sinh(y)_kl e_li: matrices (2, 3) to vectors of `out` numbers.
@outputs
@pytest.mark.parametrize("batch", [(), (4,)])
def test_matrices(out, batch):
    y, e = ramp(*batch, 2, 3), MIXES[out]
    p = ramp(2, 3, start=0.2)
    got = batch_jacobian(lambda y: (p * torch.sinh(y)).sum(-2) @ e.T, y, event_dim=2)
    want = torch.einsum("kl,...kl,il->...ikl", p, torch.cosh(y), e)
    assert got.shape == (*batch, out, 2, 3)
    assert_close(got, want)


def tree(y):
    a, b = y["a"], y["b"]
    return {"p": a.sinh() * b[..., None], "q": [a.prod(-1) + b**2, b[..., None].expand(*b.shape, 4)]}


def tree_jacobian(y):
    a, b = y["a"], y["b"]
    zero = torch.zeros(*b.shape, 4, 2, dtype=a.dtype)
    return {
        "p": {"a": torch.diag_embed(a.cosh() * b[..., None]), "b": a.sinh()},
        "q": [{"a": a.flip(-1), "b": 2 * b}, {"a": zero, "b": torch.ones(*b.shape, 4, dtype=a.dtype)}],
    }


@pytest.mark.parametrize(
    ("batch", "event_dim"), [((4,), {"a": 1, "b": 0}), ((2, 3), {"a": 1, "b": 0}), ((), {"a": 1, "b": 0}), ((), None)]
)
def test_trees(batch, event_dim):
    y = {"a": ramp(*batch, 2), "b": ramp(*batch, start=0.4)}
    assert_close(batch_jacobian(tree, y, event_dim=event_dim), tree_jacobian(y))


def test_integer_leaves_are_no_inputs():
    y = {"n": torch.tensor([2, 3]), "x": ramp(2, 3)}
    got = batch_jacobian(lambda y: y["x"] ** y["n"][:, None], y, event_dim={"n": 0, "x": 1})
    n = y["n"][:, None]
    assert_close(got["x"], torch.diag_embed(n * y["x"] ** (n - 1)))


@outputs
def test_arguments_are_handed_on_and_differentiated(out):
    def f(y, c, power):
        return c * f_of(out)(y) ** power

    y, c = ramp(4, 3), torch.tensor(1.7, dtype=torch.float64)
    square = 2 * f_of(out)(y)[..., None] * jacobian_of(out)(y)
    assert_close(batch_jacobian(f, y, c, 2), c * square)
    assert_close(jacrev(lambda c: batch_jacobian(f, y, c, 2))(c), square)


# --- under transforms --------------------------------------------------------------------------------


def row_loss(jacobian):
    return lambda y: total((jacobian(y),))


STACKS = {
    "grad": lambda j, y: grad(row_loss(j))(y),
    "jvp": lambda j, y: jvp(j, (y,), (y.cos(),)),
    "jacrev": lambda j, y: jacrev(j)(y),
    "jacfwd": lambda j, y: jacfwd(j)(y),
    "hessian": lambda j, y: hessian(row_loss(j))(y),
    "jacfwd(jacfwd)": lambda j, y: jacfwd(jacfwd(j))(y),
    "vmap": lambda j, y: vmap(j)(torch.stack([y, 2 * y])),
    "vmap, last dim": lambda j, y: vmap(j, in_dims=-1)(torch.stack([y, 2 * y], -1)),
    "vmap(jacrev)": lambda j, y: vmap(jacrev(j))(torch.stack([y, 2 * y])),
    "vmap(jacfwd)": lambda j, y: vmap(jacfwd(j))(torch.stack([y, 2 * y])),
    "vmap(hessian)": lambda j, y: vmap(hessian(row_loss(j)))(torch.stack([y, 2 * y])),
    "vmap(vmap(grad))": lambda j, y: vmap(vmap(grad(row_loss(j))))(torch.stack([y, 2 * y, -y, y + 1]).unflatten(0, (2, 2))),
}


@outputs
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_every_stack(out, stack):
    y = ramp(2, 3)
    assert_close(stack(lambda y: batch_jacobian(f_of(out), y), y), stack(jacobian_of(out), y))


@outputs
def test_autograd(out):
    y = ramp(2, 3).requires_grad_()
    got = torch.autograd.grad(row_loss(lambda y: batch_jacobian(f_of(out), y))(y), y)
    assert_close(got, torch.autograd.grad(row_loss(jacobian_of(out))(y), y))


@outputs
def test_gradcheck(out):
    assert torch.autograd.gradcheck(lambda y: batch_jacobian(f_of(out), y), (ramp(2, 3).requires_grad_(),))


@outputs
def test_dual_numbers(out):
    y, v = ramp(2, 3), ramp(2, 3, start=0.1)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(batch_jacobian(f_of(out), forward_ad.make_dual(y, v))).tangent
    assert_close(got, jvp(jacobian_of(out), (y,), (v,))[1])


@pytest.mark.parametrize("held", ["closure", "module"])
@outputs
def test_what_f_closes_over(out, held):
    w = MIXES[out].clone().requires_grad_()
    layer = nn.Linear(3, out, bias=False).double()
    layer.weight = nn.Parameter(MIXES[out].clone())
    y = ramp(4, 3)
    f = layer if held == "module" else (lambda y: y @ w.T)
    total((batch_jacobian(lambda y: f(y.sinh()), y),)).backward()
    want = grad(lambda w: total((w * y.cosh()[:, None],)))(MIXES[out])
    assert_close(layer.weight.grad if held == "module" else w.grad, want)


def test_no_grad():
    with torch.no_grad():
        got = batch_jacobian(f_of(2), ramp(4, 3).requires_grad_())
    assert not got.requires_grad
    assert_close(got, jacobian_of(2)(ramp(4, 3)))


# --- how it computes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "most"), [(2, 1), (5, 4)])
def test_few_evaluations_of_f(out, most):
    """One for reverse mode; one more for each leaf of y in forward mode; never one a sample or a number."""
    shapes = []
    batch_jacobian(lambda y: shapes.append(tuple(y.shape)) or f_of(out)(y), ramp(50, 3))
    assert len(shapes) <= most
    assert set(shapes) == {(50, 3)}


def test_an_operation_without_forward_mode():
    """torch.special.gammainc has no forward rule, nor any derivative to its first argument."""
    x = ramp(2, 1, start=0.5) + 1.0

    def f(x):
        return torch.special.gammainc(torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype), x)

    powers = torch.tensor([0.0, 1.0, 2.0], dtype=x.dtype)
    want = x**powers * torch.exp(-x) / torch.tensor([1.0, 1.0, 2.0], dtype=x.dtype)
    assert_close(batch_jacobian(f, x), want[..., None])
    with pytest.raises(NotImplementedError):
        jvp(f, (x,), (x,))


@outputs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_kept(out, dtype):
    """A Python number times a 0-d dual number is float64 in torch's forward mode."""

    def f(y):
        return torch.stack([0.5 * y[0] * y[1], *(y[i % 3].sin() * (i + 1) for i in range(out - 1))])

    y = ramp(3).to(dtype)
    got = batch_jacobian(f, y, event_dim=None)
    assert got.dtype == dtype
    want = torch.zeros(out, 3, dtype=torch.float64)
    want[0, :2] = 0.5 * ramp(3)[[1, 0]]
    for i in range(out - 1):
        want[i + 1, i % 3] += (i + 1) * ramp(3)[i % 3].cos()
    assert_close(got.double(), want, 1e-6 if dtype == torch.float32 else 1e-12)


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "arrived"), [(lambda y: y.sum(), r"\(\)"), (lambda y: y.T, r"\(3, 4\)"), (lambda y: [y, 2.0], "float")],
    ids=["sum", "transposed", "number"],
)  # fmt: skip
def test_the_batch_dims_come_first(f, arrived):
    with pytest.raises(StructureError, match=rf"f returned {arrived} where the batch dims of y, \(4,\), must come first"):
        batch_jacobian(f, ramp(4, 3))


def test_leaves_of_different_batches():
    with pytest.raises(StructureError, match="batch shapes"):
        batch_jacobian(lambda y: y[0], (ramp(4, 3), ramp(5, 3)))


def test_complex_output():
    with pytest.raises(StructureError, match="view_as_real"):
        batch_jacobian(lambda y: torch.complex(y, y), ramp(4, 3))


def test_complex_numbers_inside():
    got = batch_jacobian(lambda y: (y.to(torch.complex128) ** 2).real, ramp(4, 3))
    assert_close(got, torch.diag_embed(2 * ramp(4, 3)))


def test_complex_input():
    with pytest.raises(StructureError, match="view_as_real"):
        batch_jacobian(torch.abs, torch.complex(ramp(3), ramp(3)), event_dim=0)


@pytest.mark.parametrize(
    ("event_dim", "error", "match"),
    [
        (-1, ValueError, "choose None, 0, 1, 2"),
        (3, StructureError, "at least 3 dims"),
        ([1, 1], StructureError, "prefix"),
    ],
    ids=["negative", "too many", "structure"],
)
def test_bad_event_dim(event_dim, error, match):
    with pytest.raises(error, match=match):
        batch_jacobian(f_of(2), ramp(4, 3), event_dim=event_dim)


# --- torch.compile -------------------------------------------------------------------------------------


def compiled(name, *outs):
    """In a process of its own."""
    for out in outs:
        f = f_of(out)
        stack = (STACKS | {"values": lambda j, y: j(y)})[name]
        got = torch.compile(lambda y: stack(lambda y: batch_jacobian(f, y), y), fullgraph=True, backend="aot_eager")  # noqa: B023
        assert_close(got(ramp(2, 3)), stack(jacobian_of(out), ramp(2, 3)))


@pytest.mark.parametrize("name", ["values", "grad", "jvp", "jacrev", "jacfwd", "hessian", "vmap"])
def test_compile(name):
    run_fresh(compiled, name, 2, 5)
