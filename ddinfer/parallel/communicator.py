"""What the ranks of one pipeline say to one another: payload, small control messages, failures.

Control messages are tensors on the CPU over gloo: reading a flag from GPU memory would make the
host wait for the GPU. Payload goes over the group's own backend where that serves the device.
"""

from __future__ import annotations

import contextlib
import datetime
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ddinfer.errors import ErrorRecord, RankError, UsageError

OK, FAILED, LOST = 0, 1, 2

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
    """One rank's view of the ranks that hold a model together.

    Attributes:
        ranks: global ranks in stage order.
        group_rank: this rank's place among them, hence its stage.
        device: where this rank computes.
        payload: group that moves activations; ``None`` in a world of one.
        control: gloo group that moves flags.
        owns_control: it was made for this link alone; `close` ends it.
    """

    ranks: tuple[int, ...]
    group_rank: int
    device: torch.device
    payload: Any = None
    control: Any = None
    owns_control: bool = False

    @classmethod
    def of(cls, group: Any = None, device: str | torch.device | None = None) -> Communicator:
        """The link of this rank in ``group`` (default: all ranks; one rank without a group).

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
        backends = _backends(group)
        if device is None:
            on_gpu = backends.get("cuda") == "nccl" and torch.cuda.is_available()
            device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
        control, owns_control = group, set(backends.values()) != {"gloo"}
        if owns_control:
            control = dist.new_group(
                list(ranks),
                backend="gloo",
                timeout=LONG_TIMEOUT,
                use_local_synchronization=True,
            )
        return cls(ranks, dist.get_rank(group), torch.device(device), group, control, owns_control)

    def close(self) -> None:
        """Ends the group that was made for this link, if there is one."""
        if self.owns_control:
            dist.destroy_process_group(self.control)

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
        if self.device.type == "cpu" or self.payload is None:
            return self.device
        reached = _backends(self.payload).get(self.device.type) == "nccl"
        return self.device if reached else torch.device("cpu")

    def send(
        self, tensor: torch.Tensor, to: int, *, control: bool = False, tag: int = 0
    ) -> Sending:
        """Starts sending ``tensor`` to group rank ``to``; wait for what is returned."""
        with losing(to):
            group = self.control if control else self.payload
            return Sending(dist.isend(tensor, group=group, tag=tag, group_dst=to), tensor, to)

    def receive(
        self, tensor: torch.Tensor, source: int, *, control: bool = False, tag: int = 0
    ) -> None:
        """Fills ``tensor`` with what group rank ``source`` sent next."""
        with losing(source):
            group = self.control if control else self.payload
            work = dist.irecv(tensor, group=group, tag=tag, group_src=source)
            assert work is not None  # this rank is in the group
            work.wait()

    def start_exchange(
        self, outgoing: torch.Tensor | None, to: int, incoming: torch.Tensor | None, source: int
    ) -> list[Any]:
        """Starts sending and receiving payload; wait for each of what is returned.

        Both directions are posted before either is waited for, so no cycle of ranks can block.
        """
        group, operations = self.payload, []
        if outgoing is not None:
            operations.append(dist.P2POp(dist.isend, outgoing, group=group, group_peer=to))
        if incoming is not None:
            operations.append(dist.P2POp(dist.irecv, incoming, group=group, group_peer=source))
        with losing(to):
            return dist.batch_isend_irecv(operations) if operations else []

    def broadcast(self, tensor: torch.Tensor, source: int, *, control: bool = False) -> None:
        """Fills ``tensor`` on every rank with that of group rank ``source``.

        Sent to each rank by itself: a rank that is gone must not keep it from the others.
        """
        if self.group_rank != source:
            self.receive(tensor, source, control=control)
            return
        sending, lost = [], None
        for peer in range(self.size):
            if peer != source:
                try:
                    sending.append(self.send(tensor, peer, control=control))
                except ConnectionLost as error:
                    lost = error
        for work in sending:
            try:
                work.wait()
            except ConnectionLost as error:
                lost = error
        if lost is not None:
            raise lost

    def broadcast_object(self, value: Any) -> Any:
        """The first rank's ``value`` on every rank, pickled, over the control group."""
        data = pickle.dumps(value) if self.is_first else b""
        size = torch.tensor([len(data)])
        lost = None
        try:
            self.broadcast(size, 0, control=True)
        except ConnectionLost as error:
            if not self.is_first:
                raise
            lost = error  # the others still want the second message
        body = torch.frombuffer(bytearray(data or bytes(int(size))), dtype=torch.uint8)
        self.broadcast(body, 0, control=True)
        if lost is not None:
            raise lost
        return value if self.is_first else pickle.loads(body.numpy().tobytes())

    def agree(self, error: BaseException | None, phase: str) -> None:
        """Meets all ranks: returns when none has failed, else raises on every rank.

        The failed rank raises its own error again, the others a `RankError` that names it. A
        rank that is gone is found by its broken connection, without any timeout.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        statuses = self._exchange_statuses(error)
        if error is not None and not isinstance(error, ConnectionLost):
            raise error
        failed = [r for r, (code, _, record) in enumerate(statuses) if code == FAILED and record]
        if failed:
            raise RankError(self.ranks[failed[0]], phase, statuses[failed[0]][2]) from error
        lost = [peer for code, peer, _ in statuses if code == LOST]
        if lost:
            gone = max(set(lost), key=lost.count)
            record = ErrorRecord("ConnectionLost", f"rank {self.ranks[gone]} is gone")
            raise RankError(self.ranks[gone], phase, record) from error

    def _exchange_statuses(
        self, error: BaseException | None
    ) -> list[tuple[int, int, ErrorRecord | None]]:
        """``(code, group rank that is meant, its record)`` as every group rank reports it."""
        code, meant, data = OK, self.group_rank, b""
        if isinstance(error, ConnectionLost):
            code, meant = LOST, error.group_rank
        elif error is not None:
            code, data = FAILED, pickle.dumps(ErrorRecord.of(error))
        head = torch.tensor([code, meant, len(data)], dtype=torch.int64)
        body = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None
        others = [r for r in range(self.size) if r != self.group_rank]
        sending = []
        for peer in others:
            try:
                sending.append(self.send(head, peer, control=True, tag=STATUS_TAG))
                if body is not None:
                    sending.append(self.send(body, peer, control=True, tag=STATUS_TAG))
            except ConnectionLost:
                pass  # receiving from that peer says so, too
        statuses: list[tuple[int, int, ErrorRecord | None]] = []
        for peer in range(self.size):
            if peer == self.group_rank:
                record = ErrorRecord.of(error) if code == FAILED and error is not None else None
                statuses.append((code, meant, record))
                continue
            statuses.append(self._receive_status(peer))
        for work in sending:
            try:
                work.wait()
            except ConnectionLost as lost:
                statuses[lost.group_rank] = (LOST, lost.group_rank, None)
        return statuses

    def _receive_status(self, peer: int) -> tuple[int, int, ErrorRecord | None]:
        try:
            head = torch.zeros(3, dtype=torch.int64)
            self.receive(head, peer, control=True, tag=STATUS_TAG)
            code, meant, length = (int(x) for x in head)
            if not length:
                return code, meant, None
            body = torch.empty(length, dtype=torch.uint8)
            self.receive(body, peer, control=True, tag=STATUS_TAG)
            return code, meant, pickle.loads(body.numpy().tobytes())
        except ConnectionLost:
            return LOST, peer, None


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


def _backends(group: Any) -> dict[str, str]:
    """Device type → backend name of a process group."""
    pairs = (item.split(":", 1) for item in str(dist.get_backend_config(group)).split(","))
    return {device: backend for device, backend in pairs}
