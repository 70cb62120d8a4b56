"""Putting together what ranks made: by index, complete, unique, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ddinfer.errors import DdinferError, ErrorRecord, RankError, UsageError, exit_code_of, list_some

if TYPE_CHECKING:
    from ddinfer.distributed.process_group import Group

T = TypeVar("T")


def place_by_index(
    gathered: Iterable[Iterable[T]], num_items: int, index_of: Callable[[T], int]
) -> list[T]:
    """Every rank's items in order of their index: complete and unique.

    Args:
        gathered: one part per rank, in any order and of any sizes.
        num_items: the indices must be ``0 … num_items - 1``.

    Raises:
        DdinferError: an index is missing, repeated or out of range.
    """
    items = [item for part in gathered for item in part]
    count = Counter(map(index_of, items))
    found = {
        "missing": [k for k in range(num_items) if k not in count],
        "repeated": [k for k in count if count[k] > 1],
        "out of range": sorted(k for k in count if not 0 <= k < num_items),
    }
    problems = [f"{len(ks)} {what}: {list_some(ks)}" for what, ks in found.items() if ks]
    if problems:
        raise DdinferError(f"gathered results are not {num_items} items: " + "; ".join(problems))
    return sorted(items, key=index_of)


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
    gathered = group.all_gather_object((record, code, value_hash))
    failed = [(k, each, code) for k, (each, code, _) in enumerate(gathered) if each is not None]
    is_the_same = len({str(each) for _, each, _ in failed}) == 1
    if failure is not None and is_the_same and len(failed) == group.group_size:
        raise failure
    if failed:
        k, first, code = failed[0]
        raise RankError(group.ranks[k], group.phase, first, exit_code=code) from failure
    holders: dict[str, list[int]] = {}
    for rank, (_, _, each) in zip(group.ranks, gathered, strict=True):
        holders.setdefault(each, []).append(rank)
    if len(holders) > 1:
        found = "; ".join(f"{_ranks(ranks)}: {each}" for each, ranks in holders.items())
        raise UsageError(f"every rank must be given the same {what}, but they differ: {found}")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list_some(ranks)}"
