"""Putting together what ranks made: by index, complete, unique, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ddinfer.errors import DdinferError, UsageError

if TYPE_CHECKING:
    from ddinfer.distributed.process_group import Group

T = TypeVar("T")


def gather_records(group: Group, records: Iterable[T]) -> list[list[T]]:
    """Every rank's records, in rank order, on every rank. Small picklable values on the CPU."""
    return group.all_gather_object(list(records))


def place_by_index(
    gathered: Iterable[Iterable[T]], expected: int | Iterable[int], index_of: Callable[[T], int]
) -> list[T]:
    """Put every rank's items where they belong: complete, unique, in order of their index.

    Args:
        gathered: one part per rank, in any order and of any sizes; empty ones are ordinary.
        expected: the indices there must be, or their number n for ``0 … n - 1``.

    Raises:
        DdinferError: an index is missing, there more than once, or not expected.
    """
    wanted = range(expected) if isinstance(expected, int) else sorted(set(expected))
    placed: dict[int, T] = {}
    twice: list[int] = []
    for part in gathered:
        for item in part:
            index = index_of(item)
            if index in placed:
                twice.append(index)
            placed[index] = item
    missing = [k for k in wanted if k not in placed]
    foreign = sorted(set(placed) - set(wanted))
    problems = [
        f"{len(indices)} {what}: {_some(indices)}"
        for what, indices in (
            ("missing", missing),
            ("there more than once", twice),
            ("not asked for", foreign),
        )
        if indices
    ]
    if problems:
        raise DdinferError(
            f"the ranks' results do not make up {len(wanted)} items: " + "; ".join(problems)
        )
    return [placed[k] for k in wanted]


def require_equal(group: Group, what: str, value_hash: str) -> None:
    """Check that every rank has the same ``what``.

    Args:
        value_hash: short text that stands for the value; shown when ranks differ.

    Raises:
        UsageError: on every rank, naming the ranks and what each had.
    """
    hashes: list[str] = group.all_gather_object(value_hash)
    if len(set(hashes)) <= 1:
        return
    holders: dict[str, list[int]] = {}
    for group_rank, each in enumerate(hashes):
        holders.setdefault(each, []).append(group.global_rank(group_rank))
    found = "; ".join(f"{_ranks(ranks)}: {each}" for each, ranks in holders.items())
    raise UsageError(f"every rank must be given the same {what}, but they differ: {found}")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_some(ranks)}"


def _some(numbers: Sequence[Any]) -> str:
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return ", ".join(map(str, numbers[:10])) + more
