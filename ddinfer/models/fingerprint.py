"""What a pipeline's folder is, in one hash: made without reading its weights."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

#: Files larger than this are told apart by their headers and sizes alone.
WHOLE_FILE_BYTES = 16 * 10**6


def model_fingerprint(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over every file below ``folder``: its name, its size, and what decides images.

    Of safetensors files that is the header (names, shapes, dtypes and offsets of all tensors);
    of every other file up to `WHOLE_FILE_BYTES` the content. So weights that were replaced in
    place by others of the same shapes are *not* noticed: reading them would cost as much as
    loading the model.
    """
    folder = Path(folder)
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        size = file.stat().st_size
        content = b""
        if file.suffix == ".safetensors":
            content = _safetensors_header(file)
        elif size <= WHOLE_FILE_BYTES:
            content = file.read_bytes()
        total.update(f"{name}\0{size}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


def _safetensors_header(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = stream.read(8)
        if len(length) < 8:
            return length
        return stream.read(min(struct.unpack("<Q", length)[0], WHOLE_FILE_BYTES))
