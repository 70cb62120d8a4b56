"""The journal: an append-only record of what each process has made, and its replay.

Each process of each attempt appends to a file of its own, ``journal/ATTEMPT-RANK.jsonl``, so a
crash can tear only the last line, and a power failure only lines that were not fsynced. Each line
is a JSON object whose last key is the CRC-32 of everything before it. The first line is the
header; the others are of one of these kinds:

- ``start``: a batch is about to run (``indices``; ``beside``: the first index of each batch that is
  running concurrently in this process);
- ``image``: an image is stored durably (``index``, ``sha256``, ``bytes``);
- ``failed``: a prompt could not be made (``index``, ``error``);
- ``death``: a process was killed by a signal (``signal``) with these prompts in flight
  (``indices``; ``alone``: there was only one);
- ``retry``: failed prompts are pending again, and the deaths recorded for them are dropped;
- ``end``: the process ended without being killed (``reason``).

Each also has the ``time`` when it was appended, in seconds since 1970: for people and for
``ddinfer report``, nothing is decided by it.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from ddinfer.errors import StorageError
from ddinfer.storage.files import Files
from ddinfer.storage.images import image_path
from ddinfer.storage.media import ENDINGS

JOURNAL_FOLDER = "journal"
JOURNAL_VERSION = 1

#: ``ATTEMPT-RANK.jsonl``, or ``ATTEMPT-RANK-K.jsonl`` where that name is taken.
_NAME = re.compile(r"\d{6,}-\d{5,}(-\d+)?\.jsonl")

_PENDING, _FAILED, _DONE = 0, 1, 2
_CRC_BYTES = len(',"crc":"00000000"}\n')


class JournalError(StorageError):
    """A journal that is corrupt, or of another job. Names file, line and fix."""


@dataclass(frozen=True)
class JournalHeader:
    """First line of a journal file: its rank, attempt and job."""

    fingerprint: str
    rank: int = 0
    attempt: int = 0
    run_id: str = ""
    version: int = JOURNAL_VERSION


def encode_line(record: Mapping[str, Any]) -> bytes:
    """A record as a line with its checksum."""
    body = json.dumps(record, separators=(",", ":"))[:-1].encode()
    return b'%s,"crc":"%08x"}\n' % (body, zlib.crc32(body))


def decode_line(line: bytes) -> dict[str, Any] | None:
    """The record, or ``None`` where the line is torn or damaged."""
    body, ending = line[:-_CRC_BYTES], line[-_CRC_BYTES:]
    if ending != b',"crc":"%08x"}\n' % zlib.crc32(body):
        return None
    try:
        return json.loads(body + b"}")
    except ValueError:
        return None


def journal_paths(files: Files, folder: str) -> list[str]:
    """The journal files below ``folder``, in the order of their attempts and ranks."""
    journal = os.path.join(folder, JOURNAL_FOLDER)
    return [os.path.join(journal, name) for name in files.list(journal) if _NAME.fullmatch(name)]


class JournalWriter:
    """Appends to this process's own file. Safe to share between threads."""

    def __init__(self, files: Files, folder: str, header: JournalHeader):
        """Create ``journal/ATTEMPT-RANK.jsonl`` below ``folder``, durable with its header."""
        self._files, self._lock = files, Lock()
        self._broken: BaseException | None = None
        self._fd: int | None = None
        journal = os.path.join(folder, JOURNAL_FOLDER)
        self.path = self._free_name(journal, f"{header.attempt:06d}-{header.rank:05d}")
        self._fd = files.create(self.path)
        try:
            self.append([{"kind": "journal", **header.__dict__}])
            files.sync_folder(journal)
        except BaseException:
            self.close()
            raise

    def _free_name(self, journal: str, stem: str) -> str:
        taken = set(self._files.list(journal))
        name, k = f"{stem}.jsonl", 1
        while name in taken:
            name, k = f"{stem}-{k}.jsonl", k + 1
        return os.path.join(journal, name)

    def append(self, records: Sequence[Mapping[str, Any]], *, sync: bool = True) -> None:
        """Write lines, and wait until they are durable unless ``sync`` is false.

        After a failed write nothing is appended any more: a torn line must stay the last.
        """
        now = round(time.time(), 3)
        data = b"".join(encode_line({**record, "time": now}) for record in records)
        with self._lock:
            if self._broken is not None or self._fd is None:
                raise StorageError(
                    f"cannot append to {self.path}: {self._broken or 'it is closed'}"
                )
            try:
                self._files.write(self._fd, data)
                if sync:
                    self._files.sync(self._fd)
            except BaseException as error:
                self._broken = error
                raise

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                fd, self._fd = self._fd, None
                self._files.close(fd)


# --- reading ----------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One journal file: the process that wrote it, and how that ended.

    Attributes:
        in_flight: batches (of indices) that were started and are not journaled yet.
        running: the first index of each batch that the pipeline was computing; the others in
            flight were being written.
        end: the reason of its end, or ``None`` where it was killed.
        began, last: when its first and its last line were written, in seconds since 1970.
    """

    header: JournalHeader
    in_flight: list[list[int]] = field(default_factory=list)
    running: set[int] = field(default_factory=set)
    end: str | None = None
    began: float | None = None
    last: float | None = None


class JournalState:
    """The state of a job by all of its journals, per index. 46 bytes an image.

    An image that any process made stays made, whatever other lines follow.

    Attributes:
        failures: index → the ``failed`` record.
        notes: index → what is unusual about an image (``exact``, ``batch``, ``flags``).
        deaths: the ``death`` records, in order.
        attempts: one for each journal file.
    """

    def __init__(self, num_requests: int):
        self._status = bytearray(num_requests)
        self._hashes = bytearray(32 * num_requests)
        self._sizes = array("q", bytes(8 * num_requests))
        self._endings = bytearray(num_requests)
        self.num_done = 0
        self.failures: dict[int, dict[str, Any]] = {}
        self.notes: dict[int, dict[str, Any]] = {}
        self.deaths: list[dict[str, Any]] = []
        self.attempts: list[Attempt] = []
        self.total_bytes = 0
        self.total_seconds = 0.0

    @property
    def num_failed(self) -> int:
        return len(self.failures)

    def is_done(self, index: int) -> bool:
        return self._status[index] == _DONE

    def is_failed(self, index: int) -> bool:
        return self._status[index] == _FAILED

    def is_pending(self, index: int) -> bool:
        return self._status[index] == _PENDING

    def sha256(self, index: int) -> str:
        """Of the image file, in hex."""
        return self._hashes[32 * index : 32 * index + 32].hex()

    def size(self, index: int) -> int:
        """Of the image file, in bytes."""
        return self._sizes[index]

    def path(self, index: int) -> str:
        """Of the image file, below the output directory; before it is made, that of a PNG."""
        return image_path(index, self.ending(index))

    def ending(self, index: int) -> str:
        """Of the image file's name."""
        return ENDINGS[self._endings[index]]

    def forget(self, index: int) -> None:
        """Make an image pending again: its file is missing, or its prompt is to be retried."""
        if self._status[index] == _DONE:
            self.num_done -= 1
            self.total_bytes -= self._sizes[index]
        self._status[index] = _PENDING
        self.failures.pop(index, None)
        self.notes.pop(index, None)

    def retry(self, indices: Collection[int]) -> None:
        """Make failed prompts pending again, as if they had never run."""
        for index in indices:
            if self.is_failed(index):
                self.forget(index)
        self.deaths = [d for d in self.deaths if not set(d["indices"]).intersection(indices)]

    def add(self, record: Mapping[str, Any]) -> None:
        """Apply one record, in the order of the journals.

        Raises:
            ValueError: of a kind that is not known.
        """
        kind, now = record["kind"], record.get("time")
        if kind == "journal":
            values = {name: record[name] for name in JournalHeader.__dataclass_fields__}
            self.attempts.append(Attempt(JournalHeader(**values), began=now))
        elif kind == "image":
            self.add_image(record)
        elif kind == "failed":
            self.add_failure(record)
        elif kind == "death":
            self.deaths.append(dict(record))
        elif kind == "retry":
            self.retry(record["indices"])
        elif kind not in ("start", "end"):
            raise ValueError(f"unknown kind {kind!r}")
        for attempt in self.attempts[-1:]:
            attempt.last = now or attempt.last
            if kind == "start":
                batch = record["indices"]
                attempt.in_flight.append(batch)
                attempt.running = {batch[0], *record.get("beside", ())}
            elif kind in ("image", "failed"):
                index = record["index"]
                attempt.in_flight = [batch for batch in attempt.in_flight if index not in batch]
            elif kind == "end":
                attempt.end = record["reason"]

    def add_image(self, record: Mapping[str, Any]) -> None:
        index, size = record["index"], record["bytes"]
        digest = bytes.fromhex(record["sha256"])
        if self._status[index] == _DONE:
            self.total_bytes -= self._sizes[index]
        else:
            self.num_done += 1
            self.failures.pop(index, None)
        self._status[index] = _DONE
        self._hashes[32 * index : 32 * index + 32] = digest
        self._sizes[index] = size
        self._endings[index] = ENDINGS.index(record.get("ending", "png"))
        self.total_bytes += size
        self.total_seconds += record.get("seconds", 0.0)
        self.notes.pop(index, None)
        if "exact" in record or "flags" in record:
            kept = ("exact", "batch", "flags")
            self.notes[index] = {name: record[name] for name in kept if name in record}

    def add_failure(self, record: Mapping[str, Any]) -> None:
        index = record["index"]
        if self._status[index] != _DONE:
            self._status[index] = _FAILED
            self.failures[index] = dict(record)


def read_journals(
    files: Files, folder: str, fingerprints: Collection[str], num_requests: int
) -> JournalState:
    """The state by all journals below ``folder``.

    Args:
        fingerprints: of the job (several once it was extended).

    Raises:
        JournalError: a line is damaged that is neither the last one nor contains the zeros of a
            page that a power failure has lost; or the journal is of another job.
    """
    state = JournalState(num_requests)
    for path in journal_paths(files, folder):
        read_journal(files, path, fingerprints, state.add)
    return state


def read_journal(
    files: Files,
    path: str,
    fingerprints: Collection[str],
    take: Callable[[dict[str, Any]], object],
) -> None:
    """Call ``take`` with each record of one journal, its header first, up to a damaged line."""
    expects_header = True  # its process may have died before it was written
    torn_at = 0
    with files.reading(path) as file:
        for number, line in enumerate(file, 1):
            if torn_at:
                raise _broken(path, torn_at, "its checksum is wrong, and it is not the last line")
            record = decode_line(line)
            if record is None:
                # A power failure may lose a page in the middle of what was not fsynced: zeros,
                # which no line contains. The lines after it are whole, and true.
                torn_at = 0 if b"\0" in line else number
                continue
            try:
                if expects_header:
                    _check_header(record, path, fingerprints)
                    expects_header = False
                take(record)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise _broken(path, number, f"{type(error).__name__}: {error}") from None


def _check_header(record: Mapping[str, Any], path: str, fingerprints: Collection[str]) -> None:
    if record["kind"] != "journal":
        raise _broken(path, 1, "the header is missing")
    if record["version"] != JOURNAL_VERSION:
        raise JournalError(
            f"{path}:1: journal format {record['version']}, this ddinfer reads "
            f"{JOURNAL_VERSION}; finish the job with the ddinfer that started it"
        )
    if record["fingerprint"] not in fingerprints:
        raise JournalError(
            f"{path}:1: the journal of another job ({record['fingerprint'][:12]}, this one is "
            f"{', '.join(f[:12] for f in fingerprints)}); move the file away"
        )


def _broken(path: str, line: int, why: str) -> JournalError:
    return JournalError(
        f"{path}:{line}: the journal is damaged: {why}. Remove this file and run the same command "
        "again: the images that it records are made again, the others stay"
    )
