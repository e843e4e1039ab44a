"""Which PyTorch library is right at all? Kepler's equation M = E - e sin E, derivatives to M and to e, in the ways that people
ask for them.

Nothing is timed. "wrong" is an answer that is not the derivative, without a word (no gradient where there is one, too);
"fails" is an error.
"""

import numpy as np
import torch
from torch.func import grad, jacfwd, jvp, vmap

import functorch_inverse as fi
from benchmarks import _afternoon, _peers
from benchmarks._report import main
from benchmarks._timing import AFTERNOON, OURS, TOLERANCE, Contender, Row, judge
from benchmarks.kepler import f, newton, residual

MAKERS = {
    OURS: lambda g, f, r, M: fi.custom_inverse(g, f, event_dim=0),
    AFTERNOON: lambda g, f, r, M: lambda *inputs: _afternoon.Numbers.apply(g, f, *inputs),
    "TorchOpt": lambda g, f, r, M: _peers.torchopt(g, r, M).get("TorchOpt"),
    "xitorch": lambda g, f, r, M: _peers.xitorch(g, r, M).get("xitorch"),
    "zuko": lambda g, f, r, M: _peers.zuko(g, f).get("zuko"),
}


# --- what is asked, of a function that makes h(M, e) from g, f and r -------------------------------


def first(make, M, e):
    M, e = M.clone().requires_grad_(), e.clone().requires_grad_()
    return torch.autograd.grad(make(newton, f, residual, M)(M, e).sum(), (M, e))


def first_of_one_number(make, M, e):
    return first(make, M[0], e[0])


def first_of_what_f_closes_over(make, M, e):
    e = e.clone().requires_grad_()
    g, r = (lambda M: newton(M, e.detach())), (lambda E, M: residual(E, M, e))
    make(g, lambda E: f(E, e), r, M)(M.clone().requires_grad_()).sum().backward()
    return (e.grad,)


def second(make, M, e):
    e = e.clone().requires_grad_()
    (once,) = torch.autograd.grad(make(newton, f, residual, M)(M, e).sum(), e, create_graph=True)
    return torch.autograd.grad(once.sum(), e)


def forward_mode(make, M, e):
    h = make(newton, f, residual, M)
    return (jvp(lambda e: h(M, e), (e,), (torch.ones_like(e),))[1],)


def each_sample(make, M, e):
    return (vmap(grad(make(newton, f, residual, M), argnums=1))(M, e),)


def forward_twice(make, M, e):
    h = make(newton, f, residual, M)
    return (jacfwd(jacfwd(lambda t: h(M, e + t)))(torch.zeros((), dtype=e.dtype)),)


def compiled(make, M, e):
    e = e.clone().requires_grad_()
    h = torch.compile(make(newton, f, residual, M), fullgraph=True, backend="aot_eager")
    return torch.autograd.grad(h(M, e).sum(), e)


USES = {
    "backward": (first, ("M", "e")),
    "backward, 0-d tensors": (first_of_one_number, ("M0", "e0")),
    "backward, f closes over e": (first_of_what_f_closes_over, ("e",)),
    "backward twice": (second, ("ee",)),
    "torch.func.jvp": (forward_mode, ("e",)),
    "vmap(grad)": (each_sample, ("e",)),
    "jacfwd(jacfwd)": (forward_twice, ("ee",)),
    "torch.compile, fullgraph": (compiled, ("e",)),
}


# --- the answers -----------------------------------------------------------------------------------


def derivatives(M, e):
    """With D = 1 - e cos E: dE/dM = 1 / D, dE/de = sin E / D, and once more to e."""
    E, e = newton(M, e).numpy(), e.numpy()
    s, c = np.sin(E), np.cos(E)
    D = 1 - e * c
    once = s / D
    twice = (c * once * D + s * c - e * s * s * once) / D**2
    return {"M": 1 / D, "e": once, "ee": twice, "M0": (1 / D)[0], "e0": once[0]}


def row(name):
    use, keys = USES[name]
    M, e = torch.linspace(0.3, 2.5, 5, dtype=torch.float64), torch.linspace(0.1, 0.6, 5, dtype=torch.float64)
    answers, cells = derivatives(M, e), {}
    for contender, make in MAKERS.items():
        if contender in (OURS, AFTERNOON) or _peers.installed(contender.lower()):
            work = Contender(contender, lambda make=make: use(make, M, e))
            cells[contender] = judge(work, [answers[key] for key in keys], TOLERANCE[M.dtype])
            torch.compiler.reset()
    return Row("who is right", name, "float64", "verdict", {}, cells)


def rows(effort):
    return [row(name) for name in USES if effort.compiler or use_is_eager(name)]


def use_is_eager(name):
    return USES[name][0] is not compiled


if __name__ == "__main__":
    main(__doc__, rows)
