"""`run_job`: a job on one rank, from its configuration to the report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from ddinfer.config import JobConfig
from ddinfer.distributed.partition import Replica
from ddinfer.distributed.process_group import Group, process_group
from ddinfer.distributed.progress import Progress
from ddinfer.distributed.world import World
from ddinfer.engines.base import Batch, Engine
from ddinfer.engines.select import load_engine
from ddinfer.errors import RankError, UsageError
from ddinfer.job.assignment import Assignment, RankTimes
from ddinfer.job.leader import Leader, RunReport
from ddinfer.job.prepare import resolve_config
from ddinfer.job.shutdown import ShutdownRequest
from ddinfer.job.watchdog import Watchdog
from ddinfer.request import Result
from ddinfer.storage.files import Files
from ddinfer.storage.job_record import read_job
from ddinfer.storage.journal import JournalWriter
from ddinfer.storage.lease import Lease
from ddinfer.storage.media import Formats
from ddinfer.storage.metadata import RequestRows, read_request_rows
from ddinfer.storage.saving import save_as_made
from ddinfer.storage.writer import Writer


def run_job(
    config: JobConfig,
    world: World | None = None,
    *,
    stdin: bytes | None = None,
    retry_failed: bool = False,
    stop: ShutdownRequest | None = None,
) -> RunReport:
    """Generate the images of a job; every rank of the world calls this.

    Args:
        world: default: detected from the live process group or the environment.
        stdin: what ``prompts="-"`` reads on rank 0; default: its standard input.
        retry_failed: retry the failed prompts of the job in ``config.output``. Its Requests are
            read from there, not from ``config.prompts``.
        stop: tested between batches; default: never requested.

    Returns:
        the same report on every rank, once every image is on disk or listed as failed.

    Raises:
        UsageError: an invalid option, prompt file, model or output directory.
        StorageError: an I/O operation failed; the same command resumes the job.
        RankError: another rank failed; the same on every rank.
        Stopped: ``stop`` was requested; what was made is durable.
    """
    stop = ShutdownRequest() if stop is None else stop
    config = resolve_config(config)
    if world is None:
        world = World.detect(config.device, gpus_per_rank=config.gpus_per_rank)
        if not world.is_launched and config.nproc_per_node not in (None, 1, "1"):
            raise UsageError(
                f"nproc_per_node={config.nproc_per_node}: run_job is one rank and starts no "
                "others; start this program with torchrun, or call run_job in what "
                "ddinfer.launch starts"
            )
    replica = Replica.of_job(world.rank, world.world_size, config)
    with process_group(world) as group:
        group.enter("preparing")
        leader = Leader(config, world, stdin, retry_failed) if group.group_rank == 0 else None
        try:
            with Watchdog(group, config.stuck_timeout).watching() as watchdog:
                return _run(config, group, replica, leader, stop, watchdog)
        except BaseException as error:
            if leader is not None:
                leader.mark_stopped(error)
            raise


def _run(
    config: JobConfig,
    group: Group,
    replica: Replica,
    leader: Leader | None,
    stop: ShutdownRequest,
    watchdog: Watchdog,
) -> RunReport:
    assignments = None if leader is None else leader.assignments(replica.num_replicas)
    assignment: Assignment = group.scatter_object(
        None if assignments is None else [each for each in assignments for _ in replica.ranks]
    )
    _check_output_is_shared(config.output, assignment, group)
    requests = None
    if replica.makes_results:
        requests = read_request_rows(Files(), config.output, assignment.mask())
    if leader is not None:
        leader.mark_running()

    group.enter("loading")
    started = time.monotonic()
    torch.set_num_threads(assignment.num_threads)
    engine = None
    stages = replica.process_group() if len(replica.ranks) > 1 else None
    if not assignment.is_empty:  # else nothing needs a model
        first = None if requests is None else requests.first()
        engine = load_engine(assignment.model, config, group.world, replica, stages, first)
        engine.set_progress_listener(watchdog)
    loaded = time.monotonic()

    with (
        contextlib.nullcontext() if engine is None else contextlib.closing(engine),
        _stopping_together(replica, stop),
        Lease.join(Files(), config.output),
    ):  # held while any rank lives
        if requests is not None:
            num_results, pipeline_seconds = _make_results(
                engine, assignment, requests, config, group, leader, stop
            )
        else:
            num_results, pipeline_seconds = 0, 0.0
            _serve_stage(engine, assignment, group, stop)
    times = RankTimes(
        group.world.rank,
        num_results,
        loading=loaded - started,
        working=time.monotonic() - loaded,
        pipeline=pipeline_seconds,
        stage=replica.stage,
    )

    group.enter("gathering")
    all_times = group.all_gather_object(times)
    return group.broadcast_object(None if leader is None else leader.finish(all_times))


@contextlib.contextmanager
def _stopping_together(replica: Replica, stop: ShutdownRequest) -> Iterator[None]:
    """Turn the loss of another stage into `Stopped` where a stop was requested from all."""
    try:
        yield
    except RankError as error:
        if error.rank in replica.ranks:
            stop.raise_if_requested()
        raise


def _make_results(
    engine: Engine | None,
    assignment: Assignment,
    requests: RequestRows,
    config: JobConfig,
    group: Group,
    leader: Leader | None,
    stop: ShutdownRequest,
) -> tuple[int, float]:
    """Run this rank's batches; each Result is on disk and journaled when this returns.

    Returns:
        how many Results, and the seconds that the pipeline's calls took.
    """
    num_results, pipeline_seconds = 0, 0.0
    header = replace(assignment.header, rank=group.world.rank)
    writer = Writer(
        Files(),
        config.output,
        JournalWriter(Files(), config.output, header),
        assignment.info,
        formats=Formats.of(assignment.info),
        wanted=lambda index: index not in assignment.skip,
    )
    with Progress(group, assignment.num_images, assignment.num_finished) as progress, writer:
        for run in _engine_runs(assignment, group):
            batches = ([requests[index] for index in indices] for indices in run)
            checked = _check_before_each(batches, group, leader, stop)
            results = save_as_made(
                lambda given: _flag_inexact(engine, given, assignment.inexact), checked, writer
            )
            for result in results:
                if result.index not in assignment.skip:
                    num_results += 1
                    pipeline_seconds += result.seconds
                    progress.made(1, failed=int(result.error is not None))
        group.enter("saving")
        stop.raise_if_requested()
    return num_results, pipeline_seconds


def _serve_stage(
    engine: Engine | None, assignment: Assignment, group: Group, stop: ShutdownRequest
) -> None:
    """Run this rank's stage for the rank of its replica that makes the Results."""
    group.enter("running", "the stage of a denoiser")
    for _ in _engine_runs(assignment, group):
        for result in engine.run(()) if engine is not None else ():
            raise AssertionError(f"a later stage made image {result.index}")
    stop.raise_if_requested()


def _flag_inexact(
    engine: Engine | None, batches: Iterable[Batch], inexact: Container[int]
) -> Iterator[Result]:
    """The engine's Results; ``exact`` is false where the batch is not the planned one."""
    for result in engine.run(batches) if engine is not None else ():
        yield replace(result, exact=False) if result.index in inexact else result


def _engine_runs(assignment: Assignment, group: Group) -> Iterator[Iterator[Sequence[int]]]:
    """The batches of each run of the engine; every rank of a replica has as many runs.

    A solo batch has a run of its own, so that nothing else is in flight.
    """
    batches = assignment.batches
    yield _pull_from_queue(batches, group) if assignment.is_queue else iter(batches)
    for batch in assignment.solo:
        yield iter([batch])


def _check_before_each(
    batches: Iterator[Batch], group: Group, leader: Leader | None, stop: ShutdownRequest
) -> Iterator[Batch]:
    """The batches; before each, raise if a peer failed, and end if a signal asked for it."""
    while not stop.is_requested:
        group.check_peers()
        if leader is not None:
            leader.check_lease()
        batch = next(batches, None)
        if batch is None:
            return
        group.enter("running", f"prompt {batch[0].index} (id {batch[0].id})")
        yield batch


def _pull_from_queue(batches: Sequence[range], group: Group) -> Iterator[range]:
    """Batches that no other rank takes, each taken as late as possible."""
    while (number := group.add("claimed")) <= len(batches):
        yield batches[number - 1]


def _check_output_is_shared(output: str, assignment: Assignment, group: Group) -> None:
    """Every machine must see the directory that rank 0 has opened."""
    job = read_job(Files(), output)
    if job is None or job.fingerprint != assignment.header.fingerprint:
        raise UsageError(
            f"rank {group.world.rank} does not see the job that rank 0 opened in {output}: all "
            "machines of a job need the same --output on a file system that they share"
        )
