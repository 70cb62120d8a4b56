"""Exchanges at the ends of the work: results are placed by index, inputs are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ddinfer.distributed.process_group import Group
from ddinfer.errors import UsageError

T = TypeVar("T")


def place_by_index(
    parts: Iterable[Sequence[T]], num_items: int, index_of: Callable[[T], int]
) -> list[T]:
    """Put every rank's items where they belong; complete, unique, in order.

    Raises:
        RuntimeError: an index is missing, made twice, or beyond ``num_items``.
    """
    placed: dict[int, T] = {}
    for rank, part in enumerate(parts):
        for item in part:
            index = index_of(item)
            if not 0 <= index < num_items:
                raise RuntimeError(f"rank {rank} made item {index} of {num_items}")
            if index in placed:
                raise RuntimeError(f"item {index} was made twice, the second time by rank {rank}")
            placed[index] = item
    if len(placed) != num_items:
        missing = [k for k in range(num_items) if k not in placed]
        raise RuntimeError(f"{len(missing)} of {num_items} items are missing: {missing[:8]} …")
    return [placed[k] for k in range(num_items)]


def require_equal(group: Group, what: str, value: str) -> None:
    """Check that all ranks have the same ``value``.

    Raises:
        UsageError: on every rank, naming the ranks that differ from the majority.
    """
    values = group.all_gather_object(value)
    if len(set(values)) == 1:
        return
    usual, _ = Counter(values).most_common(1)[0]
    others = [f"rank {group.global_rank(r)}: {v}" for r, v in enumerate(values) if v != usual]
    raise UsageError(
        f"{what} differ between ranks: most have {usual}; {'; '.join(others[:4])}. Every rank must "
        "pass the same full list; ddinfer does the splitting"
    )
