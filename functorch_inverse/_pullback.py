"""Reverse mode of a function at a point: one evaluation, any number of cotangents.

Two ways with one face. Where no transform is open and nobody differentiates the derivative, the
graph of a single evaluation serves everything. Otherwise torch.func.vjp, which composes.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._chunks import nodes_below, rooted, widest
from functorch_inverse._composed import Function, Tensors, dependent, leveled, own_node, pullback_to_theta
from functorch_inverse._graph import Graph, check_graph, refuse_constant, stand_in_for, walk
from functorch_inverse._hooks import unhooked
from functorch_inverse._in_place import explain, keeping
from functorch_inverse.errors import NoDerivativeError

__all__ = ["Function", "GraphPullback", "Pullback", "Tensors", "in_torch", "seen_by_graph"]


class Pullback:
    """The transposed derivative of f(y, theta), in y and in chosen parts of theta."""

    outputs: tuple[Tensor, ...]
    # A transform opened in a forward pass would fail under saved-tensor hooks.
    in_open_graph: ClassVar[bool] = False

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The outputs, for those outside."""
        return self.outputs

    @staticmethod
    def of(f: Function, y: Tensors, theta: Tensors, wanted: Sequence[int]) -> "Pullback":
        """Evaluate f at a point; `wanted` are the positions of theta to differentiate."""
        # There is no graph in inference mode.
        if _torch.plain() and _torch.can_record():
            return GraphPullback(f, y, theta, wanted)
        # Outside of the transform that they come from, tensors have no graph of their own.
        recorded = _torch.recording() and all(t.requires_grad for t in y)
        return (_RecordedPullback if recorded else _FuncPullback)(f, y, theta, wanted)

    @staticmethod
    def of_values(f: Function, y: Tensors, theta: Tensors) -> "Pullback":
        """Evaluate f where nobody differentiates what comes of it, whatever is open outside."""
        return (_FuncPullback if _torch.transforms_active() else GraphPullback)(f, y, theta, ())

    @staticmethod
    def open(f: Function, y: Tensors) -> "Pullback":
        """Evaluate f in the open graph, so that everything it reads is differentiated as anywhere else."""
        return _FuncPullback(f, y, (), ()) if _torch.transforms_active() else _OpenPullback(f, y)

    def to_y(self, cotangents: Tensors) -> tuple[Tensor, ...]:
        """(df/dy)^T times one set of cotangents."""
        raise NotImplementedError

    def to_theta(self, cotangents: Tensors) -> tuple[Tensor | None, ...]:
        """(df/dtheta)^T times one set of cotangents, for the wanted theta; None, like torch, where f does not read one."""
        raise NotImplementedError

    def push(self, tangents: Tensors) -> tuple[Tensor, ...]:
        """df/dy times one set of tangents, as the transpose of `to_y`."""
        raise NotImplementedError

    def graph(self) -> Graph | None:
        """The graph of an f of one leaf, where it is known and no other is built upon it."""
        return None

    def width(self) -> int | None:
        """How many numbers the largest tensor from y to the outputs holds; None where all rows stay in a graph anyway."""
        return None


class GraphPullback(Pullback):
    """From the graph of one plain evaluation."""

    nodes: Sequence[Any] | None = None  # the graph, where no other is built upon it

    def __init__(self, f: Function, y: Tensors, theta: Tensors, wanted: Sequence[int]) -> None:
        self.y = [_leaf(t).requires_grad_() for t in y]
        leaves = [_leaf(t) for t in theta]
        self.theta = [leaves[i].requires_grad_() for i in wanted]
        self.point = [*self.y, *leaves]
        stand_in_for(self.theta)
        with torch.enable_grad():
            self.outputs = _evaluate(seen_by_graph(f), self.y, leaves)
        self.nodes = check_graph(self.outputs, self.y, self.theta)
        self.transposed: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    @classmethod
    def of_graph(cls, graph: Graph) -> "GraphPullback":
        """From an evaluation that there has been already, of one leaf and with no theta."""
        self = cls.__new__(cls)
        self.y, self.theta, self.point = [graph.y], [], [graph.y]
        self.outputs, self.nodes, self.transposed = (graph.output,), graph.nodes, None
        return self

    def push(self, tangents: Tensors) -> tuple[Tensor, ...]:
        if self.transposed is None:
            self.transposed = self._transposed(self.y)
        zeros, pulled = self.transposed
        return self._run(pulled, zeros, tuple(tangents))

    def _transposed(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Zeros, and as a function of them what they are pulled back to."""
        zeros = tuple([torch.zeros_like(out, requires_grad=True) for out in self.outputs])
        with torch.enable_grad():
            outputs, some = dependent(self.outputs, zeros)
            return zeros, _torch.graph_grad(outputs, tuple(inputs), some, graph=True)

    def push_along(self, places: Sequence[int], tangents: Tensors) -> tuple[Tensor, ...]:
        """The derivative of f in some parts of (*y, *theta), times tangents."""
        zeros, pulled = self._transposed([self.point[i] for i in places])
        pulled, tangents = dependent(pulled, tangents)
        return self._run(pulled, zeros, tangents) if pulled else tuple(torch.zeros_like(t) for t in zeros)

    def pull(self, places: Sequence[int], cotangents: Tensors) -> tuple[Tensor, ...]:
        """Its transpose, times cotangents."""
        cotangents = [c.to(out.dtype) for c, out in zip(cotangents, self.outputs, strict=True)]
        return self._grad([self.point[i] for i in places], cotangents)

    def graph(self) -> Graph | None:
        return None if self.nodes is None else Graph(self.outputs[0], self.y[0], self.nodes)

    def width(self) -> int | None:
        return None if self.nodes is None else widest(self.nodes)

    def mixed(self, c: Tensors, chosen: Sequence[int], along: Tensors, wanted: Sequence[int]) -> tuple[Tensor, ...]:
        """What `mixed` below computes, from this graph."""
        outputs, c = dependent(self.outputs, c)
        inputs = tuple([self.point[i] for i in chosen])
        with torch.enable_grad():
            found = _torch.graph_grad(outputs, inputs, c, graph=True)
        found, along = dependent(found, along)
        ends = tuple(self.point[i] for i in wanted)
        return _torch.graph_grad(found, ends, along) if found else tuple(torch.zeros_like(t) for t in ends)

    def to_y(self, cotangents: Tensors) -> tuple[Tensor, ...]:
        return self._grad(self.y, cotangents)

    def to_theta(self, cotangents: Tensors) -> tuple[Tensor | None, ...]:
        outputs, grads = dependent(self.outputs, cotangents)
        return _torch.graph_grad(outputs, tuple(self.theta), grads, zeros=False)

    def _grad(self, inputs: list[Tensor], cotangents: Tensors) -> tuple[Tensor, ...]:
        outputs, grads = dependent(self.outputs, cotangents)
        return self._run(outputs, tuple(inputs), grads)

    def _run(self, outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _torch.graph_grad(outputs, inputs, grads)


class _RecordedPullback(GraphPullback):
    """The same with create_graph: plain autograd differentiates what is computed, to y and theta."""

    def __init__(self, f: Function, y: Tensors, theta: Tensors, wanted: Sequence[int]) -> None:
        # Nodes of their own, for the derivative of f alone: y depends on theta, too.
        self.y, leaves, self.transposed = [own_node(t) for t in y], list(theta), None
        for i in wanted:
            leaves[i] = own_node(theta[i])
        self.theta = [leaves[i] for i in wanted]
        self.outputs = _evaluate(f, self.y, leaves)
        check_graph(self.outputs, self.y, leaves)

    def to_theta(self, cotangents: Tensors) -> tuple[Tensor, ...]:
        return self._grad(self.theta, cotangents)

    def _run(self, outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, grads, create_graph=True, materialize_grads=True)


class _OpenPullback(GraphPullback):
    """From the graph that is being built: what is computed is itself differentiable, by plain autograd, to all that f reads."""

    in_open_graph: ClassVar[bool] = True

    def __init__(self, f: Function, y: Tensors) -> None:
        # A node of its own, so that what else f reads may depend on y too.
        self.theta, self.transposed = [], None
        with torch.inference_mode(False), torch.enable_grad(), unhooked():
            y = [t.clone() if t.is_inference() else t for t in y]
            self.y = [own_node(t) for t in y]
            self.outputs = _evaluate(f, self.y, ())
        # Where nothing but y itself is tracked, nobody outside waits for a graph.
        tracked = any(t.requires_grad for t in y) or walk(self.outputs, self.y)[1] is not None
        self.closed = not ((tracked and torch.is_grad_enabled()) or _torch.dual_level_open())

    def width(self) -> int | None:
        return widest(walk(self.outputs, self.y)[0]) if self.closed else None

    def _run(self, outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            grads = tuple(c.clone() if c.is_inference() else c for c in grads)
            found = torch.autograd.grad(outputs, inputs, grads, create_graph=True, materialize_grads=True)
        return tuple(t.detach() for t in found) if self.closed else found

    @property
    def values(self) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in self.outputs) if self.closed else self.outputs


class _FuncPullback(Pullback):
    """By torch.func.vjp, differentiable by everything outside."""

    def __init__(self, f: Function, y: Tensors, theta: Tensors, wanted: Sequence[int]) -> None:
        self.roots: list[Any] = []
        with unhooked():  # torch.func.vjp knows no hooks
            self.outputs, self.to_y_ = torch.func.vjp(lambda *y: rooted(_evaluate(f, y, leveled(theta)), self.roots), *y)
        self.f, self.y, self.theta, self.wanted = f, y, theta, wanted
        self.push_: Callable[..., Any] | None = None

    def width(self) -> int | None:
        return widest(nodes_below(self.roots))

    def push(self, tangents: Tensors) -> tuple[Tensor, ...]:
        if self.push_ is None:
            _, self.push_ = torch.func.vjp(lambda *c: self.to_y_(c), *(torch.zeros_like(out) for out in self.outputs))
        return self.push_(tuple(tangents))

    def to_y(self, cotangents: Tensors) -> tuple[Tensor, ...]:
        return self.to_y_(tuple(cotangents))

    def to_theta(self, cotangents: Tensors) -> tuple[Tensor, ...]:
        return pullback_to_theta(self.f, self.y, self.theta, self.wanted, cotangents)


def _leaf(tensor: Tensor) -> Tensor:
    """Its values; those of inference mode can be saved in no graph."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def seen_by_graph(f: Function) -> Function:
    """The same f, if it can be told that its graph will be looked through: then nobody has to watch what it reads."""
    told: Callable[[], Function] | None = getattr(f, "seen_by_graph", None)
    return f if told is None else told()


def _evaluate(f: Function, y: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
    """f at tracked y, or an error if its value no longer depends on y."""
    outputs = keeping(y, in_torch, f, y, theta)
    if not torch.compiler.is_dynamo_compiling() and not any(out.requires_grad for out in outputs):
        refuse_constant()
    return outputs


def in_torch(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args), or an error that says where it went instead."""
    try:
        return f(*args)
    except RuntimeError as error:
        explain(error)
        if "numpy" in str(error) or "storage" in str(error):
            raise NoDerivativeError(
                f"f left torch while it was differentiated ({error}). f must be made of differentiable torch "
                "operations from y to x; only g may use NumPy or other libraries."
            ) from error
        raise
