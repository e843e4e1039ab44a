"""Down through the open transforms and back: nothing stays open, nothing is missed, and nothing taken for another level's."""

import gc
import sys
import types
import weakref

import pytest
import torch
from helpers import assert_close
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import functorch_inverse as fi
from functorch_inverse import _torch, _transforms

torch.manual_seed(0)
A = torch.randn(3, 3, dtype=torch.float64) / 3
X = torch.randn(4, 3, dtype=torch.float64)


def f(y):
    return y + 0.5 * torch.tanh(y @ A.T)


STACKS = {
    "grad": lambda g: grad(lambda x: g(x).sum())(X[0]),
    "jvp": lambda g: jvp(g, (X[0],), (X[1],)),
    "vmap(jacrev)": lambda g: vmap(jacrev(g))(X),
    "vmap(jacfwd)": lambda g: vmap(jacfwd(g))(X),
    "jacrev(vmap)": lambda g: jacrev(vmap(g))(X),
    "vmap(hessian)": lambda g: vmap(hessian(lambda x: g(x).sum()))(X),
    "jvp(grad)": lambda g: jvp(grad(lambda x: torch.sin(g(x)).sum()), (X,), (X,)),
    "grad(grad)": lambda g: grad(lambda x: grad(lambda x: g(x).square().sum())(x).sum())(X[0]),
    "backward": lambda g: torch.autograd.grad(g(X.clone().requires_grad_()).sum(), ()),
}
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def assert_nothing_is_open():
    assert _transforms.innermost() is None
    assert not _torch.single_level_allowed() and not _torch.in_jvp()
    assert forward_ad._current_level == -1
    assert torch.is_grad_enabled()
    assert torch.equal(vmap(grad(torch.sin))(X[0]), X[0].cos())


@every_stack
@pytest.mark.parametrize("where", ["g", "f"])
def test_nothing_stays_open_after_an_error(stack, where):
    class Mine(Exception):
        pass

    def fails(_):
        raise Mine

    def g(x):
        return X.expand_as(x) if x.ndim > 1 else X[0]

    broken = fi.custom_inverse(*((fails, f) if where == "g" else (g, fails)), event_dim=1)
    with pytest.raises((Mine, fi.FunctorchInverseError, RuntimeError, ValueError)) as caught:
        stack(broken)
    assert where == "g" or isinstance(caught.value, Mine) or stack is STACKS["backward"]
    assert_nothing_is_open()


@every_stack
def test_nothing_stays_open_after_an_answer(stack):
    if stack is not STACKS["backward"]:
        stack(fi.invert(f, event_dim=1))
    assert_nothing_is_open()


def test_under_no_grad_outside():
    """A transform opened under no_grad leaves autograd switched off beneath it."""
    weight = A.clone().requires_grad_()
    g = fi.invert(lambda y, w: y + 0.5 * torch.tanh(y @ w.T), event_dim=1)
    with torch.no_grad():
        first = grad(lambda x: g(x, weight).sum())(X)
        moved = jvp(lambda x: g(x, weight), (X,), (X,))[1]
        both = jvp(grad(lambda x: g(x, weight).square().sum()), (X,), (X,))[1]
    assert_close(first, grad(lambda x: g(x, A).sum())(X))
    assert_close(moved, jvp(lambda x: g(x, A), (X,), (X,))[1])
    assert_close(both, jvp(grad(lambda x: g(x, A).square().sum()), (X,), (X,))[1])


def test_a_plain_dual_level_inside_grad():
    """There, tangents are beside a reverse mode, on the tensors of its own level."""
    g = fi.invert(f, event_dim=1)

    def moved(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(g(forward_ad.make_dual(x, X))).tangent.sum()

    y, step = g(X), 1e-6
    J = torch.eye(3, dtype=X.dtype) + 0.5 * (1 - torch.tanh(y @ A.T) ** 2)[..., None] * A
    assert_close(moved(X), torch.linalg.solve(J, X[..., None]).sum())
    difference = (moved(X + step * X.cos()) - moved(X - step * X.cos())) / (2 * step)
    torch.testing.assert_close((grad(moved)(X) * X.cos()).sum(), difference, rtol=1e-6, atol=1e-8)


def test_a_dual_number_made_by_hand_inside_jvp():
    """Its tangent is on a tensor of the level of reverse mode, although torch.func.jvp is open further out."""
    g = fi.invert(f, event_dim=1)
    w, t = X.flip(0), X.roll(1, 0)

    def push():
        return forward_ad.unpack_dual(g(forward_ad.make_dual(w, t))).tangent

    found, _ = jvp(lambda x: vjp(lambda z: z * push(), x)[0], (X,), (X,))
    J = torch.eye(3, dtype=X.dtype) + 0.5 * (1 - torch.tanh(g(w) @ A.T) ** 2)[..., None] * A
    assert_close(found, X * torch.linalg.solve(J, t[..., None])[..., 0])


@pytest.mark.parametrize("order", [1, 2])
def test_plain_autograd_inside_jvp(order):
    """A tensor that is made inside with a graph of its own has it on the level that has the tangents."""
    g = fi.invert(f, event_dim=1)

    def slope(x):
        return grad(lambda x: torch.sin(g(x)).sum())(x)

    def inside(x):
        w = torch.zeros_like(X, requires_grad=True)
        (found,) = torch.autograd.grad(torch.sin(g(x + w)).sum(), w, create_graph=True)
        return found if order == 1 else torch.autograd.grad(found.square().sum(), w, create_graph=True)[0]

    want = slope if order == 1 else grad(lambda x: slope(x).square().sum())
    for found, right in zip(jvp(inside, (X,), (X.cos(),)), jvp(want, (X,), (X.cos(),)), strict=True):
        assert_close(found, right)


C = torch.tensor([0.8, 1.3, 0.6], dtype=torch.float64)
STRETCH = 3 * torch.eye(3, dtype=torch.float64) + A


def exact(x, c):
    return torch.asinh(torch.linalg.inv(STRETCH) @ x) / c


stretched = fi.custom_inverse(exact, lambda y, c: torch.sinh(c * y) @ STRETCH.T, event_dim=1)


@pytest.mark.parametrize("first", ["x", "c"])
def test_nested_jvp_over_different_arguments(first):
    """Each level has the tangents of one argument, and the other one is a constant of the level that is not its own."""

    def twice(h):
        if first == "x":
            return jvp(lambda x: jvp(lambda c: h(x, c), (C,), (C.cos(),)), (X[0],), (X[1],))
        return jvp(lambda c: jvp(lambda x: h(x, c), (X[0],), (X[1],)), (C,), (C.cos(),))

    assert_close(twice(stretched), twice(exact))


@pytest.mark.parametrize("first", ["x", "c"])
def test_plain_autograd_inside_nested_jvp_over_different_arguments(first):
    """A tensor of a lower level brings no tangents to the level that has the graph."""

    def slope(h, x, c):
        w = torch.zeros_like(X[0], requires_grad=True)
        y = h(x, c + w) if first == "x" else h(x + w, c)
        return torch.autograd.grad(torch.sin(y).sum(), w, create_graph=True)[0]

    def twice(h):
        if first == "x":
            return jvp(lambda x: jvp(lambda c: slope(h, x, c), (C,), (C.cos(),)), (X[0],), (X[1],))
        return jvp(lambda c: jvp(lambda x: slope(h, x, c), (X[0],), (X[1],)), (C,), (C.cos(),))

    assert_close(twice(stretched), twice(exact))


def test_no_grad_inside_jvp_hides_from_what_is_outside():
    """As for torch's own operations: the tangent is right, and reverse mode further out does not see it."""
    g = fi.invert(f, event_dim=1)

    def moved(function, x):
        def hidden(x):
            with torch.no_grad():
                return function(x)

        return jvp(hidden, (x,), (X.cos(),))[1].square().sum()

    J = torch.eye(3, dtype=X.dtype) + 0.5 * (1 - torch.tanh(g(X) @ A.T) ** 2)[..., None] * A
    assert_close(moved(g, X), torch.linalg.solve(J, X.cos()[..., None]).square().sum())
    for function in (torch.sin, g):
        assert not grad(lambda x: moved(function, x))(X).any()  # noqa: B023
        assert not moved(function, X.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("which", ["x", "weight", "both"])
def test_some_tensors_have_a_tangent(which):
    """The others are constants of the level, or of a level beneath it that follows them."""
    g = fi.invert(lambda y, w: y + 0.5 * torch.tanh(y @ w.T), event_dim=1)

    def J(y, w):
        return torch.eye(3, dtype=X.dtype) + 0.5 * (1 - torch.tanh(y @ w.T) ** 2)[..., None] * w

    def right(x, w, dx, dw):
        y = g(x, w)
        slope = 0.5 * (1 - torch.tanh(y @ w.T) ** 2)
        return torch.linalg.solve(J(y, w), (dx - slope * (y @ dw.T))[..., None])[..., 0]

    dx, dw = X.cos() * (which != "weight"), A.sin() * (which != "x")
    calls = {
        "x": lambda x, w: jvp(lambda x: g(x, w), (x,), (dx,))[1],
        "weight": lambda x, w: jvp(lambda w: g(x, w), (w,), (dw,))[1],
        "both": lambda x, w: jvp(g, (x, w), (dx, dw))[1],
    }
    assert_close(calls[which](X, A), right(X, A, dx, dw))
    found = grad(lambda x, w: torch.sin(calls[which](x, w)).sum(), argnums=(0, 1))(X, A)
    wanted = grad(lambda x, w: torch.sin(right(x, w, dx, dw)).sum(), argnums=(0, 1))(X, A)
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want, 1e-9)


# --- what f reads besides --------------------------------------------------------------------------

SPACE = "a_module_that_appears_in_a_test"


@pytest.fixture
def held():
    """Something that f reads at a place which no walk finds."""
    module = types.ModuleType(SPACE)
    module.c = torch.tensor(0.5, dtype=torch.float64)
    sys.modules[SPACE] = module
    yield module
    del sys.modules[SPACE]


def reads(y):
    return y + sys.modules["_".join(["a", "module", "that", "appears", "in", "a", "test"])].c * torch.tanh(y @ A.T)


MAPPED = {"plain": lambda g: g, "vmap": vmap, "vmap(vmap)": lambda g: vmap(vmap(g))}


@pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED)
@pytest.mark.parametrize("grad_enabled", [False, True])
def test_a_live_tensor_that_appears_after_the_call_is_an_error(held, mapped, grad_enabled):
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    y = mapped(fi.custom_inverse(lambda x: x.clone(), reads, event_dim=1))(x)
    held.c = held.c.clone().requires_grad_()
    with pytest.raises(fi.NoDerivativeError, match="derivative would"):
        torch.autograd.grad(y.sum(), x, create_graph=grad_enabled)


# A pullback that is called when the transform that it comes from is closed.
OUTSIDE = {
    "vmap": lambda h, x, c: vjp(lambda x: vmap(h)(x[None], c[None])[0], x)[1](X.cos())[0],
    "jvp": lambda h, x, c: vjp(lambda x: jvp(lambda x: h(x, c), (x,), (X.sin(),))[1], x)[1](X.cos())[0],
    "jvp of both": lambda h, x, c: vjp(lambda x: jvp(h, (x, c), (X.sin(), X.cos()))[1], x)[1](X.cos())[0],
    "vjp": lambda h, x, c: vjp(lambda x: vjp(lambda x: h(x, c), x)[1](X.cos())[0], x)[1](X.cos())[0],
    "jacfwd": lambda h, x, c: jacrev(jacfwd(h), chunk_size=1)(x[0], c[0]),
}


@pytest.mark.parametrize("stack", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("event_dim", [0, 1])
@pytest.mark.parametrize("made", ["leaf", "computed"])
def test_an_argument_with_a_graph_further_out(stack, event_dim, made):
    """Nothing is lost: it is no argument of the pullback, and its own derivative is that of all operations."""
    h = fi.custom_inverse(lambda x, c: torch.asinh(x) / c, lambda y, c: torch.sinh(c * y), event_dim=event_dim)
    x, c = X.clone().requires_grad_(), (X.sin() + 2).requires_grad_()

    def derivatives(h):
        moved = stack(h, x, c * 1 if made == "computed" else c)
        return torch.autograd.grad(torch.sin(moved).sum(), (x, c))

    assert_close(derivatives(h), derivatives(h.__wrapped__))


@pytest.mark.parametrize("event_dim", [0, 1])
def test_a_live_tensor_that_appears_before_a_pullback_is_called_is_an_error(held, event_dim):
    c = (X.sin() + 2).requires_grad_()

    def f(y, c):
        return torch.sinh(c * y) * (sys.modules["_".join(["a", "module", "that", "appears", "in", "a", "test"])].c * 2)

    h = fi.custom_inverse(lambda x, c: torch.asinh(x) / c, f, event_dim=event_dim)
    _, pull = vjp(lambda x: vjp(lambda x: vmap(h)(x, c), x)[1](X)[0], X.clone())
    held.c = held.c.clone().requires_grad_()
    with pytest.raises(fi.NoDerivativeError, match="derivative would"):
        pull(X.cos())


@pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED)
def test_what_appears_without_derivative_is_read(held, mapped):
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    y = mapped(fi.custom_inverse(lambda x: x.clone(), reads, event_dim=1))(x)
    J = torch.eye(3, dtype=x.dtype) + 0.5 * (1 - torch.tanh(x.detach() @ A.T) ** 2)[..., None] * A
    want = torch.linalg.solve(J.mT, torch.ones_like(x)[..., None])[..., 0]
    assert_close(torch.autograd.grad(y.sum(), x)[0], want.detach())


# --- vmap without its checks -----------------------------------------------------------------------


def test_the_short_vmap_is_vmap():
    def function(a, b, c):
        return a * b + c, b.sum(0), c

    a, b, c = torch.randn(3, 5), torch.randn(2, 3), torch.randn(3)
    dims = (1, None, None)
    for got, want in zip(_transforms.mapped(function, dims, "error", (a, b, c)), vmap(function, dims)(a, b, c), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_the_short_vmap_draws_as_vmap_does(randomness):
    def function(a):
        return (a + torch.rand(3),)

    zeros = torch.zeros(4, 3)
    torch.manual_seed(1)
    (got,) = _transforms.mapped(function, (0,), randomness, (zeros,))
    torch.manual_seed(1)
    assert torch.equal(got, vmap(function, randomness=randomness)(zeros)[0])
    with pytest.raises(RuntimeError, match="randomness"):
        _transforms.mapped(function, (0,), "error", (zeros,))
    assert_nothing_is_open()


def test_a_random_f_is_drawn_as_the_vmap_says():
    """The noise does not reach the derivative, but it has to be drawn."""
    g = fi.custom_inverse(lambda x: x.clone(), lambda y: 2 * y + 0 * torch.rand(3, dtype=y.dtype), event_dim=1)
    x = X.clone().requires_grad_()
    for randomness in ("same", "different"):
        (found,) = torch.autograd.grad(vmap(g, randomness=randomness)(x).sum(), x)
        assert_close(found, torch.full_like(X, 0.5))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.autograd.grad(vmap(g)(x).sum(), x)


# --- what is kept ----------------------------------------------------------------------------------


@every_stack
def test_nothing_outlives_the_call(stack):
    """Freed at once, not when the garbage collector comes."""
    if stack is STACKS["backward"]:
        return
    kept = []

    def watched(y):
        z = torch.tanh(y @ A.T)
        kept.append(weakref.ref(z))
        return y + 0.5 * z

    def g(x):
        return X.expand_as(x).clone() if x.ndim > 1 else X[0].clone()

    gc.collect()
    gc.disable()
    try:
        stack(fi.custom_inverse(g, watched, event_dim=1))
        assert kept and not any(z() is not None for z in kept)
    finally:
        gc.enable()
