"""Whatever f reaches without being given it: right, or a clear error, and never a silent zero."""

import collections
import contextvars
import functools
import itertools
import queue
import sys
import types
import weakref
from dataclasses import dataclass, make_dataclass

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import assert_close, tangents, total
from problems import VECTOR, W, array, vector_exact, vector_f, vector_g
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import functorch_inverse as fi

X, C, B = VECTOR.inputs()
XS, CS, _ = VECTOR.stacked(4)
W_T = W.T

# --- how a tensor can hide: c -> f(y) that reads it ------------------------------------------------

GLOBAL = types.SimpleNamespace(c=None)


def f_global(y):
    return vector_f(y, GLOBAL.c, B)


def through_global(c):
    GLOBAL.c = c
    return f_global


def through_closure(c):
    return lambda y: vector_f(y, c, B)


def through_nested_closure(c):
    def outer():
        def inner(y):
            return vector_f(y, c, B)

        return inner

    f = outer()
    return lambda y: f(y)


def through_partial(c):
    return functools.partial(vector_f, c=c, b=B)


def through_partial_keywords_of_a_lambda(c):
    return functools.partial(lambda y, theta: vector_f(y, theta["c"], B), theta={"c": c})


def through_default(c):
    return lambda y, c=c: vector_f(y, c, B)


def through_keyword_default(c):
    def f(y, *, c=c):
        return vector_f(y, c, B)

    return f


def through_attribute(c):
    class Holder:
        pass

    holder = Holder()
    holder.deep = types.SimpleNamespace(c=[c])
    return lambda y: vector_f(y, holder.deep.c[0], B)


def through_function_attribute(c):
    def f(y):
        return vector_f(y, f.c, B)

    f.c = c
    return f


@dataclass
class Callable:
    c: torch.Tensor

    def __call__(self, y):
        return vector_f(y, self.c, B)

    def method(self, y):
        return self(y)

    @property
    def computed(self):
        return self.c * 1

    def by_property(self, y):
        return vector_f(y, self.computed, B)


def through_callable_object(c):
    return Callable(c)


def through_bound_method(c):
    return Callable(c).method


def through_property(c):
    return Callable(c).by_property


def through_slots(c):
    class Slotted:
        __slots__ = ("c",)

    slotted = Slotted()
    slotted.c = c
    return lambda y: vector_f(y, slotted.c, B)


def through_class_attribute(c):
    class Holder:
        value = c

        @classmethod
        def f(cls, y):
            return vector_f(y, cls.value, B)

    return Holder.f


def through_wrapped(c):
    @functools.wraps(vector_f)
    def f(y):
        return vector_f(y, c, B)

    return f


def through_containers(c):
    held = {"a": [(c,)], "b": {1, 2}}
    return lambda y: vector_f(y, held["a"][0][0], B)


def through_computed_name(c):
    holder = types.SimpleNamespace(name_of_c=c)
    return lambda y: vector_f(y, getattr(holder, "_".join(["name", "of", "c"])), B)


def through_vars(c):
    holder = types.SimpleNamespace(c=c)
    return lambda y: vector_f(y, vars(holder)["c"], B)


def through_deque(c):
    held = collections.deque([c])
    return lambda y: vector_f(y, held[0], B)


def through_ordered_dict(c):
    held = collections.OrderedDict(c=c)
    return lambda y: vector_f(y, held["c"], B)


def through_defaultdict(c):
    held = collections.defaultdict(lambda: c)
    return lambda y: vector_f(y, held["new"], B)


def through_itertools(c):
    forever = itertools.repeat(c)
    return lambda y: vector_f(y, next(forever), B)


def through_generator(c):
    def forever():
        while True:
            yield c

    stream = forever()
    return lambda y: vector_f(y, next(stream), B)


def through_iterator(c):
    def f(y):
        return vector_f(y, next(iter(map(torch.clone, [c]))), B)

    return f


def through_contextvar(c):
    variable = contextvars.ContextVar("c")
    variable.set(c)
    return lambda y: vector_f(y, variable.get(), B)


def through_lru_cache(c):
    cached = functools.lru_cache(lambda: c)
    return lambda y: vector_f(y, cached(), B)


def through_cached_property(c):
    class Holder:
        @functools.cached_property
        def value(self):
            return c

    holder = Holder()
    return lambda y: vector_f(y, holder.value, B)


def through_weakref(c):
    reference = weakref.ref(c)
    return lambda y: vector_f(y, reference(), B)


def through_chain_map(c):
    held = collections.ChainMap({}, {"c": c})
    return lambda y: vector_f(y, held["c"], B)


def through_mapping_proxy(c):
    held = types.MappingProxyType({"c": c})
    return lambda y: vector_f(y, held["c"], B)


def through_numpy_object_array(c):
    held = np.empty(1, dtype=object)
    held[0] = c
    return lambda y: vector_f(y, held[0], B)


def through_getattr_hook(c):
    class Holder:
        def __getattr__(self, name):
            return c

    holder = Holder()
    return lambda y: vector_f(y, holder.anything, B)


def through_exec(c):
    space = {"torch": torch, "vector_f": vector_f, "B": B, "c": c}
    exec("def f(y):\n    return vector_f(y, c, B)", space)
    return space["f"]


def through_derived_tensor(c):
    """Not a leaf but a result: its graph leads to c."""
    derived = (c * 2).exp().log() / 2
    return lambda y: vector_f(y, derived, B)


def through_view(c):
    held = torch.stack([c, c])
    return lambda y: vector_f(y, held[0], B)


def through_grad_of_a_function(c):
    """f is itself a gradient, of a potential that closes over c."""
    inverse = lambda y: (torch.cosh(c * y) / c).sum()  # noqa: E731
    lift = lambda y: grad(inverse)(y) @ W_T + B  # noqa: E731
    return lift


def through_list_iterator(c):
    stream = iter([c] * 10_000)
    return lambda y: vector_f(y, next(stream), B)


def through_map(c):
    stream = map(torch.clone, itertools.repeat(c))
    return lambda y: vector_f(y, next(stream), B)


def through_subclass_of_list(c):
    class Named(list):
        pass

    held = Named()
    held.c = c
    return lambda y: vector_f(y, held.c, B)


def through_subclass_of_dict(c):
    class Computed(dict):
        def __missing__(self, key):
            return c

    held = Computed()
    return lambda y: vector_f(y, held["new"], B)


def through_subclass_of_float(c):
    class Number(float):
        pass

    held = Number(1)
    held.c = c
    return lambda y: vector_f(y, held.c, B)


def through_attribute_of_a_tensor(c):
    held = torch.zeros(1)
    held.c = c
    return lambda y: vector_f(y, held.c, B)


def through_metaclass(c):
    class Meta(type):
        value = c

    class Holder(metaclass=Meta):
        pass

    return lambda y: vector_f(y, Holder.value, B)


def through_descriptor(c):
    class Descriptor:
        def __init__(self, value):
            self.value = value

        def __get__(self, instance, owner):
            return self.value

    class Holder:
        value = Descriptor(c)

    holder = Holder()
    return lambda y: vector_f(y, holder.value, B)


def through_made_dataclass(c):
    made = make_dataclass("Made", [], namespace={"value": c, "f": lambda self, y: vector_f(y, self.value, B)})
    return made().f


def through_singledispatch(c):
    @functools.singledispatch
    def f(y):
        raise TypeError

    f.register(torch.Tensor, lambda y: vector_f(y, c, B))
    return lambda y: f(y)


def through_partialmethod(c):
    class Holder:
        def method(self, c, y):
            return vector_f(y, c, B)

        f = functools.partialmethod(method, c)

    return Holder().f


def through_simple_queue(c):
    held = queue.SimpleQueue()
    held.put(c)

    def f(y):
        value = held.get()
        held.put(value)
        return vector_f(y, value, B)

    return f


def through_global_with_the_name_of_a_library(c):
    """functools.wraps says that f belongs to torch; its globals are the user's."""
    GLOBAL.c = c

    @functools.wraps(torch.nn.functional.softplus)
    def f(y):
        return vector_f(y, GLOBAL.c, B)

    return f


def through_submodule(c):
    package = types.ModuleType("a_package")
    package.sub = types.ModuleType("a_package.sub")
    package.sub.c = c
    return _compiled("a_function_of_mine", "vector_f(y, package.sub.c, B)", package=package)


def through_module_in_a_closure(c):
    module = types.ModuleType("a_module")
    module.c = c
    return lambda y: vector_f(y, module.c, B)


def through_alias_of_a_module(c):
    module = types.ModuleType("a_module")
    module.c = c
    held = [module]
    return lambda y: vector_f(y, held[0].c, B)


def through_sys_modules(c):
    module = types.ModuleType("hidden_module_of_a_test")
    module.c = c
    sys.modules["hidden_module_of_a_test"] = module
    name = "_".join(["hidden", "module", "of", "a", "test"])
    return lambda y: vector_f(y, sys.modules[name].c, B)


def through_own_globals(c):
    GLOBAL.c = c
    name = "GLO" + "BAL"

    def f(y):
        return vector_f(y, f.__globals__[name].c, B)

    return f


def through_a_package_called_test(c):
    """A user's folder may have the name of a module of the standard library."""
    return _compiled("test.of_mine", "vector_f(y, c, B)", c=c)


def _compiled(module, expression, **names):
    """A function y -> expression whose globals are those of some module."""
    space = {"__name__": module, "vector_f": vector_f, "B": B, **names}
    return types.FunctionType(compile(f"lambda y: {expression}", module, "eval").co_consts[0], space)


HIDING_PLACES = {name.removeprefix("through_"): value for name, value in list(globals().items()) if name.startswith("through_")}
everywhere = pytest.mark.parametrize("place", HIDING_PLACES)
# Nothing points from f to the tensor: an error will do.
OUT_OF_SIGHT = {"sys_modules"}


def custom(place, c):
    return fi.custom_inverse(lambda x: vector_g(x, c, B), HIDING_PLACES[place](c))


def exact(place, c):
    return lambda x: vector_exact(x, c, B)


def assert_right(place, derivative):
    """derivative(make) is the same for what is under test and for the closed form."""
    want = derivative(exact)
    try:
        got = derivative(custom)
    except fi.NoDerivativeError:
        assert place in OUT_OF_SIGHT
        return
    assert_close(got, want)


TRANSFORMS = {
    "grad": lambda h: grad(h, (0, 1))(C, X),
    "jvp": lambda h: jvp(h, (C, X), tangents((C, X))),
    "jacfwd_jacfwd": lambda h: jacfwd(jacfwd(h, (0, 1)), (0, 1))(C, X),
    "hessian": lambda h: hessian(h, (0, 1))(C, X),
    "vmap_grad": lambda h: vmap(grad(h, (0, 1)))(CS, XS),
    "vmap_hessian": lambda h: vmap(hessian(h, (0, 1)), (None, 0))(C, XS),
    "jacrev_jacrev_grad": lambda h: jacrev(jacrev(grad(h, (0, 1)), (0, 1)), (0, 1))(C, X),
}


@everywhere
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_transforms(place, transform):
    assert_right(place, lambda make: TRANSFORMS[transform](lambda c, x: total((make(place, c)(x),))))


@everywhere
@pytest.mark.parametrize("order", [1, 2, 3])
def test_in_plain_autograd(place, order):
    def derivatives(make):
        leaves = c, x = C.clone().requires_grad_(), X.clone().requires_grad_()
        out = total((make(place, c)(x),))
        for _ in range(order - 1):
            out = total(torch.autograd.grad(out, leaves, create_graph=True))
        return torch.autograd.grad(out, leaves)

    assert_right(place, derivatives)


@everywhere
def test_where_only_the_closure_is_live(place):
    def derivative(make):
        c = C.clone().requires_grad_()
        return torch.autograd.grad(total((make(place, c)(X),)), c)

    assert_right(place, derivative)


@everywhere
def test_hessian_of_vmap(place):
    """The closure is live outside the vmap, and shared by its samples."""

    def derivative(make):
        return [hessian(lambda c: total((vmap(lambda x: make(place, c)(x))(XS),)))(C)]

    assert_right(place, derivative)


@everywhere
def test_vmap_over_the_closure(place):
    assert_right(place, lambda make: [vmap(lambda c: jacrev(make(place, c))(X))(CS)])


# --- a rule made once, used under a transform of something it closes over --------------------------


def test_a_tensor_made_inside_a_transform():
    def h(make):
        def number(x):
            scale = 1 + x.square().sum()
            return total((make("closure", C * scale)(x),))

        return number

    assert_close([hessian(h(custom))(X)], [hessian(h(exact))(X)])


def test_nothing_live_in_a_large_closure():
    many = [torch.zeros(1) for _ in range(5000)]
    h = fi.custom_inverse(lambda x: vector_g(x, C, B), lambda y: vector_f(y, C, B) + 0 * len(many))
    assert_close([jacrev(h)(X)], [jacrev(exact("", C))(X)])


def test_a_live_tensor_at_the_end_of_a_large_closure():
    c = C.clone().requires_grad_()
    many = [[torch.zeros(1)] for _ in range(5000)] + [[c]]
    h = fi.custom_inverse(lambda x: vector_g(x, c, B), lambda y: vector_f(y, many[-1][0], B))
    assert_close(torch.autograd.grad(h(X).sum(), c), torch.autograd.grad(exact("", c)(X).sum(), c))


def test_a_closure_that_refers_to_itself():
    c, loop = C.clone().requires_grad_(), {}
    loop["self"], loop["c"] = loop, c
    h = fi.custom_inverse(lambda x: vector_g(x, c, B), lambda y: vector_f(y, loop["self"]["c"], B))
    assert_close(torch.autograd.grad(h(X).sum(), c), torch.autograd.grad(exact("", c)(X).sum(), c))


def test_the_same_tensor_as_argument_and_closure():
    def number(call):
        return lambda c: total((call(c)(X, c),))

    h = lambda c: fi.custom_inverse(vector_two_g(c), lambda y, b: vector_f(y, c, b))  # noqa: E731
    plain = lambda c: lambda x, b: vector_exact(x, c, b)  # noqa: E731
    assert_close([hessian(number(h))(C)], [hessian(number(plain))(C)])


def vector_two_g(c):
    return lambda x, b: vector_g(x, c, b)


def test_the_input_itself_closed_over():
    """f reads x, which g was given: a known value of the equation, live all the same."""

    def number(make):
        return lambda x: total((make(x),))

    h = lambda x: fi.custom_inverse(lambda x: vector_g(x, C, 0.1 * x), lambda y: vector_f(y, C, 0.1 * x))(x)  # noqa: E731
    plain = lambda x: vector_exact(x, C, 0.1 * x)  # noqa: E731
    assert_close([hessian(number(h))(X)], [hessian(number(plain))(X)])


# --- distributions ---------------------------------------------------------------------------------


def normal_ppf(x, mu, sigma):
    return scipy.stats.norm.ppf(array(x), array(mu), array(sigma))


@pytest.mark.parametrize("event_dim", [0, None])
def test_a_distribution_object(event_dim):
    """f = Normal(mu, sigma).cdf, g = SciPy's ppf; in closed form mu + sigma Phi^-1(x)."""

    def h(mu, sigma, x):
        f = torch.distributions.Normal(mu, sigma).cdf
        solve = fi.custom_inverse(lambda x: normal_ppf(x, mu, sigma), f, event_dim=event_dim)
        return total((solve(x),))

    def plain(mu, sigma, x):
        return total((mu + sigma * torch.special.ndtri(x),))

    mu, sigma, x = C, B.exp(), X.sigmoid()
    for transform in (grad, hessian):
        assert_close(transform(h, (0, 1, 2))(mu, sigma, x), transform(plain, (0, 1, 2))(mu, sigma, x), 1e-8)


def test_a_transform_of_a_distribution():
    """A bound method of a torch object that holds tensors."""
    loc, scale = C.clone().requires_grad_(), B.exp().requires_grad_()
    transform = torch.distributions.AffineTransform(loc, scale)
    h = fi.custom_inverse(lambda x: (array(x) - loc.numpy()) / scale.numpy(), transform, event_dim=0)
    got = torch.autograd.grad(total((h(X),)), (loc, scale))
    assert_close(got, torch.autograd.grad(total(((X - loc) / scale,)), (loc, scale)))


# --- rules inside rules ----------------------------------------------------------------------------


def nested(rule):
    """f of the outer rule calls another rule: f(y) = sinh(inner(y)) with inner(y) = asinh(y / c) W^T..."""

    def h(c, b, x):
        inner = rule(lambda y: vector_g(y, c, b), lambda z: vector_f(z, c, b), lambda y: vector_exact(y, c, b))
        outer = rule(
            lambda x: array(vector_f(torch.from_numpy(np.arcsinh(array(x))), c, b)),
            lambda y: torch.sinh(inner(y)),
            lambda x: vector_f(torch.asinh(x), c, b),
        )
        return total((outer(x),))

    return h


@pytest.mark.parametrize("event_dim", [None, 1])
@pytest.mark.parametrize(
    "transform", [grad, hessian, lambda h, a: jacfwd(jacfwd(h, a), a), lambda h, a: jacrev(jacrev(h, a), a)]
)
def test_a_rule_inside_another_rules_f(event_dim, transform):
    got = nested(lambda g, f, plain: fi.custom_inverse(g, f, event_dim=event_dim))
    want = nested(lambda g, f, plain: plain)
    assert_close(transform(got, (0, 1, 2))(C, B, X), transform(want, (0, 1, 2))(C, B, X))


def test_a_rule_inside_another_rules_f_in_plain_autograd():
    def derivatives(rule):
        leaves = tuple(t.clone().requires_grad_() for t in (C, B, X))
        first = torch.autograd.grad(nested(rule)(*leaves), leaves, create_graph=True)
        return first, torch.autograd.grad(total(first), leaves)

    got = derivatives(lambda g, f, plain: fi.custom_inverse(g, f))
    assert_close(got, derivatives(lambda g, f, plain: plain))


def test_a_rule_inside_another_rules_g():
    c = C.clone().requires_grad_()
    inner = fi.custom_inverse(lambda x: vector_g(x, c, B), lambda y: vector_f(y, c, B))
    outer = fi.custom_inverse(lambda x: inner(x), lambda y: vector_f(y, c, B))
    assert_close(torch.autograd.grad(outer(X).sum(), c), torch.autograd.grad(exact("", c)(X).sum(), c))


def test_rules_in_a_chain():
    def number(rule):
        return lambda c, x: total((rule(c)(rule(2 * c)(x)),))

    got = lambda c: custom("closure", c)  # noqa: E731
    want = lambda c: exact("closure", c)  # noqa: E731
    assert_close(hessian(number(got), (0, 1))(C, X), hessian(number(want), (0, 1))(C, X))


# --- what changes between forward and backward -----------------------------------------------------


def test_a_live_tensor_exchanged_after_the_forward_is_an_error():
    """Its derivative would go to a tensor that had nothing to do with y."""
    held = collections.deque([C.clone().requires_grad_()])
    y = fi.custom_inverse(lambda x: vector_g(x, held[0], B), lambda y: vector_f(y, held[0], B))(X)
    held[0] = (2 * C).requires_grad_()
    with pytest.raises(fi.NoDerivativeError, match=r"exchanged between the forward.*lost"):
        y.sum().backward()


def test_a_live_tensor_that_appears_after_the_forward_is_an_error():
    held, x = collections.deque([C]), X.clone().requires_grad_()
    y = fi.custom_inverse(lambda x: vector_g(x, held[0], B), lambda y: vector_f(y, held[0], B))(x)
    held[0] = C.clone().requires_grad_()
    with pytest.raises(fi.NoDerivativeError, match="lost"):
        y.sum().backward()


def test_a_parameter_changed_in_place_after_the_forward_is_an_error():
    """As for any torch operation: what was saved is no longer what it was."""
    c = C.clone().requires_grad_()
    y = fi.custom_inverse(lambda x: vector_g(x, c, B), lambda y: vector_f(y, c, B))(X)
    with torch.no_grad():
        c.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_attribute_exchanged_after_the_forward_is_an_error():
    """Also for x: A would be that of another f."""
    x = X.clone().requires_grad_()
    holder = types.SimpleNamespace(c=C.clone().requires_grad_())
    y = fi.custom_inverse(lambda x: vector_g(x, holder.c, B), lambda y: vector_f(y, holder.c, B))(x)
    holder.c = (2 * C).requires_grad_()
    with pytest.raises(fi.NoDerivativeError, match="exchanged"):
        torch.autograd.grad(y.sum(), x)


def test_an_attribute_put_back_before_the_backward():
    """What counts is what f reads when it runs."""
    holder = types.SimpleNamespace(c=C.clone().requires_grad_())
    y = fi.custom_inverse(lambda x: vector_g(x, holder.c, B), lambda y: vector_f(y, holder.c, B))(X)
    mine, holder.c = holder.c, None
    holder.c = mine
    got = torch.autograd.grad(y.sum(), mine)
    assert_close(got, torch.autograd.grad(vector_exact(X, mine, B).sum(), mine))


def test_a_module_that_is_exchanged_after_the_forward():
    """The parameters that took part in the forward get the derivative, or there is an error."""
    holder = types.SimpleNamespace(m=torch.nn.Linear(3, 3, dtype=torch.float64))
    first = holder.m
    weight, bias = first.weight, first.bias
    g = lambda x: np.linalg.solve(first.weight.numpy(), array(x) - first.bias.numpy())  # noqa: E731
    y = fi.custom_inverse(g, lambda y: holder.m(y))(X)
    holder.m = torch.nn.Linear(3, 3, dtype=torch.float64)
    with pytest.raises(fi.NoDerivativeError, match="lost"):
        torch.autograd.grad(y.sum(), (weight, bias))


def frozen(value=2.0):
    module = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64).requires_grad_(False)
    module.weight.fill_(value)
    g = lambda x: torch.asinh(x) / module.weight.detach()[0, 0]  # noqa: E731
    return module, g, lambda y: torch.sinh(y * module.weight[0, 0])


@pytest.mark.parametrize("event_dim", [0, 1, None])
def test_a_frozen_parameter_that_thaws_between_two_calls(event_dim):
    module, g, f = frozen()
    h, x = fi.custom_inverse(g, f, event_dim=event_dim), X.clone().requires_grad_()
    h(x).sum().backward()
    module.requires_grad_(True)
    assert h(X).requires_grad
    exact = lambda x, w: torch.asinh(x) / w  # noqa: E731
    want = torch.autograd.grad(exact(x, module.weight[0, 0]).sum(), (x, module.weight))
    assert_close(torch.autograd.grad(h(x).sum(), (x, module.weight)), want)


@pytest.mark.parametrize("event_dim", [0, 1, None])
def test_a_frozen_parameter_under_functional_call_after_another_call(event_dim):
    inner, g, f = frozen()

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.h = inner, fi.custom_inverse(g, f, event_dim=event_dim)

        def forward(self, x):
            return self.h(x)

    outer, x, w = Outer(), X.clone().requires_grad_(), torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)
    outer(x).sum().backward()
    got = torch.autograd.grad(torch.func.functional_call(outer, {"inner.weight": w}, (x,)).sum(), (x, w))
    assert_close(got, torch.autograd.grad((torch.asinh(x) / w[0, 0]).sum(), (x, w)))


@pytest.mark.parametrize("event_dim", [0, 1, None])
def test_a_frozen_parameter_changed_after_the_forward(event_dim):
    """In place it is an error; another one in its place has no part in this y."""
    module, g, f = frozen()
    x = X.clone().requires_grad_()
    h = fi.custom_inverse(g, f, event_dim=event_dim)
    y, want = h(x), torch.autograd.grad((torch.asinh(x) / 2).sum(), x)
    mine, module.weight = module.weight, torch.nn.Parameter(3 * module.weight, requires_grad=False)
    assert_close(torch.autograd.grad(y.sum(), x, create_graph=True), want)
    module.weight = mine
    y = h(x)
    module.weight.mul_(3)
    with pytest.raises(fi.NoDerivativeError, match="changed in place"):
        torch.autograd.grad(y.sum(), x)


def test_a_closure_as_argument_of_an_inner_transform_is_an_error():
    """torch.func takes it up where nothing can be put in its place."""
    potential = lambda y, c: (torch.cosh(c * y) / c).sum()  # noqa: E731

    def h(x, c):
        return fi.custom_inverse(lambda x: torch.asinh(x) / c, lambda y: grad(potential)(y, c), event_dim=1)(x)

    c = torch.tensor(1.3, dtype=torch.float64)
    for derivative in (lambda: grad(lambda c: h(X, c).sum())(c), lambda: jvp(lambda c: h(X, c).sum(), (c,), (c,))):
        with pytest.raises(fi.NoDerivativeError, match="as an argument"):
            derivative()


@pytest.mark.parametrize("name", ["grad", "jacrev", "vmap"])
def test_a_closure_as_an_argument_of_an_inner_transform(name):
    """torch.func looks at such arguments below everything that can be watched; handed over to g, it is right."""

    def inner(y, W):
        if name == "vmap":
            return y + 0.1 * torch.vmap(lambda y, w: torch.tanh(y * w).sum(), (None, 0))(y, W)
        q = lambda y, W: 0.1 * ((y @ W) ** 2).sum()  # noqa: E731
        return y + (torch.func.grad(q)(y, W) if name == "grad" else torch.func.jacrev(q, 1)(y, W).sum(0))

    def total(W):
        return fi.custom_inverse(lambda x: 0.9 * x, lambda y: inner(y, W))(x).square().sum()

    def handed_over(W):
        return fi.custom_inverse(lambda x, W: 0.9 * x, inner)(x, W).square().sum()

    x, W = torch.linspace(-1, 2, 3, dtype=torch.float64), torch.linspace(0, 1, 9, dtype=torch.float64).cos().reshape(3, 3)
    with pytest.raises(fi.NoDerivativeError, match="as an argument, where it cannot be followed"):
        torch.func.grad(total)(W)
    with pytest.raises(fi.NoDerivativeError, match="Hand it over as an argument"):
        V = W.clone().requires_grad_()
        torch.autograd.grad(total(V), V)
    y = 0.9 * x
    A = torch.func.jacrev(inner)(y, W)
    want = -torch.func.vjp(lambda W: inner(y, W), W)[1](torch.linalg.solve(A.mT, 2 * y))[0]
    assert_close([torch.func.grad(handed_over)(W)], [want], 1e-12)


# --- what f does not read --------------------------------------------------------------------------


class Siblings(torch.nn.Module):
    """f is a method, so it reaches `other`, which it never reads."""

    def __init__(self):
        super().__init__()
        self.own, self.other = (torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64)) for _ in range(2))

    def f(self, y):
        return torch.sinh(self.own * y)

    def g(self, x):
        return torch.asinh(x) / self.own


@pytest.mark.parametrize("event_dim", [0, 1, None])
@pytest.mark.parametrize("rule", ["inverse", "root", "fixed point", "invert"])
def test_what_f_does_not_read_receives_nothing(rule, event_dim):
    """None, as from torch, not zeros, with which weight decay and momentum would move it."""
    net, x = Siblings(), torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    h = {
        "inverse": lambda: fi.custom_inverse(net.g, net.f, event_dim=event_dim),
        "root": lambda: fi.custom_root(net.g, lambda y, x: net.f(y) - x, event_dim=event_dim),
        "fixed point": lambda: fi.custom_fixed_point(net.g, lambda y, x: y - (net.f(y) - x) / 3, event_dim=event_dim),
        "invert": lambda: fi.invert(net.f, event_dim=event_dim),
    }[rule]()
    for times in (1, 2):
        h(x).sum().backward()
        assert net.other.grad is None
        assert_close([net.own.grad], [-times * (torch.asinh(x) / net.own**2).sum()], 1e-7)
    assert_close([x.grad], [2 / (net.own * (1 + x * x).sqrt())], 1e-7)


@pytest.mark.parametrize("event_dim", [0, 1])
def test_an_argument_that_f_does_not_read(event_dim):
    """torch says so, as it does of its own functions; torch.func gives zeros, as it does there."""
    h = fi.custom_inverse(lambda x, b: torch.asinh(x) + 0 * b, lambda y, b: torch.sinh(y), event_dim=event_dim)
    x, b = (torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(h(x, b).sum(), (x, b))
    assert torch.autograd.grad(h(x, b).sum(), (x, b), allow_unused=True)[1] is None
    assert torch.equal(grad(lambda b: h(x.detach(), b).sum())(b.detach()), torch.zeros_like(b))


# --- modules inside of x ---------------------------------------------------------------------------


class Held(torch.nn.Module):
    """h of x and of a module in one pytree."""

    def __init__(self, h):
        super().__init__()
        self.h, self.part = h, torch.nn.ParameterDict({"c": torch.tensor([0.9, 1.3], dtype=torch.float64)})

    def forward(self, x):
        return self.h((x, self.part)).sum()


def of_pair(pair):
    return torch.asinh(pair[0]) / pair[1]["c"]


def test_a_module_inside_of_x():
    """Its parameters are as live as those of a further argument."""
    h = Held(None)
    h.h = fi.custom_inverse(of_pair, lambda y: (torch.sinh(y * h.part["c"]), h.part), event_dim=0)
    x, c = torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([1.8, 2.6], dtype=torch.float64)
    run = lambda c, x: torch.func.functional_call(h, {"part.c": c}, (x,))  # noqa: E731
    exact = lambda c, x: (torch.asinh(x) / c).sum()  # noqa: E731
    for transform in (grad, hessian, lambda f, places: jacfwd(f, places)):
        assert_close(transform(run, (0, 1))(c, x), transform(exact, (0, 1))(c, x))


@pytest.mark.parametrize(
    "rule",
    [
        lambda: fi.custom_jacobian(of_pair, lambda p: (1 / (1 + p[0] ** 2).sqrt() / p[1]["c"], None), event_dim=0),
        lambda: fi.finite_difference(of_pair, event_dim=0),
    ],
)
def test_a_live_module_inside_of_x_whose_derivative_nobody_knows(rule):
    held = Held(rule())
    x, c = torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([1.8, 2.6], dtype=torch.float64)
    run = lambda c, x: torch.func.functional_call(held, {"part.c": c}, (x,))  # noqa: E731
    with pytest.raises(fi.NoDerivativeError, match="module, function or object in `argnums`"):
        grad(run)(c, x)
    with pytest.raises(fi.NoDerivativeError, match="module, function or object in `argnums`"):
        held(x.clone().requires_grad_())
    assert_close([grad(run, 1)(c, x)], [1 / (1 + x**2).sqrt() / c], 1e-7)


@pytest.mark.parametrize("event_dim", [0, 1, None])
@pytest.mark.parametrize("x_too", [False, True])
def test_invert_with_a_module_as_an_argument(event_dim, x_too):
    """Also where nothing but its parameters is mapped."""
    held = Held(None)
    inverse = fi.invert(lambda y, net: torch.sinh(y * net["c"]), event_dim=event_dim)
    held.h = lambda pair: inverse(*pair)
    run = lambda c, x: torch.func.functional_call(held, {"part.c": c}, (x,))  # noqa: E731
    exact = lambda c, x: (torch.asinh(x) / c).sum()  # noqa: E731
    c = torch.tensor([[1.8, 2.6], [0.7, 1.1]], dtype=torch.float64)
    x = torch.tensor([0.3, -0.5], dtype=torch.float64)
    dims, inputs = ((0, 0), (c, torch.stack([x, x + 1]))) if x_too else ((0, None), (c, x))
    for transform in (lambda f: f, lambda f: grad(f, (0, 1)), lambda f: jacfwd(grad(f), (0, 1))):
        got, want = (vmap(transform(f), dims)(*inputs) for f in (run, exact))
        assert_close(got, want, 1e-7)
