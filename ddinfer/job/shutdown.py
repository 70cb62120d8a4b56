"""Ending in order when a signal asks for it. Only the command line installs the handlers."""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from ddinfer.distributed.process import COPY_SECONDS, STOP_SIGNALS, stop_signals
from ddinfer.errors import Stopped

#: Seconds after the grace until a process that cannot be interrupted is ended from a thread.
OVERDUE_SECONDS = 5.0

#: Seconds between attempts to interrupt what the main thread waits for.
NUDGE_SECONDS = 0.1


class Stop:
    """Whether somebody has asked this process to end, and how long it may still take.

    The first signal is only noted: whoever makes images looks here between batches. When the
    grace is over `Stopped` is raised in the main thread, wherever that is. A second signal ends
    the process at once; a copy of the first, which arrives where a launcher forwards what every
    process has received, does not.

    Python runs handlers in the main thread only, and not before that is back from the call that
    it is in; a read that it was just about to begin is not even interrupted. So a thread hears
    of signals by itself (`signal.set_wakeup_fd`), answers them and keeps the time.

    Args:
        grace_seconds: for the batch in hand.
        says_so: whether a signal is answered on standard error, for whoever pressed Ctrl-C.
        launcher_kills: a second signal is the launcher's to answer, which then sends SIGKILL.
    """

    def __init__(
        self,
        grace_seconds: float = 20.0,
        *,
        says_so: bool = False,
        launcher_kills: bool = False,
    ):
        self.grace_seconds, self.says_so = grace_seconds, says_so
        self.launcher_kills = launcher_kills
        self.signal_number: int | None = None
        self._is_abandoned = False
        self._handlers_before: dict[int, Any] = {}
        self._wakeup_before = -1

    @property
    def is_requested(self) -> bool:
        return self.signal_number is not None

    def raise_if_requested(self) -> None:
        if self.signal_number is not None:
            raise Stopped(self.signal_number)

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[Stop]:
        """Listen to SIGTERM, SIGHUP and Ctrl-C. Main thread only."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        listener = threading.Thread(
            target=self._listen, args=(reader,), name="ddinfer-signals", daemon=True
        )
        listener.start()
        self._wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        handlers = {**dict.fromkeys(stop_signals(), self._note), signal.SIGALRM: self._abandon}
        for number, handler in handlers.items():
            self._handlers_before[number] = signal.signal(number, handler)
        os.register_at_fork(after_in_child=self._forget_in_child)
        try:
            yield self
        finally:
            self._is_abandoned = True  # or what comes too late would interrupt what comes next
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(writer)  # which ends the listener
            listener.join()
            os.close(reader)
            self._give_handlers_back()

    def _forget_in_child(self) -> None:
        """A child shares the pipe, and a signal to it would be taken for one to us."""
        if self._handlers_before:
            signal.set_wakeup_fd(self._wakeup_before)
        self._give_handlers_back()

    def _give_handlers_back(self) -> None:
        while self._handlers_before:
            signal.signal(*self._handlers_before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number

    def _abandon(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested and not self._is_abandoned:
            self._is_abandoned = True
            self.raise_if_requested()

    def _listen(self, reader: int) -> None:
        """Answer signals and keep the time, from a thread, until the pipe is closed."""
        asked_at: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while True:
                if selector.select(self._seconds_to_wait(asked_at)):
                    heard = os.read(reader, 1)
                    if not heard:
                        return
                    if heard[0] not in STOP_SIGNALS:
                        continue
                    if asked_at is None:
                        asked_at = time.monotonic()
                        self._ask(heard[0])
                    elif not self.launcher_kills and time.monotonic() - asked_at >= COPY_SECONDS:
                        self._leave()
                elif asked_at is not None:
                    self._press(time.monotonic() - asked_at - self.grace_seconds)

    def _seconds_to_wait(self, asked_at: float | None) -> float | None:
        if asked_at is None:
            return None
        left = asked_at + self.grace_seconds - time.monotonic()
        return left if left > 0 else NUDGE_SECONDS

    def _ask(self, number: int) -> None:
        self.signal_number = number
        self._say(
            f"{signal.Signals(number).name} came; what is in hand may take "
            f"{self.grace_seconds:g} s more. A second signal ends at once"
        )

    def _press(self, seconds_over: float) -> None:
        """Interrupt the main thread; end without it where it and the disk would not let us."""
        if seconds_over > OVERDUE_SECONDS:
            assert self.signal_number is not None
            self._say(str(Stopped(self.signal_number)))
            self._leave()
        if not self._is_abandoned:  # it may have been about to wait: then again
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGALRM)

    def _leave(self) -> NoReturn:
        """At once: flushing could wait for the main thread."""
        assert self.signal_number is not None
        os._exit(Stopped(self.signal_number).exit_code)

    def _say(self, text: str) -> None:
        """To standard error, past its buffer: the main thread may be inside of it.

        Not where nobody reads it any more, since that would stop the clock.
        """
        if self.says_so:
            with contextlib.suppress(OSError):  # no terminal any more
                if select.select([], [2], [], 0)[1]:
                    os.write(2, f"\nddinfer: {text}\n".encode())
