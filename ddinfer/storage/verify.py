"""Compare a job's directory with its journals: is everything there, as it was written?"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from ddinfer.request import Request
from ddinfer.storage import metadata
from ddinfer.storage.files import Files, is_temporary
from ddinfer.storage.images import IMAGES_FOLDER
from ddinfer.storage.job_folder import JobFolder, image_files
from ddinfer.storage.journal import JournalState
from ddinfer.storage.lease import Lease

_BLOCK_BYTES = 1 << 20


@dataclass
class VerifyReport:
    """The findings of `verify`.

    Attributes:
        num_requests: of the job; each is made, failed, missing or pending.
        num_good: images whose bytes are those that were journaled.
        num_failed: prompts listed as failed.
        pending: indices without a journal line: the job is not finished.
        missing: indices that were made and whose file is missing.
        torn: indices whose file has other bytes than were journaled → the difference.
        extra: files below ``images`` without a journal line.
        paths: index → file of each that is missing or torn.
        stale: metadata files that do not agree with the journals.
    """

    num_requests: int = 0
    num_good: int = 0
    num_failed: int = 0
    pending: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    torn: dict[int, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    paths: dict[int, str] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Whether every Request has its image, or its line in failures.jsonl, and no more."""
        return not (self.pending or self.missing or self.torn or self.extra or self.stale)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "is_good": self.is_good}


def verify(
    files: Files, path: str, *, progress: Callable[[int], object] = lambda done: None
) -> VerifyReport:
    """Compare a job's directory with its journals: every hash, every Request, every file.

    Args:
        progress: called now and then with the number of images that have been read.

    Raises:
        UsageError: no job there.
        StorageError: a journal, ``job.json`` or ``requests.jsonl.gz`` is damaged.
    """
    folder = JobFolder.look(files, path)
    state = folder.read_journals()
    report = VerifyReport(num_requests=len(folder.requests))
    for k, request in enumerate(folder.requests):
        index = request.index
        if state.is_failed(index):
            report.num_failed += 1
        elif state.is_pending(index):
            report.pending.append(index)
        else:
            _check_image(files, path, index, state, report)
        if k % 256 == 0:
            progress(k)
    report.extra = list(_extra_files(files, path, state, folder.record.images.stop))
    report.stale = list(_stale_files(files, path, folder.requests, state))
    return report


def repair(files: Files, path: str, *, rebuild: bool, delete_torn: bool) -> VerifyReport:
    """`verify` under the job's lock, with changes to the directory.

    Args:
        rebuild: write ``metadata.jsonl`` and ``failures.jsonl`` again from the journals first.
        delete_torn: delete torn images, so that the job's command generates them again; in the
            report they are missing.
    """
    folder = JobFolder.look(files, path)  # raises where there is no job, before a lock is written
    with Lease.acquire(files, path):
        if rebuild:
            folder.finish()
        report = verify(files, path)
        if delete_torn:
            names = [os.path.join(path, report.paths[index]) for index in report.torn]
            for name in names:
                files.remove(name)
            for images in sorted({os.path.dirname(name) for name in names}):
                files.sync_folder(images)
            report.missing = sorted([*report.missing, *report.torn])
            report.torn = {}
    return report


def _check_image(
    files: Files, path: str, index: int, state: JournalState, report: VerifyReport
) -> None:
    report.paths[index] = state.path(index)
    name = os.path.join(path, state.path(index))
    size = files.size(name)
    if size is None:
        report.missing.append(index)
    elif size != state.size(index):
        report.torn[index] = f"{size} bytes, {state.size(index)} were written"
    elif _hash_of(files, name) != state.sha256(index):
        report.torn[index] = "its bytes have changed (SHA-256)"
    else:
        report.num_good += 1
        del report.paths[index]


def _hash_of(files: Files, name: str) -> str:
    digest = hashlib.sha256()
    with files.reading(name) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _extra_files(files: Files, path: str, state: JournalState, capacity: int) -> Iterator[str]:
    for folder in files.list(os.path.join(path, IMAGES_FOLDER)):
        if not folder.isdecimal():
            yield f"{IMAGES_FOLDER}/{folder}"
    for place, index in image_files(files, path):
        known = index is not None and index < capacity and state.is_done(index)
        if index is None or not known or place != state.path(index):
            yield place
    yield from filter(is_temporary, files.list(path))


def _stale_files(
    files: Files, path: str, requests: Sequence[Request], state: JournalState
) -> Iterator[str]:
    for name, rows in (
        (metadata.METADATA_FILE, metadata.metadata_rows(requests, state)),
        (metadata.FAILURES_FILE, metadata.failure_rows(requests, state)),
    ):
        if not _has_rows(files, os.path.join(path, name), rows):
            yield name


def _has_rows(files: Files, path: str, rows: Iterator[Mapping[str, Any]]) -> bool:
    if not files.exists(path):
        return False
    with files.reading(path) as file:
        for line, row in zip_longest(file, rows):
            if line is None or row is None:
                return False
            try:
                if json.loads(line) != row:
                    return False
            except ValueError:
                return False
    return True
