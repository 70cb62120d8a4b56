"""`run_job`: the whole story of a job on one rank. Engine, storage and ranks meet here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from ddinfer.config import JobConfig
from ddinfer.distributed.process_group import Group, process_group
from ddinfer.distributed.progress import Progress, RankTimes
from ddinfer.distributed.replica import Replica
from ddinfer.distributed.world import World
from ddinfer.engines.base import Batch, Engine
from ddinfer.engines.select import load_engine
from ddinfer.errors import RankError, UsageError
from ddinfer.job.leader import Leader, Record, RunReport, Share
from ddinfer.job.prepare import resolve_config
from ddinfer.job.shutdown import Stop
from ddinfer.job.watchdog import Heartbeat
from ddinfer.request import Result
from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import read_job, start_writer
from ddinfer.storage.lease import Lease
from ddinfer.storage.saving import save_as_made


def run_job(
    config: JobConfig,
    world: World | None = None,
    *,
    stdin: bytes | None = None,
    retry_failed: bool = False,
    stop: Stop | None = None,
) -> RunReport:
    """Make the images of a job; every rank of the world calls this.

    Args:
        world: default: detected from the live process group or the environment.
        stdin: what ``prompts="-"`` reads on rank 0; default: its standard input.
        retry_failed: make the failed prompts of the job in ``config.output`` again. Its Requests
            are read from there, not from ``config.prompts``.
        stop: asked between batches whether to go on; default: nobody stops the job.

    Returns:
        the same report on every rank, once every image is on disk or listed as failed.

    Raises:
        UsageError: the options, the prompt file, the model or the output folder cannot be right.
        StorageError: the disk failed; the same command goes on from there.
        RankError: another rank failed; the same on every rank.
        Stopped: ``stop`` was asked for; what was made is safe.
    """
    stop = Stop() if stop is None else stop
    config = resolve_config(config)
    if world is None:
        world = World.detect(config.device, gpus_per_rank=config.gpus_per_rank)
        if not world.is_launched and config.nproc_per_node not in (None, 1, "1"):
            raise UsageError(
                f"nproc_per_node={config.nproc_per_node}: run_job is one rank and starts no "
                "others; start this program with torchrun, or call run_job in what "
                "ddinfer.launch starts"
            )
    replica = Replica.of(world.rank, world.world_size, config.pipeline_parallel)
    with process_group(world) as group:
        group.enter("preparing")
        leader = Leader(config, world, stdin, retry_failed) if group.group_rank == 0 else None
        try:
            with Heartbeat(group, config.stuck_timeout).beating() as heartbeat:
                return _run(config, group, replica, leader, stop, heartbeat)
        except BaseException as error:
            if leader is not None:
                leader.stopped(error)
            raise


def _run(
    config: JobConfig,
    group: Group,
    replica: Replica,
    leader: Leader | None,
    stop: Stop,
    heartbeat: Heartbeat,
) -> RunReport:
    shares = None if leader is None else leader.shares(replica.num_replicas)
    share: Share = group.scatter_object(
        None if shares is None else [share for share in shares for _ in replica.ranks]
    )
    _check_folder_is_shared(config.output, share, group)
    if leader is not None:
        leader.working()

    group.enter("loading")
    started = time.monotonic()
    torch.set_num_threads(share.num_threads)
    engine = None
    stages = replica.process_group() if len(replica.ranks) > 1 else None
    if share.batches or share.alone:  # else there is nothing to do that would need a model
        engine = load_engine(share.model, config, group.world, replica, stages)
        engine.tell_steps(heartbeat)
    loaded = time.monotonic()

    with (
        _ending_together(replica, stop),
        Lease.join(Files(), config.output),
    ):  # the folder is ours while any rank lives
        if replica.makes_results:
            results = _make(engine, share, config, group, leader, stop)
        else:
            results = _serve(engine, share, group, stop)
    times = RankTimes(
        group.world.rank,
        len(results),
        loading=loaded - started,
        working=time.monotonic() - loaded,
        pipeline=sum(result.seconds for result in results),
        stage=replica.stage,
    )

    group.enter("gathering")
    all_times = group.all_gather_object(times)
    records = group.gather_object([Record.of(result) for result in results])
    report = None
    if leader is not None:
        report = leader.finish(records, all_times)
    return group.broadcast_object(report)


@contextlib.contextmanager
def _ending_together(replica: Replica, stop: Stop) -> Iterator[None]:
    """Stages that were all told to end may lose one another on the way: nobody has failed."""
    try:
        yield
    except RankError as error:
        if error.rank in replica.ranks:
            stop.raise_if_requested()
        raise


def _make(
    engine: Engine | None,
    share: Share,
    config: JobConfig,
    group: Group,
    leader: Leader | None,
    stop: Stop,
) -> list[Result]:
    """This rank's new Results, each on disk and in the journal when this returns."""
    made: list[Result] = []
    writer = start_writer(
        Files(),
        config.output,
        replace(share.header, rank=group.world.rank),
        share.info,
        fps=config.fps,
        wanted=share.wanted.__contains__,
    )
    with Progress(group, share.num_images, share.num_finished) as progress, writer:
        for turn in _turns(share, group):
            batches = _one_by_one(turn, group, leader, stop)
            results = save_as_made(lambda given: _marked(engine, given, share), batches, writer)
            for result in results:
                if result.index in share.wanted:
                    made.append(result)
                    progress.made(1, failed=int(result.error is not None))
        group.enter("saving")
        stop.raise_if_requested()
    return made


def _serve(engine: Engine | None, share: Share, group: Group, stop: Stop) -> list[Result]:
    """Run this rank's stage for the rank that makes the Results; here there are none."""
    group.enter("running", "the stage of a denoiser")
    results: list[Result] = []
    for _ in _turns(share, group):
        results += engine.run(()) if engine is not None else ()
    stop.raise_if_requested()
    return results


def _marked(engine: Engine | None, batches: Iterable[Batch], share: Share) -> Iterator[Result]:
    """What the engine makes; where a batch is not the planned one, its images say so."""
    for result in engine.run(batches) if engine is not None else ():
        yield replace(result, exact=False) if result.index in share.suspects else result


def _turns(share: Share, group: Group) -> Iterator[Iterator[Batch]]:
    """The batches of each of the engine's runs, as many on every rank of a replica."""
    yield _claimed(share.batches, group) if share.is_claimed else iter(share.batches)
    for batch in share.alone:
        yield iter([batch])


def _one_by_one(
    batches: Iterator[Batch], group: Group, leader: Leader | None, stop: Stop
) -> Iterator[Batch]:
    """The batches, each after a look whether to go on: a peer may have failed, a signal come."""
    while not stop.is_requested:
        group.check_peers()
        if leader is not None:
            leader.check_lease()
        batch = next(batches, None)
        if batch is None:
            return
        group.enter("running", f"prompt {batch[0].index} (id {batch[0].id})")
        yield batch


def _claimed(batches: Sequence[Batch], group: Group) -> Iterator[Batch]:
    """Batches that no other rank takes, each claimed as late as it can be."""
    while (number := group.add("claimed")) <= len(batches):
        yield batches[number - 1]


def _check_folder_is_shared(output: str, share: Share, group: Group) -> None:
    """Every machine must see the folder that rank 0 has opened."""
    job = read_job(Files(), output)
    if job is None or job.fingerprint != share.header.fingerprint:
        raise UsageError(
            f"rank {group.world.rank} does not see the job that rank 0 opened in {output}: all "
            "machines of a job need the same --output on a file system that they share"
        )
