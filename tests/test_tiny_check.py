"""The checker of pictures: right on drawn ones, and hard to fool."""

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ddinfer.tiny.check import describe, shows
from ddinfer.tiny.draw import SIDE, draw, mask
from ddinfer.tiny.world import COLOURS, SHAPES, Figure, Scene, caption, random_scene


def drawn(count, seed, **choices):
    """Scenes, a caption of each and its picture."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, **choices) for _ in range(count)]
    return [(scene, caption(scene, rng), Image.fromarray(draw(scene, rng))) for scene in scenes]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_drawn_pictures_are_read_right(pairs, held_out):
    cases = drawn(200, seed=7, pairs=pairs, held_out=held_out)
    right = sum(describe(picture) == scene for scene, _, picture in cases)
    assert right >= 198


def test_drawn_pictures_show_their_own_prompt_and_not_anothers():
    cases = drawn(150, seed=8)
    seen = [picture for _, _, picture in cases]
    assert sum(shows(picture, prompt) for _, prompt, picture in cases) >= 149
    wrong = sum(shows(picture, cases[(k + 1) % 150][1]) for k, picture in enumerate(seen))
    assert wrong <= 3


def test_a_picture_that_differs_in_one_respect_is_never_accepted():
    rng = random.Random(9)
    figures = (Figure("red", "circle", "small"), Figure("blue", "square", "small"))
    asked = Scene(figures, "yellow", "row")
    wrong = [Scene(figures, "yellow", "column"), Scene(figures[::-1], "yellow", "row")]
    wrong += [
        Scene(figures, other, "row") for other in COLOURS if other not in ("red", "blue", "yellow")
    ]
    for shape in SHAPES[1:]:
        wrong.append(Scene((Figure("red", shape, "small"), figures[1]), "yellow", "row"))
    for colour in set(COLOURS) - {"red", "yellow", "blue"}:
        wrong.append(Scene((Figure(colour, "circle", "small"), figures[1]), "yellow", "row"))
    prompt = "a red circle to the left of a blue square on a yellow background"
    assert shows(Image.fromarray(draw(asked, rng)), prompt)
    for scene in wrong:
        assert not shows(Image.fromarray(draw(scene, rng)), prompt), scene


def test_sizes_are_told_apart_when_they_are_asked_for():
    rng = random.Random(10)
    for size in ("small", "medium", "large"):
        picture = Image.fromarray(draw(Scene((Figure("red", "heart", size),), "white"), rng))
        assert shows(picture, "a red heart")
        assert shows(picture, "a large red heart") == (size == "large")
        assert shows(picture, "a tiny red heart") == (size == "small")


def test_a_larger_picture_is_read_too():
    scene, _, picture = drawn(1, seed=11)[0]
    assert describe(picture.resize((256, 256))) == scene


def spoiled(name):
    """Pictures that nearly show a red star on white."""
    rng = random.Random(12)
    star = draw(Scene((Figure("red", "star", "large"),), "white"), rng)
    noise = np.random.default_rng(0)
    if name == "blank":
        return np.full_like(star, 250)
    if name == "noise":
        return noise.integers(0, 256, star.shape, dtype=np.uint8)
    if name == "noisy star":
        return np.clip(star + noise.normal(0, 60, star.shape), 0, 255).astype(np.uint8)
    if name == "half a star":
        star[:, : SIDE // 2] = 250
    if name == "star with a hole":
        star[26:38, 26:38] = 250
    if name == "star with a second colour":
        cover = mask("star", (32, 32), (22, 22))[:32, :, None]
        star[:32] = (cover * COLOURS["green"] + (1 - cover) * 250).astype(np.uint8)
    if name == "three figures":
        star[2:10, 2:10] = star[2:10, 54:62] = COLOURS["blue"]
    if name == "blurred star":
        return np.asarray(Image.fromarray(star).filter(ImageFilter.GaussianBlur(6)))
    return star


@pytest.mark.parametrize(
    "name",
    [
        "blank",
        "noise",
        "noisy star",
        "half a star",
        "star with a hole",
        "star with a second colour",
        "three figures",
        "blurred star",
    ],
)
def test_spoiled_pictures_show_nothing(name):
    assert not shows(Image.fromarray(spoiled(name)), "a red star")
    assert shows(Image.fromarray(spoiled("nothing")), "a red star")


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(ValueError, match="a cat"):
        shows(Image.new("RGB", (64, 64)), "a cat")
