"""What one stage hands to the next: nested values of tensors, kept in memory and on disk.

A tensor comes back on its device with its bits, its strides and its alignment, since kernels may
round by the latter two. The file that takes what memory does not has no name, so that it is gone
with the process however that ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

#: Kernels load vectors of at most so many bytes at once.
_ALIGNMENT = 64


class RecordsLost(BaseException):
    """The file of records could not be written or read.

    No ``Exception``, since it passes through a pipeline's call: no prompt is at fault.
    """


class CannotKeep(TypeError):
    """A value that is neither a tensor, nor plain, nor made of such."""


@dataclass(frozen=True)
class Layout:
    """A tensor without its bytes.

    Attributes:
        misalignment: its address modulo 64.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    misalignment: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        stride = tensor.stride()
        if not _is_plain(tensor.shape, stride):
            stride = torch.empty(tensor.shape, device="meta").stride()
        address = tensor.data_ptr() % _ALIGNMENT
        return cls(tuple(tensor.shape), tuple(stride), tensor.dtype, tensor.device, address)

    def expanded(self) -> tuple[int, ...]:
        """The dims along which all elements are one."""
        return tuple(k for k, s in enumerate(self.stride) if s == 0 and self.shape[k] > 1)

    def make(
        self, data: torch.Tensor | None = None, device: torch.device | None = None
    ) -> torch.Tensor:
        """A fresh tensor of this layout with ``data`` (what `packed` gave), or zeros.

        Args:
            device: another one than it had.
        """
        shape = tuple(1 if k in self.expanded() else n for k, n in enumerate(self.shape))
        span = 1 + sum(max(n - 1, 0) * s for n, s in zip(shape, self.stride, strict=True))
        size = self.dtype.itemsize
        where = self.device if device is None else device
        flat = torch.empty(span + _ALIGNMENT // size, dtype=self.dtype, device=where)
        gap = (self.misalignment - flat.data_ptr()) % _ALIGNMENT
        made = flat.as_strided(shape, self.stride, gap // size if gap % size == 0 else 0)
        if data is None:
            made.zero_()
        else:
            made.copy_(data)
        return made.expand(self.shape)


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """The elements on the host, contiguous; those of an expanded dim once."""
    for dim in Layout.of(tensor).expanded():
        tensor = tensor.narrow(dim, 0, 1)
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()


def _is_plain(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether no two elements overlap but along expanded dims, with small gaps at most."""
    needed, count = 1, 1
    dims = sorted((s, n) for s, n in zip(stride, shape, strict=True) if n > 1 and s > 0)
    for step, number in dims:
        if step < needed:
            return False
        needed = step * (number - 1) + needed
        count *= number
    return needed <= 4 * count


@dataclass(frozen=True)
class _Hole:
    """Where a tensor was."""

    number: int
    layout: Layout


def take_apart(value: Any) -> tuple[Any, list[torch.Tensor]]:
    """A nested value → the same with holes for its tensors, and the tensors.

    Raises:
        CannotKeep: it holds something else than tensors and plain values.
    """
    tensors: list[torch.Tensor] = []

    def walk(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            tensors.append(item)
            return _Hole(len(tensors) - 1, Layout.of(item))
        return _map(item, walk)

    return walk(value), tensors


def put_together(shape: Any, tensor: Callable[[_Hole], torch.Tensor]) -> Any:
    """The value whose holes ``tensor`` fills."""

    def walk(item: Any) -> Any:
        return tensor(item) if isinstance(item, _Hole) else _map(item, walk)

    return walk(shape)


def zeros_like(shape: Any) -> Any:
    """The value with zeros in its holes."""
    return put_together(shape, lambda hole: hole.layout.make())


def _map(item: Any, walk: Callable[[Any], Any]) -> Any:
    if item is None or isinstance(item, (bool, int, float, str, torch.dtype, torch.device)):
        return item
    if isinstance(item, dict):  # transformers' and diffusers' outputs are dicts too
        items = {key: walk(part) for key, part in item.items()}
        return type(item)(**items) if type(item) is not dict else items
    if isinstance(item, (list, tuple)):
        parts = [walk(part) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    raise CannotKeep(f"{type(item).__module__}.{type(item).__name__}")


def digest(*values: Any) -> str | None:
    """A hash of nested values, tensors by their bytes; ``None`` where one cannot be told.

    Devices do not count: another stage may compute on another one.
    """
    found = hashlib.sha256()

    def walk(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            found.update(packed(item).view(-1).view(torch.uint8).numpy().tobytes())
            return tuple(item.shape), item.dtype
        return "a device" if isinstance(item, torch.device) else _map(item, walk)

    try:
        found.update(repr(walk(values)).encode())
    except CannotKeep:
        return None
    return found.hexdigest()


@dataclass(frozen=True)
class Ticket:
    """What `Records.get` takes.

    Attributes:
        home: the main device when it was put.
        place: where it is in the file; ``None``: in memory.
    """

    number: int
    shape: Any
    num_bytes: int
    home: torch.device | None = None
    place: int | None = None


class Records:
    """Values by ticket. The first ones stay in host memory, the others go to a file.

    Args:
        memory_bytes: how much of them stays in memory.
        folder: where the file is; default: the system's folder for temporary files.

    Attributes:
        home: the main device at present. What was on the main device when it was put comes back
            on this one, which another stage may have chosen; everything else, where it was.
        num_bytes: of everything put, less what was dropped from memory.
        spilled_bytes: of the file.
    """

    def __init__(self, memory_bytes: int, folder: Path | None = None):
        self.memory_bytes, self.folder = memory_bytes, folder
        self.home: torch.device | None = None
        self.num_bytes = self.held_bytes = self.spilled_bytes = 0
        self._held: dict[int, list[torch.Tensor]] = {}
        self._count = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def put(self, value: Any) -> Ticket:
        """
        Raises:
            CannotKeep: something in it is no tensor and not plain.
            RecordsLost: the disk said no.
        """
        shape, tensors = take_apart(value)
        data = [packed(tensor) for tensor in tensors]
        size = sum(tensor.nbytes for tensor in data)
        self._count += 1
        self.num_bytes += size
        ticket = Ticket(self._count, shape, size, self.home)
        if self.held_bytes + size <= self.memory_bytes:
            self._held[ticket.number] = data
            self.held_bytes += size
            return ticket
        return replace(ticket, place=self._write(data))

    def get(self, ticket: Ticket) -> Any:
        """The value, its tensors fresh ones."""
        data = self._held[ticket.number] if ticket.place is None else self._read(ticket.place)

        def made(hole: _Hole) -> torch.Tensor:
            is_home = hole.layout.device == ticket.home
            return hole.layout.make(data[hole.number], self.home if is_home else None)

        return put_together(ticket.shape, made)

    def drop(self, ticket: Ticket) -> None:
        """Frees what it takes in memory; the file shrinks with the last only."""
        if self._held.pop(ticket.number, None) is not None:
            self.held_bytes -= ticket.num_bytes
            self.num_bytes -= ticket.num_bytes

    def _write(self, data: list[torch.Tensor]) -> int:
        from safetensors.torch import save

        written = save({str(number): tensor for number, tensor in enumerate(data)})
        with self._told():
            if self._file is None:
                # Closed by __exit__; it lives as long as the round does. Unbuffered: an error is
                # told where it happens.
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            place = self._file.seek(0, 2)
            left = memoryview(len(written).to_bytes(8, "little") + written)
            while left:
                left = left[self._file.write(left) :]
        self.spilled_bytes += len(written)
        return place

    def _read(self, place: int) -> list[torch.Tensor]:
        from safetensors.torch import load

        assert self._file is not None
        with self._told():
            self._file.seek(place)
            count = int.from_bytes(self._read_all(8), "little")
            found = load(self._read_all(count))
        return [found[str(number)] for number in range(len(found))]

    def _read_all(self, count: int) -> bytes:
        assert self._file is not None
        pieces: list[bytes] = []
        while count:
            piece = self._file.read(count)
            if not piece:
                raise OSError("the file ends before its last record does")
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise RecordsLost(
                f"embeddings and latents between stages could not be kept in a file in {where} "
                f"({self.spilled_bytes} bytes so far): {error.strerror or error}"
            ) from error
