"""``ddinfer plan MODEL``: the memory of a model and its placement; reads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ddinfer import tiny
from ddinfer.cli.command import HubOptions, parse, print_report
from ddinfer.cli.files import check_can_write
from ddinfer.errors import EXIT_OK, EXIT_USAGE
from ddinfer.models.devices import PlacementError
from ddinfer.models.report import plan_model


@dataclass(frozen=True, kw_only=True)
class PlanOptions(HubOptions):
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
    json: bool = False
    """Print the plan as JSON."""


def main(argv: Sequence[str]) -> int:
    options = parse(PlanOptions, "plan", argv)
    if options.output is not None:
        check_can_write("--output", options.output, ".json")
    plan = plan_model(
        options.model,
        max_memory=options.max_memory,
        gpus_per_rank=options.gpus_per_rank,
        dtype=options.dtype,
        variant=options.variant,
        revision=options.revision,
        token=options.token,
        trust_remote_code=options.trust_remote_code,
    )
    if options.output is not None:
        chosen = plan.strategies[options.placement]
        if isinstance(chosen, str):
            raise PlacementError(chosen)
        Path(options.output).write_text(chosen.to_json() + "\n", encoding="utf-8")
    print_report(plan.to_dict(), plan.lines(), as_json=options.json)
    if options.output is not None and not options.json:
        print(f"\n{options.output}: the placement {options.placement}, for --placement")
    return EXIT_OK if plan.fits else EXIT_USAGE
