"""How often g is called, whatever is asked of the derivative: exactly once, since g may be the expensive part.

Counted, not timed, on the elementwise arcsine; the derivatives are checked against the closed form all the same.
"""

import numpy as np
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import functorch_inverse as fi
from benchmarks import _afternoon, _peers
from benchmarks._report import main
from benchmarks._timing import AFTERNOON, OURS, TOLERANCE, Contender, Row, judge


def backward(h, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(h(x).sum(), x)[0]


def first(x):
    return 1 / np.sqrt(1 - x**2)


def second(x):
    return x / (1 - x**2) ** 1.5


USES = {
    "forward and backward": (backward, first),
    "jacrev": (lambda h, x: jacrev(h)(x), lambda x: np.diag(first(x))),
    "jacfwd": (lambda h, x: jacfwd(h)(x), lambda x: np.diag(first(x))),
    "vmap(grad)": (lambda h, x: vmap(grad(h))(x), first),
    "hessian": (lambda h, x: hessian(lambda x: h(x).sum())(x), lambda x: np.diag(second(x))),
}


class Counting:
    """torch.asin, counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return torch.asin(x)


def contenders(g, v):
    return {
        OURS: fi.custom_inverse(g, torch.sin, event_dim=0),
        AFTERNOON: lambda x: _afternoon.Numbers.apply(g, torch.sin, x),
        **_peers.torchopt(g, lambda y, x: torch.sin(y) - x, v),
        **_peers.xitorch(g, lambda y, x: torch.sin(y) - x, v),
    }


def row(name, dtype):
    use, exact = USES[name]
    x = torch.linspace(-0.9, 0.9, 7, dtype=dtype)
    cells = {}
    for contender in contenders(Counting(), x):
        g = Counting()
        h = contenders(g, x)[contender]
        cell = judge(Contender(contender, lambda h=h: (use(h, x),)), (exact(x.double().numpy()),), TOLERANCE[dtype])
        cells[contender] = cell
        if cell.status != "fails":
            cell.value = float(g.calls)
    return Row("calls of g", name, str(dtype).removeprefix("torch."), "calls", {OURS: 1.0}, cells)


def rows(effort):
    return [row(name, effort.dtypes[0]) for name in USES]


if __name__ == "__main__":
    main(__doc__, rows)
