r"""Products with A^T and A by a straight list of operations, read off the graph of f once.

A backward pass through the graph of f is linear in its cotangent w. One pass with a stand-in for w writes down what
happens to it, with everything that acts element by element gathered into factors s and t,

    w_i = (s w_j) W,        w_i = s w_j + t w_k,        A^T w = s w_i,

so that a product costs what its formula costs, without the autograd engine; the list backwards is the product with A.
It keeps a vector for each factor, as the graph does. Where A^T w = w + R w, which is how contractions are written,
b + w - A^T w = b - R w is even shorter.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._stand_in import DIVISIONS, ELEMENTWISE, StandIn

__all__ = ["Tape", "tape_of_graph"]

_aten = torch.ops.aten
Known: TypeAlias = list[Tensor | None]


class _Term(NamedTuple):
    """s w_i; None is a factor of one."""

    i: int
    s: Tensor | float | None

    @property
    def is_w(self) -> bool:
        return self.i == 0 and self.s is None

    def of(self, known: Known) -> Tensor:
        w = known[self.i]
        assert w is not None
        return w if self.s is None else w * self.s

    def receive(self, known: Known, g: Tensor) -> None:
        """The transpose: w_i gets s g."""
        before = known[self.i]
        if before is None:
            known[self.i] = g if self.s is None else g * self.s
        else:
            known[self.i] = before + g if self.s is None else torch.add(before, g * self.s)


class _Product(NamedTuple):
    """(s w_j) W."""

    term: _Term
    weight: Tensor

    def apply(self, known: Known) -> Tensor:
        return self.term.of(known) @ self.weight

    def added_to(self, other: Tensor, known: Known, sign: int = 1) -> Tensor:
        """Under vmap a product of all columns is faster than one with each."""
        w = self.term.of(known)
        if w.ndim == 2 and not _torch.is_wrapped(w):
            return torch.addmm(other, w, self.weight, alpha=sign)
        return torch.add(other, w @ self.weight, alpha=sign)

    def transposed(self, known: Known, g: Tensor) -> None:
        self.term.receive(known, g @ self.weight.mT)


class _Sum(NamedTuple):
    """s w_j + t w_k."""

    term: _Term
    other: _Term

    def apply(self, known: Known) -> Tensor:
        return self.term.of(known) + self.other.of(known)

    def transposed(self, known: Known, g: Tensor) -> None:
        self.term.receive(known, g)
        self.other.receive(known, g)


class _Update(NamedTuple):
    """(s w_j) W + t w_k in one operation."""

    product: _Product
    other: _Term

    def apply(self, known: Known) -> Tensor:
        return self.product.added_to(self.other.of(known), known)

    def transposed(self, known: Known, g: Tensor) -> None:
        self.product.transposed(known, g)
        self.other.receive(known, g)


class _Shaped(NamedTuple):
    """s w_j in another shape."""

    term: _Term
    before: torch.Size
    after: torch.Size

    def apply(self, known: Known) -> Tensor:
        return self.term.of(known).reshape(self.after)

    def transposed(self, known: Known, g: Tensor) -> None:
        self.term.receive(known, g.reshape(self.before))


_Step: TypeAlias = _Product | _Sum | _Update | _Shaped | None


class Tape(NamedTuple):
    """w -> A^T w of vectors (*batch, rows), and v -> A v; a step that is None is part of a later one."""

    steps: Sequence[_Step]
    result: _Term

    def pull(self, w: Tensor) -> Tensor:
        """A^T w."""
        return self.result.of(self._run(w, self.steps))

    def _run(self, w: Tensor, steps: Sequence[_Step]) -> Known:
        known: Known = [w]
        for step in steps:
            known.append(None if step is None else step.apply(known))
        return known

    @property
    def ahead(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """(b, w) -> b + w - A^T w, where A^T w = w + R w ends in this sum."""
        last = self.steps[-1] if self.steps else None
        first = self.steps[:-1] if any(self.steps[:-1]) else ()
        if self.result.i != len(self.steps) or self.result.s is not None:
            return None
        if isinstance(last, _Update) and last.other.is_w:
            return lambda b, w: last.product.added_to(b, self._run(w, first), -1)
        if isinstance(last, _Sum) and (last.term.is_w or last.other.is_w):
            rest = last.term if last.other.is_w else last.other
            return lambda b, w: b - rest.of(self._run(w, first))
        return None

    def push(self, v: Tensor) -> Tensor:
        """A v."""
        known: Known = [None] * (len(self.steps) + 1)
        self.result.receive(known, v)
        for i, step in reversed(list(enumerate(self.steps, 1))):
            if step is not None and (g := known[i]) is not None:
                known[i] = None
                step.transposed(known, g)
        return torch.zeros_like(v) if known[0] is None else known[0]


def tape_of_graph(output: Tensor, y: Tensor) -> Tape | None:
    """The products with A from the graph of output (*batch, rows) = f(y), y of shape (*batch, columns).

    None where the graph has an operation without a rule here.
    """
    steps: list[Any] = []
    try:
        (last,) = _torch.graph_grad((output,), (y,), (_Recorded(output, output.shape, steps, _Term(0, None)),))
    except Exception:  # a hook may do anything with what it is given
        return None
    return Tape(_fused(steps, last.term), last.term) if isinstance(last, _Recorded) else None


def _fused(steps: list[Any], result: _Term) -> list[_Step]:
    """Products that go into one sum and nowhere else, as a part of it."""
    uses = [result.i, *[part.i for step in steps for part in step if type(part) is _Term]]
    for k, step in enumerate(steps):
        for (i, s), other in (step, step[::-1]) if type(step) is _Sum else ():
            if i and s is None and type(steps[i - 1]) is _Product and uses.count(i) == 1:
                steps[i - 1], steps[k] = None, _Update(steps[i - 1], other)
                break
    return steps


class _Recorded(StandIn):
    """The stand-in for a cotangent; torch sees its shape."""

    steps: list[Any]
    term: _Term

    @staticmethod
    def __new__(cls: Any, like: Tensor, shape: Any, steps: list[Any], term: _Term) -> "_Recorded":
        self = _torch.wrapper(cls, shape, like)
        self.steps, self.term = steps, term
        return self

    def then(self, shape: Any, step: Any) -> "_Recorded":
        """What one more step gives."""
        self.steps.append(step)
        return _Recorded(self, shape, self.steps, _Term(len(self.steps), None))


_ON_NUMBERS: dict[Any, Callable[[float, float], float]] = {
    _aten.mul.Tensor: operator.mul, _aten.mul.Scalar: operator.mul,
    _aten.div.Tensor: operator.truediv, _aten.div.Scalar: operator.truediv,
}  # fmt: skip


def _elementwise(func: Any, args: Any, kwargs: Any) -> _Recorded | None:
    place = 0 if isinstance(args[0], _Recorded) else 1
    w, others = args[place], (*args[:place], *args[place + 1 :])
    if (place and func in DIVISIONS) or not w.ndim:
        return None
    i, s = w.term
    if not isinstance(s, Tensor):
        s = 1.0 if s is None else s
        if func in _ON_NUMBERS and type(others[0]) in (float, int):
            return _Recorded(w, w.shape, w.steps, _Term(i, _ON_NUMBERS[func](s, others[0])))
        s = torch.full((1,) * w.ndim, s, dtype=w.dtype, device=w.device)
    for t in others:
        if isinstance(t, Tensor) and (isinstance(t, _Recorded) or not _fits(t.shape, w.shape)):
            return None
    return _Recorded(w, w.shape, w.steps, _Term(i, func(*others[:place], s, *others[place:], **kwargs)))


def _fits(shape: torch.Size, into: torch.Size) -> bool:
    """Whether a tensor broadcasts to a shape, and not the other way round."""
    ends = zip(reversed(shape), reversed(into), strict=False)
    return shape == into or (len(shape) <= len(into) and all(size in (1, wanted) for size, wanted in ends))


def _same(func: Any, args: Any, kwargs: Any) -> _Recorded:
    (w,) = args
    return _Recorded(w, w.shape, w.steps, w.term)


def _add(func: Any, args: Any, kwargs: Any) -> _Recorded | None:
    a, b = args
    if kwargs or not (isinstance(a, _Recorded) and isinstance(b, _Recorded) and a.shape == b.shape):
        return None
    return a.then(a.shape, _Sum(a.term, b.term))


def _product(func: Any, args: Any, kwargs: Any) -> _Recorded | None:
    w, weight = args
    return None if isinstance(weight, _Recorded) else w.then((len(w), weight.shape[-1]), _Product(w.term, weight))


def _product_with_vector(func: Any, args: Any, kwargs: Any) -> _Recorded | None:
    matrix, w = args
    return None if isinstance(matrix, _Recorded) else w.then((len(matrix),), _Product(w.term, matrix.mT))


def _view(func: Any, args: Any, kwargs: Any) -> _Recorded:
    w, shape = args
    return w.then(shape, _Shaped(w.term, w.shape, torch.Size(shape)))


def _squeezed(func: Any, args: Any, kwargs: Any) -> _Recorded:
    w, dim = args
    return _view(func, (w, func(torch.empty(w.shape, device="meta"), dim).shape), kwargs)


_Recorded.rules = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys((_aten.detach.default, _aten.alias.default, _aten.clone.default), _same),
    _aten.add.Tensor: _add,
    _aten.mm.default: _product,
    _aten.mv.default: _product_with_vector,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.unsqueeze.default: _squeezed,
    _aten.squeeze.dim: _squeezed,
}
