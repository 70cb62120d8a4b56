"""A job's folder as the data of its page: read from requests, journals and files, without torch.

`read_job_view` reads what is there, also while the job runs, and also where a journal is damaged:
then it says so in a notice and shows the rest. `page_data` makes it JSON-ready, one list a column.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ddinfer.distributed.partition import cut_batches
from ddinfer.request import Request, canonical_json
from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import JobFolder, list_images
from ddinfer.storage.journal import JournalState, decode_line, journal_paths
from ddinfer.storage.lease import is_held
from ddinfer.storage.metadata import DamagedFile, job_state, read_status

#: What a row's status is, in the page.
PENDING, FAILED, MADE, MISSING = range(4)

#: So many hexadecimal digits of an image's SHA-256 are in the page and in a thumbnail's name.
HASH_DIGITS = 12

_NO_TIME = -1.0


@dataclass
class Run:
    """One journal file: a rank in an attempt.

    Attributes:
        begin, end: when its header and its last line were written, in seconds since 1970.
        reason: why it ended, as it said; ``None`` where it still works, or died.
    """

    rank: int
    attempt: int
    begin: float = _NO_TIME
    end: float = _NO_TIME
    reason: str | None = None


@dataclass
class JobView:
    """A job's folder, as far as it can be read.

    Attributes:
        present: 1 at each index whose image file is there.
        run_of: index → the number of its `Run`; -1 for none.
        starts, ready, ends: when the batch of an image was started, the pipeline had returned,
            and the image was in the journal; seconds since 1970, -1 where it is not known.
        seconds: pipeline seconds of each image.
        notices: what is wrong with the folder, for people.
    """

    folder: JobFolder
    state: JournalState
    present: bytearray
    is_running: bool
    status: Mapping[str, Any]
    runs: list[Run] = field(default_factory=list)
    run_of: array[int] = field(default_factory=lambda: array("l"))
    starts: array[float] = field(default_factory=lambda: array("d"))
    ready: array[float] = field(default_factory=lambda: array("d"))
    ends: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    notices: list[str] = field(default_factory=list)

    def status_of(self, index: int) -> int:
        if self.state.is_done(index):
            return MADE if self.present[index] else MISSING
        return FAILED if self.state.is_failed(index) else PENDING

    def short_hash(self, index: int) -> str:
        return self.state.sha256(index)[:HASH_DIGITS]

    def made(self) -> list[int]:
        """Indices of the images that are there."""
        return [r.index for r in self.folder.requests if self.status_of(r.index) == MADE]


def read_job_view(files: Files, path: str) -> JobView:
    """Read a job's folder; takes no lock and changes nothing.

    Raises:
        UsageError: no job there.
        StorageError: ``job.json`` or ``requests.jsonl.gz`` is damaged.
    """
    folder = JobFolder.look(files, path)
    is_running = is_held(files, path)
    capacity = 1 + max((request.index for request in folder.requests), default=-1)
    nothing = array("d", [_NO_TIME]) * capacity
    view = JobView(
        folder,
        JournalState(capacity),
        present=bytearray(),
        is_running=is_running,
        status={},
        run_of=array("l", [-1]) * capacity,
        starts=nothing[:],
        ready=nothing[:],
        ends=nothing[:],
        seconds=nothing[:],
    )
    try:
        view.status = read_status(files, path) or {}
    except DamagedFile as error:
        view.notices.append(f"{error}; the next run of the job writes it anew")
    for name in journal_paths(files, path):
        _read_journal(files, name, view)
    # After the journals: an image is in its place before its line is written.
    view.present = list_images(files, path, capacity)
    missing = sum(view.status_of(r.index) == MISSING for r in folder.requests)
    if missing:
        view.notices.append(
            f"{missing} images are in the journal but their files are missing; the job's own "
            "command makes them again"
        )
    return view


def _read_journal(files: Files, path: str, view: JobView) -> None:
    """Take in one journal file, up to its first line that cannot be believed."""
    run: Run | None = None
    sizes: dict[int, int] = {}  # index → images in the batch that was started last with it
    with files.reading(path) as file:
        lines = enumerate(file, 1)
        for number, line in lines:
            record = decode_line(line)
            try:
                if record is None:  # zeros: of a page that a power failure has lost
                    if b"\0" not in line and next(lines, None) is not None:
                        raise ValueError("its checksum is wrong, and it is not the last line")
                elif run is None:
                    run = _first_line(record, view)
                else:
                    run.end = max(run.end, record.get("time", _NO_TIME))
                    _add_record(record, run, sizes, view)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                name = os.path.join(os.path.basename(os.path.dirname(path)), os.path.basename(path))
                view.notices.append(
                    f"{name}:{number}: the journal is damaged ({error}); nothing after line "
                    f"{number - 1} of it is shown. ddinfer verify says what to do"
                )
                return


def _first_line(record: Mapping[str, Any], view: JobView) -> Run:
    if record["kind"] != "journal":
        raise ValueError("the header is missing")
    if record["fingerprint"] not in view.folder.record.fingerprints:
        raise ValueError("it is the journal of another job")
    begin = record.get("time", _NO_TIME)
    run = Run(record["rank"], record["attempt"], begin, begin)
    view.runs.append(run)
    return run


def _add_record(record: Mapping[str, Any], run: Run, sizes: dict[int, int], view: JobView) -> None:
    kind, now = record["kind"], record.get("time", _NO_TIME)
    if kind == "end":
        run.reason = record["reason"]
    elif kind == "start":
        for index in record["indices"]:
            sizes[index] = len(record["indices"])
            view.starts[index] = now
    else:
        view.state.add(record)
        if kind in ("image", "failed"):
            index = record["index"]
            view.run_of[index] = len(view.runs) - 1
            view.ends[index] = view.ready[index] = now
            view.seconds[index] = record.get("seconds", _NO_TIME)
            if view.seconds[index] >= 0 and view.starts[index] >= 0:
                computed = view.starts[index] + view.seconds[index] * sizes.get(index, 1)
                view.ready[index] = min(now, computed)


# --- JSON ---------------------------------------------------------------------------------------


class _Numbers:
    """Distinct values, numbered in the order in which they were seen."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Hashable, int] = {}

    def of(self, value: Any, key: Hashable = None) -> int:
        number = self._numbers.setdefault(value if key is None else key, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


def page_data(
    view: JobView,
    *,
    thumbnails: Mapping[int, int] | None = None,
    unreadable: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """The data of the page, JSON-ready.

    Args:
        thumbnails: index → frames of the image (1 for a still one), where there is a thumbnail.
        unreadable: index → why its file could not be opened.
    """
    requests = view.folder.requests
    thumbnails, unreadable = thumbnails or {}, unreadable or {}
    record = view.folder.record
    indices = [request.index for request in requests]
    num_pending = sum(view.status_of(k) in (PENDING, MISSING) for k in indices)
    notices = list(view.notices)
    if unreadable:
        first, why = next(iter(unreadable.items()))
        notices.append(
            f"{len(unreadable)} images cannot be opened (image {first}: {why}); "
            "ddinfer verify --repair deletes those that are damaged"
        )
    begin = min((run.begin for run in view.runs if run.begin >= 0), default=0.0)
    data: dict[str, Any] = {
        "output": view.folder.path,
        "shard": None if record.shard is None else str(record.shard),
        "first": indices[0] if indices else 0,
        "state": job_state(view.is_running, num_pending, view.status),
        "written": round(time.time(), 3),
        "begin": begin,
        "error": view.status.get("error") if num_pending and not view.is_running else None,
        "identity": record.identity,
        "versions": record.versions,
        "notices": notices,
        "deaths": len(view.state.deaths),
        "runs": [
            {
                "rank": run.rank,
                "attempt": run.attempt,
                "begin": _since(run.begin, begin),
                "end": _since(run.end, begin),
                "reason": run.reason,
            }
            for run in view.runs
        ],
        "columns": _columns(requests, view, begin),
        "frames": {k: frames for k, frames in thumbnails.items() if frames > 1},
        "unreadable": dict(unreadable),
    }
    data.update(_tables(requests, view))
    data["columns"]["thumbnail"] = [int(k in thumbnails) for k in indices]
    return data


def _columns(requests: Sequence[Request], view: JobView, begin: float) -> dict[str, list[Any]]:
    """One value for each Request, in order."""
    indices = [request.index for request in requests]
    return {
        "id": [None if r.id == f"{r.index:08d}" else r.id for r in requests],
        "seed": [str(r.seed) if r.seed > 2**53 else r.seed for r in requests],
        "status": [view.status_of(k) for k in indices],
        "run": [view.run_of[k] for k in indices],
        "start": [_since(view.starts[k], begin) for k in indices],
        "ready": [_since(view.ready[k], begin) for k in indices],
        "end": [_since(view.ends[k], begin) for k in indices],
        "seconds": [round(view.seconds[k], 3) if view.seconds[k] >= 0 else None for k in indices],
        "bytes": [view.state.size(k) for k in indices],
        "hash": [view.short_hash(k) if view.state.is_done(k) else None for k in indices],
        "batch": _batch_numbers(requests, view),
    }


def _tables(requests: Sequence[Request], view: JobView) -> dict[str, Any]:
    """What many Requests share, once: prompts, sets of parameters, errors; and what few have."""
    prompts, parameters, errors = _Numbers(), _Numbers(), _Numbers()
    prompt_of = [prompts.of(request.prompt) for request in requests]
    parameters_of = []
    for request in requests:
        values = request.parameters()
        if request.negative_prompt is not None:
            values = {"negative_prompt": request.negative_prompt, **values}
        values.update((f"{name}_sha256", h) for name, h in request.input_hashes.items())
        parameters_of.append(parameters.of(values, canonical_json(values)))
    error_of = {
        index: errors.of(failed["error"], canonical_json(failed["error"]))
        for index, failed in sorted(view.state.failures.items())
    }
    notes = view.state.notes
    return {
        "prompts": prompts.values,
        "prompt": prompt_of,
        "parameter_sets": parameters.values,
        "parameters": parameters_of,
        "errors": errors.values,
        "error_of": error_of,
        "flags": {k: note["flags"] for k, note in notes.items() if note.get("flags")},
        "inexact": {k: note.get("batch", []) for k, note in notes.items() if "exact" in note},
    }


def _batch_numbers(requests: Sequence[Request], view: JobView) -> list[int]:
    """Which Requests share a batch, as the job cuts them: the number of the batch for each."""
    record = view.folder.record
    everything, numbers, number, start = view.folder.all_requests, [], 0, 0
    for stop in record.segments:
        keys = [request.batch_key() for request in everything[start:stop]]
        for batch in cut_batches(keys, int(record.identity.get("batch_size", 1))):
            numbers += [number] * len(batch)
            number += 1
        start = stop
    return [numbers[request.index] for request in requests]


def _since(moment: float, begin: float) -> float | None:
    return round(moment - begin, 2) if moment >= 0 else None
