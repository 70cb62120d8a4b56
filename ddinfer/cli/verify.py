"""``ddinfer verify OUT``: is every image there, with the bytes that were written?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddinfer.errors import EXIT_INTERRUPTED, EXIT_IO, EXIT_OK
from ddinfer.storage.files import Files
from ddinfer.storage.images import image_path
from ddinfer.storage.job_folder import JobFolder
from ddinfer.storage.lease import Lease
from ddinfer.storage.verify import VerifyReport, rebuild_metadata, remove_torn, verify

#: How many of a long list are named.
SHOWN = 10


@dataclass(frozen=True)
class VerifyOptions:
    """Compare every image with its hash in the journal; exit 0 only if all is there and whole."""

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Output folder of a job."""
    rebuild: bool = False
    """Write metadata.jsonl and failures.jsonl anew from the journals first."""
    repair: bool = False
    """Delete images whose bytes have changed; the job's own command then makes them again."""
    json: bool = False
    """Print the report as JSON."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(VerifyOptions, prog="ddinfer verify", args=list(argv), use_underscores=True)
    files, path = Files(), os.path.abspath(options.output)
    changes = options.rebuild or options.repair
    report = _changed(files, path, options) if changes else verify(files, path)
    print(json.dumps(report.to_dict()) if options.json else "\n".join(lines_of(report, path)))
    sys.stdout.flush()
    return exit_code(report)


def _changed(files: Files, path: str, options: VerifyOptions) -> VerifyReport:
    """Rebuild and repair, while no job writes there → what `verify` says then."""
    JobFolder.look(files, path)  # before a lock is written where no job is
    with Lease.acquire(files, path):
        if options.rebuild:
            rebuild_metadata(files, path)
        report = verify(files, path)
        if options.repair:
            remove_torn(files, path, report)
    return report


def exit_code(report: VerifyReport) -> int:
    """0 for a whole job, 75 for a whole part of one, 74 where something is wrong."""
    if report.missing or report.torn or report.extra or (report.stale and not report.pending):
        return EXIT_IO
    return EXIT_INTERRUPTED if report.pending else EXIT_OK


def lines_of(report: VerifyReport, path: str) -> list[str]:
    """What was found, and for everything that is wrong the way out."""
    lines = [
        f"{report.num_good} of {report.num_requests} images are there and whole, "
        f"{report.num_failed} prompts are listed as failed"
    ]
    again = "the same command again makes them"
    if report.pending:
        lines.append(f"not made yet: {_some(report.pending)}; {again}")
    if report.missing:
        names = [image_path(k) for k in report.missing]
        lines.append(f"missing: {_some(names)}; {again}")
    if report.torn:
        names = [f"{image_path(k)} ({why})" for k, why in report.torn.items()]
        lines.append(
            f"torn: {_some(names)}; ddinfer verify {path} --repair deletes them, then {again}"
        )
    if report.extra:
        lines.append(f"extra: {_some(report.extra)}; no journal speaks of them")
    if report.stale and not report.pending:
        lines.append(
            f"out of date: {_some(report.stale)}; ddinfer verify {path} --rebuild remakes them"
        )
    return lines


def _some(items: Sequence[object]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more
