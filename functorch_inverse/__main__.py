"""python -m functorch_inverse: two real black boxes differentiated, and what composes on the torch installed here.

Exit status 0 only if every derivative agrees with finite differences and every composition with its closed form.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, float64, tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from functorch_inverse.custom import custom_inverse

__all__ = ["COLUMNS", "EXAMPLES", "Column", "Example", "main"]

Function: TypeAlias = Callable[..., Any]
Report: TypeAlias = dict[str, Any]


# --- two black boxes, and their inverses in torch --------------------------------------------------


def arm_angles(x: Tensor, lengths: Tensor) -> np.ndarray:
    """Inverse kinematics: the two joint angles that put the hand of a planar arm at x."""
    p, (l1, l2) = x.numpy(), lengths.numpy()
    elbow = np.arccos(((p**2).sum(-1) - l1**2 - l2**2) / (2 * l1 * l2))
    shoulder = np.arctan2(p[..., 1], p[..., 0]) - np.arctan2(l2 * np.sin(elbow), l1 + l2 * np.cos(elbow))
    return np.stack([shoulder, elbow], -1)


def arm_hand(q: Tensor, lengths: Tensor) -> Tensor:
    """Forward kinematics: where the hand is."""
    directions = q.cumsum(-1)
    return torch.stack([(lengths * directions.cos()).sum(-1), (lengths * directions.sin()).sum(-1)], -1)


def lambert_w(x: Tensor) -> np.ndarray:
    """The principal branch of w e^w = x by Halley's iteration."""
    target = x.numpy()
    w: np.ndarray = np.log1p(target)
    for _ in range(20):
        residual = w * np.exp(w) - target
        w = w - residual / (np.exp(w) * (w + 1) - (w + 2) * residual / (2 * w + 2))
    return w


@dataclass(frozen=True)
class Example:
    """A black box g with its inverse f, samples x and further arguments; `letters` are those of y, x and args."""

    name: str
    letters: str
    g: Function
    f: Function
    x: Tensor
    args: tuple[Tensor, ...] = ()
    order: int = 1


EXAMPLES = (
    Example(
        "Inverse kinematics of a planar arm in NumPy: angles q, hand at x, lengths l", "qxl", arm_angles, arm_hand,
        tensor([[1.2, 0.5], [-0.4, 1.1], [0.3, -0.9]], dtype=float64), (tensor([1.0, 0.7], dtype=float64),),
    ),
    Example(
        "Lambert's W by Halley's iteration in NumPy", "Wx", lambert_w, lambda w: w * w.exp(),
        tensor([-0.3, 0.1, 1.0, 10.0, 1000.0], dtype=float64), order=2,
    ),
)  # fmt: skip


# --- their derivatives beside finite differences ---------------------------------------------------

_AGREEMENT = 1e-6  # what second differences still reach


def derivatives(example: Example) -> Iterator[Report]:
    """Every number of every derivative: ours, that of finite differences, their error relative to the Jacobian."""
    y, letters = example.letters[0], example.letters[1:]
    for argnum, x in enumerate(letters):
        ours: Function = custom_inverse(example.g, example.f, event_dim=example.x.ndim - 1)
        theirs = example.g
        for order in range(1, example.order + 1):
            ours, theirs = jacrev(ours, argnum), _differences(theirs, argnum)
            got = vmap(ours, (0, *(None for _ in example.args)))(example.x, *example.args)
            want = torch.stack([theirs(sample, *example.args) for sample in example.x])
            for sample, *index in np.ndindex(*got.shape):
                a, b = got[(sample, *index)].item(), want[(sample, *index)].item()
                error = abs(a - b) / want[sample].abs().max().item()
                found = {"value": a, "finite_difference": b, "error": error, "right": error < _AGREEMENT}
                yield {"x": example.x[sample].tolist(), "derivative": _label(y, x, order, index), **found}


def _differences(function: Function, argnum: int) -> Function:
    """The Jacobian of one sample by the central stencil of five points, (*out_event, *in_event)."""

    def jacobian(*inputs: Tensor) -> Tensor:
        t = inputs[argnum]
        h = 5e-4 * t.abs().max().clamp(min=0.1)

        def at(step: Tensor) -> Tensor:
            return torch.as_tensor(function(*inputs[:argnum], t + step, *inputs[argnum + 1 :]))

        steps = h * torch.eye(t.numel(), dtype=t.dtype).reshape(-1, *t.shape)
        columns = [(8 * (at(s) - at(-s)) - (at(2 * s) - at(-2 * s))) / (12 * h) for s in steps]
        return torch.stack(columns, -1).reshape((*columns[0].shape, *t.shape))

    return jacobian


def _label(y: str, x: str, order: int, index: Sequence[int]) -> str:
    """dq2/dx1 for the parts of vectors, W'' for numbers."""
    return f"d{y}{index[0] + 1}/" + "".join(f"d{x}{i + 1}" for i in index[1:]) if index else y + "'" * order


# --- the composition table -------------------------------------------------------------------------

_EXACT = 1e-9
_W = tensor([[3.0, 0.5, -0.4], [0.9, 2.5, 0.3], [-0.2, 0.7, 2.0]], dtype=float64)
_C = tensor([1.0, 1.3, 0.8], dtype=float64)
_X = tensor([[0.3, -0.8, 1.1], [0.9, 0.2, -0.5]], dtype=float64)


@dataclass(frozen=True)
class Column:
    """f(y, c) = W sinh(c y), differentiated with respect to x (three numbers) or, for `theta`, to c."""

    name: str
    event_dim: int | None
    x: Tensor
    w: Tensor
    theta: bool = False

    def functions(self) -> tuple[Function, Function, Function]:
        """The black box g, its inverse f, and g in closed form."""
        inverse = torch.linalg.inv(self.w).T
        return (
            lambda x, c: np.arcsinh(x.numpy() @ inverse.numpy()) / c.numpy(),
            lambda y, c: torch.sinh(c * y) @ self.w.T,
            lambda x, c: torch.asinh(x @ inverse) / c,
        )

    def of_one(self, function: Function) -> tuple[Function, Tensor]:
        """A function of what is differentiated, and where."""
        return (lambda c: function(self.x, c), _C) if self.theta else (lambda x: function(x, _C), self.x)


COLUMNS = (
    Column("event_dim=None", None, _X[0], _W),
    Column("event_dim=0", 0, _X, torch.eye(3, dtype=float64)),
    Column("event_dim=1", 1, _X, _W),
    Column("theta", 1, _X, _W, theta=True),
)


def _loss(h: Function) -> Function:
    return lambda x: (h(x) * torch.linspace(0.5, 1.5, 3, dtype=float64)).sin().sum()


def _backward(h: Function, x: Tensor, times: int) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(h)(x), x, create_graph=times > 1)
    return gradient if times == 1 else torch.autograd.grad(gradient.sin().sum(), x)[0]


# Of a function h, a point x and a batch of points xs.
_STACKS: dict[str, Callable[[Function, Tensor, Tensor], Tensor]] = {
    "backward": lambda h, x, xs: _backward(h, x, 1),
    "double backward": lambda h, x, xs: _backward(h, x, 2),
    "grad": lambda h, x, xs: grad(_loss(h))(x),
    "vjp": lambda h, x, xs: vjp(h, x)[1](h(x).cos())[0],
    "jvp": lambda h, x, xs: jvp(h, (x,), (x.cos(),))[1],
    "jacrev": lambda h, x, xs: jacrev(h)(x),
    "jacfwd": lambda h, x, xs: jacfwd(h)(x),
    "hessian": lambda h, x, xs: hessian(_loss(h))(x),
    "jacfwd(jacfwd)": lambda h, x, xs: jacfwd(jacfwd(h))(x),
    "jacrev(jacfwd)": lambda h, x, xs: jacrev(jacfwd(h))(x),
    "jacfwd(jacrev(grad))": lambda h, x, xs: jacfwd(jacrev(grad(_loss(h))))(x),
    "vmap(grad)": lambda h, x, xs: vmap(grad(_loss(h)))(xs),
    "vmap(jacrev)": lambda h, x, xs: vmap(jacrev(h))(xs),
    "vmap(jacfwd)": lambda h, x, xs: vmap(jacfwd(h))(xs),
    "vmap(hessian)": lambda h, x, xs: vmap(hessian(_loss(h)))(xs),
    "grad(vmap)": lambda h, x, xs: grad(lambda xs: vmap(_loss(h))(xs).square().sum())(xs),
    "linearize": lambda h, x, xs: linearize(h, x)[1](x.cos()),
}
_COMPILED = ("backward", "grad", "vmap(grad)", "jvp", "jacrev", "hessian")


def cell(column: Column, name: str, *, compiled: bool = False) -> str:
    """right, or WRONG with the relative error, or the class of the error that was raised."""
    stack, (g, f, exact) = _STACKS[name], column.functions()
    truth, x = column.of_one(exact)
    # Dynamo has to trace g, so there it is the closed form.
    h, _ = column.of_one(custom_inverse(exact if compiled else g, f, event_dim=column.event_dim))
    xs = torch.stack([x, 0.7 * x, 1.2 * x])
    compile_ = partial(torch.compile, backend="aot_eager", fullgraph=True) if compiled else lambda function: function
    try:
        # The forward is compiled here, and its backward with it.
        got = stack(compile_(h), x, xs) if name == "backward" else compile_(partial(stack, h))(x, xs)
    except Exception as error:
        return type(error).__name__
    want = stack(truth, x, xs)
    error = (got - want).abs().max() / want.abs().max() if got.shape == want.shape else torch.inf
    return "right" if error < _EXACT else f"WRONG {error:.1e}"


# A trace that fails can leave torch.func in disorder, so compiled cells are measured in processes of their own, and
# in a new one after each failure. A job is the name of a column and that of a stack.


def compiled_cells(jobs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The cells of the jobs under torch.compile, one after the other."""
    found: dict[tuple[str, str], str] = {}
    while rest := jobs[len(found) :]:
        code = f"from functorch_inverse import __main__; __main__.work({rest!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        found |= zip(rest, done.stdout.splitlines() or [f"exit status {done.returncode}"], strict=False)
    return found


def work(jobs: Sequence[tuple[str, str]]) -> None:
    """In a process of its own: a line for each cell, until one is not right."""
    for name, stack in jobs:
        torch.compiler.reset()
        (column,) = (c for c in COLUMNS if c.name == name)
        print(found := cell(column, stack, compiled=True), flush=True)
        if found != "right":
            return


# --- the report ------------------------------------------------------------------------------------


def measure(examples: Sequence[Example], columns: Sequence[Column], processes: int) -> Report:
    """Everything that is printed; nothing is compiled in 0 processes."""
    jobs = [(column.name, stack) for stack in _COMPILED for column in columns]
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(compiled_cells, jobs[i::processes]) for i in range(processes)]
        numbers = {example.name: list(derivatives(example)) for example in examples}
        table = {column.name: {stack: cell(column, stack) for stack in _STACKS} for column in columns}
    for (column, stack), found in (item for later in waiting for item in later.result().items()):
        table[column][f"compile {stack}"] = found
    right = [number["right"] for example in numbers.values() for number in example]
    right += [found == "right" for cells in table.values() for found in cells.values()]
    packages = ("torch", "optree", "numpy", "functorch_inverse")
    return {
        "derivatives": numbers,
        "compositions": table,
        "versions": {"python": sys.version.split()[0], **{name: metadata.version(name) for name in packages}},
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "right": all(right),
    }


def text(report: Report) -> Iterator[str]:
    """The report in lines."""
    for name, numbers in report["derivatives"].items():
        yield f"{name}\n  {'at x =':16}{'derivative':12}{'ours':>20}{'finite differences':>22}{'error':>10}"
        for n in numbers:
            found = f"{n['value']:20.12g}{n['finite_difference']:22.12g}{n['error']:10.0e}"
            yield f"  {n['x']!s:16}{n['derivative']:12}{found}{'' if n['right'] else '  WRONG'}"
        yield ""
    table = report["compositions"]
    yield f"Relative error against the closed form: right where it is below {_EXACT:.0e}"
    yield f"  {'':22}" + "".join(f"{column:18}" for column in table)
    for stack in next(iter(table.values()), {}):
        yield f"  {stack:22}" + "".join(f"{cells[stack]:18}" for cells in table.values())
    yield "\n" + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield f"devices: {', '.join(report['devices'])}\n" + ("all right" if report["right"] else "NOT ALL RIGHT")


def main(argv: Sequence[str] | None = None, examples: Sequence[Example] = EXAMPLES, columns: Sequence[Column] = COLUMNS) -> int:
    """Print the report; 0 if everything in it is right, else 1."""
    parser = argparse.ArgumentParser("python -m functorch_inverse", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    parser.add_argument("--processes", type=int, default=2, help="how many compile at once; 0 leaves torch.compile out")
    options = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = measure(examples, columns, options.processes)
    lines = [json.dumps(report, indent=2)] if options.json else text(report)
    print(*(line.rstrip() for line in lines), sep="\n")
    return 0 if report["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
