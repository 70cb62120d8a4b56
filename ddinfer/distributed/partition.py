"""Which rank does what: slices and batches as pure arithmetic, and replicas of several ranks."""

from __future__ import annotations

import datetime
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ddinfer.errors import UsageError

B = TypeVar("B")

#: A stage may wait for another's work of any length; a rank that is gone closes its connection.
_LONG_TIMEOUT = datetime.timedelta(days=7)


def contiguous_slice(num_items: int, num_parts: int, part: int) -> range:
    """Indices of ``part`` when ``num_items`` are cut into ``num_parts`` neighbouring slices.

    Sizes differ by at most one, larger ones first; with fewer items than parts the last slices
    are empty. Every item is in exactly one slice, and slices in order give the items in order.

    Raises:
        ValueError: a negative number of items, no parts, or ``part`` out of range.
    """
    if num_items < 0 or num_parts < 1 or not 0 <= part < num_parts:
        raise ValueError(
            f"cannot take part {part} of {num_items} items in {num_parts} parts: "
            "need num_items >= 0 and 0 <= part < num_parts"
        )
    size, larger = divmod(num_items, num_parts)
    start = part * size + min(part, larger)
    return range(start, start + size + (part < larger))


def cut_batches(keys: Sequence[Hashable], batch_size: int) -> list[range]:
    """Item indices cut into batches: neighbours with equal keys, at most ``batch_size`` each.

    The ranges cover all items in order. Only the keys and the size decide the cut, so that who
    shares a batch depends neither on the number of ranks nor on what is already done.

    Raises:
        ValueError: ``batch_size`` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    batches: list[range] = []
    start = 0
    for k in range(1, len(keys) + 1):
        if k == len(keys) or k - start == batch_size or keys[k] != keys[start]:
            batches.append(range(start, k))
            start = k
    return batches


def slice_of_batches(batches: Sequence[B], num_parts: int, part: int) -> Sequence[B]:
    """The contiguous share of ``batches`` that belongs to ``part``. May be empty."""
    share = contiguous_slice(len(batches), num_parts, part)
    return batches[share.start : share.stop]


@dataclass(frozen=True)
class Replica:
    """This rank's place in the mesh of dp × pp.

    Attributes:
        number: of the replica, hence its slice of the job's batches.
        num_replicas: in the job.
        stage: of the denoiser that this rank holds; stage 0 makes the Results.
        ranks: global ranks of the replica, in stage order.
    """

    number: int
    num_replicas: int
    stage: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, rank: int, world_size: int, num_stages: int) -> Replica:
        """Blocks of ``num_stages`` neighbours are a replica.

        Raises:
            UsageError: the ranks do not come out even.
        """
        if num_stages < 1 or world_size % num_stages:
            raise UsageError(
                f"--pipeline_parallel {num_stages} needs a number of ranks that {num_stages} "
                f"divides; found {world_size}: say --nproc_per_node "
                f"{max(num_stages, world_size // num_stages * num_stages)}"
            )
        number, stage = divmod(rank, num_stages)
        first = number * num_stages
        ranks = tuple(range(first, first + num_stages))
        return cls(number, world_size // num_stages, stage, ranks)

    @property
    def makes_results(self) -> bool:
        return self.stage == 0

    def process_group(self) -> Any:
        """The replica's process group. Every rank of the job calls this at the same point."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return None
        size, mine = len(self.ranks), None
        # On the CPU control messages share this group, and they may wait for work of any length.
        timeout = _LONG_TIMEOUT if dist.get_backend() == "gloo" else None
        for number in range(self.num_replicas):
            ranks = list(range(number * size, (number + 1) * size))
            group = dist.new_group(ranks, timeout=timeout)
            mine = group if number == self.number else mine
        return mine
