"""Which file a tensor's memory is mapped from, as the kernel says."""

from pathlib import Path

import torch


def mapped_file(tensor: torch.Tensor) -> Path | None:
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if start <= address < end:
            return Path(fields[5]) if len(fields) > 5 and fields[5].startswith("/") else None
    raise AssertionError(f"no memory at {address:#x}")
