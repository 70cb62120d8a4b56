"""The mesh of dp × pp: neighbouring ranks that hold one model together are a replica."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from ddinfer.errors import UsageError

#: A stage may wait for another's work of any length; a rank that is gone closes its connection.
_LONG_TIMEOUT = datetime.timedelta(days=7)


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
