"""The embedded models' world: captions mean what was drawn, and the words are all known."""

import random
import subprocess
import sys

import pytest

from ddinfer import tiny
from ddinfer.tiny import evaluate, tokens
from ddinfer.tiny.world import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SYNONYMS,
    VOCABULARY,
    Figure,
    Scene,
    caption,
    parse,
    random_scene,
    unknown_words,
    words,
)


def test_every_caption_is_read_back_as_its_scene():
    rng = random.Random(0)
    for _ in range(3000):
        scene = random_scene(rng)
        asked = parse(caption(scene, rng))
        assert asked is not None
        assert scene.satisfies(asked)


def test_a_caption_does_not_fit_a_scene_with_another_colour_shape_place_or_background():
    rng = random.Random(1)
    scene = Scene(
        (Figure("red", "circle", "small"), Figure("blue", "star", "small")), "white", "row"
    )
    others = [
        Scene(scene.figures[::-1], "white", "row"),
        Scene(scene.figures, "white", "column"),
        Scene((Figure("red", "ring", "small"), scene.figures[1]), "white", "row"),
        Scene((scene.figures[0], Figure("green", "star", "small")), "white", "row"),
        Scene(scene.figures[:1], "white"),
    ]
    for _ in range(50):
        asked = parse(caption(scene, rng))
        assert asked is not None
        assert not any(other.satisfies(asked) for other in others)
    asked = parse("a red circle left of a blue star on a pink background")
    assert asked is not None
    assert not scene.satisfies(asked)


def test_one_relation_can_be_said_from_both_ends():
    assert parse("a red star above a blue ring") == parse("a blue ring beneath a red star")
    assert parse("a red star left of a blue ring") == parse("a blue ring right of a red star")


@pytest.mark.parametrize("prompt", ["", "a cat", "red", "a circle a square", "three red circles"])
def test_what_is_not_of_this_world_is_not_read_as_a_scene(prompt):
    assert parse(prompt) is None


def test_training_scenes_never_hold_a_held_out_pair_and_the_others_always_do():
    rng = random.Random(2)
    for _ in range(2000):
        assert not random_scene(rng).held_out
        assert random_scene(rng, held_out=True).held_out
    assert len(HELD_OUT) == 8
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)
    assert len({colour for colour, _ in HELD_OUT}) == 8 <= len(COLOURS)


def test_unknown_words_are_named_once_in_order():
    assert unknown_words("A fluffy red circle, fluffy and Shiny!") == ["fluffy", "shiny"]
    assert tiny.unknown_words("a red circle on a blue background") == []


def test_demo_prompts_are_a_dozen_scenes_in_known_words():
    assert len(tiny.DEMO_PROMPTS) == len(set(tiny.DEMO_PROMPTS)) == 12
    for prompt in tiny.DEMO_PROMPTS:
        assert parse(prompt) is not None
        assert not unknown_words(prompt)


def test_evaluation_set_is_large_distinct_and_has_held_out_pairs():
    prompts = evaluate.evaluation_prompts()
    asked = [evaluate.asked_scene(prompt) for prompt in prompts]
    assert len(prompts) == len(set(prompts)) >= 400
    assert sum(scene.axis is None for scene in asked) == 240
    assert sum(scene.held_out for scene in asked) == 140
    assert prompts == evaluate.make_evaluation_prompts()


def test_scores_tell_right_wrong_and_swapped_pictures_apart():
    prompts = [
        "a red circle",
        "a blue star",
        "a pink ring above a gray cross",
        "a red ring over a red star",
    ]
    asked = [evaluate.asked_scene(prompt) for prompt in prompts]
    perfect = evaluate.score(prompts, asked)
    assert (perfect["one shape"], perfect["two shapes"], perfect["swapped prompts"]) == (
        100,
        100,
        0,
    )
    crossed = evaluate.score(prompts, [asked[1], asked[0], asked[3], None])
    assert (crossed["one shape"], crossed["two shapes"]) == (0, 0)
    assert crossed["swapped prompts"] == 75


def test_each_known_word_is_one_token_in_any_case_that_captions_use():
    clip, t5 = tokens.clip_tokenizer(), tokens.t5_tokenizer()
    for word in VOCABULARY:
        for said in (word, word.capitalize()):
            assert clip.tokenize(said) == [word + "</w>"]
            assert t5.tokenize(said) == ["▁" + said]
    assert set(SYNONYMS) <= set(VOCABULARY)


def test_captions_fit_the_token_sequence_and_keep_their_end():
    clip, t5 = tokens.clip_tokenizer(), tokens.t5_tokenizer()
    rng = random.Random(3)
    captions = [caption(random_scene(rng), rng) for _ in range(500)]
    assert max(len(words(said)) for said in captions) > 14
    for tokenizer in (clip, t5):
        ids = tokens.token_ids(tokenizer, captions)
        assert ids.shape == (500, tokens.MAX_TOKENS)
        assert bool((ids == tokenizer.eos_token_id).any(dim=1).all())
        unknown = t5.unk_token_id
        assert tokenizer is clip or not bool((ids == unknown).any())


def test_importing_the_package_loads_neither_torch_nor_diffusers():
    code = (
        "import sys, ddinfer.tiny as t; t.path(); t.call_defaults(); t.unknown_words('a cat');"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_pipeline_is_refused_by_name():
    with pytest.raises(ValueError, match="shapes-sdxl"):
        tiny.path("shapes-sdxl")
