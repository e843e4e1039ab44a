"""Every private name of torch that this package touches, and what would break without it.

A new torch that renames one of them breaks here, at import, and says so.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

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
        _TorchDispatchModeKey,
    )

    # Who watches operations below autograd.
    from torch._C import _len_torch_dispatch_stack as dispatch_modes_open

    # Whether another backward pass through the same graph may come.
    from torch._C._autograd import _get_current_graph_task_keep_graph as graph_is_kept

    # Saved-tensor hooks belong to the user's graph, not to one that is made and used up inside a forward.
    from torch._C._autograd import _saved_tensors_hooks_is_enabled as saved_tensors_have_hooks  # type: ignore[attr-defined]

    # The level of torch.func.jvp: nested forward mode is wrong without the mend below.
    from torch._functorch import eager_transforms
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    # Tensors without data, for what the user says of a result.
    from torch._subclasses.fake_tensor import FakeTensorMode

    # A small backward pass without the checks of torch.autograd.grad, which cost as much again.
    from torch.autograd.variable import Variable
    from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

    # The containers in which torch functions take and return tensors.
    from torch.utils._pytree import tree_leaves, tree_map

    # Read here so that their absence shows at import.
    _ = (eager_transforms.JVP_NESTING, forward_ad._current_level)
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"functorch_inverse supports torch >= 2.11; torch {torch.__version__} differs in a private "
        f"name that it relies on ({error}). Install another torch, or report this version."
    ) from error

Tensors: TypeAlias = tuple[Tensor, ...]

__all__ = [
    "DispatchMode", "add_batch_dim", "alive", "at_current_level", "autocasts", "can_inspect", "can_record", "close_vmap",
    "derivative_order", "dispatch_modes_open", "dual_level_open", "fake_mode", "forward_levels", "forward_mode",
    "forward_mode_again", "forward_mode_available", "full_precision", "function_mode_active", "functionalizes",
    "graph_grad", "graph_is_kept", "has_history", "innermost", "is_followed", "is_legacy_batched", "is_live", "is_mapping",
    "is_open", "is_wrapped", "level", "mark", "no_functions", "no_torch_function", "open_vmap", "peeled", "plain",
    "plain_apply", "primal", "recording", "remove_batch_dim", "saved_tensors_have_hooks", "shapes_into",
    "traced_derivatives_possible", "traced_transforms", "transforms_active", "tree_leaves", "tree_map", "undisturbed",
    "wrap_for_grad", "wrapper",
]  # fmt: skip

no_torch_function: Any = _disabled_torch_function_impl
_run_backward: Any = Variable._execution_engine.run_backward
is_wrapped = _functorch.is_functorch_wrapped_tensor
add_batch_dim, wrap_for_grad = _functorch._add_batch_dim, _functorch._wrap_for_grad
open_vmap, close_vmap = _functorch._vmap_increment_nesting, _functorch._vmap_decrement_nesting
remove_batch_dim = _functorch._remove_batch_dim
forward_mode = forward_ad._set_fwd_grad_enabled
_NO_CONTEXT = nullcontext()

# The vmap of is_grads_batched and torch.autograd.functional, which does not ask a Function for its rule: its tensors
# have no values to show, and go one by one through an operator that it does not know.
is_legacy_batched = _functorch.is_legacy_batchedtensor


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


def at_current_level(tensor: Tensor) -> Tensor:
    """A tensor as an untracked constant of the innermost open transform."""
    if torch.compiler.is_dynamo_compiling():  # nothing escapes a trace
        return tensor
    now = _functorch.maybe_current_level()
    return tensor if now is None or level(tensor) >= now else wrap_for_grad(tensor, now)


def level(tensor: Tensor) -> int:
    """The transform that wraps a tensor, counted from the outermost; -1 for a plain one."""
    return _functorch.maybe_get_level(tensor) if is_wrapped(tensor) else -1


def _tracked(tensor: Tensor) -> bool:
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    possible = forward_ad._current_level >= 0 and _is_fwd_grad_enabled()
    return possible and forward_ad.unpack_dual(tensor, level=0).tangent is not None


def graph_grad(outputs: Tensors, inputs: Tensors, cotangents: Tensors) -> Tensors:
    """torch.autograd.grad of a graph that stays, with zeros where an input is not reached."""
    grads = _run_backward(outputs, cotangents, True, False, inputs, allow_unreachable=True, accumulate_grad=False)
    return tuple([torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)])


def shapes_into(node: Any) -> list[Any]:
    """The shapes of the gradients that a node of a graph takes."""
    return [taken.shape for taken in getattr(node, "_input_metadata", ())]


def is_live(tensor: Tensor) -> bool:
    """Whether a derivative of any open level flows through a tensor."""
    with no_functions():  # a mode would answer for what stands in for the tensor
        return _is_live(tensor)


def _is_live(tensor: Tensor) -> bool:
    if forward_ad._current_level < 0 and not is_wrapped(tensor):
        return tensor.requires_grad and torch.is_grad_enabled()
    # Tangents show only at their own level: step down through the open transforms to it.
    top, tensor = innermost(), alive(tensor)
    if top is None or is_followed(tensor, top):
        return is_followed(tensor, top)
    with top.lower():
        return _is_live(peeled(tensor, top)[0])


def innermost() -> Any:
    """The innermost open transform, or None."""
    return retrieve_current_functorch_interpreter() if _are_functorch_transforms_active() else None


def is_mapping(transform: Any) -> bool:
    """Whether a transform is a vmap."""
    return transform.key() == _functorch.TransformType.Vmap


def is_followed(tensor: Tensor, transform: Any) -> bool:
    """Whether a derivative of this innermost transform, or of plain autograd where it is None, flows through a tensor."""
    if transform is not None and (level(tensor) != transform.level() or is_mapping(transform)):
        return False
    return _tracked(tensor)


def alive(tensor: Tensor) -> Tensor:
    """A tensor without what transforms that are closed left around it."""
    while level(tensor) < -1:
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def peeled(tensor: Tensor, transform: Any) -> tuple[Tensor, int | None]:
    """A tensor without what this innermost transform put around it, and the dim that it maps."""
    if transform is None or level(tensor) != transform.level():
        return tensor, None
    dim = _functorch.maybe_get_bdim(tensor) if is_mapping(transform) else None
    return _functorch.get_unwrapped(tensor), dim


def can_record() -> bool:
    """Whether there can be a graph: not in inference mode, of which torch.func.jvp hides all other signs."""
    return not _dispatch_tls_is_dispatch_key_excluded(DispatchKey.AutogradFunctionality)


def mark(tensor: Tensor) -> Any:
    """What stays the same while nobody writes to a tensor, or frees it; None where nobody can tell."""
    known = can_inspect(tensor) and not tensor.is_inference()
    return (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype) if known else None


def is_open(tensor: Tensor) -> bool:
    """Whether a transform or autograd has a hold on a tensor, so that it must be an explicit input."""
    with no_functions():
        return tensor.requires_grad or is_wrapped(tensor) or _is_live(tensor)


def has_history(tensor: Tensor) -> bool:
    """Whether a tensor keeps a graph alive."""
    with no_functions():
        return is_wrapped(tensor) or tensor.grad_fn is not None


def functionalizes(transform: Any) -> bool:
    """Whether a transform is torch.func.functionalize."""
    return transform.key() == _functorch.TransformType.Functionalize


def can_inspect(tensor: Tensor) -> bool:
    """Whether Python may look at a tensor's values: not wrapped, traced, fake or captured."""
    if torch.compiler.is_dynamo_compiling():
        return False
    keys = _TorchDispatchModeKey
    traced = _get_dispatch_mode(keys.PROXY) is not None or _get_dispatch_mode(keys.FAKE) is not None
    if traced or is_wrapped(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


@torch._dynamo.assume_constant_result
def derivative_order() -> int:
    """How often Dynamo's graph can be differentiated: the open grad and jvp levels, and autograd.

    AOTAutograd has no double backward, so the outer autograd counts once.
    """
    kinds = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    return 1 + sum(entry.key() in kinds for entry in _functorch.get_interpreter_stack() or ())


@torch._dynamo.assume_constant_result
def traced_transforms() -> int:
    """How many torch.func transforms are open while Dynamo traces, vmap included."""
    return len(_functorch.get_interpreter_stack() or ())


def traced_derivatives_possible() -> bool:
    """The opposite of `plain`, as Dynamo can tell it."""
    return torch.is_grad_enabled() or derivative_order() > 1


# Nested forward mode through an autograd.Function. torch calls `jvp` with forward AD switched off and with
# saved tensors that are still dual at this level, so that jacfwd(jacfwd) comes out as 0
# (pytorch#197867). Switching it on again and stripping this level's tangents makes every nesting
# right. A plain forward_ad.dual_level() has no outer level to keep and must not be touched.


@contextmanager
def _forward_mode_again() -> Iterator[None]:
    with forward_mode(True), torch.enable_grad():
        yield


def forward_mode_again() -> AbstractContextManager[None]:
    """Let the code of a `jvp` staticmethod be differentiated by outer levels."""
    return _forward_mode_again() if eager_transforms.JVP_NESTING else _NO_CONTEXT


def forward_mode_available() -> bool:
    """Whether torch.func.jvp can be opened here: not inside a plain dual level, and not under Dynamo."""
    open_to_it = not dual_level_open() or eager_transforms.JVP_NESTING > 0
    return open_to_it and not torch.compiler.is_dynamo_compiling()


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


def autocasts(tensor: Tensor) -> bool:
    """Whether operations with a tensor change its precision."""
    kind = tensor.device.type
    return (kind == "cpu" or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast switched off: derivatives are computed in the precision of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else _NO_CONTEXT


def plain_apply(function: Any) -> Any:
    """The apply of an autograd.Function for those who know that no transform is open: torch asks at every call."""
    return super(torch.autograd.Function, function).apply
