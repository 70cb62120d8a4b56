"""Any diffusers pipeline over many prompts on many GPUs, with raw torch.distributed.

Public names are imported when they are first used, so that ``import ddinfer`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ddinfer._version import __version__

if TYPE_CHECKING:
    from ddinfer.config import JobConfig
    from ddinfer.distributed.launch import launch
    from ddinfer.distributed.world import World
    from ddinfer.embed.generate import generate, stream
    from ddinfer.embed.splitting import (
        first_rank_first,
        gather,
        is_first_rank,
        split,
        split_between_processes,
    )
    from ddinfer.job.run import run_job
    from ddinfer.models.loading import load_pipeline
    from ddinfer.models.placement import Placement
    from ddinfer.models.planner import plan_placement
    from ddinfer.parallel.prepare import prepare_pipeline
    from ddinfer.request import Request, Result

_HOMES = {
    "generate": "ddinfer.embed.generate",
    "stream": "ddinfer.embed.generate",
    "split": "ddinfer.embed.splitting",
    "split_between_processes": "ddinfer.embed.splitting",
    "gather": "ddinfer.embed.splitting",
    "is_first_rank": "ddinfer.embed.splitting",
    "first_rank_first": "ddinfer.embed.splitting",
    "run_job": "ddinfer.job.run",
    "launch": "ddinfer.distributed.launch",
    "load_pipeline": "ddinfer.models.loading",
    "plan_placement": "ddinfer.models.planner",
    "prepare_pipeline": "ddinfer.parallel.prepare",
    "JobConfig": "ddinfer.config",
    "Placement": "ddinfer.models.placement",
    "Request": "ddinfer.request",
    "Result": "ddinfer.request",
    "World": "ddinfer.distributed.world",
}

__all__ = [
    "JobConfig",
    "Placement",
    "Request",
    "Result",
    "World",
    "__version__",
    "first_rank_first",
    "gather",
    "generate",
    "is_first_rank",
    "launch",
    "load_pipeline",
    "plan_placement",
    "prepare_pipeline",
    "run_job",
    "split",
    "split_between_processes",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ddinfer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
