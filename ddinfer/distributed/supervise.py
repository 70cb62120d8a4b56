"""Watching the ranks of a launch until the last one has ended, and finding out who failed first."""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ddinfer.distributed.peers import OBITUARY_SECONDS, Board, Failure
from ddinfer.distributed.rank_server import Outcome, Start
from ddinfer.distributed.server import RankServer
from ddinfer.errors import EXIT_INTERRUPTED, DdinferError

#: Seconds that the ranks beside a failed one get to hear of it and end by themselves.
FAILURE_GRACE_SECONDS = 5.0
#: Seconds between SIGTERM and SIGKILL.
TERMINATE_SECONDS = 5.0
#: Seconds after SIGKILL until a rank that still has not ended is left to the kernel.
UNKILLABLE_SECONDS = 30.0
ABANDON = 0


class Interrupted(DdinferError):
    """SIGTERM came and the ranks were ended. The same command goes on from there."""

    exit_code = EXIT_INTERRUPTED


@dataclass
class _Rank:
    number: int
    reader: int
    pid: int | None = None
    exitcode: int | None = None
    data: bytearray = field(default_factory=bytearray)
    outcome: Outcome | None = None

    @property
    def has_ended(self) -> bool:
        return self.exitcode is not None

    def read(self) -> bool:
        """Take what is in the pipe; whether there can be more."""
        while True:
            try:
                chunk = os.read(self.reader, 1 << 20)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            self.data += chunk
            size = int.from_bytes(self.data[:8], "little")
            if len(self.data) >= 8 and len(self.data) == 8 + size:
                self.outcome = pickle.loads(self.data[8:])
                return False


class Supervisor:
    """One launch, from the server's start until nothing of it is left."""

    def __init__(
        self,
        server: RankServer,
        readers: Sequence[int],
        writers: Sequence[int],
        on_failure: Literal["terminate", "finish"],
        grace_seconds: float,
        on_death: Callable[[int, int], object] = lambda rank, number: None,
    ):
        self.on_death = on_death
        self.server, self._writers = server, list(writers)
        self.ranks = [_Rank(k, reader) for k, reader in enumerate(readers)]
        self.on_failure, self.grace_seconds = on_failure, grace_seconds
        self.board: Board | None = None
        self.failure: Failure | None = None
        self.hearsay: Failure | None = None
        self.stopped_by: int | None = None
        self.is_ending = False
        self._agenda: list[tuple[float, int]] = []  # when to send which signal
        self._signals: list[int] = []
        self._selector = selectors.DefaultSelector()

    def run(self, start: Start, store: Any, prefix: str) -> list[Any]:
        """Start the ranks and wait for all → what each returned. See `launch`."""
        from torch.distributed import PrefixStore

        board_store = PrefixStore("board", PrefixStore(prefix, store))
        self.board = Board(board_store, range(len(self.ranks)))
        if self.on_failure == "finish":
            self.board.let_the_living_finish()
        self.server.start(start, self._writers)
        self._close_writers()
        self._selector.register(self.server.control, selectors.EVENT_READ)
        for rank in self.ranks:
            os.set_blocking(rank.reader, False)
            self._selector.register(rank.reader, selectors.EVENT_READ, rank)
        while not all(rank.has_ended for rank in self.ranks):
            try:
                self._turn()
            except KeyboardInterrupt:
                self.stop(signal.SIGINT)
        return self._conclude()

    def _turn(self) -> None:
        while self._signals:
            self.stop(self._signals.pop(0))
        now = time.monotonic()
        while self._agenda and self._agenda[0][0] <= now:
            self._end_by(self._agenda.pop(0)[1])
        timeout = max(0.0, self._agenda[0][0] - now) if self._agenda else None
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                self._hear_server()
            elif isinstance(key.data, _Rank):
                self._hear_rank(key.data)
            else:
                os.read(key.fd, 4096)  # a signal woke us

    def _hear_server(self) -> None:
        try:
            kind, number, value = pickle.loads(self.server.control.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._lose_server()
            return
        rank = self.ranks[number]
        if kind == "started":
            rank.pid = value
            if self.stopped_by is not None:  # it was told to the others before this one was there
                self._signal(self.stopped_by)
            return
        rank.exitcode = value
        self._hear_rank(rank)
        if rank.outcome is None and not self.is_ending:
            self._fail(Failure(number, self._phase_of(number), exitcode=value))
            asked_for = self.stopped_by is not None or (self.failure and self.failure.ends_the_job)
            if value < 0 and not asked_for:
                self.on_death(number, -value)

    def _lose_server(self) -> None:
        """Ranks do not outlive the process they were forked from."""
        self._selector.unregister(self.server.control)
        code = self.server.process.wait()
        for rank in self.ranks:
            if not rank.has_ended:
                rank.exitcode = code
                self._hear_rank(rank)
                if rank.outcome is None and not self.is_ending:
                    self._fail(Failure(rank.number, self._phase_of(rank.number), exitcode=code))

    def _hear_rank(self, rank: _Rank) -> None:
        if rank.reader not in self._selector.get_map():
            return  # its last words were heard, perhaps in this very turn, with the server's
        if not rank.read():
            self._selector.unregister(rank.reader)
            outcome = rank.outcome
            if outcome is not None and outcome.blamed is not None:
                self._hear_say(Failure.of(rank.number, "", outcome.blamed))
            elif outcome is not None and outcome.error is not None:
                phase = self._phase_of(rank.number)
                code = outcome.exit_code
                self._fail(Failure(rank.number, phase, outcome.error, exit_code=code))

    def _phase_of(self, rank: int) -> str:
        assert self.board is not None
        return self.board.activity_of(rank) or "starting"

    def _fail(self, failure: Failure) -> None:
        assert self.board is not None
        if self.failure is None and self.stopped_by is None:
            told = self.board.post_failure(failure)
            # A peer that missed a dead rank cannot know how it died.
            guessed = told.rank == failure.rank and told.is_guess
            self.failure = failure if guessed else told
            self._let_go()

    def _hear_say(self, failure: Failure) -> None:
        """A rank ended because of another one, whose own news may be on their way."""
        self.hearsay = self.hearsay or failure
        self._let_go()

    def _let_go(self) -> None:
        ends = self.failure is not None and self.failure.ends_the_job
        if (self.on_failure == "terminate" or ends) and not self._agenda and not self.is_ending:
            first = time.monotonic() + max(FAILURE_GRACE_SECONDS, OBITUARY_SECONDS + 1)
            last = first + TERMINATE_SECONDS
            self._agenda = [(first, signal.SIGTERM), (last, signal.SIGKILL)]

    def stop(self, number: int) -> None:
        """Somebody wants the job to end: the ranks hear it once; a second time ends them."""
        now = time.monotonic()
        if self.stopped_by is not None:
            self._agenda = [(now, signal.SIGKILL)]
            return
        self.stopped_by = number
        if all(rank.pid is None for rank in self.ranks):
            self.server.kill()
        self._signal(number)
        self._agenda = [(now + self.grace_seconds, signal.SIGKILL)]

    def _end_by(self, number: int) -> None:
        self.is_ending = True
        if number == ABANDON:
            self.server.kill()
        else:
            self._signal(number)

    def _signal(self, number: int) -> None:
        for rank in self.ranks:
            if rank.pid is not None and not rank.has_ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, number)
        if number == signal.SIGKILL:
            # All that stands between a kill and its end is a process that hangs in the kernel.
            self._agenda = [(time.monotonic() + UNKILLABLE_SECONDS, ABANDON)]

    def _conclude(self) -> list[Any]:
        outcomes = [rank.outcome for rank in self.ranks]
        if self.stopped_by is not None:
            if all(o is not None and o.error is None and o.blamed is None for o in outcomes):
                return [o.value for o in outcomes if o is not None]
            if self.stopped_by == signal.SIGINT:
                raise KeyboardInterrupt
            name = signal.Signals(self.stopped_by).name
            raise Interrupted(
                f"{name} came; the ranks have ended. The same command goes on from here"
            )
        failure = self.failure or self.hearsay
        if failure is not None:
            raise failure.to_error()
        return [o.value for o in outcomes if o is not None]

    @contextlib.contextmanager
    def ending_all(self) -> Iterator[None]:
        """Whatever happens inside, nothing of the launch is left afterwards."""
        try:
            yield
        finally:
            self.server.close()
            self._selector.close()
            self._close_writers()
            for rank in self.ranks:
                os.close(rank.reader)

    def _close_writers(self) -> None:
        while self._writers:
            os.close(self._writers.pop())

    @contextlib.contextmanager
    def handling_signals(self, wanted: bool) -> Iterator[None]:
        """SIGINT and SIGTERM go to the ranks, instead of raising somewhere in here."""
        if not wanted:
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._selector.register(reader, selectors.EVENT_READ, "signal")
        woken_before = signal.set_wakeup_fd(writer)
        before = {
            number: signal.signal(number, lambda n, _: self._signals.append(n))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken_before)
            os.close(reader)
            os.close(writer)
