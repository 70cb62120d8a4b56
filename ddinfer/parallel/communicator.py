"""The connections between the ranks that hold one model: tensors, objects, failures.

Objects and other control messages travel over gloo: reading a flag from GPU memory would make the
host wait for the GPU. Payload goes over the group's own backend where that serves the device.
"""

from __future__ import annotations

import contextlib
import datetime
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ddinfer.distributed.process_group import backends_of
from ddinfer.errors import ErrorRecord, RankError, UsageError

#: An object of up to so many bytes, its length included, is one message, else two.
FIRST_BYTES = 1024

#: A control message may wait for work of any length; a peer that is gone closes its connection.
LONG_TIMEOUT = datetime.timedelta(days=7)

#: Statuses have a gloo tag of their own: a stream of activations may have been left half way.
STATUS_TAG = 1


#: What gloo and NCCL say when a peer is gone; they raise RuntimeErrors for everything else, too.
_CONNECTION_WORDS = ("onnection", "Broken pipe", "ncclRemoteError", "ncclSystemError")


class ConnectionLost(Exception):
    """The connection to one rank of the group broke. ``group_rank`` says which."""

    def __init__(self, group_rank: int, cause: BaseException):
        super().__init__(str(cause).splitlines()[0] if str(cause) else type(cause).__name__)
        self.group_rank = group_rank


@dataclass(frozen=True)
class Communicator:
    """One rank's connections to the others.

    Attributes:
        ranks: global ranks in stage order.
        group_rank: this rank's place among them, hence its stage.
        device: where this rank computes.
        device_group: group that moves activations; ``None`` in a world of one.
        cpu_group: gloo group that moves objects and flags.
        owns_cpu_group: it was made for this communicator alone; `close` ends it.
    """

    ranks: tuple[int, ...]
    group_rank: int
    device: torch.device
    device_group: Any = None
    cpu_group: Any = None
    owns_cpu_group: bool = False

    @classmethod
    def of(cls, group: Any = None, device: str | torch.device | None = None) -> Communicator:
        """This rank's communicator in ``group`` (default: all ranks; one rank without a group).

        Every rank of ``group`` must call this, in the same order as its other collectives.

        Raises:
            UsageError: this rank is not in ``group``.
        """
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return cls((0,), 0, torch.device("cpu" if device is None else device))
        group = dist.group.WORLD if group is None else group
        if group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
            raise UsageError(
                f"rank {dist.get_rank()} is not in the group: only its ranks may call this"
            )
        ranks = tuple(dist.get_process_group_ranks(group))
        backends = backends_of(group)
        if device is None:
            on_gpu = backends.get("cuda") == "nccl" and torch.cuda.is_available()
            device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
        cpu_group, owns_cpu_group = group, set(backends.values()) != {"gloo"}
        if owns_cpu_group:
            cpu_group = dist.new_group(
                list(ranks),
                backend="gloo",
                timeout=LONG_TIMEOUT,
                use_local_synchronization=True,
            )
        return cls(
            ranks, dist.get_rank(group), torch.device(device), group, cpu_group, owns_cpu_group
        )

    def close(self) -> None:
        """Ends the group that was made for this communicator, if there is one."""
        if self.owns_cpu_group:
            dist.destroy_process_group(self.cpu_group)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """This rank's global number."""
        return self.ranks[self.group_rank]

    @property
    def is_first(self) -> bool:
        return self.group_rank == 0

    @property
    def is_last(self) -> bool:
        return self.group_rank == self.size - 1

    @property
    def wire_device(self) -> torch.device:
        """Where payload buffers lie: the device, or the CPU where the backend cannot reach it."""
        if self.device.type == "cpu" or self.device_group is None:
            return self.device
        reached = backends_of(self.device_group).get(self.device.type) == "nccl"
        return self.device if reached else torch.device("cpu")

    def send(
        self, tensor: torch.Tensor, to: int, *, control: bool = False, tag: int = 0
    ) -> Sending:
        """Starts sending ``tensor`` to group rank ``to``; wait for what is returned."""
        with losing(to):
            group = self.cpu_group if control else self.device_group
            return Sending(dist.isend(tensor, group=group, tag=tag, group_dst=to), tensor, to)

    def receive(
        self, tensor: torch.Tensor, source: int, *, control: bool = False, tag: int = 0
    ) -> None:
        """Fills ``tensor`` with what group rank ``source`` sent next."""
        with losing(source):
            group = self.cpu_group if control else self.device_group
            work = dist.irecv(tensor, group=group, tag=tag, group_src=source)
            assert work is not None  # this rank is in the group
            work.wait()

    def start_exchange(
        self, outgoing: torch.Tensor | None, to: int, incoming: torch.Tensor | None, source: int
    ) -> list[Any]:
        """Starts sending and receiving payload; wait for each of what is returned.

        Both directions are posted before either is waited for, so no cycle of ranks can block.
        """
        group, operations = self.device_group, []
        if outgoing is not None:
            operations.append(dist.P2POp(dist.isend, outgoing, group=group, group_peer=to))
        if incoming is not None:
            operations.append(dist.P2POp(dist.irecv, incoming, group=group, group_peer=source))
        with losing(to):
            return dist.batch_isend_irecv(operations) if operations else []

    def send_object(self, value: Any, to: int, *, tag: int = 0) -> list[Sending]:
        """Starts sending ``value``, pickled, over gloo; wait for what is returned."""
        data = pickle.dumps(value)
        data = (len(data).to_bytes(8, "little") + data).ljust(FIRST_BYTES, b"\0")
        body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [part for part in (body[:FIRST_BYTES], body[FIRST_BYTES:]) if part.numel()]
        return [self.send(part, to, control=True, tag=tag) for part in parts]

    def receive_object(self, source: int, *, tag: int = 0) -> Any:
        """What group rank ``source`` sent next by `send_object`."""
        body = torch.empty(FIRST_BYTES, dtype=torch.uint8)
        self.receive(body, source, control=True, tag=tag)
        data = body.numpy().tobytes()
        num_left = int.from_bytes(data[:8], "little") + 8 - FIRST_BYTES
        if num_left > 0:
            body = torch.empty(num_left, dtype=torch.uint8)
            self.receive(body, source, control=True, tag=tag)
            data += body.numpy().tobytes()
        return pickle.loads(data[8:])

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Fills ``tensor`` on every rank with that of group rank ``source``."""
        if self.group_rank != source:
            self.receive(tensor, source)
        else:
            self._send_to_all(lambda peer: [self.send(tensor, peer)])

    def broadcast_object(self, value: Any) -> Any:
        """The first rank's ``value`` on every rank."""
        if not self.is_first:
            return self.receive_object(0)
        self._send_to_all(lambda peer: self.send_object(value, peer))
        return value

    def _send_to_all(self, send: Callable[[int], list[Sending]]) -> None:
        """Sends to each rank by itself: one that is gone must not keep it from the others."""
        sending, lost = [], None
        for peer in self._peers():
            try:
                sending += send(peer)
            except ConnectionLost as error:
                lost = error
        for work in sending:
            try:
                work.wait()
            except ConnectionLost as error:
                lost = error
        if lost is not None:
            raise lost

    def agree(self, error: BaseException | None, phase: str) -> None:
        """Waits for all ranks: returns when none has failed, else raises on every rank.

        The failed rank raises its own error again, the others a `RankError` that names it. A
        rank that is gone is found by its broken connection, without any timeout: the peer status
        of `ddinfer.distributed.peers` does not know of processes on other machines.
        """
        statuses = self._exchange_statuses(error)
        if error is not None and not isinstance(error, ConnectionLost):
            raise error
        for peer, (record, _) in sorted(statuses.items()):
            if record is not None:
                raise RankError(self.ranks[peer], phase, record) from error
        lost = [self.ranks[peer] for _, peer in statuses.values() if peer is not None]
        if lost:
            gone = max(set(lost), key=lost.count)
            record = ErrorRecord("ConnectionLost", f"rank {gone} is gone")
            raise RankError(gone, phase, record) from error

    def _exchange_statuses(
        self, error: BaseException | None
    ) -> dict[int, tuple[ErrorRecord | None, int | None]]:
        """Group rank → its error, and the group rank that it lost, as it reports them."""
        own: tuple[ErrorRecord | None, int | None] = (None, None)
        if isinstance(error, ConnectionLost):
            own = (None, error.group_rank)
        elif error is not None:
            own = (ErrorRecord.of(error), None)
        sending: list[Sending] = []
        statuses = {self.group_rank: own}
        for peer in self._peers():
            with contextlib.suppress(ConnectionLost):  # receiving from that peer says so, too
                sending += self.send_object(own, peer, tag=STATUS_TAG)
        for peer in self._peers():
            try:
                statuses[peer] = self.receive_object(peer, tag=STATUS_TAG)
            except ConnectionLost:
                statuses[peer] = (None, peer)
        for work in sending:
            try:
                work.wait()
            except ConnectionLost as lost:
                statuses[lost.group_rank] = (None, lost.group_rank)
        return statuses

    def _peers(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.group_rank]


@dataclass
class Sending:
    """A send under way. Holds the tensor, which must stay as it is until then."""

    work: Any
    tensor: torch.Tensor
    to: int

    def wait(self) -> None:
        with losing(self.to):
            self.work.wait()


@contextlib.contextmanager
def losing(peer: int) -> Iterator[None]:
    """Turns what a backend raises for a broken connection into `ConnectionLost`."""
    try:
        yield
    except RuntimeError as error:
        if not is_connection_error(error):
            raise
        raise ConnectionLost(peer, error) from error


def is_connection_error(error: RuntimeError) -> bool:
    """Whether a backend says that a peer is gone, as against an error or timeout of this rank."""
    if isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError)):
        return False
    if isinstance(error, dist.DistNetworkError):
        return True
    return any(words in str(error) for words in _CONNECTION_WORDS)
