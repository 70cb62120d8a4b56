"""Who gets what, as pure arithmetic: no processes, no torch, no state."""

from __future__ import annotations

from collections.abc import Container, Hashable, Sequence
from typing import TypeVar

B = TypeVar("B")


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


def pending_batches(batches: Sequence[range], done: Container[int]) -> list[range]:
    """The batches of which any item is not in ``done``, whole and in order.

    A batch that is half done stays whole: its items must share it with the same neighbours.
    """
    return [batch for batch in batches if any(k not in done for k in batch)]


def slice_of_batches(batches: Sequence[B], num_parts: int, part: int) -> Sequence[B]:
    """The contiguous share of ``batches`` that belongs to ``part``. May be empty."""
    share = contiguous_slice(len(batches), num_parts, part)
    return batches[share.start : share.stop]
