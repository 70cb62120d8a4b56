"""Components that hold several models: two ControlNets, as diffusers saves them."""

import json

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.utils import load_image
from PIL import Image

from ddinfer.engines.staged import StagedEngine
from ddinfer.engines.whole import WholeEngine
from ddinfer.models.loading import load_pipeline
from ddinfer.models.pipeline_folder import PipelineSource
from ddinfer.models.stages import StagedPipeline
from ddinfer.models.tree import tree_of
from ddinfer.prompts.files import read_prompts
from ddinfer.request import resolve_requests

pytestmark = pytest.mark.usefixtures("one_thread")


def quiet(folder, **options):
    pipe = load_pipeline(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(results):
    results = list(results)
    for result in results:
        assert result.error is None, result.error.traceback
    return [np.asarray(result.image).tolist() for result in results]


def controlled(folder, target):
    """Stable Diffusion with two ControlNets, as diffusers saves it."""
    torch.manual_seed(0)
    pipe = load_pipeline(folder)
    nets = [
        ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
        for _ in range(2)
    ]
    for net in nets:
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    made = StableDiffusionControlNetPipeline(**pipe.components, controlnet=nets)
    made.save_pretrained(target)
    return target, made


def test_two_control_nets_take_a_list_of_paths(tiny, tmp_path):
    folder, made = controlled(tiny("sd"), tmp_path / "model")
    paths = ["one.png", "two.png"]
    for path in paths:
        Image.effect_noise((32, 32), 90).convert("RGB").save(tmp_path / path)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a cat", "image": paths}))
    size = {"num_inference_steps": 2, "height": 32, "width": 32}
    prompts = read_prompts(str(tmp_path / "p.jsonl"))
    requests = resolve_requests(prompts, defaults=size)
    made.set_progress_bar_config(disable=True)
    opened = [load_image(str(tmp_path / path)) for path in paths]
    generator = torch.Generator("cpu").manual_seed(0)
    expected = [np.asarray(made("a cat", image=opened, generator=generator, **size).images[0])]
    expected = [picture.tolist() for picture in expected]
    assert images(WholeEngine(made).run([requests])) == expected
    assert images(WholeEngine(quiet(folder)).run([requests])) == expected
    budget = {"cpu": tree_of(folder).num_bytes() // 2}
    placed = quiet(folder, placement="balanced", max_memory=budget)
    assert images(WholeEngine(placed).run([requests])) == expected
    stages = StagedPipeline(PipelineSource(folder), "auto", {"cpu": 10**10})
    assert images(StagedEngine(stages).run([requests])) == expected
    half = quiet(folder, dtype="bfloat16")
    assert {p.dtype for p in half.controlnet.parameters()} == {torch.bfloat16}
    other = resolve_requests(prompts, defaults=size, base_seed=5)
    assert images(WholeEngine(made).run([other])) != expected
