"""Inputs of a prompt that are images or objects: what the pipeline is given, and their identity.

A path or a PIL image means what `diffusers.utils.load_image` makes of it: transposed as its EXIF
orientation says, then RGB. A mask is grey (``L``) after that, as diffusers' pipelines convert it
themselves. Tensors, arrays and whatever else a program passes are given as they are.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ddinfer.errors import InputError
from ddinfer.request import canonical_json

if TYPE_CHECKING:
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
    "video",
)
_MASKS = ("mask", "mask_image", "control_mask")

#: Parts of a pipeline class's name → the images that it needs, whatever default they have.
_NEEDED = {
    ("Img2Img", "ImageToVideo", "Image2Video", "InstructPix2Pix", "Depth2Img", "Upscale"): (
        "image",
    ),
    ("Inpaint", "FluxFill"): ("image", "mask_image"),
}


def needed_images(kind: Any) -> list[str]:
    """Image arguments that no call of a pipeline class can leave out.

    Many of diffusers' signatures give ``image`` a default of ``None`` and their ``__call__``
    fails without it; there the class's name says so.
    """
    parameters = inspect.signature(kind.__call__).parameters
    needed = {n for n in IMAGE_INPUTS if n in parameters and _has_no_default(parameters[n])}
    if kind.__module__.startswith("diffusers."):
        for parts, names in _NEEDED.items():
            if any(part in kind.__name__ for part in parts):
                needed.update(names)
        if "Control" in kind.__name__:
            needed.add("control_image" if "control_image" in parameters else "image")
    return [name for name in IMAGE_INPUTS if name in needed and name in parameters]


def _has_no_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def load_input(name: str, value: Any) -> tuple[Any, str]:
    """What the pipeline is given for an argument, and the SHA-256 of its content.

    Args:
        value: an absolute path, an object, or a list of them.

    Raises:
        OSError: a file that cannot be read, or is not an image.
        TypeError: an object whose content cannot be hashed.
    """
    if isinstance(value, (list, tuple)):
        loaded = [load_input(name, item) for item in value]
        return [item for item, _ in loaded], join_hashes(digest for _, digest in loaded)
    if isinstance(value, str) and name in IMAGE_INPUTS:
        return _read_image(name, value)
    if _is_picture(value) and name in IMAGE_INPUTS:
        value = _converted(name, value)
    digest = hashlib.sha256()
    try:
        _add_content(digest, value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    return value, digest.hexdigest()


def join_hashes(digests: Iterable[str]) -> str:
    """The hash of a list: that of its items' hashes, in order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def check_image_file(name: str, path: str) -> str:
    """SHA-256 of an image file's bytes, after they were decoded as `load_input` does.

    Raises:
        InputError: why they cannot be.
    """
    from PIL import UnidentifiedImageError  # late: most prompt files name no image

    try:
        return _read_image(name, path, check_only=True)[1]
    except UnidentifiedImageError:
        why = "not an image that Pillow can open"
    except OSError as error:
        why = error.strerror or f"not an image that Pillow can open ({error})"
    except Exception as error:  # noqa: BLE001  decoders of broken files raise anything
        why = f"not an image that Pillow can open ({error})"
    raise InputError(f"{name}: {path}: {why}")


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
