"""Pictures of scenes: the only source of training images, so there is no licence to mind.

A figure is a polygon (a ring is one with a hole) in unit coordinates: x to the right, y down,
the origin at its middle, everything within about one unit of it. Masks are drawn four times too
large and averaged, so that edges are smooth.
"""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .world import COLOURS, Scene

SIDE = 64
"""Width and height of a picture, in pixels."""

RADIUS = {"small": 11.0, "medium": 16.0, "large": 22.0}
"""Half the extent of a figure, in pixels."""

JITTER = {"small": 4.0, "medium": 3.0, "large": 1.5}
"""How far the middle of a single figure strays from the picture's, in pixels, each way."""

PAIR_OFFSET = 15.0
PAIR_JITTER = 1.5
_OVERSAMPLE = 4

Loop = tuple[tuple[float, float], ...]


def _regular(corners: int, radius: float, start: float = -math.pi / 2) -> Loop:
    angles = [start + 2 * math.pi * k / corners for k in range(corners)]
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


def _star() -> Loop:
    outer, inner = _regular(5, 1.05), _regular(5, 0.44, -math.pi / 2 + math.pi / 5)
    return tuple((x, y + 0.08) for pair in zip(outer, inner, strict=True) for x, y in pair)


def _heart() -> Loop:
    points = []
    for k in range(72):
        t = 2 * math.pi * k / 72
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.96 * x / 16, -0.96 * (y + 2.5) / 14.5))
    return tuple(points)


@cache
def outline(shape: str) -> tuple[Loop, ...]:
    """The loops of a shape in unit coordinates: the outer edge, then a hole if it has one."""
    a, b = 0.3, 0.92
    loops: dict[str, tuple[Loop, ...]] = {
        "circle": (_regular(72, 0.92),),
        "square": (((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)),),
        "triangle": (((0.0, -0.92), (0.98, 0.78), (-0.98, 0.78)),),
        "star": (_star(),),
        "heart": (_heart(),),
        "diamond": (((0.0, -1.02), (0.74, 0.0), (0.0, 1.02), (-0.74, 0.0)),),
        "cross": (
            (
                (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
                (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
            ),
        ),
        "ring": (_regular(72, 0.96), _regular(72, 0.52)),
    }  # fmt: skip
    return loops[shape]


def mask(shape: str, centre: tuple[float, float], scale: tuple[float, float]) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1, shape `(SIDE, SIDE)`.

    `centre` is (x, y) in pixels, `scale` the pixels of one unit along x and y.
    """
    large = Image.new("L", (SIDE * _OVERSAMPLE, SIDE * _OVERSAMPLE))
    pen = ImageDraw.Draw(large)
    for fill, loop in zip((255, 0), outline(shape), strict=False):
        # PIL's pixel k covers k to k + 1, its coordinates name the middle.
        pen.polygon(
            [
                (
                    (centre[0] + scale[0] * x) * _OVERSAMPLE - 0.5,
                    (centre[1] + scale[1] * y) * _OVERSAMPLE - 0.5,
                )
                for x, y in loop
            ],
            fill=fill,
        )
    return np.asarray(large.reduce(_OVERSAMPLE), dtype=np.float32) / 255


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """A picture of a complete scene, uint8 of shape `(SIDE, SIDE, 3)`."""
    assert scene.background is not None
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = COLOURS[scene.background]
    middle = SIDE / 2
    if scene.axis is None:
        places = [(middle, middle)]
    else:
        near, far = middle - PAIR_OFFSET, middle + PAIR_OFFSET
        places = (
            [(near, middle), (far, middle)]
            if scene.axis == "row"
            else [(middle, near), (middle, far)]
        )
    for figure, (x, y) in zip(scene.figures, places, strict=True):
        colour, shape, size = figure.decided()
        stray = PAIR_JITTER if scene.axis else JITTER[size]
        centre = (x + rng.uniform(-stray, stray), y + rng.uniform(-stray, stray))
        radius = RADIUS[size] * rng.uniform(0.96, 1.04)
        cover = mask(shape, centre, (radius, radius))[..., None]
        picture += cover * (np.asarray(COLOURS[colour], np.float32) - picture)
    return np.rint(picture).astype(np.uint8)
