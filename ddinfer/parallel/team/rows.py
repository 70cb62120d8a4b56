"""A call of several rows (a doubled batch, a batch of prompts) as calls of fewer rows, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ddinfer.distributed.partition import contiguous_slice
from ddinfer.errors import UsageError

#: Largest difference from the whole call, in parts of the largest value: a product of other rows
#: may take another kernel.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def num_rows(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Rows of a call: of its first argument that is a tensor with rows, or a list of tensors."""
    first = _first_with_rows(args, kwargs)
    return 1 if first is None else len(first)


def cut_rows(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, num_parts: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The call's arguments as those of at most ``num_parts`` calls with neighbouring rows.

    Tensors whose first dim is the number of rows are cut, and lists with an item for each row.
    """
    parts = min(num_parts, rows)
    in_lists = isinstance(_first_with_rows(args, kwargs), list)
    return [
        _part((args, kwargs), contiguous_slice(rows, parts, k), rows, in_lists)
        for k in range(parts)
    ]


def _part(value: Any, share: range, rows: int, in_lists: bool) -> Any:
    """
    Args:
        in_lists: a list of as many tensors holds a row in each; else they have rows themselves.
    """
    if isinstance(value, torch.Tensor):
        has_rows = value.dim() > 0 and value.shape[0] == rows
        return value[share.start : share.stop] if has_rows else value
    if isinstance(value, dict):
        return {name: _part(item, share, rows, in_lists) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        holds_rows = any(t.dim() > 0 and t.shape[0] == rows for t in tensors)
        is_rows = isinstance(value, list) and len(value) == rows and (in_lists or not holds_rows)
        if is_rows:
            return value[share.start : share.stop]
        parts = [_part(item, share, rows, in_lists) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def join_rows(parts: Sequence[Any]) -> Any:
    """One output of the outputs for neighbouring rows.

    Raises:
        UsageError: they hold something else than tensors with rows.
    """
    first = parts[0]
    if isinstance(first, list) and all(isinstance(item, torch.Tensor) for item in first):
        return [item for part in parts for item in part]
    flat = [pytree.tree_flatten(part) for part in parts]
    leaves = []
    for same in zip(*(leaves for leaves, _ in flat), strict=True):
        if isinstance(same[0], torch.Tensor):
            leaves.append(torch.cat(same))
        elif any(other != same[0] for other in same):
            raise UsageError(
                f"--cfg_parallel: the denoiser returns a {type(same[0]).__name__} that depends on "
                "the rows of its batch. Leave the option out"
            )
        else:
            leaves.append(same[0])
    return pytree.tree_unflatten(leaves, flat[0][1])


def check_rows(name: str, joined: Any, whole: Any) -> None:
    """Compares what was joined with the output of the whole call.

    Raises:
        UsageError: they differ by more than rounding.
    """
    pairs = zip(pytree.tree_leaves(joined), pytree.tree_leaves(whole), strict=True)
    for found, expected in pairs:
        if not isinstance(found, torch.Tensor):
            continue
        problem = difference_beyond_rounding(found, expected)
        if problem is None:
            continue
        raise UsageError(
            f"--cfg_parallel cannot split the batch of {name}: the output of its rows one by one "
            f"{problem}, compared with the whole batch. Leave the option out"
        )


def difference_beyond_rounding(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """By how much two outputs differ, where it is more than rounding. NaN equals NaN."""
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    difference = float(torch.where(is_same, 0, (found - expected).abs()).max())
    largest = float(expected.nan_to_num(0, 0, 0).abs().max())
    bound = TOLERANCES.get(found.dtype, 0.0) * max(largest, 1.0)
    return None if difference <= bound else f"differs by {difference:.2g}, more than {bound:.2g}"


def _first_with_rows(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The first argument that is a tensor of at least three dims, or a list of such tensors."""

    def has_rows(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() >= 3

    for value in (*args, *kwargs.values()):
        if has_rows(value) or (isinstance(value, list) and value and all(map(has_rows, value))):
            return value
    return None
