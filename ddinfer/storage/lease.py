"""``lock``: one job at a time writes into a directory.

On one machine the kernel's flock decides: it ends with the last process of the job, so that a job
after a crash does not wait. Between machines, and on file systems without flock, a heartbeat in the
same file decides: rank 0 increments it every 10 s, and a lease whose heartbeat has not changed for
60 s has expired. The restarts of one run take over from one another at once.

Only rank 0 locks a second file, ``rank0.lock``. `is_held` tests that one, with a shared lock, so
that looking at a job never prevents a job from starting.
"""

from __future__ import annotations

import hashlib
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
RANK0_FILE = "rank0.lock"
EXPIRY_SECONDS = 60.0
HEARTBEAT_SECONDS = 10.0

#: Without flock, seconds after which a job that has written its name looks whether it is still
#: there: two jobs that start together both write, and the first one sees the second.
CONFIRM_SECONDS = 2.0

_RECORD_BYTES = 512  # rewritten in place, and always whole
_RECORD_START = b'{"machine": "'


class FolderInUse(UsageError):
    """Another job writes into the directory."""


@dataclass(frozen=True)
class Holder:
    """The content of ``lock``: which process holds the lease.

    Attributes:
        machine: the kernel's boot id, the same for containers of one machine.
        run_id: hash of the launcher's run id; empty where there is none.
        beat: the heartbeat; -1 once the process has released the lease.
    """

    machine: str
    host: str
    pid: int
    run_id: str = ""
    beat: int = 0

    @classmethod
    def of_this_process(cls, run_id: str = "") -> Holder:
        """Every field is short and ASCII, so that the record fits its 512 bytes."""
        host = ascii(socket.gethostname())[1:-1][:64]
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                machine = file.read().strip()
        except OSError:
            machine = host
        hashed = hashlib.sha256(run_id.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return cls(machine, host, os.getpid(), hashed if run_id else "")

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """A held lock. Release it, or leave the ``with`` block."""

    def __init__(self, files: Files, folder: str, holder: Holder | None = None):
        self._files, self._folder, self._holder = files, folder, holder
        self._fds: list[int] = []
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._is_released = threading.Event()
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
        """Take the directory for a job. Rank 0 calls this; the other ranks `join`.

        Args:
            notify: called with a sentence when there is something to wait for.

        Raises:
            FolderInUse: another job holds it; names the process.
            UsageError: ``lock`` is a file that ddinfer did not write.
        """
        me = Holder.of_this_process(run_id)
        _require_own_file(files, folder)
        lease = cls(files, folder, me)
        try:
            fd = lease._open(LOCK_FILE)
            has_flock = _take_flock(files, fd, folder, me, sleep, notify)
            _wait_for_expiry(files, folder, me, has_flock, sleep, notify)
            files.write_at_start(fd, _encode(me))
            files.sync(fd)
            if has_flock:
                _lock_rank0(files, lease._open(RANK0_FILE), folder, sleep)
                # Shared from here on: the job's other ranks hold it as well, so that it lasts
                # for as long as any of them lives.
                _require(files.lock(fd, exclusive=False), files, folder)
            else:
                sleep(CONFIRM_SECONDS)
                _require(read_holder(files, folder) == me, files, folder)
        except BaseException:
            lease._close()
            raise
        lease._thread = threading.Thread(target=lease._beat, name="ddinfer-lease", daemon=True)
        lease._thread.start()
        return lease

    @classmethod
    def join(cls, files: Files, folder: str) -> Lease:
        """Hold the lease that rank 0 of this job has acquired. Every rank calls this."""
        lease = cls(files, folder)
        try:
            fd = lease._open(LOCK_FILE)
            _require(files.lock(fd, exclusive=False) is not False, files, folder)
        except BaseException:
            lease._close()
            raise
        return lease

    def check(self) -> None:
        """Raise `StorageError` if the last heartbeat failed or found another job's."""
        if self._error is not None:
            raise self._error

    def confirm(self) -> None:
        """`check`, with a look at the file now."""
        self.check()
        if self._holder is not None:
            self._require_mine(self._holder)

    def release(self) -> None:
        """Give the directory back. Nobody waits for a heartbeat after this."""
        self._is_released.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock:
            if not self._fds:
                return
            try:
                if self._holder is not None and self._error is None:
                    self._require_mine(self._holder)
                    ended = replace(self._holder, beat=-1)
                    self._files.write_at_start(self._fds[0], _encode(ended))
            finally:
                self._close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.release()
        else:
            with suppress(StorageError):  # the error on its way is the one to report
                self.release()

    def _open(self, name: str) -> int:
        self._fds.append(self._files.open_lock(os.path.join(self._folder, name)))
        return self._fds[-1]

    def _close(self) -> None:
        while self._fds:
            self._files.close(self._fds.pop())

    def _beat(self) -> None:
        while not self._is_released.wait(HEARTBEAT_SECONDS):
            with self._lock:
                if not self._fds or self._holder is None:
                    return
                try:
                    self._require_mine(self._holder)
                    self._holder = replace(self._holder, beat=self._holder.beat + 1)
                    self._files.write_at_start(self._fds[0], _encode(self._holder))
                    self._files.sync(self._fds[0])
                except Exception as error:  # noqa: BLE001  raised by check()
                    self._error = error
                    return

    def _require_mine(self, mine: Holder) -> None:
        found = read_holder(self._files, self._folder)
        if found is not None and replace(found, beat=0) != replace(mine, beat=0):
            raise StorageError(
                f"{found} has taken {self._folder}: the heartbeat of this process had not changed "
                f"for {EXPIRY_SECONDS:.0f} s, so its lease had expired"
            )


def read_holder(files: Files, folder: str) -> Holder | None:
    """The process that holds or last held the directory, according to ``lock``."""
    # Opened anew each time: on network file systems that is what brings the current content.
    data = files.read_or_none(os.path.join(folder, LOCK_FILE))
    try:
        return None if data is None else Holder(**json.loads(data))
    except (ValueError, TypeError):
        return None  # empty: just created, or lost in a power failure


def is_held(files: Files, folder: str) -> bool:
    """Whether a job is running in the directory, without waiting for a heartbeat.

    On one machine the kernel holds rank 0's lock for as long as it runs. For a job on another
    machine, or on a file system without flock, the last heartbeat counts, however old it is.
    """
    holder = read_holder(files, folder)
    path = os.path.join(folder, RANK0_FILE)
    if holder is None:
        return False
    is_local = holder.machine == Holder.of_this_process().machine
    if is_local and files.exists(path):
        fd = files.open_to_read(path)  # enough for a shared lock, also on NFS
        try:
            is_free = files.lock(fd, exclusive=False)  # released at once
        finally:
            files.close(fd)
        if is_free is not None:
            return not is_free
    return holder.beat >= 0


def _require_own_file(files: Files, folder: str) -> None:
    path = os.path.join(folder, LOCK_FILE)
    data = files.read_or_none(path)
    if data is None or not data.strip(b"\0"):  # lost in a power failure
        return
    if len(data) > _RECORD_BYTES or not data.startswith(_RECORD_START):
        raise UsageError(
            f"{path} is not a lock that ddinfer wrote; choose another --output, or move it away"
        )


def _take_flock(
    files: Files,
    fd: int,
    folder: str,
    me: Holder,
    sleep: Callable[[float], object],
    notify: Callable[[str], object],
) -> bool:
    """Lock exclusively → whether the file system has flock."""
    waited = 0.0
    while (is_locked := files.lock(fd, exclusive=True)) is False:
        holder = read_holder(files, folder)
        same_run = holder is not None and me.run_id != "" and holder.run_id == me.run_id
        if not same_run or waited >= EXPIRY_SECONDS:
            raise _in_use(folder, holder)
        if waited == 0:  # processes of this run's previous attempt are exiting
            notify(f"waiting for {holder} of the previous attempt to exit")
        sleep(0.5)
        waited += 0.5
    return is_locked is not None


def _wait_for_expiry(
    files: Files,
    folder: str,
    me: Holder,
    has_flock: bool,
    sleep: Callable[[float], object],
    notify: Callable[[str], object],
) -> None:
    """Return once the heartbeat shows that no other job is running."""
    found = read_holder(files, folder)
    if found is None or found.beat < 0 or (me.run_id and found.run_id == me.run_id):
        return
    if has_flock and found.machine == me.machine:
        return
    why = "on another machine" if found.machine != me.machine else "and flock is missing here"
    notify(
        f"{folder} was last written by {found}, {why}: waiting {EXPIRY_SECONDS:.0f} s to see "
        "whether its heartbeat changes"
    )
    waited = 0.0
    while waited < EXPIRY_SECONDS:
        sleep(1.0)
        waited += 1.0
        now = read_holder(files, folder)
        if now is not None and now.beat < 0:
            return
        if now != found:
            raise _in_use(folder, now)


def _lock_rank0(files: Files, fd: int, folder: str, sleep: Callable[[float], object]) -> None:
    """Only `is_held` of another process can be in the way, for some microseconds."""
    for _ in range(1000):
        if files.lock(fd, exclusive=True) is not False:
            return
        sleep(0.01)
    raise _in_use(folder, read_holder(files, folder))


def _require(is_held: bool | None, files: Files, folder: str) -> None:
    if not is_held:
        raise _in_use(folder, read_holder(files, folder))


def _in_use(folder: str, holder: Holder | None) -> FolderInUse:
    who = "another process" if holder is None else str(holder)
    return FolderInUse(
        f"{folder} is being written by {who}; wait until it has ended (ddinfer status {folder}) "
        "or choose another --output"
    )


def _encode(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode().ljust(_RECORD_BYTES - 1) + b"\n"
