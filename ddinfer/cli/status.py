"""``ddinfer status OUT``: progress of a job, while it runs and afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from ddinfer.cli.command import parse, print_report
from ddinfer.errors import EXIT_OK
from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import JobFolder
from ddinfer.storage.journal import Attempt, JournalError, JournalState
from ddinfer.storage.lease import is_held, read_holder
from ddinfer.storage.metadata import job_state, read_status

#: A line that is being written while it is read looks torn; reading again shows whether it is.
LOOKS = 3


@dataclass(frozen=True)
class StatusOptions:
    """Print the progress of a job, the process that runs it, and how it ended."""

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Output directory of a job."""
    json: bool = False
    """Print it as JSON."""


def main(argv: Sequence[str]) -> int:
    options = parse(StatusOptions, "status", argv)
    status = status_of(Files(), os.path.abspath(options.output))
    print_report(status, lines_of(status), as_json=options.json)
    return EXIT_OK


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


def lines_of(status: Mapping[str, Any]) -> list[str]:
    """The status as text."""
    lines = [f"{status['output']}: {status['state']}"]
    if status["shard"]:
        lines[0] += f", part {status['shard']} of a job"
    if status["holder"]:
        lines[0] += f" ({status['holder']})"
    counts = f"{status['num_made']} of {status['num_images']} images generated"
    if status["num_failed"]:
        counts += f", {status['num_failed']} failed"
    if status["num_pending"]:
        counts += f", {status['num_pending']} to do"
    if status["images_per_second"]:
        counts += f", about {status['images_per_second']:.3g} images/s"
    lines.append(f"  {counts}")
    for rank in status["ranks"]:
        if rank["in_flight"]:
            verb = "is generating" if rank["state"] == "running" else f"{rank['state']} generating"
            batches = ", ".join(f"image {b[0]}" for b in rank["in_flight"])
            lines.append(f"  rank {rank['rank']} {verb} {batches}")
    if status["num_deaths"]:
        lines.append(
            f"  {status['num_deaths']} times a process was killed while it generated a batch"
        )
    if status["num_failed"]:
        lines.append(
            f"  ddinfer retry-failed {status['output']} generates the failed prompts again"
        )
    if status["error"]:
        lines.append(f"  error: {status['error'].splitlines()[0]}")
    if status["state"] == "interrupted":
        lines.append(
            "  no process holds the directory: the job was killed, or its machine went down"
        )
    if status["state"] in ("stopped", "interrupted"):
        lines.append("  run the same command again to resume")
    return lines
