"""The `WholeEngine`: one rank holds the whole pipeline and runs its own ``__call__``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.engines.base import Batch, ProgressListener
from ddinfer.engines.encoding import EncodingCache
from ddinfer.engines.options import (
    apply_to_denoiser,
    apply_to_pipeline,
    gpu_numbers,
    open_source,
    quantize,
)
from ddinfer.engines.pipeline_call import run_batch
from ddinfer.engines.setup_file import setup_function
from ddinfer.errors import UsageError
from ddinfer.models.loading import denoisers, load_source
from ddinfer.models.placement import Placement
from ddinfer.request import Result


class WholeEngine:
    """Runs batches through a diffusers pipeline, one CPU generator per image.

    Args:
        pipe: a diffusers pipeline on its device. It is called and otherwise left alone.
        rank: global rank, for the Results.
        call: arguments of the pipeline's ``__call__`` that hold for every Request, of any type.
        encodings: of this pipeline's text encoders; forgotten where memory is short.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        rank: int = 0,
        call: Mapping[str, Any] | None = None,
        encodings: EncodingCache | None = None,
    ):
        self.pipe, self.rank, self.call = pipe, rank, dict(call or {})
        self._max_batch: dict[str, int] = {}  # batch key → most images that fitted in memory
        self.encodings = encodings

    def run(self, batches: Iterable[Batch]) -> Iterator[Result]:
        for batch in batches:
            yield from run_batch(
                self.pipe,
                batch,
                arguments=self.call,
                rank=self.rank,
                max_batch=self._max_batch,
                encodings=self.encodings,
            )

    def set_progress_listener(self, heartbeat: ProgressListener) -> None:
        """Let ``heartbeat`` hear every step of the pipeline's denoisers, and its VAE.

        A denoiser compiled as a whole is left alone: a hook that counts would compile it again
        with every step. There a batch is what moves.
        """
        try:
            found = denoisers(self.pipe)
        except UsageError:
            return
        heartbeat.listen_to(self.pipe)
        for denoiser in found.values():
            if getattr(denoiser, "_compiled_call_impl", None) is None:
                denoiser.register_forward_pre_hook(lambda *_: heartbeat.steps())

    def close(self) -> None:
        if self.encodings is not None:
            self.encodings.undo()


def load_whole_engine(
    model: str,
    config: JobConfig,
    *,
    world: World,
    placement: str | Placement | None = None,
) -> WholeEngine:
    """Load the pipeline of a job onto this rank's device, or spread over what this rank drives.

    Raises:
        UsageError: the pipeline lacks what an option asks for, or does not fit.
    """
    is_placed = placement is not None
    source = open_source(model, config)
    pipe = load_source(
        source,
        dtype=config.dtypes,
        device=None if is_placed else world.device,
        placement=placement,
        max_memory=config.max_memory,
        gpus=gpu_numbers(world) if is_placed else None,
        setup=setup_function(config.setup),
    )
    quantize(pipe, config)
    apply_to_pipeline(pipe, config)
    if config.attention_backend is not None or config.compile:
        for name, denoiser in denoisers(pipe).items():
            apply_to_denoiser(name, denoiser, config)
    return WholeEngine(pipe, rank=world.rank, encodings=EncodingCache(pipe))
