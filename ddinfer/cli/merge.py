"""``ddinfer merge OUT… --output DIR``: the parts of a job, made apart, in one folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddinfer.cli.verify import exit_code, lines_of
from ddinfer.errors import EXIT_OK
from ddinfer.storage.files import Files
from ddinfer.storage.merge import merge
from ddinfer.storage.verify import verify


@dataclass(frozen=True)
class MergeOptions:
    """Join the parts of a job (--shard K/N) in a folder of their own, and verify it.

    The images are copied, the parts stay as they are. Interrupted, the same command goes on.
    """

    parts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUT [OUT ...]")]
    """Output folders of the parts."""
    output: Annotated[str, tyro.conf.arg(metavar="DIR", aliases=("-o",))]
    """Folder for the whole job."""
    json: bool = False
    """Print the report as JSON on standard output."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(MergeOptions, prog="ddinfer merge", args=list(argv), use_underscores=True)
    files, target = Files(), os.path.abspath(options.output)
    parts = [os.path.abspath(part) for part in options.parts]
    report = merge(files, parts, target, notify=_tell)
    found = verify(files, target)
    if options.json:
        print(json.dumps({**report.__dict__, "verify": found.to_dict()}))
    else:
        print("\n".join(lines_of(found, target)))
    sys.stdout.flush()
    verified = exit_code(found)
    return report.exit_code if verified == EXIT_OK else verified


def _tell(text: str) -> None:
    print(f"ddinfer: {text}", file=sys.stderr)
