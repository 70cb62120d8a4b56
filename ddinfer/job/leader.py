"""What only rank 0 does for a job: open the directory, assign batches, finish."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from ddinfer._version import __version__
from ddinfer.config import JobConfig
from ddinfer.distributed.devices import resolve_num_threads
from ddinfer.distributed.partition import slice_of_batches
from ddinfer.distributed.world import World
from ddinfer.engines.options import gpu_numbers, open_source
from ddinfer.errors import EXIT_FAILED_PROMPTS, EXIT_OK, DdinferError, StorageError, exit_code_of
from ddinfer.job.assignment import Assignment, IndexBatches, RankTimes, load_balance
from ddinfer.job.fingerprint import lora_hashes, model_fingerprint
from ddinfer.job.prepare import job_identity, library_versions, prepare
from ddinfer.job.restarts import attempt_id
from ddinfer.models.host_memory import check_host_memory
from ddinfer.models.index import scheduler_name
from ddinfer.storage.crashes import prompts_to_give_up, quarantine, record_deaths
from ddinfer.storage.disk_space import check_room, estimate_disk
from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import JobDescription, JobFolder, read_job
from ddinfer.storage.job_record import Shard
from ddinfer.storage.journal import JournalHeader
from ddinfer.storage.media import Formats
from ddinfer.storage.metadata import write_status

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunReport:
    """The result of a run; the same on every rank.

    Attributes:
        num_images: of the whole job, or of the part that ``--shard`` asked for.
        num_made: those of earlier runs included.
        num_failed: listed in failures.jsonl.
        num_new: made by this run.
        num_inexact: of these, made in another batch than planned (out of memory, a failed or
            crashing neighbour).
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
        return {
            **asdict(self),
            "load_balance": load_balance(self.ranks),
            "exit_code": self.exit_code,
        }


class Leader:
    """The open job. `run_job` makes it on rank 0, before anything is loaded."""

    def __init__(
        self,
        config: JobConfig,
        world: World,
        stdin: bytes | None = None,
        retry_failed: bool = False,
    ):
        """Read and check everything, then open the output directory.

        Raises:
            UsageError: an invalid option, prompt, model or output directory.
            StorageError: the directory cannot be written.
        """
        self.config, self.world, self.files = config, world, Files()
        self.started = time.monotonic()
        requests = None
        if retry_failed:
            requests = JobFolder.look(self.files, config.output).all_requests
        self.job = prepare(config, stdin=stdin, requests=requests, gpus=gpu_numbers(world))
        source = open_source(self.job.model, config)
        if config.placement is None and config.pipeline_parallel == 1:
            check_host_memory(source, config.dtypes, world.device, world.local_world_size)
        model_folder = source.folder
        self.num_threads = self._num_threads()
        identity = job_identity(
            self.job,
            model_hash=model_fingerprint(
                model_folder, variant=config.variant, allow_pickle=config.allow_pickle
            ),
            loras=lora_hashes(source.loras),
            device_type=world.device.split(":")[0],
            num_threads=self.num_threads,
        )
        self.info = {
            **identity,
            "scheduler": scheduler_name(model_folder),
            "version": __version__,
            "versions": library_versions(),
            "call_defaults": self.job.call_defaults("num_inference_steps", "guidance_scale"),
        }
        self.folder = JobFolder.open(
            self.files,
            config.output,
            JobDescription(
                self.job.requests, identity, library_versions(), config.to_dict(), self._shard()
            ),
            overwrite=config.overwrite and world.restart_count == 0,  # a restart resumes
            extend=config.extend,
            accept_versions=config.accept_versions,
            run_id=world.run_id if world.is_launched else "",
            notify=log.info,
        )
        try:
            self._plan(retry_failed)
        except BaseException:
            with suppress(StorageError):  # the first error is the one to report
                self.folder.close()
            raise

    def _plan(self, retry_failed: bool) -> None:
        """Decide by the journals which batches are to run, and check the room for their images."""
        config, world = self.config, self.world
        if world.restart_count and world.max_restarts:  # torchrun does not report how ranks died
            before = attempt_id(world.run_id, world.restart_count - 1)
            record_deaths(self.files, config.output, before)
        state = self.folder.read_state()
        if retry_failed and world.restart_count == 0:  # a restart resumes
            self.folder.retry_failed(state)
        given_up = prompts_to_give_up(self.folder.requests, state)
        if given_up:
            self.folder.journal_decisions(given_up, state)
        images = self.folder.record.images
        batches = self.job.batches(self.folder.record.segments)
        batches = [batch for batch in batches if batch.start in images]
        planned = self.folder.pending_batches(batches, state)
        self.pending, self.solo = quarantine(planned, state)
        shared = {k for batch in planned if len(batch) > 1 for k in batch}
        self.inexact = frozenset(batch[0] for batch in self.solo if batch[0] in shared)
        self.wanted = self.folder.pending(state)
        self.num_done_before = state.num_done
        room = estimate_disk(
            self.files,
            config.output,
            [self.job.requests[k] for k in self.wanted],
            call_defaults=self.job.call_defaults("width", "height", "num_frames"),
            formats=Formats.of(self.info),
            state=state,
        )
        check_room(room, config.output)
        for note in self.job.notes:
            log.info(note)
        if self.folder.is_resumed:
            log.info(
                "resuming the job in %s: %d of %d images are made",
                config.output,
                state.num_done,
                len(self.folder.requests),
            )
        if self.folder.record.shard is not None:
            log.info(
                "part %s of the job: %d of its %d images. Give --num_threads %d to the other "
                "parts as well if their machines have another number of cores",
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
        """As given, else as in the job in the directory, else by the machine's cores."""
        config = self.config
        before = None if config.overwrite else read_job(self.files, config.output)
        if config.num_threads is None and before is not None:
            return int(before.identity["num_threads"])
        return resolve_num_threads(config.num_threads, self.world.local_world_size)

    def assignments(self, num_replicas: int) -> list[Assignment]:
        """One for each replica, in rank order."""
        is_queue = self.config.schedule == "dynamic"
        if is_queue:
            # The longest first, so that no rank is left with one of them at the end.
            queue = IndexBatches(sorted(self.pending, key=self._cost, reverse=True))
        images = set(chain.from_iterable((*self.pending, *self.solo)))
        skip = frozenset(images.difference(self.wanted))
        run_id = attempt_id(self.world.run_id, self.world.restart_count)
        num_images = len(self.folder.requests)
        return [
            Assignment(
                queue
                if is_queue
                else IndexBatches(slice_of_batches(self.pending, num_replicas, k)),
                is_queue,
                IndexBatches(slice_of_batches(self.solo, num_replicas, k)),
                self.inexact,
                skip,
                self.info,
                JournalHeader(self.folder.fingerprint, attempt=self.folder.attempt, run_id=run_id),
                self.job.model,
                self.num_threads,
                num_images,
                num_images - len(self.wanted),
            )
            for k in range(num_replicas)
        ]

    def _cost(self, batch: Sequence[int]) -> int:
        """Denoising steps of a batch, where its Requests set them; equals stay in order."""
        return len(batch) * (self.job.requests[batch[0]].num_inference_steps or 0)

    def finish(self, times: Sequence[RankTimes]) -> RunReport:
        """Compare the journals with the Requests, write the metadata, close the directory.

        Args:
            times: how each rank spent its time.

        Raises:
            StorageError: another job has taken the directory.
            DdinferError: the journals do not account for every Request.
        """
        self.folder.confirm_lease()
        num_results = sum(each.images for each in times)
        if num_results != len(self.wanted):
            raise DdinferError(
                f"the ranks report {num_results} results, {len(self.wanted)} were assigned to them"
            )
        done = self.folder.finish()
        if not done.is_complete:
            raise DdinferError(
                f"{len(done.pending)} of {len(self.folder.requests)} images are neither made nor "
                f"failed by the journals in {self.config.output}, the first is {done.pending[0]}"
            )
        notes = [done.notes[index] for index in self.wanted if index in done.notes]
        report = RunReport(
            self.config.output,
            len(self.folder.requests),
            done.num_done,
            done.num_failed,
            num_new=done.num_done - self.num_done_before,
            num_inexact=sum("exact" in note for note in notes),
            flags=Counter(flag for note in notes for flag in note.get("flags", ())),
            seconds=time.monotonic() - self.started,
            ranks=times,
        )
        self._write_status("finished", report.to_dict())
        self.folder.close()
        return report

    def check_lease(self) -> None:
        """Raise if the last heartbeat failed, or found that another job took the directory."""
        if self.folder.lease is not None:
            self.folder.lease.check()

    def mark_running(self) -> None:
        """Write to status.json that the ranks are running."""
        self._write_status("running", {"num_images": len(self.folder.requests)})

    def mark_stopped(self, error: BaseException) -> None:
        """Write to status.json why the job ended early, and close the directory.

        Where another job has taken the directory, status.json is left to that one.
        """
        with suppress(StorageError):  # on a full disk there is no room for it
            self.folder.confirm_lease()
            self._write_status("stopped", {"exit_code": exit_code_of(error), "error": str(error)})
        with suppress(StorageError):
            self.folder.close()

    def _write_status(self, state: str, more: Mapping[str, Any]) -> None:
        status = {"state": state, "world_size": self.world.world_size, **more}
        write_status(self.files, self.config.output, status)
