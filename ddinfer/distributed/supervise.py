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

from ddinfer.distributed.peers import (
    CONTINUE_ON_FAILURE,
    PeerStatus,
    ends_the_job,
    is_reported_by_peer,
)
from ddinfer.distributed.process import COPY_SECONDS, is_running, stop_signals
from ddinfer.distributed.rank import Outcome, RankTask, run_rank
from ddinfer.errors import EXIT_INTERRUPTED, DdinferError, ErrorRecord, RankError, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store

#: Seconds that the peers of a failed rank get to learn of it and end by themselves.
FAILURE_GRACE_SECONDS = 10.0
#: Seconds after SIGKILL until a rank that hangs in the kernel is left there.
UNKILLABLE_SECONDS = 30.0

#: What multiprocessing reports of a process whose forkserver has ended.
FORKSERVER_LOST = 255


class Interrupted(DdinferError):
    """A signal ended the ranks. The same command resumes the job."""

    exit_code = EXIT_INTERRUPTED


class CudaLost(UsageError):
    """The ranks were forked after CUDA had been initialized. None has begun its work."""

    def __init__(self) -> None:
        super().__init__(
            "importing what all ranks need has opened CUDA, and no process forked afterwards can "
            "use a GPU; use --start_method spawn"
        )


@dataclass
class _Rank:
    number: int
    process: BaseProcess
    pipe: Connection
    task: RankTask
    parent: int | None = None
    outcome: Outcome | None = None
    has_ended: bool = False

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


class Supervisor:
    """The ranks of one launch, from their start until nothing of them is left. See `launch`."""

    def __init__(
        self,
        on_failure: Literal["terminate", "finish"],
        grace_seconds: float,
        on_death: Callable[[int, int], object],
    ):
        self.on_failure, self.grace_seconds, self.on_death = on_failure, grace_seconds, on_death
        self._store: Store | None = None
        self.ranks: list[_Rank] = []
        self.failure: RankError | None = None
        self.stopped_by: int | None = None
        self._stopped_at = 0.0
        self._kill_at: float | None = None
        self._killed_at: float | None = None
        self._received: list[int] = []
        self._wakeup: list[int] = []
        self._is_starting = False

    def watch_through(self, store: Store) -> None:
        """Read what the ranks are doing from the part of the store that `process_group` uses."""
        self._store = store
        if self.on_failure == "finish":
            store.set(CONTINUE_ON_FAILURE, "1")

    def _peers(self, rank: int) -> PeerStatus:
        """The group that a rank has created last."""
        from torch.distributed import PrefixStore

        assert self._store is not None
        number = max(1, self._store.add(f"groups/{rank}", 0))
        prefix = f"group/{number}/peers"
        return PeerStatus(PrefixStore(prefix, self._store), range(len(self.ranks)))

    def start(self, context: ForkServerContext | SpawnContext, tasks: Sequence[RankTask]) -> None:
        """Start the ranks, which then wait for their tasks.

        Raises:
            Interrupted, KeyboardInterrupt: a signal arrived; `Process.start` may wait for seconds.
        """
        streams = []
        with contextlib.suppress(OSError):  # closed, as a daemon's may be
            streams += [Connection(os.dup(fd)) for fd in (1, 2)]
        self._is_starting = True
        try:
            if self._received:
                raise _interruption(self._received[0])
            for task in tasks:
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=run_rank, args=(theirs, streams), name=f"rank-{task.rank}"
                )
                self.ranks.append(_Rank(task.rank, process, ours, task))
                process.start()
                theirs.close()
        finally:
            self._is_starting = False
            for stream in streams:
                stream.close()

    def wait(self) -> list[Any]:
        """Wait for all ranks → what each returned."""
        self._handle_signals()
        while living := [rank for rank in self.ranks if not rank.has_ended]:
            if self._killed_at and time.monotonic() > self._killed_at + UNKILLABLE_SECONDS:
                break
            try:
                self._wait_for_next(living)
            except KeyboardInterrupt:
                self.stop(signal.SIGINT)
        return self._values()

    @contextlib.contextmanager
    def ending_all(self) -> Iterator[None]:
        """Whatever happens inside, no rank is left afterwards."""
        try:
            yield
        finally:
            for rank in self.ranks:
                rank.kill_group()
            for rank in self.ranks:
                if rank.process.pid is not None:
                    rank.process.join(0 if self._killed_at else UNKILLABLE_SECONDS)
                rank.pipe.close()

    def _wait_for_next(self, living: Sequence[_Rank]) -> None:
        """Take what the ranks send next, or kill them when it is time."""
        now = time.monotonic()
        if self._kill_at is not None and self._killed_at is None and self._kill_at <= now:
            self._killed_at = now
            for rank in living:
                rank.signal(signal.SIGKILL)
        until = self._killed_at + UNKILLABLE_SECONDS if self._killed_at else self._kill_at
        timeout = None if until is None else max(0.0, until - now)
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
        error = message.error
        if error is None:
            return
        if error.rank == rank.number:
            phase = self._activity_of(rank)
            self._fail(RankError(error.rank, phase, error.record, exit_code=error.exit_code))
        else:  # it ended because of a peer, whose own report may be on its way
            self._end_others()

    def _on_end(self, rank: _Rank) -> None:
        while not rank.pipe.closed and rank.pipe.poll():
            self._receive(rank)
        rank.process.join()
        code = rank.process.exitcode
        rank.has_ended = True
        rank.kill_group()
        if rank.outcome is not None or self.stopped_by is not None or self._killed_at:
            return
        record = None
        if code == FORKSERVER_LOST and _ends_soon(rank.parent):
            record = ErrorRecord("ForkserverDied", "the process that forks the ranks was killed")
        self._fail(RankError(rank.number, self._activity_of(rank), record, exitcode=code))
        is_requested = self.failure is not None and ends_the_job(self.failure)
        if code is not None and code < 0 and not is_requested:
            self.on_death(rank.number, -code)

    def _activity_of(self, rank: _Rank) -> str:
        return self._peers(rank.number).activity_of(rank.number) or "starting"

    def _fail(self, failure: RankError) -> None:
        if self.failure is None and self.stopped_by is None:
            first = self._peers(failure.rank).post_failure(failure)
            is_vague = first.rank == failure.rank and is_reported_by_peer(first)
            self.failure = failure if is_vague else first
            self._end_others()

    def _end_others(self) -> None:
        """Have the other ranks killed if they do not end by themselves."""
        ends = self.failure is not None and ends_the_job(self.failure)
        if self._kill_at is None and (ends or self.on_failure == "terminate"):
            self._kill_at = time.monotonic() + FAILURE_GRACE_SECONDS

    def stop(self, number: int) -> None:
        """A signal asks for the end: ranks receive it once; a second request kills them."""
        now = time.monotonic()
        if self.stopped_by is None:
            self.stopped_by, self._stopped_at = number, now
            self._kill_at = now + self.grace_seconds
            for rank in self.ranks:
                rank.signal(number)
        elif now - self._stopped_at >= COPY_SECONDS:
            self._kill_at = now

    def _values(self) -> list[Any]:
        """What the ranks returned; raises if one failed or a signal ended them."""
        outcomes = [rank.outcome for rank in self.ranks if rank.outcome is not None]
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        is_complete = bool(outcomes) and len(outcomes) == len(self.ranks) and not errors
        if self.stopped_by is not None and not is_complete:
            raise _interruption(self.stopped_by)
        if self.stopped_by is None and (self.failure is not None or errors):
            raise self.failure or errors[0]
        return [outcome.value for outcome in outcomes]

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
            raise _interruption(number)

    def _handle_signals(self) -> None:
        while self._received:
            self.stop(self._received.pop(0))


def _interruption(number: int) -> BaseException:
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    name = signal.Signals(number).name
    return Interrupted(
        f"received {name}; the ranks have ended. Run the same command again to resume"
    )


def _ends_soon(pid: int | None) -> bool:
    """Whether a process has ended; its files are closed a moment before that shows."""
    deadline = time.monotonic() + 1.0
    while pid is not None and is_running(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
