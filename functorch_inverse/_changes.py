"""What f reads by itself, and what has changed there between the forward pass and the derivative.

A bound method reaches all of its object, where others count steps, keep a warm start or normalise batches. So a change is
a suspicion, and an error only where f reads what was changed: the derivative would be that of another f, or lost.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from torch import Tensor
from torch.overrides import TorchFunctionMode

from functorch_inverse import _torch
from functorch_inverse._reach import Reach, Slots, slots_of
from functorch_inverse._transforms import is_open
from functorch_inverse.errors import NoDerivativeError

__all__ = ["Changes", "Frozen", "Refusing", "changes", "layers", "refuse_memo", "tensors_in", "version"]


# What came to a place where there was nothing.
NEW = "new"


class Frozen(NamedTuple):
    """A parameter or buffer without derivative: its places, and how often it had been changed in place."""

    slots: Slots
    tensor: Tensor
    version: int

    @property
    def moved(self) -> bool:
        """Whether something else has its place now, or it has a derivative."""
        return self.tensor.requires_grad or any(_held(space, name) is not self.tensor for space, name in self.slots)

    def now(self) -> "Frozen":
        """As it is at present."""
        tensor = _held(*self.slots[0])
        return self if tensor is None else Frozen(self.slots, tensor, version(tensor))


def _held(space: Any, name: str) -> Tensor | None:
    # Those of a scripted module are no dicts.
    return space[name] if name in space else None  # noqa: SIM401


class Changes(NamedTuple):
    """What f must not read, with what happened to it; and what has to be as it was: in modules, and for other tensors."""

    suspects: dict[int, tuple[Tensor, str]]
    held: Sequence[tuple[Slots, Tensor]]
    loose: Sequence[tuple[Tensor, Tensor]]


def changes(then: Reach, now: Reach, versions: Sequence[int], known: Sequence[Tensor], frozen: Sequence[Frozen]) -> Changes:
    """Between two walks, the first with the `versions` of its tensors; changes of `known` ones show by themselves."""
    name = None if now is then else then.named.exchanged(now.named)
    if name is not None:
        _refuse(f"`{name}`", "exchanged", f" In a loop, a default keeps what it is: `lambda y, {name}={name}: ...`.")
    suspects: dict[int, tuple[Tensor, str]] = {}
    if now is not then:
        before, after = ({id(t): t for t in (*reach.modules, *reach.tensors)} for reach in (then, now))
        new = [found for key, found in after.items() if key not in before]
        lost = not before.keys() <= after.keys()
        tensors = [found for found in new if isinstance(found, Tensor)]
        if lost:  # what is new may stand in the place of it
            tensors += [t for t, _ in slots_of(found for found in new if not isinstance(found, Tensor))]
        # One that came to others may be a warm start, or what was computed of parameters and lacks their derivatives.
        suspects.update((id(t), (t, "exchanged" if lost or is_open(t) else NEW)) for t in tensors)
    captured = set(map(id, known))
    seen = [*zip(then.tensors, versions, strict=True), *[(t, number) for _, t, number in frozen]]
    suspects.update((id(t), (t, "changed in place")) for t, number in seen if id(t) not in captured and version(t) != number)
    # What had no derivative then has none now.
    held = [(kept.slots, _closed(kept.tensor, suspects)) for kept in frozen if kept.moved]
    opened = [t for t in then.tensors if t.requires_grad and id(t) not in captured]
    return Changes(suspects, held, [(t, _closed(t, suspects)) for t in opened])


def _closed(tensor: Tensor, suspects: dict[int, tuple[Tensor, str]]) -> Tensor:
    """A tensor without derivative, no less suspect than it was."""
    if not tensor.requires_grad:
        return tensor
    closed = tensor.detach()
    if id(tensor) in suspects:
        suspects[id(closed)] = (closed, suspects[id(tensor)][1])
    return closed


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, where torch counts it."""
    return 0 if tensor.is_inference() or _torch.is_wrapped(tensor) else tensor._version


class Refusing(TorchFunctionMode):
    """NoDerivativeError where a function inside reads a suspect; what is merely new and read is collected."""

    def __init__(self, suspects: dict[int, tuple[Tensor, str]]) -> None:
        super().__init__()
        self.suspects = suspects
        self.new: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = None
        if func.__name__ == "__get__":
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, Tensor):  # a shape or a dtype is no value
                return result
        for tensor in tensors_in(args, kwargs):
            what = next((self.suspects[key][1] for key in layers(tensor) if key in self.suspects), None)
            if what is NEW:
                self.new.append(tensor)
            elif what is not None:
                _refuse(f"a tensor of shape {tuple(tensor.shape)}", what)
        return func(*args, **(kwargs or {})) if result is None else result


def layers(tensor: Tensor) -> Iterator[int]:
    """The ids of a tensor and of what transforms inside of f have wrapped in it."""
    yield id(tensor)
    while _torch.is_wrapped(tensor):
        tensor = _torch.unwrapped(tensor)
        yield id(tensor)


def tensors_in(*trees: Any) -> Iterator[Tensor]:
    """The tensors in some trees."""
    return (leaf for leaf in _torch.tree_leaves(trees) if isinstance(leaf, Tensor))


def refuse_memo(tensor: Tensor) -> NoReturn:
    """NoDerivativeError for what a function computed while it ran, and kept."""
    raise NoDerivativeError(
        f"f reads a tensor of shape {tuple(tensor.shape)} that an earlier run of g or f has kept (a cache, an attribute). It "
        "may come of parameters, whose derivatives it would lack, since others stood in for them. Compute it in each run, or "
        "before, and hand it over as an argument: g(x, tensor) with f(y, tensor)."
    )


def _refuse(which: str, what: str, more: str = "") -> NoReturn:
    raise NoDerivativeError(
        f"{which} that f closes over was {what} between the forward pass and the derivative, which would then be wrong or "
        "lost. Leave what f reads as it is until then; better, hand it over as an argument: g(x, tensor) with f(y, tensor)."
        f"{more}"
    )
