"""What rank 0 alone does for a job: open it, hand out the shares, close the books."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from ddinfer._version import __version__
from ddinfer.config import JobConfig
from ddinfer.distributed.collectives import place_by_index
from ddinfer.distributed.devices import resolve_num_threads
from ddinfer.distributed.partition import slice_of_batches
from ddinfer.distributed.progress import RankTimes, evenness
from ddinfer.distributed.world import World
from ddinfer.engines.base import Batch
from ddinfer.engines.whole import gpu_numbers
from ddinfer.errors import EXIT_FAILED_PROMPTS, EXIT_OK, DdinferError, StorageError, exit_code_of
from ddinfer.job.prepare import job_identity, library_versions, prepare
from ddinfer.job.restarts import attempt_id
from ddinfer.models.fingerprint import model_fingerprint
from ddinfer.models.repository import pipeline_folder, scheduler_name
from ddinfer.request import Result
from ddinfer.storage.crashes import hopeless_prompts, record_deaths, split_suspects
from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import JobDescription, JobFolder, read_job
from ddinfer.storage.job_record import Shard
from ddinfer.storage.journal import JournalHeader
from ddinfer.storage.metadata import write_status
from ddinfer.storage.verify import check_room, estimate_disk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """What rank 0 sends the ranks of each replica: all they need to do their part.

    Attributes:
        batches: its contiguous slice of the pending ones; all of them where ranks claim batches.
        is_claimed: ranks take the next one from a common counter.
        alone: batches to be made after those, each with no other in flight: of prompts that may
            kill their process. Where a replica has one in flight at a time they are in `batches`.
        suspects: indices that are made alone, although their batch was planned larger.
        wanted: indices in them that are not there yet. A batch runs whole, but rewrites nothing.
        info: what every image's metadata says of the job.
        header: of this attempt's journals.
        model: folder or hub id.
        num_images, num_finished: of the whole job, made or failed before this run.
    """

    batches: Sequence[Batch]
    is_claimed: bool
    alone: Sequence[Batch]
    suspects: frozenset[int]
    wanted: frozenset[int]
    info: Mapping[str, Any]
    header: JournalHeader
    model: str
    num_threads: int
    num_images: int
    num_finished: int


@dataclass(frozen=True)
class Record:
    """What ranks tell one another of an image: pictures stay where they were made."""

    index: int
    failed: bool
    exact: bool
    flags: tuple[str, ...]

    @classmethod
    def of(cls, result: Result) -> Record:
        return cls(result.index, result.error is not None, result.exact, result.flags)


@dataclass(frozen=True)
class RunReport:
    """What a run came to; the same on every rank.

    Attributes:
        num_images: of the whole job, or of the part that ``--shard`` asked for.
        num_made: there now, those of earlier runs included.
        num_failed: listed in failures.jsonl.
        num_new: made by this run.
        num_inexact: of these, made in another batch than planned (out of memory, a neighbour
            that failed).
        flags: how many of the new images are "nan", "black" or "nsfw".
        seconds: wall time of the run, loading included.
        ranks: how each rank spent its time.
    """

    output: str
    num_images: int
    num_made: int
    num_failed: int
    num_new: int
    num_inexact: int
    flags: Mapping[str, int]
    seconds: float
    ranks: Sequence[RankTimes]

    @property
    def exit_code(self) -> int:
        return EXIT_FAILED_PROMPTS if self.num_failed else EXIT_OK

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "evenness": evenness(self.ranks), "exit_code": self.exit_code}


class Leader:
    """The open job. Made on rank 0, before anything is loaded."""

    def __init__(
        self,
        config: JobConfig,
        world: World,
        stdin: bytes | None = None,
        retry_failed: bool = False,
    ):
        """Read and check everything, then open the folder.

        Raises:
            UsageError: the options, the prompts, the model or the folder cannot be right.
            StorageError: the folder cannot be written.
        """
        self.config, self.world, self.files = config, world, Files()
        self.started = time.monotonic()
        requests = None
        if retry_failed:
            requests = JobFolder.look(self.files, config.output).all_requests
        self.job = prepare(config, stdin=stdin, requests=requests, gpus=gpu_numbers(world))
        model_folder = pipeline_folder(
            self.job.model,
            revision=config.revision,
            token=config.token,
            variant=config.variant,
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
        )
        self.num_threads = self._num_threads()
        identity = job_identity(
            self.job,
            model_hash=model_fingerprint(model_folder),
            device_type=world.device.split(":")[0],
            num_threads=self.num_threads,
        )
        self.info = {
            **identity,
            "pipeline": self.job.pipeline,
            "scheduler": scheduler_name(model_folder),
            "version": __version__,
            "versions": library_versions(),
            "call_defaults": {
                name: self.job.parameters[name].default
                for name in ("num_inference_steps", "guidance_scale")
                if name in self.job.parameters
                and isinstance(self.job.parameters[name].default, (int, float))
            },
        }
        self.folder = JobFolder.open(
            self.files,
            config.output,
            JobDescription(
                self.job.requests, identity, library_versions(), config.to_dict(), self._shard()
            ),
            overwrite=config.overwrite and world.restart_count == 0,  # a restart goes on
            extend=config.extend,
            accept_versions=config.accept_versions,
            run_id=world.run_id if world.is_launched else "",
            notify=log.info,
        )
        try:
            self._plan(retry_failed)
        except BaseException:
            with suppress(StorageError):  # this is the error to tell
                self.folder.close()
            raise

    def _plan(self, retry_failed: bool) -> None:
        """Find out what is to be made, by the journals, and whether there is room for it."""
        config, world = self.config, self.world
        if world.restart_count and world.max_restarts:  # torchrun tells nobody who died of what
            before = attempt_id(world.run_id, world.restart_count - 1)
            record_deaths(self.files, config.output, before)
        state = self.folder.read_state()
        if retry_failed and world.restart_count == 0:  # a restart goes on
            self.folder.retry_failed(state)
        hopeless = hopeless_prompts(self.folder.requests, state)
        if hopeless:
            self.folder.decide(hopeless, state)
        images = self.folder.record.images
        batches = self.job.batches(self.folder.record.segments)
        batches = [batch for batch in batches if batch.start in images]
        planned = self.folder.pending_batches(batches, state)
        self.pending, self.alone = split_suspects(planned, state)
        together = {k for batch in planned if len(batch) > 1 for k in batch}
        self.suspects = frozenset(together.intersection(batch[0] for batch in self.alone))
        if config.pipeline_parallel == 1 and config.placement != "staged":
            # Batches are made one at a time, so that a batch of one is alone anyway.
            self.pending, self.alone = sorted([*self.pending, *self.alone], key=min), []
        self.wanted = self.folder.pending(state)
        room = estimate_disk(
            self.files, config.output, [self.job.requests[k] for k in self.wanted], state=state
        )
        check_room(room, config.output)
        for note in self.job.notes:
            log.info(note)
        if self.folder.is_resumed:
            log.info(
                "going on with the job in %s: %d of %d images are there",
                config.output,
                state.num_done,
                len(self.folder.requests),
            )
        if self.folder.record.shard is not None:
            log.info(
                "part %s of the job: %d of its %d images. Where the other parts are made by "
                "machines with other cores, give --num_threads %d there, too",
                self.folder.record.shard,
                len(images),
                len(self.job.requests),
                self.num_threads,
            )

    def _shard(self) -> Shard | None:
        if self.config.shard_of is None:
            return None
        part, num_parts = self.config.shard_of
        images = self.job.images()
        return Shard(part + 1, num_parts, images.start, images.stop)

    def _num_threads(self) -> int:
        """As given, else as the job in the folder was begun, else by the machine's cores."""
        config = self.config
        before = None if config.overwrite else read_job(self.files, config.output)
        if config.num_threads is None and before is not None:
            return int(before.identity["num_threads"])
        return resolve_num_threads(config.num_threads, self.world.local_world_size)

    def shares(self, num_replicas: int) -> list[Share]:
        """Each replica's part, in rank order."""
        alone = [slice_of_batches(self.alone, num_replicas, k) for k in range(num_replicas)]
        if self.config.schedule == "dynamic":
            # What takes longest goes first, so that no rank is left with it at the end.
            batches = sorted(self.pending, key=self._cost, reverse=True)
            return [self._share(batches, suspects) for suspects in alone]
        parts = [slice_of_batches(self.pending, num_replicas, k) for k in range(num_replicas)]
        return [self._share(*part) for part in zip(parts, alone, strict=True)]

    def _cost(self, batch: Sequence[int]) -> int:
        """Denoising steps of a batch, as far as the Requests say; sorting keeps equals in order."""
        return len(batch) * (self.job.requests[batch[0]].num_inference_steps or 0)

    def _share(self, batches: Sequence[Sequence[int]], alone: Sequence[Sequence[int]]) -> Share:
        wanted = set(self.wanted)
        num_images = len(self.folder.requests)
        run_id = attempt_id(self.world.run_id, self.world.restart_count)
        return Share(
            [self.job.batch(batch) for batch in batches],
            self.config.schedule == "dynamic",
            [self.job.batch(batch) for batch in alone],
            self.suspects,
            frozenset(k for batch in [*batches, *alone] for k in batch if k in wanted),
            self.info,
            JournalHeader(self.folder.fingerprint, attempt=self.folder.attempt, run_id=run_id),
            self.job.model,
            self.num_threads,
            num_images,
            num_images - len(self.wanted),
        )

    def finish(
        self, records_by_rank: Sequence[Sequence[Record]], times: Sequence[RankTimes]
    ) -> RunReport:
        """Reconcile the journals with the Requests, write the metadata, close the folder.

        Args:
            records_by_rank: what each rank says that it made.
            times: how each spent its time.

        Raises:
            DdinferError: the journals do not account for every Request.
        """
        place = {index: k for k, index in enumerate(self.wanted)}
        records = place_by_index(records_by_rank, len(place), lambda record: place[record.index])
        done = self.folder.finish()
        if not done.is_complete:
            raise DdinferError(
                f"{len(done.pending)} of {len(self.folder.requests)} images are neither made nor "
                f"failed by the journals in {self.config.output}, the first is {done.pending[0]}"
            )
        report = RunReport(
            self.config.output,
            len(self.folder.requests),
            done.num_done,
            done.num_failed,
            num_new=sum(not record.failed for record in records),
            num_inexact=sum(not record.exact and not record.failed for record in records),
            flags=dict(Counter(flag for record in records for flag in record.flags)),
            seconds=time.monotonic() - self.started,
            ranks=times,
        )
        self._write_status("finished", report.to_dict())
        self.folder.close()
        return report

    def check_lease(self) -> None:
        """Raise if the folder is no longer ours: another process took it over."""
        if self.folder.lease is not None:
            self.folder.lease.check()

    def working(self) -> None:
        """Say in status.json that the ranks are at work."""
        self._write_status("running", {"num_images": len(self.folder.requests)})

    def stopped(self, error: BaseException) -> None:
        """Say why the job ended early, for whoever cannot see our exit code; close the folder."""
        with suppress(StorageError):  # on a full disk there is no room to say so
            self._write_status("stopped", {"exit_code": exit_code_of(error), "error": str(error)})
        with suppress(StorageError):
            self.folder.close()

    def _write_status(self, state: str, more: Mapping[str, Any]) -> None:
        status = {"state": state, "world_size": self.world.world_size, **more}
        write_status(self.files, self.config.output, status)
