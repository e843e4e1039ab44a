"""What is kept from one call to the next: what functions reach, and what was found out about them."""

from typing import Any

from functorch_inverse._reach import Opaque, Reach

__all__ = ["Kept", "Sight"]


class Sight(Opaque):
    """What some functions reach, walked again only where something may have changed."""

    def __init__(self, *functions: Any) -> None:
        self.functions = functions
        self._last: Reach | None = None

    def __reduce__(self) -> Any:
        return Sight, self.functions

    def reach(self) -> Reach:
        """The same object as long as nothing was exchanged."""
        last = self._last
        if last is None or last.trail is None or not last.trail.holds():
            self._last = last = Reach.of(*self.functions)
        return last

    def forget(self) -> None:
        """Keep nothing of the user's alive."""
        self._last = None


class Kept(Opaque, dict[Any, Any]):
    """What was found out in earlier calls; a copy begins anew."""

    def __reduce__(self) -> Any:
        return Kept, ()
