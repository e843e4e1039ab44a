"""How `invert` finds the values of an inverse; none of them knows anything about derivatives of the result.

Samples are solved for together. What has converged is left alone, a failure names its samples.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_inverse import _anderson, _chandrupatla, _newton
from functorch_inverse._equation import Equation, Point
from functorch_inverse._iterate import OnFailure
from functorch_inverse._status import JUMPS, NO_BRACKET, NOT_MONOTONE, STUCK, UNDEFINED, Options
from functorch_inverse.errors import StructureError

__all__ = ["Chandrupatla", "FixedPoint", "Newton"]


def _check(inverter: Any) -> None:
    """ValueError for options that make no sense."""
    name = type(inverter).__name__
    if inverter.on_failure not in ("raise", "nan", "warn"):
        raise ValueError(f"`{name}`: `on_failure` is {inverter.on_failure!r}; choose 'raise', 'nan' or 'warn'.")
    if isinstance(inverter.max_steps, bool) or not isinstance(inverter.max_steps, int) or inverter.max_steps < 0:
        raise ValueError(f"`{name}`: `max_steps` is {inverter.max_steps!r}; choose 0, 1, 2, ...")
    for option in ("rtol", "atol"):
        value = getattr(inverter, option)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"`{name}`: `{option}` is {value!r}; choose None, for one that suits the dtype, or a number >= 0.")


@dataclass(frozen=True)
class Newton:
    r"""Newton's method, damped by a line search, for f of any kind.

    .. math:: y \leftarrow y - t A^{-1} (f(y) - x), \qquad A = \partial f / \partial y

    A comes from reverse mode, one row for each number of a sample. Where it is singular, a regularised step
    is taken instead. The error is squared in every step near the solution.

    Args:
        rtol: a sample has converged where :math:`|f(y) - x| \le atol + rtol\, (|x| + |A| |y|)` in each equation; one
            more step follows, which squares the error. None: eps^0.75 of the dtype, 2e-12 in float64.
        atol: the absolute part. None: 0.
        max_steps: how many points are tried after the first, the shortened steps of the line search included.
        on_failure: "raise" a `NotConvergedError` that names the samples; give "nan" for those samples; "warn", and give
            the best values found.
        progress: show the samples that have converged as a bar, by tqdm.

    Where values cannot be looked at (torch.compile, fx tracing, CUDA graph capture) 16 steps are unrolled, or
    max_steps if that is less, and what has not converged by then is nan.

    Example:
        >>> from functorch_inverse import invert
        >>> cube_root = invert(lambda y: y**3, inverter=Newton(max_steps=100), event_dim=1)
        >>> torch.allclose(cube_root(torch.tensor([8.0, -27.0])), torch.tensor([2.0, -3.0]))
        True

    Source: Dennis and Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear Equations (1996),
    sections 5.2 and 6.3.
    """

    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 50
    on_failure: OnFailure = "raise"
    progress: bool = False

    method: ClassVar[str] = "newton"
    needs_jacobian: ClassVar[bool] = True
    traced_steps: ClassVar[int] = 16

    def __post_init__(self) -> None:
        _check(self)

    def options(self, eps: float) -> Options:
        """The tolerances in some precision."""
        return Options(eps, eps**0.75 if self.rtol is None else self.rtol, self.atol or 0.0)

    def start(self, equation: Equation, y: Tensor, point: Point) -> _newton.NewtonState:
        """The first state."""
        return _newton.arrived(equation.x, y, point.residual, point.jacobian(), torch.zeros_like(y), self.options(equation.eps))

    def advice(self, status: int) -> str:
        """What to try after a failure."""
        if status == UNDEFINED:
            return "Pass an `init` where f is defined."
        if status == STUCK:
            return (
                "The Jacobian is singular there, there is no solution, or f has larger rounding errors than rtol and atol "
                "allow for: pass another `init`, or larger tolerances."
            )
        return "Pass an `init` closer to the solution, or larger max_steps."


@dataclass(frozen=True)
class Chandrupatla:
    r"""A bracket and its reduction, for f that is monotone in each number (``event_dim=0``).

    A bracket is found by steps of growing length from init, inside the bounds; then inverse quadratic interpolation
    is used where it is safe, and bisection elsewhere: at most 3 steps more than bisection for any f (in a bracket that
    spans orders of magnitude, bisection of the exponent comes first), and around ten in all for smooth ones. f may rise
    or fall; the values need no derivative of it.

    Args:
        lower, upper: the bounds of f's domain; None: none. The bounds themselves are tried last.
        rtol: a sample has converged where y is known to within atol + rtol |y|. None: 2 eps of the dtype.
        atol: the absolute part. None: 0, or, where f(y) = x holds to rounding already, eps^1.5 of the width of the first
            bracket, 1 at most. Where f changes by so much inside a bracket of that width that it may jump, the search
            goes on, and ends in an error where it does.
        max_steps: how many points are tried after the first.
        on_failure: "raise" a `BracketError` (f(y) - x has one sign everywhere) or `NotConvergedError` (f is not monotone,
            jumps over x, or the steps were used up) that names the samples; "nan"; "warn".
        progress: as for `Newton`.

    Where values cannot be looked at, 40 steps are unrolled; what has not converged by then is nan.

    Example:
        >>> from functorch_inverse import invert
        >>> logit = invert(torch.sigmoid, inverter=Chandrupatla(), event_dim=0)
        >>> p = torch.tensor([0.1, 0.6, 0.99])
        >>> torch.allclose(logit(p), torch.logit(p), rtol=1e-4)
        True

    Source: Chandrupatla, A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear function
    without using derivatives (1997).
    """

    lower: float | None = None
    upper: float | None = None
    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100
    on_failure: OnFailure = "raise"
    progress: bool = False

    method: ClassVar[str] = "chandrupatla"
    needs_jacobian: ClassVar[bool] = False
    traced_steps: ClassVar[int] = 40

    def __post_init__(self) -> None:
        _check(self)
        for name, none in (("lower", -math.inf), ("upper", math.inf)):
            if getattr(self, name) == none:
                object.__setattr__(self, name, None)
            elif not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(
                    f"`Chandrupatla`: {name}={getattr(self, name)}; choose None, for no bound, or a finite number."
                )
        if self.lower is not None and self.upper is not None and not self.lower < self.upper:
            raise ValueError(f"`Chandrupatla`: lower={self.lower} and upper={self.upper}; `lower` must be below `upper`.")

    def options(self, eps: float) -> Options:
        """The tolerances in some precision."""
        return Options(eps, 2 * eps if self.rtol is None else self.rtol, -1.0 if self.atol is None else self.atol)

    def start(self, equation: Equation, y: Tensor, point: Point) -> _chandrupatla.BracketState:
        """The first state."""
        if equation.inputs.size != 1 or any(d.is_complex for d in (*equation.inputs.dtypes, *equation.outputs.dtypes)):
            raise StructureError(
                f"`{equation.caller}`: Chandrupatla() finds one real number a sample, here a sample has "
                f"{equation.inputs.size}. Set event_dim=0 for an elementwise f, or use Newton()."
            )
        y = y.contiguous()
        inside = _chandrupatla.inside(y, self.lower, self.upper)
        if not torch.compiler.is_dynamo_compiling() and inside is y:
            return _chandrupatla.started(y, point.residual, self.lower, self.upper)
        return _chandrupatla.started(inside, equation.at(inside, graph=False).residual, self.lower, self.upper)

    def advice(self, status: int) -> str:
        """What to try after a failure."""
        if status == NO_BRACKET:
            return "There is no solution inside the bounds; check x, `lower` and `upper`."
        if status == NOT_MONOTONE:
            return "Use Newton() with an `init`, or bounds between which f is monotone."
        if status == UNDEFINED:
            return "State f's domain by Chandrupatla(lower, upper), or pass an `init` inside it."
        if status == JUMPS:
            return (
                "No y has f(y) = x there, and on_failure='warn' gives the place of the jump; if rounding in f is that coarse, "
                "a larger atol allows for it."
            )
        return "Raise max_steps, or rtol."


@dataclass(frozen=True)
class FixedPoint:
    r"""The iteration of y + x - f(y), accelerated, for f close to the identity: residual flows.

    .. math:: y \leftarrow y + x - f(y)

    converges where f - identity is a contraction. Anderson's acceleration uses the last `memory` changes; a step that
    does not make the residual smaller is replaced by a plain one. One evaluation of f a step, no Jacobian.

    Args:
        rtol: a sample has converged where :math:`|f(y) - x| \le atol + rtol\, (|x| + |y|)` in each number, or where all of
            f(y) - x is rounding of the largest. None: eps^0.75 of the dtype, 2e-12 in float64.
        atol: the absolute part. None: 0.
        max_steps: how many points are tried after the first.
        memory: how many changes are kept; 0 is the plain iteration.
        on_failure, progress: as for `Newton`.

    Where values cannot be looked at, 32 steps are unrolled; what has not converged by then is nan.

    Example:
        >>> from functorch_inverse import invert
        >>> g = invert(lambda y: y + 0.5 * y.sin(), inverter=FixedPoint(), event_dim=1)
        >>> x = torch.tensor([1.0, 2.0])
        >>> torch.allclose(g(x) + 0.5 * g(x).sin(), x)
        True

    Source: Walker and Ni, Anderson Acceleration for Fixed-Point Iterations (2011); Behrmann et al., Invertible
    Residual Networks (2019).
    """

    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100
    memory: int = 5
    on_failure: OnFailure = "raise"
    progress: bool = False

    method: ClassVar[str] = "anderson"
    needs_jacobian: ClassVar[bool] = False
    traced_steps: ClassVar[int] = 32

    def __post_init__(self) -> None:
        _check(self)
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 0:
            raise ValueError(f"`FixedPoint`: `memory` is {self.memory!r}; choose 0, 1, 2, ...")

    def options(self, eps: float) -> Options:
        """The tolerances in some precision."""
        return Options(eps, eps**0.75 if self.rtol is None else self.rtol, self.atol or 0.0)

    def start(self, equation: Equation, y: Tensor, point: Point) -> _anderson.AndersonState:
        """The first state."""
        if equation.inputs.shapes != equation.outputs.shapes:
            raise StructureError(
                f"`{equation.caller}`: FixedPoint() iterates y + x - f(y), so y must have the shapes of x; one sample of y has "
                f"{list(equation.inputs.shapes)}, one of x {list(equation.outputs.shapes)}. Use Newton()."
            )
        return _anderson.started(equation.x, y, point.residual, self.memory, self.options(equation.eps))

    def advice(self, status: int) -> str:
        """What to try after a failure."""
        return "f - identity must be a contraction for this iteration; make it one, or use Newton()."
