"""Activations that go where the weights are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OneDevice(TorchFunctionMode):
    """Where an operation's tensors lie on several GPUs, they follow its first one.

    Code between blocks (a sum of a block's output and an embedding) then needs to know nothing.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tensors_in((args, kwargs)) if t.dim()]
        if len({t.device for t in tensors}) > 1 and getattr(func, "__name__", "") not in (
            "__get__", "__set__", "to", "copy_",
        ):  # fmt: skip
            first = tensors[0].device
            args, kwargs = to_device((args, kwargs), first)
        return func(*args, **kwargs)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def to_device(value: Any, device: torch.device) -> Any:
    """The same structure with its tensors on ``device``.

    Lists and dicts are changed in place: some models pass a cache through their blocks.
    """
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        changed = {key: to_device(item, device) for key, item in list(items)}
        for key, item in changed.items():
            if item is not value[key]:
                value[key] = item  # a ModelOutput keeps its attribute in step
        return value
    if isinstance(value, tuple):
        moved = [to_device(item, device) for item in value]
        if all(one is other for one, other in zip(moved, value, strict=True)):
            return value
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def spoken(device: torch.device) -> torch.device:
    """As tensors on it name it: ``cpu:0`` makes tensors that say ``cpu``."""
    return torch.empty(0, device=device).device
