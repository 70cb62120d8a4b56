"""``ddinfer plan MODEL``: the memory of a model and its placement; reads no weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ddinfer import tiny
from ddinfer.cli.files import check_can_write
from ddinfer.errors import EXIT_OK, EXIT_USAGE, UsageError
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
class PlanOptions:
    """Print the memory of a pipeline's components and where each --placement would put them.

    Exits with 2 if nothing fits.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = tiny.DEFAULT
    """Directory or hub id of a diffusers pipeline. Of a hub model only configs are downloaded."""
    max_memory: Annotated[str | None, tyro.conf.arg(metavar="0=16GB,1=16GB,cpu=64GB")] = None
    """Memory of a rank. GB is 10^9 bytes, GiB 2^30. Default: what this machine has free."""
    gpus_per_rank: Annotated[int | None, tyro.conf.arg(metavar="G")] = None
    """GPUs that a rank drives, without --max_memory. Default: all of this machine."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """auto: float32 on CPU, else the checkpoint's own."""
    placement: Literal["balanced", "auto"] = "balanced"
    """Which one --output writes."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE.json", aliases=("-o",))] = None
    """Write the placement to a file, for ddinfer run --placement FILE.json."""
    variant: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Variant of the weight files, such as fp16."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="REV")] = None
    """Branch, tag or commit of a hub repository."""
    token: Annotated[str | None, tyro.conf.arg(metavar="TOKEN")] = None
    """Hub token; setting HF_TOKEN is safer."""
    trust_remote_code: bool = False
    """Run the pipeline code in the model's repository."""
    json: bool = False
    """Print the plan as JSON."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(PlanOptions, prog="ddinfer plan", args=list(argv), use_underscores=True)
    if options.output is not None:
        check_can_write("--output", options.output, ".json")
    found = plan_of(options)
    if options.output is not None:
        chosen = found.strategies[options.placement]
        if isinstance(chosen, str):
            raise PlacementError(chosen)
        Path(options.output).write_text(chosen.to_json() + "\n", encoding="utf-8")
    print(json.dumps(found.to_dict(), indent=1) if options.json else "\n".join(found.lines()))
    if options.output is not None and not options.json:
        print(f"\n{options.output}: the placement {options.placement}, for --placement")
    sys.stdout.flush()
    return EXIT_OK if found.fits else EXIT_USAGE


@dataclass(frozen=True)
class Part:
    """One component: bytes of its weights by dtype; "loaded" is the dtype it would be loaded in."""

    name: str
    kind: str
    stage: str
    num_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
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


def plan_of(options: PlanOptions) -> Plan:
    """
    Raises:
        UsageError: no such model, or budgets that cannot be read.
    """
    gpus = None
    if options.max_memory is None and options.gpus_per_rank is not None:
        gpus = range(options.gpus_per_rank)
    budgets = memory_budgets(options.max_memory, gpus)
    is_gpu = any(device not in (CPU, DISK) for device in budgets)
    source = _source(options)

    def tree(dtype: str) -> Node:
        return tree_of(source, dtype=dtype, gpu=is_gpu)

    loaded = tree(options.dtype)
    stages = _stages(source)
    strategies: dict[str, Any] = {
        name: _result_or_reason(plan, loaded, budgets, name) for name in STRATEGIES
    }
    staged = (
        stages
        if isinstance(stages, str)
        else _result_or_reason(plan_stages, loaded, stages, budgets)
    )
    return Plan(
        options.model,
        source.kind.__name__,
        _parts(source, {"loaded": loaded, **{d: tree(d) for d in COUNTED}}, stages),
        budgets,
        _why_not_whole(loaded, budgets),
        strategies,
        staged,
    )


def _source(options: PlanOptions) -> PipelineSource:
    """The model; a local directory may hold only configs."""
    hub: dict[str, Any] = {"revision": options.revision, "token": options.token}
    folder = local_folder(options.model)
    if folder is not None and not any(
        name.endswith((".safetensors", ".bin")) for part in folder.iterdir() if part.is_dir()
        for name in os.listdir(part)
    ):  # fmt: skip
        if options.dtype == "auto":
            raise UsageError(
                f"{folder} contains configs but no weights, so their dtype is unknown; pass "
                "--dtype, such as --dtype bfloat16"
            )
        return PipelineSource(
            folder, options.variant, options.trust_remote_code, weights_at=options.model
        )
    return PipelineSource.for_planning(
        options.model, variant=options.variant, trust_remote_code=options.trust_remote_code, **hub
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
