"""Merge the parts of a job (``--shard``) into one ordinary output directory.

A merge is one more attempt at the whole job, in a directory of its own, whose images are copied
instead of generated. So the same command resumes it after any interruption, and its result is
locked, resumed, verified and extended like any other job's directory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ddinfer.errors import EXIT_FAILED_PROMPTS, EXIT_OK, StorageError, UsageError, list_some
from ddinfer.storage import metadata
from ddinfer.storage.disk_space import DiskEstimate, check_room
from ddinfer.storage.files import Files, write_and_rename
from ddinfer.storage.job_folder import JobFolder
from ddinfer.storage.job_record import JobDescription, JobRecord, Shard, differences_of
from ddinfer.storage.journal import JournalHeader, JournalState, JournalWriter
from ddinfer.storage.lease import is_held

#: Images that become durable together, with their journal lines.
_IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge: every Request of the job is made or failed.

    Attributes:
        num_copied: images that this run copied; an earlier one has copied the others.
    """

    output: str
    num_images: int
    num_made: int
    num_failed: int
    num_copied: int

    @property
    def exit_code(self) -> int:
        return EXIT_FAILED_PROMPTS if self.num_failed else EXIT_OK


def merge(
    files: Files,
    paths: Sequence[str],
    target: str,
    *,
    notify: Callable[[str], object] = lambda text: None,
) -> MergeReport:
    """Copy the images and records of a job's parts into ``target``; the parts stay as they are.

    Args:
        paths: directories that hold parts of one job (or all of it). They may overlap.
        target: a new directory, or one that an earlier `merge` of this job has started to fill.
        notify: called with a sentence before copying.

    Raises:
        UsageError: the directories are not of one job, or do not cover it; nothing was written.
        StorageError: two directories have different bytes for one image; an image is damaged; an
            I/O operation failed. The same call resumes.
    """
    parts = _parts(files, paths, target)
    state = _joined(parts)
    whole = parts[0].folder
    description = _description(whole, target)
    with JobFolder.open(files, target, description, notify=notify) as folder:
        there = folder.read_state()
        _check_same_images(folder, there, state)
        wanted = [r.index for r in folder.requests if not there.is_done(r.index)]
        num_bytes = sum(state.size(index) for index in wanted)
        check_room(_room(files, target, num_bytes, len(wanted)), target)
        if num_bytes:
            notify(f"copying {len(wanted)} images ({num_bytes / 1e6:.1f} MB) into {target}")
        num_copied = _copy(files, folder, parts, state, there, wanted)
        done = folder.finish()
        report = MergeReport(
            target, len(folder.requests), done.num_done, done.num_failed, num_copied
        )
        metadata.write_status(
            files, target, {"state": "finished", **report.__dict__, "exit_code": report.exit_code}
        )
    return report


# --- the parts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    folder: JobFolder
    state: JournalState

    @property
    def path(self) -> str:
        return self.folder.path

    def holds(self, index: int) -> bool:
        return index in self.folder.record.images


def _parts(files: Files, paths: Sequence[str], target: str) -> list[_Part]:
    """The directories, read and compared.

    Raises:
        UsageError: they cannot be merged.
    """
    if not paths:
        raise UsageError("nothing to merge: name the output directories of the job's parts")
    folders: list[JobFolder] = []
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real == os.path.realpath(target):
            raise UsageError(f"--output {target} is one of the parts; choose a new directory")
        if real in seen:
            raise UsageError(f"{path} and {seen[real]} are the same directory; name it once")
        seen[real] = path
        folder = JobFolder.look(files, path)
        if is_held(files, path):
            raise UsageError(f"{path} is still being written; wait until its job has ended")
        _check_same_job(folders[0] if folders else folder, folder)
        folders.append(folder)
    return [_Part(folder, folder.read_state()) for folder in folders]


def _check_same_job(first: JobFolder, folder: JobFolder) -> None:
    a, b = first.record, folder.record
    if len(b.segments) > 1:
        raise UsageError(
            f"{folder.path} was extended with --extend, so that its batches were cut otherwise; "
            "merge the parts of a job as it was started, and extend the joined directory"
        )
    if a.fingerprint == b.fingerprint:
        return
    where = (f"in {first.path}", f"in {folder.path}")
    lines = differences_of(a.identity, b.identity, where=where)
    lines += differences_of(a.versions, b.versions, "version of ", where=where)
    if a.requests_sha256 != b.requests_sha256:
        counts = f"{a.num_requests} {where[0]}, {b.num_requests} {where[1]}"
        lines.append(f"requests: {counts}; they are not the same")
    raise UsageError(
        f"{folder.path} and {first.path} hold different jobs:"
        + "".join(f"\n  {line}" for line in lines)
        + "\nThe parts of a job come from one command that differs only in --shard and --output"
    )


def _joined(parts: Sequence[_Part]) -> JournalState:
    """The state of the whole job.

    Raises:
        UsageError: a Request without image or failure in any part.
        StorageError: two of them have different bytes for one image.
    """
    requests = parts[0].folder.all_requests
    joined = JournalState(len(requests))
    by_whom: dict[int, str] = {}
    missing: list[int] = []
    for request in requests:
        index = request.index
        holders = [part for part in parts if part.holds(index)]
        for part in holders:
            if part.state.is_failed(index):
                joined.add_failure(part.state.failures[index])
        for part in holders:
            if not part.state.is_done(index):
                continue
            digest = part.state.sha256(index)
            if joined.is_done(index) and joined.sha256(index) != digest:
                raise StorageError(
                    f"{joined.path(index)} (id {request.id}) has other bytes in {part.path} than "
                    f"in {by_whom[index]}, though both hold the same job; merge only the one "
                    "that is right"
                )
            joined.add_image(_image_line(part.state, index))
            by_whom.setdefault(index, part.path)
        if joined.is_pending(index):
            missing.append(index)
    if missing:
        raise UsageError(_missing_message(parts, missing))
    return joined


def _image_line(state: JournalState, index: int) -> dict[str, Any]:
    line = {"kind": "image", "index": index, "sha256": state.sha256(index)}
    line["ending"] = state.ending(index)
    return {**line, "bytes": state.size(index), **state.notes.get(index, {})}


def _missing_message(parts: Sequence[_Part], missing: Sequence[int]) -> str:
    requests = parts[0].folder.all_requests
    ids = list_some([requests[index].id for index in missing])
    lines = [f"{len(missing)} of {len(requests)} images are in no given directory: {ids}"]
    for part in parts:
        unfinished = [index for index in missing if part.holds(index)]
        if unfinished:
            what = f"part {part.folder.record.shard}" if part.folder.record.shard else "the job"
            lines.append(
                f"{part.path} ({what}) is not finished, {len(unfinished)} images are pending: run "
                "its own command again"
            )
    absent = _absent_shards([part.folder.record for part in parts])
    if absent:
        lines.append(f"not given: {absent}")
    return "\n  ".join(lines)


def _absent_shards(records: Sequence[JobRecord]) -> str:
    """Which of the N parts are not given, where all directories belong to the same N."""
    shards: list[Shard] = [record.shard for record in records if record.shard is not None]
    numbers = {shard.num_parts for shard in shards}
    if len(shards) < len(records) or len(numbers) > 1:
        return ""
    (num_parts,) = numbers
    absent = sorted(set(range(1, num_parts + 1)) - {shard.part for shard in shards})
    return ", ".join(f"part {part}/{num_parts}" for part in absent)


def _description(whole: JobFolder, target: str) -> JobDescription:
    record = whole.record
    config = {**record.config, "output": target, "shard": None, "overwrite": False}
    return JobDescription(whole.all_requests, record.identity, record.versions, config)


# --- copying ------------------------------------------------------------------------------------


def _check_same_images(folder: JobFolder, there: JournalState, state: JournalState) -> None:
    """What an earlier run has copied must still be what the parts contain."""
    for request in folder.requests:
        index = request.index
        if not (there.is_done(index) and state.is_done(index)):
            continue
        if there.sha256(index) != state.sha256(index):
            raise StorageError(
                f"{folder.path} has other bytes for {there.path(index)} than the parts have; "
                "merge into a new directory"
            )


def _room(files: Files, target: str, num_bytes: int, num_images: int) -> DiskEstimate:
    at = os.path.abspath(target)
    return DiskEstimate(num_bytes, files.free_bytes(at), num_images, is_measured=True)


def _copy(
    files: Files,
    folder: JobFolder,
    parts: Sequence[_Part],
    state: JournalState,
    there: JournalState,
    wanted: Sequence[int],
) -> int:
    """Copy images durably, then append their journal lines."""
    header = JournalHeader(folder.fingerprint, attempt=folder.attempt)
    journal = JournalWriter(files, folder.path, header)
    num_copied = 0
    try:
        for start in range(0, len(wanted), _IMAGES_AT_ONCE):
            indices = wanted[start : start + _IMAGES_AT_ONCE]
            made = [index for index in indices if state.is_done(index)]
            inside = sorted({os.path.dirname(state.path(index)) for index in made})
            for name in inside:
                files.make_folder(os.path.join(folder.path, name))
            for index in made:
                _copy_image(files, folder.path, parts, state, index)
            for name in inside:
                files.sync_folder(os.path.join(folder.path, name))
            lines = [_image_line(state, index) for index in made]
            lines += [
                state.failures[index]
                for index in indices
                if state.is_failed(index) and not there.is_failed(index)
            ]
            if lines:
                journal.append(lines)
            num_copied += len(made)
        journal.append([{"kind": "end", "reason": "merged"}])
    finally:
        journal.close()
    return num_copied


def _copy_image(
    files: Files, target: str, parts: Sequence[_Part], state: JournalState, index: int
) -> None:
    """Copy bytes, not links: the parts may be changed or deleted, and this file must not."""
    name = state.path(index)
    part = next(part for part in parts if part.holds(index) and part.state.is_done(index))
    source, copy = os.path.join(part.path, name), os.path.join(target, name)
    data = files.read(source)
    if hashlib.sha256(data).hexdigest() != state.sha256(index):
        raise StorageError(
            f"{source} is damaged: it has other bytes than were written. ddinfer verify "
            f"{part.path} --repair deletes it; run that part's command again, then merge again"
        )
    write_and_rename(files, copy, data)
