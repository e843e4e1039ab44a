"""custom_jacobian: an analytic Jacobian under every stack of transforms, against closed forms."""

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
import pytest
import torch
from fresh import run_fresh
from helpers import all_of, assert_close, live, loss, tangents, total
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from functorch_inverse import NoDerivativeError, StructureError, custom_jacobian

# Three inputs, two outputs; tensors, because Dynamo does not trace NumPy's constants inside a transform.
M = torch.tensor([[1.2, -0.7, 0.4], [0.3, 0.9, -1.1]], dtype=torch.float64)
A = torch.tensor([[0.8, -0.5], [1.1, 0.6]], dtype=torch.float64)


def ramp(*shape, start=-0.8):
    return torch.linspace(start, 1.1, int(np.prod(shape)), dtype=torch.float64).reshape(shape)


@dataclass(frozen=True)
class Case:
    """fn in torch operations, its Jacobian by hand, and arguments all of whose tensors are differentiated."""

    name: str
    fn: Callable[..., Any]
    jacobian: Callable[..., Any]
    args: tuple[Any, ...]
    options: Mapping[str, Any]

    def __repr__(self):
        return self.name

    @property
    def inputs(self):
        return tuple(optree.tree_leaves(self.args))

    def custom(self, *, opaque=True):
        """What is under test; an opaque fn is computed by NumPy."""
        return self._of_leaves(custom_jacobian(in_numpy(self.fn) if opaque else self.fn, self.jacobian, **self.options))

    def closed_form(self):
        return self._of_leaves(self.fn)

    def _of_leaves(self, function):
        def of_leaves(*leaves):
            # Found here, for Dynamo to trace.
            args = optree.tree_unflatten(optree.tree_structure(self.args), leaves)
            return tuple(optree.tree_leaves(function(*args)))

        return of_leaves


def in_numpy(fn):
    """fn by way of NumPy, so that torch cannot differentiate it; fails unless it gets plain tensors."""

    def black_box(*args, **kwargs):
        plain = optree.tree_map(lambda t: torch.from_numpy(t.numpy().copy()), args)
        return optree.tree_map(lambda t: t.numpy(), fn(*plain, **kwargs))

    return black_box


def wave(x):
    return torch.exp(x) * torch.sin(2 * x)


def wave_slope(x):
    return torch.exp(x) * (torch.sin(2 * x) + 2 * torch.cos(2 * x))


def circle(x):
    return torch.stack([torch.sin(x), torch.cos(x)], -1)


def circle_slope(x):
    return torch.stack([torch.cos(x), -torch.sin(x)], -1)


def narrowing(x):
    return torch.sinh(x) @ M.T


def narrowing_jacobian(x):
    return M * torch.cosh(x)[..., None, :]


def square(x):
    return x @ A @ x.sin()


# y_ij = x_ik A_kl sin(x)_lj, so dy_ij / dx_mn = d_im (A sin x)_nj + (x A)_im cos(x)_mj d_jn.
def square_jacobian(x):
    eye = torch.eye(2, dtype=x.dtype)
    left, right = A @ x.sin(), x @ A
    return torch.einsum("im,...nj->...ijmn", eye, left) + torch.einsum("...im,...mj,jn->...ijmn", right, x.cos(), eye)


def scaled(x, c):
    return torch.sin(x * c) * x.sum(-1, keepdim=True)


def scaled_jacobian(x, c):
    s = x.sum(-1)[..., None, None]
    to_x = torch.diag_embed(torch.cos(x * c) * c) * s + torch.sin(x * c)[..., :, None]
    return to_x, torch.diag_embed(torch.cos(x * c) * x) * s


def tree(x):
    a, b = x["a"], x["b"]
    return [torch.sinh(a) @ M.T * b.exp()[..., None], (b * a.sum(-1)).sin()]


def tree_jacobian(x):
    a, b = x["a"], x["b"]
    p, cosine = torch.sinh(a) @ M.T * b.exp()[..., None], (b * a.sum(-1)).cos()
    return [
        {"a": M * (torch.cosh(a) * b.exp()[..., None])[..., None, :], "b": p},
        {"a": (cosine * b)[..., None].expand(a.shape), "b": cosine * a.sum(-1)},
    ]


class Spread:
    """The Jacobian of `narrowing` as an operator, which never forms a matrix."""

    def __init__(self, x, transposed=False):
        self.x, self.transposed = x, transposed

    def mv(self, v):
        cosh = torch.cosh(self.x)
        return v @ M * cosh if self.transposed else (cosh * v) @ M.T

    @property
    def T(self):
        return Spread(self.x, not self.transposed)


CASES = [
    Case("number", wave, wave_slope, (ramp(),), {}),
    Case("elementwise", wave, wave_slope, (ramp(2, 3),), {"event_dim": 0}),
    Case("circle", circle, circle_slope, (ramp(2, 3),), {"event_dim": 0, "out_event_dim": 1}),
    Case("vector", narrowing, narrowing_jacobian, (ramp(3),), {}),
    Case("vectors", narrowing, narrowing_jacobian, (ramp(2, 3),), {"event_dim": 1}),
    Case("matrices", square, square_jacobian, (ramp(2, 2, 2),), {"event_dim": 2}),
    Case("shared", scaled, scaled_jacobian, (ramp(2, 3), ramp(3, start=0.5)),
         {"argnums": (0, 1), "event_dim": (1, None), "out_event_dim": 1}),
    Case("two batched", scaled, scaled_jacobian, (ramp(2, 3), ramp(2, 3, start=0.5)),
         {"argnums": (0, 1), "event_dim": 1}),
    Case("swapped", lambda c, x: scaled(x, c), lambda c, x: scaled_jacobian(x, c), (ramp(3, start=0.5), ramp(3)),
         {"argnums": (1, 0)}),
    Case("tree", tree, tree_jacobian, ({"a": ramp(2, 3), "b": ramp(2, start=0.2)},),
         {"event_dim": {"a": 1, "b": 0}, "out_event_dim": [1, 0]}),
    Case("operator", narrowing, Spread, (ramp(2, 3),), {"event_dim": 1}),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=repr)


def stacked(inputs):
    return tuple(torch.stack([t, 0.5 * t + 0.1, 1.2 * t]) for t in inputs)


def backward(order):
    def stack(h, inputs):
        inputs = live(inputs)
        grads = h(*inputs)
        for _ in range(order):
            grads = torch.autograd.grad(total(grads), inputs, create_graph=True)
        return tuple(t.detach() for t in grads)

    return stack


def dual(h, inputs):
    with forward_ad.dual_level():
        y = h(*map(forward_ad.make_dual, inputs, tangents(inputs)))
        return tuple(forward_ad.unpack_dual(t).tangent for t in y)


def batched_cotangents(h, inputs):
    inputs = live(inputs)
    y = h(*inputs)
    return torch.autograd.grad(y, inputs, [torch.stack([t.cos(), t.sin()]) for t in y], is_grads_batched=True)


def of(transform):
    """A transform that takes argnums, with respect to every input."""
    return lambda h, inputs: transform(h, all_of(inputs))(*inputs)


STACKS = {
    "backward": backward(1),
    "double backward": backward(2),
    "triple backward": backward(3),
    "is_grads_batched": batched_cotangents,
    "dual numbers": dual,
    "linearize": lambda h, i: linearize(h, *i)[1](*tangents(i)),
    "grad": lambda h, i: grad(loss(h), all_of(i))(*i),
    "vjp": lambda h, i: vjp(h, *i)[1](tuple(t.cos() for t in h(*i))),
    "jvp": lambda h, i: jvp(h, i, tangents(i))[1],
    "jacrev": of(jacrev),
    "jacfwd": of(jacfwd),
    "hessian": lambda h, i: hessian(loss(h), all_of(i))(*i),
    "jacrev(jacrev)": lambda h, i: jacrev(jacrev(h, all_of(i)), all_of(i))(*i),
    "jacfwd(jacfwd)": lambda h, i: jacfwd(jacfwd(h, all_of(i)), all_of(i))(*i),
    "jacrev(jacfwd)": lambda h, i: jacrev(jacfwd(h, all_of(i)), all_of(i))(*i),
    "jacfwd(jacrev(grad))": lambda h, i: jacfwd(jacrev(grad(loss(h))))(*i),
    "jacfwd(jacfwd(jacfwd))": lambda h, i: jacfwd(jacfwd(jacfwd(h)))(*i),
    "vmap": lambda h, i: vmap(h)(*stacked(i)),
    "vmap(grad)": lambda h, i: vmap(grad(loss(h), all_of(i)))(*stacked(i)),
    "vmap(jacrev)": lambda h, i: vmap(jacrev(h, all_of(i)))(*stacked(i)),
    "vmap(jacfwd)": lambda h, i: vmap(jacfwd(h, all_of(i)))(*stacked(i)),
    "vmap(hessian)": lambda h, i: vmap(hessian(loss(h), all_of(i)))(*stacked(i)),
    "vmap(jacfwd(jacfwd))": lambda h, i: vmap(jacfwd(jacfwd(h, all_of(i)), all_of(i)))(*stacked(i)),
    "vmap(grad) over one": lambda h, i: vmap(grad(loss(h), all_of(i)), (0,) + (None,) * len(i[1:]))(stacked(i)[0], *i[1:]),
    "grad(vmap)": lambda h, i: grad(loss(vmap(h)), all_of(i))(*stacked(i)),
    "vmap(vmap(grad))": lambda h, i: vmap(vmap(grad(loss(h), all_of(i))))(*stacked(stacked(i))),
}


@every_case
def test_values(case):
    assert_close(case.custom()(*case.inputs), case.closed_form()(*case.inputs))


@every_case
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_every_stack(case, stack):
    assert_close(stack(case.custom(), case.inputs), stack(case.closed_form(), case.inputs))


@every_case
def test_gradcheck(case):
    inputs = live(case.inputs)
    assert torch.autograd.gradcheck(case.custom(), inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(case.custom(), inputs)


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("name", ["backward", "jacrev", "jacfwd", "hessian"])
def test_one_of_several_arguments(wanted, name):
    """The other one carries no derivative at this call."""
    case = next(case for case in CASES if case.name == "shared")

    def alone(h):
        others = case.inputs
        return lambda t: h(*others[:wanted], t, *others[wanted + 1 :])

    inputs = (case.inputs[wanted],)
    assert_close(STACKS[name](alone(case.custom()), inputs), STACKS[name](alone(case.closed_form()), inputs))


def test_a_complex_function():
    def fn(z):
        return torch.sin(z) @ M.to(z.dtype).T

    def jacobian(z):
        return M * torch.cos(z)[..., None, :]

    z = torch.complex(ramp(2, 3), ramp(2, 3, start=0.3))
    h = custom_jacobian(in_numpy(fn), jacobian, event_dim=1)

    def of_parts(h):
        return lambda parts: (torch.view_as_real(h(torch.view_as_complex(parts))),)

    parts = (torch.view_as_real(z).clone(),)
    for name in ("backward", "double backward", "jacfwd", "jacrev", "hessian", "vmap(jacfwd)"):
        assert_close(STACKS[name](of_parts(h), parts), STACKS[name](of_parts(fn), parts))


# --- arguments -------------------------------------------------------------------------------------


def powers(x, n, scale):
    return scale * x**n


def powers_slope(x, n, scale):
    return scale * n * x ** (n - 1)


def test_arguments_outside_argnums():
    x, scale = ramp(3), torch.tensor([2.0, 0.5, 1.5], dtype=torch.float64)
    h = custom_jacobian(powers, powers_slope, event_dim=0)
    assert_close(grad(lambda x: h(x, 3, scale).sum())(x), 3 * scale * x**2)
    # Mapped over, they carry no derivative either.
    rows = torch.stack([scale, 2 * scale])
    got = vmap(grad(lambda x, scale: h(x, 3, scale).sum()), in_dims=(None, 0))(x, rows)
    assert_close(got, 3 * rows * x**2)


def outside_by_autograd(h, x, c):
    return h(x.requires_grad_(), 3, c.requires_grad_())


def outside_by_grad(h, x, c):
    return grad(lambda c: h(x, 3, c).sum())(c)


def outside_by_jvp(h, x, c):
    return jvp(lambda c: h(x, 3, c), (c,), (c,))


def outside_by_vmap_grad(h, x, c):
    return vmap(grad(lambda c: h(x, 3, c).sum()))(c[:, None])


def outside_by_dual_numbers(h, x, c):
    with forward_ad.dual_level():
        return h(x, 3, forward_ad.make_dual(c, c))


OUTSIDE = [outside_by_autograd, outside_by_grad, outside_by_jvp, outside_by_vmap_grad, outside_by_dual_numbers]


@pytest.mark.parametrize("stack", OUTSIDE, ids=lambda s: s.__name__.removeprefix("outside_by_"))
def test_a_live_argument_outside_argnums(stack):
    h = custom_jacobian(powers, powers_slope, event_dim=0)
    with pytest.raises(NoDerivativeError, match="argument outside `argnums`"):
        stack(h, ramp(3), torch.ones(3, dtype=torch.float64))


def test_a_live_argument_outside_argnums_is_fine_where_nothing_is_differentiated():
    with torch.no_grad():
        y = custom_jacobian(powers, powers_slope, event_dim=0)(ramp(3), 3, live_tensor())
    assert_close(y, 2 * ramp(3) ** 3)


def live_tensor():
    return torch.tensor(2.0, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("where", ["fn", "jacobian"])
@pytest.mark.parametrize("what", ["tensor", "module"])
def test_a_live_closure(where, what):
    held = live_tensor() if what == "tensor" else nn.Linear(1, 1).double()

    def c():
        return held.detach() if what == "tensor" else held.weight.detach()[0, 0]

    def fn(x):
        return (c() if where == "fn" else 2.0) * torch.sin(x)

    def jacobian(x):
        return (c() if where == "jacobian" else 2.0) * torch.cos(x)

    with pytest.raises(NoDerivativeError, match="closes over"):
        custom_jacobian(fn, jacobian, event_dim=0)(ramp(3).requires_grad_())


def test_a_closure_over_a_tensor_of_grad():
    def outer(c):
        return custom_jacobian(lambda x: c * torch.sin(x), lambda x: c * torch.cos(x), event_dim=0)(ramp(3)).sum()

    with pytest.raises(NoDerivativeError, match="closes over"):
        grad(outer)(torch.tensor(2.0, dtype=torch.float64))


def test_a_closure_over_a_tensor_of_vmap():
    """Mapped over but not differentiated: no derivative is lost."""

    def one(x, c):
        h = custom_jacobian(lambda x: (c * torch.sin(x)).numpy(), lambda x: c * torch.cos(x), event_dim=0)
        return grad(lambda x: h(x).sum())(x)

    xs, cs = ramp(2, 3), torch.tensor([2.0, 0.5], dtype=torch.float64)
    assert_close(vmap(one)(xs, cs), cs[:, None] * xs.cos())


def test_keyword_arguments_reach_fn_alone():
    h = custom_jacobian(lambda x, *, sign=1.0: torch.sin(x) + 0 * sign, torch.cos, event_dim=0)
    assert_close(grad(lambda x: h(x, sign=2.0).sum())(ramp(3)), ramp(3).cos())
    with pytest.raises(NoDerivativeError, match="keyword argument"):
        h(ramp(3), sign=live_tensor())


def test_has_aux():
    def fn(x):
        return np.sin(x.numpy()), {"steps": 7, "x": 2 * x}

    x = ramp(2, 3)
    h = custom_jacobian(fn, torch.cos, event_dim=0, has_aux=True)
    leaf = x.clone().requires_grad_()
    y, aux = h(leaf)
    assert aux["steps"] == 7
    assert not aux["x"].requires_grad
    assert_close(aux["x"], 2 * x)
    assert_close(torch.autograd.grad(y.sum(), leaf)[0], x.cos())
    gradient, aux = vmap(grad(lambda x: (h(x)[0].sum(), h(x)[1]), has_aux=True))(x)
    assert_close((gradient, aux["x"]), (x.cos(), 2 * x))
    assert aux["steps"].tolist() == [7, 7]


def test_integer_leaves_pass_through():
    def fn(x):
        return {"n": x["n"], "y": x["n"] * torch.sin(x["x"])}

    def jacobian(x):
        return {"n": None, "y": {"n": None, "x": x["n"] * torch.cos(x["x"])}}

    x, n = ramp(3), torch.tensor([1, 2, 3])
    h = custom_jacobian(fn, jacobian, event_dim=0)
    assert h({"n": n, "x": x})["n"].dtype == torch.int64
    assert_close(jacrev(lambda x: h({"n": n, "x": x})["y"])(x), torch.diag(n * x.cos()))


# --- how often, and what it costs -------------------------------------------------------------------


def test_fn_once_and_the_jacobian_only_when_asked_for():
    calls = []
    h = custom_jacobian(
        lambda x: calls.append("fn") or torch.sin(x), lambda x: calls.append("jacobian") or torch.cos(x), event_dim=0
    )
    y = h(ramp(3).requires_grad_())
    assert calls == ["fn"]
    y.sum().backward()
    assert calls == ["fn", "jacobian"]
    with torch.no_grad():
        h(ramp(3).requires_grad_())
    h(ramp(3))
    assert calls == ["fn", "jacobian", "fn", "fn"]


@pytest.mark.parametrize(("method", "shapes"), [("sequential", [(3,)] * 4), ("broadcast", [(4, 3)]), (None, [(4, 3)])])
def test_vmap_method(method, shapes):
    seen = []
    h = custom_jacobian(
        lambda x: seen.append(tuple(x.shape)) or narrowing(x), narrowing_jacobian, event_dim=1, vmap_method=method
    )
    xs = ramp(4, 3)
    assert_close(vmap(jacrev(h))(xs), vmap(jacrev(narrowing))(xs))
    assert seen == shapes


# --- dtypes, shapes and values at the edge ---------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)])
def test_precision_is_kept(dtype, tolerance):
    x = ramp(2, 3).to(dtype).requires_grad_()

    def jacobian(x):
        return M.to(x.dtype) * torch.cosh(x)[..., None, :]

    h = custom_jacobian(lambda x: narrowing(x.double()), jacobian, event_dim=1)
    y = h(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == gradient.dtype == dtype
    assert_close(gradient.double(), grad(lambda x: narrowing(x).sum())(x.detach().double()), tolerance)


def test_an_empty_batch():
    x = ramp(0, 3).requires_grad_()
    h = custom_jacobian(narrowing, narrowing_jacobian, event_dim=1)
    (gradient,) = torch.autograd.grad(h(x).sum(), x)
    assert gradient.shape == (0, 3)
    assert jacfwd(h)(ramp(0, 3)).shape == (0, 2, 0, 3)


def test_nan_stays_in_its_sample():
    x = ramp(3, 3)
    x[1, 0] = torch.nan
    gradient = grad(lambda x: custom_jacobian(narrowing, narrowing_jacobian, event_dim=1)(x).sum())(x)
    want = grad(lambda x: narrowing(x).sum())(ramp(3, 3))
    assert gradient[1].isnan().any()
    assert_close(gradient[[0, 2]], want[[0, 2]])


def test_integer_input_gives_values():
    n = torch.arange(3)
    assert_close(custom_jacobian(lambda n: n**2 + 0.5, lambda n: 2 * n, event_dim=0)(n), n**2 + 0.5)


# --- the object --------------------------------------------------------------------------------------


def test_it_keeps_its_name_and_pickles():
    h = custom_jacobian(wave, wave_slope, event_dim=0)
    assert h.__name__ == "wave"
    for other in (copy.deepcopy(h), pickle.loads(pickle.dumps(h))):
        assert_close(grad(lambda x: other(x).sum())(ramp(3)), wave_slope(ramp(3)))  # noqa: B023


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("argnums", [-1, (0, 0), (), 1.5, "x", True, (0, -1), [0]])
def test_bad_argnums(argnums):
    with pytest.raises(ValueError, match=r"`argnums` is .*; choose"):
        custom_jacobian(wave, wave_slope, argnums=argnums)


def test_argnums_beyond_the_arguments():
    h = custom_jacobian(scaled, scaled_jacobian, argnums=(0, 1))
    with pytest.raises(TypeError, match="needs 2 positional arguments, 1 arrived"):
        h(ramp(3), c=ramp(3))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"vmap_method": "parallel"}, ValueError, "choose 'sequential', 'broadcast', 'vmap'"),
        ({"event_dim": -1}, ValueError, "choose None, 0, 1, 2"),
        ({"event_dim": 3}, StructureError, "at least 3 dims"),
        ({"event_dim": {"a": 1}}, StructureError, "not a prefix"),
        ({"out_event_dim": 4}, StructureError, "at least 4 dims"),
    ],
    ids=["vmap_method", "negative", "too many", "structure", "out"],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        custom_jacobian(wave, wave_slope, **options)(ramp(2, 3).requires_grad_())


@pytest.mark.parametrize("which", ["fn", "jacobian"])
def test_not_callable(which):
    with pytest.raises(TypeError, match=rf"`{which}` is .* a callable is needed"):
        custom_jacobian(**({"fn": wave, "jacobian": wave_slope} | {which: ramp(3)}))


ORDERS = {"reverse": lambda h, x: grad(lambda x: h(x).sum())(x), "forward": lambda h, x: jvp(h, (x,), (x,))}
both_modes = pytest.mark.parametrize("mode", ORDERS.values(), ids=ORDERS)


@both_modes
@pytest.mark.parametrize("shape", [(2, 3, 2), (3,), (2, 2), (5, 2, 3), (3, 4, 2, 3), (3, 1, 2, 3)])
def test_wrong_shapes(mode, shape):
    h = custom_jacobian(narrowing, lambda x: torch.ones(shape, dtype=x.dtype), event_dim=1)
    with pytest.raises(StructureError, match="`jacobian` returned"):
        mode(h, ramp(4, 3))


@both_modes
@pytest.mark.parametrize("shape", [(4,), (2, 4), (5, 2, 3), (2, 3, 3)])
def test_wrong_shapes_of_a_slope(mode, shape):
    h = custom_jacobian(wave, lambda x: torch.ones(shape, dtype=x.dtype), event_dim=0)
    with pytest.raises(StructureError, match="`jacobian` returned"):
        mode(h, ramp(2, 3))


class Doubling(Spread):
    """Results twice as long as they should be."""

    def mv(self, v):
        return super().mv(v).repeat_interleave(2, -1)

    @property
    def T(self):
        return Doubling(self.x, not self.transposed)


class OneWay:
    def __init__(self, x):
        self.x = x

    def mv(self, v):
        return v


@pytest.mark.parametrize(
    ("operator", "name"), [(Doubling, "forward"), (Doubling, "reverse"), (OneWay, "reverse")], ids=["out", "in", "T"]
)
def test_wrong_operators(operator, name):
    with pytest.raises(StructureError, match="`custom_jacobian`"):
        ORDERS[name](custom_jacobian(narrowing, operator, event_dim=1), ramp(4, 3))


@both_modes
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3)])
def test_one_jacobian_may_serve_all_samples(mode, shape):
    h = custom_jacobian(lambda x: x @ M.T, lambda x: M.expand(shape), event_dim=1)
    assert_close(mode(h, ramp(4, 3)), mode(lambda x: x @ M.T, ramp(4, 3)))


@both_modes
@pytest.mark.parametrize(
    "jacobian",
    [lambda x, c: scaled_jacobian(x, c)[0], lambda x, c: (*scaled_jacobian(x, c), x), lambda x, c: {"x": x, "c": c}],
    ids=["one", "three", "dict"],
)
def test_wrong_structure(mode, jacobian):
    h = custom_jacobian(scaled, jacobian, argnums=(0, 1))
    with pytest.raises(StructureError, match="what `jacobian` returned"):
        mode(lambda x: h(x, x), ramp(3))


@both_modes
@pytest.mark.parametrize("value", [None, 2.0, np.ones((2, 3))], ids=["None", "number", "array"])
def test_a_jacobian_that_is_no_tensor(mode, value):
    with pytest.raises(StructureError, match="that it returns tensors"):
        mode(custom_jacobian(narrowing, lambda x: value, event_dim=1), ramp(4, 3))


def test_a_real_function_of_a_complex_number():
    z = torch.complex(ramp(3), ramp(3)).requires_grad_()
    with pytest.raises(StructureError, match="not holomorphic"):
        custom_jacobian(torch.abs, lambda z: z, event_dim=0)(z)


# --- torch.compile ------------------------------------------------------------------------------------


def compiled(name, *cases):
    """In a process of its own; Dynamo has to trace fn."""
    for case in (case for case in CASES if case.name in cases):
        h, stack, inputs = case.custom(opaque=False), STACKS[name], case.inputs
        if name == "backward":
            got = stack(torch.compile(h, fullgraph=True, backend="aot_eager"), inputs)
        else:
            got = torch.compile(lambda *i: stack(h, i), fullgraph=True, backend="aot_eager")(*inputs)  # noqa: B023
        assert_close(got, stack(case.closed_form(), inputs))


@pytest.mark.parametrize("name", ["backward", "grad", "vmap(grad)", "jvp", "jacrev", "jacfwd", "hessian"])
def test_compile(name):
    run_fresh(compiled, name, "elementwise", "shared", "operator")


@pytest.mark.parametrize("case", ["circle", "vectors", "tree"])
def test_compile_first_and_second_order(case):
    run_fresh(compiled, "backward", case)
    run_fresh(compiled, "hessian", case)


def with_arguments_outside_argnums():
    scale = torch.tensor([2.0, 0.5, 1.5], dtype=torch.float64)
    h = custom_jacobian(powers, powers_slope, event_dim=0)
    gradient = torch.compile(grad(lambda x, scale: h(x, 3, scale).sum()), fullgraph=True, backend="aot_eager")
    assert_close(gradient(ramp(3), scale), 3 * scale * ramp(3) ** 2)


def test_compile_with_arguments_outside_argnums():
    run_fresh(with_arguments_outside_argnums)


def outside(x, c):
    return custom_jacobian(powers, powers_slope, event_dim=0)(x, 3, c)


def closure_of_fn(x, c):
    return custom_jacobian(lambda x: c * torch.sin(x), torch.cos, event_dim=0)(x)


def keyword(x, c):
    return custom_jacobian(lambda x, *, c: c * torch.sin(x), torch.cos, event_dim=0)(x, c=c)


def lost(function, how):
    """A trace may not tell what a transform in it differentiates: nan there, and otherwise the error of eager."""
    function, x, c = globals()[function], ramp(3), torch.tensor(2.0, dtype=torch.float64)
    if how == "grad":
        gradient = torch.compile(grad(lambda c: function(x, c).sum()), fullgraph=True, backend="aot_eager")
        try:
            assert gradient(c).isnan()
        except Exception as error:  # newer than torch 2.13
            assert "would be lost" in str(error)
    else:
        with pytest.raises(Exception, match="would be lost"):
            torch.compile(function, fullgraph=True, backend="aot_eager")(x.requires_grad_(), c.requires_grad_())


@pytest.mark.parametrize("how", ["backward", "grad"])
@pytest.mark.parametrize("function", ["outside", "closure_of_fn", "keyword"])
def test_compile_loses_nothing(function, how):
    run_fresh(lost, function, how)


# --- whose memory it is ----------------------------------------------------------------------------


class Handed:
    """The Jacobian of x -> (x + 1, x - 1), or of x -> x + 1: it hands on what it is given."""

    def __init__(self, *, twice: bool) -> None:
        self.twice = twice

    def mv(self, v):
        return (v, v.view_as(v)) if self.twice else v

    @property
    def T(self):
        return self if not self.twice else _Sum()


class _Sum:
    def mv(self, v):
        return v[0] + v[1]


POINT, DIRECTION = (torch.tensor(t, dtype=torch.float64) for t in ([0.3, -0.7], [1.0, 2.0]))


def by_dual_numbers(function, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))).tangent


PUSHED = {
    "jvp": lambda h, x, v: jvp(h, (x,), (v,))[1],
    "vmap(jvp)": lambda h, x, v: vmap(lambda x, v: jvp(h, (x,), (v,))[1])(x[None], v[None])[0],
    "jvp(vmap)": lambda h, x, v: jvp(vmap(h), (x[None],), (v[None],))[1][0],
    "dual numbers": by_dual_numbers,
}
every_push = pytest.mark.parametrize("push", PUSHED.values(), ids=PUSHED)


@every_push
@pytest.mark.parametrize("event_dim", [None, 1])
def test_a_tangent_that_the_operator_hands_on_is_a_copy(push, event_dim):
    h, v = custom_jacobian(lambda x: x + 1, lambda x: Handed(twice=False), event_dim=event_dim), DIRECTION.clone()
    assert_close(push(lambda z: h(z).mul_(3) + z, POINT, v), 4 * DIRECTION)
    assert torch.equal(v, DIRECTION)


@every_push
def test_two_outputs_have_a_tangent_each(push):
    h, v = custom_jacobian(lambda x: (x + 1, x - 1), lambda x: Handed(twice=True), event_dim=1), DIRECTION.clone()

    def changed(z):
        first, second = h(z)
        return first.mul_(3) + 10 * second + 100 * z

    assert_close(push(changed, POINT, v), 113 * DIRECTION)
    assert torch.equal(v, DIRECTION)


def test_a_cotangent_that_the_operator_hands_on_is_a_copy():
    h, v = custom_jacobian(lambda x: x + 1, lambda x: Handed(twice=False)), DIRECTION.clone()
    x = POINT.clone().requires_grad_()
    for received in (vjp(h, POINT)[1](v)[0], torch.autograd.grad(h(x), x, v)[0]):
        received.mul_(3)
    assert torch.equal(v, DIRECTION)


class Operator:
    """J as an object, with its transpose."""

    def __init__(self, matrix):
        self.matrix = matrix

    def mv(self, v):
        return (self.matrix @ v.unsqueeze(-1)).squeeze(-1)

    @property
    def T(self):
        return Operator(self.matrix.mT)


@pytest.mark.parametrize("event_dim", [None, 1])
def test_a_complex_operator(event_dim):
    """`T` is the transpose; the conjugation of torch's convention is ours."""
    A = torch.tensor([[1 + 2j, 0.5], [3j, 1.0 - 1j]], dtype=torch.complex128)
    exact = lambda x: (A @ x.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    h = custom_jacobian(exact, lambda x: Operator(A), event_dim=event_dim)
    x, v = torch.tensor([1.0 + 1j, 2.0], dtype=torch.complex128), torch.tensor([1.0, 2.0 - 1j], dtype=torch.complex128)
    for f in (lambda h: vjp(h, x)[1](v)[0], lambda h: jvp(h, (x,), (v,))[1]):
        torch.testing.assert_close(f(h), f(exact))
    number = lambda h: lambda x: torch.view_as_real(h(x)).sin().sum()  # noqa: E731
    torch.testing.assert_close(grad(number(h))(x), grad(number(exact))(x))
