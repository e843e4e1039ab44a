"""Other libraries as contenders. Each takes its values from the same g, so that only the derivatives race; who is not
installed is left out.

TorchOpt and xitorch solve one linear system for the whole batch, matrix-free and to the tolerance that is given here (their
defaults, 1e-5 and 1e-6, would count as wrong in float64). zuko has numbers only: its bisection gets an interval that has
already shrunk to the solution. JAX is compiled (jit), as it is meant to be used; optimistix gets a root finder that accepts
its first guess.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks._timing import Contender, one_core

RTOL = {torch.float64: 1e-10, torch.float32: 1e-6}
Inputs = Sequence[Tensor]
Calls = dict[str, Callable[..., Tensor]]


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def torchopt(g: Callable[..., Tensor], residual: Callable[..., Tensor], v: Tensor) -> Calls:
    """custom_root with the conjugate gradient method for the normal equations, its solver for matrices without symmetry."""
    if not installed("torchopt"):
        return {}
    import torchopt
    from torchopt.diff.implicit import custom_root

    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")
    solver, start = torchopt.linear_solve.solve_normal_cg(rtol=RTOL[v.dtype], atol=0.0), torch.zeros_like(v)

    def call(*inputs: Tensor) -> Tensor:
        numbers = tuple(range(1, len(inputs) + 1))
        return custom_root(residual, argnums=numbers, solve=solver)(lambda _, *inputs: g(*inputs))(start, *inputs)

    return {"TorchOpt": call}


def xitorch(g: Callable[..., Tensor], residual: Callable[..., Tensor], v: Tensor) -> Calls:
    """rootfinder with g as its method, and its default linear solver."""
    if not installed("xitorch"):
        return {}
    from xitorch.optimize import rootfinder

    start = torch.zeros_like(v)
    options = {"method": "bicgstab", "rtol": RTOL[v.dtype]} if v.numel() > 5 else {}

    def function(y: Tensor, *inputs: Tensor) -> Tensor:  # it refuses methods of other classes
        return residual(y, *inputs)

    def call(*inputs: Tensor) -> Tensor:
        return rootfinder(function, start, params=inputs, method=lambda _f, _y, params: g(*params), bck_options=options)

    return {"xitorch": call}


def zuko(g: Callable[..., Tensor], f: Callable[..., Tensor]) -> Calls:
    """bisection with an interval of length zero; f(y, *args)."""
    if not installed("zuko"):
        return {}
    from zuko.utils import bisection

    def call(x: Tensor, *args: Tensor) -> Tensor:
        with torch.no_grad():
            y = g(x, *args)
        return bisection(lambda y: f(y, *args), x, y, y, n=0, phi=args)

    return {"zuko": call}


def optimistix(
    residual: Callable[..., Any],
    g: Callable[..., Any],
    inputs: Inputs,
    v: Tensor,
    *,
    constants: Inputs = (),
    axes: Sequence[int | None] | None = (),
    solver: Callable[[Any, float], Any] | None = None,
    work: Callable[..., Sequence[Any]] | None = None,
) -> list[Contender]:
    """root_find under jit. residual(jax.numpy, y, *inputs, *constants) is that of one sample, g(*inputs, *constants) of all.

    axes: which inputs have a batch dim, as for vmap; None: there is one sample and no batch.
    work(jax, h, inputs, v): what to do with the root as a function of the inputs; a forward and a backward unless given.
    """
    if not installed("jax", "optimistix"):
        return []
    jax, root, lineax = _jax()
    given = [jax.numpy.asarray(t.detach().numpy()) for t in (*inputs, *constants)]
    count, work = len(inputs), work or _there_and_back
    linear = solver(lineax, RTOL[v.dtype]) if solver else lineax.AutoLinearSolver(well_posed=True)

    def one(y: Any, *args: Any) -> Any:
        return root(functools.partial(_with, residual, jax.numpy), y, args, linear)

    def step(given: Any, v: Any) -> Any:
        inputs, rest = tuple(given[:count]), given[count:]
        y = jax.lax.stop_gradient(g(*given))
        shared = (None,) * len(rest)
        batched = one if axes is None else jax.vmap(one, (0, *axes, *shared))
        return work(jax, lambda *inputs: batched(y, *inputs, *rest), inputs, v)

    run, cotangent = jax.jit(step), jax.numpy.asarray(v.numpy())
    return [Contender("optimistix, jit", lambda: jax.block_until_ready(run(given, cotangent)))]


def gmres(lineax: Any, rtol: float) -> Any:
    """It compares entry by entry, where the cotangents are of size one."""
    return lineax.GMRES(rtol=rtol, atol=rtol)


def _there_and_back(jax: Any, h: Callable[..., Any], inputs: Any, v: Any) -> Sequence[Any]:
    value, vjp = jax.vjp(h, *inputs)
    return (value, *vjp(v))


def _with(residual: Callable[..., Any], xp: Any, y: Any, args: Any) -> Any:
    return residual(xp, y, *args)


@functools.cache
def _jax() -> tuple[Any, Any, Any]:
    """JAX, a root finder that accepts its first guess, lineax."""
    import jax
    import lineax
    import optimistix

    with one_core():
        jax.devices()

    jax.config.update("jax_enable_x64", True)

    class Accept(optimistix.AbstractRootFinder):
        rtol: float = 0.0
        atol: float = 0.0
        norm: Any = optimistix.max_norm

        def init(self, fn, y, args, options, f_struct, aux_struct, tags):
            return None

        def step(self, fn, y, args, options, state, tags):
            return y, state, None

        def terminate(self, fn, y, args, options, state, tags):
            return jax.numpy.array(True), optimistix.RESULTS.successful

        def postprocess(self, fn, y, aux, args, options, state, tags, result):
            return y, aux, {}

    def root(residual, y, args, linear_solver):
        adjoint = optimistix.ImplicitAdjoint(linear_solver=linear_solver)
        return optimistix.root_find(residual, Accept(), y, args, adjoint=adjoint).value

    return jax, root, lineax
