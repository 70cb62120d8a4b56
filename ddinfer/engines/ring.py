"""The `RingEngine`: several ranks hold one pipeline's denoiser in stages, several images in flight.

Ranks form a mesh of dp × pp: blocks of ``num_stages`` neighbouring ranks are a replica, whose
first rank holds the rest of the pipeline, takes the replica's batches and makes its Results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ddinfer.distributed.replica import Replica
from ddinfer.engines.base import Batch, Listener
from ddinfer.engines.options import apply_to_denoiser, apply_to_pipeline
from ddinfer.engines.whole import WholeEngine
from ddinfer.errors import UsageError
from ddinfer.models.opening import OpenModel
from ddinfer.models.repository import pipeline_folder
from ddinfer.models.source import DENOISER_NAMES, PipelineSource
from ddinfer.parallel.blocks import ring_blocks
from ddinfer.parallel.flow import PlanError
from ddinfer.parallel.ring import Ring
from ddinfer.parallel.stages import block_stages
from ddinfer.request import Result

if TYPE_CHECKING:
    from ddinfer.config import JobConfig


class RingEngine:
    """Runs a replica's batches through a `Ring`, each batch one pipeline call in flight.

    Every rank of the replica runs it. The first takes the batches and yields the Results; the
    others' batches are not looked at, and they yield nothing.

    Args:
        ring: this rank's part of the replica's ring.
        rank: global rank, for the Results.
        call: arguments of the pipeline's ``__call__`` that hold for every Request.
    """

    def __init__(self, ring: Ring, *, rank: int = 0, call: Mapping[str, Any] | None = None):
        self.ring, self.rank, self.call = ring, rank, dict(call or {})

    def run(self, batches: Iterable[Batch]) -> Iterator[Result]:
        """Yield one Result per Request of ``batches``, as the images end.

        ``seconds`` of a Result is its share of the replica's time: images are made side by side.

        Raises:
            RankError: another rank of the replica failed for good or is gone.
        """
        if not self.ring.link.is_first:
            batches = ()
        since = time.perf_counter()
        for outcome in self.ring.run(self._job(batch) for batch in batches):
            if outcome.error is not None:
                raise outcome.error  # what fails an image is in its Result; this is worse
            results: list[Result] = outcome.value
            seconds = (time.perf_counter() - since) / max(len(results), 1)
            for result in results:
                yield replace(result, seconds=seconds)
            since = time.perf_counter()

    def tell_steps(self, heartbeat: Listener) -> None:
        """Let ``heartbeat`` hear this rank's stage at work; the first rank's VAE, too."""
        if self.ring.link.is_first:
            heartbeat.listen_to(self.ring.pipe)
            self.ring.listen(heartbeat.steps)
        else:
            heartbeat.waits()
            self.ring.listen(heartbeat.steps, heartbeat.waits)

    def _job(self, batch: Batch) -> Callable[[Any], list[Result]]:
        def make(pipe: Any) -> list[Result]:
            return list(WholeEngine(pipe, rank=self.rank, call=self.call).run([batch]))

        return make


def load_ring_engine(
    model: str,
    config: JobConfig,
    replica: Replica,
    *,
    device: str | torch.device,
    rank: int,
    group: Any = None,
) -> RingEngine:
    """Load this rank's part of a job's pipeline: its own blocks, and on stage 0 the rest.

    Args:
        model: folder or hub id.
        group: the replica's process group, from `Replica.process_group`.

    Raises:
        UsageError: the pipeline cannot be cut, or an option does not go with stages.
    """
    if config.compile:
        raise UsageError("--compile does not go with a denoiser cut over ranks; leave it out")
    folder = pipeline_folder(
        model,
        variant=config.variant,
        revision=config.revision,
        token=config.token,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
    source = PipelineSource(folder, config.variant, config.trust_remote_code, config.allow_pickle)
    target = torch.device(device)
    denoisers = load_stage(source, config.dtype, len(replica.ranks), replica.stage, target)
    for name, denoiser in denoisers.items():
        apply_to_denoiser(name, denoiser, config)
    pipe = None
    if replica.makes_results:
        types = source.dtypes(config.dtype, target)
        rest = {
            entry.name: source.load(entry.name, types[entry.name], target)
            for entry in source.index.entries
            if entry.name not in denoisers
        }
        pipe = source.assemble({**rest, **denoisers})
        apply_to_pipeline(pipe, config)
    return RingEngine(Ring(pipe, denoisers=denoisers, group=group, device=target), rank=rank)


def load_stage(
    source: PipelineSource, dtype: Any, num_stages: int, stage: int, device: torch.device
) -> dict[str, torch.nn.Module]:
    """One stage of a pipeline's denoisers, by component name; foreign blocks are never read.

    Raises:
        UsageError: the pipeline has no denoiser that can be cut into ``num_stages``.
    """
    types = source.dtypes(dtype, device)
    found = {}
    for name in source.model_names():
        if name in DENOISER_NAMES:
            opened = source.open(name, types[name])
            if opened.stored and ring_blocks(opened.model):
                found[name] = _fill_stage(name, opened, num_stages, stage, device)
    if not found:
        raise UsageError(
            f"{source.folder}: {source.kind.__name__} has no denoiser made of blocks, so that it "
            "cannot be cut into stages; run the whole pipeline on each rank"
        )
    return found


def _fill_stage(
    name: str, opened: OpenModel, num_stages: int, stage: int, device: torch.device
) -> torch.nn.Module:
    blocks = ring_blocks(opened.model)
    try:
        own = block_stages(opened.model, blocks, num_stages)[stage]
    except PlanError as error:
        raise UsageError(f"the {name} cannot be cut: {error}") from error
    foreign = tuple(f"{block}." for k, block in enumerate(blocks) if k not in own)
    opened.fill(lambda tensor: None if tensor.startswith(foreign) else device)
    for module in opened.model.modules():  # those that no checkpoint holds
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)
    return opened.model
