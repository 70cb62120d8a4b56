"""What a pipeline's folder is, in one hash: made without reading its weights."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from ddinfer.models.adapters import LoraFile
from ddinfer.models.checkpoint import PICKLE_SUFFIXES, CheckpointError, weight_files
from ddinfer.models.hub import MODEL_INDEX
from ddinfer.models.index import read_model_index

#: Files larger than this are told apart by their headers and sizes alone.
WHOLE_FILE_BYTES = 16 * 10**6

_WEIGHTS = (".safetensors", ".msgpack", ".onnx", ".h5", *PICKLE_SUFFIXES)


def model_fingerprint(
    folder: str | os.PathLike[str], *, variant: str | None = None, allow_pickle: bool = False
) -> str:
    """SHA-256 over the files of a pipeline: their names, sizes, and what decides images.

    Those are model_index.json and other settings beside it, code, and the folders of components:
    of their weights the files that are loaded, not other variants or formats. A README or a
    picture that appears changes nothing.

    Of safetensors files that is the header (names, shapes, dtypes and offsets of all tensors);
    of every other file up to `WHOLE_FILE_BYTES` the content. So weights that were replaced in
    place by others of the same shapes are *not* noticed: reading them would cost as much as
    loading the model.
    """
    folder = Path(folder)
    total = hashlib.sha256()
    for file in _files_that_decide(folder, variant, allow_pickle):
        name = file.relative_to(folder).as_posix()
        size = file.stat().st_size
        content = b""
        if file.suffix == ".safetensors":
            content = _safetensors_header(file)
        elif size <= WHOLE_FILE_BYTES:
            content = file.read_bytes()
        total.update(f"{name}\0{size}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


def lora_hashes(loras: Iterable[LoraFile]) -> dict[str, dict[str, str]]:
    """LoRA's name → SHA-256 of its file, and the component that it is put into if one was named."""
    found = {}
    for lora in loras:
        with lora.path.open("rb") as file:
            said = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        found[lora.name] = said | ({"component": lora.component} if lora.component else {})
    return found


def _files_that_decide(folder: Path, variant: str | None, allow_pickle: bool) -> Iterator[Path]:
    if (folder / MODEL_INDEX).is_file():
        components = {entry.name for entry in read_model_index(folder).entries}
    else:
        components = {path.name for path in folder.iterdir() if path.is_dir()}
    loaded: set[Path] = set()
    for part in folder.iterdir():
        if part.is_dir() and not part.name.startswith("."):
            try:
                loaded.update(weight_files(part, variant=variant, allow_pickle=allow_pickle))
            except CheckpointError:  # of a tokenizer; or whoever loads it will say what is wrong
                loaded.update(part.rglob("*"))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        parts = file.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or file.suffix == ".md":
            continue
        # Where several models are one component, diffusers numbers their folders.
        is_inside = len(parts) > 1 and (
            parts[0] in components or re.sub(r"_\d+$", "", parts[0]) in components
        )
        if not is_inside and file.suffix not in (".json", ".py"):
            continue
        is_weight = file.suffix in _WEIGHTS or re.search(r"\.index(\..+)?\.json$", file.name)
        if not is_weight or file in loaded:
            yield file


def _safetensors_header(file: Path) -> bytes:
    with file.open("rb") as stream:
        length = stream.read(8)
        if len(length) < 8:
            return length
        return stream.read(min(struct.unpack("<Q", length)[0], WHOLE_FILE_BYTES))
