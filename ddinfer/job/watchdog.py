"""Detecting stalls: a warning, or the end of an attempt, when a rank makes no progress.

A thread on each rank writes the number of denoiser calls and the current phase to the store, over
a connection of its own, and watches the next rank; the last rank watches the first. Being slow is
not a stall: only a report that does not change counts, and that of a frozen process does not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from ddinfer.distributed.peers import Failure, PeerStatus, StoreLost
from ddinfer.distributed.process import exit_now
from ddinfer.distributed.process_group import Group
from ddinfer.errors import EXIT_INTERRUPTED, ErrorRecord

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
WARN_SECONDS = 60.0
#: Phases in which a rank works; in any other it waits for ranks that may be slow. A rank that
#: serves another's calls waits as well, and reports so repeatedly while it lives.
BUSY = ("loading", "running", "saving")
#: A rank that awaits the other stages of its model gets this many times their timeout, so that
#: the stalled stage is found first.
PATIENCE = 2
#: The type in the error record of a stalled rank.
STUCK = "RankStuck"


#: Makes a rank print the Python stacks of all its threads, also while it holds the interpreter.
STACKS_SIGNAL = signal.SIGUSR1
_prints_stacks = False


def print_stacks_on_request() -> None:
    """Let a stalled rank show where it is. Called by the command line, which may set handlers."""
    global _prints_stacks
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)
    _prints_stacks = True


class Heartbeat:
    """Reports the progress of this rank, and watches the next rank.

    Args:
        stuck_timeout: seconds without a change after which the attempt ends; ``None``: never.

    Attributes:
        count: bumped by every forward of the denoiser.
    """

    def __init__(self, group: Group, stuck_timeout: float | None = None):
        self.group, self.stuck_timeout = group, stuck_timeout
        self.count = 0
        self.is_decoding = self.is_waiting = self.is_awaiting = False
        self._beats = 0
        self._board: PeerStatus = group.second_board()
        self._next = (group.group_rank + 1) % group.group_size
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
        self.count += 1
        self.is_decoding, self.is_waiting = True, False

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
    def beating(self) -> Iterator[Heartbeat]:
        if _prints_stacks:
            self._board.set(f"stacks/{self.group.group_rank}", "1")
        thread = threading.Thread(target=self._work, name="ddinfer-heartbeat", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    def _work(self) -> None:
        # The main thread reports a lost store with more context.
        with contextlib.suppress(StoreLost):
            watch = _Watch()
            while not self._ended.wait(BEAT_SECONDS):
                self._board.set(f"beat/{self.group.group_rank}", self._word())
                self._end_if_stuck()
                word = self._board.read(f"beat/{self._next}")
                activity = self._board.activity_of(self.group.global_rank(self._next))
                self._judge(watch.silence(word, activity or ""), watch)

    def _word(self) -> str:
        """``count activity``, which changes with any progress."""
        activity = self.group.board.activity
        self._beats += 1
        if self.is_waiting and activity.startswith("running"):
            return f"{self.count}+{self._beats} {activity.replace('running', 'serving', 1)}"
        if self.is_awaiting and activity.startswith("running"):
            return f"{self.count} {activity.replace('running', 'awaiting', 1)}"
        if self.is_decoding and activity.startswith("running"):
            activity = activity.replace("running", "decoding", 1)
        return f"{self.count} {activity}"

    def _judge(self, silence: float, watch: _Watch) -> None:
        if watch.is_awaiting:
            silence /= PATIENCE
        if silence < min(WARN_SECONDS, self.stuck_timeout or WARN_SECONDS):
            return
        rank, activity = self.group.global_rank(self._next), watch.doing
        if silence >= WARN_SECONDS and not watch.has_warned:
            watch.has_warned = True
            log.warning("rank %d has been %s for %.0f s without a step", rank, activity, silence)
            self._request_stacks()
        if self.stuck_timeout is not None and silence >= self.stuck_timeout:
            text = f"no progress for {silence:.0f} s (--stuck_timeout)"
            failure = Failure(rank, activity, ErrorRecord(STUCK, text), exit_code=EXIT_INTERRUPTED)
            self._request_stacks()
            self._board.post_failure(failure)
            self._end_if_stuck()
            if pid := self._board.process_here(self._next):
                # A frozen process cannot end itself.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _request_stacks(self) -> None:
        """Make the next rank print the stacks of its threads, if it is on this machine."""
        pid = self._board.process_here(self._next)
        if pid is not None and self._board.read(f"stacks/{self._next}") is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, STACKS_SIGNAL)
            time.sleep(0.5)  # time to print before it is killed

    def _end_if_stuck(self) -> None:
        """End this process if it is the stalled one: its main thread cannot."""
        failure = self._board.first_failure()
        if failure is None or failure.rank != self.group.world.rank:
            return
        if is_stuck(failure.record):
            exit_now(EXIT_INTERRUPTED)


class _Watch:
    """How long the report of a rank has not changed.

    Attributes:
        word: of its thread; ``None`` before the first.
        activity: as its main thread has put it on the board, which is newer than the last word of
            a process that froze.
    """

    def __init__(self) -> None:
        self.word: bytes | None = None
        self.activity = ""
        self.since = time.monotonic()
        self.has_warned = False

    @property
    def is_awaiting(self) -> bool:
        """Whether the rank waits for the other stages of its model."""
        return b" awaiting" in (self.word or b"")

    @property
    def doing(self) -> str:
        """The activity; decoding, where the last report says so."""
        said = (self.word or b"").decode().partition(" ")[2]
        is_same = said.partition(" ")[2] == self.activity.partition(" ")[2]
        return said if is_same and said.startswith("decoding") else self.activity

    def silence(self, word: bytes | None, activity: str) -> float:
        """Seconds since the last change; 0 for a rank that waits for others."""
        if (word, activity) != (self.word, self.activity):
            self.word, self.activity = word, activity
            self.since, self.has_warned = time.monotonic(), False
        return time.monotonic() - self.since if activity.startswith(BUSY) else 0.0


def is_stuck(record: ErrorRecord | None) -> bool:
    """Whether a failure is that of a stalled rank."""
    return record is not None and record.type == STUCK
