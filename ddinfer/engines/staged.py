"""The `StagedEngine`: a round of prompts is encoded, then denoised, then decoded.

Only one stage's weights are in memory at a time, and they are read once for a whole round. What a
stage hands to the next is kept in memory up to a limit, then on disk (`ddinfer.engines.records`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.engines.base import Batch, ProgressListener
from ddinfer.engines.options import apply_to_denoiser, apply_to_pipeline, gpu_numbers, open_source
from ddinfer.engines.pipeline_call import CallFailure, call_pipeline, free_memory, results_of
from ddinfer.engines.readahead import ReadAhead
from ddinfer.engines.records import Records, RecordsLost
from ddinfer.engines.stage_calls import CannotStage, Decoding, Denoising, Encoding, Part
from ddinfer.errors import StorageError, UsageError
from ddinfer.models.component_roles import DENOISER_NAMES
from ddinfer.models.devices import free_host_bytes, memory_budgets
from ddinfer.models.loading import denoisers
from ddinfer.models.stages import Stage, StagedPipeline, release
from ddinfer.request import Result

if TYPE_CHECKING:
    from ddinfer.config import JobConfig
    from ddinfer.distributed.world import World

log = logging.getLogger(__name__)

#: How often a stage that takes long says how far it is.
TELL_SECONDS = 60.0
#: Batches of a round at most: what a kill costs, and how rarely weights are read.
ROUND_BATCHES = 256
#: The same where ranks claim batches one by one: a round that is too large is taken from others.
CLAIMED_BATCHES = 16
#: Embeddings and latents that stay in host memory.
MEMORY_BYTES = 1_000_000_000
#: A round takes no further batch once so many times the memory are full; the rest is on disk.
DISK_FACTOR = 8


@dataclass(frozen=True)
class RoundLimits:
    """How large a round may become.

    Attributes:
        batches: pulled for one round at most.
        memory_bytes: of embeddings and latents that stay in memory; the rest goes to disk.
        total_bytes: of both, after which no further batch is taken.
    """

    batches: int = ROUND_BATCHES
    memory_bytes: int = MEMORY_BYTES
    total_bytes: int = DISK_FACTOR * MEMORY_BYTES

    @classmethod
    def of(cls, *, is_claimed: bool, host_bytes: int) -> RoundLimits:
        """By what the host has: at most a sixteenth of it for what is kept."""
        memory = min(MEMORY_BYTES, host_bytes // 16)
        batches = CLAIMED_BATCHES if is_claimed else ROUND_BATCHES
        return cls(batches, memory, DISK_FACTOR * memory)


class StagedEngine:
    """Runs batches in rounds of three stages. Same images as `WholeEngine`, to the last bit.

    Args:
        pipeline: loads each stage.
        rank: global rank, for the Results.
        folder: where a file lies that takes what memory does not; it has no name there.
        prepare: called with the pipeline of each stage and its name, after it was loaded.
    """

    def __init__(
        self,
        pipeline: StagedPipeline,
        *,
        rank: int = 0,
        limits: RoundLimits | None = None,
        folder: str | Path | None = None,
        prepare: Callable[[Any, Stage], None] | None = None,
    ):
        self.pipeline, self.rank = pipeline, rank
        self.limits = limits or RoundLimits()
        self.folder = None if folder is None else Path(folder)
        self.num_rounds = 0
        self.spilled_bytes = 0
        self._prepare = prepare
        self._heartbeat: ProgressListener | None = None
        self._max_batch: dict[str, int] = {}  # batch key → most images that fitted in memory
        self._again: deque[Part] = deque()
        self._ahead: ReadAhead | None = None
        self._is_more_coming = False
        pipeline.on_progress = self._moved

    def set_progress_listener(self, heartbeat: ProgressListener) -> None:
        """Let ``heartbeat`` hear what moves: tensors read, prompts encoded, steps, decoding."""
        self._heartbeat = heartbeat

    def run(self, batches: Iterable[Batch]) -> Iterator[Result]:
        waiting = (Part(list(batch), len(batch)) for batch in batches)
        try:
            while (first := self._next(waiting)) is not None:
                self.num_rounds += 1
                with Records(self.limits.memory_bytes, self.folder) as records:
                    encoded = yield from self._encode(first, waiting, records)
                    denoised = yield from self._denoise(encoded, records)
                    yield from self._decode(denoised, records)
                    self.spilled_bytes += records.spilled_bytes
        finally:
            self._stop_reading()

    def close(self) -> None:
        self._stop_reading()

    # ---------------------------------------------------------------- the stages

    def _encode(
        self, first: Part, waiting: Iterator[Part], records: Records
    ) -> Generator[Result, None, list[Part]]:
        """Yields failures; returns the parts that are encoded."""
        done: list[Part] = []
        part: Part | None = first
        log.info("round %d: encoding", self.num_rounds)
        with self._loaded("encode", records, ahead="denoise") as pipe:
            stage = Encoding(pipe, self.pipeline.components["denoise"], records)
            num_pulled = 0
            while part is not None:
                num_pulled += 1
                made = self._attempt(pipe, part, stage.run)
                if made is None:
                    done.append(part)
                else:
                    stage.encodings.clear()  # memory may have been short
                    yield from self._results_of(part, made)
                is_full = (
                    num_pulled >= self.limits.batches
                    or records.num_bytes >= self.limits.total_bytes
                )
                part = None if is_full else self._next(waiting)
            self._is_more_coming = is_full
        return done

    def _denoise(self, parts: list[Part], records: Records) -> Generator[Result, None, list[Part]]:
        """Yields failures; returns the parts of which there are latents."""
        done: list[Part] = []
        if not parts:
            return done
        with self._loaded("denoise", records, ahead="decode") as pipe:
            stage = Denoising(pipe, self.pipeline.components["denoise"], records)
            for part in self._told("denoising", parts):
                made = self._attempt(pipe, part, stage.run)
                if made is None:
                    done.append(part)
                else:
                    yield from self._results_of(part, made)
        return done

    def _decode(self, parts: list[Part], records: Records) -> Iterator[Result]:
        if not parts:
            return
        following: Stage | None = "encode" if self._is_more_coming else None
        with self._loaded("decode", records, ahead=following) as pipe:
            stage = Decoding(pipe, self.pipeline.components["denoise"], records)
            for part in self._told("decoding", parts):
                made = self._attempt(pipe, part, stage.run)
                yield from self._results_of(part, made)
                if part.latents is not None:
                    records.drop(part.latents)

    @contextlib.contextmanager
    def _loaded(self, stage: Stage, records: Records, *, ahead: Stage | None) -> Iterator[Any]:
        """The pipeline with one stage's weights, while the next one's are read ahead."""
        pipe = self.pipeline.load(stage)
        records.home = pipe._execution_device
        try:
            self._stop_reading()
            if ahead is not None:
                self._ahead = ReadAhead(self.pipeline.weight_files(ahead), self._moved)
            if self._prepare is not None:
                self._prepare(pipe, stage)
            self._listen(pipe, stage)
            yield pipe
        finally:
            release(pipe)

    def _stop_reading(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    def _told(self, doing: str, parts: list[Part]) -> Iterator[Part]:
        """The parts that fit, and a word now and then of how many there were."""
        log.info("round %d: %s, batches: %d", self.num_rounds, doing, len(parts))
        canonical_device = time.monotonic()
        for number, part in enumerate(parts):
            if not self._fits(part):
                self._split(part, self._max_batch[part.requests[0].batch_key()])
                continue
            if time.monotonic() - canonical_device >= TELL_SECONDS:
                log.info("round %d: %s, %d of %d", self.num_rounds, doing, number, len(parts))
                canonical_device = time.monotonic()
            yield part

    # ---------------------------------------------------------------- one part

    def _attempt(self, pipe: Any, part: Part, run: Callable[..., Any]) -> Any:
        """``None`` where the stage is done, else pictures or a failure."""
        started = time.perf_counter()
        try:
            return run(part, lambda: call_pipeline(pipe, part.requests, {}))
        except CannotStage as error:
            raise UsageError(str(error)) from error
        except RecordsLost as error:
            raise StorageError(str(error)) from error
        finally:
            part.seconds += time.perf_counter() - started
            self._moved()

    def _results_of(self, part: Part, made: Any) -> Iterator[Result]:
        """Results of a part; where several failed together, they are tried again in less."""
        requests = list(part.requests)
        if isinstance(made, CallFailure) and len(requests) > 1:
            if made.is_out_of_memory:
                self._max_batch[requests[0].batch_key()] = len(requests) // 2
                free_memory()
                self._split(part, len(requests) // 2)
            else:  # find the prompt at fault; its neighbours are not
                self._split(part, 1)
            return
        is_exact, seconds = len(requests) == part.num_planned, part.seconds / len(requests)
        yield from results_of(requests, made, rank=self.rank, seconds=seconds, is_exact=is_exact)

    def _split(self, part: Part, size: int) -> None:
        """In the next round, since they must be encoded as they will be denoised."""
        for k in range(0, len(part.requests), size):
            self._again.append(Part(part.requests[k : k + size], part.num_planned))

    def _fits(self, part: Part) -> bool:
        key = part.requests[0].batch_key()
        return len(part.requests) <= self._max_batch.get(key, len(part.requests))

    def _next(self, waiting: Iterator[Part]) -> Part | None:
        """The next part to encode: what has to be tried again, else the next batch."""
        while not self._again:
            part = next(waiting, None)
            if part is None or self._fits(part):
                return part
            self._split(part, self._max_batch[part.requests[0].batch_key()])
        return self._again.popleft()

    # ---------------------------------------------------------------- who listens

    def _moved(self, *_: object) -> None:
        if self._heartbeat is not None:
            self._heartbeat.steps()

    def _listen(self, pipe: Any, stage: Stage) -> None:
        if self._heartbeat is None:
            return
        if stage == "decode":
            self._heartbeat.listen_to(pipe)
            return
        for name in self.pipeline.components[stage]:
            getattr(pipe, name).register_forward_pre_hook(self._moved)


def load_staged_engine(model: str, config: JobConfig, *, world: World) -> StagedEngine:
    """Prepare to run a job's model in stages on the devices of this rank. No weight is read yet.

    Raises:
        UsageError: the pipeline cannot run in stages, a stage does not fit, or the pipeline lacks
            what an option asks for.
    """
    source = open_source(model, config)
    budgets = memory_budgets(config.max_memory, gpu_numbers(world))
    pipeline = StagedPipeline(source, config.dtypes, budgets)
    vae = source.component_class("vae")
    for option, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if getattr(config, option) and not hasattr(vae, method):
            raise UsageError(f"--{option}: the VAE {vae.__name__} has no {method}()")
    if config.attention_backend is not None:  # tried on a denoiser without weights
        names = pipeline.components["denoise"]
        for name in sorted(set(names) & set(DENOISER_NAMES)):
            apply_to_denoiser(name, source.open(name, pipeline.dtypes[name]).model, config)

    def prepare(pipe: Any, stage: Stage) -> None:
        apply_to_pipeline(pipe, config)
        if stage == "denoise" and config.attention_backend is not None:
            for name, denoiser in denoisers(pipe).items():
                apply_to_denoiser(name, denoiser, config)

    limits = RoundLimits.of(
        is_claimed=config.schedule == "dynamic",
        host_bytes=budgets.get("cpu", free_host_bytes()),
    )
    return StagedEngine(
        pipeline, rank=world.rank, limits=limits, folder=config.output, prepare=prepare
    )
