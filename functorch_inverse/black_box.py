"""Opaque calls: NumPy, SciPy, compiled code, anything, on tensors."""

import ast
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._attach import attach
from functorch_inverse._call import Given, Problem, Values, solve
from functorch_inverse._capture import Captured
from functorch_inverse._pullback import Tensors
from functorch_inverse._rules import Optional, undefined
from functorch_inverse._tree import Partition, Tree, flatten, is_differentiable, unflatten
from functorch_inverse._values import BlackBox, Loop, Outcome, VmapMethod, check_vmap_method, is_array
from functorch_inverse._vectors import Layout, same_precision
from functorch_inverse.errors import FunctorchInverseError, NoDerivativeError, StructureError

__all__ = ["BlackBoxFunction", "black_box"]

_CALLER = "black_box"


@dataclass(frozen=True, eq=False)
class _Unknown:
    """The rule of something that nothing is known about."""

    caller: str
    x_dims: tuple[int, ...] = ()

    def batched(self, theta_is_batched: Sequence[bool], randomness: str) -> "_Unknown":
        return self

    def vjp(self, y: Tensors, theta: Tensors, x: Layout, v: Optional, wanted: Sequence[int]) -> Any:
        self._refuse()

    def jvp(self, y: Tensors, theta: Tensors, dx: Tensors, dtheta: Optional) -> Any:
        self._refuse()

    def reattach(self, y: Tensors, x: Tensors, theta: Tensors, order: int) -> Tensors:
        return y

    def _refuse(self) -> None:
        raise NoDerivativeError(
            f"`{self.caller}` has no derivative: it calls code that torch cannot see. Say what you know about it: "
            "custom_inverse (an inverse f), custom_root (a residual), custom_fixed_point (a map that leaves y as it is), "
            "custom_jacobian (its Jacobian) or finite_difference (only its values); or detach the input."
        )


@dataclass(frozen=True, kw_only=True)
class _OpaqueProblem(Problem):
    def attach(self, given: Given, values: Values, captured: Captured) -> tuple[Tensor, ...]:
        """The values, with an error for a derivative."""
        return attach(_Unknown(self.caller), values.leaves, (), given.x_tensors)


class BlackBoxFunction:
    """A function of NumPy arrays as a function of tensors: what `black_box` returns.

    It keeps the name, doc and signature of fn, and pickles and copies where fn does.
    """

    def __init__(self, fn: Callable[..., Any], result: Callable[..., Tree] | None, method: VmapMethod, loop: Loop) -> None:
        functools.update_wrapper(self, fn, updated=())
        self.problem = _OpaqueProblem(caller=_CALLER, g=_OnArrays(fn, result), vmap_method=method, loop=loop, keeps_dtypes=True)
        self._register()

    def _register(self) -> None:
        self.token = next(_TOKENS)
        _REGISTERED[self.token] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()  # a copy is another black box to the compiler

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
    if not callable(fn):
        raise TypeError(f"`{_CALLER}`: `fn` is {fn!r}; a callable is needed.")
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(f"`{_CALLER}`: make the black box outside the compiled region, and call it inside.")
    check_vmap_method(_CALLER, vmap_method)
    if vmap_method not in ("sequential", "broadcast"):
        raise ValueError(
            f"`{_CALLER}`: `vmap_method` is {vmap_method!r}, and torch.vmap cannot enter NumPy; choose 'sequential' or "
            "'broadcast'."
        )
    return BlackBoxFunction(fn, result, vmap_method, Loop(threads, progress))


# --- tensors to arrays and back -------------------------------------------------------------------


@dataclass(frozen=True)
class _OnArrays:
    """fn on plain tensors, as a function of (args, kwargs)."""

    fn: Callable[..., Any]
    result: Callable[..., Tree] | None

    def __call__(self, call: tuple[tuple[Tree, ...], dict[str, Tree]]) -> Tree:
        part, tensors = Partition.of(call)
        args, kwargs = part.join([_to_array(t) for t in tensors])
        output = self.fn(*args, **kwargs)
        if self.result is None:
            return _to_tensors(output, tensors)
        return _as_expected(output, self.expected(part, tensors), tensors)

    def expected(self, part: Partition, tensors: Sequence[Tensor]) -> Tree:
        """What `result` says of the output, as tensors without data."""
        assert self.result is not None
        with _torch.fake_mode():
            args, kwargs = part.join([torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors])
            return self.result(*args, **kwargs)


def _to_array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def _to_tensors(output: Tree, inputs: Sequence[Tensor]) -> Tree:
    leaves, spec = flatten(output)
    device = inputs[0].device if inputs else None
    like = next((t.dtype for t in inputs if is_differentiable(t)), None)
    return unflatten(spec, [_to_tensor(leaf, device, like) for leaf in leaves])


def _to_tensor(leaf: Any, device: Any, like: torch.dtype | None) -> Any:
    if not (is_array(leaf) or isinstance(leaf, bool | int | float | complex)):
        return leaf
    tensor = torch.as_tensor(leaf, device=device)
    return tensor.to(same_precision(tensor.dtype, like)) if like and is_differentiable(tensor) else tensor


def _as_expected(output: Tree, expected: Tree, inputs: Sequence[Tensor]) -> Tree:
    part, wanted = Partition.of(expected)
    got = part.pick(output, _CALLER, "what fn returned, compared with `result`,")
    device = inputs[0].device if inputs else None
    tensors = [torch.as_tensor(leaf, device=device) for leaf in got]
    for tensor, like in zip(tensors, wanted, strict=True):
        if tensor.shape != like.shape:
            raise StructureError(
                f"`{_CALLER}`: fn returned shape {tuple(tensor.shape)} where `result` says {tuple(like.shape)}. Make "
                "`result` return a tensor of the shape that fn returns for these arguments."
            )
    return part.join([t.to(like.dtype) for t, like in zip(tensors, wanted, strict=True)])


# --- under torch.compile --------------------------------------------------------------------------
# One operator for all black boxes: the graph holds a number and the structure of the call as text. It has
# no autograd formula, which would break it inside transforms.

_TOKENS = itertools.count()
_REGISTERED: "weakref.WeakValueDictionary[int, BlackBoxFunction]" = weakref.WeakValueDictionary()


def _traced(box: BlackBoxFunction, args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> Tree:
    tensors: list[Tensor] = []
    structure = _encode((args, kwargs), tensors)
    outputs = _operator(tensors, box.token, structure, "")
    if _torch.forward_levels():
        # Forward mode through an operator without a formula would be silently zero.
        live, every = [t for t in tensors if is_differentiable(t)], torch.ones((), dtype=torch.bool)
        outputs = [t + undefined(live, every.to(t.device)).to(t.dtype) if is_differentiable(t) else t for t in outputs]
    if box.problem.g.result is None:
        return outputs[0]
    return Partition.of(box.problem.g.result(*args, **kwargs))[0].join(outputs)


def _encode(tree: Tree, tensors: list[Tensor]) -> str:
    """A tree as a Python literal, with ... for each tensor."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return "..."
    if isinstance(tree, tuple | list):
        inner = "".join([_encode(part, tensors) + "," for part in tree])
        return f"({inner})" if isinstance(tree, tuple) else f"[{inner}]"
    if isinstance(tree, dict):
        return "{" + "".join([f"{key!r}:{_encode(part, tensors)}," for key, part in tree.items()]) + "}"
    if tree is None or isinstance(tree, bool | int | float | str):
        return repr(tree)
    raise StructureError(
        f"`{_CALLER}`: torch.compile cannot hand {type(tree).__name__} to the function. Pass tensors, numbers, strings, "
        "None, and tuples, lists and dicts of those; keep other things in fn itself."
    )


def _decode(structure: str, tensors: Sequence[Tensor]) -> Any:
    rest = iter(tensors)

    def fill(part: Any) -> Any:
        if part is ...:
            return next(rest)
        if isinstance(part, dict):
            return {key: fill(value) for key, value in part.items()}
        return type(part)(map(fill, part)) if isinstance(part, tuple | list) else part

    return fill(ast.literal_eval(structure))


def _levels(text: str, tensors: Sequence[Tensor]) -> tuple[tuple[tuple[bool, ...], int], ...]:
    """Which tensors have which vmapped dim, outermost first, from text such as "10,11"."""
    flags = [tuple(flag == "1" for flag in level) for level in text.split(",") if level]
    used, levels = [0] * len(tensors), []
    for level in flags:
        size = next(t.shape[n] for t, n, flag in zip(tensors, used, level, strict=True) if flag)
        levels.append((level, size))
        used = [n + flag for n, flag in zip(used, level, strict=True)]
    return tuple(levels)


def _found(token: int) -> BlackBoxFunction:
    try:
        return _REGISTERED[token]
    except KeyError:
        raise FunctorchInverseError(
            f"`{_CALLER}`: the compiled code calls a black box that is gone. Keep the object that black_box returned."
        ) from None


@torch.library.custom_op("functorch_inverse::black_box", mutates_args=())
def _operator(tensors: list[Tensor], token: int, structure: str, levels: str) -> list[Tensor]:
    problem = _found(token).problem
    call = BlackBox(
        caller=_CALLER,
        call=lambda given: problem.g(_decode(structure, given)),
        captured=Captured(),
        has_aux=False,
        method="sequential",
        x_only=False,
        x_places=(),
        batch_dims=(),
        like=None,
        outcome=Outcome(),
        loop=problem.loop,
        levels=_levels(levels, tensors),
    )
    outputs = list(call(*tensors))
    if problem.g.result is None:
        _check_assumed(outputs, _like_first(tensors, call.levels))
    return outputs


def _like_first(tensors: Sequence[Tensor], levels: Any) -> Tensor:
    """What is assumed of the output: like one sample of the first tensor, with all vmapped dims."""
    first = tensors[0]
    own = first.shape[sum(batched[0] for batched, _ in levels) :]
    return first.new_empty((*(size for _, size in levels), *own))


def _check_assumed(outputs: list[Tensor], assumed: Tensor) -> None:
    got = [(tuple(t.shape), t.dtype) for t in outputs]
    if got != [(tuple(assumed.shape), assumed.dtype)]:
        raise StructureError(
            f"`{_CALLER}`: under torch.compile fn returned {got}, and without `result` one output like the first tensor "
            f"is assumed, {(tuple(assumed.shape), assumed.dtype)}. Pass result=lambda *args: ... returning tensors of "
            "fn's shapes and dtypes."
        )


@_operator.register_fake
def _operator_fake(tensors: list[Tensor], token: int, structure: str, levels: str) -> list[Tensor]:
    result, sizes = _found(token).problem.g.result, _levels(levels, tensors)
    if result is None:
        return [_like_first(tensors, sizes)]
    used = [sum(batched[i] for batched, _ in sizes) for i in range(len(tensors))]
    args, kwargs = _decode(structure, [t.new_empty(t.shape[n:]) for t, n in zip(tensors, used, strict=True)])
    leaves = Partition.of(result(*args, **kwargs))[1]
    return [t.new_empty((*(size for _, size in sizes), *t.shape)) for t in leaves]


@_operator.register_vmap
def _operator_vmap(
    info: Any, in_dims: tuple[Any, ...], tensors: list[Tensor], token: int, structure: str, levels: str
) -> tuple[list[Tensor], list[int]]:
    dims = in_dims[0]
    moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    if _found(token).problem.vmap_method == "broadcast":
        moved = [t.expand(info.batch_size, *t.shape) if d is None else t for t, d in zip(moved, dims, strict=True)]
    else:
        levels = "".join("0" if d is None else "1" for d in dims) + "," + levels
    outputs = _operator(moved, token, structure, levels)
    return outputs, [0] * len(outputs)
