"""How much memory this machine has free. The only part of planning that looks at devices."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

from ddinfer.models.placement import CPU, MaxMemory, on_gpu, parse_max_memory


def complete_budgets(
    max_memory: MaxMemory | str | None, gpus: Sequence[int] | None = None
) -> dict[str, int]:
    """Budgets as the user gives them, the host's added where it is not named; ``None``: all free.

    Args:
        gpus: those this process drives; the budgets' numbers count through them.
    """
    if max_memory is None:
        return {**free_gpu_bytes(gpus), CPU: free_host_bytes()}
    budgets = parse_max_memory(max_memory)
    if gpus is not None:
        budgets = {on_gpu(device, gpus): size for device, size in budgets.items()}
    return budgets if CPU in budgets else {**budgets, CPU: free_host_bytes()}


def free_gpu_bytes(gpus: Sequence[int] | None = None) -> dict[str, int]:
    """Visible NVIDIA GPU → bytes that are free on it.

    Args:
        gpus: only these are asked (default: all): asking takes some hundred MB on each.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    numbers = [n for n in range(torch.cuda.device_count()) if gpus is None or n in gpus]
    return {f"cuda:{n}": torch.cuda.mem_get_info(n)[0] for n in numbers}


def free_host_bytes() -> int:
    """Bytes of host memory that could be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def trim_heap() -> None:
    """Gives freed host memory back to the system. glibc keeps it, in pieces, for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
