"""``ddinfer retry-failed OUT``: make a job's failed prompts again, from its folder alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro

from ddinfer.cli.run import run_configured
from ddinfer.config import JobConfig
from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import JobFolder


@dataclass(frozen=True)
class RetryOptions:
    """Make the failed prompts of a job again. Its folder knows all else; no prompt file is read."""

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Output folder of a job."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", aliases=("-m",))] = None
    """Where the model is now, if not where it was."""
    nproc_per_node: Annotated[str | None, tyro.conf.arg(metavar="N|auto|gpu|cpu")] = None
    """Ranks on this machine, if not as many as the job was begun with."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = None
    """Hub token; better set HF_TOKEN."""
    trust_remote_code: bool = False
    """Run pipeline code that the model's repository brings. Not taken from the folder."""
    allow_pickle: bool = False
    """Load .bin weights, which can run code. Not taken from the folder."""
    accept_versions: bool = False
    """Go on though library versions have changed."""
    json: bool = False
    """Print the closing summary as JSON on standard output."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(
        RetryOptions, prog="ddinfer retry-failed", args=list(argv), use_underscores=True
    )
    return run_configured(config_of(options), retry_failed=True)


def config_of(options: RetryOptions) -> JobConfig:
    """The job's own configuration, with what this run says of itself.

    Raises:
        UsageError: no job there.
    """
    path = os.path.abspath(options.output)
    saved = JobFolder.look(Files(), path).record.config
    known = {f.name for f in fields(JobConfig)}
    values: dict[str, Any] = {name: value for name, value in saved.items() if name in known}
    values.update(
        output=path,
        prompt=tuple(values.get("prompt", ())),
        token=options.token,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        accept_versions=options.accept_versions,
        json=options.json,
    )
    for name in ("model", "nproc_per_node"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    return JobConfig(**values)
