"""How a derivative is attached to values: the only module that knows how torch does it.

Eager: one node of the graph, which saves y as its output and does nothing until a derivative is asked
for. Under Dynamo, which drops the rules of a Function inside a transform, as an expression in the open graph
that leaves the values as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from functorch_inverse import _torch
from functorch_inverse._composed import Tensors
from functorch_inverse._levels import Dims, announced, followed, run
from functorch_inverse._precision import full_precision
from functorch_inverse._rules import Rule
from functorch_inverse._transforms import alive, in_front
from functorch_inverse._vectors import Like

__all__ = ["attach", "attach_plainly", "pulled_back"]

Optional: TypeAlias = Sequence[Tensor | None]


def attach(rule: Rule, y: Tensors, x: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
    """The values y with the derivatives of `rule` to x and theta."""
    if torch.compiler.is_dynamo_compiling():
        return _traced(rule, y, x, theta)
    found: tuple[Tensor, ...] = announced(_attached, (*y, *x, *theta), rule, len(y), len(x))
    return found


def _attached(tensors: Tensors, rule: Rule, n_y: int, n_x: int) -> tuple[Tensor, ...]:
    return run(_Attachment(rule, n_y, n_x), tensors)


def attach_plainly(rule: Rule, y: Tensor, x: Tensor, theta: Tensors) -> Tensor:
    """The same for one tensor, where it is known that nothing but plain autograd takes part."""
    return followed(_Attachment(rule, 1, 1), None, (), tuple([alive(t) for t in (y, x, *theta)]))[0]


def _traced(rule: Rule, y: Tensors, x: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
    if _torch.traced_transforms() or rule.reads_more(y, theta):
        return rule.reattach(y, x, theta, _torch.derivative_order())
    if not any(t.requires_grad for t in (*x, *theta)):
        return tuple(y)
    # With no transform open, AOTAutograd differentiates once, and keeps what only a backward needs out of the forward.
    wanted = tuple(i for i, t in enumerate(theta) if t.requires_grad)
    return _Once.apply(rule, len(y), len(x), wanted, *y, *x, *theta)


class _Once(Function):
    """The first derivative alone."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, n_y: int, n_x: int, wanted: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        after = n_y + n_x
        ctx.rule, ctx.n_y, ctx.n_x, ctx.wanted = rule, n_y, n_x, wanted
        # Dynamo hands on what is saved as it is when the region ends, and nobody asks for its version: what is read must be
        # out of reach of operations in place. A compiler that fuses copies nothing.
        y, theta = tuple([t.detach() for t in tensors[:n_y]]), tuple([t.detach().clone() for t in tensors[after:]])
        ctx.save_for_backward(*y, *tensors[n_y:after], *theta)
        return tuple([t.clone() for t in y])

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        y, x, theta = saved[: ctx.n_y], saved[ctx.n_y : ctx.n_y + ctx.n_x], saved[ctx.n_y + ctx.n_x :]
        with full_precision(y[0]):
            u, received = ctx.rule.vjp(y, theta, x, list(ctx.wanted))(v)
        grads: list[Tensor | None] = [None] * len(theta)
        for i, t in zip(ctx.wanted, received, strict=True):
            grads[i] = t
        own = [t.to(like.dtype) for t, like in zip(u, x, strict=True)]
        return (None, None, None, None, *[None] * ctx.n_y, *own, *grads)


@dataclass(frozen=True, eq=False)
class _Attachment:
    """y with its derivatives, of tensors (*y, *x, *theta)."""

    rule: Rule
    n_y: int
    n_x: int
    has_derivative: ClassVar[bool] = True

    def itself(self, tensors: Tensors) -> None:
        """The rule knows the derivative."""

    def values(self, tensors: Tensors) -> Tensors:
        return tuple([t.detach() for t in tensors[: self.n_y]])

    def mapped(self, dims: Dims, size: int, randomness: str, tensors: Tensors) -> tuple[Tensors, Dims]:
        n = self.n_y + self.n_x
        led = [
            in_front(t, d) if d is not None else t.expand(size, *t.shape) if i < n else t
            for i, (t, d) in enumerate(zip(tensors, dims, strict=True))
        ]
        batched = self.rule.batched([d is not None for d in dims[n:]], randomness)
        return run(_Attachment(batched, self.n_y, self.n_x), led), (0,) * self.n_y

    def keep(self, ctx: Any, tensors: Tensors, output: Tensors) -> Tensors:
        """y and theta."""
        first, after = self.n_y, self.n_y + self.n_x
        ctx.rule, ctx.n_y, ctx.n_x, ctx.kept = self.rule, self.n_y, self.n_x, (None, None)
        ctx.x = [Like(t.shape, t.dtype) for t in tensors[first:after]]
        # y is saved as an output: its own dependence on x and theta gives the higher orders.
        return (*output, *tensors[after:])

    def backward(self, ctx: Any, needed: Sequence[bool], v: Optional) -> Optional:
        """What all tensors receive."""
        return pulled_back(ctx, ctx.saved_tensors, v)[-len(needed) :]

    def jvp(self, ctx: Any, saved: Tensors, tangents: Optional) -> Optional:
        moved = tangents[self.n_y :]
        if all(t is None for t in moved):
            return (None,) * self.n_y
        y, theta = saved[: self.n_y], saved[self.n_y :]
        sizes = zip(moved, ctx.x, strict=False)
        dx = [y[0].new_zeros(shape, dtype=dtype) if t is None else t for t, (shape, dtype) in sizes]
        return self.rule.jvp(y, theta, dx, moved[self.n_x :])


def pulled_back(ctx: Any, saved: Tensors, v: Optional) -> tuple[Tensor | None, ...]:
    """What all inputs receive; saved tensors may be read only once."""
    needed, first = ctx.needs_input_grad, 3 + ctx.n_y
    nothing: list[Tensor | None] = [None] * len(needed)
    after = first + ctx.n_x
    y, theta = saved[: ctx.n_y], saved[ctx.n_y :]
    wanted = [i for i, flag in enumerate(needed[after:]) if flag]
    plain = _torch.plain()
    with full_precision(y[0]):
        before = ctx.kept  # once: another thread may be at it
        pull = before[1] if plain and before[0] == wanted else ctx.rule.vjp(y, theta, ctx.x, wanted)
        u, received = pull(v)
    # The factors serve the next backward of this node, and go with the graph.
    kept = _torch.graph_is_kept()
    ctx.kept = (wanted, pull) if plain and kept else (None, None)
    if not kept:
        ctx.rule.forget()
    for i, (t, like) in enumerate(zip(u, ctx.x, strict=True), first):
        if needed[i]:
            nothing[i] = t.to(like.dtype)
    for i, t in zip(wanted, received, strict=True):
        nothing[after + i] = t
    return tuple(nothing)
