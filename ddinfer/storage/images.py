"""Paths of a job's images, and the text in their metadata."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ddinfer.errors import InputError
from ddinfer.request import Request, canonical_json
from ddinfer.storage.media import ENDINGS, read_text

IMAGES_FOLDER = "images"
IMAGES_PER_FOLDER = 10_000

#: Scheduler class → the name of its sampler in A1111-style tools.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "DEISMultistepScheduler": "DEIS",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "DPMSolverSinglestepScheduler": "DPM++ 2S a",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "FlowMatchEulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


def image_path(index: int, ending: str = "png") -> str:
    """Path below the output directory of what was made for Request ``index``."""
    return f"{IMAGES_FOLDER}/{index // IMAGES_PER_FOLDER:04d}/{index:08d}.{ending}"


def index_of(path: str) -> int | None:
    """The inverse of `image_path`; ``None`` for what it never returns."""
    stem, _, ending = os.path.basename(path).partition(".")
    if not (stem.isascii() and stem.isdigit() and ending in ENDINGS):
        return None
    index = int(stem)
    return index if path == image_path(index, ending) else None


def image_text(
    request: Request,
    info: Mapping[str, Any],
    *,
    size: tuple[int, int] | None,
    batch: Sequence[int] = (),
    exact: bool = True,
) -> dict[str, str]:
    """The metadata of a file: ``parameters`` for other tools, ``ddinfer`` to make it again.

    Args:
        info: common to the whole job (model, dtype, scheduler, num_threads, versions …).
            It must be the same in every run of the job, or the bytes are not.
        size: width and height in pixels, where there are any.
        batch: indices of the Requests that shared the pipeline call, in call order.
    """
    asked = request.to_dict()
    if request.input_hashes:
        # A path may differ between machines; the hash is what the image depends on.
        given = {n: v for n, v in request.kwargs.items() if n not in request.input_hashes}
        asked.pop("kwargs", None)
        asked.update({"kwargs": given} if given else {})
    record = {**info, "request": asked, "batch": list(batch) or [request.index], "exact": exact}
    return {
        "parameters": parameters_text(request, info, size=size),
        "ddinfer": canonical_json(record),
    }


def parameters_text(
    request: Request, info: Mapping[str, Any], *, size: tuple[int, int] | None
) -> str:
    """Prompt and settings as A1111-style tools write them and read them back."""
    settings: dict[str, Any] = {}
    defaults = info.get("call_defaults", {})
    asked = {**defaults, **request.parameters()}
    settings["Steps"] = asked.pop("num_inference_steps", None)
    scheduler = request.settings().get("scheduler", info.get("scheduler"))
    scheduler = None if scheduler is None else str(scheduler).partition(":")[0]
    settings["Sampler"] = _SAMPLERS.get(scheduler, scheduler) if scheduler else None
    settings["CFG scale"] = asked.pop("guidance_scale", None)
    settings["Seed"] = request.seed
    settings["Size"] = None if size is None else f"{size[0]}x{size[1]}"
    settings["Model"] = info.get("model")
    settings["Clip skip"] = asked.pop("clip_skip", None)
    settings["Denoising strength"] = asked.pop("strength", None)
    settings["Version"] = f"ddinfer {info['version']}" if "version" in info else "ddinfer"
    line = ", ".join(f"{name}: {_quoted(v)}" for name, v in settings.items() if v is not None)
    negative = request.negative_prompt
    middle = f"\nNegative prompt: {negative}" if negative else ""
    return f"{request.prompt}{middle}\n{line}"


def _quoted(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    if not any(mark in text for mark in ",:\n"):
        return text
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class ImageRecord:
    """What is needed to generate an image again: the ``ddinfer`` text of its file.

    Attributes:
        request: a `Request` as a dict.
        batch: indices of the Requests that shared the pipeline call, in call order.
        model: name of the model; `model_hash` is of its files.
        dtype: ``checkpoint``, where it was the checkpoint's own, or as ``--dtype`` takes it.
        versions: of the libraries that made it.
        loras: name → hash of its file.
        setup: function and hash of the file of ``--setup``.
    """

    request: dict[str, Any]
    batch: list[int]
    model: str
    model_hash: str
    revision: str | None
    variant: str | None
    dtype: str
    device: str
    num_threads: int
    attention_backend: str | None
    vae_tiling: bool
    vae_slicing: bool
    compile: bool
    versions: dict[str, str]
    fps: float | None = None
    image_format: Literal["png", "jpg", "webp"] = "png"
    video_format: Literal["mp4", "webm", "apng", "frames"] = "apng"
    audio_format: Literal["wav", "flac"] = "wav"
    cfg_parallel: int = 1
    sequence_parallel: int = 1
    loras: dict[str, dict[str, str]] = field(default_factory=dict)
    setup: dict[str, str] | None = None
    quantize: list[str] = field(default_factory=list)


def read_metadata(path: str) -> ImageRecord:
    """Read the ``ddinfer`` text of a file that is whole.

    Raises:
        InputError: no such file, damaged, not made by ddinfer, or its text lacks something. Names
            the file.
    """
    import pydantic
    from PIL.Image import DecompressionBombError

    try:
        text = read_text(path).get("ddinfer")
    except (
        SyntaxError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        DecompressionBombError,
    ) as error:
        raise InputError(f"is damaged: {error}", file=path) from None
    except OSError as error:
        reason = error.strerror or f"is none of {', '.join(ENDINGS)}, or is damaged"
        raise InputError(reason, file=path) from None
    if text is None:
        raise InputError("has no ddinfer text; was it made or saved by another tool?", file=path)
    damaged = "has a damaged ddinfer text"
    try:
        record = pydantic.TypeAdapter(ImageRecord).validate_json(text, strict=True)
        index = Request.from_dict(record.request).index
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise InputError(f"{damaged}: {where}: {first['msg']}", file=path) from None
    except ValueError as error:
        raise InputError(f"{damaged}: {error}", file=path) from None
    if index not in record.batch or record.num_threads < 1:
        raise InputError(
            f"{damaged}: image {index} of batch {record.batch}, {record.num_threads} threads",
            file=path,
        )
    return record


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
