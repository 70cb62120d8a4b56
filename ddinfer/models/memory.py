"""How much memory this machine has free. The only part of planning that looks at devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ddinfer.models.placement import CPU


def complete_budgets(budgets: Mapping[str, int] | None) -> dict[str, int]:
    """The given budgets with the host's added where they do not name it; all, when ``None``."""
    if budgets is None:
        return {**free_gpu_bytes(), CPU: free_host_bytes()}
    return {**budgets} if CPU in budgets else {**budgets, CPU: free_host_bytes()}


def free_gpu_bytes() -> dict[str, int]:
    """Every visible NVIDIA GPU → bytes that are free on it."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {f"cuda:{n}": torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count())}


def free_host_bytes() -> int:
    """Bytes of host memory that could be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
