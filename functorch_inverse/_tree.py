"""Pytrees by optree, and what `event_dim` means for their leaves."""

import functools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor, nn

from functorch_inverse.errors import StructureError

__all__ = [
    "ONE_TENSOR",
    "PLAIN",
    "Partition",
    "Tree",
    "TreeSpec",
    "event_dims",
    "flatten",
    "is_differentiable",
    "is_number",
    "unflatten",
]

Tree: TypeAlias = Any
TreeSpec: TypeAlias = optree.PyTreeSpec


def flatten(tree: Tree) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure; None is a leaf like any other."""
    return optree.tree_flatten(tree, none_is_leaf=True)


def unflatten(spec: TreeSpec, leaves: Sequence[Any]) -> Tree:
    """The inverse of `flatten`."""
    return optree.tree_unflatten(spec, leaves)


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf can carry a derivative at all."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def is_number(leaf: Any) -> bool:
    """A tensor or a Python number."""
    return isinstance(leaf, Tensor | int | float | complex)


_DATA = (type(None), bool, int, float, complex, str, bytes, Tensor, torch.dtype, torch.device)


def _may_hold(leaf: Any) -> bool:
    """Whether there may be tensors in it: not in NumPy's numbers and arrays of numbers."""
    return bool(getattr(getattr(leaf, "dtype", None), "hasobject", True))


@dataclass(frozen=True, eq=False)
class Partition:
    """A tree taken apart into chosen tensors and a mould that holds everything else."""

    spec: TreeSpec
    mould: tuple[Any, ...]
    places: tuple[int, ...]
    # A tuple of tensors, and nothing else.
    flat: bool = False

    @property
    def others(self) -> list[Any]:
        """Leaves that are neither chosen nor data: modules, functions, objects."""
        return [leaf for leaf in self.mould if not isinstance(leaf, _DATA) and _may_hold(leaf)]

    @classmethod
    def of(cls, tree: Tree, chosen: Any = lambda leaf: isinstance(leaf, Tensor)) -> "tuple[Partition, tuple[Tensor, ...]]":
        if not torch.compiler.is_dynamo_compiling():  # it cannot trace specs made outside
            if type(tree) in PLAIN and chosen(tree):
                return ONE_TENSOR, (tree,)
            if type(tree) is tuple and all(type(leaf) in PLAIN and chosen(leaf) for leaf in tree):
                return _tuple_of(len(tree)), tree
        leaves, spec = flatten(tree)
        flags = [chosen(leaf) for leaf in leaves]
        places = tuple(i for i, flag in enumerate(flags) if flag)
        mould = tuple(None if flag else leaf for leaf, flag in zip(leaves, flags, strict=True))
        return cls(spec, mould, places), tuple(leaves[i] for i in places)

    def join(self, tensors: Sequence[Any]) -> Tree:
        """The tree again, with other tensors in the chosen places."""
        if self is ONE_TENSOR and len(tensors) == 1:
            return tensors[0]
        if self.flat and len(tensors) == len(self.places):
            return tuple(tensors)
        leaves = list(self.mould)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return unflatten(self.spec, leaves)

    def pick(self, tree: Tree, caller: str, what: str) -> tuple[Any, ...]:
        """The leaves in the chosen places of a tree of the same structure."""
        if self is ONE_TENSOR and isinstance(tree, Tensor):
            return (tree,)
        try:
            leaves = self.spec.flatten_up_to(tree)
        except ValueError as error:
            raise StructureError(
                f"`{caller}`: {what} has the structure {describe(flatten(tree)[1])}, needed is {describe(self.spec)}. "
                "Return the same containers, with the same keys and lengths."
            ) from error
        return tuple(leaves[i] for i in self.places)


PLAIN = (Tensor, nn.Parameter)

# The commonest trees.
ONE_TENSOR = Partition(flatten(None)[1], (None,), (0,))


@functools.cache
def _tuple_of(n: int) -> Partition:
    return Partition(flatten((None,) * n)[1], (None,) * n, tuple(range(n)), flat=True)


def describe(spec: TreeSpec) -> str:
    """A structure as a person would write it."""
    return "a single leaf" if spec.is_leaf() else str(spec).removeprefix("PyTreeSpec(").split(", NoneIsLeaf")[0]


def event_dims(prefix: Tree, partition: Partition, tensors: Sequence[Tensor], caller: str, name: str) -> tuple[int, ...]:
    """How many trailing dims of each chosen tensor make up one sample.

    `prefix` is None (all of them), an int, or a pytree prefix of those.
    """
    chosen = prefix_values(prefix, partition, tensors, caller, name)
    return tuple([_event_dim(dim, t, caller, name) for dim, t in zip(chosen, tensors, strict=True)])


def prefix_values(prefix: Tree, partition: Partition, tensors: Sequence[Tensor], caller: str, name: str) -> list[Any]:
    """What a pytree prefix says of each chosen leaf."""
    if prefix is None or isinstance(prefix, int):
        return [prefix] * len(partition.places)
    try:
        spread = _spread(prefix, partition.join(tensors))
    except (ValueError, TypeError) as error:
        raise StructureError(
            f"`{caller}`: `{name}`={prefix!r} is not a prefix of {describe(partition.spec)}. "
            "Give None, an int, or a tree of those that follows the structure from its root."
        ) from error
    return [spread[i] for i in partition.places]


def _spread(prefix: Tree, tree: Tree) -> list[Any]:
    """The value of a prefix for each leaf below it; by hand, since a dict that is a constant of a trace has no structure."""
    if prefix is None or isinstance(prefix, int):
        return [prefix] * len(flatten(tree)[0])
    if isinstance(prefix, dict):
        if not isinstance(tree, dict) or prefix.keys() != tree.keys():
            raise ValueError("other keys")
        order = list(tree) if isinstance(tree, OrderedDict) else sorted(tree)
        return [dim for key in order for dim in _spread(prefix[key], tree[key])]
    if isinstance(prefix, tuple | list):
        if not isinstance(tree, tuple | list) or len(prefix) != len(tree):
            raise ValueError("another length")
        return [dim for part, below in zip(prefix, tree, strict=True) for dim in _spread(part, below)]
    raise ValueError("no int")


def _event_dim(dim: Any, tensor: Tensor, caller: str, name: str) -> int:
    if dim is None:
        return tensor.ndim
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
        raise ValueError(f"`{caller}`: `{name}` is {dim!r}; choose None, 0, 1, 2, ... or a pytree of those.")
    if dim > tensor.ndim:
        raise StructureError(
            f"`{caller}`: `{name}`={dim} needs tensors of at least {dim} dims, one of shape "
            f"{tuple(tensor.shape)} arrived. Choose a smaller `{name}`."
        )
    return dim
