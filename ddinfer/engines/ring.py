"""The `RingEngine`: several ranks hold one pipeline's denoiser in stages, several images in flight.

Ranks form a mesh of dp × pp: blocks of ``num_stages`` neighbouring ranks are a replica, whose
first rank holds the rest of the pipeline, takes the replica's batches and makes its Results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ddinfer.engines.base import Batch
from ddinfer.engines.whole import WholeEngine
from ddinfer.errors import UsageError
from ddinfer.models.opening import OpenModel
from ddinfer.models.repository import pipeline_folder
from ddinfer.models.source import DENOISER_NAMES, PipelineSource
from ddinfer.parallel.blocks import ring_blocks
from ddinfer.parallel.flow import PlanError
from ddinfer.parallel.link import LONG_TIMEOUT
from ddinfer.parallel.ring import Ring
from ddinfer.parallel.stages import block_stages
from ddinfer.request import Result

if TYPE_CHECKING:
    from ddinfer.config import JobConfig


@dataclass(frozen=True)
class Replica:
    """This rank's place in the mesh of dp × pp.

    Attributes:
        number: of the replica, hence its slice of the job's batches.
        num_replicas: in the job.
        stage: of the denoiser that this rank holds; stage 0 makes the Results.
        ranks: global ranks of the replica, in stage order.
    """

    number: int
    num_replicas: int
    stage: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, rank: int, world_size: int, num_stages: int) -> Replica:
        """Blocks of ``num_stages`` neighbours are a replica.

        Raises:
            UsageError: the ranks do not come out even.
        """
        if num_stages < 1 or world_size % num_stages:
            raise UsageError(
                f"{num_stages} stages need a number of ranks that {num_stages} "
                f"divides; found {world_size}"
            )
        number, stage = divmod(rank, num_stages)
        first = number * num_stages
        ranks = tuple(range(first, first + num_stages))
        return cls(number, world_size // num_stages, stage, ranks)

    @property
    def makes_results(self) -> bool:
        return self.stage == 0

    def process_group(self) -> Any:
        """The replica's process group. Every rank of the job calls this at the same point."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return None
        size, mine = len(self.ranks), None
        # On the CPU control messages share this group, and they may wait for work of any length.
        timeout = LONG_TIMEOUT if dist.get_backend() == "gloo" else None
        for number in range(self.num_replicas):
            ranks = list(range(number * size, (number + 1) * size))
            group = dist.new_group(ranks, timeout=timeout)
            mine = group if number == self.number else mine
        return mine


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
    if config.attention_backend is not None:
        denoiser: Any
        for denoiser in denoisers.values():
            denoiser.set_attention_backend(config.attention_backend)
    pipe = None
    if replica.makes_results:
        types = source.dtypes(config.dtype, target)
        rest = {
            entry.name: source.load(entry.name, types[entry.name], target)
            for entry in source.index.entries
            if entry.name not in denoisers
        }
        pipe = source.assemble({**rest, **denoisers})
        if config.vae_tiling:
            pipe.vae.enable_tiling()
        if config.vae_slicing:
            pipe.vae.enable_slicing()
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
