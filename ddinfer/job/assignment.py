"""What rank 0 and the other ranks send one another: indices, never Requests or images."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from ddinfer.storage.journal import JournalHeader


class IndexBatches(Sequence[range]):
    """Batches of neighbouring indices, five bytes each when pickled: there may be millions."""

    def __init__(self, batches: Sequence[Sequence[int]] = ()):
        sizes = [len(batch) for batch in batches]
        self._starts = array("I", (batch[0] for batch in batches))
        self._sizes = array("B" if max(sizes, default=0) < 256 else "I", sizes)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, k: int) -> range: ...
    @overload
    def __getitem__(self, k: slice) -> Sequence[range]: ...

    def __getitem__(self, k: int | slice) -> range | Sequence[range]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        return range(self._starts[k], self._starts[k] + self._sizes[k])


@dataclass(frozen=True)
class Assignment:
    """What rank 0 sends the ranks of a replica; they read the Requests from the output directory.

    Attributes:
        batches: of this replica, a contiguous slice of the pending ones; with ``is_queue`` all of
            them, and ranks take the next one from a counter that they share.
        solo: batches of one prompt each, which run after those with nothing else in flight: a
            process has died twice with that prompt in flight.
        inexact: indices in ``solo`` whose planned batch is larger.
        skip: indices in a batch that have their image already. A batch always runs whole, but
            nothing is written twice.
        info: about the job, for every image's metadata.
        header: of this attempt's journals.
        model: folder or hub id.
        num_images, num_finished: of the whole job, and how many were made or failed before.
    """

    batches: IndexBatches
    is_queue: bool
    solo: IndexBatches
    inexact: frozenset[int]
    skip: frozenset[int]
    info: Mapping[str, Any]
    header: JournalHeader
    model: str
    num_threads: int
    num_images: int
    num_finished: int

    @property
    def is_empty(self) -> bool:
        return not self.batches and not self.solo

    def mask(self) -> bytearray:
        """1 at each index that a batch contains."""
        mask = bytearray(
            max((b.stop for some in (self.batches, self.solo) for b in some), default=0)
        )
        for some in (self.batches, self.solo):
            for batch in some:
                mask[batch.start : batch.stop] = b"\1" * len(batch)
        return mask


@dataclass(frozen=True)
class RankTimes:
    """How a rank spent its time, in seconds.

    Attributes:
        loading: until its model was ready.
        working: from there to its last image.
        pipeline: of that, inside the pipeline's own calls.
        stage: of a model that is cut over ranks; the images are counted on stage 0.
    """

    rank: int
    images: int
    loading: float
    working: float
    pipeline: float
    stage: int = 0


def load_balance(times: Sequence[RankTimes]) -> float:
    """Mean working time over the longest: 1.0 when all ranks ended together."""
    longest = max((t.working for t in times), default=0.0)
    return sum(t.working for t in times) / len(times) / longest if longest else 1.0
