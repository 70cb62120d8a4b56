"""Ending in order when a signal asks for it. Only the command line installs the handlers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from ddinfer.distributed.parent import leave
from ddinfer.errors import Stopped

#: Seconds after the grace until a process that cannot be interrupted is ended from a thread.
OVERDUE_SECONDS = 5.0

ASKING = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether somebody has asked this process to end, and how long it may still take.

    The first signal is only noted: whoever makes images looks here between batches. When the
    grace is over `Stopped` is raised in the main thread, wherever that is. A second signal ends
    the process at once.

    Args:
        grace_seconds: for the batch in hand.
        says_so: whether a signal is answered on standard error, for whoever pressed Ctrl-C.
    """

    def __init__(self, grace_seconds: float = 20.0, *, says_so: bool = False):
        self.grace_seconds, self.says_so = grace_seconds, says_so
        self.signal_number: int | None = None
        self._last_resort: threading.Timer | None = None

    @property
    def is_requested(self) -> bool:
        return self.signal_number is not None

    def raise_if_requested(self) -> None:
        if self.signal_number is not None:
            raise Stopped(self.signal_number)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[Stop]:
        """Listen to SIGTERM and Ctrl-C. Main thread only."""
        before = {number: signal.signal(number, self._asked) for number in ASKING}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._abandon)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._last_resort is not None:
                self._last_resort.cancel()

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            leave(Stopped(self.signal_number).exit_code)
        self.signal_number = number
        # A timer of zero seconds would be none.
        signal.setitimer(signal.ITIMER_REAL, max(self.grace_seconds, 0.001))
        self._last_resort = threading.Timer(self.grace_seconds + OVERDUE_SECONDS, self._leave)
        self._last_resort.daemon = True
        self._last_resort.start()
        self._say(
            f"{signal.Signals(number).name} came; what is in hand may take "
            f"{self.grace_seconds:g} s more. A second signal ends at once"
        )

    def _leave(self) -> None:
        """From a thread: neither the main thread nor the disk would let the process end."""
        assert self.signal_number is not None
        stopped = Stopped(self.signal_number)
        self._say(str(stopped))
        leave(stopped.exit_code)

    def _say(self, text: str) -> None:
        """To standard error, past its buffer: the main thread may be inside of it."""
        if self.says_so:
            with contextlib.suppress(OSError):  # no terminal any more
                os.write(2, f"\nddinfer: {text}\n".encode())

    def _abandon(self, number: int, frame: FrameType | None) -> None:
        self.raise_if_requested()
