"""Nested values as a structure and its tensors, and fingerprints of them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

#: Types of which `repr` says everything.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class UnsupportedValueError(TypeError):
    """A leaf that is neither a tensor nor of a type that can be compared. Names its type."""


@dataclass(frozen=True)
class TensorTree:
    """A nested value: its tensors by shape, everything else as it is.

    Attributes:
        tree: the value with each leaf's number in its place.
        leaves: per leaf its value, or ``None`` where ``empty`` has a tensor.
        empty: leaf number → a meta tensor with its shape, strides and dtype.
        on_host: leaf numbers of tensors on the CPU where ``device`` is another.
    """

    tree: Any
    leaves: tuple[Any, ...]
    empty: dict[int, torch.Tensor]
    on_host: frozenset[int] = frozenset()

    @classmethod
    def of(cls, values: Any, device: torch.device) -> TensorTree:
        leaves, spec = pytree.tree_flatten(values)
        found = {k: leaf for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        empty = {k: empty_like(tensor, torch.device("meta")) for k, tensor in found.items()}
        on_host = frozenset(k for k, t in found.items() if t.device.type != device.type)
        constants = tuple(None if k in found else leaf for k, leaf in enumerate(leaves))
        tree = pytree.tree_unflatten(list(range(len(leaves))), spec)
        return cls(tree, constants, empty, on_host)

    def unflatten(self, tensors: Mapping[int, torch.Tensor]) -> Any:
        """The value with these tensors in it, by leaf number."""
        return pytree.tree_map(
            lambda k: tensors[k] if k in self.empty else self.leaves[k], self.tree
        )


def tensors_of(values: Any) -> list[torch.Tensor]:
    """Every tensor inside a nested value."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def empty_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An uninitialized tensor of the same shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def storage_id(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, as long as one of them lives."""
    return tensor.untyped_storage()._cdata


def fingerprint(
    values: Any, *, contents: bool | Collection[int] = (), other_types: bool = False
) -> str:
    """A digest that is equal for nested values of one structure.

    Tensors count by shape, strides, dtype and device type, everything else by its value.

    Args:
        contents: whether tensors count by their elements, too; or the leaf numbers of those.
        other_types: whether leaves of other types are allowed; they count by their pickle.

    Raises:
        UnsupportedValueError: a leaf of another type.
    """
    leaves, spec = pytree.tree_flatten(values)
    found = hashlib.sha256(str(spec).encode())
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            said = f"{tuple(leaf.shape)} {leaf.stride()} {leaf.dtype} {leaf.device.type}"
            data = b""
            if contents is True or (contents and k in contents):
                flat = leaf.detach().cpu().contiguous().reshape(-1)
                data = flat.view(torch.uint8).numpy().tobytes()
        elif isinstance(leaf, PLAIN):
            said, data = f"{type(leaf).__name__} {leaf!r}", b""
        elif other_types:
            said, data = type(leaf).__name__, _pickled(leaf)
        else:
            raise UnsupportedValueError(type(leaf).__name__)
        found.update(f"\n{said} {len(data)}\n".encode() + data)
    return found.hexdigest()


def _pickled(leaf: Any) -> bytes:
    try:
        return pickle.dumps(leaf)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UnsupportedValueError(f"{type(leaf).__name__} ({error})") from error
