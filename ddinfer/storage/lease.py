"""``lock``: one job writes into a folder at a time.

On one machine the kernel knows: a flock is gone with the last process that held it, so after a
crash nobody waits. Between machines a heartbeat in the same file tells: rank 0 counts it up, and
who finds a count from another machine watches it. A count that stands still for 60 s is nobody's.
The restarts of one torchrun run take over from one another at once.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from ddinfer.errors import StorageError, UsageError
from ddinfer.storage.files import Files

LOCK_FILE = "lock"
SILENCE_SECONDS = 60.0
BEAT_SECONDS = 10.0

_RECORD_BYTES = 512  # rewritten in place, and always whole


class FolderInUse(UsageError):
    """Another job writes into the folder."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        machine: the kernel's boot id, the same for containers of one machine.
        run_id: of the torchrun run; empty where there is none.
        beat: counts up while it lives; -1 once it has ended in order.
    """

    machine: str
    host: str
    pid: int
    run_id: str = ""
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """A held lock. Release it, or leave the ``with`` block."""

    def __init__(self, files: Files, fd: int, holder: Holder | None):
        self._files, self._fd, self._holder = files, fd, holder
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(
        cls,
        files: Files,
        folder: str,
        run_id: str = "",
        *,
        sleep: Callable[[float], object] = time.sleep,
        notify: Callable[[str], object] = lambda text: None,
    ) -> Lease:
        """Take the folder for a job. On rank 0; the others `join`.

        Args:
            notify: told when there is something to wait for.

        Raises:
            FolderInUse: naming who has it.
        """
        fd = files.open_in_place(os.path.join(folder, LOCK_FILE))
        try:
            me = Holder(_machine(), socket.gethostname(), os.getpid(), run_id)
            _take_flock(files, fd, folder, run_id, sleep, notify)
            _watch_heartbeat(files, fd, folder, me, sleep, notify)
            files.write_at_start(fd, _encode(me))
            files.sync(fd)
            # Shared from here on: the job's other ranks hold it, too, and keep others out for
            # as long as any of them lives.
            _must(files.lock(fd, exclusive=False), files, fd, folder)
        except BaseException:
            files.close(fd)
            raise
        lease = cls(files, fd, me)
        lease._thread = threading.Thread(target=lease._beat, name="ddinfer-lease", daemon=True)
        lease._thread.start()
        return lease

    @classmethod
    def join(cls, files: Files, folder: str) -> Lease:
        """Hold the lease that rank 0 of this job has acquired."""
        fd = files.open_in_place(os.path.join(folder, LOCK_FILE))
        try:
            _must(files.lock(fd, exclusive=False), files, fd, folder)
        except BaseException:
            files.close(fd)
            raise
        return cls(files, fd, None)

    def check(self) -> None:
        """Raise `StorageError` where the heartbeat failed or another job took the folder."""
        if self._error is not None:
            raise self._error

    def release(self) -> None:
        """Let go. Nobody waits for a heartbeat after this."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock:
            if self._fd < 0:
                return
            fd, self._fd = self._fd, -1
            try:
                if self._holder is not None and self._error is None:
                    self._files.write_at_start(fd, _encode(replace(self._holder, beat=-1)))
            finally:
                self._files.close(fd)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.release()
        else:
            with suppress(StorageError):  # the error on its way is the one to tell
                self.release()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock:
                if self._fd < 0 or self._holder is None:
                    return
                try:
                    self._beat_once(self._holder)
                except Exception as error:  # noqa: BLE001  raised by check()
                    self._error = error
                    return

    def _beat_once(self, mine: Holder) -> None:
        found = _decode(self._files.read_at_start(self._fd, _RECORD_BYTES))
        if found is not None and replace(found, beat=0) != replace(mine, beat=0):
            raise StorageError(
                f"{found} has taken the output folder: this process was silent for more than "
                f"{SILENCE_SECONDS:.0f} s and counted as dead"
            )
        self._holder = replace(mine, beat=mine.beat + 1)
        self._files.write_at_start(self._fd, _encode(self._holder))
        self._files.sync(self._fd)


def read_holder(files: Files, folder: str) -> Holder | None:
    """Who holds or last held the folder; for ``ddinfer status``."""
    data = files.read_if_there(os.path.join(folder, LOCK_FILE))
    return None if data is None else _decode(data)


def is_held(files: Files, folder: str) -> bool:
    """Whether a job is at work in the folder, as far as can be told without waiting.

    On one machine the kernel knows. Of another machine's job, its last heartbeat is believed.
    """
    holder = read_holder(files, folder)
    if holder is None:
        return False
    if holder.machine != _machine():
        return holder.beat >= 0
    fd = files.open_only_to_lock(os.path.join(folder, LOCK_FILE))
    try:
        return not files.lock(fd, exclusive=True)  # given back at once
    finally:
        files.close(fd)


def _take_flock(
    files: Files,
    fd: int,
    folder: str,
    run_id: str,
    sleep: Callable[[float], object],
    notify: Callable[[str], object],
) -> None:
    waited = 0.0
    while not files.lock(fd, exclusive=True):
        holder = _decode(files.read_at_start(fd, _RECORD_BYTES))
        same_run = holder is not None and run_id != "" and holder.run_id == run_id
        if not same_run or waited >= SILENCE_SECONDS:
            raise _in_use(folder, holder)
        if waited == 0:  # processes of this run's last attempt are on their way out
            notify(f"waiting for {holder} of the attempt before to end")
        sleep(0.5)
        waited += 0.5


def _watch_heartbeat(
    files: Files,
    fd: int,
    folder: str,
    me: Holder,
    sleep: Callable[[float], object],
    notify: Callable[[str], object],
) -> None:
    """Return once nobody on another machine can be alive."""
    found = _decode(files.read_at_start(fd, _RECORD_BYTES))
    if found is None or found.beat < 0 or found.machine == me.machine:
        return
    if me.run_id and found.run_id == me.run_id:
        return
    notify(
        f"{folder} was last written by {found}, another machine: waiting "
        f"{SILENCE_SECONDS:.0f} s to see whether it lives"
    )
    waited = 0.0
    while waited < SILENCE_SECONDS:
        sleep(1.0)
        waited += 1.0
        now = _decode(files.read_at_start(fd, _RECORD_BYTES))
        if now is not None and now.beat < 0:
            return
        if now != found:
            raise _in_use(folder, now)


def _must(locked: bool, files: Files, fd: int, folder: str) -> None:
    if not locked:
        raise _in_use(folder, _decode(files.read_at_start(fd, _RECORD_BYTES)))


def _in_use(folder: str, holder: Holder | None) -> FolderInUse:
    who = "another process" if holder is None else str(holder)
    return FolderInUse(
        f"{folder} is being written by {who}; wait until it has ended (ddinfer status {folder}) "
        "or choose another --output"
    )


def _encode(holder: Holder) -> bytes:
    host = holder.host[:64]
    text = json.dumps(asdict(replace(holder, host=host, run_id=holder.run_id[:128])))
    return text.encode().ljust(_RECORD_BYTES - 1) + b"\n"


def _decode(data: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(data))
    except (ValueError, TypeError):
        return None  # empty: just made, or lost with the power


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()
