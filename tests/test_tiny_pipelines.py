"""The embedded pipelines as a user meets them: their pictures show what the prompts say."""

import inspect
import json

import pytest
import torch

from ddinfer import tiny
from ddinfer.tiny.check import describe, shows
from ddinfer.tiny.evaluate import draw_with, evaluation_prompts, load
from ddinfer.tiny.world import parse

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = tiny.path().parent
LIMIT_BYTES = 16_000_000


@pytest.fixture(scope="module")
def pipelines():
    return {name: load(tiny.path(name)) for name in tiny.PIPELINES}


def test_weights_are_safetensors_and_small():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    assert sorted(path.name for path in WEIGHTS.iterdir()) == sorted(tiny.PIPELINES)


def test_a_plain_load_gives_one_dtype_and_the_pipeline_that_is_promised(pipelines):
    classes = {name: type(pipe).__name__ for name, pipe in pipelines.items()}
    assert classes == {"shapes-sd": "StableDiffusionPipeline", "shapes-flux": "FluxPipeline"}
    for pipe in pipelines.values():
        models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        tensors = [tensor for model in models for tensor in model.parameters()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_flux_has_blocks_enough_to_be_cut():
    config = json.loads((tiny.path("shapes-flux") / "transformer" / "config.json").read_text())
    assert config["num_layers"] >= 4
    assert config["num_single_layers"] >= 4


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_call_defaults_are_arguments_of_the_call(name, pipelines):
    accepted = inspect.signature(pipelines[name].__call__).parameters
    assert set(tiny.call_defaults(name)) <= set(accepted)
    tiny.call_defaults(name).clear()
    assert tiny.call_defaults(name)


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_pictures_show_their_own_prompts_and_not_each_others(name, pipelines):
    prompts = evaluation_prompts()[::28]
    call = tiny.call_defaults(name)
    pictures = [draw_with(pipelines[name], prompt, k, **call) for k, prompt in enumerate(prompts)]
    asked = [parse(prompt) for prompt in prompts]
    alone = [k for k, scene in enumerate(asked) if scene.axis is None]
    assert len(alone) >= 8
    assert sum(shows(pictures[k], prompts[k]) for k in alone) >= len(alone) - 2
    swapped = [*prompts[1:], prompts[0]]
    wrong = sum(shows(picture, prompt) for picture, prompt in zip(pictures, swapped, strict=True))
    assert wrong <= 1


def test_the_default_pipeline_draws_the_demo(pipelines):
    pipe, call = pipelines[tiny.DEFAULT], tiny.call_defaults()
    pictures = [draw_with(pipe, prompt, k, **call) for k, prompt in enumerate(tiny.DEMO_PROMPTS)]
    shown = [
        shows(picture, prompt) for picture, prompt in zip(pictures, tiny.DEMO_PROMPTS, strict=True)
    ]
    assert sum(shown) >= 11


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_a_seed_makes_its_picture_and_another_seed_another(name, pipelines):
    call = tiny.call_defaults(name)
    first, again, other = (
        draw_with(pipelines[name], "a small red heart", seed, **call) for seed in (3, 3, 4)
    )
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_a_strange_word_does_not_spoil_a_picture(pipelines):
    pipe, call = pipelines[tiny.DEFAULT], tiny.call_defaults()
    prompt = "a fluffy green circle on a red background"
    assert tiny.unknown_words(prompt) == ["fluffy"]
    pictures = [draw_with(pipe, prompt, seed, **call) for seed in range(4)]
    assert sum(shows(picture, prompt) for picture in pictures) >= 3


def test_a_prompt_of_another_world_still_gives_a_picture(pipelines):
    pipe, call = pipelines[tiny.DEFAULT], tiny.call_defaults()
    picture = draw_with(pipe, "an astronaut riding a horse", 0, **call)
    assert picture.size == (64, 64)
    describe(picture)
