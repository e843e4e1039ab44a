"""Random event dims, batch shapes, in_dims and structures, against closed forms."""

import optree
import torch
from helpers import assert_close, live, total
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import Draw
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import functorch_inverse as fi

settings.register_profile("suite", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("suite")

# --- a problem of any shapes -----------------------------------------------------------------------
# One sample is a tree of leaves, all of them read as one vector z: x = M sinh(c z), y = asinh(M^-1 x) / c.

shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
batches = st.lists(st.integers(1, 3), max_size=2).map(tuple)
trees = st.recursive(
    shapes,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=2), st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2)
    ),
    max_leaves=3,
)


def is_shape(node):
    return isinstance(node, tuple)


def size(tree):
    return sum(torch.Size(s).numel() for s in optree.tree_leaves(tree, is_leaf=is_shape))


def flat(tree, dims):
    """(*batch, n) of a tree of leaves (*batch, *event)."""
    return torch.cat([t.flatten(t.ndim - d) if d else t[..., None] for t, d in zip(leaves(tree), dims, strict=True)], -1)


def leaves(tree):
    return optree.tree_leaves(tree)


def unflat(vector, tree):
    """The inverse of `flat`, in the structure of a tree of shapes."""
    parts = iter(vector.split([torch.Size(s).numel() for s in optree.tree_leaves(tree, is_leaf=is_shape)], -1))
    return optree.tree_map(lambda s: next(parts).reshape(vector.shape[:-1] + s), tree, is_leaf=is_shape)


def event_dims(tree):
    return optree.tree_map(len, tree, is_leaf=is_shape)


class Mixed:
    """g, f and the closed form for a tree of shapes in x and another of the same size in y."""

    def __init__(self, x_tree, y_tree, seed=0):
        n = size(x_tree)
        self.x_tree, self.y_tree = x_tree, y_tree
        self.x_dims, self.y_dims = leaves(event_dims(x_tree)), leaves(event_dims(y_tree))
        self.M = Draw(seed).normal(n, n) / n + 2 * torch.eye(n, dtype=torch.float64)

    def f(self, y, c):
        z = flat(y, self.y_dims)
        return unflat((self.M.to(z) @ torch.sinh(c * z)[..., None])[..., 0], self.x_tree)

    def exact(self, x, c):
        z = flat(x, self.x_dims)
        return unflat(torch.asinh((torch.linalg.inv(self.M) @ z[..., None])[..., 0]) / c, self.y_tree)

    def g(self, x, c):
        return optree.tree_map(lambda t: t.numpy(), self.exact(x, c))

    def custom(self, **options):
        dims = {"event_dim": event_dims(self.x_tree), "out_event_dim": event_dims(self.y_tree)}
        return fi.custom_inverse(self.g, self.f, **(dims | options))

    def inputs(self, *batch):
        draw = Draw(1)
        x = optree.tree_map(lambda s: draw.normal(*batch, *s), self.x_tree, is_leaf=is_shape)
        return x, draw.positive()


@st.composite
def problems(draw):
    x_tree, y_tree = draw(trees), draw(trees)
    # y gets whatever is missing as one more leaf, or falls back to the structure of x.
    missing = size(x_tree) - size(y_tree)
    if missing < 0:
        y_tree = x_tree
    elif missing:
        y_tree = [y_tree, (missing,)]
    return Mixed(x_tree, y_tree, draw(st.integers(0, 100)))


def number(h):
    return lambda *inputs: total(tuple(leaves(h(*inputs))))


# --- properties ------------------------------------------------------------------------------------


@given(problems(), batches, st.integers(1, 3))
def test_autograd_of_any_order(problem, batch, order):
    x, c = problem.inputs(*batch)

    def derivative(h):
        inputs = live((*leaves(x), c))
        out = number(h)(optree.tree_unflatten(optree.tree_structure(x), inputs[:-1]), inputs[-1])
        for _ in range(order - 1):
            out = total(torch.autograd.grad(out, inputs, create_graph=True))
        return torch.autograd.grad(out, inputs)

    assert_close(derivative(problem.custom()), derivative(problem.exact))


@given(problems(), batches, st.lists(st.sampled_from([jacrev, jacfwd]), min_size=1, max_size=3))
def test_torch_func_of_any_nesting(problem, batch, modes):
    """Along a line through x and through c, so that it stays small."""
    x, c = problem.inputs(*batch)

    def derivative(h):
        along = lambda s, t: number(h)(optree.tree_map(lambda v: v + s * v.sin(), x), c + t)  # noqa: E731
        for mode in modes:
            along = mode(along, (0, 1))
        return along(c * 0, c * 0)

    assert_close(derivative(problem.custom()), derivative(problem.exact))


@given(problems(), st.sampled_from([jacrev, jacfwd, hessian]), st.sampled_from(["sequential", "broadcast", None]))
def test_vmap_methods_agree(problem, transform, vmap_method):
    x, c = problem.inputs(3)
    h = problem.custom(vmap_method=vmap_method)
    derivative = lambda h: vmap(transform(h, (0, 1)), (0, None))(x, c)  # noqa: E731
    assert_close(derivative(h), derivative(problem.exact))


@given(problems(), st.data())
def test_any_in_dims_and_out_dims(problem, data):
    """Each leaf of x along a dim of its own; c batched or not."""
    x, c = problem.inputs(2)
    dims = optree.tree_map(lambda t: data.draw(st.integers(-t.ndim, t.ndim - 1)), x)
    out_dim, mapped_c = data.draw(st.sampled_from([0, -1])), data.draw(st.booleans())
    x = optree.tree_map(lambda t, d: t.movedim(0, d), x, dims)
    c = torch.stack([c, 2 * c]) if mapped_c else c

    def derivative(h):
        return vmap(lambda x, c: grad(number(h), (0, 1))(x, c), (dims, 0 if mapped_c else None), out_dim)(x, c)

    assert_close(derivative(problem.custom()), derivative(problem.exact))


@given(problems(), st.lists(st.sampled_from(["x", "c", "both"]), min_size=1, max_size=3))
def test_nested_vmaps(problem, levels):
    x, c = problem.inputs()
    in_dims = []
    for over in levels:
        if over != "c":
            x = optree.tree_map(lambda t: torch.stack([t, t.cos()]), x)
        if over != "x":
            c = torch.stack([c, c + 1])
        in_dims.append((None if over == "c" else 0, None if over == "x" else 0))

    def derivative(h):
        h = jacfwd(number(h), (0, 1))
        for dims in in_dims:
            h = vmap(h, dims)
        return h(x, c)

    assert_close(derivative(problem.custom()), derivative(problem.exact))


@given(problems())
def test_whole_input_is_one_sample(problem):
    """event_dim=None: the same numbers, found as one Jacobian."""
    x, c = problem.inputs()
    derivative = lambda h: hessian(number(h), (0, 1))(x, c)  # noqa: E731
    assert_close(derivative(problem.custom(event_dim=None, out_event_dim=None)), derivative(problem.exact))


@given(problems(), batches)
def test_batches_are_independent_samples(problem, batch):
    """Leading dims by event_dim, or by vmap: the same."""
    assume(batch)
    x, c = problem.inputs(*batch)
    h = problem.custom()
    together = lambda x: jvp(h, (x, c), (optree.tree_map(torch.cos, x), c))  # noqa: E731
    apart = together
    for _ in batch:
        apart = vmap(apart)
    assert_close(apart(x), together(x))


# --- broadcasting ----------------------------------------------------------------------------------


@st.composite
def broadcastable(draw):
    """Two shapes that broadcast against each other."""
    full = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))

    def part():
        kept = [n if draw(st.booleans()) else 1 for n in full]
        return tuple(kept[draw(st.integers(0, len(full) - 1)) :])

    return part(), part()


@given(broadcastable(), st.sampled_from([jacrev, jacfwd, hessian]))
def test_elementwise_broadcasting(pair, transform):
    """x and theta of any shapes that broadcast; each gradient has its argument's own shape."""
    x, a = Draw(0).normal(*pair[0]), Draw(1).positive(*pair[1])
    h = fi.custom_inverse(lambda x, a: torch.asinh(x).numpy() / a.numpy(), lambda y, a: torch.sinh(a * y), event_dim=0)
    exact = lambda x, a: torch.asinh(x) / a  # noqa: E731
    assert_close(transform(number(h), (0, 1))(x, a), transform(number(exact), (0, 1))(x, a))


@given(broadcastable(), st.sampled_from([jacrev, jacfwd, hessian]))
def test_vector_broadcasting(pair, transform):
    """The same for batch dims: x (*, 2) and theta (*, 2)."""
    x, a = Draw(0).normal(*pair[0], 2), Draw(1).positive(*pair[1], 2)
    M = torch.tensor([[2.0, 0.5], [-0.3, 1.5]], dtype=torch.float64)
    exact = lambda x, a: torch.asinh(x @ torch.linalg.inv(M).T) / a  # noqa: E731
    h = fi.custom_inverse(lambda x, a: exact(x, a).numpy(), lambda y, a: torch.sinh(a * y) @ M.T, event_dim=1)
    assert_close(transform(number(h), (0, 1))(x, a), transform(number(exact), (0, 1))(x, a))


@given(broadcastable(), st.booleans(), st.booleans())
def test_vmapped_broadcasting(pair, over_x, over_a):
    """vmap adds a dim of its own, which must not meet a dim of the other argument."""
    assume(over_x or over_a)
    x, a = Draw(0).normal(2, *pair[0]), Draw(1).positive(2, *pair[1])
    x, a = x if over_x else x[0], a if over_a else a[0]
    exact = lambda x, a: torch.asinh(x) / a  # noqa: E731
    h = fi.custom_inverse(lambda x, a: exact(x, a).numpy(), lambda y, a: torch.sinh(a * y), event_dim=0)
    dims = (0 if over_x else None, 0 if over_a else None)
    derivative = lambda h: vmap(jacrev(h, (0, 1)), dims)(x, a)  # noqa: E731
    assert_close(derivative(h), derivative(exact))
