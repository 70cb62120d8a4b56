"""``ddinfer verify OUT``: check that every image is present with the bytes that were written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddinfer.cli.command import parse, print_report
from ddinfer.errors import EXIT_INTERRUPTED, EXIT_IO, EXIT_OK, list_some
from ddinfer.storage.files import Files
from ddinfer.storage.verify import VerifyReport, repair, verify


@dataclass(frozen=True)
class VerifyOptions:
    """Compare every image with its hash in the journal; exits with 0 if all are intact."""

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Output directory of a job."""
    rebuild: bool = False
    """Rewrite metadata.jsonl and failures.jsonl from the journals first."""
    repair: bool = False
    """Delete images whose bytes have changed; the job's command then generates them again."""
    json: bool = False
    """Print the report as JSON."""


def main(argv: Sequence[str]) -> int:
    options = parse(VerifyOptions, "verify", argv)
    files, path = Files(), os.path.abspath(options.output)
    if options.rebuild or options.repair:
        report = repair(files, path, rebuild=options.rebuild, delete_torn=options.repair)
    else:
        report = verify(files, path)
    print_report(report.to_dict(), lines_of(report, path), as_json=options.json)
    return exit_code(report)


def exit_code(report: VerifyReport) -> int:
    """0 for a complete job, 75 for an incomplete one without faults, 74 for faults."""
    if report.missing or report.torn or report.extra or (report.stale and not report.pending):
        return EXIT_IO
    return EXIT_INTERRUPTED if report.pending else EXIT_OK


def lines_of(report: VerifyReport, path: str) -> list[str]:
    """What was found, and for each fault how to fix it."""
    lines = [
        f"{report.num_good} of {report.num_requests} images are present and intact, "
        f"{report.num_failed} prompts are listed as failed"
    ]
    again = "run the same command again to generate them"
    if report.pending:
        lines.append(f"not generated yet: {list_some(report.pending)}; {again}")
    if report.missing:
        names = [report.paths[k] for k in report.missing]
        lines.append(f"missing: {list_some(names)}; {again}")
    if report.torn:
        names = [f"{report.paths[k]} ({why})" for k, why in report.torn.items()]
        lines.append(
            f"torn: {list_some(names)}; ddinfer verify {path} --repair deletes them; then {again}"
        )
    if report.extra:
        lines.append(f"extra: {list_some(report.extra)}; not in any journal")
    if report.stale and not report.pending:
        lines.append(
            f"out of date: {list_some(report.stale)}; ddinfer verify {path} --rebuild rewrites them"
        )
    return lines
