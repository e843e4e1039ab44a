"""Memory that g keeps: no later call of g changes what it returned before, and nobody who writes to that changes g."""

import pytest
import torch
from helpers import assert_close
from problems import VECTOR
from torch.func import grad, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import functorch_inverse as fi

X, C, _ = VECTOR.inputs()

# Each returns asinh(x), in memory that `kept` holds as well.
KEEPING = {
    "a buffer": lambda x, kept: kept.setdefault(x.shape, torch.empty_like(x)).copy_(x.asinh()),
    "out=": lambda x, kept: torch.asinh(x, out=kept.setdefault(x.shape, torch.empty_like(x))),
    "detached": lambda x, kept: kept.setdefault(x.shape, torch.empty_like(x)).copy_(x.asinh()).detach(),
    "a view": lambda x, kept: kept.setdefault(x.shape, x.new_empty(2, *x.shape))[1].copy_(x.asinh()),
    "its storage": lambda x, kept: x.new_empty(0).set_(
        kept.setdefault(x.shape, torch.empty_like(x)).copy_(x.asinh()).untyped_storage(), 0, x.shape
    ),
    "NumPy's view of it": lambda x, kept: torch.as_tensor(
        kept.setdefault(x.shape, torch.empty_like(x).numpy())
    ).copy_(x.asinh()),
}  # fmt: skip

RULES = {
    "inverse": lambda g, n: fi.custom_inverse(g, torch.sinh, event_dim=n),
    "inverse, whole": lambda g, n: fi.custom_inverse(g, torch.sinh),
    "root": lambda g, n: fi.custom_root(g, lambda y, x: torch.sinh(y) - x, event_dim=n),
    "fixed point": lambda g, n: fi.custom_fixed_point(g, lambda y, x: y - (torch.sinh(y) - x) / torch.cosh(y), event_dim=n),
    "Jacobian": lambda g, n: fi.custom_jacobian(g, lambda x: (1 + x * x).rsqrt(), event_dim=0),
    "differences": lambda g, n: fi.finite_difference(g, event_dim=n),
    "black box": lambda g, n: fi.black_box(lambda x: g(torch.from_numpy(x))),
}


@pytest.fixture(params=KEEPING)
def g(request):
    kept = {}
    return lambda x: KEEPING[request.param](x, kept)


@pytest.mark.parametrize("event_dim", [0, 1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("live", [False, True])
def test_a_later_call_changes_nothing_before_it(g, rule, event_dim, live):
    h = RULES[rule](g, event_dim)
    x = X.clone().requires_grad_(live)
    first, second = h(x), h(C)
    assert_close([first.detach(), second], [X.asinh(), C.asinh()])
    if live and rule != "black box":
        assert_close(torch.autograd.grad(first.sum(), x)[0], (1 + X * X).rsqrt(), 1e-7)


SAMPLES = {
    "inverse": lambda g, how: fi.custom_inverse(g, torch.sinh, vmap_method=how, event_dim=0),
    "root": lambda g, how: fi.custom_root(g, lambda y, x: torch.sinh(y) - x, vmap_method=how, event_dim=0),
    "Jacobian": lambda g, how: fi.custom_jacobian(g, lambda x: (1 + x * x).rsqrt(), vmap_method=how, event_dim=0),
    "differences": lambda g, how: fi.finite_difference(g, vmap_method=how, event_dim=0),
}


@pytest.mark.parametrize("vmap_method", ["sequential", "broadcast"])
@pytest.mark.parametrize("rule", SAMPLES)
def test_samples_of_a_vmap(g, rule, vmap_method):
    h = SAMPLES[rule](g, vmap_method)
    assert_close(vmap(h)(X), X.asinh())
    if rule != "differences":
        assert_close(vmap(grad(h))(X), (1 + X * X).rsqrt())
        assert_close(vmap(grad(grad(h)))(X), -X * (1 + X * X) ** -1.5)


def test_differences_do_not_take_a_buffer_for_what_they_may_read():
    buffer = torch.empty_like(X)
    h = fi.finite_difference(lambda x: buffer.copy_(x.asinh()), event_dim=0)
    with pytest.raises(fi.NoDerivativeError, match="changed in place"):
        h(X.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("options", [{}, {"event_dim": 0}, {"event_dim": 1}])
@pytest.mark.parametrize("live", [False, True])
def test_who_writes_to_a_result_does_not_change_g(options, live):
    kept = {}

    def g(x):
        if "y" not in kept:
            kept["y"] = x.asinh()
        return kept["y"]

    h, x = fi.custom_inverse(g, torch.sinh, **options), X.clone().requires_grad_(live)
    with torch.no_grad():
        h(x).add_(100)
    h(x).detach().add_(100)
    assert_close(h(x).detach(), X.asinh())


def test_aux_and_several_results():
    kept = {"y": torch.empty(2, *X.shape, dtype=X.dtype), "steps": torch.zeros((), dtype=torch.int64)}

    def g(x):
        kept["y"].copy_(torch.stack([x.asinh(), 2 * x.asinh()]))
        return list(kept["y"].unbind()), {"steps": kept["steps"].add_(1)}

    h = fi.custom_inverse(g, lambda y: torch.sinh(y[0]), has_aux=True, linear_solver=fi.LeastSquares())
    (y, aux), (_, later) = h(X), h(C)
    assert_close(y, [X.asinh(), 2 * X.asinh()])
    assert (int(aux["steps"]), int(later["steps"])) == (1, 2)
    y[0].zero_()
    assert_close(y[1], 2 * X.asinh())


def test_aux_of_samples():
    steps = torch.zeros((), dtype=X.dtype)
    h = fi.custom_inverse(lambda x: (x.asinh(), steps.add_(1)), torch.sinh, has_aux=True)
    _, aux = vmap(h)(X)
    assert_close(aux, torch.arange(1.0, len(X) + 1, dtype=X.dtype))


def test_kept_in_a_container_that_is_returned():
    kept = {}

    def g(x):
        kept.setdefault("y", x.asinh())
        return kept

    h = fi.custom_inverse(g, lambda y: torch.sinh(y["y"]))
    h(X)["y"].zero_()
    assert_close(h(X)["y"], X.asinh())


# --- and no copy where nobody else has it ----------------------------------------------------------

FRESH = {
    "an operation": torch.asinh,
    "a view of what is gone": lambda x: torch.cat([x, x]).asinh()[: len(x)],
    "a graph of its own": lambda x: x.detach().requires_grad_().asinh(),
    "a tuple": lambda x: (x.asinh(),),
    "a dict": lambda x: {"y": x.asinh()},
    "a buffer that is filled": lambda x: x.new_empty(x.shape).copy_(x.asinh()),
}


class Copies(TorchDispatchMode):
    """How many copies are made."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


def only(y):
    return y if isinstance(y, torch.Tensor) else y["y"] if isinstance(y, dict) else y[0]


@pytest.mark.parametrize("fresh", FRESH)
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("live", [False, True])
def test_no_copy_of_what_nobody_else_has(fresh, has_aux, live):
    g = FRESH[fresh]
    with_aux = lambda x: (g(x), {"norm": x.norm()})  # noqa: E731
    h = fi.custom_inverse(with_aux if has_aux else g, lambda y: only(y).sinh(), event_dim=0, has_aux=has_aux)
    x = X.clone().requires_grad_(live)
    with Copies() as copies:
        h(x)
    assert not copies.made


# --- compiled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True])
def test_compiled(recorded):
    buffer = torch.empty_like(X)
    h = fi.custom_inverse(lambda x: buffer.copy_(x.asinh()), torch.sinh, event_dim=0)
    compiled = torch.compile(lambda x: (h(x), h(2 * x)), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(recorded):
        first, again = compiled(X.clone().requires_grad_(recorded)), compiled(C)
    for found, x in ((first, X), (again, C)):
        assert_close([t.detach() for t in found], [x.asinh(), (2 * x).asinh()])


def test_jacobian_of_a_whole_buffer():
    buffer = torch.empty_like(X)
    h = fi.custom_inverse(lambda x: buffer.copy_(x.asinh()), torch.sinh)
    assert_close(jacrev(h)(X), torch.diag((1 + X * X).rsqrt()))
