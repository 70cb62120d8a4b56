"""What ranks of a ring hand on in a tick: a call on its way, a failure, or the end."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ddinfer.errors import ErrorRecord, RankError
from ddinfer.parallel.constants import NO_TOKEN, Memory
from ddinfer.parallel.link import ConnectionLost, Link, losing
from ddinfer.parallel.wire import Layout

IDLE, WORK, ERROR, END = range(4)

#: Values of a call that can have a token; further ones travel every time.
NUM_TOKENS = 24

#: kind, slot, serial, model, plan, origin, bytes of the header
NUM_FIELDS = 7


@dataclass
class Message:
    """One tick's burden of one hop.

    Attributes:
        kind: nothing, a call, a failed call, or the end of the run.
        slot, serial: the image's place in the ring, and its number among all of them.
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


@dataclass
class _UnderWay:
    """An exchange between its beginning and its end; holds the buffers that must live till then."""

    message: Message
    received: Message
    works: list[Any] = field(default_factory=list)
    outgoing: torch.Tensor | None = None
    incoming: torch.Tensor | None = None
    wanted: Layout = field(default_factory=lambda: Layout((), 0))
    known: dict[Any, torch.Tensor] = field(default_factory=dict)


class Exchange:
    """One rank's two hops: to the next rank, from the previous one.

    Args:
        layout: ``layout(message, stage)``: what travels from a stage for a call. Asked for a
            received call only after ``learn(message)`` had its header.
    """

    def __init__(
        self,
        link: Link,
        layout: Callable[[Message, int], Layout],
        learn: Callable[[Message], None],
    ):
        self.link, self._layout, self._learn = link, layout, learn
        self.next, self.previous = (link.group_rank + 1) % link.size, (link.group_rank - 1)
        self.previous %= link.size
        self._sent, self._received = Memory(), Memory()
        self.num_bytes = 0
        self.is_broken = False
        self._under_way: _UnderWay | None = None
        if link.size > 1:
            self._warm_up()

    def _warm_up(self) -> None:
        """Opens both connections while every rank is here: NCCL makes them on first use."""
        here = torch.zeros(1, dtype=torch.uint8, device=self.link.wire_device)
        self._await(self._post(here, torch.empty_like(here)))

    def __call__(self, message: Message) -> Message:
        """Hands ``message`` on and returns what came from the previous rank.

        Raises:
            RankError: one of the neighbours is gone.
        """
        self.begin(message)
        return self.finish()

    def begin(self, message: Message) -> None:
        """Starts handing ``message`` on; the tensors travel until `finish`.

        Raises:
            RankError: one of the neighbours is gone.
        """
        if self.link.size == 1:
            self._under_way = _UnderWay(message, message)
            return
        with self._naming():
            self._under_way = self._start(message)

    def finish(self) -> Message:
        """What came from the previous rank since `begin`.

        Raises:
            RankError: one of the neighbours is gone.
        """
        under_way, self._under_way = self._under_way, None
        assert under_way is not None  # begin came before
        with self._naming():
            return self._complete(under_way)

    def settle(self) -> Message:
        """The end of an exchange that may be under way, where its ranks are about to part."""
        return self.finish() if self._under_way is not None else Message()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except ConnectionLost as lost:
            self.is_broken = True
            rank = self.link.ranks[lost.group_rank]
            record = ErrorRecord("ConnectionLost", str(lost))
            raise RankError(rank, "running the ring", record) from lost

    def _start(self, message: Message) -> _UnderWay:
        layout, tokens = Layout((), 0), list[int]()
        if message.kind == WORK:
            layout, tokens = self._to_send(message)
        fields = [message.kind, message.slot, message.serial, message.model, message.plan]
        fields += [message.origin, len(message.header), *tokens]
        told = self._swap_flags(fields)
        kind, slot, serial, model, plan, origin = told[: NUM_FIELDS - 1]
        received = Message(kind, slot, serial, model, plan, origin)
        received.header = self._swap_headers(message.header, told[NUM_FIELDS - 1])
        self._learn(received)
        wanted, known = Layout((), 0), dict[Any, torch.Tensor]()
        if received.kind == WORK:
            wanted, known = self._to_receive(received, told[NUM_FIELDS:])
        device = self.link.wire_device
        outgoing = layout.pack(message.values, device) if layout.num_bytes else None
        incoming = wanted.empty(device) if wanted.num_bytes else None
        works = self._post(outgoing, incoming)
        self.num_bytes += layout.num_bytes
        return _UnderWay(message, received, works, outgoing, incoming, wanted, known)

    def _complete(self, under_way: _UnderWay) -> Message:
        message, received = under_way.message, under_way.received
        self._await(under_way.works)
        if under_way.incoming is not None:
            received.values = under_way.wanted.unpack(under_way.incoming.to(self.link.device))
        if self.link.size == 1:
            return received
        if received.kind == WORK:
            self._received.remember(
                received.slot, received.serial, received.tokens, received.values
            )
            received.values |= under_way.known
        if message.kind == WORK:
            sent = {name: message.tokens.get(name, NO_TOKEN) for name in self._names(message)}
            self._sent.remember(message.slot, message.serial, sent, {})
        return received

    def _names(self, message: Message) -> list[Any]:
        """The values of this hop that may have a token, in the layout's order."""
        names = self._layout(message, self.link.group_rank).names
        return [name for name in names if name[0] == "input"][:NUM_TOKENS]

    def _to_send(self, message: Message) -> tuple[Layout, list[int]]:
        layout = self._layout(message, self.link.group_rank)
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

    def _swap_flags(self, fields: list[int]) -> list[int]:
        size = NUM_FIELDS + NUM_TOKENS
        mine = torch.tensor(fields + [NO_TOKEN] * (size - len(fields)), dtype=torch.int64)
        theirs = torch.empty(size, dtype=torch.int64)
        sending = self.link.send(mine, self.next, control=True)
        self.link.receive(theirs, self.previous, control=True)
        sending.wait()
        return theirs.tolist()

    def _swap_headers(self, header: bytes, num_bytes: int) -> bytes:
        sending = None
        if header:
            mine = torch.frombuffer(bytearray(header), dtype=torch.uint8)
            sending = self.link.send(mine, self.next, control=True)
        theirs = torch.empty(num_bytes, dtype=torch.uint8)
        if num_bytes:
            self.link.receive(theirs, self.previous, control=True)
        if sending is not None:
            sending.wait()
        return theirs.numpy().tobytes()

    def _post(self, outgoing: torch.Tensor | None, incoming: torch.Tensor | None) -> list[Any]:
        """Both directions are posted before either is waited for, so no cycle can block."""
        group = self.link.payload
        operations = []
        if outgoing is not None:
            operations.append(dist.P2POp(dist.isend, outgoing, group=group, group_peer=self.next))
        if incoming is not None:
            operations.append(
                dist.P2POp(dist.irecv, incoming, group=group, group_peer=self.previous)
            )
        with losing(self.next):
            return dist.batch_isend_irecv(operations) if operations else []

    def _await(self, works: list[Any]) -> None:
        # Which of the two neighbours broke it cannot be told for all backends.
        with losing(self.previous):
            for work in works:
                work.wait()
