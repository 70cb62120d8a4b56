"""A process of a job: it imports quickly, ends with its parent, and exits without teardown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from ddinfer.errors import EXIT_INTERRUPTED

PR_SET_PDEATHSIG = 1  # prctl(2)
PARENT_POLL_SECONDS = 0.5

#: Signals that ask a job to stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Seconds after a signal in which others are copies of it, and not a second request: a service
#: manager signals every process of a job, and launchers and wrappers forward what they received.
COPY_SECONDS = 2.0


def import_once(modules: Sequence[str], further: Callable[[], object] | None = None) -> None:
    """Import modules with the garbage collector off.

    It would traverse the modules again and again, which takes a fifth of their import time, and
    find nothing. An import that fails is ignored: it fails again, and is reported, where the module
    is needed.

    Args:
        further: imports what depends on the job.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for name in modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        if further is not None:
            with contextlib.suppress(Exception):
                further()
    finally:
        if was_enabled:
            gc.enable()


def end_with_parent(parent: int | None = None) -> None:
    """End this process at once when its parent ends, whatever ends it.

    On Linux the kernel sends SIGKILL, also while the main thread is inside a long C call.
    Elsewhere a thread polls. Only for processes that must not outlive their parent: a rank of a
    launcher, a script under torchrun.

    Args:
        parent: process id of the parent, for a child that could outlive it before it gets here.
    """
    parent = os.getppid() if parent is None else parent
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(
            target=_poll_parent, args=(parent,), name="ddinfer-parent-watch", daemon=True
        ).start()
    if os.getppid() != parent:  # it ended before the request
        os._exit(EXIT_INTERRUPTED)


def _poll_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(EXIT_INTERRUPTED)


def stop_signals() -> list[signal.Signals]:
    """`STOP_SIGNALS`, without SIGHUP where ``nohup`` has this process ignore it."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [n for n in STOP_SIGNALS if not (ignored and n == signal.SIGHUP)]


def exit_now(exit_code: int) -> NoReturn:
    """End this process with its output flushed, but without the second of teardown after torch."""
    for stream in (sys.stdout, sys.stderr):
        # A signal handler may have interrupted a write: RuntimeError.
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
            stream.flush()
    os._exit(exit_code)


@dataclass(frozen=True)
class ProcessId:
    """A process that others can look for, on the same machine and on Linux.

    Attributes:
        host: the machine since its last boot, and the namespace of its process ids (containers).
        start: clock ticks since boot, which tell the process from a later one with the same id.
    """

    host: str
    pid: int
    start: str

    @classmethod
    def own(cls) -> ProcessId:
        return cls(_host(), os.getpid(), _state_and_start(os.getpid())[1])

    @property
    def is_here(self) -> bool:
        return bool(self.host) and self.host == _host()

    @property
    def has_ended(self) -> bool:
        return not is_running(self.pid) or _state_and_start(self.pid)[1] != self.start

    @property
    def is_stopped(self) -> bool:
        """Whether it is suspended by SIGSTOP."""
        return _state_and_start(self.pid) == ("T", self.start)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> ProcessId:
        return cls(**json.loads(text))


def is_running(pid: int) -> bool:
    """Whether a process has not ended. Linux only."""
    return _state_and_start(pid)[0] not in ("", "Z", "X")


def _state_and_start(pid: int) -> tuple[str, str]:
    """Two fields of proc_pid_stat(5); empty where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
