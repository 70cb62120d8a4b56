"""The world of the embedded models: what can be in a picture, and the words for it.

A scene holds one figure, or two figures in a relation, on a plain background. Everything here is
a value or a pure function of values and a random generator: no torch, no pixels.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 50),
    "green": (30, 150, 60),
    "blue": (35, 80, 215),
    "purple": (125, 45, 165),
    "pink": (250, 145, 200),
    "gray": (135, 135, 135),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
SIZES = ("small", "medium", "large")
RELATIONS = ("above", "below", "left", "right")

HELD_OUT = frozenset(
    {
        ("red", "star"),
        ("orange", "cross"),
        ("yellow", "diamond"),
        ("green", "heart"),
        ("blue", "triangle"),
        ("purple", "circle"),
        ("pink", "square"),
        ("black", "ring"),
    }
)
"""Colour-shape pairs that no training picture and no training caption contains."""

SYNONYMS = {
    "grey": "gray",
    "violet": "purple",
    "disc": "circle",
    "rhombus": "diamond",
    "plus": "cross",
    "tiny": "small",
    "little": "small",
    "big": "large",
    "huge": "large",
    "over": "above",
    "top": "above",
    "under": "below",
    "beneath": "below",
    "backdrop": "background",
}
_GLUE = (
    *("a", "an", "the", "one", "of", "on", "to", "with", "against", "and", "is", "in"),
    *("picture", "drawing", "image", "background"),
)

VOCABULARY = tuple(sorted({*COLOURS, *SHAPES, *SIZES, *RELATIONS, *SYNONYMS, *_GLUE}))
"""Every word the text encoders know, in lower case."""
_KNOWN = frozenset(VOCABULARY)


@dataclass(frozen=True)
class Figure:
    """One coloured shape. A size of `None` means that nothing was said about it."""

    colour: str | None
    shape: str
    size: str | None = None

    def decided(self) -> tuple[str, str, str]:
        """Colour, shape and size of a figure of which all three are known."""
        if self.colour is None or self.size is None:
            raise ValueError(f"{self} leaves its colour or its size open")
        return self.colour, self.shape, self.size


@dataclass(frozen=True)
class Scene:
    """What a picture shows, or what a prompt asks for.

    With two figures the first is the left or upper one and `axis` is "row" or "column";
    with one figure `axis` is `None`. A background of `None` means that nothing was said.
    """

    figures: tuple[Figure, ...]
    background: str | None = None
    axis: str | None = None

    def satisfies(self, asked: Scene) -> bool:
        """Whether a picture of this scene shows everything that `asked` names."""
        if len(self.figures) != len(asked.figures) or self.axis != asked.axis:
            return False
        if asked.background is not None and self.background != asked.background:
            return False
        return all(
            seen.shape == want.shape
            and want.colour in (None, seen.colour)
            and want.size in (None, seen.size)
            for seen, want in zip(self.figures, asked.figures, strict=True)
        )

    @property
    def held_out(self) -> bool:
        """Whether the scene contains a colour-shape pair that is never trained on."""
        return any((figure.colour, figure.shape) in HELD_OUT for figure in self.figures)


def words(prompt: str) -> list[str]:
    """The words of a prompt, in lower case and without punctuation."""
    return re.findall(r"[a-z0-9']+", prompt.lower())


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that the embedded models were never taught, in order, once each."""
    return list(dict.fromkeys(word for word in words(prompt) if word not in _KNOWN))


def parse(prompt: str) -> Scene | None:
    """What a prompt asks for, or `None` where it does not describe a scene of this world."""
    colour = size = background = relation = None
    figures: list[Figure] = []
    for word in (SYNONYMS.get(word, word) for word in words(prompt)):
        if word in COLOURS:
            colour = word
        elif word in SIZES:
            size = word
        elif word in SHAPES:
            figures.append(Figure(colour, word, size))
            colour = size = None
        elif word == "background":
            background, colour = colour, None
        elif word in RELATIONS and len(figures) == 1:
            relation = word
    if len(figures) == 1 and relation is None:
        return Scene((figures[0],), background)
    if len(figures) != 2 or relation is None:
        return None
    if relation in ("below", "right"):
        figures.reverse()
    axis = "column" if relation in ("above", "below") else "row"
    return Scene((figures[0], figures[1]), background, axis)


def default_background(figures: tuple[Figure, ...]) -> str:
    """The background of a picture whose caption names none: white, or black behind white."""
    return "black" if any(figure.colour == "white" for figure in figures) else "white"


def random_scene(rng: random.Random, *, pairs: float = 0.5, held_out: bool = False) -> Scene:
    """A complete scene: sizes, colours and background are all decided.

    `pairs` is the share of scenes with two figures. With `held_out` the scene contains at least
    one held-out colour-shape pair, without it none.
    """
    while True:
        count = 2 if rng.random() < pairs else 1
        colours = rng.sample(sorted(COLOURS), count)
        size = "small" if count == 2 else rng.choice(SIZES)
        figures = tuple(Figure(colour, rng.choice(SHAPES), size) for colour in colours)
        background = default_background(figures)
        if rng.random() < 0.6 or background in colours:
            background = rng.choice([c for c in sorted(COLOURS) if c not in colours])
        axis = rng.choice(("row", "column")) if count == 2 else None
        scene = Scene(figures, background, axis)
        if scene.held_out == held_out:
            return scene


def caption(scene: Scene, rng: random.Random) -> str:
    """A description of a complete scene, in one of many wordings.

    Figures of a pair are always small and their size is not named; "medium" rarely is. The
    background is named unless it is the default one.
    """
    prefix = rng.choice(("", "", "", "a picture of ", "a drawing of ", "an image of "))
    figures = list(scene.figures)
    if scene.axis is None:
        text = _figure_words(figures[0], rng, with_size=True)
    else:
        relation = _relation_words(scene.axis, rng)
        if relation[0]:
            figures.reverse()
        first, second = (_figure_words(figure, rng, with_size=False) for figure in figures)
        text = f"{first} {relation[1]} {second}"
    assert scene.background is not None
    if scene.background != default_background(scene.figures) or rng.random() < 0.4:
        text += _background_words(scene.background, rng)
    text = prefix + text
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.1 else "")


def _said(word: str, rng: random.Random) -> str:
    """The word or, now and then, a synonym of it."""
    others = [alias for alias, meaning in SYNONYMS.items() if meaning == word]
    return rng.choice(others) if others and rng.random() < 0.25 else word


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _figure_words(figure: Figure, rng: random.Random, *, with_size: bool) -> str:
    colour, shape, size = figure.decided()
    named = [_said(colour, rng), _said(shape, rng)]
    if with_size and (size != "medium" or rng.random() < 0.15):
        named.insert(0, _said(size, rng))
    article = rng.choices((_article(named[0]), "the", "one", ""), (85, 6, 3, 6))[0]
    return " ".join([article, *named]).strip()


def _relation_words(axis: str, rng: random.Random) -> tuple[bool, str]:
    """Whether the second figure is named first, and the words between them."""
    backwards = rng.random() < 0.5
    there: tuple[str, ...]
    here: tuple[str, ...]
    if axis == "column":
        there = ("below", "below", "under", "beneath")
        here = ("above", "above", "over", "on top of")
    else:
        there = ("to the right of", "right of")
        here = ("to the left of", "left of")
    return backwards, rng.choice(there if backwards else here)


def _background_words(colour: str, rng: random.Random) -> str:
    named = _said(colour, rng)
    place = rng.choices((f"on {_article(named)}", "on the", "against a", "with a"), (7, 1, 1, 1))[0]
    return f" {place} {named} {_said('background', rng)}"
