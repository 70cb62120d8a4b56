"""`split` and `gather` of lists and tensors over ranks, and `first_rank_first`.

`split` is arithmetic and communicates nothing. `gather` is a collective.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ddinfer.distributed.collectives import require_same
from ddinfer.distributed.partition import contiguous_slice
from ddinfer.distributed.process_group import Group
from ddinfer.distributed.world import World
from ddinfer.errors import UsageError

_SPLITS = "a list, tuple, range, tensor, numpy array, datasets.Dataset, or a dict of those"


def split(items: Any, group: Any = None, pad: bool = False) -> Any:
    """This rank's contiguous slice of ``items``; the first ranks get one more.

    Every rank passes the same items; nothing is communicated. Without a process group, rank and
    world size are those of torchrun's environment; a single process gets everything.

    Args:
        items: a list, tuple, range, tensor, numpy array (first dim), ``datasets.Dataset``, or a
            dict of those (may be nested), all of one length. It is not modified.
        group: a ``torch.distributed`` process group; default: the whole world.
        pad: repeat the last item of all, so that every rank gets equally many; ``gather`` with
            ``num_items`` drops it again. 0 items stay 0.

    Returns:
        the same type as ``items``; a padded range is a list.

    Raises:
        TypeError: ``items`` is a string, a number, a generator or anything else without a length.
        UsageError: the values of a dict have different lengths.
    """
    lengths = dict(_lengths(items, "items"))
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise UsageError(f"split needs values of one length, but {found}")
    num_items = next(iter(lengths.values()), 0)
    rank, num_ranks = _place(group)
    share = contiguous_slice(num_items, num_ranks, rank)
    num_padding = _padded_length(num_items, num_ranks) - len(share) if pad else 0
    return _part(items, share, num_padding, pad)


@contextlib.contextmanager
def split_between_processes(items: Any, group: Any = None, pad: bool = False) -> Iterator[Any]:
    """`split` as a context manager: ``with split_between_processes(prompts) as mine:``."""
    yield split(items, group, pad)


def gather(items: Any, num_items: int | None = None, group: Any = None) -> Any:
    """Concatenate what every rank passes, in rank order, on every rank.

    Args:
        items: a list or tuple of any picklable objects; or a tensor or numpy array whose first
            dim may differ between ranks (one number counts as one row). A rank without rows may
            pass any shape. Tensors come back on the device they were on, without a gradient.
        num_items: length of what `split` was given; its padding is dropped.
        group: a ``torch.distributed`` process group; default: the whole world.

    Raises:
        TypeError: ``items`` is something else, such as a string or a dict; on every rank.
        UsageError: ranks pass different types, dtypes or shapes, or lengths that `split` does
            not produce; on every rank.
        RankError: only one rank passed something wrong; on every rank.
    """
    ranks = Group.borrow(group)
    ranks.enter("gathering")
    kind, failure = None, None
    try:
        kind = _kind(items)
    except TypeError as error:
        failure = error
    digest = None if kind is None else f"{kind}, num_items={num_items}"
    require_same(ranks, "kind of items", digest, failure)
    if isinstance(items, (list, tuple)):
        parts = ranks.all_gather_object(items)
        keep = _kept(list(map(len, parts)), num_items)
        joined = [item for part, k in zip(parts, keep, strict=True) for item in part[:k]]
        return joined if isinstance(items, list) else tuple(joined)
    mine = items.detach().cpu() if isinstance(items, torch.Tensor) else items
    rows = _concatenable(ranks.all_gather_object(mine if mine.ndim else mine.reshape(1)), ranks)
    kept = _kept_rows([len(part) for part in rows], num_items)
    if isinstance(items, torch.Tensor):
        return torch.cat(rows)[torch.from_numpy(kept)].to(items.device)
    return np.concatenate(rows)[kept]


def is_first_rank(group: Any = None) -> bool:
    """Whether this is rank 0 of the group; a single process is."""
    return _place(group)[0] == 0


@contextlib.contextmanager
def first_rank_first(group: Any = None) -> Iterator[None]:
    """Rank 0 of the group runs the body first, then the others: to download or to cache once.

    Raises:
        RankError: on the other ranks, before their bodies, when the first rank's body raised. The
            first rank raises its own error.
    """
    ranks = Group.borrow(group)
    ranks.enter("going first" if ranks.group_rank == 0 else "waiting for the first rank")
    if ranks.group_rank > 0:
        ranks.wait_for_peers()
        yield
        return
    try:
        yield
    except BaseException as error:
        ranks.report_failure(error)
        raise
    ranks.wait_for_peers()


def _place(group: Any) -> tuple[int, int]:
    """(rank, number of ranks), without an exchange."""
    if group is None:
        world = World.detect("cpu")
        return world.rank, world.world_size
    import torch.distributed as dist

    rank = dist.get_rank(group)
    if rank < 0:
        raise UsageError(
            f"rank {dist.get_rank()} is not in the group: only its ranks may call this"
        )
    return rank, dist.get_world_size(group)


def _padded_length(num_items: int, num_ranks: int) -> int:
    return math.ceil(num_items / num_ranks)


# Splitting


def _is_dataset(items: Any) -> bool:
    datasets = sys.modules.get("datasets")  # a Dataset exists only where it was imported
    return datasets is not None and isinstance(items, datasets.Dataset)


def _lengths(items: Any, name: str) -> Iterator[tuple[str, int]]:
    """Every leaf's name and length."""
    if isinstance(items, Mapping):
        for key, value in items.items():
            yield from _lengths(value, f"{name}[{key!r}]")
    elif isinstance(items, (torch.Tensor, np.ndarray)):
        if items.ndim == 0:
            raise TypeError(f"{name} is a scalar, which cannot be split; split takes {_SPLITS}")
        yield name, len(items)
    elif isinstance(items, (list, tuple, range)) or _is_dataset(items):
        yield name, len(items)
    else:
        raise TypeError(f"{name} is {_what(items)}; split takes {_SPLITS}")


def _what(items: Any) -> str:
    name = type(items).__name__
    if isinstance(items, (str, bytes)):
        return f"a single {name}: put it into a list"
    if isinstance(items, Iterator):
        return f"a {name}, which can be read only once: make a list of it"
    return f"a {name}"


def _part(items: Any, share: range, num_padding: int, pad: bool) -> Any:
    if isinstance(items, Mapping):
        return {key: _part(value, share, num_padding, pad) for key, value in items.items()}
    if _is_dataset(items):
        return items.select([*share, *[len(items) - 1] * num_padding])
    part = items[share.start : share.stop]
    if isinstance(items, torch.Tensor):
        return torch.cat([part, *[items[-1:]] * num_padding]) if num_padding else part
    if isinstance(items, np.ndarray):
        return np.concatenate([part, *[items[-1:]] * num_padding]) if num_padding else part
    if isinstance(items, range) and pad:
        part = list(part)
    return part + type(part)([items[-1]] * num_padding) if num_padding else part


# Gathering


def _kind(items: Any) -> str:
    if isinstance(items, torch.Tensor):
        if items.layout is not torch.strided:
            raise TypeError(f"gather takes dense tensors, got layout {items.layout}")
        return f"tensor of {items.dtype}"
    if isinstance(items, np.ndarray):
        return f"array of {items.dtype.kind if items.dtype.kind in 'US' else items.dtype}"
    if isinstance(items, (list, tuple)):
        return "list" if isinstance(items, list) else "tuple"
    hint = "gather each of its values" if isinstance(items, Mapping) else "put it into a list"
    raise TypeError(
        f"gather takes a list, a tuple, a tensor or a numpy array, got {type(items).__name__}; "
        + hint
    )


def _concatenable(parts: Sequence[Any], ranks: Group) -> list[Any]:
    """The ranks' arrays; an empty one gets the row shape of the others.

    Raises:
        UsageError: rows of different shapes.
    """
    shapes = {tuple(part.shape[1:]) for part in parts if len(part)} or {tuple(parts[0].shape[1:])}
    if len(shapes) > 1:
        found = ", ".join(
            f"rank {ranks.ranks[k]}: {tuple(part.shape)}"
            for k, part in enumerate(parts)
            if len(part)
        )
        raise UsageError(f"gather joins along the first dim, the others must be equal; {found}")
    (shape,) = shapes
    return [part.reshape(len(part), *shape) for part in parts]


def _kept(counts: Sequence[int], num_items: int | None) -> list[int]:
    """How many of each rank's items are not padding.

    Raises:
        UsageError: the counts are not those of `split`, with or without padding.
    """
    if num_items is None:
        return list(counts)
    num_ranks = len(counts)
    shares = [len(contiguous_slice(num_items, num_ranks, rank)) for rank in range(num_ranks)]
    padded = [_padded_length(num_items, num_ranks)] * num_ranks
    if any(count not in pair for count, *pair in zip(counts, shares, padded, strict=True)):
        raise UsageError(
            f"num_items={num_items} over {num_ranks} ranks gives {_comma_separated(shares)} items, "
            f"with padding {_comma_separated(padded)}, but the ranks passed "
            f"{_comma_separated(counts)}"
        )
    return shares


def _kept_rows(counts: Sequence[int], num_items: int | None) -> np.ndarray:
    """Indices of the concatenated rows that are not padding."""
    starts = np.cumsum([0, *counts[:-1]])
    kept = _kept(counts, num_items)
    return np.concatenate(
        [np.arange(start, start + k) for start, k in zip(starts, kept, strict=True)]
    ).astype(np.int64)


def _comma_separated(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
