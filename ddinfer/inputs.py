"""Inputs of a prompt that are media or objects: what the pipeline is given, and their identity.

A picture's path or a PIL image means what `diffusers.utils.load_image` makes of it: transposed as
its EXIF orientation says, then RGB. A mask is grey (``L``) after that, as diffusers' pipelines
convert it themselves. A video is the list of its frames, as of `diffusers.utils.load_video`; a
folder or a zip of pictures is one, too. Sound is a float tensor of shape ``(channels, samples)`` at
the sampling rate of the pipeline. Tensors, arrays and whatever else a program passes are given as
they are.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ddinfer.errors import InputError
from ddinfer.request import canonical_json

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

#: Call arguments that are images: a path relative to the prompt file, or a list of such paths.
IMAGE_INPUTS = (
    "image",
    "images",
    "mask",
    "mask_image",
    "control_image",
    "control_mask",
    "ip_adapter_image",
    "negative_ip_adapter_image",
    "image_reference",
    "last_image",
    "cond_image",
    "original_image",
    "reference_image",
    "reference_images",
    "input_images",
    "example_image",
    "gligen_images",
    "gligen_inpaint_image",
    "conditioning_frames",
)
#: Call arguments that are videos; a mask and a list of images may be one.
VIDEO_INPUTS = (
    "video",
    "control_video",
    "mask_video",
    "pose_video",
    "face_video",
    "background_video",
)
_VIDEO_OR_IMAGES = (*VIDEO_INPUTS, "conditioning_frames", "mask", "images", "reference_images")
#: Call arguments that are sound.
AUDIO_INPUTS = ("audio", "src_audio", "reference_audio", "initial_audio_waveforms")
#: Call arguments that a prompt gives by path.
MEDIA_INPUTS = (*IMAGE_INPUTS, *VIDEO_INPUTS, *AUDIO_INPUTS)

_CONTAINERS = ("mp4", "webm", "mov", "mkv", "avi", "m4v", "mpg", "mpeg")
_PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif")
_MASKS = ("mask", "mask_image", "control_mask")

#: Parts of a pipeline class's name → the images that it needs, whatever default they have.
_NEEDED = {
    ("Img2Img", "ImageToVideo", "Image2Video", "InstructPix2Pix", "Depth2Img", "Upscale"): (
        "image",
    ),
    ("Inpaint", "FluxFill"): ("image", "mask_image"),
}


def needed_images(kind: Any) -> list[str]:
    """Media arguments that no call of a pipeline class can leave out.

    Many of diffusers' signatures give ``image`` a default of ``None`` and their ``__call__``
    fails without it; there the class's name says so.
    """
    parameters = inspect.signature(kind.__call__).parameters
    needed = {n for n in MEDIA_INPUTS if n in parameters and _has_no_default(parameters[n])}
    if kind.__module__.startswith("diffusers."):
        for parts, names in _NEEDED.items():
            if any(part in kind.__name__ for part in parts):
                needed.update(names)
        if "Control" in kind.__name__:
            needed.add("control_image" if "control_image" in parameters else "image")
    return [name for name in MEDIA_INPUTS if name in needed and name in parameters]


def _has_no_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def load_input(name: str, value: Any, sampling_rate: int | None = None) -> tuple[Any, str]:
    """What the pipeline is given for an argument, and the SHA-256 of its content.

    Args:
        value: an absolute path, an object, or a list of them.
        sampling_rate: of the pipeline's sound; default: that of the file.

    Raises:
        OSError: a file that cannot be read, or is not of the kind that the argument takes.
        TypeError: an object whose content cannot be hashed.
    """
    if isinstance(value, (list, tuple)):
        loaded = [load_input(name, item, sampling_rate) for item in value]
        return [item for item, _ in loaded], join_hashes(digest for _, digest in loaded)
    if isinstance(value, str) and name in MEDIA_INPUTS:
        if name in AUDIO_INPUTS:
            return _as_tensor(name, read_audio(value, sampling_rate)[0]), _hash_of_file(value)
        if _is_video(name, value):
            return [_converted(name, frame) for frame in read_frames(value)], _hash_of_file(value)
        return _read_image(name, value)
    if _is_picture(value) and name in MEDIA_INPUTS:
        value = _converted(name, value)
    content = hashlib.sha256()
    try:
        _add_content(content, value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    return value, content.hexdigest()


def join_hashes(digests: Iterable[str]) -> str:
    """The hash of a list: that of its items' hashes, in order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def check_media_file(name: str, path: str) -> str:
    """SHA-256 of a file's bytes, after they were decoded as `load_input` does.

    Raises:
        InputError: why they cannot be.
    """
    from PIL import UnidentifiedImageError  # late: most prompt files name no image

    kind = "sound" if name in AUDIO_INPUTS else "a video" if _is_video(name, path) else "an image"
    if kind == "an image" and (_ending(path) in _CONTAINERS or os.path.isdir(path)):
        raise InputError(f"{name}: {path}: is a video or a folder; {name} takes a picture")
    why = f"not {kind} that can be decoded"
    try:
        if kind == "sound":
            read_audio(path)
        elif kind == "a video":
            if not sum(1 for _ in read_frames(path)):
                raise ValueError("no frames")
        else:
            return _read_image(name, path, check_only=True)[1]
        return _hash_of_file(path)
    except UnidentifiedImageError:
        pass
    except OSError as error:
        why = error.strerror or f"{why} ({error})"
    except Exception as error:  # noqa: BLE001  decoders of broken files raise anything
        why = f"{why} ({error})"
    raise InputError(f"{name}: {path}: {why}")


def _is_video(name: str, path: str) -> bool:
    """Whether a path is read as a list of frames for this argument."""
    if name not in _VIDEO_OR_IMAGES:
        return False
    return name in VIDEO_INPUTS or _ending(path) not in _PICTURES


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower().lstrip(".")


def read_frames(path: str) -> Iterator[Image]:
    """The pictures of a video file, an animation, or a folder or zip of pictures, in order."""
    from PIL import Image, ImageSequence

    if os.path.isdir(path):
        for name in _frame_names(os.listdir(path)):
            with Image.open(os.path.join(path, name)) as image:
                yield _converted("", image)
    elif _ending(path) == "zip":
        with zipfile.ZipFile(path) as archive:
            for name in _frame_names(archive.namelist()):
                with archive.open(name) as file, Image.open(file) as image:
                    yield _converted("", image)
    elif _ending(path) in _PICTURES:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield frame.convert("RGB")
    else:
        import av

        with av.open(path) as container:
            for decoded in container.decode(video=0):
                yield decoded.to_image()


def _frame_names(names: Iterable[str]) -> list[str]:
    """The pictures among ``names``, ``9.png`` before ``10.png``."""
    pictures = [name for name in names if _ending(name) in _PICTURES]
    return sorted(
        pictures,
        key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"([0-9]+)", name)],
    )


def read_audio(path: str, sampling_rate: int | None = None) -> tuple[np.ndarray, int]:
    """Sound of shape ``(channels, samples)``, float32, and its sampling rate.

    Args:
        sampling_rate: to which it is resampled; default: the file's own.
    """
    import av
    import numpy as np

    with av.open(path) as container:
        stream = container.streams.audio[0]
        rate = sampling_rate or stream.rate
        resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
        parts = [
            part.to_ndarray()
            for frame in (*container.decode(stream), None)
            for part in resampler.resample(frame)
        ]
    if not parts:
        raise ValueError("no samples")
    return np.concatenate(parts, axis=1), rate


def _as_tensor(name: str, audio: np.ndarray) -> Any:
    import torch

    tensor = torch.from_numpy(audio)
    return tensor[None] if name == "initial_audio_waveforms" else tensor  # a batch of one


def _hash_of_file(path: str) -> str:
    """SHA-256 of a file's bytes; of a folder: of its pictures' in their order."""
    if os.path.isdir(path):
        names = _frame_names(os.listdir(path))
        return join_hashes(_hash_of_file(os.path.join(path, name)) for name in names)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_image(name: str, path: str, *, check_only: bool = False) -> tuple[Image, str]:
    from PIL import Image

    with open(path, "rb") as file:
        data = file.read()
    with Image.open(io.BytesIO(data)) as image:
        if check_only:
            image.draft(None, (1, 1))  # a JPEG is read to its end, but not computed in full
        return _converted(name, image), hashlib.sha256(data).hexdigest()


def _converted(name: str, image: Image) -> Image:
    from PIL import ImageOps

    image.load()
    picture = ImageOps.exif_transpose(image).convert("RGB")
    return picture.convert("L") if name in _MASKS else picture


def _is_picture(value: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def is_plain(value: Any) -> bool:
    """Whether JSON can say a value, so that it is its own identity."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _add_content(digest: Any, value: Any) -> None:
    """Add everything that makes a value what it is; equal on every rank, whatever its device."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if _is_picture(value):
        digest.update(f"image {value.mode} {value.size}\n".encode())
        digest.update(value.tobytes())
    elif torch is not None and isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(flat.numpy().tobytes())
    elif numpy is not None and isinstance(value, numpy.ndarray) and value.dtype != object:
        digest.update(f"array {value.dtype.str} {value.shape}\n".encode())
        digest.update(value.tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"dict {canonical_json(sorted(value))}\n".encode())
        for key in sorted(value):
            _add_content(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)}\n".encode())
        for item in value:
            _add_content(digest, item)
    elif is_plain(value):
        digest.update(f"{canonical_json(value)}\n".encode())
    else:
        raise TypeError(
            f"found an object of type {type(value).__name__}; expected plain values, images, "
            "tensors or arrays. Pass other objects as keyword arguments, which apply to all prompts"
        )
