"""The `ContinuousEngine`: a pipeline's denoisers cut over ranks, several images in flight.

Ranks form a mesh of dp × pp: blocks of ``num_stages`` neighbouring ranks are a replica, whose
first rank holds the rest of the pipeline, takes the replica's batches and makes its Results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ddinfer.distributed.partition import Replica
from ddinfer.engines.base import Batch, ProgressListener
from ddinfer.engines.block_times import measure_blocks
from ddinfer.engines.encoding import EncodingCache
from ddinfer.engines.options import apply_to_denoiser, apply_to_pipeline, open_source
from ddinfer.engines.pipeline_call import run_batch
from ddinfer.engines.setup_file import set_up_leader
from ddinfer.errors import UsageError
from ddinfer.models.adapters import send_with_calls
from ddinfer.models.component_roles import DENOISER_NAMES
from ddinfer.models.meta_model import OpenModel, build_on_meta
from ddinfer.models.pipeline_folder import PipelineSource
from ddinfer.parallel.blocks import denoiser_blocks, module_bytes
from ddinfer.parallel.communicator import Communicator
from ddinfer.parallel.continuous.image_state import check_pipeline_class
from ddinfer.parallel.continuous.pipeline import ContinuousPipeline
from ddinfer.parallel.cut import block_stages
from ddinfer.parallel.flow import PlanError
from ddinfer.request import Request, Result

if TYPE_CHECKING:
    from ddinfer.config import JobConfig


@dataclass(frozen=True)
class StagePlan:
    """One rank's part of a denoiser.

    Attributes:
        first, last: names of its first and last block.
        share: of the denoiser's weights that the rank holds, what lies outside of blocks included.
    """

    first: str
    last: str
    share: float


class ContinuousEngine:
    """Runs a replica's batches through a `ContinuousPipeline`, one call for each.

    Every rank of the replica runs it. The first takes the batches and yields the Results; the
    others' batches are not looked at, and they yield nothing.

    Args:
        pipeline: this rank's part of the replica's pipeline.
        rank: global rank, for the Results.
        call: arguments of the pipeline's ``__call__`` that hold for every Request.
        encodings: of this pipeline's text encoders, on the first rank; forgotten where memory is
            short.
    """

    def __init__(
        self,
        pipeline: ContinuousPipeline,
        *,
        rank: int = 0,
        call: Mapping[str, Any] | None = None,
        encodings: EncodingCache | None = None,
    ):
        self.pipeline, self.rank, self.call = pipeline, rank, dict(call or {})
        self.encodings = encodings
        self._max_batch: dict[str, int] = {}  # what one image learns of the memory holds for all

    def run(self, batches: Iterable[Batch]) -> Iterator[Result]:
        """Yield one Result per Request of ``batches``, as the images end.

        ``seconds`` of a Result is its share of the replica's time: images are in flight together.

        Raises:
            RankError: another rank of the replica failed for good or is gone.
        """
        if not self.pipeline.comm.is_first:
            batches = ()
        since = time.perf_counter()
        for outcome in self.pipeline.run(self._job(batch) for batch in batches):
            if outcome.error is not None:
                raise outcome.error  # what fails an image is in its Result; this is worse
            results: list[Result] = outcome.value
            seconds = (time.perf_counter() - since) / max(len(results), 1)
            for result in results:
                yield replace(result, seconds=seconds)
            since = time.perf_counter()

    def set_progress_listener(self, heartbeat: ProgressListener) -> None:
        """Let ``heartbeat`` hear this rank's stage at work; the first rank's VAE, too."""
        self.pipeline.set_progress_listener(heartbeat)

    def close(self) -> None:
        self.pipeline.close()

    def _job(self, batch: Batch) -> Callable[[Any], list[Result]]:
        def make(pipe: Any) -> list[Result]:
            results = run_batch(
                pipe,
                batch,
                arguments=self.call,
                rank=self.rank,
                max_batch=self._max_batch,
                encodings=self.encodings,
            )
            return list(results)

        return make


def load_continuous_engine(
    model: str,
    config: JobConfig,
    replica: Replica,
    *,
    device: str | torch.device,
    rank: int,
    group: Any = None,
    first_request: Request | None = None,
) -> ContinuousEngine:
    """Load this rank's part of a job's pipeline: its own blocks, and on stage 0 the rest.

    Args:
        model: folder or hub id.
        group: the replica's process group, from `Replica.process_group`.
        first_request: on the replica's first rank, what ``--balance time`` measures.

    Raises:
        UsageError: the pipeline cannot be cut.
    """
    source = open_source(model, config)
    target = torch.device(device)
    is_timed = config.balance == "time"
    seconds: dict[str, list[float]] = {}
    if is_timed and not replica.makes_results:
        seconds = _of_first_rank(seconds, group, target)
    denoisers, stages = _load_denoisers(source, config, replica, target, seconds)
    pipe = encodings = None
    if replica.makes_results:
        types = source.dtypes(config.dtypes, target)
        rest = {
            entry.name: source.load(entry.name, types[entry.name], target)
            for entry in source.index.entries
            if entry.name not in denoisers
        }
        pipe = source.assemble({**rest, **denoisers})
        set_up_leader(pipe, denoisers, config.setup)
        apply_to_pipeline(pipe, config)
        if is_timed:
            if first_request is not None:
                seconds = measure_blocks(pipe, denoisers, first_request, {}, target)
            _of_first_rank(seconds, group, target)
            if seconds:
                denoisers, stages = _load_denoisers(source, config, replica, target, seconds)
                pipe = source.assemble({**rest, **denoisers})
                apply_to_pipeline(pipe, config)
        encodings = EncodingCache(pipe)
    pipeline = ContinuousPipeline(
        pipe, denoisers=denoisers, stages=stages, group=group, device=target
    )
    return ContinuousEngine(pipeline, rank=rank, encodings=encodings)


def _of_first_rank(seconds: dict[str, list[float]], group: Any, device: torch.device) -> Any:
    """What the replica's first rank has measured."""
    comm = Communicator.of(group, device)
    comm.agree(None, "measuring the denoiser's blocks")
    found = comm.broadcast_object(seconds)
    comm.close()
    return found


def _load_denoisers(
    source: PipelineSource,
    config: JobConfig,
    replica: Replica,
    device: torch.device,
    seconds: Mapping[str, Sequence[float]],
) -> tuple[dict[str, torch.nn.Module], dict[str, list[range]]]:
    """One stage of a pipeline's denoisers, by component name, and all their stages.

    Args:
        seconds: of the blocks of each denoiser that is balanced by time.

    Raises:
        UsageError: the pipeline has no denoiser that can be cut into so many stages.
    """
    types = source.dtypes(config.dtypes, device)
    found, stages = {}, {}
    for name in source.model_names():
        if name in DENOISER_NAMES:
            opened = source.open(name, types[name])
            if opened.stored and (blocks := denoiser_blocks(opened.model)):
                num_stages = len(replica.ranks)
                stages[name] = _stages_of(name, opened.model, blocks, num_stages, seconds.get(name))
                found[name] = _fill_stage(opened, blocks, stages[name][replica.stage], device)
                apply_to_denoiser(name, found[name], config)
                if source.loras:
                    send_with_calls(found[name])
    if not found:
        raise _no_blocks(source)
    return found, stages


def plan_stages(source: PipelineSource, num_stages: int) -> dict[str, list[StagePlan]]:
    """How the denoisers of a pipeline will be cut, by component name; nothing is read but configs.

    Raises:
        UsageError: the pipeline has no denoiser that can be cut into ``num_stages``.
    """
    check_pipeline_class(source.kind)
    plans = {}
    for name in source.model_names():
        if name in DENOISER_NAMES:
            model = build_on_meta(source.component_class(name), source.folder / name, None)
            if blocks := denoiser_blocks(model):
                plans[name] = _plan_of(name, model, blocks, num_stages)
    if not plans:
        raise _no_blocks(source)
    return plans


def _plan_of(
    name: str, model: torch.nn.Module, blocks: Sequence[str], num_stages: int
) -> list[StagePlan]:
    total = module_bytes(model)
    stages = _stages_of(name, model, blocks, num_stages)
    own = [sum(module_bytes(model.get_submodule(blocks[k])) for k in stage) for stage in stages]
    besides = total - sum(own)
    return [
        StagePlan(blocks[stage.start], blocks[stage.stop - 1], (size + besides) / total)
        for stage, size in zip(stages, own, strict=True)
    ]


def _stages_of(
    name: str,
    model: torch.nn.Module,
    blocks: Sequence[str],
    num_stages: int,
    seconds: Sequence[float] | None = None,
) -> list[range]:
    try:
        return block_stages(model, blocks, num_stages, seconds)
    except PlanError as error:
        raise UsageError(
            f"--pipeline_parallel {num_stages}: the {name} cannot be cut: {error}"
        ) from error


def _no_blocks(source: PipelineSource) -> UsageError:
    return UsageError(
        f"--pipeline_parallel cuts a denoiser between its blocks; {source.kind.__name__} in "
        f"{source.folder} has none that is made of blocks. Leave the option out: each rank then "
        "runs the whole pipeline"
    )


def _fill_stage(
    opened: OpenModel, blocks: Sequence[str], own: range, device: torch.device
) -> torch.nn.Module:
    foreign = tuple(f"{block}." for k, block in enumerate(blocks) if k not in own)
    opened.fill(lambda tensor: None if tensor.startswith(foreign) else device)
    for module in opened.model.modules():  # those of other ranks' blocks, too
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)
    return opened.model
