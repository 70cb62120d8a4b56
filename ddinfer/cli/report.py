"""``ddinfer report OUT``: a page of the job's images, failures and times."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from tqdm import tqdm

from ddinfer.cli.command import parse
from ddinfer.errors import EXIT_OK
from ddinfer.report.page import write_report
from ddinfer.storage.files import Files
from ddinfer.storage.report_files import REPORT_FILE


@dataclass(frozen=True)
class ReportOptions:
    """Write OUT/report.html: gallery, search, failures and times of a job, in one file."""

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Output folder of a job."""
    thumbnails: bool = True
    """Make small pictures of the images, once, in OUT/thumbnails."""


def main(argv: Sequence[str]) -> int:
    options = parse(ReportOptions, "report", argv)
    path = os.path.abspath(options.output)
    with tqdm(desc="thumbnails", unit=" images", disable=None, leave=False, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        data = write_report(Files(), path, thumbnails=options.thumbnails, progress=progress)
    for notice in data["notices"]:
        print(f"ddinfer: {notice}", file=sys.stderr)
    print(os.path.join(path, REPORT_FILE))
    return EXIT_OK
