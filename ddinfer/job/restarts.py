"""Restarts within a job: start the ranks again for what a dead rank left."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ddinfer.config import JobConfig
from ddinfer.distributed.launch import launch
from ddinfer.errors import ENDS_THE_JOB, RankError, StorageError
from ddinfer.job.watchdog import explain, is_stalled
from ddinfer.storage.crashes import record_deaths
from ddinfer.storage.files import Files

#: Seconds beyond the grace for ranks to write what they have, before they are killed.
FLUSH_SECONDS = 10.0


def launch_with_restarts(
    fn: Callable[..., Any],
    *args: Any,
    config: JobConfig,
    num_ranks: int,
    preload: Sequence[str],
    before_fork: Callable[[], object],
    notify: Callable[[str], object],
) -> list[Any]:
    """`launch` ``fn``, again after a rank died; the other ranks finish their own work first.

    Args:
        config: ``max_restarts`` limits how often, ``grace_seconds`` how long after a signal.
        notify: called with a message for every restart.

    Raises:
        what `launch` raises, when no restart is left or a restart would not help.
    """
    run_id = uuid.uuid4().hex
    restarts = 0
    while True:
        deaths: dict[int, int] = {}
        try:
            return launch(
                fn,
                *args,
                nproc_per_node=num_ranks,
                device=config.device,
                gpus_per_rank=config.gpus_per_rank,
                num_threads=config.num_threads,
                start_method=config.start_method,
                preload=preload,
                before_fork=before_fork,
                on_failure="finish",
                grace_seconds=config.grace_seconds + FLUSH_SECONDS,
                handle_signals=True,
                on_death=deaths.__setitem__,
                run_id=run_id,
                restart_count=restarts,
            )
        except RankError as rank_error:
            error = explain(rank_error, config.stuck_timeout)
            _journal_crashes(config, attempt_id(run_id, restarts), deaths)
            is_requested = error.exit_code in ENDS_THE_JOB and not is_stalled(error)
            if restarts == config.max_restarts or is_requested:
                raise error from None
            restarts += 1
            first = str(error).splitlines()[0]
            notify(f"{first}; restart {restarts} of {config.max_restarts}")


def attempt_id(run_id: str, restart_count: int) -> str:
    """Identifies an attempt of a launch in the headers of its journals."""
    return f"{run_id}/{restart_count}"


def _journal_crashes(config: JobConfig, attempt: str, deaths: dict[int, int]) -> None:
    if deaths and os.path.isdir(config.output):
        try:
            record_deaths(Files(), config.output, attempt, deaths, config.ranks_per_replica)
        except StorageError as error:  # report the death, not only the failed write
            raise StorageError(f"after a rank died: {error}") from error
