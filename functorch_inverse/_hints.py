"""What g should return in place of what it did."""

import dataclasses
from typing import Any

from functorch_inverse._tree import flatten

__all__ = ["instead_of"]

# Where SciPy's results keep the solution: minimize and root; root_scalar; solve_ivp.
_SOLUTIONS = ("x", "root", "y")


def instead_of(result: Any) -> str:
    """A sentence for an error, of a result without any tensor or array among its leaves."""
    if result is None:
        return "Is its `return` missing? It must return the value y."
    if isinstance(result, int):
        return "An integer has no derivative: return float(y), or a floating tensor or array."
    if type(result) in (list, tuple, dict):
        leaves = flatten(result)[0]
        if leaves and all(isinstance(leaf, int | float | complex) for leaf in leaves):
            return "Numbers in a container are not put together: return torch.tensor([...]) or np.array([...])."
    elif dataclasses.is_dataclass(result):
        return (
            "A dataclass is a pytree once it is registered: decorate it with optree.dataclasses.dataclass(namespace='') in "
            "place of dataclasses.dataclass, or return a dict."
        )
    for name in _SOLUTIONS:
        if hasattr(result, name):
            return f"The solution is one of its attributes, it seems: return `result.{name}`."
    return "Return the value y as a tensor, a floating NumPy array, or a pytree of those."
