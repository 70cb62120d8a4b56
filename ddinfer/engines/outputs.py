"""What a pipeline's call returned → pictures and sound for each Request."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddinfer.models.check import AUDIO_FIELDS, IMAGE_FIELDS, OUTPUT_FIELDS, VIDEO_FIELDS


@dataclass(frozen=True)
class Output:
    """What a call made for one Request; the fields are those of a `Result`."""

    image: Image.Image | None = None
    frames: Sequence[Image.Image] | None = None
    audio: np.ndarray | None = None
    sampling_rate: int | None = None
    fps: float | None = None
    flags: tuple[str, ...] = ()


def outputs_of(
    pipe: Any, returned: Any, num_requests: int, arguments: Mapping[str, Any]
) -> list[Output]:
    """One `Output` for each of ``num_requests`` Requests.

    Args:
        returned: an output of diffusers: a dataclass with some of `OUTPUT_FIELDS`.
        arguments: of the call.

    Raises:
        RuntimeError: fields that are not known, or another number of outputs than Requests.
    """
    names = [name for name in OUTPUT_FIELDS if getattr(returned, name, None) is not None]
    shown = next((name for name in names if name not in AUDIO_FIELDS), None)
    heard = next((name for name in names if name in AUDIO_FIELDS), None)
    if shown is None and heard is None:
        raise RuntimeError(
            f"{type(pipe).__name__} returned a {type(returned).__name__} without any of "
            f"{', '.join(OUTPUT_FIELDS)}"
        )
    batches = {name: _batch(pipe, name, getattr(returned, name), num_requests) for name in names}
    unsafe = getattr(returned, "nsfw_content_detected", None) or [False] * num_requests
    outputs = []
    for k in range(num_requests):
        flags = ["nsfw"] if unsafe[k] else []
        pictures: list[Image.Image] = []
        if shown is not None:
            pictures = _pictures(pipe, shown, batches[shown][k], flags)
            if all(_is_black(picture) for picture in pictures):
                flags.append("black")
        audio = None if heard is None else _sound(batches[heard][k], flags)
        rate = None if audio is None else sampling_rate(pipe)
        is_video = shown in VIDEO_FIELDS or len(pictures) > 1
        outputs.append(
            Output(
                image=None if is_video or not pictures else pictures[0],
                frames=pictures if is_video else None,
                audio=audio,
                sampling_rate=rate,
                fps=_fps(pipe, arguments, len(pictures), audio, rate) if is_video else None,
                flags=tuple(flags),
            )
        )
    return outputs


def takes_output_type(pipe: Any) -> bool:
    """Whether a pipeline returns its pictures as arrays of numbers, in which NaN is visible."""
    has_processor = any(
        hasattr(getattr(pipe, name, None), "numpy_to_pil")
        for name in ("image_processor", "video_processor")
    )
    return has_processor and "output_type" in inspect.signature(pipe.__call__).parameters


def sampling_rate(pipe: Any) -> int:
    """Of the sound that a pipeline makes and takes, in samples per second.

    Raises:
        RuntimeError: none of its components says.
    """
    for name in ("vocoder", "sound_tokenizer", "audio_vae", "vae", "unet"):
        config = getattr(getattr(pipe, name, None), "config", None)
        for key in ("output_sampling_rate", "sampling_rate", "sample_rate"):
            rate = getattr(config, key, None)
            if isinstance(rate, int):
                return rate
    rate = getattr(pipe, "sample_rate", None)
    if isinstance(rate, int):
        return rate
    raise RuntimeError(f"{type(pipe).__name__} does not say the sampling rate of its sound")


def _batch(pipe: Any, name: str, value: Any, num_requests: int) -> Sequence[Any]:
    """One item for each Request. Some pipelines return one video or sound as it is."""
    dims = {**dict.fromkeys(VIDEO_FIELDS, 5), **dict.fromkeys(IMAGE_FIELDS, 4)}.get(name, 2)
    is_bare = num_requests == 1 and getattr(value, "ndim", dims) < dims
    is_bare = is_bare or (name in VIDEO_FIELDS and all(isinstance(v, Image.Image) for v in value))
    is_bare = is_bare or (name in AUDIO_FIELDS and num_requests == 1 and len(value) == 2)
    if is_bare:
        return [value]
    if len(value) != num_requests:
        raise RuntimeError(
            f"{type(pipe).__name__} returned {len(value)} {name} for {num_requests} prompts"
        )
    return value


def _pictures(pipe: Any, name: str, item: Any, flags: list[str]) -> list[Image.Image]:
    from diffusers.image_processor import VaeImageProcessor

    if isinstance(item, Image.Image):
        return [item]
    if isinstance(item, (list, tuple)):
        return [picture for part in item for picture in _pictures(pipe, name, part, flags)]
    pixels = item
    if isinstance(item, torch.Tensor):
        pixels = np.moveaxis(item.detach().cpu().float().numpy(), -3, -1)
    if pixels.dtype == np.uint8:
        frames = pixels if pixels.ndim == 4 else pixels[None]
        return [Image.fromarray(frame.squeeze()) for frame in frames]
    if np.isnan(pixels).any() and "nan" not in flags:
        flags.append("nan")
    with np.errstate(invalid="ignore"):  # NaN becomes black, and is flagged
        if name == "prediction":
            return [_prediction(pixels)]
        processor = getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)
        return list(getattr(processor, "numpy_to_pil", VaeImageProcessor.numpy_to_pil)(pixels))


def _prediction(pixels: np.ndarray) -> Image.Image:
    """Depth as 16 bits, normals as colours: as diffusers' MarigoldImageProcessor draws them."""
    if pixels.shape[-1] == 1:
        return Image.fromarray((pixels[..., 0] * (2**16 - 1)).astype(np.uint16))
    return Image.fromarray(((pixels + 1.0) * 0.5 * 255).astype(np.uint8))


def _sound(item: Any, flags: list[str]) -> np.ndarray:
    """Float32 of shape ``(channels, samples)``."""
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu().float().numpy()
    audio = np.atleast_2d(np.asarray(item, np.float32))
    if audio.ndim != 2:
        raise RuntimeError(f"sound of shape {audio.shape}; expected (channels, samples)")
    if np.isnan(audio).any():
        flags.append("nan")
    if not audio.any():
        flags.append("silent")
    return audio


def _fps(
    pipe: Any,
    arguments: Mapping[str, Any],
    num_frames: int,
    audio: np.ndarray | None,
    rate: int | None,
) -> float | None:
    """What the pipeline was called with, else what makes the frames as long as the sound."""
    parameters = inspect.signature(pipe.__call__).parameters
    for name in ("frame_rate", "fps"):
        default = parameters[name].default if name in parameters else None
        value = arguments.get(name, default)
        if isinstance(value, (int, float)) and value > 0:
            return float(value)
    if audio is None or rate is None:
        return None
    return round(num_frames * rate / audio.shape[1], 3)


def _is_black(picture: Image.Image) -> bool:
    return picture.convert("RGB").getbbox() is None
