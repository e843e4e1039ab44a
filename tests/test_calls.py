"""What is called, when, how often, with what; what comes back; what stays in memory."""

import copy
import gc
import inspect
import pickle
import sys
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import all_of, assert_close, every_problem, live, loss, total
from problems import VECTOR, vector_exact, vector_f, vector_g
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import functorch_inverse as fi

X, C, B = VECTOR.inputs()
XS, CS, BS = VECTOR.stacked(4)


class Counted:
    """A function that remembers the tensors it was called with."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, *args, **kwargs):
        self.seen.append(args)
        return self.function(*args, **kwargs)

    @property
    def calls(self):
        return len(self.seen)


@pytest.fixture
def g():
    return Counted(vector_g)


@pytest.fixture
def f():
    return Counted(vector_f)


# --- how often -------------------------------------------------------------------------------------

TRANSFORMS = {
    "autograd": lambda h: torch.autograd.grad(loss(h)(*live((X, C, B))), live((X, C, B)), allow_unused=True),
    "grad": lambda h: grad(loss(h), (0, 1, 2))(X, C, B),
    "vjp": lambda h: vjp(h, X, C, B)[1]((X,)),
    "jvp": lambda h: jvp(h, (X, C, B), (X, C, B)),
    "jacrev": lambda h: jacrev(h, (0, 1, 2))(X, C, B),
    "jacfwd": lambda h: jacfwd(h, (0, 1, 2))(X, C, B),
    "hessian": lambda h: hessian(loss(h), (0, 1, 2))(X, C, B),
    "jacrev_jacrev": lambda h: jacrev(jacrev(h))(X, C, B),
    "jacfwd_jacfwd_jacfwd": lambda h: jacfwd(jacfwd(jacfwd(h)))(X, C, B),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("event_dim", [None, 1])
def test_g_once_per_forward_and_never_for_a_derivative(g, transform, event_dim):
    h = fi.custom_inverse(g, vector_f, event_dim=event_dim)
    TRANSFORMS[transform](lambda *inputs: (h(*inputs),))
    assert g.calls == 1


def test_backward_never_calls_g(g):
    inputs = live((X, C, B))
    y = fi.custom_inverse(g, vector_f)(*inputs)
    first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
    torch.autograd.grad(total(first), inputs, create_graph=True)
    assert g.calls == 1


@pytest.mark.parametrize(
    ("options", "dims", "calls"),
    [
        ({}, (0, None, None), 4),
        ({"event_dim": 1}, (0, None, None), 1),
        ({"event_dim": 1}, (0, 0, 0), 4),  # broadcasting is only surely right where x alone is batched
        ({"event_dim": 1}, (None, 0, None), 4),
        ({"vmap_method": "sequential", "event_dim": 1}, (0, None, None), 4),
        ({"vmap_method": "broadcast", "event_dim": 1}, (0, 0, 0), 1),
        ({"vmap_method": "broadcast"}, (0, 0, 0), 1),
    ],
)
@pytest.mark.parametrize("transform", ["values", "grad", "jacfwd", "hessian"])
def test_calls_under_vmap(g, options, dims, calls, transform):
    h = fi.custom_inverse(g, vector_f, **options)
    derivative = {
        "values": h,
        "grad": grad(lambda *i: h(*i).sin().sum(), (0, 1, 2)),
        "jacfwd": jacfwd(h, (0, 1, 2)),
        "hessian": hessian(h),
    }[transform]
    inputs = [many if d == 0 else one for many, one, d in zip((XS, CS, BS), (X, C, B), dims, strict=True)]
    vmap(derivative, dims)(*inputs)
    assert g.calls == calls


@pytest.mark.parametrize(("options", "calls"), [({}, 6), ({"event_dim": 1}, 1), ({"vmap_method": "broadcast"}, 1)])
def test_calls_under_nested_vmap(g, options, calls):
    xs = VECTOR.stacked(2, 3)[0]
    h = fi.custom_inverse(g, vector_f, **options)
    nested = vmap(vmap(h, (0, None, None)), (0, None, None))
    assert_close([nested(xs, C, B)], [vector_exact(xs, C, B)])
    assert g.calls == calls


def test_vmap_method_vmap_calls_once_with_batched_tensors():
    g = Counted(vector_exact)
    h = fi.custom_inverse(g, vector_f, vmap_method="vmap")
    got = vmap(vmap(jacrev(h, (0, 1, 2))))(*(t[None] for t in (XS, CS, BS)))
    assert g.calls == 1
    assert [t.shape for t in g.seen[0]] == [(3,)] * 3  # what one sample is, whatever is vmapped
    assert_close(got, vmap(vmap(jacrev(vector_exact, (0, 1, 2))))(*(t[None] for t in (XS, CS, BS))))


@every_problem
@pytest.mark.parametrize("vmap_method", ["sequential", "vmap"])
def test_every_vmap_method_is_right(problem, vmap_method):
    """ "vmap" asks for a g made of torch operations: the closed form."""
    g = problem.exact if vmap_method == "vmap" else problem.g
    chosen = replace(problem, g=g, options={**problem.options, "vmap_method": vmap_method})
    inputs = problem.stacked(2, 2)
    transform = lambda h: vmap(vmap(jacrev(h, all_of(inputs))))(*inputs)  # noqa: E731
    assert_close(transform(chosen.custom()), transform(problem.closed_form()))


def test_sequential_order_is_that_of_the_batch(g):
    h = fi.custom_inverse(g, vector_f)
    vmap(h, (0, None, None))(XS, C, B)
    assert_close([args[0] for args in g.seen], list(XS))


# --- nothing beyond g where nothing is live --------------------------------------------------------


def refuses(*args):
    raise AssertionError("f was called")


@pytest.mark.parametrize("event_dim", [None, 1])
def test_f_is_not_called_where_nothing_is_live(g, event_dim):
    fi.custom_inverse(g, refuses, event_dim=event_dim)(X, C, B)
    assert g.calls == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_f_is_not_called_without_grad(g, mode):
    with mode():
        fi.custom_inverse(g, refuses)(*live((X, C, B)))
    assert g.calls == 1


def test_f_is_not_called_under_vmap_where_nothing_is_live(g):
    vmap(fi.custom_inverse(g, refuses, event_dim=1), (0, None, None))(XS, C, B)
    assert g.calls == 1


def test_f_is_not_called_where_the_live_tensor_is_elsewhere(g):
    with torch.no_grad():
        y = fi.custom_inverse(g, refuses)(X, C, B)
    (y * X.clone().requires_grad_()).sum().backward()


def test_f_is_not_called_by_a_forward_whose_closures_can_be_seen(g):
    """Its first call is in the backward pass."""
    shift = B.clone().requires_grad_()
    f = Counted(lambda y, c: vector_f(y, c, shift))
    y = fi.custom_inverse(lambda x, c: g(x, c, B), f.__call__)(*live((X, C)))
    assert f.calls == 0
    y.sum().backward()
    assert f.calls == 1


def test_one_f_serves_the_first_order_of_x_and_theta(f):
    inputs = live((X, C, B))
    fi.custom_inverse(vector_g, f)(*inputs).sum().backward()
    assert f.calls == 1


def test_no_jacobian_is_built_for_outputs_that_nobody_differentiates(monkeypatch):
    monkeypatch.setattr(torch.linalg, "lu_factor_ex", refuses)
    y = fi.custom_inverse(vector_g, vector_f)(*live((X, C, B)))
    assert y.requires_grad


# --- what g sees -----------------------------------------------------------------------------------

SEEN = {
    "plain": lambda h: h(X, C, B),
    "autograd": lambda h: h(*live((X, C, B))),
    "no_grad": lambda h: torch.no_grad()(h)(*live((X, C, B))),
    "jacrev": lambda h: jacrev(h, (0, 1, 2))(X, C, B),
    "jacfwd_jacfwd": lambda h: jacfwd(jacfwd(h, (0, 1, 2)), (0, 1, 2))(X, C, B),
    "hessian": lambda h: hessian(h, (0, 1, 2))(X, C, B),
    "vmap": lambda h: vmap(h)(XS, CS, BS),
    "vmap_hessian": lambda h: vmap(hessian(h, (0, 1, 2)))(XS, CS, BS),
    "jacrev_vmap": lambda h: jacrev(vmap(h), (0, 1, 2))(XS, CS, BS),
}


def assert_plain(t):
    assert type(t) is torch.Tensor or type(t) is torch.nn.Parameter
    assert not t.requires_grad
    assert t.grad_fn is None
    assert not torch._C._functorch.is_functorch_wrapped_tensor(t)
    assert torch.autograd.forward_ad._current_level < 0 or torch.autograd.forward_ad.unpack_dual(t).tangent is None


@pytest.mark.parametrize("transform", SEEN)
@pytest.mark.parametrize("event_dim", [None, 1])
def test_g_sees_plain_tensors(g, transform, event_dim):
    SEEN[transform](fi.custom_inverse(g, vector_f, event_dim=event_dim))
    for t in (t for args in g.seen for t in args):
        assert_plain(t)


@pytest.mark.parametrize("transform", SEEN)
def test_g_sees_plain_closures(transform):
    """Tensors that g closes over are plain too, and have the values of their sample."""
    seen = []

    def h(x, c, b):
        def g(x):
            seen.extend((c, b))
            for t in (c + 0, b * 1):
                assert_plain(t)
            return vector_g(x, c, b)

        return fi.custom_inverse(g, lambda y: vector_f(y, c, b))(x)

    SEEN[transform](h)
    assert seen


def test_g_sees_plain_parameters():
    module = torch.nn.Linear(3, 3, dtype=torch.float64)

    def g(x):
        for p in module.parameters():
            assert_plain(p)
        return np.linalg.solve(module.weight.numpy(), x.numpy() - module.bias.numpy())

    x = X.clone().requires_grad_()
    fi.custom_inverse(g, module)(x).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.requires_grad


def test_g_may_run_torch_with_gradients_of_its_own():
    """Newton's method by autograd inside g."""

    def g(x, a):
        y = x.clone()
        for _ in range(30):
            y = y.detach().requires_grad_()
            with torch.enable_grad():
                r = torch.sinh(a * y) - x
            (slope,) = torch.autograd.grad(r.sum(), y)
            y = y - r.detach() / slope
        return y.detach()

    h = fi.custom_inverse(g, lambda y, a: torch.sinh(a * y), event_dim=0)
    exact = lambda x, a: torch.asinh(x) / a  # noqa: E731
    for transform in (lambda h: jacrev(h, (0, 1))(X, C), lambda h: vmap(hessian(h, (0, 1)), (0, None))(XS, C)):
        assert_close(transform(h), transform(exact), 1e-8)


def test_inputs_are_not_changed(g):
    before = [t.clone() for t in (X, C, B)]
    fi.custom_inverse(g, vector_f)(*live((X, C, B))).sum().backward()
    assert_close([X, C, B], before)


def test_an_output_that_aliases_its_input_is_copied():
    x = X.clone().requires_grad_()
    y = fi.custom_inverse(lambda x: x, lambda y: y)(x)
    assert y.data_ptr() != x.data_ptr()
    assert_close(torch.autograd.grad(y.sin().sum(), x), (x.detach().cos(),))


def test_a_reused_numpy_buffer_is_copied():
    buffer = np.empty(3)

    def g(x):
        np.arcsinh(x.numpy(), out=buffer)
        return buffer

    h = fi.custom_inverse(g, torch.sinh, event_dim=0)
    first, second = h(X), h(C)
    assert_close([first, second], [X.asinh(), C.asinh()])


# --- aux and keywords ------------------------------------------------------------------------------


def g_with_aux(x, c, b):
    return vector_g(x, c, b), {"steps": 7, "text": "done", "norm": x.norm(), "rows": np.arange(3.0)}


def test_aux_comes_back_without_derivative():
    y, aux = fi.custom_inverse(g_with_aux, vector_f, has_aux=True)(*live((X, C, B)))
    assert y.requires_grad
    assert not aux["norm"].requires_grad
    assert (aux["steps"], aux["text"]) == (7, "done")
    assert_close([aux["norm"]], [X.norm()])


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_derivatives_beside_aux(transform):
    """torch.func itself takes nothing but tensors in aux."""
    h = fi.custom_inverse(lambda *i: (vector_g(*i), {"norm": i[0].norm()}), vector_f, has_aux=True)
    got, aux = transform(h, (0, 1, 2), has_aux=True)(X, C, B)
    assert_close([got, aux["norm"]], [transform(vector_exact, (0, 1, 2))(X, C, B), X.norm()])


@pytest.mark.parametrize("options", [{}, {"event_dim": 1}])
def test_aux_under_vmap(options):
    def g(x, c, b):
        return vector_g(x, c, b), {"norm": x.norm(dim=-1), "steps": torch.full(x.shape[:-1], 3)}

    h = fi.custom_inverse(g, vector_f, has_aux=True, **options)
    y, aux = vmap(h, (0, None, None))(XS, C, B)
    assert_close([y, aux["norm"]], [vector_exact(XS, C, B), XS.norm(dim=-1)])
    assert aux["steps"].tolist() == [3] * 4


def test_keywords_reach_g_alone():
    def g(x, c, b, *, scale=1.0, table=None):
        assert table is None or not table["t"].requires_grad
        return vector_g(x, c, b) * scale

    h = fi.custom_inverse(g, lambda y, c, b: vector_f(y / 2, c, b))
    got = jacrev(partial(h, scale=2.0, table={"t": X, "n": None}), (0, 1, 2))(X, C, B)
    assert_close(got, jacrev(lambda *i: 2 * vector_exact(*i), (0, 1, 2))(X, C, B))


# --- what comes back -------------------------------------------------------------------------------


def documented(x, c, b=None, *, scale: float = 1.0):
    """Solves something."""
    return vector_g(x, c, b)


def test_keeps_name_doc_and_signature():
    h = fi.custom_inverse(documented, vector_f)
    assert h.__name__ == "documented"
    assert h.__doc__ == "Solves something."
    assert h.__wrapped__ is documented
    assert inspect.signature(h) == inspect.signature(documented)
    assert "documented" in repr(h)
    assert "vector_f" in repr(h)


@pytest.mark.parametrize("through", [lambda h: pickle.loads(pickle.dumps(h)), copy.deepcopy, copy.copy])
def test_pickles_and_copies(through):
    h = through(fi.custom_inverse(vector_g, vector_f, event_dim=1, linear_solver=fi.LU(on_singular="nan")))
    assert_close(jacrev(h, (0, 1, 2))(X, C, B), jacrev(vector_exact, (0, 1, 2))(X, C, B))
    assert h.__name__ == "vector_g"


def test_takes_a_callable_without_a_name():
    h = fi.custom_inverse(partial(vector_g, c=C, b=B), partial(vector_f, c=C, b=B))
    assert_close([jacrev(h)(X)], [jacrev(partial(vector_exact, c=C, b=B))(X)])


def test_as_a_method_of_the_users_class():
    class Box:
        scale = 2.0

        def g(self, x, c, b):
            return vector_g(x, c, b) * self.scale

        def f(self, y, c, b):
            return vector_f(y / self.scale, c, b)

    box = Box()
    h = fi.custom_inverse(box.g, box.f)
    assert_close([jacrev(h)(X, C, B)], [2 * jacrev(vector_exact)(X, C, B)])


def test_solvers_are_values():
    assert fi.LU() == fi.LU(on_singular="raise")
    assert fi.LU() != fi.LU(on_singular="nan")
    assert len({fi.LU(), fi.LU(), fi.LU(on_singular="nan")}) == 2
    assert pickle.loads(pickle.dumps(fi.LU())) == fi.LU()


# --- memory ----------------------------------------------------------------------------------------


def test_y_is_freed_by_its_refcount():
    gc.collect()
    gc.disable()
    try:
        inputs = live((X, C, B))
        y = fi.custom_inverse(vector_g, vector_f)(*inputs)
        y.sum().backward()
        node, value = weakref.ref(y.grad_fn), weakref.ref(y)
        del y
        assert value() is None
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("order", [1, 2])
def test_a_graph_is_freed_by_its_refcount(order):
    class Marked:
        def __call__(self, y, c, b):
            return vector_f(y, c, b)

    gc.collect()
    gc.disable()
    try:
        f, inputs = Marked(), live((X, C, B))
        h = fi.custom_inverse(vector_g, f)
        out = total((h(*inputs),))
        for _ in range(order - 1):
            out = total(torch.autograd.grad(out, inputs, create_graph=True))
        torch.autograd.grad(out, inputs)
        gone = weakref.ref(f)
        del f, h, out
        assert gone() is None
    finally:
        gc.enable()


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


LOOPS = {
    "forward": lambda h: h(*live((X, C, B))),
    "backward": lambda h: h(*live((X, C, B))).sum().backward(),
    "double": lambda h: grad(lambda x: grad(lambda x: h(x, C, B).sin().sum())(x).sum())(X),
    "jacfwd": lambda h: jacfwd(h, (0, 1, 2))(X, C, B),
    "vmap": lambda h: vmap(grad(lambda *i: h(*i).sum()))(XS[:2], CS[:2], BS[:2]),
    "closure": lambda h: grad(lambda c: fi.custom_inverse(lambda x: h(x, c, B), lambda y: vector_f(y, c, B))(X).sum())(C),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_memory_is_flat_over_many_calls(loop):
    """Objects, tensors and references to the user's own tensors stay as many as they were."""
    h = fi.custom_inverse(vector_g, vector_f)
    for _ in range(20):
        LOOPS[loop](h)
    before = tensors_alive(), sys.getrefcount(X), len(gc.get_objects())
    for _ in range(300):
        LOOPS[loop](h)
    after = tensors_alive(), sys.getrefcount(X), len(gc.get_objects())
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 50  # a leak of one object a call would be 300


def test_memory_is_flat_over_many_functions():
    """Each made anew, with closures of its own: nothing keeps them."""

    def make_and_use():
        shift = B.clone().requires_grad_()
        h = fi.custom_inverse(lambda x: vector_g(x, C, shift), lambda y: vector_f(y, C, shift))
        h(X).sum().backward()
        return weakref.ref(shift)

    gone = [make_and_use() for _ in range(100)]
    gc.collect()
    assert all(ref() is None for ref in gone)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dims", [(0, 0, None), (0, None, 0), (None, 0, None), (None, 0, 0), (0, 0, 0), (1, -1, None)])
def test_one_call_for_arguments_of_more_dims_than_x(dims, size):
    """What is mapped must meet what is mapped alike, whatever stands beside it."""
    make = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(shape, generator=make, dtype=torch.float64) + 0.5

    def g(x, c, W):
        return torch.asinh((torch.linalg.inv(W) @ x.unsqueeze(-1)).squeeze(-1)) / c

    def f(y, c, W):
        return (W @ torch.sinh(c * y).unsqueeze(-1)).squeeze(-1)

    h = fi.custom_inverse(g, f, event_dim=1, vmap_method="broadcast")
    shapes = ((3,), (3,), (3, 3))
    inputs = []
    for k, (shape, dim) in enumerate(zip(shapes, dims, strict=True)):
        t = draw(*shape) if dim is None else draw(size, *shape)
        if k == 2:
            t = t / 4 + 2 * torch.eye(3, dtype=torch.float64)
        inputs.append(t if dim is None else t.movedim(0, dim))
    assert_close(torch.vmap(h, dims)(*inputs), torch.vmap(g, dims)(*inputs), 1e-12)
    for i in range(3):
        got, want = (torch.vmap(torch.func.grad(lambda *t, k=k: (k(*t) ** 2).sum(), i), dims)(*inputs) for k in (h, g))
        assert_close(got, want, 1e-11)
