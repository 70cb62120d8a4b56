"""A disk in memory that crashes, fails or writes short at any single operation.

A `Platter` is what lies on the disk: what every process sees, and what a power failure would
leave. A `FakeDisk` is one process's view of it; it counts operations and carries out a `Fault` at
one of them.
"""

from __future__ import annotations

import errno
import io
import os
import random
from dataclasses import dataclass, field
from threading import RLock
from typing import BinaryIO

from ddinfer.storage.files import Disk

#: Small, so that the few lines of a test's journal are on several.
PAGE_BYTES = 64


class Crashed(BaseException):
    """The process is dead. No code of ours may catch and survive it."""


@dataclass(frozen=True)
class Fault:
    """What happens at operation number ``at`` (from 0).

    Attributes:
        kind: "crash" before it; "half" crash in the middle of a write; "short" the write writes
            half and says so; "short-full" half, and the rest fails with ENOSPC; or the name of an
            errno, with which the operation fails.
        lasting: whether an errno stays for all further operations that change something.
    """

    at: int
    kind: str
    lasting: bool = False


@dataclass(eq=False)
class Node:
    """A file (``data``) or a folder (``None``)."""

    data: bytearray | None
    durable: bytes = b""


@dataclass
class Platter:
    """Entries by path, as processes see them and as they are on the medium."""

    entries: dict[str, Node] = field(default_factory=lambda: {"/": Node(None)})
    durable_entries: dict[str, Node] = field(default_factory=lambda: {"/": Node(None)})
    locks: dict[Node, dict[tuple[FakeDisk, int], bool]] = field(default_factory=dict)
    free_bytes: int = 10**12

    def read(self, path: str) -> bytes:
        data = self.entries[path].data
        assert data is not None
        return bytes(data)

    def files(self) -> dict[str, bytes]:
        return {p: bytes(n.data) for p, n in self.entries.items() if n.data is not None}

    def power_fails(self, rng: random.Random | None = None) -> None:
        """Forget what was not fsynced: all of it, or with ``rng`` a random part of it."""
        old, new = self.durable_entries, self.entries
        kept = dict(old)
        if rng is not None:
            for path in {*old, *new}:
                if old.get(path) is not new.get(path) and rng.random() < 0.5:
                    kept.pop(path, None)
                    if path in new:
                        kept[path] = new[path]
        for path in sorted(kept):
            if path != "/" and os.path.dirname(path) not in kept:
                del kept[path]
        for node in set(kept.values()):
            if node.data is not None:
                node.data = bytearray(_torn(node, rng))
                node.durable = bytes(node.data)
        self.entries, self.durable_entries = kept, dict(kept)
        self.locks.clear()

    def process_dies(self, disk: FakeDisk) -> None:
        for holders in self.locks.values():
            for key in [key for key in holders if key[0] is disk]:
                del holders[key]


def _torn(node: Node, rng: random.Random | None) -> bytes:
    """What a medium may hold of content that was not fsynced."""
    assert node.data is not None
    if rng is None or bytes(node.data) == node.durable:
        return node.durable
    if not bytes(node.data).startswith(node.durable):
        return rng.choice((node.durable, bytes(node.data)))
    tail = bytes(node.data[len(node.durable) :])
    if rng.random() < 0.5:  # pages reach the medium in any order; a lost one reads as zeros
        start = len(node.durable)
        lost = {page for page in range(len(node.data) // PAGE_BYTES + 1) if rng.random() < 0.5}
        pages = [(start + k) // PAGE_BYTES for k in range(len(tail))]
        return node.durable + bytes(
            0 if page in lost else byte for byte, page in zip(tail, pages, strict=True)
        )
    cut = rng.randrange(len(tail) + 1)
    # A prefix; on some file systems the length is right and the rest is zeros.
    return node.durable + tail[:cut] + rng.choice((b"", b"\0" * (len(tail) - cut)))


@dataclass
class _Open:
    node: Node
    path: str


_ONLY_OPENING = ("EMFILE",)
_ONLY_CHANGING = ("ENOSPC", "EDQUOT", "EROFS")
_LOOKING = ("listdir", "readlink", "size", "open_read", "read", "lock")


class FakeDisk(Disk):
    """One process's disk."""

    def __init__(self, platter: Platter, fault: Fault | None = None):
        self.platter, self.fault = platter, fault
        self.count = 0
        self.log: list[str] = []
        self.has_struck = self.is_dead = False
        self._mutex = RLock()
        self._open: dict[int, _Open] = {}
        self._next_fd = 100

    # --- faults -------------------------------------------------------------------------------

    def _operation(self, name: str, path: str) -> str | None:
        """Count an operation; raise its fault, or return what is special about it."""
        if self.is_dead:
            raise Crashed(name)
        at, self.count = self.count, self.count + 1
        self.log.append(f"{name} {path}")
        fault = self.fault
        if fault is None or at < fault.at or (at > fault.at and not fault.lasting):
            return None
        kind = fault.kind
        if at > fault.at and name not in ("write", "open", "mkdir"):
            return None
        if kind == "crash":
            self.die()
        if kind in ("half", "short", "short-full"):
            if name == "write":
                self.has_struck = True
                return kind
            if kind == "half":
                self.die()
            return None
        if kind in _ONLY_OPENING and name not in ("open", "open_read", "fsync_folder", "listdir"):
            return None
        if kind in _ONLY_CHANGING and name in _LOOKING:
            return None
        self.has_struck = True
        raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)), path)

    def die(self) -> None:
        self.has_struck = self.is_dead = True
        self.platter.process_dies(self)
        raise Crashed(self.log[-1] if self.log else "")

    # --- operations ---------------------------------------------------------------------------

    def mkdir(self, path: str) -> None:
        with self._mutex:
            self._operation("mkdir", path)
            if path in self.platter.entries:
                raise FileExistsError(errno.EEXIST, "exists", path)
            self._folder_of(path)
            self.platter.entries[path] = Node(None)

    def open(self, path: str, flags: int) -> int:
        with self._mutex:
            self._operation("open", path)
            self._folder_of(path)
            node = self.platter.entries.get(path)
            if node is not None and flags & os.O_EXCL:
                raise FileExistsError(errno.EEXIST, "exists", path)
            if node is None:
                node = self.platter.entries[path] = Node(bytearray())
            fd, self._next_fd = self._next_fd, self._next_fd + 1
            self._open[fd] = _Open(node, path)
            return fd

    def write(self, fd: int, data: bytes | memoryview) -> int:
        with self._mutex:
            file = self._open[fd]
            special = self._operation("write", file.path)
            assert file.node.data is not None
            if special is None:
                file.node.data += data
                return len(data)
            part = max(1, len(data) // 2)
            file.node.data += data[:part]
            if special == "half":
                self.die()
            if special == "short-full":
                self.fault = Fault(self.count, "ENOSPC", lasting=True)
            return part

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        with self._mutex:
            file = self._open[fd]
            self._operation("pwrite", file.path)
            assert file.node.data is not None
            file.node.data[offset : offset + len(data)] = data
            return len(data)

    def fsync(self, fd: int) -> None:
        with self._mutex:
            file = self._open[fd]
            self._operation("fsync", file.path)
            assert file.node.data is not None
            file.node.durable = bytes(file.node.data)

    def close(self, fd: int) -> None:
        with self._mutex:
            file = self._open.pop(fd)  # also where it fails: the descriptor is gone then, too
            self.platter.locks.get(file.node, {}).pop((self, fd), None)
            self._operation("close", file.path)

    def replace(self, source: str, target: str) -> None:
        with self._mutex:
            self._operation("replace", target)
            self.platter.entries[target] = self._node(source)
            del self.platter.entries[source]

    def fsync_folder(self, path: str) -> None:
        with self._mutex:
            self._operation("fsync_folder", path)
            self._node(path)
            entries, durable = self.platter.entries, self.platter.durable_entries
            for name in [p for p in durable if os.path.dirname(p) == path and p not in entries]:
                del durable[name]
            for name, node in entries.items():
                if os.path.dirname(name) == path:
                    durable[name] = node

    def unlink(self, path: str) -> None:
        with self._mutex:
            self._operation("unlink", path)
            self._node(path)
            del self.platter.entries[path]

    def rmdir(self, path: str) -> None:
        with self._mutex:
            self._operation("rmdir", path)
            self._node(path)
            if any(os.path.dirname(p) == path for p in self.platter.entries if p != "/"):
                raise OSError(errno.ENOTEMPTY, "not empty", path)
            del self.platter.entries[path]

    def listdir(self, path: str) -> list[str]:
        with self._mutex:
            self._operation("listdir", path)
            if self._node(path).data is not None:
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", path)
            names = [p for p in self.platter.entries if os.path.dirname(p) == path and p != "/"]
            return [os.path.basename(p) for p in names]

    def readlink(self, path: str) -> str:
        with self._mutex:
            self._operation("readlink", path)
            self._node(path)
            raise OSError(errno.EINVAL, "not a link", path)

    def size(self, path: str) -> int:
        with self._mutex:
            self._operation("size", path)
            return len(self._node(path).data or b"")

    def open_read(self, path: str) -> BinaryIO:
        with self._mutex:
            self._operation("open_read", path)
            return io.BufferedReader(_Reader(self, path, bytes(self._node(path).data or b"")))

    def lock(self, fd: int, exclusive: bool) -> None:
        with self._mutex:
            file = self._open[fd]
            self._operation("lock", file.path)
            holders = self.platter.locks.setdefault(file.node, {})
            others = [mode for key, mode in holders.items() if key != (self, fd)]
            if any(others) or (exclusive and others):
                raise BlockingIOError(errno.EWOULDBLOCK, "held")
            holders[self, fd] = exclusive

    def free_bytes(self, path: str) -> int:
        with self._mutex:
            self._operation("size", path)
            return self.platter.free_bytes

    def _node(self, path: str) -> Node:
        node = self.platter.entries.get(path)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return node

    def _folder_of(self, path: str) -> None:
        self._node(os.path.dirname(path))


class _Reader(io.RawIOBase):
    """Reads in pieces, each an operation of its own."""

    def __init__(self, disk: FakeDisk, path: str, data: bytes):
        self._disk, self._path, self._data = disk, path, io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with self._disk._mutex:
            self._disk._operation("read", self._path)
        return self._data.readinto(buffer)
