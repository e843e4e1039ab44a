"""Opaque calls: NumPy, SciPy, compiled code, anything, on tensors."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._arrays import OnArrays
from functorch_inverse._attach import attach
from functorch_inverse._call import Given, Problem, Values, solve
from functorch_inverse._capture import Captured
from functorch_inverse._operator import call, register
from functorch_inverse._pullback import Tensors
from functorch_inverse._rules import Optional, poisoned
from functorch_inverse._tree import Partition, Tree, is_differentiable
from functorch_inverse._values import Loop, VmapMethod, check_vmap_method
from functorch_inverse._vectors import Like
from functorch_inverse.errors import NoDerivativeError

__all__ = ["BlackBoxFunction", "black_box"]

_CALLER = "black_box"


@dataclass(frozen=True, eq=False)
class _Unknown:
    """The rule of something that nothing is known about."""

    caller: str
    x_dims: tuple[int, ...] = ()

    def batched(self, theta_is_batched: Sequence[bool], randomness: str) -> "_Unknown":
        return self

    def forget(self) -> None:
        pass

    def vjp(self, y: Tensors, theta: Tensors, x: Sequence[Like], wanted: Sequence[int]) -> Any:
        self._refuse()

    def jvp(self, y: Tensors, theta: Tensors, dx: Tensors, dtheta: Optional) -> Any:
        self._refuse()

    def reads_more(self, y: Tensors, theta: Tensors) -> bool:
        return True

    def reattach(self, y: Tensors, x: Tensors, theta: Tensors, order: int) -> tuple[Tensor, ...]:
        return tuple(y)

    def _refuse(self) -> None:
        raise NoDerivativeError(
            f"`{self.caller}` has no derivative: it calls code that torch cannot see. Say what you know about it: "
            "custom_inverse (its inverse), custom_root (an equation that it solves), custom_fixed_point (a map that leaves its "
            "result as it is), custom_jacobian (its Jacobian) or finite_difference (only its values); or detach the input."
        )


@dataclass(frozen=True, kw_only=True)
class _OpaqueProblem(Problem):
    def attach(self, given: Given, values: Values, captured: Captured) -> tuple[Tensor, ...]:
        """The values, with an error for a derivative."""
        return attach(_Unknown(self.caller), values.leaves, (), given.x_tensors)


@dataclass(frozen=True)
class _Values:
    """A black box on plain tensors, as a function of (args, kwargs)."""

    arrays: OnArrays
    token: str

    def __call__(self, given: tuple[tuple[Tree, ...], dict[str, Tree]]) -> Tree:
        # A graph that is being recorded would have the values as constants, without a word.
        if not _torch.recorded() or not Partition.of(given)[1]:
            return self.arrays(given)
        outputs, _ = call(self.token, given, self.arrays.result is not None)
        return self.arrays.arranged(given, outputs)


class BlackBoxFunction:
    """A function of NumPy arrays as a function of tensors: what `black_box` returns.

    It keeps the name, doc and signature of fn, and pickles and copies where fn does.
    """

    def __init__(self, fn: Callable[..., Any], result: Callable[..., Tree] | None, method: VmapMethod, loop: Loop) -> None:
        self.__wrapped__: Callable[..., Any]
        functools.update_wrapper(self, fn, updated=())
        self.arrays, self.vmap_method, self.loop = OnArrays(fn, result), method, loop
        self._register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()  # a copy is another black box to the compiler

    def _register(self) -> None:
        self.token = register(self)
        g = _Values(self.arrays, self.token)
        self.problem = _OpaqueProblem(caller=_CALLER, g=g, vmap_method=self.vmap_method, loop=self.loop, keeps_dtypes=True)

    def __repr__(self) -> str:
        return f"black_box({getattr(self.__wrapped__, '__name__', self.__wrapped__)})"

    def __call__(self, *args: Tree, **kwargs: Tree) -> Tree:
        """fn(*args, **kwargs)."""
        if torch.compiler.is_dynamo_compiling():
            return _traced(self, args, kwargs)
        return solve(self.problem, (args, kwargs), (), {})


def black_box(
    fn: Callable[..., Any],
    *,
    result: Callable[..., Tree] | None = None,
    vmap_method: VmapMethod = "sequential",
    threads: int | None = None,
    progress: bool = False,
) -> BlackBoxFunction:
    """Call NumPy, SciPy, compiled code, anything, on tensors.

    Tensors (of any device, dtype and strides, in any pytree) become NumPy arrays of their own, which fn may
    change; what fn returns becomes tensors on the device of the first tensor. torch.compile sees one opaque
    operator, with fullgraph=True and inside transforms too. There is no derivative: asking for one raises
    an error that names the ways to give it one.

    Args:
        fn: takes NumPy arrays where tensors arrive, and everything else as it is (bfloat16, which NumPy
            lacks, as float32); returns arrays, numbers, or a pytree of those.
        result: what the output looks like: takes the arguments as tensors without data and returns tensors of
            fn's shapes and dtypes. Without it floating outputs take the first floating input's dtype, others keep
            theirs, and torch.compile assumes one output like the first tensor.
        vmap_method: "sequential", one call of fn for each sample (over all nested vmaps), or "broadcast", one call
            in which every tensor has one more leading dim for each vmap.
        threads: size of a pool for "sequential"; pays where fn releases the GIL.
        progress: show the calls of "sequential" as a bar, by tqdm.

    Raises:
        NoDerivativeError: a derivative was asked for.
        BlackBoxError: fn raised an error in a sequential batch; names the sample.
        StructureError: fn returned another shape or structure than `result` or than for an earlier sample.

    Example:
        >>> import numpy as np
        >>> root = black_box(np.sqrt, vmap_method="broadcast")
        >>> torch.vmap(root)(torch.tensor([1.0, 4.0, 9.0]))
        tensor([1., 2., 3.])
    """
    for name, function in (("fn", fn), ("result", result)):
        if not callable(function) and (name == "fn" or function is not None):
            raise TypeError(f"`{_CALLER}`: `{name}` is {function!r}; a callable is needed.")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"`{_CALLER}`: threads={threads}; choose None, for no pool, or a positive number.")
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(f"`{_CALLER}`: make the black box outside the compiled region, and call it inside.")
    check_vmap_method(_CALLER, vmap_method)
    if vmap_method not in ("sequential", "broadcast"):
        raise ValueError(
            f"`{_CALLER}`: `vmap_method` is {vmap_method!r}, and torch.vmap cannot enter NumPy; choose 'sequential' or "
            "'broadcast'."
        )
    return BlackBoxFunction(fn, result, vmap_method, Loop(threads, progress))


def _traced(box: BlackBoxFunction, args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> Tree:
    outputs, tensors = call(box.token, (args, kwargs), box.arrays.result is not None)
    if _torch.forward_levels():
        # Forward mode through an operator without a formula would be silently zero.
        lost = [t for t in tensors if is_differentiable(t)]
        outputs = [poisoned([t], lost)[0] if is_differentiable(t) else t for t in outputs]
    return box.arrays.arranged((args, kwargs), outputs)
