"""Every private name of torch that this package touches, and what would break without it.

A new torch that renames one of them breaks here, at import, and says so.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    # Which transforms are open, and what a wrapped tensor hides: decides what is live.
    from torch._C import DisableTorchFunction as no_functions
    from torch._C import (
        DispatchKey,
        _are_functorch_transforms_active,
        _disabled_torch_function_impl,
        _dispatch_tls_is_dispatch_key_excluded,
        _functorch,
        _get_dispatch_mode,
        _is_fwd_grad_enabled,
        _is_torch_function_mode_enabled,
        _push_on_torch_dispatch_stack,
        _set_grad_enabled,
        _TorchDispatchModeKey,
        _vmapmode_decrement_nesting,
        _vmapmode_increment_nesting,
    )

    # Who watches operations below autograd, in this thread.
    from torch._C import _len_torch_dispatch_stack as dispatch_modes_open
    from torch._C import _pop_torch_dispatch_stack as pop_dispatch_mode
    from torch._C import _storage_Use_Count as storage_holders  # how many tensors, at least, share memory

    # Whether another backward pass through the same graph may come.
    from torch._C._autograd import _get_current_graph_task_keep_graph as graph_is_kept

    # Saved-tensor hooks, which belong to the user's graph, not to one that is made and used up inside.
    from torch._C._autograd import _pop_saved_tensors_default_hooks as pop_hooks
    from torch._C._autograd import _push_saved_tensors_default_hooks as push_hooks
    from torch._C._autograd import _top_saved_tensors_default_hooks as top_hooks

    # What Dynamo does with a frame of some code, and with those inside it.
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

    # The level of torch.func.jvp: nested forward mode is wrong without the mend below.
    from torch._functorch import eager_transforms
    from torch._functorch.pyfunctorch import coerce_cinterpreter as interpreter_in_python

    # Who records operations above autograd.
    from torch._ops import _get_dispatch_mode_pre_dispatch as _above_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode  # tensors without data, for what the user says of a result

    # forward_ad.unpack_dual, of which half the time goes into looking for torch.export.
    from torch._VF import _make_dual, _unpack_dual

    # The base of autograd.Function which knows of no transforms, and what it lacks.
    from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction

    # A small backward pass without the checks of torch.autograd.grad, which cost as much again.
    from torch.autograd.variable import Variable

    # The weights that parametrize.cached() keeps.
    from torch.nn.utils import parametrize

    # The containers in which torch functions take and return tensors.
    from torch.utils._pytree import tree_leaves, tree_map

    _PROXY, _FAKE = _TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FAKE
    no_torch_function: Any = _disabled_torch_function_impl
    set_grad_enabled: Any = _set_grad_enabled  # a context manager costs five times as much
    push_dispatch_mode: Any = _push_on_torch_dispatch_stack  # takes anything that dispatches
    _run_backward: Any = Variable._execution_engine.run_backward
    is_wrapped, wrap_for_grad = _functorch.is_functorch_wrapped_tensor, _functorch._wrap_for_grad
    add_batch_dim, remove_batch_dim = _functorch._add_batch_dim, _functorch._remove_batch_dim
    # The transform that wraps a tensor, counted from the outermost; -1 for a plain one, -2 where it is closed.
    level, current_level = _functorch.maybe_get_level, _functorch.maybe_current_level
    unwrapped, batch_dim = _functorch.get_unwrapped, _functorch.maybe_get_bdim
    # The open transforms, of which the innermost can be taken off for a while.
    peek_transform, pop_transform, push_transform = (
        _functorch.peek_interpreter_stack, _functorch.pop_dynamic_layer_stack, _functorch.push_dynamic_layer_stack,
    )  # fmt: skip
    open_vmap, close_vmap = _functorch._vmap_increment_nesting, _functorch._vmap_decrement_nesting
    RandomnessType = _functorch.RandomnessType
    TransformType, VmapInterpreter = _functorch.TransformType, _functorch.CVmapInterpreterPtr
    GradInterpreter, JvpInterpreter = _functorch.CGradInterpreterPtr, _functorch.CJvpInterpreterPtr
    # A Function that speaks for one level alone may be applied while transforms are open; torch does so itself.
    single_level_allowed = _functorch.get_single_level_autograd_function_allowed
    allow_single_level = _functorch.set_single_level_autograd_function_allowed
    forward_mode = forward_ad._set_fwd_grad_enabled
    for_compiled_autograd = {"_compiled_autograd_key": staticmethod(torch.autograd.Function._compiled_autograd_key)}

    # The vmap of is_grads_batched and torch.autograd.functional, which does not ask a Function for its rule.
    is_legacy_batched = _functorch.is_legacy_batchedtensor
    legacy_batched, legacy_unbatched = torch._add_batch_dim, torch._remove_batch_dim

    _ = (eager_transforms.JVP_NESTING, forward_ad._current_level, parametrize._cache)  # their absence shows at import
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"functorch_inverse supports torch >= 2.11; torch {torch.__version__} differs in a private "
        f"name that it relies on ({error}). Install another torch, or report this version."
    ) from error

Tensors: TypeAlias = tuple[Tensor, ...]
F = TypeVar("F")

__all__ = [
    "GradInterpreter", "JvpInterpreter", "RandomnessType", "SingleLevelFunction", "TransformType", "VmapInterpreter",
    "add_batch_dim", "allow_single_level", "batch_dim", "called_eagerly", "can_inspect", "can_record",
    "close_vmap", "current_level", "derivative_order", "dispatch_modes_open", "dual", "dual_level_open",
    "exchange_cached_weights", "fake_mode",
    "for_compiled_autograd", "forward_levels", "forward_mode", "forward_mode_again", "function_mode_active",
    "graph_grad", "graph_is_kept", "in_jvp", "interpreter_in_python", "is_legacy_batched", "is_recorded", "is_tracked",
    "is_wrapped", "legacy_batched", "legacy_level", "legacy_unbatched", "level", "mark", "no_functions", "no_torch_function",
    "open_vmap", "peek_transform", "plain", "pop_dispatch_mode", "pop_hooks", "pop_transform", "primal", "push_dispatch_mode",
    "push_hooks", "push_transform", "recorded", "recorded_above_autograd", "recording", "remove_batch_dim", "set_grad_enabled",
    "shapes_into", "single_level_allowed", "storage_holders", "tangent", "top_hooks", "traced_derivatives_possible",
    "traced_transforms", "transforms_active", "tree_leaves", "tree_map", "undisturbed", "unwrapped", "wrap_for_grad", "wrapper",
]  # fmt: skip

_NO_CONTEXT = nullcontext()


def transforms_active() -> bool:
    """Whether any torch.func transform is open."""
    return torch.compiler.is_dynamo_compiling() or _are_functorch_transforms_active()


def dual_level_open() -> bool:
    """Whether tangents may flow, of torch.func.jvp or a plain dual level."""
    return forward_ad._current_level >= 0


def plain() -> bool:
    """Whether nobody differentiates or transforms what is computed now."""
    return not (transforms_active() or torch.is_grad_enabled() or (dual_level_open() and _is_fwd_grad_enabled()))


def recording() -> bool:
    """Whether plain autograd, and nothing else, differentiates what is computed now."""
    return torch.is_grad_enabled() and not (transforms_active() or dual_level_open())


def undisturbed() -> bool:
    """Whether nothing but plain autograd takes part in what is computed now."""
    return not (transforms_active() or dual_level_open() or _is_torch_function_mode_enabled())


def function_mode_active() -> bool:
    """Whether a TorchFunctionMode watches what is called; never so while Dynamo traces."""
    return not torch.compiler.is_dynamo_compiling() and _is_torch_function_mode_enabled()


def is_recorded(tensor: Tensor) -> bool:
    """Whether reverse mode follows a tensor at its own level."""
    return tensor.requires_grad and torch.is_grad_enabled()


def is_tracked(tensor: Tensor) -> bool:
    """Whether reverse mode, or a tangent, follows a tensor at its own level."""
    if is_recorded(tensor):
        return True
    possible = forward_ad._current_level >= 0 and _is_fwd_grad_enabled()
    return possible and _unpack_dual(tensor, level=0)[1] is not None


def in_jvp() -> bool:
    """Whether torch.func.jvp is open: then no plain tensor has a tangent, since no plain dual level can be open as well."""
    return eager_transforms.JVP_NESTING > 0


def graph_grad(outputs: Tensors, inputs: Tensors, cotangents: Tensors, *, graph: bool = False, zeros: bool = True) -> Any:
    """torch.autograd.grad of a graph that stays; `graph`: with one of its own; `zeros`, not None, where none is reached."""
    grads = _run_backward(outputs, cotangents, True, graph, inputs, allow_unreachable=True, accumulate_grad=False)
    if not zeros:
        return grads
    return tuple([torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)])


def shapes_into(node: Any) -> list[Any]:
    """The shapes of the gradients that a node of a graph takes."""
    return [taken.shape for taken in getattr(node, "_input_metadata", ())]


def exchange_cached_weights(others: Any) -> Any:
    """Those that parametrize.cached() keeps, for others in their place."""
    kept, parametrize._cache = parametrize._cache, others
    return kept


def can_record() -> bool:
    """Whether there can be a graph: not in inference mode, of which torch.func.jvp hides all other signs."""
    return not _dispatch_tls_is_dispatch_key_excluded(DispatchKey.AutogradFunctionality)


def mark(tensor: Tensor) -> Any:
    """What stays the same while nobody writes to a tensor, or frees it; None where nobody can tell."""
    known = can_inspect(tensor) and not tensor.is_inference()
    return (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype) if known else None


def recorded() -> bool:
    """Whether make_fx, torch.export or a FakeTensorMode is at work: to them, what leaves torch is a constant or no value."""
    return (_get_dispatch_mode(_PROXY) or _get_dispatch_mode(_FAKE) or _above_autograd(_PROXY)) is not None


def recorded_above_autograd() -> bool:
    """Whether torch.export records: the transforms themselves, and all that is done to tensors in between."""
    return _above_autograd(_PROXY) is not None


def can_inspect(tensor: Tensor) -> bool:
    """Whether Python may look at a tensor's values: not wrapped, traced, fake, meta or captured."""
    if torch.compiler.is_dynamo_compiling() or recorded() or tensor.is_meta or is_wrapped(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


@torch._dynamo.assume_constant_result
def derivative_order() -> int:
    """How often Dynamo's graph can be differentiated: open grad and jvp levels, and once by autograd, as AOTAutograd can."""
    kinds = (TransformType.Grad, TransformType.Jvp)
    return 1 + sum(entry.key() in kinds for entry in _functorch.get_interpreter_stack() or ())


@torch._dynamo.assume_constant_result
def traced_transforms() -> int:
    """How many torch.func transforms are open while Dynamo traces, vmap included."""
    return len(_functorch.get_interpreter_stack() or ())


def traced_derivatives_possible() -> bool:
    """The opposite of `plain`, as Dynamo can tell it."""
    return torch.is_grad_enabled() or derivative_order() > 1


# Nested forward mode through an autograd.Function: torch calls `jvp` with forward AD switched off and with saved tensors that
# are still dual at this level, so that jacfwd(jacfwd) comes out as 0 (pytorch#197867). Switched on again, and without this
# level's tangents, every nesting is right. A plain forward_ad.dual_level() has no outer level to keep and stays as it is.
@contextmanager
def _forward_mode_again() -> Iterator[None]:
    with forward_mode(True), torch.enable_grad():
        yield


def forward_mode_again() -> AbstractContextManager[None]:
    """Let the code of a `jvp` staticmethod be differentiated by outer levels."""
    return _forward_mode_again() if eager_transforms.JVP_NESTING else _NO_CONTEXT


def wrapper(cls: Any, shape: Any, like: Tensor) -> Any:
    """A tensor without data that calls `__torch_dispatch__` of its class."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)


def fake_mode() -> AbstractContextManager[Any]:
    """Tensors made inside have a shape, a dtype and a device, and no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@torch._dynamo.assume_constant_result
def forward_levels() -> int:
    """How many torch.func.jvp levels are open while Dynamo traces."""
    return sum(entry.key() == _functorch.TransformType.Jvp for entry in _functorch.get_interpreter_stack() or ())


def primal(tensor: Tensor | None) -> Tensor | None:
    """A tensor of a `jvp` staticmethod without the tangent of the level being computed."""
    if tensor is None or not eager_transforms.JVP_NESTING:
        return tensor
    return forward_ad.unpack_dual(tensor).primal


def tangent(tensor: Tensor) -> Tensor | None:
    """That of the innermost level."""
    return _unpack_dual(tensor, level=0)[1]


def dual(tensor: Tensor, moved: Tensor) -> Tensor:
    """A tensor with a tangent at the innermost level."""
    return _make_dual(tensor, moved, level=0)


def legacy_level() -> int:
    """The innermost level of the vmap of plain autograd; where another thread opened it, the first."""
    _vmapmode_increment_nesting()
    return max(1, _vmapmode_decrement_nesting())


def called_eagerly(function: F) -> F:
    """A function whose calls Dynamo leaves alone, with all that they call, where it cannot trace them into a caller's graph.

    After a graph break it would trace frames inside of them, each of which then takes itself for a part of that graph.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))  # type: ignore[attr-defined]
    return function
