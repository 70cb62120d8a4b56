"""How several tensors travel as one buffer of bytes, strides included.

Both sides know the layout beforehand, so a message is nothing but bytes. Strides are kept,
because another memory order can make a kernel round differently.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

#: Bytes. torch aligns its own CPU allocations so; kernels can round differently elsewhere.
ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in the buffer: ``offset`` in bytes, ``stride`` in elements."""

    name: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The tensors of one message, in order."""

    places: tuple[Place, ...]
    num_bytes: int

    @property
    def names(self) -> tuple[Any, ...]:
        return tuple(place.name for place in self.places)

    def only(self, names: Collection[Any]) -> Layout:
        """The layout of a message that carries just these of the tensors."""
        places, offset = [], 0
        for place in self.places:
            if place.name in names:
                places.append(replace(place, offset=offset))
                offset += _padded(place.num_bytes)
        return Layout(tuple(places), offset)

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.num_bytes, dtype=torch.uint8, device=device)

    def pack(self, values: Mapping[Any, torch.Tensor], device: torch.device) -> torch.Tensor:
        """The values of this layout's names as bytes, shape ``(num_bytes,)``.

        Raises:
            ValueError: a value has another shape or dtype than the layout.
        """
        buffer = self.empty(device)
        for place in self.places:
            value = values[place.name]
            if tuple(value.shape) != place.shape or value.dtype != place.dtype:
                raise ValueError(
                    f"{place.name} has shape {tuple(value.shape)} and dtype {value.dtype}, "
                    f"expected {place.shape} and {place.dtype}"
                )
            _view(buffer, place).copy_(value)
        return buffer

    def empty_values(self, device: torch.device) -> dict[Any, torch.Tensor]:
        """A tensor of its own for each name, not initialized."""
        return {
            place.name: torch.empty_strided(
                place.shape, place.stride, dtype=place.dtype, device=device
            )
            for place in self.places
        }

    def unpack(self, buffer: torch.Tensor) -> dict[Any, torch.Tensor]:
        """Views into ``buffer``, by name."""
        return {place.name: _view(buffer, place) for place in self.places}


def layout_of(values: Mapping[Any, torch.Tensor]) -> Layout:
    """The layout of a message that carries ``values`` (fake or meta tensors will do)."""
    places, offset = [], 0
    for name, value in values.items():
        shape = tuple(value.shape)
        place = Place(name, shape, _dense_stride(value), value.dtype, offset)
        places.append(place)
        offset += _padded(place.num_bytes)
    return Layout(tuple(places), offset)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _dense_stride(value: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides where it fills its memory without gaps, else contiguous ones."""
    shape, stride = tuple(value.shape), tuple(value.stride())
    expected = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if step != expected:
            return tuple(torch.empty(shape, device="meta").stride())
        expected *= size
    return stride


def _view(buffer: torch.Tensor, place: Place) -> torch.Tensor:
    flat = buffer[place.offset : place.offset + place.num_bytes].view(place.dtype)
    return flat.as_strided(place.shape, place.stride, flat.storage_offset())
