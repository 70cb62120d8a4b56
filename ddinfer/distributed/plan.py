"""Who starts the ranks: this command, or a launcher around it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ddinfer.distributed.devices import Gpus
from ddinfer.distributed.world import (
    World,
    check_gpus_suffice,
    from_environment,
    parse_device,
    pick_device,
)
from ddinfer.errors import UsageError


@dataclass(frozen=True)
class LaunchPlan:
    """How the ranks of this command come to be.

    Attributes:
        kind: "join": this process is a rank already, of an outer launcher or the only one;
            "spawn": it starts ``num_ranks`` of them.
        num_ranks: of the whole job for "join", on this machine for "spawn".
        note: one sentence for the user, or empty.
    """

    kind: Literal["join", "spawn"]
    num_ranks: int
    note: str = ""


def plan_launch(
    nproc_per_node: str | int | None,
    device: str = "auto",
    environ: Mapping[str, str] | None = None,
    *,
    gpus_per_rank: int = 1,
    gpus: Gpus | None = None,
) -> LaunchPlan:
    """Decide from the option and from what an outer launcher has set.

    ``torchrun script --nproc_per_node=2`` hands the option to the script, inside a world of one:
    there the script's number wins. An outer launcher of several ranks is joined.

    Args:
        nproc_per_node: a number, or as torchrun spells it ``auto``, ``gpu`` or ``cpu``;
            default: every GPU, else one rank.

    Raises:
        UsageError: an outer and an inner number that differ, fewer GPUs than ranks need, a
            half-set environment, a GPU that this torch cannot use.
    """
    environ = os.environ if environ is None else environ
    outer = from_environment(environ)
    gpus = Gpus() if device == "cpu" else Gpus.probe(environ) if gpus is None else gpus
    wanted = count_ranks(nproc_per_node, gpus)
    if outer.is_launched and (outer.world_size > 1 or outer.num_nodes > 1):
        return _join(outer, wanted)
    if outer.is_launched and wanted is None:
        pick_device(device, 0, 1, gpus_per_rank, environ, gpus)
        return LaunchPlan("join", 1, _idle_note(gpus, device, gpus_per_rank))
    num_ranks = default_ranks(device, gpus, gpus_per_rank) if wanted is None else wanted
    pick_device(device, 0, num_ranks, gpus_per_rank, environ, gpus)
    if outer.is_launched and num_ranks == 1:
        return LaunchPlan("join", 1)
    return LaunchPlan("spawn", num_ranks)


def count_ranks(nproc_per_node: str | int | None, gpus: Gpus) -> int | None:
    """The number that ``--nproc_per_node`` stands for on this machine; ``None`` if not given."""
    if nproc_per_node is None:
        return None
    text = str(nproc_per_node).strip()
    if text.isdigit() and int(text) > 0:
        return int(text)
    if text == "gpu":
        if not gpus.usable:
            raise UsageError(
                gpus.why_unusable()
                or "--nproc_per_node=gpu: this machine shows no GPU; use a number, auto or cpu"
            )
        return gpus.usable
    if text == "cpu" or (text == "auto" and not gpus.usable):
        return os.cpu_count() or 1
    if text == "auto":
        return gpus.usable
    raise UsageError(f"--nproc_per_node={text} must be a number from 1, auto, gpu or cpu")


def default_ranks(device: str, gpus: Gpus, gpus_per_rank: int = 1) -> int:
    """A rank for every GPU (or set of GPUs), else one."""
    kind, index = parse_device(device)
    if kind == "cpu" or index is not None or not gpus.usable:
        return 1
    if gpus.usable < gpus_per_rank:
        check_gpus_suffice(1, gpus_per_rank, gpus.usable)
    return gpus.usable // gpus_per_rank


def _join(outer: World, wanted: int | None) -> LaunchPlan:
    if wanted is not None and wanted != outer.local_world_size:
        raise UsageError(
            f"two launchers want different numbers: torchrun started {outer.local_world_size} "
            f"rank{'s' * (outer.local_world_size > 1)} on this machine ({outer.world_size} in "
            f"all), ddinfer was given --nproc_per_node={wanted}; give the number once, in front "
            "of the script"
        )
    return LaunchPlan("join", outer.world_size)


def _idle_note(gpus: Gpus, device: str, gpus_per_rank: int) -> str:
    kind, index = parse_device(device)
    idle = gpus.usable - gpus_per_rank
    if kind == "cpu" or index is not None or idle < gpus_per_rank:
        return ""
    ranks = gpus.usable // gpus_per_rank
    return (
        f"torchrun started one rank and this machine has {gpus.usable} GPUs, so that {idle} "
        f"{'is' if idle == 1 else 'are'} idle; --nproc_per_node={ranks} uses all"
    )
