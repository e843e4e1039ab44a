"""The catalogue of problems: black boxes by NumPy, their inverses, and the truth in closed form.

Every A = df/dy is non-symmetric, depends on y, and mixes the parts of a sample (save where a problem
says otherwise), so that a missing transpose, a sign or a forgotten term shows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import functorch_inverse as fi

DEVICE = torch.device("cpu")  # `pytest --device` sets it

W = torch.tensor([[3.0, 0.5, -0.4], [0.9, 2.5, 0.3], [-0.2, 0.7, 2.0]], dtype=torch.float64)
P = torch.tensor([[2.0, -0.7], [0.4, 1.5]], dtype=torch.float64)
V = W + 1j * torch.tensor([[0.3, -0.8, 0.1], [0.5, 0.2, -0.3], [0.1, 0.6, -0.4]], dtype=torch.float64)
W_INVERSE, P_INVERSE, V_INVERSE = map(torch.linalg.inv, (W, P, V))


def array(t: Tensor) -> np.ndarray:
    """A tensor for NumPy; fails unless it is plain, which is what g has been promised."""
    return t.cpu().to(torch.complex128 if t.is_complex() else torch.float64).numpy()


def constant(matrix: Tensor, like: Tensor) -> Tensor:
    """A matrix of the catalogue on the device and in the dtype of a tensor."""
    return matrix.to(like)


class Draw:
    """Random inputs, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(DEVICE)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).add(0.5).to(DEVICE)

    def complex(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.complex128).to(DEVICE)


class Parameters(nn.Module):
    """theta as the parameters of a module, nested so that their names have dots."""

    def __init__(self, theta: list[Tensor]) -> None:
        super().__init__()
        self.inner = nn.ParameterList([nn.Parameter(t.detach().clone()) for t in theta])
        self.solve: Callable[..., Any] = lambda x: x

    def forward(self, x: Any) -> Any:
        return self.solve(x)


@dataclass(frozen=True)
class Problem:
    """f(g(x, *theta), *theta) = x, and `exact`, which is g in torch operations.

    `draw` makes the (x, theta) of one sample. `way` is how theta gets to f and g: as "args", in a
    "closure", or as the parameters of a "module".
    """

    name: str
    g: Callable[..., Any]
    f: Callable[..., Any]
    exact: Callable[..., Any]
    draw: Callable[[Draw], tuple[Any, tuple[Any, ...]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    way: str = "args"

    def __repr__(self) -> str:
        return f"{self.name}-{self.way}"

    @property
    def batchable(self) -> bool:
        """Whether x may carry leading batch dims (in "x_shared" they would meet those of theta)."""
        return self.options.get("event_dim") is not None and self.name != "x_shared"

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """The tensors of one sample of (x, theta); a complex one as its real and imaginary parts."""
        return tuple(map(_to_real, _split(self.draw(Draw(seed)))[0]))

    def stacked(self, *batch: int) -> tuple[Tensor, ...]:
        """Many samples with leading batch dims, x and theta alike."""
        count = int(np.prod(batch))
        columns = zip(*(self.inputs(seed) for seed in range(count)), strict=True)
        return tuple(torch.stack(column).unflatten(0, batch) for column in columns)

    @property
    def x_count(self) -> int:
        """How many of the inputs belong to x."""
        return len(_split(self.draw(Draw(0))[0])[0])

    def custom(self) -> Callable[..., tuple[Tensor, ...]]:
        """What is under test, as a function of the inputs."""
        return self._function(fi.custom_inverse)

    def root(self, linear_solver: Any = None) -> Callable[..., tuple[Tensor, ...]]:
        """The same as the root of a residual, f(y, *theta) - x."""
        return self._function(
            lambda g, f, **options: fi.custom_root(g, Minus(f), linear_solver=linear_solver, **_of_y(options))
        )

    def fixed_point(self, linear_solver: Any = None) -> Callable[..., tuple[Tensor, ...]]:
        """The same as a fixed point, of y - 0.3 (f(y, *theta) - x); y must be like x."""
        return self._function(
            lambda g, f, **options: fi.custom_fixed_point(g, Damped(f), linear_solver=linear_solver, **_of_y(options))
        )

    def closed_form(self) -> Callable[..., tuple[Tensor, ...]]:
        """The truth, as a function of the inputs."""
        return replace(self, way="args")._function(lambda g, f, **options: self.exact)

    def _function(self, rule: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        leaves, join = _split(self.draw(Draw(0)))
        kinds = [leaf.is_complex() for leaf in leaves]
        call = _WAYS[self.way](self, rule)

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            made = [torch.view_as_complex(t.contiguous()) if c else t for t, c in zip(inputs, kinds, strict=True)]
            x, theta = join(made)
            return tuple(map(_to_real, _split(call(x, theta))[0]))

        return function


@dataclass(frozen=True)
class Minus:
    """The residual f(y, *theta) - x, as a tuple of leaves."""

    f: Callable[..., Any]

    def __call__(self, y: Any, x: Any, *theta: Any) -> tuple[Tensor, ...]:
        return tuple(a - b for a, b in zip(_split(self.f(y, *theta))[0], _split(x)[0], strict=True))


@dataclass(frozen=True)
class Damped:
    """The map y - 0.3 (f(y, *theta) - x), in the structure of y."""

    f: Callable[..., Any]

    def __call__(self, y: Any, x: Any, *theta: Any) -> Any:
        leaves, join = _split(y)
        return join([a - 0.3 * r for a, r in zip(leaves, Minus(self.f)(y, x, *theta), strict=True)])


def _of_y(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an inverse, for a root: event_dim describes y."""
    return {"event_dim": options.get("out_event_dim", options.get("event_dim"))}


def _by_args(problem: Problem, rule: Callable[..., Any]) -> Callable[..., Any]:
    solve = rule(problem.g, problem.f, **problem.options)
    return lambda x, theta: solve(x, *theta)


def _by_closure(problem: Problem, rule: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, theta: Any) -> Any:
        solve = rule(lambda x: problem.g(x, *theta), lambda y: problem.f(y, *theta), **problem.options)
        return solve(x)

    return call


def _by_module(problem: Problem, rule: Callable[..., Any]) -> Callable[..., Any]:
    leaves, join = _split(problem.draw(Draw(0))[1])
    module = Parameters(leaves)
    g, f = problem.g, problem.f
    module.solve = rule(lambda x: g(x, *join(list(module.inner))), lambda y: f(y, *join(list(module.inner))), **problem.options)

    def call(x: Any, theta: Any) -> Any:
        state = {f"inner.{i}": t for i, t in enumerate(_split(theta)[0])}
        return torch.func.functional_call(module, state, (x,))

    return call


_WAYS = {"args": _by_args, "closure": _by_closure, "module": _by_module}


def _split(tree: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of a tree, and how to put others in their places."""
    leaves: list[Any] = []
    mould = _map(tree, lambda leaf: leaves.append(leaf) or _HOLE)

    def join(tensors: list[Tensor]) -> Any:
        rest = list(tensors)
        return _map(mould, lambda _: rest.pop(0))

    return leaves, join


_HOLE = "a tensor belongs here"


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A function of each tensor or hole; by hand, because Dynamo takes no treespec from outside."""
    if isinstance(tree, dict):
        return {key: _map(tree[key], change) for key in sorted(tree)}
    if isinstance(tree, tuple | list):
        return type(tree)([_map(part, change) for part in tree])
    return change(tree) if isinstance(tree, Tensor) or tree is _HOLE else tree


def _to_real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


# --- vectors, matrices, single numbers -------------------------------------------------------------


def vector_g(x, c, b):
    return np.arcsinh((array(x) - array(b)) @ W_INVERSE.numpy().T) / array(c)


def vector_f(y, c, b):
    return torch.sinh(c * y) @ constant(W, y).T + b


def vector_exact(x, c, b):
    return torch.asinh((x - b) @ constant(W_INVERSE, x).T) / c


def vector_draw(d):
    return d.normal(3), (d.positive(3), d.normal(3))


def elementwise_g(x, a):
    return np.arcsinh(array(x)) / array(a)


def elementwise_f(y, a):
    return torch.sinh(a * y)


def elementwise_exact(x, a):
    return torch.asinh(x) / a


def matrix_g(x, c):
    return np.arcsinh(P_INVERSE.numpy() @ array(x) @ W_INVERSE.numpy()) / array(c)


def matrix_f(y, c):
    return constant(P, y) @ torch.sinh(c * y) @ constant(W, y)


def matrix_exact(x, c):
    return torch.asinh(constant(P_INVERSE, x) @ x @ constant(W_INVERSE, x)) / c


# --- pytrees ---------------------------------------------------------------------------------------


def tree_g(x, c):
    a = np.arcsinh(array(x["a"]) @ W_INVERSE.numpy().T) / array(c)
    damped = array(x["b"]) * np.exp(-(0.2 * a).sum(-1))[..., None, None]
    return {"a": a, "b": np.arcsinh(P_INVERSE.numpy() @ damped)}


def tree_f(y, c):
    grown = constant(P, c) @ torch.sinh(y["b"]) * torch.exp((0.2 * y["a"]).sum(-1))[..., None, None]
    return {"a": torch.sinh(c * y["a"]) @ constant(W, c).T, "b": grown}


def tree_exact(x, c):
    a = torch.asinh(x["a"] @ constant(W_INVERSE, c).T) / c
    damped = x["b"] * torch.exp(-(0.2 * a).sum(-1))[..., None, None]
    return {"a": a, "b": torch.asinh(constant(P_INVERSE, c) @ damped)}


# x = ([u, v], s) with vectors u, v and a number s in each sample; event_dim=(1, 0) is a prefix.
def prefix_g(x, c):
    (u, v), s = x
    u = np.arcsinh(array(u) @ P_INVERSE.numpy().T) / array(c)
    s = np.arcsinh(array(s) - u.sum(-1))
    return [u, array(v) * np.exp(s)[..., None] + u], s


def prefix_f(y, c):
    (u, v), s = y
    return [torch.sinh(c * u) @ constant(P, c).T, (v - u) * torch.exp(-s)[..., None]], torch.sinh(s) + u.sum(-1)


def prefix_exact(x, c):
    (u, v), s = x
    u = torch.asinh(u @ constant(P_INVERSE, c).T) / c
    s = torch.asinh(s - u.sum(-1))
    return [u, v * torch.exp(s)[..., None] + u], s


# x is a 2x2 matrix, y a dict of three numbers and one.
def reshaped_g(x, c):
    rows = np.arcsinh(P_INVERSE.numpy() @ array(x)).reshape(*x.shape[:-2], 4)
    p = rows[..., :3] / array(c)
    return {"p": p, "q": rows[..., 3] - p.sum(-1)}


def reshaped_f(y, c):
    rows = torch.cat([y["p"] * c, (y["q"] + y["p"].sum(-1))[..., None]], -1)
    return constant(P, c) @ torch.sinh(rows.unflatten(-1, (2, 2)))


def reshaped_exact(x, c):
    rows = torch.asinh(constant(P_INVERSE, c) @ x).flatten(-2)
    p = rows[..., :3] / c
    return {"p": p, "q": rows[..., 3] - p.sum(-1)}


# theta is a tree with leaves that are no tensors.
def tree_theta_g(x, theta, power):
    (shift, nothing), scale = theta["shift"], array(theta["scale"])
    assert nothing is None
    return np.cbrt((array(x) - array(shift)) @ W_INVERSE.numpy().T * scale) if power == 3 else None


def tree_theta_f(y, theta, power):
    return y**power / theta["scale"] @ constant(W, y).T + theta["shift"][0]


def tree_theta_exact(x, theta, power):
    inner = (x - theta["shift"][0]) @ constant(W_INVERSE, x).T * theta["scale"]
    return inner.sign() * inner.abs() ** (1 / power)


# --- complex numbers -------------------------------------------------------------------------------


def holomorphic_g(x, c):
    return np.arcsinh(array(x) @ V_INVERSE.numpy().T) / array(c)


def holomorphic_f(y, c):
    return torch.sinh(c * y) @ constant(V, y).T


def holomorphic_exact(x, c):
    return torch.asinh(x @ constant(V_INVERSE, x).T) / c


def crooked_g(x, c):
    h = array(x) @ V_INVERSE.numpy().T
    return np.arcsinh(h.real) / array(c) + 1j * np.arcsinh(h.imag)


def crooked_f(y, c):
    return torch.complex(torch.sinh(c * y.real), torch.sinh(y.imag)) @ constant(V, y).T


def crooked_exact(x, c):
    h = x @ constant(V_INVERSE, x).T
    return torch.complex(torch.asinh(h.real) / c, torch.asinh(h.imag))


# One complex number x, two real ones in y: the logarithm of the radius and the angle.
def polar_g(x, c):
    return np.stack([np.log(np.abs(array(x))) / array(c), np.angle(array(x))], -1)


def polar_f(y, c):
    radius = torch.exp(c * y[..., 0])
    return torch.complex(radius * torch.cos(y[..., 1]), radius * torch.sin(y[..., 1]))


def polar_exact(x, c):
    return torch.stack([(x.real**2 + x.imag**2).log() / (2 * c), torch.atan2(x.imag, x.real)], -1)


# --- the catalogue ---------------------------------------------------------------------------------

ELEMENTWISE = Problem(
    "elementwise", elementwise_g, elementwise_f, elementwise_exact,
    lambda d: (d.normal(3), (d.positive(3),)), {"event_dim": 0},
)  # fmt: skip
VECTOR = Problem("vector", vector_g, vector_f, vector_exact, vector_draw, {"event_dim": 1})
WHOLE = replace(VECTOR, name="whole", options={"event_dim": None})
MATRIX = Problem(
    "matrix", matrix_g, matrix_f, matrix_exact,
    lambda d: (d.normal(2, 3), (d.positive(3),)), {"event_dim": 2},
)  # fmt: skip
TREE = Problem(
    "tree", tree_g, tree_f, tree_exact,
    lambda d: ({"a": d.normal(3), "b": d.normal(2, 2)}, (d.positive(3),)), {"event_dim": {"a": 1, "b": 2}},
)  # fmt: skip
PREFIX = Problem(
    "prefix", prefix_g, prefix_f, prefix_exact,
    lambda d: (([d.normal(2), d.normal(2)], d.normal()), (d.positive(2),)), {"event_dim": (1, 0)},
)  # fmt: skip
RESHAPED = Problem(
    "reshaped", reshaped_g, reshaped_f, reshaped_exact,
    lambda d: (d.normal(2, 2), (d.positive(3),)), {"event_dim": 2, "out_event_dim": {"p": 1, "q": 0}},
)  # fmt: skip
HOLOMORPHIC = Problem(
    "holomorphic", holomorphic_g, holomorphic_f, holomorphic_exact,
    lambda d: (d.complex(3), (d.positive(3) + 0.1j * d.positive(3),)), {"event_dim": 1},
)  # fmt: skip
POLAR = Problem(
    "polar", polar_g, polar_f, polar_exact,
    lambda d: (d.complex(), (d.positive(),)), {"event_dim": 0, "out_event_dim": 1},
)  # fmt: skip

PROBLEMS = [
    ELEMENTWISE,
    replace(ELEMENTWISE, name="scalar", draw=lambda d: (d.normal(), (d.positive(),)), options={}),
    # x is broadcast against theta: y has a dim that x has not.
    replace(ELEMENTWISE, name="x_broadcast", draw=lambda d: (d.normal(2, 1), (d.positive(3),))),
    VECTOR,
    WHOLE,
    replace(VECTOR, name="shared_theta", draw=lambda d: (d.normal(2, 3), (d.positive(3), d.normal(3)))),
    replace(VECTOR, name="batched_theta", draw=lambda d: (d.normal(2, 3), (d.positive(2, 3), d.normal(1, 3)))),
    replace(VECTOR, name="x_shared", draw=lambda d: (d.normal(3), (d.positive(2, 3), d.normal(3)))),
    MATRIX,
    replace(MATRIX, name="whole_matrix", options={}),
    TREE,
    replace(TREE, name="whole_tree", options={}),
    PREFIX,
    RESHAPED,
    replace(RESHAPED, name="whole_reshaped", options={}),
    Problem(
        "tree_theta", tree_theta_g, tree_theta_f, tree_theta_exact,
        lambda d: (d.normal(3), ({"scale": d.positive(3), "shift": (d.normal(3), None)}, 3)), {"event_dim": 1},
    ),
    HOLOMORPHIC,
    replace(HOLOMORPHIC, name="crooked", g=crooked_g, f=crooked_f, exact=crooked_exact,
            draw=lambda d: (d.complex(3), (d.positive(3),))),
    POLAR,
    *(replace(p, way=way) for p in (ELEMENTWISE, VECTOR, WHOLE, TREE) for way in ("closure", "module")),
]  # fmt: skip
