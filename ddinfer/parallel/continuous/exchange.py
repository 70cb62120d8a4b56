"""What neighbouring ranks exchange in a tick: a call, a failed call, or the end of a run.

A message is a small object, which travels over gloo, and the call's tensors as one buffer, which
travels over the group's own backend once the receiver has memory for it. Inputs that stay the same
over an image's steps (text embeddings, ids) have a *token* and are not sent again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ddinfer.errors import ErrorRecord, RankError
from ddinfer.parallel.communicator import Communicator, ConnectionLost, losing
from ddinfer.parallel.packing import Layout
from ddinfer.parallel.plans import PlanCache
from ddinfer.parallel.tensor_tokens import TensorCache

IDLE, WORK, ERROR, END = range(4)


@dataclass
class Message:
    """The message that one stage sends to the next in one tick.

    Attributes:
        kind: nothing, a call, a failed call, or the end of the run.
        slot, serial: the image's place in the pipeline, and its number among all of them.
        model, plan: numbers of the denoiser and of the plan that the call follows.
        metadata: the plan, pickled, until every rank has it.
        tokens: of the inputs that have one.
        num_bytes: of the buffer that follows.
        origin: group rank that began the end.
        error: global rank and error that failed the call or began the end.
        values: everything known about the call on this rank, by name; not sent with the object.
    """

    kind: int = IDLE
    slot: int = 0
    serial: int = 0
    model: int = 0
    plan: int = 0
    metadata: bytes = b""
    tokens: dict[Any, int] = field(default_factory=dict)
    num_bytes: int = 0
    origin: int = 0
    error: tuple[int, ErrorRecord] | None = None
    values: dict[Any, torch.Tensor] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, int, dict[Any, int]]:
        """By what inputs of the call are found again."""
        return self.slot, self.serial, self.tokens

    def failed(self, rank: int, error: BaseException) -> Message:
        """What travels on instead of a call that failed on ``rank``, to the image that made it.

        Later ranks may still need the plan that came with the call.
        """
        record = ErrorRecord.of(error)
        return replace(self, kind=ERROR, tokens={}, num_bytes=0, error=(rank, record), values={})


@dataclass
class _Room:
    """The memory on this rank that a call takes when it comes.

    Attributes:
        known: inputs that came with an earlier call.
        incoming: the bytes that travel; ``landing`` is their copy where they travel elsewhere.
        kept: tensors of their own for inputs to keep: a view would keep the whole message alive.
    """

    layout: Layout
    known: dict[Any, torch.Tensor]
    incoming: torch.Tensor | None = None
    landing: torch.Tensor | None = None
    kept: dict[Any, torch.Tensor] = field(default_factory=dict)

    def values(self) -> dict[Any, torch.Tensor]:
        """The call's values, once its bytes are here."""
        if self.incoming is None:
            return dict(self.known)
        buffer = self.incoming
        if self.landing is not None:
            buffer = self.landing.copy_(buffer)
        values = self.layout.unpack(buffer)
        for name, tensor in self.kept.items():
            values[name] = tensor.copy_(values[name])
        return values | self.known


class Exchange:
    """One rank's two connections: to the next rank, from the previous one.

    Attributes:
        num_bytes: of all tensors sent so far.
        is_broken: the neighbours are out of step, so that nothing can be sent any more.
    """

    def __init__(self, comm: Communicator, plans: PlanCache):
        self.comm, self.plans = comm, plans
        self.next = (comm.group_rank + 1) % comm.size
        self.previous = (comm.group_rank - 1) % comm.size
        self.num_bytes, self.is_broken = 0, False
        self._sent, self._received = TensorCache(), TensorCache()
        self._finish: Callable[[], Message] | None = None
        self._incoming = Message()
        if comm.size > 1:
            with self._naming():  # NCCL connects on first use, so while every rank is here
                here = torch.zeros(1, dtype=torch.uint8, device=comm.wire_device)
                there = torch.empty_like(here)
                self._wait(comm.start_exchange(here, self.next, there, self.previous))

    def __call__(self, message: Message, *, takes_calls: bool = True) -> Message:
        """Sends ``message`` and returns what came from the previous rank.

        Args:
            takes_calls: else a call that comes is dropped before its values travel.

        Raises:
            RankError: one of the neighbours is gone.
        """
        self.begin(message, takes_calls=takes_calls)
        return self.finish()

    def begin(self, message: Message, *, takes_calls: bool = True) -> None:
        """Starts sending ``message``; the tensors travel until `finish`.

        Its values are dropped as soon as they are packed. What does not fit in memory here or on
        the next rank becomes an error message to its image.

        Raises:
            RankError: one of the neighbours is gone.
        """
        if self.comm.size == 1:
            self._incoming, self._finish = message, lambda: message
            return
        message, outgoing = self._packed(message)
        with self._naming():
            self._finish = self._start(message, outgoing, takes_calls)

    def finish(self) -> Message:
        """What came from the previous rank since `begin`.

        Raises:
            RankError: one of the neighbours is gone.
        """
        finish, self._finish = self._finish, None
        assert finish is not None  # begin came before
        with self._naming():
            received = finish()
        self._incoming = Message()  # not kept: it holds the call's values
        return received

    def finish_if_pending(self) -> Message:
        """What came since `begin`, if that came before, where a rank is about to end the run.

        With this rank's device lost, nothing travels; whether another rank ends is still known.
        """
        if self._finish is None:
            return Message()
        try:
            return self.finish()
        except torch.AcceleratorError:
            return self._incoming

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Inside, an error other than a lost device leaves the neighbours out of step."""
        try:
            yield
        except torch.AcceleratorError:
            raise  # objects do not touch the device
        except ConnectionLost as lost:
            self.is_broken = True
            rank = self.comm.ranks[lost.group_rank]
            record = ErrorRecord("ConnectionLost", str(lost))
            raise RankError(rank, "running the pipeline", record) from lost
        except Exception:
            self.is_broken = True
            raise

    def _packed(self, message: Message) -> tuple[Message, torch.Tensor | None]:
        """The message and its buffer; an error message where there is no memory for one."""
        if message.kind != WORK:
            return message, None
        try:
            names = frozenset(self.plans[message.plan].edges[self.comm.group_rank].names)
            message.tokens = {n: token for n, token in message.tokens.items() if n in names}
            layout = self._layout(message, self.comm.group_rank, self._sent.find(*message.key))
            message.num_bytes, buffer = layout.num_bytes, None
            if layout.num_bytes:
                buffer = layout.pack(message.values, self.comm.wire_device)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - it travels to the image whose call this is
            return message.failed(self.comm.rank, error), None
        message.values = {}
        return message, buffer

    def _start(
        self, message: Message, outgoing: torch.Tensor | None, takes_calls: bool
    ) -> Callable[[], Message]:
        sending = self.comm.send_object(message, self.next)
        received: Message = self.comm.receive_object(self.previous)
        self._incoming = received
        self._wait(sending)
        if received.metadata and not self.comm.is_first:  # which has made the plan
            self.plans.update(received.plan, received.metadata)
        num_bytes, room, error = received.num_bytes, None, None
        if received.kind == WORK and not takes_calls:
            received = Message()
        elif received.kind == WORK:
            try:
                room = self._room_for(received)
            except Exception as failure:  # noqa: BLE001 - it travels to the image whose call it is
                received, error = received.failed(self.comm.rank, failure), failure
        self._incoming = received
        incoming = None if room is None else room.incoming
        if not self._is_next_ready(message.num_bytes, num_bytes, incoming is not None):
            message, outgoing = Message(), None
        self.num_bytes += message.num_bytes
        works = self.comm.start_exchange(outgoing, self.next, incoming, self.previous)

        def finish() -> Message:
            self._wait(works)
            if message.kind == WORK:
                self._sent.put(*message.key, {})
            if isinstance(error, torch.AcceleratorError):
                raise error  # this rank's device is lost
            if room is not None:
                received.values = room.values()
                self._received.put(*received.key, received.values)
            return received

        return finish

    def _room_for(self, message: Message) -> _Room:
        """All memory that a received call takes on this rank, before it travels."""
        known = self._received.find(*message.key)
        layout = self._layout(message, self.previous, known)
        if layout.num_bytes != message.num_bytes:
            raise RuntimeError(
                f"the call has {message.num_bytes} bytes, expected {layout.num_bytes}"
            )
        room, comm = _Room(layout, known), self.comm
        if layout.num_bytes:
            room.kept = layout.only(message.tokens).empty_values(comm.device)
            if comm.wire_device != comm.device:
                room.landing = layout.empty(comm.device)
            room.incoming = layout.empty(comm.wire_device)
        return room

    def _layout(self, message: Message, stage: int, known: Mapping[Any, Any]) -> Layout:
        """What travels from ``stage`` for a call, as far as it is not known there."""
        layout = self.plans[message.plan].edges[stage]
        return layout.only([name for name in layout.names if name not in known])

    def _is_next_ready(self, num_bytes: int, num_received: int, has_room: bool) -> bool:
        """Tells the previous rank whether its buffer may come; hears it from the next one."""
        sending = []
        if num_received:
            mine = torch.tensor([has_room], dtype=torch.int64)
            sending.append(self.comm.send(mine, self.previous, control=True))
        theirs = torch.ones(1, dtype=torch.int64)
        if num_bytes:
            self.comm.receive(theirs, self.next, control=True)
        self._wait(sending)
        return bool(theirs.item())

    def _wait(self, works: list[Any]) -> None:
        # Which of the two neighbours broke it cannot be told for all backends.
        with losing(self.previous):
            for work in works:
                work.wait()
