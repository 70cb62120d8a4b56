"""Orderly shutdown on a signal. Only the command line installs the handlers."""

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

#: Seconds after the grace until a thread ends a process that cannot be interrupted.
OVERDUE_SECONDS = 5.0

#: Seconds between attempts to interrupt a blocking call of the main thread.
INTERRUPT_INTERVAL_SECONDS = 0.1


class ShutdownRequest:
    """Whether a signal has requested the end of this process, and how long it may still take.

    The first signal is only recorded; `run_job` tests for it between batches. When the grace is
    over, `Stopped` is raised in the main thread. A second signal ends
    the process at once; a copy of the first, which arrives where a launcher forwards what every
    process has received, does not.

    Python runs signal handlers in the main thread only, after the C call it is in; a read that is
    just about to start is not interrupted. So a thread is woken by the signal itself
    (`signal.set_wakeup_fd`), answers it and keeps the time.

    Args:
        grace_seconds: for the current batch.
        verbose: whether a signal is acknowledged on standard error.
        launcher_kills: a second signal is the launcher's to answer, which then sends SIGKILL.
    """

    def __init__(
        self,
        grace_seconds: float = 20.0,
        *,
        verbose: bool = False,
        launcher_kills: bool = False,
    ):
        self.grace_seconds, self.verbose = grace_seconds, verbose
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
    def on_signals(self) -> Iterator[ShutdownRequest]:
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
            self._is_abandoned = True  # a late signal must not interrupt what follows
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(writer)  # which ends the listener
            listener.join()
            os.close(reader)
            self._restore_handlers()

    def _forget_in_child(self) -> None:
        """A child shares the pipe: a signal to it would count as one to this process."""
        if self._handlers_before:
            signal.set_wakeup_fd(self._wakeup_before)
        self._restore_handlers()

    def _restore_handlers(self) -> None:
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
        requested_at: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while True:
                if selector.select(self._seconds_to_wait(requested_at)):
                    received = os.read(reader, 1)
                    if not received:
                        return
                    if received[0] not in STOP_SIGNALS:
                        continue
                    if requested_at is None:
                        requested_at = time.monotonic()
                        self._on_request(received[0])
                    elif (
                        not self.launcher_kills and time.monotonic() - requested_at >= COPY_SECONDS
                    ):
                        self._exit_now()
                elif requested_at is not None:
                    self._interrupt_main_thread(
                        time.monotonic() - requested_at - self.grace_seconds
                    )

    def _seconds_to_wait(self, requested_at: float | None) -> float | None:
        if requested_at is None:
            return None
        left = requested_at + self.grace_seconds - time.monotonic()
        return left if left > 0 else INTERRUPT_INTERVAL_SECONDS

    def _on_request(self, number: int) -> None:
        self.signal_number = number
        self._print_stderr(
            f"received {signal.Signals(number).name}; finishing the current batch (up to "
            f"{self.grace_seconds:g} s). Send it again to exit immediately"
        )

    def _interrupt_main_thread(self, seconds_over: float) -> None:
        """Interrupt the main thread; end without it where it and the disk would not let us."""
        if seconds_over > OVERDUE_SECONDS:
            assert self.signal_number is not None
            self._print_stderr(str(Stopped(self.signal_number)))
            self._exit_now()
        if not self._is_abandoned:  # it may have been about to wait: then again
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGALRM)

    def _exit_now(self) -> NoReturn:
        """Without flushing, which could wait for the main thread."""
        assert self.signal_number is not None
        os._exit(Stopped(self.signal_number).exit_code)

    def _print_stderr(self, text: str) -> None:
        """To standard error, past its buffer: the main thread may be inside of it.

        Not where its reader has stopped reading, since that would block this thread.
        """
        if self.verbose:
            with contextlib.suppress(OSError):  # no terminal any more
                if select.select([], [2], [], 0)[1]:
                    os.write(2, f"\nddinfer: {text}\n".encode())
