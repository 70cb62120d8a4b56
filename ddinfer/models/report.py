"""`plan_model`: the memory of a model, and where each placement would put it; reads no weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddinfer.errors import UsageError
from ddinfer.models.devices import CPU, DISK, PlacementError, format_bytes, memory_budgets
from ddinfer.models.index import local_folder
from ddinfer.models.pipeline_folder import PipelineSource
from ddinfer.models.placement import Placement
from ddinfer.models.planner import HEADROOM, Strategy, plan
from ddinfer.models.stages import components_by_stage, plan_stages
from ddinfer.models.tree import Node, tree_of

STRATEGIES: tuple[Strategy, ...] = ("balanced", "auto")
COUNTED = ("float32", "bfloat16")


@dataclass(frozen=True)
class Part:
    """One component: bytes of its weights by dtype; "loaded" is the dtype it would be loaded in."""

    name: str
    kind: str
    stage: str
    num_bytes: Mapping[str, int]


@dataclass(frozen=True)
class ModelPlan:
    """Memory of a model and its possible placements, known before it is loaded.

    Attributes:
        whole: why the pipeline does not fit one device, with the numbers; else empty.
        strategies: ``--placement`` → the placement, or why it does not fit.
        stages: stage → its placement; or why the model has no stages.
    """

    model: str
    pipeline: str
    parts: Sequence[Part]
    budgets: Mapping[str, int]
    whole: str
    strategies: Mapping[str, Placement | str]
    stages: Mapping[str, Placement] | str

    @property
    def fits(self) -> bool:
        return not self.whole or any(
            not isinstance(found, str) for found in (*self.strategies.values(), self.stages)
        )

    def to_dict(self) -> dict[str, Any]:
        stages: Any = self.stages
        if not isinstance(stages, str):
            stages = {stage: _to_dict(found) for stage, found in stages.items()}
        return {
            "model": self.model,
            "pipeline": self.pipeline,
            "components": [
                {"name": p.name, "class": p.kind, "stage": p.stage, "bytes": dict(p.num_bytes)}
                for p in self.parts
            ],
            "budgets": dict(self.budgets),
            "whole": {"fits": not self.whole, **({"why": self.whole} if self.whole else {})},
            **{name: _to_dict(found) for name, found in self.strategies.items()},
            "staged": {"fits": False, "why": stages}
            if isinstance(stages, str)
            else {"fits": True, "stages": stages},
        }

    def lines(self) -> list[str]:
        dtypes = list(self.parts[0].num_bytes) if self.parts else []
        out = [f"{self.model}: {self.pipeline}", ""]
        out.append(
            _row("component", "class", "stage", *(d.replace("loaded", "as loaded") for d in dtypes))
        )
        for part in self.parts:
            sizes = [format_bytes(part.num_bytes[dtype]) for dtype in dtypes]
            out.append(_row(part.name, part.kind, part.stage, *sizes))
        totals = [format_bytes(sum(p.num_bytes[dtype] for p in self.parts)) for dtype in dtypes]
        out += [_row("together", "", "", *totals), ""]
        budgets = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.budgets.items())
        out += [f"memory: {budgets}", ""]
        out += ["without --placement, all on one device:"]
        out += _indented(self.whole or f"fits {next(iter(self.budgets))}")
        for name, found in self.strategies.items():
            out += ["", f"--placement {name}:"]
            out += _indented(found if isinstance(found, str) else found.explain())
        out += ["", "--placement staged:"]
        if isinstance(self.stages, str):
            return out + _indented(self.stages)
        for stage, placement in self.stages.items():
            out += [f"  {stage}", *(f"  {line}" for line in _indented(placement.explain()))]
        return out


def _row(*cells: str) -> str:
    name, kind, stage, *sizes = cells
    numbers = "".join(f"{size:>12}" for size in sizes)
    return f"{name:<16}{kind:<32}{stage:<9}{numbers}".rstrip()


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _to_dict(found: Placement | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"fits": False, "why": found}
    return {
        "fits": True,
        "devices": dict(found.devices),
        "bytes": found.bytes_on(),
        "reserved": dict(found.reserved),
    }


def plan_model(
    model: str,
    *,
    max_memory: str | None = None,
    gpus_per_rank: int | None = None,
    dtype: str = "auto",
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> ModelPlan:
    """Count a model's memory and try every placement, for ``ddinfer plan``; reads no weights.

    Args:
        model: folder or hub id. A local folder may hold only configs; of a hub model only those are
            downloaded.
        max_memory: of a rank, by device; default: what is free here.
        gpus_per_rank: GPUs that a rank drives, without ``max_memory``; default: all.

    Raises:
        UsageError: no such model, or budgets that cannot be read.
    """
    gpus = None
    if max_memory is None and gpus_per_rank is not None:
        gpus = range(gpus_per_rank)
    budgets = memory_budgets(max_memory, gpus)
    is_gpu = any(device not in (CPU, DISK) for device in budgets)
    folder = local_folder(model)
    if folder is not None and not _has_weights(folder):
        if dtype == "auto":
            raise UsageError(
                f"{folder} contains configs but no weights, so their dtype is unknown; pass "
                "--dtype, such as --dtype bfloat16"
            )
        source = PipelineSource(folder, variant, trust_remote_code, weights_at=model)
    else:
        source = PipelineSource.for_planning(
            model,
            variant=variant,
            trust_remote_code=trust_remote_code,
            revision=revision,
            token=token,
        )

    def tree(dtype: str) -> Node:
        return tree_of(source, dtype=dtype, gpu=is_gpu)

    loaded = tree(dtype)
    stages = _stages(source)
    strategies: dict[str, Any] = {
        name: _result_or_reason(plan, loaded, budgets, name) for name in STRATEGIES
    }
    staged = (
        stages
        if isinstance(stages, str)
        else _result_or_reason(plan_stages, loaded, stages, budgets)
    )
    return ModelPlan(
        model,
        source.kind.__name__,
        _parts(source, {"loaded": loaded, **{d: tree(d) for d in COUNTED}}, stages),
        budgets,
        _why_not_whole(loaded, budgets),
        strategies,
        staged,
    )


def _has_weights(folder: Path) -> bool:
    return any(
        name.endswith((".safetensors", ".bin"))
        for part in folder.iterdir()
        if part.is_dir()
        for name in os.listdir(part)
    )


def _stages(source: PipelineSource) -> Any:
    """Stage → components, or why there are no stages."""
    try:
        return components_by_stage(source)
    except UsageError as error:
        return str(error)


def _result_or_reason(make: Callable[..., Any], *args: Any) -> Any:
    """What ``make`` returns, or the message of its PlacementError."""
    try:
        return make(*args)
    except PlacementError as error:
        return str(error)


def _parts(source: PipelineSource, trees: Mapping[str, Node], stages: Any) -> list[Part]:
    by_name = {}
    if not isinstance(stages, str):
        by_name = {name: stage for stage, names in stages.items() for name in names}
    sizes = {
        dtype: {child.name: child.num_bytes() for child in tree.children}
        for dtype, tree in trees.items()
    }
    return [
        Part(
            name,
            source.component_class(name).__name__,
            by_name.get(name, ""),
            {dtype: found[name] for dtype, found in sizes.items()},
        )
        for name in sizes["loaded"]
    ]


def _why_not_whole(root: Node, budgets: Mapping[str, int]) -> str:
    """Why the whole pipeline does not fit the first device, with the numbers; else empty."""
    device, budget = next(iter(budgets.items()))
    needed, room = root.num_bytes(), budget - int(budget * HEADROOM)
    if needed <= room:
        return ""
    return (
        f"does not fit {device}: {format_bytes(needed)} of weights, room for {format_bytes(room)} "
        f"({format_bytes(budget)} less a tenth for activations)"
    )
