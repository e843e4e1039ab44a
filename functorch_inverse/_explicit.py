r"""The evidence is a Jacobian.

    dy = J dx,    J = dg/dx          jvp: J dx,   vjp: J^T v

Under Dynamo, with x0 = x.detach() and the m-point Gauss-Legendre rule (c_i, w_i) on [0, 1],

    y0 + sum_i w_i J(x0 + c_i (x - x0)) (x - x0)

has the value y0 and the derivatives of g through order 2m: it is the integral of J on the way from x0
to x, and the rule integrates polynomials of degree 2m - 1 exactly. Source: Golub and Welsch,
Calculation of Gauss Quadrature Rules (1969).
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._attach import attach
from functorch_inverse._call import Given, Problem, Values, live
from functorch_inverse._capture import Captured
from functorch_inverse._in_place import keeping
from functorch_inverse._precision import full_precision
from functorch_inverse._pullback import Function, Tensors
from functorch_inverse._quadrature import gauss_legendre
from functorch_inverse._rules import Optional, Pull, move, poisoned, widen
from functorch_inverse._sight import Sight
from functorch_inverse._tree import Partition, Tree, event_dims, flatten, is_differentiable
from functorch_inverse._vectors import Layout, Like, batch_shape, lead
from functorch_inverse.errors import NoDerivativeError, StructureError
from functorch_inverse.operators import vmapped

__all__ = ["JacobianProblem"]


@dataclass(frozen=True, eq=False)
class JacobianRule:
    """The derivative of y = g(x, ...) from its Jacobian.

    `push` maps (dx leaves, theta) to J dx, and `pull` (v leaves, theta) to J^T v. theta begins with
    the values of x in their own shapes.
    """

    push: Function
    pull: Function
    x_dims: tuple[int, ...]

    def batched(self, theta_is_batched: Sequence[bool], randomness: str) -> "JacobianRule":
        """The same rule where everything carries one more leading dim, theta only in parts."""
        push, pull = (vmapped(f, 0, theta_is_batched, randomness) for f in (self.push, self.pull))
        return replace(self, push=push, pull=pull)

    def forget(self) -> None:
        """Nothing is kept."""

    def vjp(self, y: Tensors, theta: Tensors, x: Sequence[Like], wanted: Sequence[int]) -> Pull:
        """J^T v; theta receives nothing, since x stands for itself."""

        def pull(v: Optional) -> tuple[Tensors, Optional]:
            full = [torch.zeros_like(t) if c is None else c for c, t in zip(v, y, strict=True)]
            return self.pull(widen(full), widen(theta)), [None] * len(wanted)

        return pull

    def jvp(self, y: Tensors, theta: Tensors, dx: Tensors, dtheta: Optional) -> tuple[Tensor, ...]:
        """J dx."""
        with full_precision(y[0]):
            return tuple(d.to(t.dtype) for d, t in zip(self.push(widen(dx), widen(theta)), y, strict=True))

    def reads_more(self, y: Tensors, theta: Tensors) -> bool:
        """What `jacobian` closes over is refused or poisoned elsewhere; a trace of it is cheap as it is."""
        return True

    def reattach(self, y: Tensors, x: Tensors, theta: Tensors, order: int) -> tuple[Tensor, ...]:
        """y plus the integral of J from x0 to x."""
        n, steps = len(x), [t - t.detach() for t in x]
        own = [(t.detach(), t - t.detach()) for t in theta[:n]]
        total = [torch.zeros_like(t) for t in y]
        for c, w in gauss_legendre(order):
            there = (*(t0 + c * d for t0, d in own), *theta[n:])
            total = [t + w * d for t, d in zip(total, self.push(steps, there), strict=True)]
        return tuple(move(t, d.to(t.dtype), x) for t, d in zip(y, total, strict=True))


@dataclass(frozen=True, kw_only=True)
class JacobianProblem(Problem):
    """g with its Jacobian with respect to x as evidence."""

    x_alone: ClassVar[bool] = True

    def refuse_lost(self, given: Given) -> None:
        """Only x has a known derivative."""
        closures = Captured.of(Sight(self.g, self.evidence)).tensors
        inside, beside = (Captured.of(Sight(*part.others)).tensors for part in (given.x, given.args))
        places = {
            "an argument outside `argnums`": (*given.arg_tensors, *beside),
            "a module, function or object in `argnums`": inside,
            "what fn closes over": closures,
        }
        for where, tensors in places.items():
            if live(tensors):
                self._refuse(where)

    def _refuse(self, where: str) -> None:
        raise NoDerivativeError(
            f"`{self.caller}`: a derivative flows into {where}, and the Jacobian says nothing about it, so it would be "
            "lost. Add the argument to `argnums` and its part to what `jacobian` returns (closures become arguments "
            "first), or detach it."
        )

    def probe(self, given: Given, values: Values) -> Any:
        """The Jacobian at x."""
        return self.evidence(given.x.join(given.x_tensors), *given.args.join(given.arg_tensors))

    def attach(self, given: Given, values: Values, captured: Captured) -> tuple[Tensor, ...]:
        """The leaves of y with the derivatives that the Jacobian gives them."""
        x_part, x = Partition.of(given.x.join(given.x_tensors), is_differentiable)
        x_dims = event_dims(self.event_dim, x_part, x, self.caller, "event_dim")
        if not values.leaves:
            raise StructureError(
                f"`{self.caller}`: the function returned no floating numbers, and integers have no derivative. Return floating "
                "numbers (in NumPy: .astype(float))."
            )
        y_dims = self._y_dims(given, values)
        batch = batch_shape(values.leaves, y_dims, self.caller, "y")
        out, into = Layout.of(values.leaves, y_dims), Layout.of(x, x_dims)
        _check_holomorphic(self.caller, out, into)
        matrix = _Matrix(self, values.differentiable_part, x_part, given.args, captured, out, into)
        slots = tuple(lead(self.caller, t, d, batch) for t, d in zip(x, x_dims, strict=True))
        rule = JacobianRule(matrix.push, matrix.pull, x_dims)
        leaves = attach(rule, values.leaves, slots, (*x, *given.arg_tensors, *captured.tensors))
        return self._refuse_traced(leaves, rule, slots, (*x, *given.arg_tensors), values)

    def _refuse_traced(self, leaves: Tensors, rule: JacobianRule, x: Tensors, theta: Tensors, values: Values) -> Any:
        """In a trace: an error, or where it cannot be told nan, for derivatives to anything but x."""
        if not torch.compiler.is_dynamo_compiling():
            return leaves
        fixed = (*(t.detach() for t in theta[: len(x)]), *theta[len(x) :])
        lost = [*values.traced, *rule.push([torch.ones_like(t).detach() for t in x], fixed)]
        if _torch.derivative_order() == 1 and any(t.requires_grad for t in lost):
            self._refuse("an argument outside `argnums` or what fn or jacobian closes over")
        return poisoned(leaves, lost)

    def _y_dims(self, given: Given, values: Values) -> tuple[int, ...]:
        prefix, name = self.out_event_dim, "out_event_dim"
        if prefix is None:
            said = flatten(self.event_dim)[0]
            prefix, name = next((d for d in said if d is not None), None), "event_dim"
        dims = event_dims(prefix, values.y, values.tensors, self.caller, name)
        return tuple(d for d, floating in zip(dims, values.differentiable, strict=True) if floating)


def _check_holomorphic(caller: str, out: Layout, into: Layout) -> None:
    if any(t.is_complex for t in into.dtypes) and not all(t.is_complex for t in out.dtypes):
        raise StructureError(
            f"`{caller}`: a real output of complex input is not holomorphic, so no single Jacobian describes it. Give "
            "the function the real and imaginary parts, torch.view_as_real(x)."
        )


@dataclass(frozen=True, eq=False)
class _Matrix:
    """J as blocks, one for each leaf of y and of x, of shape (*batch, *out_event, *in_event)."""

    problem: JacobianProblem
    y: Partition
    x: Partition
    args: Partition
    captured: Captured
    out: Layout
    into: Layout

    def push(self, dx: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        """J dx."""
        jacobian = self._evaluate(theta)
        if _is_operator(jacobian):
            return self._applied(jacobian, "mv", self.x, dx, self.y, self.out)
        blocks = self._blocks(jacobian, dx[0].shape[: dx[0].ndim - len(self.into.shapes[0])])
        return tuple(
            _total(_product(block, out, event, d) for block, event, d in zip(row, self.into.shapes, dx, strict=True))
            for row, out in zip(blocks, self.out.shapes, strict=True)
        )

    def pull(self, v: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        """J^T v, with a complex J conjugated, as torch's gradient convention has it."""
        jacobian = self._evaluate(theta)
        if _is_operator(jacobian):
            conjugated = [t.conj().resolve_conj() for t in v]
            found = self._applied(getattr(jacobian, "T", None), "T.mv", self.y, conjugated, self.x, self.into)
            return tuple([t.conj().resolve_conj() for t in found])
        batch = v[0].shape[: v[0].ndim - len(self.out.shapes[0])]
        columns = zip(*self._blocks(jacobian, batch), strict=True)
        moved = (
            _total(_adjoint(block, out, event, c) for block, out, c in zip(column, self.out.shapes, v, strict=True))
            for column, event in zip(columns, self.into.shapes, strict=True)
        )
        # The real part is what a real x receives from complex y.
        return tuple(t if d.is_complex else t.real for t, d in zip(moved, self.into.dtypes, strict=True))

    def _applied(
        self, operator: Any, name: str, source: Partition, given: Tensors, target: Partition, to: Layout
    ) -> tuple[Tensor, ...]:
        """An operator instead of a matrix, applied to the leaves of one side."""
        caller, events = self.problem.caller, (self.into if to is self.out else self.out).shapes
        if not hasattr(operator, "mv"):
            raise StructureError(f"`{caller}`: the object that `jacobian` returned lacks `{name}`; it needs mv and T.mv.")
        moved = target.pick(operator.mv(source.join(given)), caller, f"what `{name}` of the Jacobian returned")
        batch = given[0].shape[: given[0].ndim - len(events[0])]
        for leaf, event in zip(moved, to.shapes, strict=True):
            arrived = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            if arrived != (*batch, *event):
                raise StructureError(
                    f"`{caller}`: `{name}` of the Jacobian returned {arrived} where {(*batch, *event)} is needed: dx to dy, "
                    "and for the transpose dy to dx, each with the batch dims of y."
                )
        return tuple([leaf.clone() for leaf in moved])  # it may be what was given, which somebody else may change

    def _evaluate(self, theta: Tensors) -> Any:
        n, m = len(self.x.places), len(theta) - self.captured.count
        with self.captured.running(theta[m:], later=True):
            return keeping(theta, self.problem.evidence, self.x.join(theta[:n]), *self.args.join(theta[n:m]))

    def _blocks(self, jacobian: Tree, batch: Sequence[int]) -> list[list[Tensor]]:
        caller = self.problem.caller
        rows = self.y.pick(jacobian, caller, "what `jacobian` returned, as a tree of y's structure,")
        blocks = [self.x.pick(row, caller, "what `jacobian` returned, in each leaf of y,") for row in rows]
        for row, out in zip(blocks, self.out.shapes, strict=True):
            for block, event in zip(row, self.into.shapes, strict=True):
                _check_block(caller, block, tuple(batch), (*out, *event))
        return [list(row) for row in blocks]


def _is_operator(jacobian: Any) -> bool:
    return hasattr(jacobian, "mv") and not isinstance(jacobian, Tensor)


def _total(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _check_block(caller: str, block: Any, batch: tuple[int, ...], events: tuple[int, ...]) -> None:
    arrived = tuple(block.shape) if isinstance(block, Tensor) else type(block).__name__
    if isinstance(block, Tensor):
        own, rest = arrived[: len(arrived) - len(events)], arrived[len(arrived) - len(events) :]
        lined_up = zip(reversed(own), reversed(batch), strict=False)
        if rest == events and len(own) <= len(batch) and all(m in (1, n) for m, n in lined_up):
            return
    raise StructureError(
        f"`{caller}`: `jacobian` returned {arrived} where {(*batch, *events)} is needed: the batch dims of y, its event "
        "dims, then those of x, as torch.func.jacrev orders them (batch dims may be missing or 1). Check `event_dim` and "
        "`out_event_dim`, and that it returns tensors."
    )


def _flat(leaf: Tensor, event: Sequence[int]) -> Tensor:
    """(*batch, *event) to (*batch, n, 1)."""
    return leaf.reshape(*leaf.shape[: leaf.ndim - len(event)], prod(event), 1)


def _product(block: Tensor, out: Sequence[int], event: Sequence[int], d: Tensor) -> Tensor:
    """One block of J times one leaf of dx."""
    if not out and not event:
        return block * d
    matrix = _flat(block, (*out, *event)).unflatten(-2, (prod(out), prod(event))).squeeze(-1)
    moved = matrix @ _flat(d, event).to(matrix.dtype)
    return moved.reshape((*moved.shape[:-2], *out))


def _adjoint(block: Tensor, out: Sequence[int], event: Sequence[int], c: Tensor) -> Tensor:
    """The conjugate transpose of one block of J times one leaf of v."""
    n = len(out) + len(event)
    swapped = block.movedim(tuple(range(-n, -len(event))), tuple(range(-len(out), 0))) if out and event else block
    return _product(swapped.conj(), event, out, c)
