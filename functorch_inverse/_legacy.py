"""The vmap of plain autograd (is_grads_batched, vectorize=True), handed over to torch.vmap.

It asks no Function for its rule, and its tensors hide their values and their graphs: what is computed of them seems to
depend on nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from functorch_inverse import _torch

__all__ = ["through_vmap"]

Rule: TypeAlias = Callable[..., Any]


def through_vmap(rule: Rule) -> Rule:
    """A `backward` or `jvp` of a Function, which meets no other batched tensors than those of torch.vmap."""

    @functools.wraps(rule)
    def ruled(ctx: Any, *given: Any) -> Any:
        for t in given:
            if t is not None and _torch.is_legacy_batched(t):
                return _mapped(functools.partial(rule, ctx), given)
        return rule(ctx, *given)

    return ruled


def _mapped(rule: Rule, given: tuple[Any, ...]) -> Any:
    level = _torch.legacy_level()
    batched = [t is not None and _torch.is_legacy_batched(t) for t in given]
    bare = [_torch.legacy_unbatched(t, level, 1, 0) if flag else t for t, flag in zip(given, batched, strict=True)]
    if any(t is not None and _torch.is_legacy_batched(t) for t in bare):
        raise NotImplementedError(
            "autograd's own batching (is_grads_batched=True, vectorize=True) stands inside of itself. Use torch.func.jacrev or "
            "torch.vmap."
        )
    found: list[Any] = []
    many = True

    def one(*tensors: Any) -> tuple[Any, ...]:
        nonlocal many
        results = rule(*tensors)
        many = isinstance(results, tuple)
        found[:] = results if many else (results,)
        # torch.vmap wants tensors, and at least one.
        return tuple(t for t in (*found, tensors[batched.index(True)]) if t is not None)

    mapped = iter(torch.vmap(one, in_dims=tuple(0 if flag else None for flag in batched))(*bare))
    again = [None if t is None else _torch.legacy_batched(next(mapped).contiguous(), 0, level) for t in found]
    return tuple(again) if many else again[0]
