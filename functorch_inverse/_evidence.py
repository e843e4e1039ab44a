"""What is known of y, as a function of leaves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._call import merge
from functorch_inverse._capture import Captured
from functorch_inverse._changes import refuse_memo
from functorch_inverse._graph import walk
from functorch_inverse._in_place import keeping
from functorch_inverse._tree import Partition, Tree
from functorch_inverse.errors import NoDerivativeError

__all__ = ["Evidence"]

Tensors = Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Evidence:
    """f(y, *args) on leaves: (y leaves, theta leaves) -> leaves, where theta = (args, constants of y, captured).

    `pick` takes what f returned to its leaves. The last `unread` of theta are nothing that f reads. With `by_graph`,
    whoever evaluates it looks through the graph for what f reads besides; `on_copies`, y is a copy that f may change.
    """

    f: Any
    y: Partition
    differentiable: tuple[bool, ...]
    args: Partition
    captured: Captured
    pick: Callable[[Tree], tuple[Tensor, ...]]
    unread: int = 0
    by_graph: bool = False
    on_copies: bool = False

    def seen_by_graph(self) -> "Evidence":
        """The same for an evaluation by plain autograd, after which the whole graph is looked through."""
        return replace(self, by_graph=True)

    def __call__(self, y: Tensors, theta: Tensors) -> tuple[Tensor, ...]:
        theta = theta[: len(theta) - self.unread]
        n = len(self.args.places)
        m = len(theta) - self.captured.count
        everything = self.y.join(merge(self.differentiable, y, theta[n:m]))
        with self.captured.running(theta[m:], (*y, *theta), watched=not self.by_graph, later=True) as seen:
            try:
                kept = theta if self.on_copies else (*y, *theta)
                result = keeping(kept, self.f, everything, *self.args.join(theta[:n]))
            except RuntimeError as error:
                if self.captured.loose and "INTERNAL ASSERT" in str(error):
                    _refuse_hidden_argument(error)
                raise
            leaves = self.pick(result)
            if seen is not None and seen.new:
                _check_memo(seen.new, leaves, theta[m:])
            return leaves


def _check_memo(new: Tensors, leaves: Tensors, captured: Tensors) -> None:
    """A tensor that was not there before g ran may be made of what f does not read otherwise."""
    if captured and (_torch.transforms_active() or walk(leaves, [t for t in captured if t.requires_grad])[2]):
        refuse_memo(new[0])


# torch.func looks at the arguments of a function below everything that can be watched from Python.
def _refuse_hidden_argument(error: RuntimeError) -> NoReturn:
    raise NoDerivativeError(
        "f hands a live tensor that it closes over to a transform of torch.func as an argument, where it cannot be followed. "
        "Hand it over as an argument of g and f, g(x, tensor) with f(y, tensor), or let the inner function close over it, too."
    ) from error
