"""``ddinfer retry-failed OUT``: generate a job's failed prompts again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro

from ddinfer.cli.command import ModelOptions, parse
from ddinfer.cli.run import run_configured
from ddinfer.config import ONE_TIME_OPTIONS, JobConfig
from ddinfer.errors import UsageError
from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import JobFolder
from ddinfer.storage.metadata import JOB_FILE


@dataclass(frozen=True, kw_only=True)
class RetryOptions(ModelOptions):
    """Generate the failed prompts of a job again. Everything else is read from its folder."""

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Output folder of a job."""
    nproc_per_node: Annotated[str | None, tyro.conf.arg(metavar="N|auto|gpu|cpu")] = None
    """Ranks on this machine. Default: as many as the job was started with."""
    accept_versions: bool = False
    """Continue although library versions have changed."""
    json: bool = False
    """Print the closing summary as JSON on standard output."""


def main(argv: Sequence[str]) -> int:
    options = parse(RetryOptions, "retry-failed", argv)
    return run_configured(config_of(options), retry_failed=True)


def config_of(options: RetryOptions) -> JobConfig:
    """The configuration that the folder records, with the options of this run.

    Raises:
        UsageError: the folder contains no job, or its configuration has a value of a wrong type.
    """
    path = os.path.abspath(options.output)
    recorded = JobFolder.look(Files(), path).record.config
    # Its Requests are read from the folder: the prompt file may be gone.
    known = {f.name for f in fields(JobConfig)}.difference(ONE_TIME_OPTIONS, ("prompts", "prompt"))
    values: dict[str, Any] = {name: value for name, value in recorded.items() if name in known}
    values.update(
        output=path,
        token=options.token,
        setup=options.setup,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        accept_versions=options.accept_versions,
        json=options.json,
    )
    for name in ("model", "nproc_per_node"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    try:
        return JobConfig(**values)
    except UsageError as error:
        raise UsageError(f"{os.path.join(path, JOB_FILE)}: {error}") from None
