"""Ending: with the parent, so that no rank is ever left behind; and without teardown."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from typing import NoReturn

from ddinfer.errors import EXIT_INTERRUPTED

PR_SET_PDEATHSIG = 1  # prctl(2)
LOOK_SECONDS = 0.5


def end_with_parent(parent: int | None = None) -> None:
    """End this process at once when its parent does, however that ends.

    On Linux the kernel sends SIGKILL, also while the main thread is inside a long C call. A
    thread that looks twice a second does it elsewhere. Only for processes that have no business
    without their parent: a rank of a launcher, a script under torchrun.

    Args:
        parent: process id of the parent, for a child that could outlive it before it gets here.
    """
    parent = os.getppid() if parent is None else parent
    if not _kernel_watches():
        threading.Thread(
            target=_watch, args=(parent,), name="ddinfer-parent-watch", daemon=True
        ).start()
    if os.getppid() != parent:  # it ended before we asked
        os._exit(EXIT_INTERRUPTED)


def _kernel_watches() -> bool:
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(EXIT_INTERRUPTED)


def leave(exit_code: int) -> NoReturn:
    """End this process with its output flushed, but without the second of teardown after torch."""
    for stream in (sys.stdout, sys.stderr):
        # A signal handler may have come into the middle of a write: RuntimeError.
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
            stream.flush()
    os._exit(exit_code)
