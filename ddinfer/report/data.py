"""A job's folder as the data of its page: read from requests, journals and files, without torch.

`JobView` reads what is there, also while the job runs, and also where a journal is damaged: then
a notice names it and the rest is shown. `page_data` makes it JSON-ready, one list a column.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ddinfer.distributed.partition import cut_batches
from ddinfer.request import Request, canonical_json
from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import JobFolder, list_images
from ddinfer.storage.journal import JournalError, JournalState, journal_paths, read_journal
from ddinfer.storage.lease import is_held
from ddinfer.storage.metadata import DamagedFile, read_status
from ddinfer.storage.status import job_state

#: What a row's status is, in the page.
PENDING, FAILED, MADE, MISSING = range(4)

#: So many hexadecimal digits of an image's SHA-256 are in the page and in a thumbnail's name.
HASH_DIGITS = 12

_NO_TIME = -1.0


class JobView:
    """A job's folder, as far as it can be read.

    Attributes:
        state: by the journals, up to the first damaged line of each.
        present: 1 at each index whose image file is there.
        run_of: index → the number of its journal in ``state.attempts``; -1 for none.
        starts, ready, ends: when the batch of an image was started, the pipeline had returned,
            and the image was in the journal; seconds since 1970, -1 where it is not known.
        seconds: pipeline seconds of each image.
        notices: what is wrong with the folder, for people.
    """

    def __init__(self, files: Files, path: str):
        """Read the folder; takes no lock and changes nothing.

        Raises:
            UsageError: no job there.
            StorageError: ``job.json`` or ``requests.jsonl.gz`` is damaged.
        """
        self.folder = JobFolder.look(files, path)
        self.is_running = is_held(files, path)
        self.status: Mapping[str, Any] = {}
        self.notices: list[str] = []
        capacity = self.folder.record.images.stop
        self.state = JournalState(capacity)
        self.run_of = array("l", [-1]) * capacity
        self.starts, self.ready, self.ends, self.seconds = (
            array("d", [_NO_TIME]) * capacity for _ in range(4)
        )
        self._batch_sizes: dict[int, int] = {}
        try:
            self.status = read_status(files, path) or {}
        except DamagedFile as error:
            self.notices.append(f"{error}; the next run of the job writes it anew")
        for name in journal_paths(files, path):
            try:
                read_journal(files, name, self.folder.record.fingerprints, self._add)
            except JournalError as error:
                self.notices.append(f"{error}. Nothing after this line of it is shown")
        # After the journals: an image is in its place before its line is written.
        self.present = list_images(files, path, capacity)
        missing = sum(self.status_of(r.index) == MISSING for r in self.folder.requests)
        if missing:
            self.notices.append(
                f"{missing} images are in the journal but their files are missing; the job's own "
                "command makes them again"
            )

    def _add(self, record: dict[str, Any]) -> None:
        """Take in one line of a journal."""
        self.state.add(record)
        kind, now = record["kind"], record.get("time", _NO_TIME)
        if kind == "start":
            for index in record["indices"]:
                self._batch_sizes[index] = len(record["indices"])
                self.starts[index] = now
        elif kind in ("image", "failed"):
            index = record["index"]
            self.run_of[index] = len(self.state.attempts) - 1
            self.ends[index] = self.ready[index] = now
            self.seconds[index] = record.get("seconds", _NO_TIME)
            if self.seconds[index] >= 0 and self.starts[index] >= 0:
                in_pipeline = self.seconds[index] * self._batch_sizes[index]
                self.ready[index] = min(now, self.starts[index] + in_pipeline)

    def status_of(self, index: int) -> int:
        if self.state.is_done(index):
            return MADE if self.present[index] else MISSING
        return FAILED if self.state.is_failed(index) else PENDING

    def short_hash(self, index: int) -> str:
        return self.state.sha256(index)[:HASH_DIGITS]

    def made(self) -> list[int]:
        """Indices of the images that are there."""
        return [r.index for r in self.folder.requests if self.status_of(r.index) == MADE]


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
    runs = view.state.attempts
    begin = min((run.began for run in runs if run.began is not None), default=0.0)
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
                "rank": run.header.rank,
                "attempt": run.header.attempt,
                "begin": _since(run.began, begin),
                "end": _since(run.last, begin),
                "reason": run.end,
            }
            for run in runs
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
        "ending": [view.state.ending(k) for k in indices],
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


def _since(moment: float | None, begin: float) -> float | None:
    return None if moment is None or moment < 0 else round(moment - begin, 2)
