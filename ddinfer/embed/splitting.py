"""Lists and tensors over ranks: `split` them, `gather` them, and let the first rank go first.

`split` is arithmetic and exchanges nothing. `gather` is met by every rank of the group.
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
    """This rank's contiguous share of ``items``; the first ranks get one more.

    Every rank passes the same items, since nothing is exchanged. Without a process group the
    environment says which rank this is (torchrun's), and a process alone gets everything.

    Args:
        items: a list, tuple, range, tensor, numpy array (first dim), ``datasets.Dataset``, or a
            dict of those, nested too, all of one length. It is not changed.
        group: a ``torch.distributed`` process group; default: the whole world.
        pad: repeat the last item of all, so that every rank gets equally many; ``gather`` with
            ``num_items`` drops it again. There is no padding of nothing: 0 items stay 0.

    Returns:
        the same type as ``items``; a padded range is a list.

    Raises:
        TypeError: ``items`` is a string, a number, a generator or whatever else has no parts.
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
    """What every rank passes, joined in rank order, on every rank.

    Args:
        items: a list or tuple of any picklable objects; or a tensor or numpy array whose first
            dim may differ between ranks (one number counts as one row). A rank without rows may
            pass any shape. Tensors come back on the device they were on, without a gradient.
        num_items: of the whole that `split` was given: its padding is dropped, by its own rule.
        group: a ``torch.distributed`` process group; default: the whole world.

    Raises:
        TypeError: ``items`` is something else, such as a string or a dict; on every rank.
        UsageError: ranks pass different types, dtypes or shapes, or numbers that `split` would
            not give them; on every rank.
        RankError: one rank alone passed something wrong; on every rank.
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
    if isinstance(items, torch.Tensor):
        return _gather_tensor(ranks, items.detach(), num_items)
    array = np.ascontiguousarray(items)
    shapes = _gather_shapes(ranks, array.shape)
    parts = [part for part in ranks.all_gather_object(array) if len(part)] or [array]
    return np.concatenate(parts)[_kept_rows(shapes, num_items)]


def is_first_rank(group: Any = None) -> bool:
    """Whether this is rank 0 of the group; a process alone is."""
    return _place(group)[0] == 0


@contextlib.contextmanager
def first_rank_first(group: Any = None) -> Iterator[None]:
    """The first rank runs the body, then the others do: to download once, or to fill a cache.

    Raises:
        RankError: on the others, instead of their bodies, when the first rank's body raised; they
            do not wait for ever. The first rank raises its own error.
    """
    ranks = Group.borrow(group)
    ranks.enter("going first" if ranks.group_rank == 0 else "waiting for the first rank")
    if ranks.group_rank > 0:
        ranks.wait_for_peers(ranks.phase)
        yield
        return
    try:
        yield
    except BaseException as error:
        ranks.report_failure(error)
        raise
    ranks.wait_for_peers(ranks.phase)


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
    datasets = sys.modules.get("datasets")  # nobody has one who has not imported it
    return datasets is not None and isinstance(items, datasets.Dataset)


def _lengths(items: Any, name: str) -> Iterator[tuple[str, int]]:
    """Every leaf's name and length."""
    if isinstance(items, Mapping):
        for key, value in items.items():
            yield from _lengths(value, f"{name}[{key!r}]")
    elif isinstance(items, (torch.Tensor, np.ndarray)):
        if items.ndim == 0:
            raise TypeError(f"{name} is one number, which has no parts; split takes {_SPLITS}")
        yield name, len(items)
    elif isinstance(items, (list, tuple, range)) or _is_dataset(items):
        yield name, len(items)
    else:
        raise TypeError(f"{name} is {_what(items)}; split takes {_SPLITS}")


def _what(items: Any) -> str:
    name = type(items).__name__
    if isinstance(items, (str, bytes)):
        return f"one {name}: put it into a list"
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


def _gather_tensor(ranks: Group, tensor: torch.Tensor, num_items: int | None) -> torch.Tensor:
    if tensor.ndim == 0:
        tensor = tensor.reshape(1)
    shapes = _gather_shapes(ranks, tuple(tensor.shape))
    # As bytes, since no backend moves every dtype.
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    sizes = [math.prod(shape) * tensor.element_size() for shape in shapes]
    parts = _gather_bytes(ranks, flat, sizes)
    num_rows = sum(shape[0] for shape in shapes)
    whole = torch.cat(parts).view(tensor.dtype).reshape(num_rows, *shapes[0][1:])
    keep = torch.from_numpy(_kept_rows(shapes, num_items))
    return whole[keep.to(whole.device)].to(tensor.device)


def _gather_shapes(ranks: Group, shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Every rank's shape, one that has no rows like that of the others."""
    shapes: list[tuple[int, ...]] = ranks.all_gather_object(tuple(shape))
    rows = {each[1:] for each in shapes if each[0]} or {tuple(shape[1:])}
    if len(rows) > 1:
        found = ", ".join(
            f"rank {ranks.global_rank(k)}: {each}" for k, each in enumerate(shapes) if each[0]
        )
        raise UsageError(f"gather joins along the first dim, the others must be equal; {found}")
    (row,) = rows
    return [(each[0], *row) for each in shapes]


def _gather_bytes(ranks: Group, flat: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Every rank's bytes, on the device that its backend moves them on."""
    if ranks.device_group is None or not max(sizes):
        return [flat[:size] for size in sizes]
    import torch.distributed as dist

    on_gpu = flat.is_cuda and ranks.device.type == "cuda"
    device, group = (
        (flat.device, ranks.device_group) if on_gpu else (torch.device("cpu"), ranks.object_group)
    )
    mine = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    mine[: len(flat)] = flat
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine, group=group)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _kept(counts: Sequence[int], num_items: int | None) -> list[int]:
    """How many of each rank's items are no padding.

    Raises:
        UsageError: the counts are not what `split` gives, padded or not.
    """
    if num_items is None:
        return list(counts)
    num_ranks = len(counts)
    shares = [len(contiguous_slice(num_items, num_ranks, rank)) for rank in range(num_ranks)]
    padded = [_padded_length(num_items, num_ranks)] * num_ranks
    if any(count not in pair for count, *pair in zip(counts, shares, padded, strict=True)):
        raise UsageError(
            f"num_items={num_items} over {num_ranks} ranks makes {_listed(shares)} items, padded "
            f"{_listed(padded)}, but the ranks passed {_listed(counts)}"
        )
    return shares


def _kept_rows(shapes: Sequence[tuple[int, ...]], num_items: int | None) -> np.ndarray:
    """Indices, in the joined rows, of those that are no padding."""
    counts = [shape[0] for shape in shapes]
    starts = np.cumsum([0, *counts[:-1]])
    kept = _kept(counts, num_items)
    return np.concatenate(
        [np.arange(start, start + k) for start, k in zip(starts, kept, strict=True)]
    ).astype(np.int64)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
