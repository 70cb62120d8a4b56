"""``ddinfer merge OUT… --output DIR``: join the shards of a job in one directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddinfer.cli.command import parse, print_report
from ddinfer.cli.verify import exit_code, lines_of
from ddinfer.errors import EXIT_OK
from ddinfer.storage.files import Files
from ddinfer.storage.merge import merge
from ddinfer.storage.verify import verify


@dataclass(frozen=True)
class MergeOptions:
    """Join the shards of a job (--shard K/N) in a new directory, and verify it.

    Images are copied; the shards are not modified. If interrupted, the same command resumes.
    """

    parts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUT [OUT ...]")]
    """Output directories of the shards."""
    output: Annotated[str, tyro.conf.arg(metavar="DIR", aliases=("-o",))]
    """Directory for the whole job."""
    json: bool = False
    """Print the report as JSON on standard output."""


def main(argv: Sequence[str]) -> int:
    options = parse(MergeOptions, "merge", argv)
    files, target = Files(), os.path.abspath(options.output)
    parts = [os.path.abspath(part) for part in options.parts]
    report = merge(files, parts, target, notify=_print)
    found = verify(files, target)
    data = {**report.__dict__, "verify": found.to_dict()}
    print_report(data, lines_of(found, target), as_json=options.json)
    verified = exit_code(found)
    return report.exit_code if verified == EXIT_OK else verified


def _print(text: str) -> None:
    print(f"ddinfer: {text}", file=sys.stderr)
