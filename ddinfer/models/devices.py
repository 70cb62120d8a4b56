"""Devices by name, sizes in bytes, and how much memory is free.

Only `memory_budgets` and the functions below it look at this machine; the rest is text.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from ddinfer.errors import UsageError

MaxMemory = Mapping[int | str, int | str]

CPU, DISK = "cpu", "disk"

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)},
}


class PlacementError(UsageError):
    """A model that does not fit, or a placement that does not cover it. Shows the arithmetic."""


def parse_bytes(value: int | str) -> int:
    """``16_000_000_000``, ``"16GB"`` (16·10⁹), ``"16GiB"`` (16·2³⁰), ``"1.5 MB"`` → bytes.

    Raises:
        UsageError: no size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value), re.IGNORECASE)
    if found is None or found[2].upper() not in _UNITS:
        raise UsageError(f"{value!r} is not a size: expected bytes or a text such as 16GB or 16GiB")
    return int(Fraction(found[1]) * _UNITS[found[2].upper()])


def format_bytes(count: int) -> str:
    """1234567890 → ``1.23 GB``."""
    for letter, unit in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= unit:
            return f"{count / unit:.3g} {letter}B" if count < 1000 * unit else f"{count // unit} TB"
    return f"{count} B"


def parse_device(name: int | str) -> str:
    """``0``, ``"0"``, ``"cuda"``, ``"cuda:0"`` → ``"cuda:0"``; ``"cpu"``, ``"disk"``, ``"xpu:1"``.

    Raises:
        UsageError: no device.
    """
    text = str(name).strip()
    if text.isdigit():
        return f"cuda:{int(text)}"
    if text in (CPU, DISK) or re.fullmatch(r"[a-z]+:\d+", text):
        return text
    if re.fullmatch(r"[a-z]+", text) and text not in ("auto", "balanced"):
        return f"{text}:0"
    raise UsageError(f"{name!r} is not a device: expected 0, cuda:0, cpu or disk")


def parse_max_memory(max_memory: MaxMemory | str) -> dict[str, int]:
    """Device → bytes, in the given order; also from ``"0=16GB,1=16GB,cpu=64GB"``.

    Raises:
        UsageError: no device, no size, or a device named twice.
    """
    if isinstance(max_memory, str):
        pairs: list[tuple[int | str, int | str]] = []
        for part in max_memory.split(","):
            name, equals, size = part.partition("=")
            if not equals:
                raise UsageError(f"{part!r} is not a budget: expected DEVICE=SIZE, such as 0=16GB")
            pairs.append((name, size))
    else:
        pairs = list(max_memory.items())
    budgets: dict[str, int] = {}
    for key, value in pairs:
        device = parse_device(key)
        if device in budgets:
            raise UsageError(f"max_memory names {device} twice")
        budgets[device] = parse_bytes(value)
    return budgets


def on_gpu(device: str, gpus: Sequence[int]) -> str:
    """``cuda:n`` → the n-th of the GPUs that a process drives; other devices stay.

    Raises:
        PlacementError: there is no n-th.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device
    if int(index) >= len(gpus):
        found = f"{len(gpus)} GPUs ({', '.join(map(str, gpus))}); see --gpus_per_rank"
        raise PlacementError(
            f"the placement (or max_memory) names {device}, but this process drives "
            + (found if gpus else "no GPU; name cpu and disk, or see --device")
        )
    return f"cuda:{gpus[int(index)]}"


def memory_budgets(
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
