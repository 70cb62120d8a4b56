"""``ddinfer run``: run a job from options to a directory of images."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ddinfer.cli.logging import configure_logging
from ddinfer.config import JobConfig
from ddinfer.errors import EXIT_OK

if TYPE_CHECKING:
    from ddinfer.distributed.world import World
    from ddinfer.job.leader import RunReport

#: Imported once, by the process from which all ranks are forked.
PRELOAD = ("transformers", "torch", "torch.distributed", "diffusers", "ddinfer.job.run")


def main(argv: Sequence[str]) -> int:
    from ddinfer.cli.options import parse_config  # the ranks need no parser of options

    config = parse_config(argv)
    if config.print_config:
        if _is_first_rank():
            import yaml

            data = config.to_dict()
            sys.stdout.write(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
        return EXIT_OK
    return run_configured(config)


def run_configured(config: JobConfig, *, retry_failed: bool = False) -> int:
    """Run a job on this process if it is a rank already, else on ranks that it starts.

    Args:
        retry_failed: retry its failed prompts; the Requests are read from the output directory.
    """
    config = config.with_absolute_paths()

    from ddinfer.distributed.launch import plan_launch
    from ddinfer.distributed.partition import Replica
    from ddinfer.distributed.process import end_with_parent

    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # torchrun's; a shell may end before its job
    plan = plan_launch(
        config.nproc_per_node, config.device, os.environ, gpus_per_rank=config.gpus_per_rank
    )
    Replica.of_job(0, plan.num_ranks, config)  # raises before ranks are started
    if plan.note and _is_first_rank():
        print(f"ddinfer: {plan.note}", file=sys.stderr)
    if config.dry_run:
        if not _is_first_rank():
            return EXIT_OK
        from ddinfer.cli.dry_run import print_plan

        return print_plan(config, plan.num_ranks)
    if plan.kind != "join":
        _check_names(config)
    # A rank that can be restarted needs a launcher.
    if plan.kind == "join" or (plan.num_ranks == 1 and not config.max_restarts):
        return _run_here(config, retry_failed)
    config, stdin = (config, None) if retry_failed else _read_own_prompts(config)
    return _run_in_ranks(config, plan.num_ranks, stdin, retry_failed)


def _check_names(config: JobConfig) -> None:
    """Check names before the seconds of importing torch.

    Raises:
        UsageError: no such prompt file or model directory.
    """
    from ddinfer.job.prepare import resolve_model
    from ddinfer.models.index import local_folder
    from ddinfer.prompts.files import kind_of_prompt_file

    local_folder(resolve_model(config)[0])
    if config.prompts not in (None, "-"):
        kind_of_prompt_file(config.prompts)


def _read_own_prompts(config: JobConfig) -> tuple[JobConfig, bytes | None]:
    """Read prompts that only this process can read (a pipe) for the ranks that it starts."""
    from ddinfer.prompts.files import is_open_file, read_open_file

    if config.prompts is None or not is_open_file(config.prompts):
        return config, None
    return replace(config, prompts="-"), read_open_file(config.prompts)


def _is_first_rank() -> bool:
    """Whether this process is rank 0, or no launcher has made it a rank."""
    return os.environ.get("RANK") in (None, "", "0")


def _run_here(config: JobConfig, retry_failed: bool) -> int:
    """Run the job on this process, a rank of torchrun's or the only one.

    Prompts of standard input are read by rank 0 within `run_job`, after the ranks have met: the
    others wait for it without a timeout.
    """
    from ddinfer.distributed.process import exit_now, import_once
    from ddinfer.job.shutdown import ShutdownRequest

    with ShutdownRequest(config.grace_seconds, verbose=_is_first_rank()).on_signals() as stop:
        # Before the seconds of imports, so that a signal is handled meanwhile.
        import_once(PRELOAD, partial(import_model_classes, config))
        from ddinfer.cli.summary import print_summary
        from ddinfer.distributed.world import World
        from ddinfer.job.run import run_job

        world = World.detect(config.device, gpus_per_rank=config.gpus_per_rank)
        configure_logging(world.rank)
        report = run_job(config, world, retry_failed=retry_failed, stop=stop)
    if world.rank == 0:
        print_summary(report, as_json=config.json)
    # One rank reports to torchrun; a second non-zero code would look like a second failure.
    exit_now(report.exit_code if world.rank == 0 else EXIT_OK)


def _run_in_ranks(
    config: JobConfig, num_ranks: int, stdin: bytes | None, retry_failed: bool
) -> int:
    from ddinfer.distributed.process import exit_now
    from ddinfer.job.restarts import launch_with_restarts

    reports = launch_with_restarts(
        run_on_rank,
        config,
        stdin,
        retry_failed,
        config=config,
        num_ranks=num_ranks,
        preload=PRELOAD,
        before_fork=partial(import_model_classes, config),
        notify=lambda text: print(f"ddinfer: {text}", file=sys.stderr, flush=True),
    )
    # Imported late: it imports torch, which would delay the ranks.
    from ddinfer.cli.summary import print_summary

    print_summary(reports[0], as_json=config.json)
    exit_now(reports[0].exit_code)


def import_model_classes(config: JobConfig) -> None:
    """Import the classes of the job's model, before its ranks are forked."""
    from ddinfer.job.prepare import resolve_model
    from ddinfer.models.preimport import import_classes

    import_classes(resolve_model(config)[0], config.revision)


def run_on_rank(
    world: World, config: JobConfig, stdin: bytes | None, retry_failed: bool
) -> RunReport:
    """Run the job on a rank that `launch` has started."""
    from ddinfer.job.run import run_job
    from ddinfer.job.shutdown import ShutdownRequest

    stop = ShutdownRequest(config.grace_seconds, verbose=world.rank == 0, launcher_kills=True)
    with stop.on_signals():
        configure_logging(world.rank)
        return run_job(config, world, stdin=stdin, retry_failed=retry_failed, stop=stop)
