"""Detecting stalls: a rank that makes no progress is reported with its stacks, or ends.

A thread on each rank checks once a second whether the number of denoiser calls or the phase has
changed. Being slow is not a stall, and neither is waiting for other ranks. Where a C call holds
the interpreter, so that no thread can run, `faulthandler` prints the stacks and ends the process.
A process that is suspended (SIGSTOP) is found by the other ranks on its machine.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ddinfer.distributed.peers import StoreLost
from ddinfer.distributed.process import exit_now
from ddinfer.distributed.process_group import Group
from ddinfer.errors import EXIT_INTERRUPTED, ErrorRecord, RankError

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
WARN_SECONDS = 60.0
#: Phases in which a rank works; in any other it waits for ranks that may be slow.
BUSY = ("loading", "running", "saving")
#: A rank that awaits the other stages of its model gets this many times their timeout, so that
#: the stalled stage is found first.
AWAIT_FACTOR = 2
#: The type in the error record of a stalled rank.
STALLED = "RankStalled"
#: The exit code of a process that `faulthandler` ends.
FAULTHANDLER_EXIT_CODE = 1


@dataclass
class _Timer:
    """How long a state has not changed."""

    state: object = None
    since: float = field(default_factory=time.monotonic)
    has_warned: bool = False

    def seconds(self, state: object) -> float:
        if state != self.state:
            self.state, self.since, self.has_warned = state, time.monotonic(), False
        return time.monotonic() - self.since


class Watchdog:
    """Watches the progress of this rank, whose engine calls these methods.

    Args:
        stuck_timeout: seconds without progress after which the rank ends; ``None``: never.

    Attributes:
        count: forwards of the denoiser and other signs of progress.
    """

    def __init__(self, group: Group, stuck_timeout: float | None = None):
        self.group, self.stuck_timeout = group, stuck_timeout
        self.count = 0
        self.is_decoding = self.is_waiting = self.is_awaiting = False
        self._timers: defaultdict[int, _Timer] = defaultdict(_Timer)  # by global rank
        self._ended = threading.Event()

    def listen_to(self, pipe: Any) -> None:
        """Report when the VAE of ``pipe`` starts to decode."""
        decoder: Any = getattr(getattr(pipe, "vae", None), "decoder", None)
        if hasattr(decoder, "register_forward_pre_hook"):
            decoder.register_forward_pre_hook(lambda *_: self.decodes())

    def steps(self) -> None:
        """The denoiser, or this rank's stage of it, starts a forward."""
        self.count += 1
        self.is_decoding = self.is_waiting = False

    def decodes(self) -> None:
        """The VAE starts to decode."""
        self.steps()
        self.is_decoding = True

    def waits(self) -> None:
        """This rank waits for other ranks now, for as long as they take."""
        self.is_waiting = True

    @contextlib.contextmanager
    def awaiting(self) -> Iterator[None]:
        """Inside, this rank waits for the other stages of its model."""
        self.is_awaiting = True
        try:
            yield
        finally:
            self.is_awaiting = False
            self.count += 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        thread = threading.Thread(target=self._watch, name="ddinfer-watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        with contextlib.suppress(StoreLost):  # the main thread reports it with more context
            while not self._ended.wait(POLL_SECONDS):
                self._check_self()
                self._check_suspended_peers()

    def _check_self(self) -> None:
        rank, activity = self.group.world.rank, self.group.activity
        if self.is_decoding:
            activity = activity.replace("running", "decoding", 1)
        is_idle = self.is_waiting or not self.group.activity.startswith(BUSY)
        factor = AWAIT_FACTOR if self.is_awaiting else 1
        timer = self._timers[rank]
        seconds = timer.seconds(None if is_idle else (self.count, activity, factor)) / factor
        if is_idle:
            faulthandler.cancel_dump_traceback_later()
        elif seconds < POLL_SECONDS / 2:  # it has made progress since the last check
            limit = self.stuck_timeout or WARN_SECONDS
            faulthandler.dump_traceback_later(
                factor * limit + 3 * POLL_SECONDS, file=2, exit=self.stuck_timeout is not None
            )
        elif self._is_due(rank, activity, timer, seconds):
            exit_now(EXIT_INTERRUPTED)

    def _check_suspended_peers(self) -> None:
        for rank, process in self.group.peers_here().items():
            timer = self._timers[rank]
            seconds = timer.seconds(process.is_stopped)
            activity = f"{self.group.activity_of(rank)} (suspended by SIGSTOP)"
            if timer.state and self._is_due(rank, activity, timer, seconds):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def _is_due(self, rank: int, activity: str, timer: _Timer, seconds: float) -> bool:
        """Warn of a stall, once; report its end as a failure → whether the rank must end."""
        is_due = self.stuck_timeout is not None and seconds >= self.stuck_timeout
        if not is_due and (seconds < WARN_SECONDS or timer.has_warned):
            return False
        timer.has_warned = True
        log.warning("rank %d has been %s for %.0f s without a step", rank, activity, seconds)
        if rank == self.group.world.rank:
            faulthandler.dump_traceback(file=2)
            if self.stuck_timeout is None:  # not twice
                faulthandler.cancel_dump_traceback_later()
        if is_due:
            record = ErrorRecord(STALLED, f"no progress for {seconds:.0f} s (--stuck_timeout)")
            self.group.post_failure(RankError(rank, activity, record, exit_code=EXIT_INTERRUPTED))
        return is_due


def explain(error: RankError, stuck_timeout: float | None) -> RankError:
    """The error of a rank that `faulthandler` ended, as that of a stalled rank."""
    if stuck_timeout is None or error.exitcode != FAULTHANDLER_EXIT_CODE:
        return error
    text = f"no progress for {stuck_timeout:.0f} s (--stuck_timeout), inside a C call"
    record = ErrorRecord(STALLED, text)
    return RankError(error.rank, error.phase, record, exit_code=EXIT_INTERRUPTED)


def is_stalled(error: RankError) -> bool:
    """Whether a failure is that of a stalled rank."""
    return error.record is not None and error.record.type == STALLED
