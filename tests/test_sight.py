"""What is kept from one call to the next is dropped as soon as f or g may read something else."""

import copy
import gc
import pickle
import sys
import types
import weakref

import pytest
import torch
from helpers import assert_close
from problems import VECTOR, vector_exact, vector_f, vector_g

import functorch_inverse as fi
from functorch_inverse._sight import Sight

X, C, B = VECTOR.inputs()
LIVE = (2 * C).requires_grad_()

# --- where f finds c, and how another one gets there: () -> (f, exchange) --------------------------


def a_cell():
    c = C

    def exchange(new):
        nonlocal c
        c = new

    return (lambda y: vector_f(y, c, B)), exchange


def a_cell_of_a_helper():
    helper, exchange = a_cell()
    return (lambda y: helper(y)), exchange


GLOBAL_C = C


def reads_a_global(y):
    return vector_f(y, GLOBAL_C, B)


def a_global():
    return reads_a_global, lambda new: globals().update(GLOBAL_C=new)


def a_global_that_was_not_there():
    namespace = {"vector_f": vector_f, "B": B, "C": C, "__name__": "elsewhere"}
    exec("def f(y):\n    try: c = late\n    except NameError: c = C\n    return vector_f(y, c, B)", namespace)
    return namespace["f"], lambda new: namespace.update(late=new)


def a_default():
    def f(y, c=C):
        return vector_f(y, c, B)

    return f, lambda new: setattr(f, "__defaults__", (new,))


def a_keyword_default():
    def f(y, *, c=C):
        return vector_f(y, c, B)

    return f, lambda new: f.__kwdefaults__.update(c=new)


def a_function_attribute():
    def f(y):
        return vector_f(y, getattr(f, "c", C), B)

    return f, lambda new: setattr(f, "c", new)


def a_code():
    new_c = None

    def f(y):
        return vector_f(y, C, B) if new_c is None else None

    def other(y):
        return vector_f(y, new_c, B)

    def exchange(new):
        nonlocal new_c
        new_c = new
        f.__code__ = other.__code__

    return f, exchange


class Holder:
    c = C

    def f(self, y):
        return vector_f(y, self.c, B)


def an_attribute():
    holder = Holder()
    holder.c = C
    return holder.f, lambda new: setattr(holder, "c", new)


def an_attribute_that_hides_that_of_the_class():
    holder = Holder()
    return holder.f, lambda new: setattr(holder, "c", new)


def an_attribute_of_the_class():
    cls = type("Other", (Holder,), {})
    return cls().f, lambda new: setattr(cls, "c", new)


def a_method():
    cls = type("Other", (Holder,), {})
    holder = cls()
    f = lambda y: holder.f(y)  # noqa: E731
    return f, lambda new: setattr(cls, "f", lambda self, y: vector_f(y, new, B))


def slots():
    class Slotted:
        __slots__ = ("c",)

    holder = Slotted()
    holder.c = C
    return (lambda y: vector_f(y, holder.c, B)), lambda new: setattr(holder, "c", new)


def a_list():
    held = [C]
    return (lambda y: vector_f(y, held[0], B)), lambda new: held.__setitem__(0, new)


def an_empty_list():
    held = []
    return (lambda y: vector_f(y, held[0] if held else C, B)), lambda new: held.append(new)


def a_dict():
    held = {"c": C}
    return (lambda y: vector_f(y, held["c"], B)), lambda new: held.update(c=new)


def a_list_in_a_tuple():
    held = ([C],)
    return (lambda y: vector_f(y, held[0][0], B)), lambda new: held[0].__setitem__(0, new)


def a_module_of_code():
    module = types.ModuleType("some_code_of_the_user")
    module.c = C
    return (lambda y: vector_f(y, module.c, B)), lambda new: setattr(module, "c", new)


def an_attribute_of_a_tensor():
    other = torch.zeros(1)
    return (lambda y: vector_f(y, getattr(other, "c", C), B)), lambda new: setattr(other, "c", new)


def an_import():
    sys.modules.pop("late_code", None)

    def f(y):
        try:
            import late_code
        except ImportError:
            return vector_f(y, C, B)
        return vector_f(y, late_code.c, B)

    def exchange(new):
        sys.modules["late_code"] = types.ModuleType("late_code")
        sys.modules["late_code"].c = new

    return f, exchange


def a_module():
    module = torch.nn.Module()
    module.c = C
    return (lambda y: vector_f(y, module.c, B)), lambda new: setattr(module, "c", new)


def a_buffer():
    module = torch.nn.Module()
    module.register_buffer("c", C)
    return (lambda y: vector_f(y, module.c, B)), lambda new: setattr(module, "c", new)


def a_module_in_a_module():
    outer, other = torch.nn.Sequential(torch.nn.Module()), torch.nn.Module()
    outer[0].c = C

    def exchange(new):
        other.c = new
        outer[0] = other

    return (lambda y: vector_f(y, outer[0].c, B)), exchange


def a_list_in_a_module_in_a_module():
    outer = torch.nn.Sequential(torch.nn.Module())
    outer[0].held = [C]
    return (lambda y: vector_f(y, outer[0].held[0], B)), lambda new: outer[0].held.__setitem__(0, new)


PLACES = [
    a_cell, a_cell_of_a_helper, a_global, a_global_that_was_not_there, a_default, a_keyword_default, a_function_attribute,
    a_code, an_attribute, an_attribute_that_hides_that_of_the_class, an_attribute_of_the_class, a_method, slots, a_list,
    an_empty_list, a_dict, a_list_in_a_tuple, a_module_of_code, an_attribute_of_a_tensor, an_import, a_module, a_buffer,
    a_module_in_a_module, a_list_in_a_module_in_a_module,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _clean():
    yield
    globals().update(GLOBAL_C=C)
    sys.modules.pop("late_code", None)


def derivatives(h, leaves):
    return torch.autograd.grad(h(leaves[0]).sum(), leaves)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_live_tensor_that_comes_between_two_calls(place):
    f, exchange = place()
    now, x = [C], X.clone().requires_grad_()
    h = fi.custom_inverse(lambda x: vector_g(x, now[0].detach(), B), f)
    want = torch.autograd.grad(vector_exact(x, C, B).sum(), x)
    for _ in range(3):
        assert_close(derivatives(h, (x,)), want)
    now[0] = LIVE
    exchange(LIVE)
    want = torch.autograd.grad(vector_exact(x, LIVE, B).sum(), (x, LIVE))
    for _ in range(2):
        assert_close(derivatives(h, (x, LIVE)), want)


@pytest.mark.parametrize("place", [p for p in PLACES if p is not a_buffer], ids=lambda place: place.__name__)
def test_a_live_tensor_that_comes_between_forward_and_backward(place):
    f, exchange = place()
    x = X.clone().requires_grad_()
    h = fi.custom_inverse(lambda x: vector_g(x, C, B), f)
    derivatives(h, (x,))
    y = h(x)
    exchange(LIVE)
    with pytest.raises(fi.NoDerivativeError, match="lost"):
        y.sum().backward()


def test_a_buffer_is_what_it_was_in_the_forward():
    """As a parameter is: the derivative puts it back in its place."""
    f, exchange = a_buffer()
    x = X.clone().requires_grad_()
    y = fi.custom_inverse(lambda x: vector_g(x, C, B), f)(x)
    exchange(LIVE)
    got = torch.autograd.grad(y.sum(), x)
    assert_close(got, torch.autograd.grad(vector_exact(x, C, B).sum(), x))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_g_sees_plain_tensors_whenever_they_come(place):
    g, exchange = place()
    seen = []

    def watched(x):
        y = g(x)
        seen.append(y.requires_grad)
        return vector_g(x, C, B)

    h = fi.custom_inverse(watched, lambda y: vector_f(y, C, B))
    h(X)
    exchange(LIVE)
    h(X)
    assert seen == [False, False]


def test_a_tensor_that_becomes_live():
    c, x = C.clone(), X.clone().requires_grad_()
    h = fi.custom_inverse(lambda x: vector_g(x, c, B), lambda y: vector_f(y, c, B))
    derivatives(h, (x,))
    c.requires_grad_()
    assert_close(derivatives(h, (x, c)), torch.autograd.grad(vector_exact(x, c, B).sum(), (x, c)))


def test_a_tensor_changed_in_place():
    """Between two calls it is another f; between forward and backward it is an error."""
    c, x = C.clone(), X.clone().requires_grad_()
    h = fi.custom_inverse(lambda x: vector_g(x, c, B), lambda y: vector_f(y, c, B))
    derivatives(h, (x,))
    c.mul_(2)
    assert_close(derivatives(h, (x,)), torch.autograd.grad(vector_exact(x, c, B).sum(), x))
    y = h(x)
    c.mul_(2)
    with pytest.raises(fi.NoDerivativeError, match="changed in place"):
        y.sum().backward()


def test_one_walk_serves_many_calls():
    f, exchange = an_attribute()
    sight = Sight(f)
    first = sight.reach()
    assert sight.reach() is first
    exchange(LIVE)
    assert sight.reach() is not first
    assert sight.reach() is sight.reach()


def test_copies_begin_anew():
    h = fi.custom_inverse(reads_a_global, reads_a_global)
    h(X)
    for other in (copy.copy(h), copy.deepcopy(h), pickle.loads(pickle.dumps(h))):
        assert_close(other(X), h(X))


def test_nothing_keeps_a_graph_alive():
    """What f closed over in the last call goes when it is exchanged."""
    held = [C]
    h = fi.custom_inverse(lambda x: vector_g(x, C, B), lambda y: vector_f(y, held[0], B))
    held[0] = C.clone().requires_grad_() * 1
    graph = weakref.ref(held[0])
    h(X).sum().backward()
    held[0] = C
    gc.collect()
    assert graph() is None


def test_wrappers_go_without_the_garbage_collector():
    """What they close over may be large."""

    def make_and_use():
        c, x = C.clone(), X.clone().requires_grad_()
        derivatives(fi.custom_inverse(lambda x: vector_g(x, c, B), lambda y: vector_f(y, c, B)), (x,))
        return weakref.ref(c)

    gc.collect()
    gc.disable()
    try:
        assert make_and_use()() is None
    finally:
        gc.enable()
