"""A model folder's weight files as a table of named tensors, none of them read yet.

The table comes from the headers of the safetensors files (8 bytes of length, then JSON), so that
planning needs neither torch nor the weights. Reading goes through safetensors: on CPU a tensor
stays a view into the mapped file, which all ranks of a machine share, until something converts it.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError

if TYPE_CHECKING:
    import torch

#: Names under which diffusers and transformers save a model's weights.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")

#: safetensors' dtype names → (torch's name, bytes per element).
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
}


class CheckpointError(UsageError):
    """Weight files that do not fit their model. Names the tensors."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk.

    Attributes:
        file: a safetensors file (or a pickled one, where that was allowed).
        key: the tensor's name inside it.
        dtype: torch's name of its type, such as ``"bfloat16"``.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("float", "bfloat"))

    def read(self) -> torch.Tensor:
        """The tensor on CPU as stored: a view into the mapped file, freed with its last use."""
        return next(read_tensors([self]))


def itemsize(dtype: str) -> int:
    """Bytes per element of torch's dtype name."""
    return _ITEMSIZES[dtype]


_ITEMSIZES = dict(DTYPES.values())


def read_tensors(stored: Iterable[StoredTensor]) -> Iterator[torch.Tensor]:
    """The tensors in order, on CPU as stored. A file stays open over neighbours that are in it."""
    opened: Path | None = None
    source: Any = None
    for tensor in stored:
        if tensor.file != opened:
            # The old file is let go of first: its mapping lives as long as a tensor or this does.
            source = None
            source, opened = _open(tensor.file), tensor.file
        yield source[tensor.key] if isinstance(source, dict) else source.get_tensor(tensor.key)


def _open(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        return safe_open(file, framework="pt", device="cpu")
    import torch

    # Files of torch before 1.6 are no zip archives and cannot be mapped.
    try:
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file} cannot be read as pickled weights: {reason}") from error


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file holds, by name; only its header is read.

    Raises:
        CheckpointError: not a safetensors file, or cut short.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if start.startswith(b"version "):
            raise CheckpointError(
                f"{file} is a git-lfs pointer, not the weights; fetch them with git lfs pull"
            )
        if not 0 < length <= size - 8:
            raise CheckpointError(
                f"{file} is not a safetensors file or is cut short: {size} bytes, "
                f"its header claims {length}"
            )
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    table: dict[str, StoredTensor] = {}
    end = 0
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{file}: {key} has type {entry['dtype']}; ddinfer reads {', '.join(DTYPES)}"
            )
        end = max(end, entry["data_offsets"][1])
        name = DTYPES[entry["dtype"]][0]
        table[key] = StoredTensor(file, key, name, tuple(entry["shape"]))
    if size < 8 + length + end:
        raise CheckpointError(
            f"{file} is cut short: it has {size} bytes, its tensors end at {8 + length + end}; "
            "fetch it again"
        )
    return table


def read_checkpoint(
    folder: Path, *, variant: str | None = None, allow_pickle: bool = False
) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, over all of its shards.

    Args:
        variant: takes ``model.VARIANT.safetensors`` where the folder has it, else the plain files.
        allow_pickle: takes pickled weights where there are no safetensors.

    Raises:
        CheckpointError: no weights, only pickled ones, a missing shard, or a broken file.
    """
    files = weight_files(folder, variant=variant, allow_pickle=allow_pickle)
    table: dict[str, StoredTensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            table.update(read_header(file))
        else:
            for key, tensor in _open(file).items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                table[key] = StoredTensor(file, key, dtype, tuple(tensor.shape))
    return table


def weight_files(
    folder: Path, *, variant: str | None = None, allow_pickle: bool = False
) -> list[Path]:
    """The weight files of a model folder, in order: one, or the shards its index names.

    Raises:
        CheckpointError: see `read_checkpoint`.
    """
    names = {p.name for p in folder.iterdir()}
    suffixes = [".safetensors", *(PICKLE_SUFFIXES[:1] if allow_pickle else ())]
    for name, suffix in weight_names(variant, suffixes):
        if name in names:
            is_index = name.endswith(".json")
            return _shards(folder / name, suffix) if is_index else [folder / name]
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise CheckpointError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}), which can run code "
            "when read; expected .safetensors. Convert them (load once with --allow_pickle and "
            "save_pretrained), or pass --allow_pickle if you trust them"
        )
    others = sorted(name for name in names if name.endswith(".safetensors"))
    hint = f"; it has {', '.join(others[:4])}: pass --variant" if others else ""
    raise CheckpointError(
        f"{folder} has no weights: expected {' or '.join(f'{s}.safetensors' for s in STEMS[:2])} "
        f"(or their .index.json){hint}"
    )


def weight_names(
    variant: str | None, suffixes: Sequence[str] = (".safetensors",)
) -> Iterator[tuple[str, str]]:
    """File names under which a model's weights (or their index) may be, first choice first."""
    for kind in dict.fromkeys((variant, None)):
        tag = f".{kind}" if kind else ""
        for suffix in suffixes:
            for stem in STEMS:
                # Newer and older spellings of a variant's index.
                yield f"{stem}{suffix}.index{tag}.json", suffix
                yield f"{stem}{tag}{suffix}.index.json", suffix
                yield f"{stem}{tag}{suffix}", suffix


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a model folder has weight files of that variant."""
    return any(f".{variant}." in p.name or f".{variant}-" in p.name for p in folder.iterdir())


def _shards(index: Path, suffix: str) -> list[Path]:
    """The files that an index names: all of its own kind, in its own folder or below."""
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(map(str, set(weight_map.values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards; expected a JSON object with weight_map, a table "
            f"of tensors and their files: {error!r}"
        ) from None
    for name in names:
        if not name.endswith(suffix) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(
                f"{index} names {name}; expected {suffix} files in or below {index.parent}"
            )
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(files)} files, {len(missing)} are missing: "
            f"{', '.join(missing[:4])}"
        )
    return files


def main_dtype(table: Mapping[str, StoredTensor]) -> str | None:
    """The floating type that most of a checkpoint's bytes have; ``None`` when it has none."""
    totals: dict[str, int] = {}
    for tensor in table.values():
        if tensor.is_floating:
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.num_bytes
    return max(totals, key=lambda name: totals[name]) if totals else None


def computing_dtype(table: Mapping[str, StoredTensor], folder: Path) -> str:
    """`main_dtype` as the type to compute in; float32 where nothing is floating.

    Raises:
        CheckpointError: a type of one byte, in which weights can only be stored.
    """
    found = main_dtype(table) or "float32"
    if itemsize(found) < 2:
        raise CheckpointError(
            f"{folder} is stored in {found}, in which PyTorch does not compute; give --dtype "
            "bfloat16 (dtype='bfloat16'), or float16 or float32"
        )
    return found
