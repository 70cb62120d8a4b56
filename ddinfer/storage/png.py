"""Images as PNG bytes: lossless, fast, and the same bytes for the same picture and metadata.

An own encoder, because it is three times as fast as Pillow's fastest setting at the same size
(bench/png.py measures it): the Up filter makes neighbouring rows cancel, and zlib's
run-length strategy skips the search for matches that such data does not have.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels → PNG colour type
_UP = 2


def encode_png(image: Image, text: Mapping[str, str] | None = None) -> bytes:
    """One image as PNG.

    Args:
        text: keyword → text, written before the pixels.

    Raises:
        ValueError: an image mode that PNG does not have.
    """
    pixels, bits = _pixels(image)
    return b"".join(
        (_head(pixels, bits), *_text_chunks(text), _chunk(b"IDAT", _deflate(pixels)), _END)
    )


def encode_animation(
    frames: Sequence[Image], fps: float, text: Mapping[str, str] | None = None
) -> bytes:
    """Images of one size as an animated PNG: lossless, each frame kept, even equal ones.

    Programs without support for animated PNG show the first frame.

    Args:
        fps: frames per second.
    """
    if not frames:
        raise ValueError("a video without frames")
    if len(frames) == 1:
        return encode_png(frames[0], text)
    numerator, denominator = _frame_delay(fps)
    parts: list[bytes] = []
    sequence = 0
    first_shape: tuple[int, ...] = ()
    for k, frame in enumerate(frames):
        pixels, bits = _pixels(frame)
        if k == 0:
            first_shape = pixels.shape
            parts.append(_head(pixels, bits))
            parts.extend(_text_chunks(text))
            parts.append(_chunk(b"acTL", struct.pack(">II", len(frames), 0)))
        elif pixels.shape != first_shape:
            raise ValueError(f"frame {k} is {pixels.shape}, the first is {first_shape}")
        height, width = pixels.shape[:2]
        control = (sequence, width, height, 0, 0, numerator, denominator, 0, 0)
        parts.append(_chunk(b"fcTL", struct.pack(">IIIIIHHBB", *control)))
        sequence += 1
        data = _deflate(pixels)
        if k == 0:
            parts.append(_chunk(b"IDAT", data))
        else:
            parts.append(_chunk(b"fdAT", struct.pack(">I", sequence) + data))
            sequence += 1
    return b"".join((*parts, _END))


def _pixels(image: Image) -> tuple[np.ndarray, int]:
    """Array of shape ``(height, width, channels)``, and bits per channel."""
    import numpy as np

    if image.mode in ("1", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"):
        plain = {"1": "L", "P": "RGBA" if "transparency" in image.info else "RGB", "PA": "RGBA"}
        image = image.convert(plain.get(image.mode, "RGB"))
    if image.mode in ("I;16", "I;16B", "I;16L"):
        grey = np.asarray(image).astype(">u2")
        return grey.view(np.uint8).reshape(*grey.shape, 2), 16
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ValueError(f"a picture of mode {image.mode!r} cannot be saved as PNG; convert it")
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1), 8


def _deflate(pixels: np.ndarray) -> bytes:
    import numpy as np

    height = pixels.shape[0]
    rows = pixels.reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return packer.compress(filtered.data) + packer.flush()


def _head(pixels: np.ndarray, bits: int) -> bytes:
    height, width, per_pixel = pixels.shape
    colour = _COLOUR_TYPES[per_pixel * 8 // bits]
    fields = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", fields)


def _chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", crc)))


_END = _chunk(b"IEND", b"")


def _text_chunks(text: Mapping[str, str] | None) -> Iterator[bytes]:
    for keyword, value in (text or {}).items():
        key = keyword.encode("latin-1")
        if value.isascii():
            yield _chunk(b"tEXt", key + b"\0" + value.encode("ascii"))
        else:
            yield _chunk(b"iTXt", key + b"\0\0\0\0\0" + value.encode("utf-8"))


def _frame_delay(fps: float) -> tuple[int, int]:
    if fps == int(fps) and 0 < fps <= 0xFFFF:
        return 1, int(fps)
    return min(0xFFFF, max(1, round(1000 / fps))), 1000
