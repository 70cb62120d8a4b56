"""The `TeamEngine`: several ranks make one image, by guidance calls and by tokens.

Ranks form a mesh of dp × cfg × sp: C·P neighbours are a replica, whose first rank holds the whole
pipeline, takes the replica's batches and makes its Results. The others hold its denoisers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ddinfer.distributed.partition import Replica
from ddinfer.engines.base import Batch, ProgressListener
from ddinfer.engines.encoding import EncodingCache
from ddinfer.engines.options import apply_to_denoiser, apply_to_pipeline, open_source
from ddinfer.engines.setup_file import set_up_leader
from ddinfer.engines.whole import WholeEngine
from ddinfer.errors import UsageError
from ddinfer.models.loading import denoisers
from ddinfer.models.meta_model import build_on_meta
from ddinfer.models.pipeline_folder import DENOISER_NAMES, PipelineSource
from ddinfer.parallel.communicator import Communicator
from ddinfer.parallel.team.team import Team, check_models
from ddinfer.request import Result

if TYPE_CHECKING:
    from ddinfer.config import JobConfig


class TeamEngine(WholeEngine):
    """Runs batches through a pipeline whose denoiser calls the replica's ranks make together.

    Args:
        pipe: the pipeline, on the leader.
        team: this rank's view of the replica.
    """

    def __init__(
        self,
        pipe: Any,
        team: Team,
        *,
        rank: int = 0,
        call: Mapping[str, Any] | None = None,
        encodings: EncodingCache | None = None,
    ):
        super().__init__(pipe, rank=rank, call=call, encodings=encodings)
        self.team = team

    def run(self, batches: Iterable[Batch]) -> Iterator[Result]:
        """Yield one Result per Request of ``batches``.

        Raises:
            RankError: another rank of the replica is gone.
            UsageError: a denoiser cannot be split, found at its first call.
        """
        with self.team.leading():
            for batch in batches:
                for result in super().run([batch]):
                    if self.team.fatal is not None:  # the pipeline's call recorded it as its error
                        raise self.team.fatal
                    yield result
                self.team.drain()

    def set_progress_listener(self, heartbeat: ProgressListener) -> None:
        """Let ``heartbeat`` hear every step, and when this rank waits for the others."""
        super().set_progress_listener(heartbeat)
        self.team.listen(heartbeat.steps, awaiting=heartbeat.awaiting)

    def close(self) -> None:
        super().close()
        self.team.comm.close()


class TeamMember:
    """What the other ranks of a replica run: the leader's calls. It yields no Results."""

    def __init__(self, team: Team):
        self.team = team

    def run(self, batches: Iterable[Batch]) -> Iterator[Result]:
        """Serve until the leader has made its batches; ``batches`` are not looked at.

        Raises:
            RankError: another rank of the replica failed or is gone.
        """
        self.team.serve()
        yield from ()

    def set_progress_listener(self, heartbeat: ProgressListener) -> None:
        heartbeat.waits()
        self.team.listen(heartbeat.steps, heartbeat.waits, heartbeat.awaiting)

    def close(self) -> None:
        self.team.comm.close()


def load_team_engine(
    model: str,
    config: JobConfig,
    replica: Replica,
    *,
    device: str | torch.device,
    rank: int,
    group: Any = None,
) -> TeamEngine | TeamMember:
    """Load what this rank holds of a job's pipeline: all of it, or the denoisers.

    Args:
        model: folder or hub id.
        group: the replica's process group, from `Replica.process_group`.

    Raises:
        UsageError: the pipeline lacks what an option asks for, or cannot be split.
    """
    source = open_source(model, config)
    target = torch.device(device)
    types = source.dtypes(config.dtypes, target)
    entries = [entry.name for entry in source.index.entries]
    if not replica.makes_results:
        entries = [name for name in entries if name in DENOISER_NAMES]
    loaded = {name: source.load(name, types[name], target) for name in entries}
    pipe = source.assemble(loaded) if replica.makes_results else None
    models = denoisers(pipe) if pipe is not None else loaded
    if pipe is not None:
        set_up_leader(pipe, models, config.setup)
    for name, denoiser in models.items():
        apply_to_denoiser(name, denoiser, config)
    is_alone = len(replica.ranks) == 1
    team = Team(
        models,
        Communicator((rank,), 0, target) if is_alone else Communicator.of(group, target),
        cfg_parallel=config.cfg_parallel,
        sequence_parallel=config.sequence_parallel,
    )
    if pipe is None:
        return TeamMember(team)
    apply_to_pipeline(pipe, config)
    return TeamEngine(pipe, team, rank=rank, encodings=EncodingCache(pipe))


def check_team(source: PipelineSource, config: JobConfig) -> None:
    """Check, before anything is written, what a pipeline's configuration tells of its denoisers.

    Raises:
        UsageError: it has none, or their tokens cannot be split.
    """
    names = [name for name in source.model_names() if name in DENOISER_NAMES]
    if not names:
        raise UsageError(
            f"{source.kind.__name__} in {source.folder} has no denoiser whose calls could be made "
            "by several ranks; leave --cfg_parallel and --sequence_parallel out"
        )
    models = {
        name: build_on_meta(source.component_class(name), source.folder / name, None)
        for name in names
    }
    check_models(models, config.sequence_parallel)
