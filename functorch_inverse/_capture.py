"""Live tensors and modules that a function reaches without being given them, made explicit.

`torch.autograd.Function` gives a tensor that f closes over a gradient of zero, silently. So what f and g
can reach becomes an input of its own, and f reads what the input holds:

1. A walk finds the modules and tensors (`Reach`). Where it met something that it cannot look into, f is
   evaluated once under a mode that watches which tensors it reads (`watch`).
2. Parameters and buffers are swapped in their modules, other tensors by identity in every torch function
   that is called (`Captured.running`).
3. What was missed all the same, or exchanged between forward and backward, raises an error: its
   derivative would be lost.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functorch_inverse import _torch
from functorch_inverse._changes import Changes, Frozen, Refusing, changes, layers, refuse_memo, tensors_in, version
from functorch_inverse._graph import ends_in_a_stand_in
from functorch_inverse._reach import Reach, Slots, slots_of
from functorch_inverse._sight import Sight
from functorch_inverse._swap import swapped, unswapped
from functorch_inverse._transforms import has_history, is_live, is_open
from functorch_inverse.errors import NoDerivativeError

__all__ = ["Captured", "standing_for", "watch"]


class _Active(threading.local):
    def __init__(self) -> None:
        self.tables: list[dict[int, Tensor]] = []


_ACTIVE = _Active()


def standing_for(tensor: Tensor) -> Tensor:
    """What a tensor means here: inside the f or g of a rule, a captured one is what the rule put in its place."""
    if torch.compiler.is_dynamo_compiling() or not _ACTIVE.tables:
        return tensor
    return next((t[id(tensor)] for t in reversed(_ACTIVE.tables) if id(tensor) in t), tensor)


@dataclass(frozen=True, eq=False)
class Captured:
    """Tensors that functions read by themselves, as parameters that can be given other values.

    Parameters and buffers are known by their place in a module, because their value changes under
    functional_call; other tensors by identity. `reach` is everything that was there, with the
    versions of the tensors, and `frozen` are the parameters and buffers that have no derivative, to notice later
    what was exchanged or changed in place.
    """

    sight: Sight | None = None
    slots: tuple[Slots, ...] = ()
    loose: tuple[Tensor, ...] = ()
    reach: Reach | None = None
    versions: tuple[int, ...] = ()
    frozen: tuple[Frozen, ...] = ()
    # The present values, in the order in which `running` takes them.
    tensors: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, sight: Sight, wanted: Callable[[Tensor], bool] = is_open, reach: Reach | None = None) -> "Captured":
        """The wanted tensors that some functions reach; `reach` where that is known."""
        reach = reach or sight.reach()
        if not (reach.modules or reach.tensors):
            return cls(sight, reach=reach)
        with unswapped(reach.modules):
            held = slots_of(reach.modules)
        known = {id(t) for t, _ in held}
        flags = [wanted(t) for t, _ in held]
        state = list(itertools.compress(held, flags))
        frozen = tuple(Frozen(slots, t, version(t)) for (t, slots), flag in zip(held, flags, strict=True) if not flag)

        def explicit(tensor: Tensor) -> bool:
            meant = standing_for(tensor)
            return id(tensor) not in known and (meant is not tensor or wanted(meant))

        loose = tuple(t for t in reach.tensors if explicit(t))
        if any(map(has_history, loose)):
            sight.forget()
        return cls(
            sight=sight,
            slots=tuple(slots for _, slots in state),
            loose=loose,
            reach=reach,
            versions=tuple(map(version, reach.tensors)),
            frozen=frozen,
            tensors=(*(t for t, _ in state), *map(standing_for, loose)),
        )

    def including(self, tensors: Sequence[Tensor]) -> "Captured":
        """With more loose tensors."""
        known = {id(t) for t in (*self.tensors, *self.loose)}
        new = tuple(t for t in tensors if id(t) not in known)
        return replace(self, loose=(*self.loose, *new), tensors=(*self.tensors, *map(standing_for, new)))

    @property
    def complete(self) -> bool:
        """Whether the walk saw everything."""
        return self.reach is None or self.reach.complete

    @property
    def count(self) -> int:
        """How many tensors were captured."""
        return len(self.tensors)

    def running(
        self, values: Sequence[Tensor], given: Sequence[Tensor] = (), *, watched: bool = True, later: bool = False
    ) -> AbstractContextManager[Refusing | None]:
        """Let every function called inside read these values instead.

        If `watched`, what it reads from below the level of these values and of what it was given is an error. `later`, after
        the forward pass, so is what has changed since then; what is new and read comes back.
        """
        if torch.compiler.is_dynamo_compiling():  # f runs in the open graph
            return nullcontext()
        watched = watched and _torch.transforms_active()
        level = min((_torch.level(t) for t in (*values, *given)), default=-1) if watched else -1
        found = self.changes() if later else None
        return self._running(values, level, found) if values or level > 0 or found else nullcontext()

    @contextmanager
    def _running(self, values: Sequence[Tensor], level: int, found: Changes | None) -> Iterator[Refusing | None]:
        n, (_, held, loose) = len(self.slots), found or Changes({}, [], [])
        with ExitStack() as stack:
            if n or held:
                places = (*self.slots, *[slots for slots, _ in held])
                stack.enter_context(swapped(places, (*values[:n], *[tensor for _, tensor in held])))
            known = [*zip(self.loose, values[n:], strict=True), *loose, *self._both_ways(values)]
            if known or level > 0:
                stack.enter_context(_Substitute(known, level))
            yield stack.enter_context(Refusing(found.suspects)) if found and found.suspects else None

    def _both_ways(self, values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Parameters of modules that stand elsewhere, too, where they are read by identity; and their values."""
        elsewhere = set(map(id, self.reach.tensors)) if self.slots and self.reach else ()
        return [(t, value) for t, value, _ in zip(self.tensors, values, self.slots, strict=False) if id(t) in elsewhere]

    def changes(self) -> Changes | None:
        """What f must not read, since it is not as it was when this was captured."""
        if self.sight is None or self.reach is None or torch.compiler.is_dynamo_compiling():
            return None
        reach = self.sight.reach()
        if any(map(has_history, reach.tensors)):
            self.sight.forget()
        as_it_was = reach is self.reach and not (self.loose or self.frozen or any(t.requires_grad for t in reach.tensors))
        if as_it_was and tuple(map(version, reach.tensors)) == self.versions:
            return None
        with unswapped(reach.modules):
            found = changes(self.reach, reach, self.versions, (*self.loose, *self.tensors), self.frozen)
        return found if any(found) else None

    def after_g(self) -> "Captured":
        """With the buffers as g has left them: it may run the same modules, which keep their statistics."""
        return replace(self, frozen=tuple([kept.now() for kept in self.frozen])) if self.frozen else self

    @property
    def doubtful(self) -> bool:
        """Whether a tensor with a graph stands somewhere in an object: f may not read it, and no graph should grow by it."""
        return any(has_history(t) and not self._is_named(t) for t in self.loose)

    def _is_named(self, tensor: Tensor) -> bool:
        return self.reach is not None and self.reach.named.holds(tensor)

    def reading(self, tensors: Sequence[Tensor]) -> "Captured":
        """Without those which are not among these, that f does read."""
        read, n = {key for t in tensors for key in layers(t)}, len(self.slots)
        kept = [k for k, t in enumerate(self.loose) if id(t) in read or not has_history(t) or self._is_named(t)]
        own, loose = [self.tensors[n + k] for k in kept], tuple([self.loose[k] for k in kept])
        reach, versions = self.reach, self.versions
        if reach is not None:  # nor does the graph of this call keep them, and with them their own graphs
            dropped = set(map(id, self.loose)) - set(map(id, loose))
            stay = [id(t) not in dropped for t in reach.tensors]
            versions = tuple(itertools.compress(versions, stay))
            tensors = list(itertools.compress(reach.tensors, stay))
            reach = replace(reach, tensors=tensors, trail=None, named=reach.named.without(dropped))
        return replace(self, loose=loose, tensors=(*self.tensors[:n], *own), reach=reach, versions=versions)

    def refuse_memos(self) -> None:
        """An error for a graph that ends in what stood in for a tensor: it would keep the derivative."""
        for tensor in filter(has_history, self.loose):
            if _torch.can_inspect(tensor) and ends_in_a_stand_in(tensor):
                refuse_memo(tensor)

    def captures_nothing_still(self) -> bool:
        """Whether what was reached has neither been changed in place nor got a derivative."""
        reached = self.reach.tensors if self.reach else ()
        return not reached or (not any(map(is_open, reached)) and tuple(map(version, reached)) == self.versions)


class _Substitute(TorchFunctionMode):
    """Hand other tensors to every torch function in place of the captured ones.

    All that f was given is wrapped at some level or above; an open tensor from below came in another way.
    """

    def __init__(self, known: Sequence[tuple[Tensor, Tensor]], level: int) -> None:
        super().__init__()
        self.table = {id(t): value for t, value in known}
        self.level = level
        self.made: dict[int, Tensor] = {}

    def __enter__(self) -> "_Substitute":
        _ACTIVE.tables.append(self.table)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _ACTIVE.tables.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.table:
            args, kwargs = [self._meant(arg) for arg in args], {key: self._meant(arg) for key, arg in (kwargs or {}).items()}
        if self.level <= 0 or func.__name__ == "__get__":
            return func(*args, **(kwargs or {}))
        for tensor in tensors_in(args, kwargs):
            # -2 is a level that f itself opened and closed again.
            if -2 < _torch.level(tensor) < self.level and id(tensor) not in self.made and is_live(tensor):
                raise NoDerivativeError(
                    f"f read a live tensor of shape {tuple(tensor.shape)} that nobody could see when g was called, so its "
                    "derivative would be lost. Hand it over as an argument: g(x, tensor) with f(y, tensor)."
                )
        result = func(*args, **(kwargs or {}))
        # What f computes from constants may be wrapped at any open level.
        self.made.update((id(t), t) for t in tensors_in(result) if _torch.level(t) < self.level)
        return result

    def _meant(self, arg: Any) -> Any:
        if isinstance(arg, Tensor | float | int | str):
            return self.table.get(id(arg), arg)
        return _torch.tree_map(lambda leaf: self.table.get(id(leaf), leaf), arg)


class _Watch(TorchFunctionMode):
    """Collect the open tensors that a function reads."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.made = {id(t): t for t in known}
        self.read: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in(args, kwargs):
            if id(tensor) not in self.made and is_open(tensor):
                self.read[id(tensor)] = tensor
        result = func(*args, **(kwargs or {}))
        self.made.update((id(t), t) for t in tensors_in(result))
        return result


def watch(function: Callable[[], Any], known: Iterable[Tensor]) -> list[Tensor]:
    """Evaluate a function once and tell which open tensors it read besides the known ones."""
    with torch.no_grad(), _Watch(known) as seen:
        function()
    return list(seen.read.values())
