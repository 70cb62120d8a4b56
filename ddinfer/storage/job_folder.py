"""The output directory of a job: create, resume, overwrite, finish.

The steps of a job::

    with JobFolder.open(files, path, job) as folder:          # rank 0: lock, job.json, requests
        state = folder.read_state()                           # journals, compared with the files
        batches = folder.pending_batches(all_batches, state)
        journal = JournalWriter(files, path, header)                 # every rank
        with Writer(files, path, journal, info) as writer:
            for result in save_as_made(engine.run, batches, writer): ...
        report = folder.finish()                              # rank 0: compared once more
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, TypeVar

from ddinfer.errors import StorageError, UsageError
from ddinfer.request import Request
from ddinfer.storage import metadata
from ddinfer.storage.files import Files, is_temporary
from ddinfer.storage.images import IMAGES_FOLDER, IMAGES_PER_FOLDER, image_path, index_of
from ddinfer.storage.job_record import (
    JobDescription,
    JobRecord,
    read_job,
    record_of,
    same_or_extended,
)
from ddinfer.storage.journal import (
    JOURNAL_FOLDER,
    JournalHeader,
    JournalState,
    JournalWriter,
    journal_paths,
    read_journals,
)
from ddinfer.storage.lease import Lease
from ddinfer.storage.media import Formats
from ddinfer.storage.report_files import THUMBNAILS_FOLDER, delete_report

#: Files of a job besides job.json, images and journals.
_JOB_FILES = (
    metadata.METADATA_FILE,
    metadata.FAILURES_FILE,
    metadata.STATUS_FILE,
    metadata.REQUESTS_FILE,
)

B = TypeVar("B", bound=Sequence[int])


@dataclass(frozen=True)
class JobReport:
    """The state of a job: every Request is in exactly one of the first three.

    Attributes:
        notes: index → what is unusual about its image (``exact``, ``flags``).
    """

    num_done: int
    num_failed: int
    pending: list[int]
    notes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict, compare=False)

    @property
    def is_complete(self) -> bool:
        return not self.pending


class JobFolder:
    """The directory of a job, locked by it.

    Attributes:
        requests: whose images belong here: the whole job's, or those of its shard.
        all_requests: of the whole job.
        record: its ``job.json``.
        attempt: number of this attempt, from 0: for journal headers.
        is_resumed: whether the directory held the job already.
    """

    def __init__(
        self,
        files: Files,
        path: str,
        requests: Sequence[Request],
        record: JobRecord,
        lease: Lease | None = None,
        *,
        attempt: int = 0,
        is_resumed: bool = True,
    ):
        self.files, self.path, self.record = files, path, record
        self.all_requests = requests
        self.requests = [requests[k] for k in record.images] if record.shard else requests
        self.lease, self.attempt, self.is_resumed = lease, attempt, is_resumed

    @classmethod
    def open(
        cls,
        files: Files,
        path: str,
        job: JobDescription,
        *,
        overwrite: bool = False,
        extend: bool = False,
        accept_versions: bool = False,
        run_id: str = "",
        notify: Callable[[str], object] = lambda text: None,
    ) -> JobFolder:
        """Lock the directory, and create or resume this job in it. Rank 0 calls this.

        Args:
            overwrite: delete the job that is there, and start again.
            extend: accept Requests that were appended to those in the directory.
            accept_versions: resume with other library versions.
            run_id: of the launcher, whose restarts take over the lease from one another.

        Raises:
            UsageError: the directory contains another job or other files; names the differences.
            FolderInUse: another job is running there.
        """
        path = os.path.abspath(path)
        _reject_links(files, path)  # before anything is written there
        _reject_foreign(files, path)
        _make_folders(files, path)
        lease = Lease.acquire(files, path, run_id, notify=notify)
        try:
            record, is_resumed = _create_or_resume(
                files, path, job, overwrite, extend, accept_versions
            )
            _remove_temporaries(files, path, record)
            for name in (JOURNAL_FOLDER, IMAGES_FOLDER):
                files.make_folder(os.path.join(path, name))
            _make_journals_durable(files, path)
            attempt = _next_attempt(files, path)
        except BaseException:
            with suppress(StorageError):
                lease.release()
            raise
        return cls(files, path, job.requests, record, lease, attempt=attempt, is_resumed=is_resumed)

    @classmethod
    def look(cls, files: Files, path: str) -> JobFolder:
        """Open read-only, without a lock; the Requests are those in the directory."""
        _reject_links(files, path)
        record = read_job(files, path)
        if record is None:
            raise UsageError(f"{path} contains no ddinfer job (no {metadata.JOB_FILE})")
        requests = metadata.read_requests(files, path, record.num_requests)
        if len(requests) != record.num_requests:
            raise StorageError(
                f"{os.path.join(path, metadata.REQUESTS_FILE)} contains {len(requests)} requests, "
                f"{record.num_requests} expected"
            )
        return cls(files, path, requests, record, attempt=_next_attempt(files, path))

    @property
    def fingerprint(self) -> str:
        return self.record.fingerprint

    def read_journals(self) -> JournalState:
        """The state by the journals; whether the images' files exist is not checked."""
        record = self.record
        return read_journals(self.files, self.path, record.fingerprints, record.images.stop)

    def read_state(self) -> JournalState:
        """The state by the journals; images whose file is missing are pending again."""
        state = self.read_journals()
        present = list_images(self.files, self.path, self.record.images.stop)
        for request in self.requests:
            if state.is_done(request.index) and not present[request.index]:
                state.forget(request.index)
        return state

    def pending(self, state: JournalState) -> list[int]:
        """Indices without image or failure, in order."""
        return [r.index for r in self.requests if state.is_pending(r.index)]

    def pending_batches(self, batches: Sequence[B], state: JournalState) -> list[B]:
        """Batches (of indices) with a pending image. Each runs whole."""
        return [batch for batch in batches if any(map(state.is_pending, batch))]

    def retry_failed(self, state: JournalState) -> None:
        """Make failed prompts pending again, in ``state`` and in the journals."""
        self.journal_decisions([{"kind": "retry", "indices": sorted(state.failures)}], state)

    def journal_decisions(self, records: Sequence[Mapping[str, Any]], state: JournalState) -> None:
        """Journal what rank 0 has decided before any batch runs, as an attempt of its own.

        Journals are read in the order of their attempts, so that what the ranks write later
        comes after it.
        """
        header = JournalHeader(self.fingerprint, attempt=self.attempt)
        journal = JournalWriter(self.files, self.path, header)
        try:
            journal.append([*records, {"kind": "end", "reason": "decided"}])
        finally:
            journal.close()
        self.attempt += 1
        for record in records:
            state.add(record)

    def finish(self) -> JobReport:
        """Compare journals and Requests once more; write metadata and failures.

        This decides whether the job is complete, not the exit codes of processes.
        """
        state = self.read_state()
        metadata.write_metadata(self.files, self.path, self.requests, state)
        metadata.write_failures(self.files, self.path, self.requests, state)
        return JobReport(state.num_done, state.num_failed, self.pending(state), state.notes)

    def confirm_lease(self) -> None:
        """Raise `StorageError` if another job has taken the directory."""
        if self.lease is not None:
            self.lease.confirm()

    def close(self) -> None:
        if self.lease is not None:
            self.lease.release()

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.lease is not None:
            self.lease.__exit__(*error)


def list_images(files: Files, path: str, capacity: int) -> bytearray:
    """1 at each index whose image file exists."""
    present = bytearray(capacity)
    for _, index in image_files(files, path):
        if index is not None and index < capacity:
            present[index] = 1
    return present


def image_files(files: Files, path: str) -> Iterator[tuple[str, int | None]]:
    """The files in a job's image directories, each with the index of the image of this name."""
    images = os.path.join(path, IMAGES_FOLDER)
    for folder in filter(str.isdecimal, files.list(images)):
        for name in files.list(os.path.join(images, folder)):
            place = f"{IMAGES_FOLDER}/{folder}/{name}"
            yield place, index_of(place)


def _create_or_resume(
    files: Files,
    path: str,
    job: JobDescription,
    overwrite: bool,
    extend: bool,
    accept_versions: bool,
) -> tuple[JobRecord, bool]:
    """Make ``job.json`` this job's → the record, and whether the directory held it already.

    Raises:
        UsageError: the directory holds another job, or files of other origin.
    """
    new = record_of(job)
    name = os.path.join(path, metadata.JOB_FILE)
    old = _reject_foreign(files, path)
    if old is not None and not overwrite:
        record = same_or_extended(
            files, path, job, old, new, extend=extend, accept_versions=accept_versions
        )
        if record != old or not metadata.holds_requests(files, path, job.requests):
            # First the list, which begins with the old one, then the record that refers to it.
            metadata.write_requests(files, path, job.requests)
        if record != old:
            metadata.write_json(files, name, asdict(record))
        return record, True
    if old is not None:
        _delete_job(files, path, old)
    # job.json first: the other files of a job never lie in a directory without one.
    metadata.write_json(files, name, asdict(new))
    metadata.write_requests(files, path, job.requests)
    return new, False


# --- the directory ----------------------------------------------------------------------------


def _make_folders(files: Files, path: str) -> None:
    """Make the output directory and its parents durably."""
    if files.exists(os.path.join(path, metadata.JOB_FILE)):
        return
    above, at = [], os.path.dirname(path)
    while at not in above:
        above.append(at)
        at = os.path.dirname(at)
    for folder in reversed(above):
        if not files.exists(folder):
            files.make_folder(folder)
    files.make_folder(path)
    # A process that was killed here may have left directories that are not durable yet.
    for folder in above:
        files.sync_folder(folder, may_be_foreign=True)


def _reject_foreign(files: Files, path: str) -> JobRecord | None:
    """The record of the job that the directory holds; ``None`` where there is none.

    Raises:
        UsageError, StorageError: ``job.json`` is not ddinfer's, or files that a job would
            overwrite are there without one.
    """
    record = read_job(files, path)
    if record is None:
        ours = (IMAGES_FOLDER, JOURNAL_FOLDER, *_JOB_FILES)
        found = [name for name in files.list(path) if name in ours]
        if found:
            raise UsageError(
                f"{path} contains {', '.join(found)} but no {metadata.JOB_FILE}: ddinfer did not "
                "write them, or it is lost. Choose another --output, or move these away"
            )
    return record


def _reject_links(files: Files, path: str) -> None:
    """
    Raises:
        UsageError: a directory of the job is a link, so that writing and deleting in it would
            change files elsewhere.
    """
    for folder in (IMAGES_FOLDER, JOURNAL_FOLDER, THUMBNAILS_FOLDER):
        at = os.path.join(path, folder)
        names = (os.path.join(at, name) for name in files.list(at) if name.isdigit())
        for name in chain([at], names):
            target = files.link_target(name)
            if target is not None:
                raise UsageError(
                    f"{name} is a link to {target}; expected a directory of its own, since ddinfer "
                    "writes and deletes files there. Move the files into it, or choose another "
                    "--output"
                )


def _delete_job(files: Files, path: str, record: JobRecord) -> None:
    """Delete what this job wrote, by name, and nothing else; ``job.json`` stays to be replaced.

    Journals first, durably: at no moment does a journal refer to an image that is gone.
    """
    for name in journal_paths(files, path):
        files.remove(name)
    if files.exists(os.path.join(path, JOURNAL_FOLDER)):
        files.sync_folder(os.path.join(path, JOURNAL_FOLDER))
    endings = Formats.of(record.identity).endings
    for folder, indices in _image_folders(path, record):
        own = {os.path.basename(image_path(k, ending)) for k in indices for ending in endings}
        for name in files.list(folder):
            if name in own or is_temporary(name):
                files.remove(os.path.join(folder, name))
        files.remove_empty_folder(folder)
    for name in _JOB_FILES:
        files.remove(os.path.join(path, name))
    delete_report(files, path, record.num_requests)
    files.sync_folder(path)


def _image_folders(path: str, record: JobRecord) -> Iterator[tuple[str, range]]:
    """Directories of the job's images, each with the indices of those in it."""
    indices = range(record.num_requests)
    for first in indices[::IMAGES_PER_FOLDER]:
        folder = os.path.dirname(os.path.join(path, image_path(first)))
        yield folder, indices[first : first + IMAGES_PER_FOLDER]


def _make_journals_durable(files: Files, path: str) -> None:
    """Fsync the journals of earlier attempts.

    A killed process may have written lines without fsync. This attempt relies on them, so a power
    failure must not take them away afterwards.
    """
    for name in journal_paths(files, path):
        fd = files.open_to_read(name)
        try:
            files.sync(fd)
        finally:
            files.close(fd)
    files.sync_folder(os.path.join(path, JOURNAL_FOLDER))


def _remove_temporaries(files: Files, path: str, record: JobRecord) -> None:
    """Remove the temporary files that a crash of this job has left."""
    for folder in [path, *(folder for folder, _ in _image_folders(path, record))]:
        for name in files.list(folder):
            if is_temporary(name):
                files.remove(os.path.join(folder, name))


def _next_attempt(files: Files, path: str) -> int:
    names = map(os.path.basename, journal_paths(files, path))
    return 1 + max((int(name.partition("-")[0]) for name in names), default=-1)
