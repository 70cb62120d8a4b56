"""``job.json``: which job a directory contains, and whether it is the requested one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ddinfer.errors import StorageError, UsageError
from ddinfer.request import Request, canonical_json
from ddinfer.storage import metadata
from ddinfer.storage.files import Files

JOB_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """The part of a job that a directory contains, with ``--shard``.

    Attributes:
        part: from 1, of ``num_parts``.
        start, stop: its images, a range of Request indices that may be empty.
    """

    part: int
    num_parts: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.part}/{self.num_parts}"


@dataclass(frozen=True)
class JobDescription:
    """A job as requested, to be compared with the one in the directory.

    Attributes:
        requests: of the whole job, also with ``--shard``.
        identity: everything but the requests that decides the images (model, dtype, …).
        versions: of the libraries; ``--accept_versions`` overrides a difference.
        config: the resolved configuration, stored for the user and to run again.
    """

    requests: Sequence[Request]
    identity: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    shard: Shard | None = None


@dataclass(frozen=True)
class JobRecord:
    """``job.json``.

    Attributes:
        fingerprint: SHA-256 of requests, identity and versions.
        fingerprints: of all journals that belong to the job; several once it was extended.
        segments: where each extension ends, in numbers of Requests. No batch crosses a segment,
            so that an extension changes no earlier batch.
        other_versions: library versions that were accepted when resuming.
        shard: the part of the job in this directory; ``None`` for all of it. Everything else here
            is of the whole job, so that its parts have one fingerprint.
    """

    fingerprint: str
    num_requests: int
    requests_sha256: str
    identity: dict[str, Any]
    versions: dict[str, str]
    config: dict[str, Any]
    fingerprints: list[str]
    segments: list[int]
    other_versions: list[dict[str, str]] = field(default_factory=list)
    shard: Shard | None = None
    version: int = JOB_VERSION

    @property
    def images(self) -> range:
        """Indices of the Requests whose images belong into this directory."""
        if self.shard is None:
            return range(self.num_requests)
        return range(self.shard.start, self.shard.stop)


def read_job(files: Files, path: str) -> JobRecord | None:
    """``job.json``, or ``None`` where there is none.

    Raises:
        UsageError: another program's.
        StorageError: damaged, or of another format version.
    """
    name = os.path.join(path, metadata.JOB_FILE)
    try:
        data = metadata.read_json(files, name)
    except metadata.DamagedFile as error:
        raise StorageError(f"{error}; {_NO_RECORD}") from None
    if data is None:
        return None
    if "fingerprint" not in data or "requests_sha256" not in data:
        raise UsageError(f"{name} is not the record of a ddinfer job; choose another --output")
    if data.get("version") != JOB_VERSION:
        raise StorageError(
            f"{name} has format version {data.get('version')}, this ddinfer reads {JOB_VERSION}; "
            "choose another --output, or finish the job with the ddinfer that began it"
        )
    try:
        if data.get("shard") is not None:
            data["shard"] = Shard(**data["shard"])
        record = JobRecord(**data)
        if not isinstance(record.config, dict):
            raise TypeError(f"its config is {record.config!r:.60}, expected an object")
        is_sound = _is_sound(record)
    except (TypeError, AttributeError, LookupError) as error:
        raise StorageError(f"{name} is damaged: {error}; {_NO_RECORD}") from None
    if not is_sound:
        raise StorageError(
            f"{name} is damaged: its fingerprint is not that of its content; {_NO_RECORD}"
        )
    return record


#: The fix where ``job.json`` is lost. Without it nothing proves that the files are ddinfer's, so
#: that --overwrite does not delete them.
_NO_RECORD = "restore a copy of it, or choose another --output"


def _is_sound(record: JobRecord) -> bool:
    """Whether fingerprint, counts and segments are consistent."""
    own = _fingerprint(record.requests_sha256, record.identity, record.versions)
    is_own = record.fingerprint == own == record.fingerprints[-1]
    ends, images = record.segments, record.images
    is_within = 0 <= images.start <= images.stop <= record.num_requests
    return is_own and is_within and ends == sorted(set(ends)) and ends[-1] == record.num_requests


def requests_sha256(requests: Sequence[Request]) -> str:
    """One hash of all Requests in order."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(bytes.fromhex(request.content_hash()))
    return digest.hexdigest()


def record_of(job: JobDescription) -> JobRecord:
    identity = json.loads(canonical_json(dict(job.identity)))
    versions, hashed = dict(job.versions), requests_sha256(job.requests)
    fingerprint = _fingerprint(hashed, identity, versions)
    return JobRecord(
        fingerprint=fingerprint,
        num_requests=len(job.requests),
        requests_sha256=hashed,
        identity=identity,
        versions=versions,
        config=json.loads(canonical_json(dict(job.config))),
        fingerprints=[fingerprint],
        segments=[len(job.requests)],
        shard=job.shard,
    )


def _fingerprint(hashed: str, identity: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    text = canonical_json({"requests": hashed, "identity": identity, "versions": versions})
    return hashlib.sha256(text.encode()).hexdigest()


def same_or_extended(
    files: Files,
    path: str,
    job: JobDescription,
    old: JobRecord,
    new: JobRecord,
    *,
    extend: bool,
    accept_versions: bool,
) -> JobRecord:
    """The record of ``job`` in a directory that contains ``old``. Writes nothing.

    Raises:
        UsageError: another job; names the differences and the options.
    """
    differences = differences_of(old.identity, new.identity)
    is_grown = _is_extension(job.requests, old)
    if old.requests_sha256 != new.requests_sha256 and not (is_grown and extend):
        differences.append(_requests_difference(files, path, job.requests, old, is_grown))
    versions: list[str] = []
    if new.versions != old.versions and new.versions not in old.other_versions:
        versions = differences_of(old.versions, new.versions, "version of ")
    if differences or (versions and not accept_versions):
        raise UsageError(_refusal(path, differences, versions, is_extending=is_grown and extend))
    if old.shard != new.shard:
        raise UsageError(_shard_refusal(path, old.shard, new.shard))
    if versions:
        old = replace(old, other_versions=[*old.other_versions, new.versions])
    if not is_grown:
        return old
    fingerprint = _fingerprint(new.requests_sha256, old.identity, old.versions)
    return replace(
        old,
        fingerprint=fingerprint,
        fingerprints=[*old.fingerprints, fingerprint],
        num_requests=new.num_requests,
        requests_sha256=new.requests_sha256,
        segments=[*old.segments, new.num_requests],
        config=new.config,
    )


def _is_extension(requests: Sequence[Request], old: JobRecord) -> bool:
    if len(requests) <= old.num_requests:
        return False
    return requests_sha256(requests[: old.num_requests]) == old.requests_sha256


def differences_of(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    what: str = "",
    *,
    where: tuple[str, str] = ("in the directory", "now"),
) -> list[str]:
    """A line for each name whose values differ."""
    names = sorted({*old, *new})
    return [
        f"{what}{name}: {_shown(old.get(name))} {where[0]}, {_shown(new.get(name))} {where[1]}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _requests_difference(
    files: Files, path: str, requests: Sequence[Request], old: JobRecord, grown: bool
) -> str:
    counts = f"requests: {old.num_requests} in the directory, {len(requests)} now"
    if grown:
        return f"{counts}; the first {old.num_requests} are the same (--extend adds the new ones)"
    try:
        before = metadata.read_requests(files, path, old.num_requests)
    except StorageError:
        return f"{counts}; they are not the same"
    for a, b in zip(before, requests, strict=False):
        if a.content_hash() != b.content_hash():
            parts = differences_of(a.to_dict(), b.to_dict()) or ["other hashes"]
            return f"{counts}; the first that differs is {b.index} (id {b.id}): {parts[0]}"
    return f"{counts}; the first {min(len(before), len(requests))} are the same"


def _refusal(path: str, differences: list[str], versions: list[str], *, is_extending: bool) -> str:
    if not differences:
        lines = "".join(f"\n  {line}" for line in versions)
        return (
            f"{path} contains this job, started with other library versions:{lines}\n"
            "Images made from here on may differ in their last bits. Resume with "
            "--accept_versions, install the earlier versions, or choose another --output"
        )
    lines = "".join(f"\n  {line}" for line in (*differences, *versions))
    what = "cannot be extended: not only prompts differ" if is_extending else "contains another job"
    return (
        f"{path} {what}:{lines}\n"
        "Choose another --output, or delete that job and start again with --overwrite"
    )


def _shard_refusal(path: str, old: Shard | None, new: Shard | None) -> str:
    found = "the whole of this job" if old is None else f"part {old} of this job"
    asked = "the whole was" if new is None else f"--shard {new} was"
    again = "without --shard" if old is None else f"with --shard {old}"
    return (
        f"{path} contains {found}, but {asked} requested. Resume {again}, or choose another "
        "--output; ddinfer merge joins the parts of a job in a directory of their own"
    )


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "…"
