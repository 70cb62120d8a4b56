"""What this machine has to compute on: GPUs that torch can use, GPUs that it cannot, cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Device files without which no build of torch finds a GPU on Linux (NVIDIA, WSL, AMD, Jetson).
_LINUX_DEVICE_FILES = ("nvidia*", "dxg", "kfd", "nvhost*", "nvmap")


@dataclass(frozen=True)
class Gpus:
    """The GPUs of one machine, as this process sees them.

    Attributes:
        usable: how many torch can use.
        present: NVIDIA device files that are there and not hidden by the environment.
        torch_version: empty where torch did not need to be asked.
        cuda_version: CUDA that torch was built for; ``None`` for a CPU build.
    """

    usable: int = 0
    present: int = 0
    torch_version: str = ""
    cuda_version: str | None = None

    @classmethod
    def probe(cls, environ: Mapping[str, str] | None = None) -> Gpus:
        """Look at the machine. Imports torch only where there could be a GPU.

        Creates no CUDA context, but may initialise the driver: not for a process that forks.
        """
        environ = os.environ if environ is None else environ
        if sys.platform == "linux" and not any(
            next(Path("/dev").glob(name), None) for name in _LINUX_DEVICE_FILES
        ):
            return cls()
        import torch

        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
        present = 0 if _hidden(environ) else len(list(Path("/dev").glob("nvidia[0-9]*")))
        return cls(usable, present, torch.__version__, torch.version.cuda)

    def why_unusable(self) -> str | None:
        """Why GPUs that are there cannot be used, with the way out; ``None`` if all is well."""
        if self.usable or not self.present:
            return None
        plural = "s" * (self.present > 1)
        found = f"this machine shows {self.present} NVIDIA GPU{plural} (/dev/nvidia*), but"
        if self.cuda_version is None:
            return (
                f"{found} torch {self.torch_version} is a build without CUDA; install a CUDA "
                "build of torch (https://pytorch.org/get-started/locally), or use --device cpu"
            )
        return (
            f"{found} torch {self.torch_version} (built for CUDA {self.cuda_version}) cannot use "
            "it: the driver may be too old for that CUDA or not running (see nvidia-smi); update "
            "the driver, install a torch built for an older CUDA, or use --device cpu"
        )


def num_cores() -> int:
    """CPU cores this process may use: its affinity, bounded by a container's CPU quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))


def resolve_num_threads(
    num_threads: int | None, ranks_per_machine: int, environ: Mapping[str, str] | None = None
) -> int:
    """CPU threads of each rank: as given, else ``OMP_NUM_THREADS``, else cores / ranks."""
    environ = os.environ if environ is None else environ
    if num_threads is not None:
        return num_threads
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdigit() and int(first) > 0:
        return int(first)
    return max(1, num_cores() // ranks_per_machine)


def openmp_environment(
    num_threads: int, num_ranks: int, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What ranks of one machine add to the environment before they load OpenMP.

    Its threads spin for a moment while they wait. That is fastest where each has a core, and many
    times slower where ranks share cores: there they sleep, unless the user has set OMP_WAIT_POLICY.
    """
    environ = os.environ if environ is None else environ
    added = {"OMP_NUM_THREADS": str(num_threads)}
    if num_threads * num_ranks > num_cores():
        added["OMP_WAIT_POLICY"] = environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return added


def _hidden(environ: Mapping[str, str]) -> bool:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.strip() in ("", "-1", "NoDevFiles")
