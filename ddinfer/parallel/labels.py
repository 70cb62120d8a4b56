"""Which inputs and block outputs a value was computed from, found while a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddinfer.parallel.tensor_tree import storage_id, tensors_of

#: A source's name, such as ``("input", 0)``.
Label = tuple[Any, ...]

#: Tensor methods that hand contents to Python without passing the dispatcher.
INSPECTING = frozenset(
    getattr(torch.Tensor, name) for name in ("__array__", "numpy", "tolist", "__dlpack__")
)

#: Operations whose result, or its size, is decided by contents say so themselves.
DATA_DEPENDENT = frozenset((torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape))


class Tracker(TorchDispatchMode):
    """Propagates labels from storage to storage while operations run.

    Attributes:
        inspected: labels of tensors whose contents reached Python (``.item()``, ``bool()`` …) or
            decided a size (``x[mask]``, ``nonzero`` …).
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
        self._marked.setdefault(storage_id(tensor), set()).add(label)

    def labels(self, values: Any) -> frozenset[Label]:
        """Labels of every tensor inside ``values``."""
        found: frozenset[Label] = frozenset()
        for tensor in tensors_of(values):
            found |= self._labels.get(storage_id(tensor), frozenset())
        return found

    def _add(self, tensor: torch.Tensor, labels: Iterable[Label]) -> None:
        key = storage_id(tensor)
        if key not in self._labels:
            self._references.append(StorageWeakRef(tensor.untyped_storage()))
        self._labels[key] = self._labels.get(key, frozenset()) | frozenset(labels)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        labels = self.labels((args, kwargs))
        if DATA_DEPENDENT & set(func.tags):
            self.inspected |= self.labels(_deciding(func, args, kwargs))
        made = func(*args, **kwargs)
        if labels:
            for tensor in tensors_of(made):
                self._add(tensor, labels)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_of(value):
                    self.written |= self._marked.get(storage_id(tensor), set())
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


def _deciding(func: Any, args: Any, kwargs: Any) -> Any:
    """The arguments whose contents decide; of an index those that are masks."""
    if func.overloadpacket is torch.ops.aten.index:
        return [t for t in tensors_of(args[1]) if t.dtype in (torch.bool, torch.uint8)]
    return args, kwargs
