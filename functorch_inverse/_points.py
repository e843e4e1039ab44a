"""The values of a function at many points beside one."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._pullback import Tensors
from functorch_inverse.errors import StructureError

__all__ = ["given_step", "unit_vectors", "values_at", "with_center"]


def unit_vectors(x: Tensor, event: Sequence[int]) -> Tensor:
    """(n, 1, ..., *event), one for each number of a sample."""
    n = prod(event)
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    return eye.reshape(n, *(1,) * (x.ndim - len(event)), *event)


def values_at(
    inner: Any, x: Tensors, i: int, offsets: list[Tensor], moves: tuple[Any, ...], *, center: bool
) -> tuple[list[list[Tensor]], list[Tensor] | None]:
    """The values at x + c * offset, for each set of offsets (moves, n, *value), and those at x; one vmap for all."""
    kind = torch.complex128 if moves == (1j,) else x[i].dtype
    c = torch.tensor(moves, device=x[i].device, dtype=kind)
    points = [x[i] + c.reshape(-1, *(1,) * offset.ndim) * offset for offset in offsets]
    rows = [p.flatten(0, 1) for p in points] + [x[i].unsqueeze(0)] * center

    def value(point: Tensor) -> tuple[Tensor, ...]:
        return tuple(inner((*x[:i], point, *x[i + 1 :])))

    found = [t.to(_WIDE.get(t.dtype, t.dtype)) for t in torch.vmap(value)(torch.cat(rows))]
    parts = [t.split([len(row) for row in rows]) for t in found]
    sets = [[part[k].unflatten(0, p.shape[:2]) for part in parts] for k, p in enumerate(points)]
    return sets, [part[-1][0] for part in parts] if center else None


_WIDE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64) | {torch.complex64: torch.complex128}


def with_center(values: Tensor, center: Tensor, at: int) -> Tensor:
    row = center.to(values.dtype).expand(values.shape[1:]).unsqueeze(0)
    return torch.cat([values[:at], row, values[at:]])


def given_step(caller: str, step: float | Tensor, x: Tensor) -> Tensor:
    """A step that the user asks for, as the numbers beside x can make it."""
    h = torch.as_tensor(step, dtype=x.dtype, device=x.device)
    try:
        h = h.expand(x.shape)
    except RuntimeError as error:
        raise StructureError(
            f"`{caller}`: `step` of shape {tuple(h.shape)} does not broadcast against x, {tuple(x.shape)}."
        ) from error
    made = (x + h) - x
    if _torch.can_inspect(h) and not (h > 0).all():
        raise ValueError(f"`{caller}`: `step` must be positive everywhere; it goes down to {float(h.min()):.3g}.")
    if _torch.can_inspect(made) and (made == 0).any():
        raise ValueError(
            f"`{caller}`: `step` is lost beside x = {float(x[made == 0][0]):.3g} in {x.dtype}, where x + step == x. Take a "
            "larger one, or step=None, which is relative to each number."
        )
    return made
