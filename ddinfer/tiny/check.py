"""What a picture shows, from its pixels alone; so that tests can tell whose picture it is.

The rules are strict: a picture must have one plain background and one or two plain, connected
figures, each much like one of the outlines and unlike the others. Anything else shows nothing.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from .draw import RADIUS, SIDE, mask, outline
from .world import COLOURS, SHAPES, Figure, Scene, parse

COLOUR_TOLERANCE = 45.0
"""How far the middle colour of an area may be from its name's, in RGB units."""
PIXEL_TOLERANCE = 60.0
"""How far a single pixel may be from the colour of its area."""
FLAT_SHARE = 0.9
"""The share of an area's pixels that must be within `PIXEL_TOLERANCE`."""
SPECK = 5
"""Stray areas of fewer pixels than this are overlooked."""
FIGURE = 40
"""A figure has at least so many pixels; what is between a speck and a figure spoils a picture."""
LIKENESS = 0.8
"""The least intersection over union of a figure and the outline it is taken for."""
MARGIN = 0.02
"""How much more it must be like that outline than like any other."""


def shows(image: Image.Image, prompt: str) -> bool:
    """Whether a picture shows all that a prompt names: shapes, colours, places, background.

    What the prompt leaves open may be anything. Raises `ValueError` for a prompt that does not
    describe a scene of this world.
    """
    asked = parse(prompt)
    if asked is None:
        raise ValueError(f"{prompt!r} does not name one shape, or two shapes in a relation")
    seen = describe(image)
    return seen is not None and seen.satisfies(asked)


def describe(image: Image.Image) -> Scene | None:
    """The scene that a picture shows, or `None` where it shows none clearly."""
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    picture = np.asarray(image, dtype=np.float32)
    edge = np.ones((SIDE, SIDE), bool)
    edge[2:-2, 2:-2] = False
    background = _plain_colour(picture[edge])
    if background is None:
        return None
    away = np.linalg.norm(picture - COLOURS[background], axis=2) > COLOUR_TOLERANCE
    areas = [area for area in _areas(away) if area.sum() >= SPECK]
    if not 1 <= len(areas) <= 2 or any(area.sum() < FIGURE for area in areas):
        return None
    found: list[tuple[Figure, float, float]] = []
    for area in areas:
        figure = _figure(picture, area, background)
        if figure is None:
            return None
        rows, columns = np.nonzero(area)
        found.append((figure, float(rows.mean()), float(columns.mean())))
    if len(found) == 1:
        return Scene((found[0][0],), background)
    (_, y0, x0), (_, y1, x1) = found
    down, across = abs(y0 - y1), abs(x0 - x1)
    if max(down, across) < 2 * min(down, across):
        return None
    axis = "column" if down > across else "row"
    found.sort(key=lambda each: each[1] if axis == "column" else each[2])
    return Scene((found[0][0], found[1][0]), background, axis)


def _plain_colour(pixels: np.ndarray) -> str | None:
    """The name of the one colour that pixels `(n, 3)` have, or `None`."""
    middle = np.median(pixels, axis=0)
    distances = {name: float(np.linalg.norm(middle - rgb)) for name, rgb in COLOURS.items()}
    name = min(distances, key=lambda colour: distances[colour])
    flat = np.linalg.norm(pixels - middle, axis=1) < PIXEL_TOLERANCE
    plain = distances[name] < COLOUR_TOLERANCE and flat.mean() >= FLAT_SHARE
    return name if plain else None


def _areas(marked: np.ndarray) -> list[np.ndarray]:
    """The connected areas of a mask `(height, width)`, diagonal neighbours included."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(marked), strict=True)}
    areas = []
    while left:
        todo, area = [left.pop()], np.zeros_like(marked)
        while todo:
            y, x = todo.pop()
            area[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo.extend(near)
        areas.append(area)
    return areas


def _inside(area: np.ndarray) -> np.ndarray:
    """The pixels of a mask whose neighbours on all four sides are in it too."""
    padded = np.pad(area, 1, mode="edge")
    return area & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _figure(picture: np.ndarray, area: np.ndarray, background: str) -> Figure | None:
    """The figure that fills an area, or `None`."""
    inside = _inside(area)
    if inside.sum() < SPECK:
        return None
    colour = _plain_colour(picture[inside])
    if colour is None or colour == background:
        return None
    base = np.asarray(COLOURS[background], np.float32)
    towards = np.asarray(COLOURS[colour], np.float32) - base
    cover = np.clip((picture - base) @ towards / (towards @ towards), 0, 1)
    cover[(cover < 0.15) | _inside(~area)] = 0
    fits = sorted(((_fit(cover, shape), shape) for shape in SHAPES), reverse=True)
    (likeness, scale), shape = fits[0]
    if likeness < LIKENESS or likeness - fits[1][0][0] < MARGIN:
        return None
    size = min(RADIUS, key=lambda name: abs(RADIUS[name] - scale))
    return Figure(colour, shape, size)


@cache
def _bounds(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest (x, y) of an outline, in its own units."""
    corners = np.asarray(outline(shape)[0])
    return corners.min(axis=0), corners.max(axis=0)


def _fit(cover: np.ndarray, shape: str) -> tuple[float, float]:
    """How like an outline a cover is (intersection over union), and its scale in pixels.

    The outline is stretched over the box that the cover fills, by at most a quarter.
    """
    low, high = (np.array(side) for side in zip(_extent(cover, 0), _extent(cover, 1), strict=True))
    least, most = _bounds(shape)
    scale = (high - low) / (most - least)
    if scale.max() > 1.25 * scale.min():
        return 0.0, float(scale.mean())
    centre = low - scale * least
    ideal = mask(shape, tuple(centre), tuple(scale))
    overlap = np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum()
    return float(overlap), float(scale.mean())


def _extent(cover: np.ndarray, axis: int) -> tuple[float, float]:
    """Where a cover begins and ends along x (axis 0) or y (axis 1), to a part of a pixel."""
    line = cover.max(axis=axis)
    filled = np.nonzero(line)[0]
    first, last = int(filled[0]), int(filled[-1])
    return first + 1 - float(line[first]), last + float(line[last])
