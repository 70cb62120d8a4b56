"""Which rank does what: slices and batches as pure arithmetic, and replicas of several ranks."""

from __future__ import annotations

import datetime
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ddinfer.errors import UsageError

if TYPE_CHECKING:
    from ddinfer.config import JobConfig

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
    """This rank's place in the mesh of replicas: dp × pp, or dp × cfg × sp.

    Attributes:
        number: of the replica, hence its slice of the job's batches.
        num_replicas: in the job.
        stage: this rank's place in its replica; rank 0 of it makes the Results. With
            ``--pipeline_parallel`` the stage of the denoiser that it holds.
        ranks: global ranks of the replica, in order.
    """

    number: int
    num_replicas: int
    stage: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, rank: int, world_size: int, num_ranks: int, options: str = "") -> Replica:
        """Blocks of ``num_ranks`` neighbours are a replica.

        Args:
            options: that ask for it, for the message.

        Raises:
            UsageError: the number of ranks is not a multiple of ``num_ranks``.
        """
        if num_ranks < 1 or world_size % num_ranks:
            raise UsageError(
                f"{options or f'--pipeline_parallel {num_ranks}'} needs a number of ranks that "
                f"{num_ranks} divides; found {world_size}: use --nproc_per_node "
                f"{max(num_ranks, world_size // num_ranks * num_ranks)}"
            )
        number, stage = divmod(rank, num_ranks)
        first = number * num_ranks
        ranks = tuple(range(first, first + num_ranks))
        return cls(number, world_size // num_ranks, stage, ranks)

    @classmethod
    def of_job(cls, rank: int, world_size: int, config: JobConfig) -> Replica:
        """As a job's options say. One rank alone makes all guidance calls of ``--cfg_parallel``.

        Raises:
            UsageError: the number of ranks is not a multiple of the replica's.
        """
        size = config.ranks_per_replica
        if world_size == 1 and size == config.cfg_parallel:
            size = 1
        return cls.of(rank, world_size, size, config.team_options)

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
