"""The values of a black box: plain tensors in, plain tensors out."""

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from functorch_inverse import _torch
from functorch_inverse._capture import Captured
from functorch_inverse._hints import instead_of
from functorch_inverse._tree import PLAIN, Partition, Tree, describe, is_differentiable
from functorch_inverse._vectors import same_precision
from functorch_inverse.errors import BlackBoxError, StructureError

__all__ = [
    "BlackBox",
    "Loop",
    "Outcome",
    "VmapMethod",
    "check_vmap_method",
    "from_array",
    "is_array",
    "output",
    "progress_bar",
    "refuse_empty",
]

VmapMethod: TypeAlias = Literal["sequential", "broadcast", "vmap"]


def check_vmap_method(caller: str, method: str | None) -> None:
    """ValueError unless the method is one of the choices."""
    if method not in (None, "sequential", "broadcast", "vmap"):
        raise ValueError(f"`{caller}`: `vmap_method` is {method!r}; choose 'sequential', 'broadcast', 'vmap' or None.")


@dataclass(frozen=True)
class Loop:
    """How the calls of a "sequential" batch are made: by a pool of threads, with a progress bar."""

    threads: int | None = None
    progress: bool = False


@dataclass
class Outcome:
    """What a call found out about the structure of its results; filled while g runs."""

    y: Partition | None = None
    aux: Partition | None = None
    # While Dynamo traces: the leaves of y with what they depend on.
    traced: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class BlackBox:
    """One call of g, as a function of all the tensors that it reads.

    `call` takes the given tensors; the rest are those that g captures. `x_places` are the places of x among
    them, `batch_dims` counts the leading dims of each of these that are no part of a sample, and `like`
    sets the device and the precision of y. With `x_only`, "broadcast" holds while only x is batched, and
    other levels go one by one. `levels` are the vmapped dims that "sequential" runs through, outermost
    first: which tensors have them, and how long they are.
    """

    caller: str
    call: Callable[[Sequence[Tensor]], Any]
    captured: Captured
    has_aux: bool
    method: VmapMethod
    x_only: bool
    x_places: tuple[int, ...]
    batch_dims: tuple[int, ...]
    like: Tensor | None
    outcome: Outcome
    loop: Loop | None
    batched_as: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    levels: tuple[tuple[tuple[bool, ...], int], ...] = ()
    # While Dynamo traces: how many of the tensors are detached.
    blind: int = 0
    tensors_only: bool = False

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The leaves of y and the tensors of aux."""
        function = self._call if self.batched_as is None else self.batched_as(self._call)
        return run_through(self, function, tensors) if self.levels else function(*tensors)

    def _call(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = len(tensors) - self.captured.count
        seen = [_written_out(t) for t in tensors]
        with torch.enable_grad(), self.captured.running(seen[given:]):
            held = [self.call(seen[:given])]
        return self.unpack(held)

    def unpack(self, held: list[Any]) -> tuple[Tensor, ...]:
        """The tensors in what g returned, which the list is emptied of; `outcome` keeps the structure."""
        y, aux = split_aux(self.caller, held.pop(), self.has_aux)
        part, arrays = self._outputs(y)
        self._note("y", part)
        if not self.has_aux:
            del y
            return _taken(arrays, self.like)
        part, tensors = Partition.of(_numbers_to_tensors(aux) if self.tensors_only else aux)
        self._note("aux", part)
        extra = list(tensors)
        del y, aux, tensors
        return (*_taken(arrays, self.like), *_taken(extra, None))

    def _note(self, what: str, part: Partition) -> None:
        before = getattr(self.outcome, what)
        if self.levels and before is not None and before.spec != part.spec:
            raise StructureError(
                f"it returned {what} with the structure {describe(part.spec)}, and {describe(before.spec)} for an "
                "earlier sample; all samples must give the same"
            )
        setattr(self.outcome, what, part)

    def _outputs(self, y: Tree) -> tuple[Partition, list[Any]]:
        part, arrays = Partition.of(torch.as_tensor(y) if isinstance(y, float | complex) else y, is_array)
        if not arrays:
            name = "g" if self.caller == "custom_inverse" else "the function"
            raise StructureError(
                f"`{self.caller}`: {name} returned {type(y).__name__} without any tensor or array in it. {instead_of(y)}"
            )
        if torch.compiler.is_dynamo_compiling():  # which traces NumPy into operations of torch
            arrays = tuple([leaf if isinstance(leaf, Tensor) else from_array(leaf) for leaf in arrays])
            self.outcome.traced = tuple(leaf for leaf in arrays if is_differentiable(leaf))
        return part, list(arrays)


def _written_out(tensor: Tensor) -> Tensor:
    """A tensor as its memory has it: other libraries know nothing of a sign or a conjugation that torch has put off."""
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


# Whoever calls g keeps what it returned in a list alone, which is emptied here: then it shows who else has the memory.


def _taken(held: list[Any], like: Tensor | None) -> tuple[Tensor, ...]:
    """All that a list holds, in its order."""
    held.reverse()
    return tuple([output(held, like) for _ in range(len(held))])


def output(held: list[Any], like: Tensor | None) -> Tensor:
    """The last of what g returned, taken off a list: a tensor of its own without derivative, in the precision of `like`."""
    leaf = held.pop()
    array = not isinstance(leaf, Tensor)
    tensor = from_array(leaf) if array else leaf.detach()
    del leaf
    settled = like is None or (tensor.dtype is like.dtype and tensor.device == like.device)
    if like is not None and not settled and is_differentiable(tensor):
        tensor = tensor.to(device=like.device, dtype=same_precision(tensor.dtype, like.dtype))
    if torch.compiler.is_dynamo_compiling():  # nobody can tell; it removes copies that are of no use
        return tensor.clone()
    return tensor if array or _is_its_own(tensor) else tensor.clone()


def _is_its_own(tensor: Tensor) -> bool:
    """Whether nobody else can write to a tensor: the memory of an input, or a buffer of g, is held by somebody."""
    if _torch.is_wrapped(tensor):
        return False
    if not (type(tensor) in PLAIN and tensor.layout is torch.strided):
        return True
    storage = tensor.untyped_storage()  # that of another library, a NumPy array, say, cannot be resized
    return (storage.resizable() and _torch.storage_holders(storage._cdata) == _ALONE) or not tensor.numel()


# A storage, and the object in Python that asks.
_ALONE = 2


def is_array(leaf: Any) -> bool:
    """A tensor or a NumPy array or number."""
    return isinstance(leaf, Tensor | np.ndarray) or (hasattr(leaf, "__array_interface__") and hasattr(leaf, "dtype"))


def from_array(array: Any, device: torch.device | None = None) -> Tensor:
    """A tensor of its own from any NumPy array or number: the buffer may be written to by the next call of g."""
    if torch.compiler.is_dynamo_compiling():
        return torch.as_tensor(array, device=device)
    array = np.asarray(array)
    kind = np.complex128 if array.dtype.kind == "c" else np.float64
    plain = kind if array.dtype.char in "gG" else array.dtype.newbyteorder("=")  # no long double in torch
    return torch.from_numpy(np.array(array, dtype=plain, order="C", copy=True)).to(device)


def split_aux(caller: str, result: Any, has_aux: bool) -> tuple[Tree, Tree]:
    """(y, aux) of what g returned."""
    if not has_aux:
        return result, None
    if not (isinstance(result, tuple) and len(result) == 2):
        raise StructureError(
            f"`{caller}`: with has_aux=True g returns a pair (y, aux); {type(result).__name__} arrived. "
            "Return (y, aux), or leave has_aux=False."
        )
    return result


def _numbers_to_tensors(aux: Tree) -> Tree:
    """Under vmap every number becomes a tensor, so that samples can be stacked."""
    partition, leaves = Partition.of(aux, lambda leaf: is_array(leaf) or isinstance(leaf, bool | int | float | complex))
    return partition.join([leaf if isinstance(leaf, Tensor) else from_array(leaf) for leaf in leaves])


def run_through(box: BlackBox, function: Callable[..., Any], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One call for each sample of all the levels, stacked."""
    sizes = tuple(size for _, size in box.levels)
    indices = list(itertools.product(*map(range, sizes)))
    if not indices:
        refuse_empty(box.caller)

    def call(index: tuple[int, ...]) -> tuple[Tensor, ...]:
        try:
            return function(*_sample(box, tensors, index))
        except Exception as error:
            raise _sample_error(box, index, error) from error

    rows = _map(call, indices, box)
    for index, row in zip(indices, rows, strict=True):
        shapes, first = [tuple(t.shape) for t in row], [tuple(t.shape) for t in rows[0]]
        if shapes != first:
            raise StructureError(f"{_where(box, index)} it returned shapes {shapes}, and {first} for the first sample.")
    return tuple(torch.stack(column).unflatten(0, sizes) for column in zip(*rows, strict=True))


def _map(call: Callable[[Any], Any], indices: list[tuple[int, ...]], box: BlackBox) -> list[Any]:
    bar: Any = iter
    loop = box.loop or Loop()
    if loop.progress:
        bar = functools.partial(progress_bar(box.caller), total=len(indices), desc=box.caller)
    if loop.threads is None:
        return list(bar(map(call, indices)))
    with ThreadPoolExecutor(loop.threads) as pool:
        return list(bar(pool.map(call, indices)))


def progress_bar(caller: str) -> Any:
    """tqdm, or an error that says how to get it."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(f"`{caller}`: progress=True needs tqdm, which is not installed: pip install tqdm.") from error
    return tqdm


def _sample(box: BlackBox, tensors: Sequence[Tensor], index: tuple[int, ...]) -> list[Tensor]:
    sample = list(tensors)
    for (batched, _), i in zip(box.levels, index, strict=True):
        sample = [t[i] if b else t for t, b in zip(sample, batched, strict=True)]
    return sample


def _where(box: BlackBox, index: tuple[int, ...]) -> str:
    return f"`{box.caller}`: in sample {index if len(index) > 1 else index[0]} of the vmapped batch (outermost dim first),"


def _sample_error(box: BlackBox, index: tuple[int, ...], error: Exception) -> Exception:
    kind = StructureError if isinstance(error, StructureError) else BlackBoxError
    return kind(f"{_where(box, index)} the function raised {type(error).__name__}: {error}")


def refuse_empty(caller: str) -> None:
    """An empty vmapped batch makes no call, so nothing is known of the results."""
    raise StructureError(
        f"`{caller}`: vmap over an empty batch needs a call of the function to know its shapes. Use "
        "vmap_method='broadcast' or 'vmap', or `event_dim` with leading batch dims."
    )
