"""The laws of this package as callables, for the tests of its users."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_inverse._solvers import SolverLike
from functorch_inverse._tree import Partition, Tree, is_differentiable
from functorch_inverse._vectors import real_dtype
from functorch_inverse.custom import custom_inverse
from functorch_inverse.errors import DerivativeError, StructureError

__all__ = ["check_derivatives", "check_inverse"]


def check_inverse(
    g: Callable[..., Any],
    f: Callable[..., Any],
    x: Tree,
    *args: Tree,
    event_dim: Tree = None,
    out_event_dim: Tree = None,
    linear_solver: SolverLike = None,
    has_aux: bool = False,
    rtol: float | None = None,
    step: float | None = None,
) -> None:
    r"""Assert that f is the inverse of g, and that it gives g the right derivatives.

    .. math:: f(g(x, \theta), \theta) = x, \qquad
              J_g\,d = \frac{-g(x + 2hd) + 8 g(x + hd) - 8 g(x - hd) + g(x - 2hd)}{12 h} + O(h^4)

    for one random direction d through x and all floating arguments at once. A wrong derivative to an
    argument, or samples that f lets influence each other, show as well as a wrong f. Derivatives to what f closes over,
    modules and their parameters included, are not tested: hand it over as an argument for that.

    Args:
        g: the black box; called seven times.
        f: its inverse, as for `custom_inverse`.
        x: where to look, and args with it; tensors or pytrees of tensors.
        event_dim, out_event_dim, linear_solver, has_aux: as for `custom_inverse`.
        rtol: relative tolerance of the derivative; eps^(1/3) of the dtype unless given. A g that
            converges to n digits allows about n - 3.
        step: h, relative to the size of each number; eps^(1/5) unless given.

    Raises:
        ResidualError: f(g(x)) is not x; names the worst sample.
        DerivativeError: the derivatives disagree; says in which output and by how much.

    Example:
        >>> x = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)
        >>> check_inverse(torch.asin, torch.sin, x, event_dim=0)

    Source of the stencil: Fornberg, Generation of Finite Difference Formulas on Arbitrarily Spaced
    Grids (1988), table 1.
    """
    options = {"event_dim": event_dim, "out_event_dim": out_event_dim, "linear_solver": linear_solver}
    checked = custom_inverse(g, f, check=True, has_aux=has_aux, **options)

    def values(*inputs: Tree) -> Tree:
        y = checked(*inputs)
        return y[0] if has_aux else y

    with torch.no_grad():
        values(x, *args)
    check_derivatives(values, x, *args, rtol=rtol, step=step)


def check_derivatives(
    fn: Callable[..., Tree], *args: Tree, order: int = 1, rtol: float | None = None, step: float | None = None
) -> None:
    r"""Assert that forward and reverse mode agree with finite differences of the values.

    Along a random direction d, J d by forward mode is compared with a central difference of order 4, and
    with reverse mode through :math:`\langle v, J d \rangle = \langle J^T v, d \rangle`.

    Args:
        fn: a function of tensors, or pytrees of tensors, to the same.
        args: where to look.
        order: how often to differentiate; the derivative of order n is checked against differences of that
            of order n - 1.
        rtol: relative tolerance, eps^(1/3) of the dtype unless given.
        step: relative step, eps^(1/5) of the dtype unless given.

    Raises:
        DerivativeError: the derivatives disagree.
    """
    partition, inputs = Partition.of(args, is_differentiable)
    if not inputs:
        raise StructureError("`check_derivatives`: no floating argument arrived, so there is nothing to differentiate.")
    inputs = tuple(t.detach() for t in inputs)
    generator = torch.Generator(device="cpu").manual_seed(0)
    directions = tuple(_random(t, generator) for t in inputs)

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        return Partition.of(fn(*partition.join(tensors)), is_differentiable)[1]

    eps = max(torch.finfo(real_dtype(t.dtype)).eps for t in inputs)
    _compare(flat, inputs, directions, rtol or eps ** (1 / 3), step or eps ** (1 / 5))
    if order > 1:
        check_derivatives(
            lambda *tensors: torch.func.jvp(flat, tensors, directions)[1], *inputs, order=order - 1, rtol=rtol, step=step
        )


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """A direction in which each number moves in proportion to its size; zeros move as the others do."""
    size = like.abs()
    typical = size.mean() if like.numel() else torch.ones_like(size)
    return _weights(like, generator) * torch.where(size > 0, size, torch.where(typical > 0, typical, 1))


def _weights(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs times sizes of about one: no number counts so little that its mistake would hide."""
    sizes = 0.5 + torch.rand(like.shape, generator=generator, dtype=real_dtype(like.dtype))
    signs = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return (sizes * signs).to(device=like.device, dtype=like.dtype)


def _compare(fn: Callable[..., tuple[Tensor, ...]], inputs: Any, directions: Any, rtol: float, step: float) -> None:
    def at(h: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return fn(*(t + h * d for t, d in zip(inputs, directions, strict=True)))

    _, forward = torch.func.jvp(fn, inputs, directions)
    values, pull = torch.func.vjp(fn, *inputs)
    stencil = zip(at(-2 * step), at(-step), at(step), at(2 * step), strict=True)
    numeric = [(8 * (b - a) - (bb - aa)) / (12 * step) for aa, a, b, bb in stencil]
    for i, (got, expected, value) in enumerate(zip(forward, numeric, values, strict=True)):
        if not value.numel():
            continue
        size = float(expected.abs().max() + value.abs().max())
        _agree(f"forward mode in output {i}", float((got - expected).abs().max()), size, rtol)
        # <v, J d> = <J^T v, d>, for each output by itself: a small one must not hide behind a large one.
        v = _weights(value, torch.Generator(device="cpu").manual_seed(i + 1))
        back = pull(tuple(v if j == i else torch.zeros_like(t) for j, t in enumerate(values)))
        ours, theirs = [v.conj() * got], [b.conj() * d for b, d in zip(back, directions, strict=True)]
        size = sum(float(t.abs().sum()) for t in (*ours, *theirs))
        # Neither side is a difference, so that only rounding parts them.
        eps = torch.finfo(real_dtype(value.dtype)).eps
        _agree(f"reverse mode in output {i}", abs(_real_sum(ours) - _real_sum(theirs)), size, min(rtol, eps**0.5))


def _real_sum(terms: list[Tensor]) -> float:
    return sum(float(t.real.sum() if t.is_complex() else t.sum()) for t in terms)


def _agree(what: str, error: float, size: float, rtol: float) -> None:
    if not error <= rtol * size:
        raise DerivativeError(
            f"the derivative by {what} differs from finite differences (in reverse mode, from forward mode) by "
            f"{error / size if size else error:.3g} "
            f"relative, {rtol:.3g} is allowed. Either the evidence (f, Jacobian) does not belong to the function, or it lets "
            "samples influence each other that event_dim calls independent, or the values are too noisy for this `step`."
        )
