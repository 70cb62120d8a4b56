"""Watching the ranks of a launch until the last one has ended, and finding who failed first."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from ddinfer.distributed.peers import EXIT_REPORT_SECONDS, Failure, PeerStatus, start_time
from ddinfer.distributed.process import COPY_SECONDS, stop_signals
from ddinfer.distributed.rank import Outcome, RankTask, run_rank
from ddinfer.errors import EXIT_INTERRUPTED, DdinferError, ErrorRecord, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store

#: Seconds that the peers of a failed rank get to learn of it and end by themselves.
FAILURE_GRACE_SECONDS = 5.0
#: Seconds between SIGTERM and SIGKILL.
TERMINATE_SECONDS = 5.0
#: Seconds after SIGKILL until a rank that still has not ended is left to the kernel.
UNKILLABLE_SECONDS = 30.0
ABANDON = 0

#: What multiprocessing reports of a process whose forkserver has ended.
FORKSERVER_LOST = 255


class Interrupted(DdinferError):
    """A signal came and the ranks were ended. The same command resumes the job."""

    exit_code = EXIT_INTERRUPTED


class CudaLost(UsageError):
    """The ranks were forked after CUDA had been initialized. None has begun its work."""

    def __init__(self) -> None:
        super().__init__(
            "importing what all ranks need has opened CUDA, and no process forked afterwards can "
            "use a GPU; use --start_method spawn"
        )


class _StartInterrupted(BaseException):
    """Raised by the signal handler, since `Process.start` waits for seconds of imports."""


@dataclass
class _Rank:
    number: int
    process: BaseProcess
    pipe: Connection
    task: RankTask
    parent: int | None = None
    outcome: Outcome | None = None
    exitcode: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.exitcode is not None

    def signal(self, number: int) -> None:
        if self.process.pid is not None and not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def kill_group(self) -> None:
        """End the rank, if it has not ended, and what it has started: it leads a session."""
        self.signal(signal.SIGKILL)
        if self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


def _ends_soon(pid: int | None) -> bool:
    """Whether a process has ended; its files are closed a moment before that shows."""
    deadline = time.monotonic() + 1.0
    while pid is not None and start_time(pid) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Supervisor:
    """The ranks of one launch, from their start until nothing of them is left."""

    def __init__(
        self,
        on_failure: Literal["terminate", "finish"],
        grace_seconds: float,
        on_death: Callable[[int, int], object] = lambda rank, number: None,
    ):
        self.on_death = on_death
        self.on_failure, self.grace_seconds = on_failure, grace_seconds
        self.board: PeerStatus | None = None
        self.ranks: list[_Rank] = []
        self.failure: Failure | None = None
        self.reported_by_peer: Failure | None = None
        self.stopped_by: int | None = None
        self.is_ending = False
        self._stopped_at = 0.0
        self._pending_signals: list[tuple[float, int]] = []  # when to send which
        self._received: list[int] = []
        self._wakeup: list[int] = []
        self._is_starting = False

    def watch_through(self, store: Store, prefix: str, num_ranks: int) -> None:
        """Read what the ranks are doing from the store that is hosted for them."""
        from torch.distributed import PrefixStore

        board_store = PrefixStore("board", PrefixStore(prefix, store))
        self.board = PeerStatus(board_store, range(num_ranks))
        if self.on_failure == "finish":
            self.board.set_continue_on_failure()

    def start(self, context: ForkServerContext | SpawnContext, tasks: Sequence[RankTask]) -> None:
        """Start the ranks. A signal meanwhile ends those that have started."""
        streams = []
        with contextlib.suppress(OSError):  # closed, as a daemon's may be
            streams += [Connection(os.dup(fd)) for fd in (1, 2)]
        self._is_starting = True
        try:
            for task in tasks:
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=run_rank, args=(theirs, streams), name=f"rank-{task.rank}"
                )
                self.ranks.append(_Rank(task.rank, process, ours, task))
                process.start()
                theirs.close()
        except _StartInterrupted:
            if self.ranks[-1].process.pid is None:
                self.ranks.pop().pipe.close()
        finally:
            self._is_starting = False
            for stream in streams:
                stream.close()

    def wait(self) -> list[Any]:
        """Wait for all ranks → what each returned. See `launch`."""
        self._handle_signals()
        while not all(rank.has_ended for rank in self.ranks):
            try:
                self._turn()
            except KeyboardInterrupt:
                self.stop(signal.SIGINT)
        return self._conclude()

    @contextlib.contextmanager
    def ending_all(self) -> Iterator[None]:
        """Whatever happens inside, no rank is left afterwards."""
        try:
            yield
        finally:
            for rank in self.ranks:
                rank.kill_group()
            for rank in self.ranks:
                rank.process.join(UNKILLABLE_SECONDS if not rank.has_ended else 0)
                rank.pipe.close()

    def _turn(self) -> None:
        now = time.monotonic()
        while self._pending_signals and self._pending_signals[0][0] <= now:
            self._end_by(self._pending_signals.pop(0)[1])
        timeout = max(0.0, self._pending_signals[0][0] - now) if self._pending_signals else None
        living = [rank for rank in self.ranks if not rank.has_ended]
        pipes = {rank.pipe: rank for rank in living if not rank.pipe.closed}
        sentinels = {rank.process.sentinel: rank for rank in living}
        ready = wait([*self._wakeup, *pipes, *sentinels], timeout)
        for fd in self._wakeup:
            if fd in ready:
                os.read(fd, 4096)
        self._handle_signals()  # first, since ranks that a signal ended have not failed
        for each in ready:
            if isinstance(each, Connection):
                self._receive(pipes[each])
            elif each in sentinels:
                self._on_end(sentinels[each])

    def _handle_signals(self) -> None:
        while self._received:
            self.stop(self._received.pop(0))

    def _receive(self, rank: _Rank) -> None:
        """Take one message of a rank: that it is ready, then its `Outcome`."""
        try:
            message = pickle.loads(rank.pipe.recv_bytes())
            if rank.parent is None:
                rank.parent = message
                if self.stopped_by is None:
                    rank.pipe.send_bytes(pickle.dumps(rank.task))
                    return
        except (EOFError, OSError):
            message = None
        rank.pipe.close()
        if not isinstance(message, Outcome):
            return
        rank.outcome = message
        if message.lost_cuda:
            raise CudaLost()
        if message.caused_by is not None:
            self._on_peer_report(Failure.of(rank.number, "", message.caused_by))
        elif message.error is not None:
            phase, code = self._phase_of(rank.number), message.exit_code
            self._fail(Failure(rank.number, phase, message.error, exit_code=code))

    def _on_end(self, rank: _Rank) -> None:
        while not rank.pipe.closed and rank.pipe.poll():
            self._receive(rank)
        rank.process.join()
        code = rank.process.exitcode
        assert code is not None
        rank.exitcode = code
        rank.kill_group()
        if rank.outcome is None and not self.is_ending:
            record = None
            if code == FORKSERVER_LOST and _ends_soon(rank.parent):
                record = ErrorRecord(
                    "ForkserverDied", "the process that forks the ranks was killed"
                )
            self._fail(Failure(rank.number, self._phase_of(rank.number), record, exitcode=code))
            requested = self.stopped_by is not None or (self.failure and self.failure.ends_the_job)
            if code < 0 and not requested:
                self.on_death(rank.number, -code)

    def _phase_of(self, rank: int) -> str:
        assert self.board is not None
        return self.board.activity_of(rank) or "starting"

    def _fail(self, failure: Failure) -> None:
        if self.failure is None and self.stopped_by is None:
            assert self.board is not None
            first = self.board.post_failure(failure)
            # A peer that missed a dead rank cannot know how it died.
            guessed = first.rank == failure.rank and first.is_guess
            self.failure = failure if guessed else first
            self._schedule_termination()

    def _on_peer_report(self, failure: Failure) -> None:
        """A rank ended because of another one, whose own report may be on its way."""
        self.reported_by_peer = self.reported_by_peer or failure
        self._schedule_termination()

    def _schedule_termination(self) -> None:
        ends = self.failure is not None and self.failure.ends_the_job
        if self._pending_signals or self.is_ending or (self.on_failure == "finish" and not ends):
            return
        first = time.monotonic() + max(FAILURE_GRACE_SECONDS, EXIT_REPORT_SECONDS + 1)
        last = first + TERMINATE_SECONDS
        self._pending_signals = [(first, signal.SIGTERM), (last, signal.SIGKILL)]

    def stop(self, number: int) -> None:
        """A signal asks for the end: ranks receive it once; a second request kills them."""
        now = time.monotonic()
        if self.stopped_by is not None:
            if now - self._stopped_at >= COPY_SECONDS:
                self._pending_signals = [(now, signal.SIGKILL)]
            return
        self.stopped_by, self._stopped_at = number, now
        self._signal(number)
        self._pending_signals = [(now + self.grace_seconds, signal.SIGKILL)]

    def _end_by(self, number: int) -> None:
        self.is_ending = True
        if number != ABANDON:
            self._signal(number)
            return
        for rank in self.ranks:
            if not rank.has_ended:
                rank.exitcode = -signal.SIGKILL

    def _signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.signal(number)
        if number == signal.SIGKILL:
            # Only a process that hangs in the kernel does not end by it.
            self._pending_signals = [(time.monotonic() + UNKILLABLE_SECONDS, ABANDON)]

    def _conclude(self) -> list[Any]:
        outcomes = [rank.outcome for rank in self.ranks]
        if self.stopped_by is not None:
            if outcomes and all(o and o.error is None and o.caused_by is None for o in outcomes):
                return [o.value for o in outcomes if o is not None]
            if self.stopped_by == signal.SIGINT:
                raise KeyboardInterrupt
            name = signal.Signals(self.stopped_by).name
            raise Interrupted(
                f"received {name}; the ranks have ended. Run the same command again to resume"
            )
        failure = self.failure or self.reported_by_peer
        if failure is not None:
            raise failure.to_error()
        return [o.value for o in outcomes if o is not None]

    @contextlib.contextmanager
    def handling_signals(self, wanted: bool) -> Iterator[None]:
        """Signals that ask for the end go to the ranks, instead of raising somewhere in here."""
        if not wanted:
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._wakeup = [reader]
        wakeup_before = signal.set_wakeup_fd(writer)
        before = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup_before)
            os.close(reader)
            os.close(writer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        if self._is_starting:
            raise _StartInterrupted
