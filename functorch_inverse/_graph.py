"""The graph of one evaluation of f: what it ends in, and what can be sent through it in place of a cotangent."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._diagonals import Diagonals, diagonals_of_graph
from functorch_inverse._rows import jacobian_of_graph
from functorch_inverse._tape import Tape, tape_of_graph
from functorch_inverse.errors import NoDerivativeError

__all__ = ["Graph", "check_graph", "ends_in_a_stand_in", "refuse_constant", "rows_together", "stand_in_for", "walk"]

# Few rows are fastest one by one, but where they have many numbers; and a small Jacobian as one batch of rows.
_MANY_ROWS, _MANY_NUMBERS, _SMALL = 4, 2**12, 2**13


class Graph(NamedTuple):
    """From y, a leaf, to output = f(y); what it is asked for is None where there is no fast way."""

    output: Tensor
    y: Tensor
    nodes: Sequence[Any]

    def matrix(self, chunk: int) -> Tensor | None:
        """df/dy of vectors (*batch, rows, columns) in memory of its own, so many rows at once."""
        out, rows = self.output, self.output.shape[-1]
        if not rows:
            return None
        if rows == 1:
            return _torch.graph_grad((out,), (self.y,), (torch.ones_like(out),))[0].unsqueeze(-2)
        if rows == chunk and rows * out.numel() < _SMALL and self._known():
            try:
                return rows_together(out, self.y)
            except Exception:  # some operations have no rule for batches, and a hook may do anything with what it is given
                return None
        few = rows < _MANY_ROWS
        worthwhile = not few or out.numel() >= _MANY_NUMBERS
        found = jacobian_of_graph(out, self.y, chunk) if worthwhile and self._known() else None
        if found is not None or not few:
            return found
        units = torch.eye(rows, dtype=out.dtype, device=out.device).unbind()
        return torch.stack([_torch.graph_grad((out,), (self.y,), (e.expand_as(out),))[0] for e in units], -2)

    def tape(self) -> Tape | None:
        """Cheaper products with df/dy of vectors and its transpose."""
        return tape_of_graph(self.output, self.y) if self._known() else None

    def diagonals(self, most: int) -> Diagonals | None:
        """Those of df/dy of one vector, if there are not more than so many."""
        return diagonals_of_graph(self.output, self.y, most) if self._known() else None

    def _known(self) -> bool:
        """Whether stand-ins can go through: a backward written in Python may look at what it is given."""
        return not any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in self.nodes)


def rows_together(output: Tensor, y: Tensor) -> Tensor:
    """df/dy of vectors (*batch, rows) by one pass of a batch of cotangents; an error where an operation takes no batches."""
    *batch, rows = output.shape
    units = torch.eye(rows, dtype=output.dtype, device=output.device).reshape(rows, *[1] * len(batch), rows)
    level = _torch.open_vmap(rows, "error")
    try:
        cotangents = _torch.add_batch_dim(units.expand(rows, *output.shape), 0, level)
        (found,) = _torch.graph_grad((output,), (y,), (cotangents,))
        return _torch.remove_batch_dim(found, level, rows, len(batch)).contiguous()
    finally:
        _torch.close_vmap()


def check_graph(outputs: Sequence[Tensor], y: Sequence[Tensor], theta: Sequence[Tensor] = ()) -> list[Any]:
    """The graph, or NoDerivativeError where it ends in a tensor that nobody differentiates, or nowhere in y."""
    node = outputs[0].grad_fn
    if len(outputs) == 1 and node is not None and _is_of(node, y[0]):
        return [node, node.next_functions[0][0]]
    nodes, foreign, unmet = walk(outputs, (*y, *theta))
    if foreign is not None:
        raise NoDerivativeError(
            f"f read a live tensor of shape {tuple(foreign.shape)} that nobody could see when g was called, so its "
            "derivative would be lost. Hand it over as an argument: g(x, tensor) with f(y, tensor)."
        )
    if unmet.issuperset(map(id, y)) and not _ends_inside(nodes, outputs, y):
        refuse_constant()
    return nodes


def _is_of(node: Any, leaf: Tensor) -> bool:
    """Whether an operation has this leaf as its only input."""
    following = node.next_functions
    return len(following) == 1 and getattr(following[0][0], "variable", None) is leaf


def _ends_inside(nodes: Sequence[Any], outputs: Sequence[Tensor], y: Sequence[Tensor]) -> bool:
    """Whether a graph ends in one of y that is no leaf, or an output is one of y."""
    ends = {t.grad_fn for t in y} - {None}
    following = (end for node in nodes for end, _ in node.next_functions)
    return any(out is t for out in outputs for t in y) or not ends.isdisjoint(following)


def refuse_constant() -> NoReturn:
    """NoDerivativeError for an f that does not use y."""
    raise NoDerivativeError(
        "f(y, *args), or the residual, does not depend on y in a way that torch can see: it detaches y, rounds it to "
        "integers, or does not use it. It must be made of differentiable torch operations from y to what it returns."
    )


def walk(outputs: Sequence[Tensor], known: Sequence[Tensor]) -> tuple[list[Any], Tensor | None, set[int]]:
    """The nodes of a graph, a leaf that is not known, if there is one, and the ids of the known tensors that are no leaves."""
    unmet, seen = set(map(id, known)), {None, *[t.grad_fn for t in known]}
    foreign: Tensor | None = None
    queue: list[Any] = [out.grad_fn for out in outputs if out.grad_fn not in seen]
    for node in queue:  # grows while it is walked
        following_ones = node.next_functions
        for following, _ in following_ones:
            if following not in seen:
                seen.add(following)
                queue.append(following)
        if not following_ones and hasattr(node, "variable"):
            if id(node.variable) in unmet:
                unmet.discard(id(node.variable))
            else:
                foreign = node.variable
    return queue, foreign, unmet


# Leaves with the values of tensors that f reads. Whoever keeps a graph that ends in one keeps the derivative from its owner.
_STAND_INS: "weakref.WeakValueDictionary[int, Tensor]" = weakref.WeakValueDictionary()


def stand_in_for(tensors: Sequence[Tensor]) -> None:
    """Remember leaves that were made of other tensors."""
    for tensor in tensors:
        _STAND_INS[id(tensor)] = tensor


def ends_in_a_stand_in(output: Tensor) -> bool:
    """Whether the graph of a tensor does."""
    if not _STAND_INS:
        return False
    ends = (node.variable for node in walk((output,), ())[0] if hasattr(node, "variable"))
    return any(_STAND_INS.get(id(end)) is end for end in ends)
