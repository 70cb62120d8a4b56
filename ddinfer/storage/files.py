"""All file operations of a job's directory pass through here.

`Disk` is the operating system: one method per operation, which raises `OSError`. `Files` is what
the rest of storage uses: whole writes, durable directories, and every `OSError` as a `StorageError`
that names the path and the cause. Tests replace `Disk` by one that crashes, fails or writes short
at any single operation, or forgets what was not fsynced.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from ddinfer.errors import StorageError, describe_os_error

_TEMPORARY = re.compile(r"\..+\.ddinfer-[0-9a-f]{8}\.tmp")

#: Errors of file systems that cannot fsync a directory.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


class Disk:
    """The operating system's file operations. Everything raises `OSError`."""

    mkdir = staticmethod(os.mkdir)
    write = staticmethod(os.write)  # may write less than all of it; returns how many bytes
    pwrite = staticmethod(os.pwrite)
    fsync = staticmethod(os.fsync)
    close = staticmethod(os.close)
    replace = staticmethod(os.replace)
    unlink = staticmethod(os.unlink)
    rmdir = staticmethod(os.rmdir)
    listdir = staticmethod(os.listdir)
    readlink = staticmethod(os.readlink)

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def open_read(self, path: str) -> BinaryIO:
        return open(path, "rb")

    def fsync_folder(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def size(self, path: str) -> int:
        return os.stat(path).st_size

    def lock(self, fd: int, exclusive: bool) -> None:
        """flock without waiting: ``EWOULDBLOCK`` where another process holds it."""
        import fcntl

        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)

    def free_bytes(self, path: str) -> int:
        """Bytes that an ordinary user can still write there."""
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize


class Files:
    """File operations of a job's directory. Everything raises `StorageError`."""

    def __init__(self, disk: Disk | None = None):
        self.disk = disk or Disk()
        self._paths: dict[int, str] = {}
        # In the names of temporary files, so that two processes never write the same one.
        self._token = secrets.token_hex(4)

    def make_folder(self, path: str) -> None:
        """Make a directory (its parent exists) whose entry outlives a power failure."""
        with _named("make the directory", path), suppress(FileExistsError):
            self.disk.mkdir(path)
        # Also where it existed: the process that created it may not have synced it yet.
        self.sync_folder(os.path.dirname(path) or ".")

    def create(self, path: str) -> int:
        """Open a new file for appending; it must not exist."""
        return self._open("create", path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)

    def open_lock(self, path: str) -> int:
        """Open for writing, created where it does not exist; a link is not followed."""
        return self._open("open", path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)

    def open_to_read(self, path: str) -> int:
        return self._open("open", path, os.O_RDONLY)

    def _open(self, verb: str, path: str, flags: int) -> int:
        with _named(verb, path):
            fd = self.disk.open(path, flags)
        self._paths[fd] = path
        return fd

    def write(self, fd: int, data: bytes) -> None:
        """Write all of it."""
        with _named("write", self._paths[fd]):
            rest = memoryview(data)
            while rest:
                rest = rest[self.disk.write(fd, rest) :]

    def write_at_start(self, fd: int, data: bytes) -> None:
        with _named("write", self._paths[fd]):
            if self.disk.pwrite(fd, data, 0) != len(data):
                raise OSError(errno.EIO, "wrote only a part")

    def sync(self, fd: int) -> None:
        with _named("fsync", self._paths[fd]):
            self.disk.fsync(fd)

    def close(self, fd: int) -> None:
        with _named("close", self._paths.pop(fd)):
            self.disk.close(fd)

    def replace(self, source: str, target: str) -> None:
        with _named("rename into place", target):
            self.disk.replace(source, target)

    def sync_folder(self, path: str, *, may_be_foreign: bool = False) -> None:
        """Make a directory's entries durable; with ``may_be_foreign`` where this user may."""
        tolerated = (*_CANNOT_SYNC, errno.EACCES, errno.EPERM) if may_be_foreign else _CANNOT_SYNC
        with _named("fsync the directory", path):
            try:
                self.disk.fsync_folder(path)
            except OSError as error:
                if error.errno not in tolerated:
                    raise

    def remove(self, path: str) -> None:
        """Remove a file, if it exists."""
        with _named("remove", path), suppress(FileNotFoundError):
            self.disk.unlink(path)

    def remove_empty_folder(self, path: str) -> None:
        """Remove a directory, if it exists and is empty."""
        with _named("remove", path):
            try:
                self.disk.rmdir(path)
            except OSError as error:
                kept = (errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST)
                if error.errno not in kept:
                    raise

    def list(self, path: str) -> list[str]:
        """Sorted names in a directory; none where it does not exist."""
        with _named("list", path):
            try:
                return sorted(self.disk.listdir(path))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def size(self, path: str) -> int | None:
        """Bytes of a file, or ``None`` where there is none."""
        with _named("stat", path):
            try:
                return self.disk.size(path)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def link_target(self, path: str) -> str | None:
        """Where a symbolic link leads; ``None`` for what is no link, or not there."""
        with _named("read the link", path):
            try:
                return self.disk.readlink(path)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                    raise
                return None

    def exists(self, path: str) -> bool:
        return self.size(path) is not None

    def read(self, path: str) -> bytes:
        with self.reading(path) as file:
            return file.read()

    def read_or_none(self, path: str) -> bytes | None:
        return self.read(path) if self.exists(path) else None

    @contextmanager
    def reading(self, path: str) -> Iterator[BinaryIO]:
        """A file to read in pieces; errors meanwhile are `StorageError` as well."""
        with _named("open", path):
            file = self.disk.open_read(path)
        with file, _named("read", path):
            yield file

    def lock(self, fd: int, *, exclusive: bool) -> bool | None:
        """Take or convert a flock without waiting.

        Returns:
            ``False`` where another process holds it, ``None`` where the file system has no flock.
        """
        with _named("lock", self._paths[fd]):
            try:
                self.disk.lock(fd, exclusive)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                return None
        return True

    def free_bytes(self, path: str) -> int:
        with _named("read the free space of", path):
            return self.disk.free_bytes(path)

    def temporary_name(self, path: str) -> str:
        """A hidden name in the same directory, so that `replace` stays within one file system."""
        folder, name = os.path.split(path)
        return os.path.join(folder, f".{name}.ddinfer-{self._token}.tmp")


@contextmanager
def _named(verb: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not from the system, but gzip's about damaged bytes
            raise
        raise StorageError(f"cannot {verb} {path}: {describe_os_error(error)}") from error


def is_temporary(name: str) -> bool:
    """Whether this is the name of a temporary file of ddinfer."""
    return _TEMPORARY.fullmatch(name) is not None


def write_and_rename(files: Files, path: str, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all. The caller syncs the directory."""
    with _renamed_at_end(files, path) as write:
        write(data)


@contextmanager
def atomic_stream(files: Files, path: str) -> Iterator[Callable[[bytes], None]]:
    """Yields what takes the new content of ``path``; after a crash it has all of it or the old."""
    with _renamed_at_end(files, path) as write:
        yield write
    files.sync_folder(os.path.dirname(path) or ".")


@contextmanager
def _renamed_at_end(files: Files, path: str) -> Iterator[Callable[[bytes], None]]:
    temporary = files.temporary_name(path)
    fd = files.create(temporary)
    try:
        try:
            yield lambda data: files.write(fd, data)
            files.sync(fd)
        finally:
            files.close(fd)
        files.replace(temporary, path)
    except BaseException:
        # On a full disk the leftover takes space. Removing it may fail as well: the first error is
        # the one to report, and opening the directory again removes leftovers.
        with suppress(StorageError):
            files.remove(temporary)
        raise
