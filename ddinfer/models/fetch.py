"""Bytes on the host or on disk, and bringing them in: the next group while this one computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ddinfer.models.checkpoint import StoredTensor, read_tensors

if TYPE_CHECKING:
    import torch


#: Bytes; where a tensor begins in a bucket, as CUDA's own allocator has it.
ALIGNMENT = 256


@dataclass
class HostSource:
    """A tensor in host memory (which may itself be a view into a mapped file)."""

    tensor: torch.Tensor
    is_in_bucket: bool = False

    @property
    def is_movable(self) -> bool:
        return self.tensor.is_contiguous() and bool(self.tensor.numel()) and not self.is_in_bucket

    def move_to(self, place: torch.Tensor) -> None:
        """The same object, with its bytes elsewhere in host memory."""
        place.copy_(self.tensor.detach())
        self.tensor.data = place
        self.is_in_bucket = True

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype


@dataclass
class LateSource:
    """A tensor of a model that its library loads whole, once one of its tensors is needed."""

    load: Callable[[], torch.nn.Module]
    name: str
    dtype: torch.dtype

    @property
    def tensor(self) -> torch.Tensor:
        module, _, leaf = self.name.rpartition(".")
        return getattr(self.load().get_submodule(module), leaf).detach()


@dataclass
class DiskSource:
    """A tensor in a file.

    Attributes:
        dtype: type it has in the model; converted after it was moved.
        aligned: copied into fresh memory, as it was before it was written to disk. A view into a
            mapped file may lie otherwise, and kernels round by alignment.
    """

    stored: StoredTensor
    dtype: torch.dtype
    aligned: bool = False


Source = HostSource | LateSource | DiskSource


@dataclass(eq=False)
class FetchGroup:
    """What is fetched together: a block (or a lone tensor) and where its tensors are.

    Attributes:
        sources: name → its bytes. Tied names share one source.
        bucket: what of them lies in host memory, in one piece; pinned where a GPU fetches it.
        offsets: id of a source → where it begins in the bucket.
    """

    name: str
    sources: Mapping[str, Source]
    bucket: torch.Tensor | None = None
    offsets: dict[int, int] = field(default_factory=dict)

    def fetch(self, device: torch.device) -> list[torch.Tensor]:
        """The tensors on ``device``, in order. To a GPU, the bucket travels as one copy."""
        sources = list(self.sources.values())
        if device.type == "cpu" and device.index is None:
            return read(sources, device)
        if self.bucket is None:
            self._fill_bucket(pin=device.type == "cuda")
        rest = [source for source in sources if id(source) not in self.offsets]
        found = dict(zip(map(id, rest), read(rest, device), strict=True))
        if self.bucket is not None:
            arrived = self.bucket.to(device, non_blocking=True, copy=True)
            for source in sources:
                if id(source) in self.offsets:
                    found[id(source)] = self._part(arrived, source)
        return [found[id(source)] for source in sources]

    def _fill_bucket(self, *, pin: bool) -> None:
        """Moves tensors in host memory into one piece, whence they are fetched from now on."""
        import torch

        end = 0
        for source in self.sources.values():
            if (
                isinstance(source, HostSource)
                and source.is_movable
                and id(source) not in self.offsets
            ):
                self.offsets[id(source)] = end
                end += -(-source.tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if not self.offsets:
            return
        self.bucket = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
        for source in self.sources.values():
            if isinstance(source, HostSource) and id(source) in self.offsets:
                part = self._part(self.bucket, source)
                if part.data_ptr() != source.tensor.data_ptr():  # tied names share a source
                    source.move_to(part)

    def _part(self, bucket: torch.Tensor, source: Any) -> torch.Tensor:
        start, like = self.offsets[id(source)], source.tensor
        return bucket[start : start + like.nbytes].view(like.dtype).view(like.shape)


def read(sources: Sequence[Source], device: torch.device) -> list[torch.Tensor]:
    """The tensors on ``device``, in order; each file is opened once.

    On CPU a stored tensor stays a view; its pages are read here, not by the computation.
    """
    order = sorted(
        (n for n, s in enumerate(sources) if isinstance(s, DiskSource)),
        key=lambda n: str(sources[n].stored.file),  # type: ignore[union-attr]
    )
    out: dict[int, torch.Tensor] = {}
    for n, tensor in zip(
        order,
        read_tensors(sources[n].stored for n in order),  # type: ignore[union-attr]
        strict=True,
    ):
        source = sources[n]
        assert isinstance(source, DiskSource)
        made = move(tensor, device, copy=source.aligned).to(source.dtype)
        if made.device.type == "cpu":
            touch(made)
        out[n] = made
    for n, source in enumerate(sources):
        if not isinstance(source, DiskSource):
            out[n] = move(source.tensor.detach(), device, copy=device.index is not None)
    return [out[n] for n in range(len(sources))]


def move(tensor: torch.Tensor, device: torch.device, *, copy: bool = False) -> torch.Tensor:
    """To a device; to a GPU through pinned memory, so that the copy runs beside computation.

    ``copy`` is for CPU devices that stand in for an accelerator ("cpu:0"): they copy as it does.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, copy=copy and device.type == "cpu")


def touch(tensor: torch.Tensor) -> None:
    """Reads one byte of every page, so that a mapped file is in memory."""
    import torch

    if tensor.numel() and tensor.is_contiguous():
        tensor.detach().view(-1).view(torch.uint8)[::4096].sum()


class Fetcher:
    """Holds at most the group in use and the one being fetched.

    The order is learned from the first run: after group A came group B, so B is fetched as soon as
    A has begun to compute. A wrong guess is dropped before the right group is read.

    Args:
        device: where groups are computed.
        prefetch: whether there is room for two.
    """

    def __init__(self, device: torch.device, *, prefetch: bool = True):
        self.device, self.prefetch = device, prefetch
        self._after: dict[int, FetchGroup] = {}
        self._last: FetchGroup | None = None
        self._guess: tuple[FetchGroup, Future[Any]] | None = None
        self._done: Any = None  # CUDA: the last group's end on the computing stream
        self._pool = ThreadPoolExecutor(1, "ddinfer-fetch") if prefetch else None
        self._stream: Any = None

    def take(self, group: FetchGroup) -> list[torch.Tensor]:
        """The group's tensors on the device, waiting for them where they are under way."""
        guess, self._guess = self._guess, None
        if guess is not None and guess[1].exception() is not None:
            guess = None  # memory may have been short; what was guessed may not be needed at all
        if guess is not None and guess[0] is group:
            tensors, event = guess[1].result()
        else:
            del guess  # its memory is freed here, before more is taken
            tensors, event = self._load(group, self._done)
        self._ready(tensors, event)
        if self._last is not None:
            self._after[id(self._last)] = group
        self._last = group
        following = self._after.get(id(group))
        if self._pool is not None and following is not None and following is not group:
            self._guess = following, self._pool.submit(self._load, following, self._done)
        return tensors

    def give_back(self) -> None:
        """The group in use is done with (its last kernel may still be running)."""
        import torch

        if self.device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(self.device))

    def forget(self) -> None:
        """Drops what was fetched ahead; the order stays known."""
        guess, self._guess = self._guess, None
        if guess is not None:
            guess[1].exception()  # waits; what failed ahead of time fails nothing

    def close(self) -> None:
        self.forget()
        if self._pool is not None:
            self._pool.shutdown()

    def _load(self, group: FetchGroup, after: Any = None) -> tuple[list[torch.Tensor], Any]:
        import torch

        if self.device.type != "cuda":
            return group.fetch(self.device), None
        self._stream = self._stream or torch.cuda.Stream(self.device)
        if after is not None:
            # The host runs ahead of the GPU; without this, so would the memory.
            after.synchronize()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            tensors = group.fetch(self.device)
            event = torch.cuda.Event()
            event.record(self._stream)
        return tensors, event

    def _ready(self, tensors: Sequence[torch.Tensor], event: Any) -> None:
        import torch

        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(stream)
