"""Which engine a job's options ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.config import PLACEMENTS, JobConfig
from ddinfer.distributed.partition import Replica
from ddinfer.distributed.world import World
from ddinfer.engines.base import Engine
from ddinfer.engines.options import configs_path
from ddinfer.engines.whole import load_whole_engine
from ddinfer.errors import UsageError
from ddinfer.models.devices import on_gpu, parse_max_memory
from ddinfer.models.placement import Placement
from ddinfer.request import Request

if TYPE_CHECKING:
    from ddinfer.engines.continuous import StagePlan


def load_engine(
    model: str,
    config: JobConfig,
    world: World,
    replica: Replica,
    group: Any = None,
    first_request: Request | None = None,
) -> Engine:
    """Load what this rank holds of a job's model.

    Args:
        model: folder or hub id.
        group: of the ranks of ``replica``, where they are several.
        first_request: of this rank's, for what is measured before (``--balance time``).

    Raises:
        UsageError: the pipeline lacks what an option asks for, or the model does not fit.
    """
    if config.pipeline_parallel > 1:
        from ddinfer.engines.continuous import load_continuous_engine

        return load_continuous_engine(
            model, config, replica,
            device=world.device, rank=world.rank, group=group, first_request=first_request,
        )  # fmt: skip
    if config.team_options:
        from ddinfer.engines.team import load_team_engine

        return load_team_engine(
            model, config, replica, device=world.device, rank=world.rank, group=group
        )
    if config.placement == "staged":
        from ddinfer.engines.staged import load_staged_engine

        return load_staged_engine(model, config, world=world)
    placement = chosen_placement(config)
    return load_whole_engine(model, config, world=world, placement=placement)


def check_placement(config: JobConfig, gpus: Sequence[int] | None = None) -> None:
    """Check, before anything is written, what can be known without the model.

    Args:
        gpus: those of this rank; ``None``: not known yet.

    Raises:
        UsageError: a placement file or budgets that cannot be read, or GPUs that are not there.
    """
    chosen = chosen_placement(config)
    named: set[str] = set(chosen.devices.values()) if isinstance(chosen, Placement) else set()
    if config.max_memory is not None:
        named |= set(parse_max_memory(config.max_memory))
    if gpus is not None:
        for device in sorted(named):
            on_gpu(device, gpus)


def check_stages(model: str, config: JobConfig) -> dict[str, list[StagePlan]]:
    """How ``--pipeline_parallel`` will cut the model's denoisers; of a hub model only configs are
    fetched. Nothing where it is not cut.

    Raises:
        UsageError: it cannot be cut into so many stages; ``--placement staged``, or several ranks
            for one image, cannot run it.
    """
    if config.ranks_per_replica == 1 and config.placement != "staged":
        return {}
    from ddinfer.engines.continuous import plan_stages
    from ddinfer.models.pipeline_folder import PipelineSource
    from ddinfer.models.stages import components_by_stage

    source = PipelineSource.for_planning(
        configs_path(model, config),
        revision=config.revision,
        token=config.token,
        trust_remote_code=config.trust_remote_code,
    )
    if config.placement == "staged":
        components_by_stage(source)
        return {}
    if config.team_options:
        from ddinfer.engines.team import check_team

        check_team(source, config)
        return {}
    return plan_stages(source, config.pipeline_parallel)


def chosen_placement(config: JobConfig) -> str | Placement | None:
    """A strategy's name, or what the file says."""
    if config.placement is None or config.placement in PLACEMENTS:
        return config.placement
    return read_placement(config.placement)


def read_placement(path: str) -> Placement:
    """
    Raises:
        UsageError: no file that `Placement.to_json` wrote.
    """
    try:
        return Placement.from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--placement {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--placement {path} is no JSON: {error}") from None
