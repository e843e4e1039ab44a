"""torch.compile(fullgraph=True) with a g that can be traced; each group in a process of its own (torch_facts 1.11)."""

import re
from dataclasses import replace

import numpy as np
import optree
import pytest
import torch
from fresh import run_fresh
from helpers import all_of, assert_close, live, loss, total
from problems import ELEMENTWISE, HOLOMORPHIC, MATRIX, RESHAPED, TREE, VECTOR, WHOLE, vector_exact, vector_f
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import functorch_inverse as fi


def traceable(problem):
    """The problem with a g made of torch operations, whose own derivative is wrong by a factor, should anyone ask."""

    def g(x, *theta):
        return optree.tree_map(lambda y: y + (3 * y - (3 * y).detach()), problem.exact(x, *theta))

    return replace(problem, g=g)


EVERY_STACK = [VECTOR, TREE]
FEW_STACKS = [ELEMENTWISE, WHOLE, RESHAPED, MATRIX, HOLOMORPHIC, replace(VECTOR, way="closure"), replace(VECTOR, way="module")]
PROBLEMS = {repr(p): traceable(p) for p in (*EVERY_STACK, *FEW_STACKS)}


def autograd(h, inputs):
    inputs = live(inputs)
    return torch.autograd.grad(total(h(*inputs)), inputs)


# What is compiled, and with what it is called.
STACKS = {
    "values": lambda h, n: h,
    "grad": lambda h, n: grad(loss(h), tuple(range(n))),
    "vmap_grad": lambda h, n: lambda *i: vmap(grad(loss(h), tuple(range(n))))(*(torch.stack([t, t.cos()]) for t in i)),
    "jvp": lambda h, n: lambda *i: jvp(h, i, tuple(t.cos() for t in i)),
    "jacrev": lambda h, n: jacrev(h, tuple(range(n))),
    "jacfwd": lambda h, n: jacfwd(h, tuple(range(n))),
    "hessian": lambda h, n: hessian(loss(h), tuple(range(n))),
    "jacrev_jacrev": lambda h, n: jacrev(jacrev(h)),
}


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager"} | options)


def check_stacks(name, stacks):
    """Forward + backward, then some stacks; all failures together."""
    problem = PROBLEMS[name]
    h, exact, inputs = problem.custom(), problem.closed_form(), problem.inputs()
    cases = {"backward": (lambda: autograd(compiled(h), inputs), lambda: autograd(exact, inputs))}
    for stack in stacks:
        make = STACKS[stack]
        cases[stack] = (
            lambda make=make: compiled(make(h, len(inputs)))(*inputs),
            lambda make=make: make(exact, len(inputs))(*inputs),
        )
    report(cases)


def report(cases):
    failed = []
    for name, (got, want) in cases.items():
        try:
            assert_close(got(), want())
        except Exception as error:
            if not _is_of_torch(error):
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
    assert not failed, "\n".join(failed)


def _is_of_torch(error):
    """Before 2.13, torch cannot trace its own basis of several tensors, whatever is differentiated."""
    return torch.__version__ < (2, 13) and "_chunked_standard_basis_for_" in str(error)


@pytest.mark.parametrize("name", [repr(p) for p in EVERY_STACK])
def test_every_stack(name):
    run_fresh(check_stacks, name, list(STACKS))


@pytest.mark.parametrize("name", [repr(p) for p in FEW_STACKS])
def test_few_stacks(name):
    run_fresh(check_stacks, name, ["vmap_grad", "jvp", "hessian"])


# --- batches ---------------------------------------------------------------------------------------

SIZES = (2, 3, 5, 8, 13)


def sines(h):
    """A loss without `weights`, whose linspace compiles anew for each size in plain torch too."""
    return lambda *inputs: sum(t.sin().sum() for t in h(*inputs))


def per_sample(h, n, count):
    return lambda *inputs: vmap(grad(sines(h)), (0,) * n + (None,) * (count - n))(*inputs)


def check_recompilation(name, stack):
    problem = PROBLEMS[name]
    n, count = problem.x_count, len(problem.inputs())
    transform = {"backward": lambda h: h, "grad": lambda h: grad(sines(h)), "vmap": lambda h: per_sample(h, n, count)}[stack]
    counter = CompileCounterWithBackend("aot_eager")
    step, exact = compiled(transform(problem.custom()), backend=counter), transform(problem.closed_form())
    for size in SIZES:
        inputs = (*problem.stacked(size)[:n], *problem.inputs()[n:])
        call = autograd if stack == "backward" else lambda h, inputs: [h(*inputs)]
        assert_close(call(step, inputs), call(exact, inputs))
    assert counter.frame_count <= 3, f"{counter.frame_count} frames for {len(SIZES)} batch sizes"


@pytest.mark.parametrize(
    ("name", "stack"),
    # No tree under vmap: torch.cat specialises there by itself.
    [("elementwise-args", "backward"), ("vector-args", "grad"), ("tree-args", "backward"), ("vector-args", "vmap")],
)
def test_bounded_recompilation(name, stack):
    run_fresh(check_recompilation, name, stack)


# --- options ---------------------------------------------------------------------------------------

X, C, B = VECTOR.inputs()


def check_options():
    def with_aux(x, c, b, *, scale=1.0):
        y = vector_exact(x, c, b) * scale
        return y, {"norm": x.norm(), "twice": [2 * y]}

    h = fi.custom_inverse(with_aux, lambda y, c, b: vector_f(y / 2, c, b), event_dim=1, has_aux=True)
    exact = lambda x, c, b: 2 * vector_exact(x, c, b)  # noqa: E731

    def aux():
        y, aux = compiled(lambda *i: h(*i, scale=2.0))(*live((X, C, B)))
        assert not aux["norm"].requires_grad
        return [y.detach(), aux["norm"], aux["twice"][0]]

    def backward():
        inputs = live((X, C, B))
        return torch.autograd.grad(compiled(lambda *i: h(*i, scale=2.0)[0])(*inputs).sin().sum(), inputs)

    nan = fi.custom_inverse(lambda x: x.sqrt(), torch.square, event_dim=1)
    points = torch.tensor([[1.0], [0.0], [4.0]], dtype=torch.float64)

    def singular():
        got = compiled(lambda x: vmap(jacrev(nan))(x))(points).flatten()
        assert got[1].isnan()
        return [got[[0, 2]]]

    def exact_backward():
        inputs = live((X, C, B))
        return torch.autograd.grad(exact(*inputs).sin().sum(), inputs)

    report(
        {
            "has_aux and keywords": (aux, lambda: [exact(X, C, B), X.norm(), 2 * exact(X, C, B)]),
            "backward beside aux": (backward, exact_backward),
            "nan where singular": (singular, lambda: [torch.tensor([0.5, 0.25], dtype=torch.float64)]),
            "dynamic": (
                lambda: compiled(lambda *i: h(*i, scale=2.0)[0], dynamic=True)(X, C, B)[None],
                lambda: exact(X, C, B)[None],
            ),
            "no_grad": (
                lambda: [torch.no_grad()(compiled(lambda *i: h(*i, scale=2.0)[0]))(*live((X, C, B)))],
                lambda: [exact(X, C, B)],
            ),
        }
    )


def test_options():
    run_fresh(check_options)


def check_plain_module():
    """Parameters that require grad, a training step, and a network around the black box."""

    class Net(torch.nn.Module):
        def __init__(self, exact):
            super().__init__()
            self.c, self.b = torch.nn.Parameter(C.clone()), torch.nn.Parameter(B.clone())
            self.head = torch.nn.Parameter(X.clone())
            g = lambda x: vector_exact(x, self.c, self.b)  # noqa: E731
            self.solve = g if exact else fi.custom_inverse(g, lambda y: vector_f(y, self.c, self.b), event_dim=1)

        def forward(self, x):
            return (torch.sin(self.solve(x)) * self.head).sum()

    def train(exact):
        net = Net(exact)
        step = net if exact else compiled(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            step(VECTOR.inputs(seed)[0]).backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    report({"training": (lambda: train(False), lambda: train(True))})


def test_plain_module():
    run_fresh(check_plain_module)


def check_closure_that_requires_grad():
    c = C.clone().requires_grad_()
    h = fi.custom_inverse(lambda x: vector_exact(x, c, B), lambda y: vector_f(y, c, B))
    leaves = lambda: (c, X.clone().requires_grad_())  # noqa: E731

    def got():
        c, x = leaves()
        return torch.autograd.grad(compiled(h)(x).sin().sum(), (c, x))

    def want():
        c, x = leaves()
        return torch.autograd.grad(vector_exact(x, c, B).sin().sum(), (c, x))

    report({"closure": (got, want)})


def test_closure_that_requires_grad():
    run_fresh(check_closure_that_requires_grad)


def check_two_rules():
    """One in a chain with another, and one inside another's f."""
    first = fi.custom_inverse(vector_exact, vector_f, event_dim=1)
    nested = fi.custom_inverse(
        lambda x, c, b: vector_f(torch.asinh(x), c, b), lambda y, c, b: torch.sinh(first(y, c, b)), event_dim=1
    )
    chain = lambda x, c, b: first(first(x, c, b), c, b)  # noqa: E731
    exact_chain = lambda x, c, b: vector_exact(vector_exact(x, c, b), c, b)  # noqa: E731
    exact_nested = lambda x, c, b: vector_f(torch.asinh(x), c, b)  # noqa: E731
    cases = {}
    for name, h, exact in (("chain", chain, exact_chain), ("nested", nested, exact_nested)):
        cases[name] = (
            lambda h=h: compiled(hessian(lambda *i: h(*i).sin().sum(), (0, 1, 2)))(X, C, B),
            lambda h=exact: hessian(lambda *i: h(*i).sin().sum(), (0, 1, 2))(X, C, B),
        )
    report(cases)


def test_two_rules():
    run_fresh(check_two_rules)


def check_refusals():
    """What cannot be done there says so."""
    cases = {
        "check": (fi.custom_inverse(vector_exact, vector_f, check=True), {}, "check=True looks at values"),
        "keyword": (
            fi.custom_inverse(lambda x, *, c: vector_exact(x, c, B), lambda y: vector_f(y, C, B)),
            {"c": C.clone().requires_grad_()},
            "keyword argument carries a derivative",
        ),
        "sizes": (fi.custom_inverse(lambda x: torch.cat([x, x]), lambda y: y[:3]), {}, "More outputs than inputs"),
        "option": (fi.custom_inverse(vector_exact, vector_f, event_dim=-1), {}, "choose None, 0, 1, 2"),
    }
    for name, (h, keywords, text) in cases.items():
        positional = (X, C, B) if name in ("check", "option") else (X,)
        call = compiled(lambda *i, h=h, k=keywords: h(*i, **k))
        with pytest.raises(Exception, match=re.escape(text)):
            call(*live(positional))


def test_refusals():
    run_fresh(check_refusals)


# --- inductor --------------------------------------------------------------------------------------


def check_inductor():
    problem = PROBLEMS["vector-args"]
    h, exact, inputs = problem.custom(), problem.closed_form(), problem.inputs()
    derivative = lambda h: grad(loss(h), all_of(inputs))  # noqa: E731
    report(
        {
            "backward": (lambda: autograd(compiled(h, backend="inductor"), inputs), lambda: autograd(exact, inputs)),
            "grad": (lambda: compiled(derivative(h), backend="inductor")(*inputs), lambda: derivative(exact)(*inputs)),
        }
    )


def test_inductor():
    run_fresh(check_inductor)


# --- compiled autograd -----------------------------------------------------------------------------


def check_compiled_autograd():
    """The backward pass of an eager forward is compiled: torch tells nodes apart by a key that it asks their class for."""
    h = fi.custom_inverse(vector_exact_at_C, lambda y: vector_f(y, C, B), event_dim=1)
    x = X.clone().requires_grad_()
    loss = total((h(x),))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    assert_close((x.grad,), autograd(lambda x: (vector_exact_at_C(x),), (X,)))


def vector_exact_at_C(x):
    return vector_exact(x, C, B)


def test_compiled_autograd():
    run_fresh(check_compiled_autograd)


# --- operations in place ---------------------------------------------------------------------------


def scaled_asinh(x, a):
    return torch.asinh(x) * a


def in_place_rules(event_dim):
    """asinh(x) * a in every way there is, by a g that torch cannot look into where one is needed."""
    g, f = fi.black_box(lambda x, a: np.arcsinh(x) * a), lambda y, a: torch.sinh(y / a)
    slopes = lambda x, a: (a / (1 + x * x).sqrt(), torch.asinh(x))  # noqa: E731
    square = slopes if event_dim == 0 else lambda x, a: tuple(map(torch.diag_embed, slopes(x, a)))
    return {
        "custom_inverse": fi.custom_inverse(g, f, event_dim=event_dim),
        "traced": fi.custom_inverse(scaled_asinh, f, event_dim=event_dim),
        "custom_root": fi.custom_root(g, lambda y, x, a: f(y, a) - x, event_dim=event_dim),
        "custom_jacobian": fi.custom_jacobian(g, square, argnums=(0, 1), event_dim=event_dim),
        "invert": fi.invert(f, event_dim=event_dim),
    }


def writes_to_y(h, x, a):
    y = h(x, a)
    y.mul_(2)
    return y


def writes_to_args(h, x, a):
    x, a = x * 1, a * 1
    y = h(x, a)
    x.mul_(5)
    a.mul_(3)
    return y * a


# What is computed, and the same without operations in place.
IN_PLACE = {
    "y": (writes_to_y, lambda x, a: 2 * scaled_asinh(x, a)),
    "args": (writes_to_args, lambda x, a: 3 * a * scaled_asinh(x, a)),
}
REAL = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), torch.tensor([1.5, 0.7, 2.0], dtype=torch.float64)


def check_in_place(event_dim, backend):
    cases = {}
    for rule, h in in_place_rules(event_dim).items():
        for name, (function, exact) in IN_PLACE.items():
            cases[f"{rule}, {name}"] = (
                lambda h=h, function=function: autograd_of(compiled(lambda *i: function(h, *i), backend=backend)),
                lambda exact=exact: autograd_of(exact),
            )
    report(cases)


def autograd_of(function):
    return autograd(lambda *inputs: (function(*inputs),), REAL)


@pytest.mark.parametrize(("event_dim", "backend"), [(0, "aot_eager"), (1, "eager"), (None, "aot_eager")])
def test_operations_in_place_after_a_call(event_dim, backend):
    run_fresh(check_in_place, event_dim, backend)


def check_in_place_more():
    """With inductor, and inside transforms."""
    rules = in_place_rules(0)
    slope = lambda h: grad(lambda *i: writes_to_y(h, *i).sin().sum(), (0, 1))  # noqa: E731
    push = lambda h: lambda *i: jvp(lambda *i: writes_to_y(h, *i), i, i)  # noqa: E731
    y_doubled = IN_PLACE["y"][1]
    exact_slope = grad(lambda *i: y_doubled(*i).sin().sum(), (0, 1))
    cases = {
        name: (
            lambda function=function: autograd_of(compiled(lambda *i: function(rules["traced"], *i), backend="inductor")),
            lambda exact=exact: autograd_of(exact),
        )
        for name, (function, exact) in IN_PLACE.items()
    }
    for name in ("custom_inverse", "custom_jacobian"):
        cases[f"grad, {name}"] = (lambda h=rules[name]: compiled(slope(h))(*REAL), lambda: exact_slope(*REAL))
        cases[f"jvp, {name}"] = (lambda h=rules[name]: compiled(push(h))(*REAL), lambda: jvp(y_doubled, REAL, REAL))
    report(cases)


def test_operations_in_place_by_inductor_and_inside_transforms():
    run_fresh(check_in_place_more)


def check_result_is_its_own():
    """A g that returns its input, or a view of it: who writes to y does not write to x."""
    for g in (lambda x: x, lambda x: x.view(-1)):
        for grad_mode in (torch.enable_grad, torch.no_grad):
            x = X.clone()
            with grad_mode():
                step = compiled(lambda x, g=g: fi.custom_inverse(g, torch.clone)(x).mul_(2))
                assert_close((step(x),), (2 * X,))
            assert_close((x,), (X,))


def test_result_is_its_own():
    run_fresh(check_result_is_its_own)


# --- after a graph break ---------------------------------------------------------------------------

PUSHED = torch.tensor([[3.0, 1.0, 0.0], [1.0, 4.0, 1.0], [0.0, 1.0, 5.0]], dtype=torch.float64)


def partly(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", **options)


def check_graph_breaks():
    """What runs between two graphs runs as in eager torch; a g of NumPy is traced, or not, with the same result."""
    numpy = lambda x: np.arcsinh(x.numpy())  # noqa: E731
    opaque = lambda x: torch.from_numpy(np.arcsinh(np.array(x.tolist())))  # noqa: E731
    exact_slope = 1 / (1 + X * X).sqrt()
    cases = {}
    for event_dim in (0, 1, None):
        for name, g, full in (("numpy", numpy, False), ("numpy, whole", numpy, True), ("opaque", opaque, False)):
            h = fi.custom_inverse(g, torch.sinh, event_dim=event_dim)
            cases[f"{name}, {event_dim}"] = (
                lambda h=h, full=full: autograd(lambda x: (partly(h, fullgraph=full)(x),), (X,)),
                lambda: autograd(lambda x: (torch.asinh(x),), (X,)),
            )
        h = fi.custom_inverse(opaque, torch.sinh, event_dim=event_dim)
        cases[f"grad of compiled, {event_dim}"] = (
            lambda h=h: (grad(lambda x: partly(h)(x).sum())(X),),
            lambda: (exact_slope,),
        )
    for solver in (fi.GMRES(), fi.BiCGStab(), fi.CG()):
        cases[repr(solver)] = (lambda solver=solver: with_matrix(solver), lambda: with_matrix(None))
    report(cases)


def with_matrix(solver):
    """Derivatives to x and to a loose tensor that f closes over."""
    W, x = live((PUSHED, X))
    exact = lambda x: torch.linalg.solve(W, x)  # noqa: E731
    h = exact if solver is None else partly(fi.custom_inverse(exact, lambda y: W @ y, linear_solver=solver))
    return torch.autograd.grad(h(x).sin().sum(), (x, W))


def test_graph_breaks():
    run_fresh(check_graph_breaks)


# --- other tracers ---------------------------------------------------------------------------------


def slopes_of(h):
    return vmap(grad(lambda x: h(x).sum()))


class Exported(torch.nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h = h

    def forward(self, x):
        return self.h(x)


def check_other_tracers():
    """make_fx and torch.export see an operator, and no values that would be constants in their graphs."""
    g = fi.black_box(np.arcsinh)
    other = 2 * X + 1
    value, slope = torch.asinh(other), 1 / (1 + other * other).sqrt()
    structured = fi.black_box(lambda x: {"y": np.arcsinh(x), "n": x.sum()}, result=lambda x: {"y": x, "n": x.sum()})
    rules = {
        "black box": (g, None),
        "structured": (lambda x: structured(x)["y"], None),
        "inverse": (fi.custom_inverse(g, torch.sinh, event_dim=1), slope),
        "elementwise": (fi.custom_inverse(g, torch.sinh, event_dim=0), slope),
        "root": (fi.custom_root(g, lambda y, x: torch.sinh(y) - x, event_dim=1), slope),
        "jacobian": (fi.custom_jacobian(g, lambda x: 1 / (1 + x * x).sqrt(), event_dim=0), slope),
    }
    cases = {}
    for name, (h, known) in rules.items():
        for mode in ("real", "fake", "symbolic"):
            cases[f"{name}, {mode}"] = (lambda h=h, mode=mode: (make_fx(h, tracing_mode=mode)(X)(other),), lambda: (value,))
            if known is not None:
                per_sample = slopes_of(h)
                cases[f"slope of {name}, {mode}"] = (
                    lambda d=per_sample, mode=mode: (make_fx(d, tracing_mode=mode)(X[None])(other[None]),),
                    lambda: (slope[None],),
                )
        cases[f"{name}, before autograd"] = (lambda h=h: (make_fx(h, pre_dispatch=True)(X)(other),), lambda: (value,))
        cases[f"{name}, exported"] = (
            lambda h=h: (torch.export.export(Exported(h), (X,), strict=False).module()(other),),
            lambda: (value,),
        )
    report(cases)
    with pytest.raises(NotImplementedError, match=re.escape("torch.export records what transforms do")):
        torch.export.export(Exported(vmap(rules["inverse"][0])), (X[None],), strict=False)


def test_other_tracers():
    run_fresh(check_other_tracers)


# --- numbers ---------------------------------------------------------------------------------------


def check_numbers():
    """Without a tensor nothing is known of an opaque result: eager torch takes over, or an error says so."""
    h = fi.custom_inverse(fi.black_box(np.arcsinh), torch.sinh, event_dim=0)
    assert_close((partly(h)(0.5),), (h(0.5),))
    with pytest.raises(Exception, match="there is no tensor among the"):
        compiled(h)(0.5)
    number = fi.custom_inverse(lambda x: torch.tensor(x).asinh(), torch.sinh, event_dim=0)
    assert_close((compiled(number)(0.5),), (number(0.5),))


def test_numbers():
    run_fresh(check_numbers)
