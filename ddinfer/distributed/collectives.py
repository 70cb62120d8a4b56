"""Putting together what ranks made: by index, complete, unique, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ddinfer.errors import DdinferError, ErrorRecord, RankError, UsageError, exit_code_of, list_some

if TYPE_CHECKING:
    from ddinfer.distributed.process_group import Group

T = TypeVar("T")


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
        f"{len(indices)} {what}: {list_some(indices)}"
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


def require_same(
    group: Group, what: str, value_hash: str | None, failure: Exception | None = None
) -> None:
    """Check that every rank has the same ``what``.

    Args:
        value_hash: short text that stands for the value; shown when ranks differ.
        failure: why this rank has none.

    Raises:
        the failure itself on every rank, if it is the same on all of them.
        RankError: on every rank, the first rank's failure, if others have none or another.
        UsageError: on every rank, naming the ranks and what each had.
    """
    record = None if failure is None else ErrorRecord.of(failure)
    code = None if failure is None else exit_code_of(failure)
    told = group.all_gather_object((record, code, value_hash))
    failed = [(rank, each, code) for rank, (each, code, _) in enumerate(told) if each is not None]
    is_the_same = len({str(each) for _, each, _ in failed}) == 1
    if failure is not None and is_the_same and len(failed) == group.group_size:
        raise failure
    if failed:
        rank, first, code = failed[0]
        raise RankError(group.ranks[rank], group.phase, first, exit_code=code) from failure
    _raise_if_differing(group, what, [value for _, _, value in told])


def _raise_if_differing(group: Group, what: str, hashes: Sequence[str]) -> None:
    if len(set(hashes)) <= 1:
        return
    holders: dict[str, list[int]] = {}
    for group_rank, each in enumerate(hashes):
        holders.setdefault(each, []).append(group.ranks[group_rank])
    found = "; ".join(f"{_ranks(ranks)}: {each}" for each, ranks in holders.items())
    raise UsageError(f"every rank must be given the same {what}, but they differ: {found}")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list_some(ranks)}"
