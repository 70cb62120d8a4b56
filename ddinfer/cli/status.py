"""``ddinfer status OUT``: progress of a job, while it runs and afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from ddinfer.cli.command import parse, print_report
from ddinfer.errors import EXIT_OK
from ddinfer.storage.files import Files
from ddinfer.storage.status import status_of


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
