"""The one assertion of the suite: a transform of the library's function against the same of the closed form."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from problems import ELEMENTWISE, PROBLEMS, RESHAPED, TREE, VECTOR, WHOLE, Problem
from torch import Tensor

RELATIVE_ERROR = 1e-9

# There a wrapped inference tensor is one, too, which no graph can save: most transforms raise torch's error.
inference_tensors_in_transforms = pytest.mark.skipif(torch.__version__ < (2, 12), reason="torch 2.11 cannot save what it wraps")

Function = Callable[..., tuple[Tensor, ...]]
Transform = Callable[[Function, tuple[Tensor, ...]], Any]


def assert_close_to_exact(
    transform: Transform, problem: Problem, inputs: tuple[Tensor, ...] | None = None, function: Function | None = None
) -> None:
    """transform(function, inputs) agrees with transform(closed form, inputs).

    `function` is what custom_inverse makes of the problem unless given.
    """
    inputs = problem.inputs() if inputs is None else inputs
    want = transform(problem.closed_form(), inputs)
    got = transform(problem.custom() if function is None else function, inputs)
    assert_close(got, want)


def assert_close(got: Any, want: Any, tolerance: float = RELATIVE_ERROR) -> None:
    """Equal structure, shapes and dtypes; relative error below the tolerance in each leaf."""
    assert optree.tree_structure(got) == optree.tree_structure(want)
    largest = max((t.abs().max().item() for t in optree.tree_leaves(want) if t.numel()), default=0.0)
    assert largest > 0, "nothing but zeros to compare with: the test would assert nothing"
    for a, b in zip(optree.tree_leaves(got), optree.tree_leaves(want), strict=True):
        # A leaf that is zero in truth is measured against the others.
        scale = (b.abs().max().item() if b.numel() else 0.0) or largest
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def counted() -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """The identity, and how many backward passes went through it."""
    passes = [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            passes[0] += 1
            return g

    return Counted.apply, passes


def loss(h: Function) -> Callable[..., Tensor]:
    """A nonlinear number made of all outputs, with all derivatives."""
    return lambda *inputs: total(h(*inputs))


def total(leaves: tuple[Tensor, ...]) -> Tensor:
    """A nonlinear number made of some tensors, that weighs each element differently."""
    return sum(torch.sin(t * weights(t) + 0.3).sum() for t in leaves)


def weights(t: Tensor) -> Tensor:
    """Different for each element of one sample; the same in each of several."""
    return torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype, device=t.device).reshape(t.shape)


def all_of(inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    """argnums for every input."""
    return tuple(range(len(inputs)))


def tangents(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Directions that point nowhere special."""
    return tuple(torch.cos(weights(t) * (i + 2)) for i, t in enumerate(inputs))


def live(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Leaves that require grad."""
    return tuple(t.detach().clone().requires_grad_() for t in inputs)


# --- which problems, and how their inputs are batched ----------------------------------------------

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
every_batchable_problem = pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.batchable], ids=repr)
# Where a test is about a stack and not about shapes, one of each kind says it all.
some_problems = pytest.mark.parametrize("problem", [ELEMENTWISE, VECTOR, WHOLE, TREE, RESHAPED], ids=repr)


def with_batch(problem: Problem, *batch: int) -> tuple[Tensor, ...]:
    """Inputs where x has leading batch dims of its own and theta is shared."""
    n = problem.x_count
    return (*problem.stacked(*batch)[:n], *problem.inputs()[n:])


MAPPED = ("x", "theta", "both")


def mapped(problem: Problem, over: str, size: int = 2, dim: int = 0) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """(in_dims, inputs) for a vmap over some of the inputs along some dim."""
    n, stacked, single = problem.x_count, problem.stacked(size), problem.inputs()
    chosen = [over == "both" or (i < n) == (over == "x") for i in range(len(single))]
    dims = tuple(dim if c else None for c in chosen)
    return dims, tuple(s.movedim(0, dim) if c else t for s, t, c in zip(stacked, single, chosen, strict=True))
