"""The `World`: which rank this process is, among how many, on which device. Detected once.

Imports torch only where a process group may exist or a GPU is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddinfer.errors import UsageError

#: What every distributed launcher sets for its ranks; all of them, or the world is half set.
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """Where a rank stands.

    Attributes:
        rank: global, 0-based; picks the slice of the work.
        local_rank: among the ranks of this machine; picks the device.
        local_world_size: ranks on this machine.
        num_nodes: machines.
        device: what ``torch.device`` takes: ``"cpu"``, ``"cuda:1"``.
        run_id: of the launcher's run, equal on all ranks; restarts keep it.
        restart_count: how often the launcher has started this run's ranks again.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    num_nodes: int = 1
    device: str = "cpu"
    run_id: str = ""
    restart_count: int = 0

    @classmethod
    def detect(cls, device: str = "auto", environ: Mapping[str, str] | None = None) -> World:
        """From the live process group, else from the environment, else a world of one.

        Args:
            device: ``auto`` (the GPU of the local rank where there are any, else the CPU),
                ``cpu``, ``cuda`` (the GPU of the local rank), or ``cuda:N``.

        Raises:
            UsageError: a half-set environment, more ranks than GPUs, or a GPU that this torch
                cannot use.
        """
        environ = os.environ if environ is None else environ
        found = _environment(environ)
        live = _live_group()
        if live is not None:
            rank, world_size = live
            local_rank = found.local_rank if found else 0
            local_world_size = found.local_world_size if found else 1
            if found is None and world_size > 1:
                local_rank, local_world_size = _current_device(), 1
        elif found is not None:
            rank, world_size = found.rank, found.world_size
            local_rank, local_world_size = found.local_rank, found.local_world_size
        else:
            rank, world_size, local_rank, local_world_size = 0, 1, 0, 1
        return cls(
            rank,
            world_size,
            local_rank,
            local_world_size,
            max(1, world_size // local_world_size),
            pick_device(device, local_rank, local_world_size),
            environ.get("TORCHELASTIC_RUN_ID", ""),
            int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )


@dataclass(frozen=True)
class _Found:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def _environment(environ: Mapping[str, str]) -> _Found | None:
    there = [name for name in NEEDED if environ.get(name)]
    ranks = [name for name in there if not name.startswith("MASTER_")]
    if not ranks:
        return None  # MASTER_ADDR alone is what clusters export everywhere
    missing = [name for name in NEEDED if name not in there]
    if missing:
        raise UsageError(
            f"the environment is half set: {', '.join(f'{n}={environ[n]}' for n in there)} but no "
            f"{', '.join(missing)}. Start ranks with torchrun or with ddinfer --nproc_per_node=N, "
            "which set all of them; or unset them for a world of one"
        )
    values = {}
    for name in NEEDED[:4]:
        try:
            values[name] = int(environ[name])
        except ValueError:
            raise UsageError(f"{name}={environ[name]!r} is not a number") from None
    found = _Found(*values.values())
    if not (
        0 <= found.rank < found.world_size
        and 0 <= found.local_rank < found.local_world_size <= found.world_size
    ):
        shown = ", ".join(f"{n}={v}" for n, v in values.items())
        raise UsageError(f"the environment contradicts itself: {shown}")
    return found


def _live_group() -> tuple[int, int] | None:
    """(rank, world size) of the process group, if this process is in one."""
    if "torch.distributed" not in sys.modules:
        return None
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.get_rank(), dist.get_world_size()


def _current_device() -> int:
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def pick_device(device: str, local_rank: int, local_world_size: int) -> str:
    """The device of a local rank, as `World.detect` describes it."""
    if device == "cpu":
        return "cpu"
    if device != "auto" and device.split(":")[0] != "cuda":
        raise UsageError(f"--device {device} is not known; use auto, cpu, cuda or cuda:N")
    count = num_gpus(required=device != "auto")
    if count == 0:
        return "cpu"
    if ":" in device:
        index = int(device.split(":")[1])
        if index >= count:
            raise UsageError(f"--device {device}: this machine shows {count} GPUs, 0 … {count - 1}")
        if local_world_size > 1:
            raise UsageError(
                f"--device {device} is one GPU for {local_world_size} ranks; use --device cuda, "
                "which gives each local rank its own"
            )
        return device
    if local_world_size > count:
        raise UsageError(
            f"--nproc_per_node={local_world_size} needs {local_world_size} GPUs, this machine "
            f"shows {count}; use --nproc_per_node={count} or --device cpu"
        )
    return f"cuda:{local_rank}"


def num_gpus(*, required: bool = False) -> int:
    """GPUs that this torch can use.

    Raises:
        UsageError: an NVIDIA device is there that this torch cannot use, or none is there and
            one is ``required``. A job must not fall back to the CPU in silence.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    build = f"torch {torch.__version__}, built for " + (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        if required:
            raise UsageError(f"--device cuda, but CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU")
        return 0
    devices = nvidia_devices()
    if devices:
        raise UsageError(
            f"this machine has an NVIDIA device ({devices[0]}) that {build}, cannot use. Install a "
            "CUDA build of torch that fits the driver (https://pytorch.org/get-started/locally/), "
            "or use --device cpu"
        )
    if required:
        raise UsageError(f"--device cuda needs a GPU; this machine shows none to {build}")
    return 0


def nvidia_devices() -> list[str]:
    """NVIDIA devices that the kernel shows, whether or not torch can use them."""
    found = [str(p) for p in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    return found or [str(p) for p in sorted(Path("/proc/driver/nvidia/gpus").glob("*"))]
