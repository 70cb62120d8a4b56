"""What the ranks of a continuous pipeline send in a tick: a call, a failure, or the end."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ddinfer.errors import ErrorRecord, RankError
from ddinfer.parallel.communicator import Communicator, ConnectionLost, losing
from ddinfer.parallel.continuous.constants import NO_TOKEN, Memory
from ddinfer.parallel.packing import Layout

IDLE, WORK, ERROR, END = range(4)

#: Values of a call that can have a token; further ones travel every time.
NUM_TOKENS = 24

#: kind, slot, serial, model, plan, origin, bytes of the header, bytes of the payload
NUM_FIELDS = 8


@dataclass
class Message:
    """One tick's burden of one hop.

    Attributes:
        kind: nothing, a call, a failed call, or the end of the run.
        slot, serial: the image's place in the pipeline, and its number among all of them.
        model, plan: numbers of the denoiser and of the plan that the call follows.
        origin: group rank that began the end.
        tokens: of the values that have one.
        values: everything known about the call on this rank, by name.
        header: a pickled plan (first call of it), error, or reason of the end.
    """

    kind: int = IDLE
    slot: int = 0
    serial: int = 0
    model: int = 0
    plan: int = 0
    origin: int = 0
    tokens: dict[Any, int] = field(default_factory=dict)
    values: dict[Any, torch.Tensor] = field(default_factory=dict)
    header: bytes = b""

    def loaded(self) -> Any:
        return pickle.loads(self.header) if self.header else None

    def failed(self, rank: int, error: BaseException) -> Message:
        """What travels on instead of a call that failed on ``rank``, to the image that made it.

        Later ranks may still need the plan that came with the call.
        """
        header = pickle.dumps((rank, ErrorRecord.of(error), self.header))
        return Message(ERROR, self.slot, self.serial, self.model, self.plan, header=header)


@dataclass
class _Pending:
    """An exchange between its beginning and its end; holds the buffers that must live till then.

    Attributes:
        sent, received: the messages. A call that the next rank had no room for counts as not sent.
        incoming: the bytes that travel; ``landing`` is their copy where they travel elsewhere.
        inputs: tensors for what the image keeps over its steps. Copies: a view would keep the
            whole message alive.
        known: values that travelled before.
        error: to be raised at the end: this rank's device is lost.
    """

    sent: Message
    received: Message
    works: list[Any] = field(default_factory=list)
    outgoing: torch.Tensor | None = None
    incoming: torch.Tensor | None = None
    landing: torch.Tensor | None = None
    layout: Layout = field(default_factory=lambda: Layout((), 0))
    inputs: dict[Any, torch.Tensor] = field(default_factory=dict)
    known: dict[Any, torch.Tensor] = field(default_factory=dict)
    error: torch.AcceleratorError | None = None


class Exchange:
    """One rank's two hops: to the next rank, from the previous one.

    Args:
        layout: ``layout(message, stage)``: what travels from a stage for a call. Asked for a
            received call only after ``learn(message)`` had its header.
    """

    def __init__(
        self,
        comm: Communicator,
        layout: Callable[[Message, int], Layout],
        learn: Callable[[Message], None],
    ):
        self.comm, self._layout, self._learn = comm, layout, learn
        self.next, self.previous = (comm.group_rank + 1) % comm.size, (comm.group_rank - 1)
        self.previous %= comm.size
        self._sent, self._received = Memory(), Memory()
        self.num_bytes = 0
        self.is_broken = False
        self._pending: _Pending | None = None
        if comm.size > 1:
            with self._naming():
                self._warm_up()

    def _warm_up(self) -> None:
        """Opens both connections while every rank is here: NCCL makes them on first use."""
        here = torch.zeros(1, dtype=torch.uint8, device=self.comm.wire_device)
        self._await(
            self.comm.start_exchange(here, self.next, torch.empty_like(here), self.previous)
        )

    def __call__(self, message: Message, *, takes_calls: bool = True) -> Message:
        """Hands ``message`` on and returns what came from the previous rank.

        Args:
            takes_calls: else a call that comes is dropped before its values travel.

        Raises:
            RankError: one of the neighbours is gone.
        """
        self.begin(message, takes_calls=takes_calls)
        return self.finish()

    def begin(self, message: Message, *, takes_calls: bool = True) -> None:
        """Starts handing ``message`` on; the tensors travel until `finish`.

        Its values are dropped as soon as they are packed. What does not fit in memory here or on
        the next rank becomes an error message to its image.

        Raises:
            RankError: one of the neighbours is gone.
        """
        if self.comm.size == 1:
            self._pending = _Pending(message, message)
            return
        message, tokens, outgoing = self._packed(message)
        with self._naming():
            self._pending = self._start(message, tokens, outgoing, takes_calls)

    def finish(self) -> Message:
        """What came from the previous rank since `begin`.

        Raises:
            RankError: one of the neighbours is gone.
        """
        pending, self._pending = self._pending, None
        assert pending is not None  # begin came before
        with self._naming():
            self._await(pending.works)
        received = pending.received
        if self.comm.size == 1:
            return received
        if pending.sent.kind == WORK:
            sent = {n: pending.sent.tokens.get(n, NO_TOKEN) for n in self._names(pending.sent)}
            self._sent.remember(pending.sent.slot, pending.sent.serial, sent, {})
        if pending.error is not None:
            raise pending.error
        if received.kind == WORK:
            self._unpack(pending)
        return received

    def settle(self) -> Message:
        """The end of an exchange that may be under way, where its ranks are about to part.

        With this rank's device lost, nothing travels; whether another rank ends is still known.
        """
        pending = self._pending
        if pending is None:
            return Message()
        try:
            return self.finish()
        except torch.AcceleratorError:
            return pending.received

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Inside, an error other than a lost device leaves the neighbours out of step."""
        try:
            yield
        except torch.AcceleratorError:
            raise  # flags and headers do not touch the device
        except ConnectionLost as lost:
            self.is_broken = True
            rank = self.comm.ranks[lost.group_rank]
            record = ErrorRecord("ConnectionLost", str(lost))
            raise RankError(rank, "running the pipeline", record) from lost
        except Exception:
            self.is_broken = True
            raise

    def _packed(self, message: Message) -> tuple[Message, list[int], torch.Tensor | None]:
        """The message, its tokens and its payload; an error message where there is no room."""
        if message.kind != WORK:
            return message, [], None
        try:
            layout, tokens = self._to_send(message)
            outgoing = (
                layout.pack(message.values, self.comm.wire_device) if layout.num_bytes else None
            )
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - it travels to the image whose call this is
            return message.failed(self.comm.rank, error), [], None
        message.values = {}
        return message, tokens, outgoing

    def _start(
        self,
        message: Message,
        tokens: list[int],
        outgoing: torch.Tensor | None,
        takes_calls: bool,
    ) -> _Pending:
        num_bytes = 0 if outgoing is None else outgoing.numel()
        fields = [message.kind, message.slot, message.serial, message.model, message.plan]
        fields += [message.origin, len(message.header), num_bytes, *tokens]
        flags = self._swap(fields + [NO_TOKEN] * (NUM_FIELDS + NUM_TOKENS - len(fields)))
        kind, slot, serial, model, plan, origin, header_bytes, payload_bytes = flags[:NUM_FIELDS]
        received = Message(kind, slot, serial, model, plan, origin)
        received.header = self._swap_headers(message.header, header_bytes)
        self._learn(received)
        pending = _Pending(message, received, outgoing=outgoing)
        if received.kind == WORK and takes_calls:
            self._make_room(pending, flags[NUM_FIELDS:], payload_bytes)
        elif received.kind == WORK:
            pending.received = Message()
        if not self._is_next_ready(num_bytes, payload_bytes, pending.incoming is not None):
            pending.sent, pending.outgoing = Message(), None
        pending.works = self.comm.start_exchange(
            pending.outgoing, self.next, pending.incoming, self.previous
        )
        self.num_bytes += 0 if pending.outgoing is None else num_bytes
        return pending

    def _make_room(self, pending: _Pending, tokens: list[int], num_bytes: int) -> None:
        """All memory that a received call takes on this rank, before it travels."""
        received = pending.received
        device, wire_device = self.comm.device, self.comm.wire_device
        try:
            layout, known = self._to_receive(received, tokens)
            if layout.num_bytes != num_bytes:
                raise RuntimeError(f"the call has {num_bytes} bytes, expected {layout.num_bytes}")
            if num_bytes:
                inputs = [name for name in layout.names if name[0] == "input"]
                pending.inputs = layout.only(inputs).empty_values(device)
                landing = layout.empty(device) if wire_device != device else None
                pending.landing, pending.incoming = landing, layout.empty(wire_device)
            pending.layout, pending.known = layout, known
        except Exception as error:  # noqa: BLE001 - it travels to the image whose call this is
            pending.received = received.failed(self.comm.rank, error)
            pending.inputs, pending.landing, pending.incoming = {}, None, None
            if isinstance(error, torch.AcceleratorError):
                pending.error = error

    def _unpack(self, pending: _Pending) -> None:
        """The received call's values, in the memory that was made for them."""
        received = pending.received
        if pending.incoming is not None:
            buffer = pending.incoming
            if pending.landing is not None:
                buffer = pending.landing.copy_(buffer)
            received.values = pending.layout.unpack(buffer)
            for name, copy in pending.inputs.items():
                received.values[name] = copy.copy_(received.values[name])
        self._received.remember(received.slot, received.serial, received.tokens, received.values)
        received.values |= pending.known

    def _names(self, message: Message) -> list[Any]:
        """The values of this hop that may have a token, in the layout's order."""
        names = self._layout(message, self.comm.group_rank).names
        return [name for name in names if name[0] == "input"][:NUM_TOKENS]

    def _to_send(self, message: Message) -> tuple[Layout, list[int]]:
        layout = self._layout(message, self.comm.group_rank)
        tokens = [message.tokens.get(name, NO_TOKEN) for name in self._names(message)]
        known = {
            name
            for name, token in zip(self._names(message), tokens, strict=True)
            if self._sent.knows(message.slot, message.serial, name, token)
        }
        return layout.only([name for name in layout.names if name not in known]), tokens

    def _to_receive(self, message: Message, tokens: list[int]) -> tuple[Layout, dict[Any, Any]]:
        layout = self._layout(message, self.previous)
        names = [name for name in layout.names if name[0] == "input"][:NUM_TOKENS]
        message.tokens = dict(zip(names, tokens, strict=False))
        known = {
            name: self._received.recall(message.slot, message.serial, name, token)
            for name, token in message.tokens.items()
            if self._received.knows(message.slot, message.serial, name, token)
        }
        return layout.only([name for name in layout.names if name not in known]), known

    def _swap(self, numbers: list[int]) -> list[int]:
        """Sends the numbers to the next rank and returns as many from the previous one."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        theirs = torch.empty_like(mine)
        sending = self.comm.send(mine, self.next, control=True)
        self.comm.receive(theirs, self.previous, control=True)
        sending.wait()
        return theirs.tolist()

    def _is_next_ready(self, num_bytes: int, num_received: int, has_room: bool) -> bool:
        """Tells the previous rank whether its payload may come; hears it from the next one."""
        sending = None
        if num_received:
            mine = torch.tensor([has_room], dtype=torch.int64)
            sending = self.comm.send(mine, self.previous, control=True)
        theirs = torch.ones(1, dtype=torch.int64)
        if num_bytes:
            self.comm.receive(theirs, self.next, control=True)
        if sending is not None:
            sending.wait()
        return bool(theirs.item())

    def _swap_headers(self, header: bytes, num_bytes: int) -> bytes:
        sending = None
        if header:
            mine = torch.frombuffer(bytearray(header), dtype=torch.uint8)
            sending = self.comm.send(mine, self.next, control=True)
        theirs = torch.empty(num_bytes, dtype=torch.uint8)
        if num_bytes:
            self.comm.receive(theirs, self.previous, control=True)
        if sending is not None:
            sending.wait()
        return theirs.numpy().tobytes()

    def _await(self, works: list[Any]) -> None:
        # Which of the two neighbours broke it cannot be told for all backends.
        with losing(self.previous):
            for work in works:
                work.wait()
