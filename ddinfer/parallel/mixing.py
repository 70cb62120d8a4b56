"""Which arguments fall into rows, and whether rows stay apart: found without computing anything.

A model is run on fake tensors with two batch sizes. A dim whose size differs between the runs is
the batch's; an operation that makes a value without one such dim from values that have it looks
at several rows at once, and what it makes would be another in a microbatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ddinfer.errors import UsageError
from ddinfer.parallel.rows import Inputs, Outputs

#: Ways to tell batches from tensors that have as many rows by chance.
MAX_TRIES = 64

#: ``run(inputs, rows, others, watching)``: a model on arguments like `Inputs.sample` → its output.
#: ``others``: rows of leaves that are not cut; ``watching``: a mode that sees every operation.
Run = Callable[[Inputs, int, Mapping[int, int], Any], Any]


class CannotRun(Exception):
    """The model does not take such arguments, or cannot be followed. The message says why."""


def settle_rows(inputs: Inputs, name: str, run: Run, sizes: Sequence[int]) -> Inputs:
    """Which of the tensors with as many rows as the batch are really cut with it.

    A tensor may have as many rows by chance (a table, position ids of as many tokens). All are
    cut where rows then stay apart; else those go whole to every microbatch that may have another
    number of rows than the batch, or that the model takes only as they are.

    Args:
        name: of the model, for messages.
        sizes: three numbers that are no size of anything else.

    Raises:
        CannotRun: the model does not run with any choice.
        UsageError: the output does not fall into rows, or one row depends on others.
    """
    errors: list[Exception] = []
    for whole, is_free in itertools.islice(_choices(inputs), MAX_TRIES):
        attempt = replace(inputs, batched=inputs.batched - whole)
        others = dict.fromkeys(whole, sizes[2] if is_free else inputs.example_rows)
        try:
            _judge(attempt, name, run, sizes, others)
            return attempt
        except (CannotRun, UsageError) as failed:
            errors.append(failed)
            if "DataDependent" in str(failed):  # no choice of rows helps
                break
    raise next((e for e in errors if isinstance(e, UsageError)), errors[0])


def _choices(inputs: Inputs) -> Iterator[tuple[frozenset[int], bool]]:
    """Which tensors go whole, and whether they may have any number of rows."""
    doubtful = sorted(inputs.batched - {min(inputs.batched)})
    yield frozenset(), True
    groups = [frozenset((k,)) for k in doubtful]
    groups += [frozenset(pair) for pair in itertools.combinations(doubtful, 2)]
    groups += [frozenset(doubtful)] if len(doubtful) > 2 else []
    for is_free in (True, False):
        for group in groups:
            yield group, is_free


def _judge(
    inputs: Inputs, name: str, run: Run, sizes: Sequence[int], others: Mapping[int, int]
) -> None:
    """
    Raises:
        CannotRun, UsageError: these tensors cannot be the ones that are cut.
    """
    few, more, _ = sizes
    first = Recorder()
    fewer = run(inputs, few, others, first)
    second = Mixing(first)
    greater = run(inputs, more, others, second)
    Outputs.of(fewer, greater, few, name, more)
    culprit = second.culprit(greater) if second.is_aligned else None
    if culprit is not None:
        raise UsageError(
            f"{name} looks at several rows of the batch at once ({culprit}), so that its output "
            "would be another one in microbatches; expected rows that do not depend on one another"
        )
    if second.is_aligned and second.paired is not None:
        raise CannotRun(f"its rows belong to those of the batch ({second.paired})")


def settle_unwatched(inputs: Inputs, name: str, run: Run, sizes: Sequence[int]) -> Inputs:
    """Like `settle_rows`, for a model of which only outputs are seen.

    Raises:
        CannotRun: the model does not run with any choice.
        UsageError: the output does not fall into rows, or it cannot be told what is cut.
    """
    found: list[frozenset[int]] = []
    errors: list[Exception] = []
    for whole, is_free in itertools.islice(_choices(inputs), MAX_TRIES):
        if found and not is_free:
            break  # what may have any number of rows, or belongs to the batch, goes first
        attempt = replace(inputs, batched=inputs.batched - whole)
        others = dict.fromkeys(whole, sizes[2] if is_free else inputs.example_rows)
        try:
            made = [run(attempt, rows, others, None) for rows in sizes[:2]]
            Outputs.of(made[0], made[1], sizes[0], name, sizes[1])
            found.append(whole)
        except (CannotRun, UsageError) as failed:
            errors.append(failed)
        if found and not is_free:
            break
    if not found:
        raise next((e for e in errors if isinstance(e, UsageError)), errors[0])
    if len(found) > 1 and not found[0]:
        numbers = ", ".join(map(str, sorted(frozenset().union(*found))))
        raise UsageError(
            f"arguments {numbers} of {name} have {inputs.example_rows} rows like the batch, and "
            "it cannot be told whether they belong to it; prepare with an example batch of "
            "another size"
        )
    return replace(inputs, batched=inputs.batched - found[0])


def unused_sizes(model: nn.Module, inputs: Inputs, count: int = 3) -> list[int]:
    """The smallest numbers from 2 on that are no dim of a parameter or an argument."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [leaf for leaf in inputs.leaves if isinstance(leaf, torch.Tensor)]
    taken = {size for tensor in tensors for size in tensor.shape}
    return list(itertools.islice((n for n in itertools.count(2) if n not in taken), count))


class Recorder(TorchDispatchMode):
    """Notes the shapes that every operation makes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.shapes.append((str(func), [tuple(t.shape) for t in _tensors(made)]))
        return made


#: Operations that look along one dim and keep its size, by the place of ``dim`` among arguments.
ALONG = {
    "aten._softmax": 1,
    "aten._log_softmax": 1,
    "aten.cumsum": 1,
    "aten.cumprod": 1,
    "aten.flip": 1,
    "aten.sort": 1,
    "aten.argsort": 1,
}


#: Operations that take rows out of their first argument, by what the others say.
PICKING = ("aten.index", "aten.slice", "aten.index_select", "aten.gather", "aten.take")


class Mixing(TorchDispatchMode):
    """Follows a second run, with another batch, and finds values that were made across rows.

    Args:
        first: the `Recorder` of the first run.

    Attributes:
        is_aligned: both runs did the same; else nothing can be said.
        paired: an operation that took as many rows out of a table as the batch has, by their
            numbers: so they are the batch's rows.
    """

    def __init__(self, first: Recorder):
        super().__init__()
        self._first = iter(first.shapes)
        self.is_aligned = True
        self.paired: str | None = None
        self._tables: set[int] = set()  # storages that depend on a tensor that is not cut
        self._dims: dict[int, list[int]] = {}  # tensor → which of its dims are the batch's
        self._mixed: dict[int, str] = {}  # tensor → the operation at fault
        self._follows: set[int] = set()  # storages that depend on the batch
        self._alive: list[torch.Tensor] = []  # what an address names only while it lives

    def mark(self, tensor: torch.Tensor) -> None:
        """``tensor`` is cut into rows along its first dim."""
        self._alive.append(tensor)
        self._follows.add(_storage(tensor))
        self._dims[id(tensor)] = [0]

    def mark_table(self, tensor: torch.Tensor) -> None:
        """``tensor`` is not cut, although it could be."""
        self._alive.append(tensor)
        self._tables.add(_storage(tensor))

    def culprit(self, values: Any) -> str | None:
        """The operation that mixed rows in what ``values`` depend on, if one did."""
        found = (self._mixed.get(id(tensor)) for tensor in _tensors(values))
        return next((name for name in found if name is not None), None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        name, shapes = next(self._first, ("", []))
        tensors = _tensors(made)
        if name != str(func) or len(shapes) != len(tensors):
            self.is_aligned = False  # the flow depends on the batch; nothing can be said
        if not self.is_aligned:
            return made
        given = _tensors((args, kwargs))
        culprit = self.culprit(given)
        follows = any(_storage(tensor) in self._follows for tensor in given)
        across = follows and self._looks_across(func, args, kwargs)
        self._follow_tables(func, args, given, tensors, shapes)
        for tensor, before in zip(tensors, shapes, strict=True):
            if not follows:
                continue
            now = tuple(tensor.shape)
            dims = [d for d, (a, b) in enumerate(zip(before, now, strict=False)) if a != b]
            self._alive.append(tensor)
            self._follows.add(_storage(tensor))
            self._dims[id(tensor)] = dims
            blame = culprit
            if blame is None and (across or (len(dims) != 1 and tensor.numel())):
                blame = str(func)
            if blame is not None:
                self._mixed.setdefault(id(tensor), blame)
        return made

    def _follow_tables(
        self, func: Any, args: Any, given: Any, tensors: Any, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        if not any(_storage(tensor) in self._tables for tensor in given):
            return
        for tensor in tensors:
            self._alive.append(tensor)
            self._tables.add(_storage(tensor))
        has_rows = any(tuple(t.shape) != before for t, before in zip(tensors, shapes, strict=True))
        follows = any(_storage(tensor) in self._follows for tensor in given)
        if str(func).rpartition(".")[0] in PICKING and has_rows and not follows:
            self.paired = str(func)

    def _looks_across(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation that keeps all sizes looks along the batch."""
        name = str(func).rpartition(".")[0]
        if name in ALONG and len(args) > ALONG[name] and isinstance(args[0], torch.Tensor):
            asked = args[ALONG[name]]
            along = asked if isinstance(asked, (list, tuple)) else [asked]
            dims = self._dims.get(id(args[0]), [])
            return any(isinstance(d, int) and d % max(args[0].dim(), 1) in dims for d in along)
        if name == "aten.index" and isinstance(args[0], torch.Tensor):
            dims = self._dims.get(id(args[0]), [])
            chosen = [args[1][d] for d in dims if d < len(args[1])]
            return any(
                isinstance(index, torch.Tensor) and _storage(index) in self._follows
                for index in chosen
            )
        return False


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
