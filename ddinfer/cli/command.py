"""What the commands share: reading their options and printing what they have found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Options of every command that opens a model. No folder and no image can set them."""

    token: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = None
    """Hub token; setting HF_TOKEN is safer."""
    trust_remote_code: bool = False
    """Run the pipeline code in the model's repository."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(HubOptions):
    """Options of commands that load the model of an earlier job."""

    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", aliases=("-m",))] = None
    """Where the model is now. Default: where the job found it."""
    setup: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:FUNCTION")] = None
    """The --setup of the job, which is never taken from its folder."""
    allow_pickle: bool = False
    """Load .bin weights, which can run code. Default: safetensors only."""


def parse(kind: type[T], command: str, argv: Sequence[str]) -> T:
    """The options of ``ddinfer COMMAND``; a mistake ends the process with code 2."""
    return tyro.cli(kind, prog=f"ddinfer {command}", args=list(argv), use_underscores=True)


def print_report(data: Mapping[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """Print what a command has found on standard output, as JSON or as text."""
    print(json.dumps(data) if as_json else "\n".join(lines))
