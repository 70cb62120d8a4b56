"""PNG encoders compared: CPU milliseconds and bytes for a 512² picture, the best of nine.

    launch/bench --only png

"natural" has the spectrum of photographs and a little sensor noise; "flat" is a drawing.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from bench.measure import Size
from bench.report import table
from ddinfer.storage.png import encode_png

ABOUT = "PNG encoders: CPU time and size of a 512² picture"
EXPECTED_SECONDS = 10
SIZE = 512


def natural() -> Image.Image:
    rng = np.random.default_rng(0)
    frequency = np.fft.fftfreq(SIZE)[:, None] ** 2 + np.fft.fftfreq(SIZE)[None] ** 2
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = np.fft.fft2(rng.standard_normal((SIZE, SIZE))) / frequency**0.6
        plane = np.fft.ifft2(spectrum).real
        planes.append((plane - plane.min()) / np.ptp(plane))
    colours = 0.4 * np.stack(planes, -1) + 0.6 * planes[0][..., None]
    noisy = 255 * colours + rng.normal(0, 1, colours.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def flat() -> Image.Image:
    pixels = np.full((SIZE, SIZE, 3), 200, np.uint8)
    pixels[100:300, 100:300] = (255, 0, 0)
    pixels[50:80, :, 1] = np.arange(SIZE) % 256
    return Image.fromarray(pixels)


def pillow(image: Image.Image, **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


ENCODERS: dict[str, Callable[[Image.Image], bytes]] = {
    "ddinfer (Up filter, run lengths)": encode_png,
    "Pillow, run lengths": lambda image: pillow(image, compress_type=3),
    "Pillow, level 1": lambda image: pillow(image, compress_level=1),
    "Pillow, level 6 (its default)": lambda image: pillow(image, compress_level=6),
}


def measure(size: Size) -> dict[str, Any]:
    """→ picture → encoder → its milliseconds and kilobytes."""
    return {
        name: {
            encoder: {
                "cpu_ms": round(milliseconds(encode, image), 2),
                "kilobytes": round(len(encode(image)) / 1000),
            }
            for encoder, encode in ENCODERS.items()
        }
        for name, image in (("natural", natural()), ("flat", flat()))
    }


def tables(figures: Mapping[str, Any]) -> str:
    rows = [
        [encoder, *(f"{told[encoder]['cpu_ms']:.1f} ms, {told[encoder]['kilobytes']} kB"
                    for told in figures.values())]
        for encoder in next(iter(figures.values()))
    ]  # fmt: skip
    return table(["", *(f"a {name} picture" for name in figures)], rows)


def milliseconds(encode: Callable[[Image.Image], bytes], image: Image.Image) -> float:
    """The best of nine, in CPU time."""
    best = float("inf")
    for _ in range(9):
        before = time.process_time()
        encode(image)
        best = min(best, time.process_time() - before)
    return 1000 * best
