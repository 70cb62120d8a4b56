"""The status of a job, while it runs and afterwards: from journals, lock and status.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import JobFolder
from ddinfer.storage.journal import Attempt, JournalError, JournalState
from ddinfer.storage.lease import is_held, read_holder
from ddinfer.storage.metadata import read_status

#: A line that is being written while it is read looks torn; reading again shows whether it is.
LOOKS = 3


def status_of(files: Files, path: str) -> dict[str, Any]:
    """Combine journals, lock and status.json. Only reads; a running job is not disturbed.

    Raises:
        UsageError: no job there.
        StorageError: a journal or ``job.json`` is corrupt.
    """
    folder = JobFolder.look(files, path)
    state = _read_journals(folder)
    written = read_status(files, path) or {}
    holder = read_holder(files, path)
    is_running = is_held(files, path)
    num_pending = len(folder.pending(state))
    last = max((a.header.attempt for a in state.attempts), default=0)
    now = [a for a in state.attempts if a.header.attempt == last]
    return {
        "output": path,
        "shard": None if folder.record.shard is None else str(folder.record.shard),
        "state": job_state(is_running, num_pending, written),
        "num_images": len(folder.requests),
        "num_made": state.num_done,
        "num_failed": state.num_failed,
        "num_pending": num_pending,
        "num_deaths": len(state.deaths),
        "holder": str(holder) if is_running and holder is not None else None,
        "images_per_second": _rate(state, now) if is_running else None,
        "ranks": [_rank(attempt, is_running) for attempt in now],
        "exit_code": None if is_running else written.get("exit_code"),
        "error": None if is_running or not num_pending else written.get("error"),
    }


def _read_journals(folder: JobFolder) -> JournalState:
    for _ in range(LOOKS - 1):
        with suppress(JournalError):
            return folder.read_journals()
    return folder.read_journals()


def _rate(state: JournalState, attempts: Sequence[Attempt]) -> float | None:
    """Images per second, from the images so far and the ranks that run now."""
    alive = sum(attempt.end is None for attempt in attempts)
    return alive * state.num_done / state.total_seconds if state.total_seconds else None


def _rank(attempt: Attempt, is_running: bool) -> dict[str, Any]:
    """The batches in flight of a rank of the last attempt, or those when it died."""
    alive = is_running and attempt.end is None
    return {
        "rank": attempt.header.rank,
        "state": "running" if alive else attempt.end or "died",
        "in_flight": [] if attempt.end is not None else attempt.in_flight,
    }


def job_state(is_running: bool, num_pending: int, status: Mapping[str, Any]) -> str:
    """``running``, ``stopped``, ``interrupted`` or ``finished``; ``status``: of `read_status`."""
    if is_running:
        return "running"
    if status.get("state") == "stopped":
        return "stopped"
    # A process that is killed leaves status.json as it was: "running".
    is_finished = not num_pending and status.get("state", "finished") == "finished"
    return "finished" if is_finished else "interrupted"
