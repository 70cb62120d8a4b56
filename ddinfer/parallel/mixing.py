"""Which arguments fall into rows, and whether rows stay apart: found without computing anything.

A model is run on fake tensors with two batch sizes. A dim whose size differs between the runs is
the batch's; an operation that makes a value without one such dim from values that have it looks
at several rows at once, and what it makes would be another in a microbatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
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

#: Runs a model like `Inputs.sample` → its output. ``others`` are rows of leaves that are not cut.
Run = Callable[[Inputs, int, Mapping[int, int]], Any]


class CannotRun(Exception):
    """The model does not take such arguments, or cannot be followed. The message says why."""


def settle_rows(inputs: Inputs, name: str, run: Run, sizes: Sequence[int]) -> Inputs:
    """Which of the tensors with as many rows as the batch are really cut with it.

    A tensor may have as many rows by chance (position ids of as many tokens, a table). One that
    may have *another* number of rows than the batch does not belong to it, and goes whole to
    every microbatch. One that may not is cut, where the model runs with it cut; else it is left
    as it is.

    Args:
        name: of the model, for messages.
        sizes: three numbers that are no size of anything else.

    Raises:
        CannotRun: the model does not run with any choice.
        UsageError: the output does not fall into rows.
    """
    doubtful = sorted(inputs.batched - {min(inputs.batched)})
    found = _first_that_runs(inputs, doubtful, name, run, sizes)
    left = [k for k in doubtful if k in found.batched]
    groups = [(k,) for k in left]
    free = {k for (k,) in groups if _is_free(found, (k,), name, run, sizes)}
    rest = [k for k in left if k not in free]
    together = [rest] if len(rest) > 2 else []
    for group in [*together, *itertools.combinations(rest, 2)][:MAX_TRIES]:
        if len(group) > 1 and _is_free(found, tuple(group), name, run, sizes):
            free.update(group)
    settled = replace(found, batched=found.batched - free)
    return settled if not free or _falls(settled, name, run, sizes) else found


def _first_that_runs(
    inputs: Inputs, doubtful: Sequence[int], name: str, run: Run, sizes: Sequence[int]
) -> Inputs:
    """With all of them cut, else with one or two left as they are."""
    tries = [frozenset[int]()]
    tries += [frozenset(left) for n in (1, 2) for left in itertools.combinations(doubtful, n)]
    first: Exception | None = None
    for whole in tries[:MAX_TRIES]:
        attempt = replace(inputs, batched=inputs.batched - whole)
        try:
            _outputs(attempt, name, run, sizes, ())
            return attempt
        except (CannotRun, UsageError) as failed:
            first = first or failed
            if "DataDependent" in str(failed):  # no choice of rows helps
                break
    assert first is not None  # the first try failed
    raise first


def _is_free(
    inputs: Inputs, leaves: tuple[int, ...], name: str, run: Run, sizes: Sequence[int]
) -> bool:
    """Whether these tensors may have another number of rows than the batch."""
    try:
        attempt = replace(inputs, batched=inputs.batched - set(leaves))
        _outputs(attempt, name, run, sizes, leaves)
    except (CannotRun, UsageError):
        return False
    return True


def _falls(inputs: Inputs, name: str, run: Run, sizes: Sequence[int]) -> bool:
    try:
        _outputs(inputs, name, run, sizes, ())
    except (CannotRun, UsageError):
        return False
    return True


def _outputs(
    inputs: Inputs, name: str, run: Run, sizes: Sequence[int], free: Sequence[int]
) -> Outputs:
    few, more, other = sizes
    others = dict.fromkeys(free, other)
    made = [run(inputs, rows, others) for rows in (few, more)]
    return Outputs.of(made[0], made[1], few, name, more)


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


class Mixing(TorchDispatchMode):
    """Follows a second run, with another batch, and finds values that were made across rows.

    Args:
        first: the `Recorder` of the first run.
    """

    def __init__(self, first: Recorder):
        super().__init__()
        self._first = iter(first.shapes)
        self.is_aligned = True
        self._dims: dict[int, list[int]] = {}  # tensor → which of its dims are the batch's
        self._mixed: dict[int, str] = {}  # tensor → the operation at fault
        self._follows: set[int] = set()  # storages that depend on the batch
        self._alive: list[torch.Tensor] = []  # what an address names only while it lives

    def mark(self, tensor: torch.Tensor) -> None:
        """``tensor`` is cut into rows along its first dim."""
        self._alive.append(tensor)
        self._follows.add(_storage(tensor))
        self._dims[id(tensor)] = [0]

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


def refuse_mixing(name: str, run: Callable[[Any, int], Any], rows: int) -> None:
    """Refuse a model in whose output one row depends on others.

    Args:
        name: of the model, for messages.
        run: ``run(mode, rows)``: the model under a mode, its cut inputs marked → its output.

    Raises:
        UsageError: it does.
    """
    first = Recorder()
    run(first, rows)
    second = Mixing(first)
    output = run(second, rows + 1)
    culprit = second.culprit(output) if second.is_aligned else None
    if culprit is not None:
        raise UsageError(
            f"{name} looks at several rows of the batch at once ({culprit}), so that its output "
            "would be another one in microbatches; expected rows that do not depend on one another"
        )


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
