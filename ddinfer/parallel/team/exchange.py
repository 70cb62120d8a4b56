"""Tensors that the ranks of one team exchange inside of a call, and what holds when one fails.

A call that fails on one rank must not leave the others waiting. The rank *completes* the call: it
takes part in the exchanges that are left, with zeros. What they are is known from an earlier call
of the same kind. In the first call of a kind the ranks tell one another before each exchange
whether they go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ddinfer.errors import DdinferError
from ddinfer.parallel.communicator import Communicator, ConnectionLost, losing

#: What ranks tell one another before each exchange of a first call, and at its end.
_GOES_ON, _ENDS, _FAILED = 0, 1, 2


class CallAborted(DdinferError):
    """Another rank of the team failed in this call; it tells the leader why."""


class _Step(NamedTuple):
    """One exchange: the shapes that go to, and come from, each rank of the team."""

    dtype: torch.dtype
    sent: tuple[tuple[int, ...], ...]
    received: tuple[tuple[int, ...], ...]


class Exchange:
    """Exchanges between the ranks of a team, inside `call`.

    Args:
        comm: of the replica.
        ranks: the team's group ranks in ``comm``, in order.
    """

    def __init__(self, comm: Communicator, ranks: Sequence[int]):
        self.comm, self.ranks = comm, tuple(ranks)
        self.rank, self.size = self.ranks.index(comm.group_rank), len(self.ranks)
        self.num_bytes = 0
        #: Unset in a call that has more exchanges than the next of its kind will have.
        self.repeats = True
        self.awaiting: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._known: dict[int, list[_Step]] = {}
        self._steps: list[_Step] = []
        self._is_first = False

    @contextmanager
    def call(self, kind: int) -> Iterator[None]:
        """One call of the denoiser; every rank of the team enters it with the same ``kind``.

        Raises:
            CallAborted: another rank failed in the first call of a kind.
        """
        self._steps, self._is_first, self.repeats = [], kind not in self._known, True
        try:
            yield
            if self._is_first and self.size > 1:
                self._compare(_ENDS)
        except CallAborted:
            raise
        except Exception:
            self._complete(kind)
            raise
        if self.repeats:
            self._known[kind] = self._steps

    def _complete(self, kind: int) -> None:
        """Takes part in what is left of a failed call, so that no rank waits for this one."""
        if self.size == 1:
            return
        try:
            if self._is_first:
                self._exchange_codes(_FAILED)
            else:
                for step in self._known[kind][len(self._steps) :]:
                    zeros = [torch.zeros(shape, dtype=step.dtype) for shape in step.sent]
                    self._swap([z.to(self.comm.wire_device) for z in zeros], step.received)
        except ConnectionLost:
            pass  # the first error is the one to tell

    def swap(
        self, outgoing: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Sends ``outgoing[k]`` to rank k of the team and returns what came from each.

        This rank's own part is handed through.

        Args:
            shapes: of what comes from each rank; all have one dtype.

        Raises:
            ConnectionLost: a rank is gone.
            CallAborted: another rank failed in the first call of a kind.
        """
        step = _Step(
            outgoing[self.rank].dtype,
            tuple(tuple(t.shape) for t in outgoing),
            tuple(tuple(s) for s in shapes),
        )
        if self._is_first:
            self._compare(_GOES_ON)
        self._steps.append(step)
        wire, device = self.comm.wire_device, outgoing[self.rank].device
        received = self._swap([t.to(wire) for t in outgoing], step.received)
        made = [t.to(device) for t in received]
        made[self.rank] = outgoing[self.rank]
        return made

    def _swap(
        self, outgoing: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Posts and waits for every operation, also where a rank is gone: the others wait."""
        received = [
            torch.empty(shape, dtype=t.dtype, device=t.device)
            for shape, t in zip(shapes, outgoing, strict=True)
        ]
        works, held, lost = [], [], None
        with self.awaiting():
            for k, peer in enumerate(self.ranks):
                if k == self.rank:
                    continue
                sent = outgoing[k].contiguous().reshape(-1).view(torch.uint8)
                held.append(sent)
                self.num_bytes += sent.numel()
                landing = received[k].reshape(-1).view(torch.uint8)
                operations = [
                    dist.P2POp(operation, buffer, group=self.comm.device_group, group_peer=peer)
                    for operation, buffer in ((dist.isend, sent), (dist.irecv, landing))
                    if buffer.numel()
                ]
                try:
                    with losing(peer):
                        posted = dist.batch_isend_irecv(operations) if operations else []
                        works += [(peer, work) for work in posted]
                except ConnectionLost as error:
                    lost = error
            for peer, work in works:
                try:
                    with losing(peer):
                        work.wait()
                except ConnectionLost as error:
                    lost = error
        if lost is not None:
            raise lost
        return received

    def _compare(self, code: int) -> None:
        """In a first call, before an exchange and at the end: every rank is at the same place.

        Raises:
            CallAborted: a rank failed, or is elsewhere.
        """
        if any(other != code for other in self._exchange_codes(code)):
            raise CallAborted("another rank of the team failed in this call, or is elsewhere in it")

    def _exchange_codes(self, code: int) -> list[int]:
        """Sends ``code`` to the other ranks of the team; returns theirs, in rank order."""
        others = [rank for rank in self.ranks if rank != self.comm.group_rank]
        sending = [self.comm.send(torch.tensor([code]), rank, control=True) for rank in others]
        codes = []
        with self.awaiting():
            for rank in others:
                here = torch.zeros(1, dtype=torch.int64)
                self.comm.receive(here, rank, control=True)
                codes.append(int(here))
        for work in sending:
            work.wait()
        return codes
