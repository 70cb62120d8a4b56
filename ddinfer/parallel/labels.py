"""Which inputs and block outputs a value was computed from, found while a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: A source's name, such as ``("input", 0)``.
Label = tuple[Any, ...]

#: Tensor methods that hand contents to Python without passing the dispatcher.
INSPECTING = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__"),
        *("item", "tolist", "numpy", "nonzero", "unique", "unique_consecutive"),
        *("masked_select", "repeat_interleave"),
    )
) | {torch.nonzero, torch.unique, torch.unique_consecutive, torch.masked_select}


class Tracker(TorchDispatchMode):
    """Propagates labels from storage to storage while operations run.

    Attributes:
        inspected: labels of tensors whose contents reached Python (``.item()``, ``bool()`` …).
        written: labels of the marked tensors that were changed in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inspected: set[Label] = set()
        self.written: set[Label] = set()
        self._labels: dict[int, frozenset[Label]] = {}
        self._marked: dict[int, set[Label]] = {}
        # Keeps each storage's address its own, but not its memory.
        self._references: list[StorageWeakRef] = []
        self._functions = _Inspections(self)

    def __enter__(self) -> Tracker:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        self._functions.__exit__(*details)

    def mark(self, tensor: torch.Tensor, label: Label) -> None:
        """``tensor`` is a source: from now on what is computed from it carries ``label``."""
        self._add(tensor, {label})
        self._marked.setdefault(_storage(tensor), set()).add(label)

    def labels(self, values: Any) -> frozenset[Label]:
        """Labels of every tensor inside ``values``."""
        found: frozenset[Label] = frozenset()
        for tensor in _tensors(values):
            found |= self._labels.get(_storage(tensor), frozenset())
        return found

    def _add(self, tensor: torch.Tensor, labels: Iterable[Label]) -> None:
        key = _storage(tensor)
        if key not in self._labels:
            self._references.append(StorageWeakRef(tensor.untyped_storage()))
        self._labels[key] = self._labels.get(key, frozenset()) | frozenset(labels)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        labels = self.labels((args, kwargs))
        made = func(*args, **kwargs)
        if labels:
            for tensor in _tensors(made):
                self._add(tensor, labels)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    self.written |= self._marked.get(_storage(tensor), set())
                    if labels:
                        self._add(tensor, labels)
        return made


class _Inspections(TorchFunctionMode):
    def __init__(self, tracker: Tracker):
        super().__init__()
        self.tracker = tracker

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in INSPECTING:
            self.tracker.inspected |= self.tracker.labels((args, kwargs))
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
