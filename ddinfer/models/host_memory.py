"""How much host memory a pipeline's weights need, from the headers of its files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError
from ddinfer.models.checkpoint import itemsize, read_checkpoint
from ddinfer.models.devices import format_bytes, free_host_bytes

if TYPE_CHECKING:
    import torch

    from ddinfer.models.pipeline_folder import PipelineSource


@dataclass(frozen=True)
class HostBytes:
    """Weights in host memory.

    Attributes:
        mapped: used as they are stored: views into files, which all ranks of a machine share.
        converted: of another type than stored: each rank has its own copy.
    """

    mapped: int
    converted: int

    def total(self, num_ranks: int) -> int:
        return self.mapped + num_ranks * self.converted


def host_bytes(source: PipelineSource, dtype: Any, device: torch.device) -> HostBytes:
    """What a whole pipeline on ``device`` needs of the host while it is loaded and after.

    On a GPU that is one copy of the largest model that transformers converts before it is moved.
    """
    types = source.dtypes(dtype, device)
    mapped, converted = 0, {}
    for name in source.model_names():
        wanted = str(types[name]).removeprefix("torch.")
        stored = read_checkpoint(
            source.folder / name, variant=source.variant, allow_pickle=source.allow_pickle
        ).values()
        is_converted = [t.is_floating and t.dtype != wanted for t in stored]
        mapped += sum(
            t.num_bytes for t, other in zip(stored, is_converted, strict=True) if not other
        )
        converted[name] = sum(
            math.prod(t.shape) * itemsize(wanted)
            for t, other in zip(stored, is_converted, strict=True)
            if other
        )
    if device.type == "cpu":
        return HostBytes(mapped, sum(converted.values()))
    by_transformers = [e.name for e in source.index.entries if e.library == "transformers"]
    return HostBytes(0, max((converted.get(name, 0) for name in by_transformers), default=0))


def check_host_memory(source: PipelineSource, dtype: Any, device: str, num_ranks: int) -> None:
    """Called on rank 0, for all ranks of its machine, before any of them loads.

    Raises:
        UsageError: the weights of ``num_ranks`` ranks need more host memory than is free.
    """
    import torch

    needed, free = host_bytes(source, dtype, torch.device(device)), free_host_bytes()
    if needed.total(num_ranks) <= free:
        return
    raise UsageError(
        f"the weights need {format_bytes(needed.total(num_ranks))} of host memory, "
        f"{format_bytes(free)} are free: {format_bytes(needed.mapped)} that all ranks share, and "
        f"{num_ranks} ranks × {format_bytes(needed.converted)} converted from the type in the "
        "files. Start fewer ranks (--nproc_per_node), save the model once in the type it runs in "
        "(--dtype), or see --placement"
    )
