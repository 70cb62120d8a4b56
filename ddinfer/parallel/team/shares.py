"""Which tokens each rank of a team has: arithmetic on the lengths of a block's token axes.

An axis is a tuple of *segments*: ``("image",)``, ``("text",)``, or both in the model's order where
they are joined. Every segment is cut into contiguous shares, so that a joint axis holds, on each
rank, its share of each segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ddinfer.distributed.partition import contiguous_slice

IMAGE, TEXT = "image", "text"
Axis = tuple[str, ...]


class Shares:
    """The tokens of one call over the ranks of a team.

    Args:
        lengths: tokens of each segment that is cut.
        num_ranks: of the team.
        rank: this one.
    """

    def __init__(self, lengths: Mapping[str, int], num_ranks: int, rank: int):
        self.lengths, self.num_ranks, self.rank = dict(lengths), num_ranks, rank

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shares) and self.lengths == other.lengths

    def length(self, axis: Axis) -> int:
        """Tokens of the whole axis."""
        return sum(self.lengths[segment] for segment in axis)

    def size(self, axis: Axis, rank: int | None = None) -> int:
        """Tokens of the axis that a rank (default: this one) has."""
        rank = self.rank if rank is None else rank
        return sum(len(self._share(segment, rank)) for segment in axis)

    def cut(self, whole: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        """This rank's tokens of a whole tensor."""
        parts, start = [], 0
        for segment in axis:
            share = self._share(segment, self.rank)
            parts.append(whole.narrow(dim, start + share.start, len(share)))
            start += self.lengths[segment]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: Sequence[torch.Tensor], dim: int, axis: Axis) -> torch.Tensor:
        """The whole tensor, in the model's order, of what all ranks have."""
        pieces, starts = [], [0] * self.num_ranks
        for segment in axis:
            for rank, part in enumerate(parts):
                size = len(self._share(segment, rank))
                pieces.append(part.narrow(dim, starts[rank], size))
                starts[rank] += size
        return torch.cat(pieces, dim)

    def _share(self, segment: str, rank: int) -> range:
        return contiguous_slice(self.lengths[segment], self.num_ranks, rank)
