"""``--quantize COMPONENT=fp8``: what diffusers' layerwise casting makes, and less memory."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import ddinfer
from ddinfer.cli.replay import main as replay
from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.engines.whole import load_whole_engine
from ddinfer.errors import UsageError
from ddinfer.job.prepare import prepare, resolve_config
from ddinfer.job.run import run_job
from tests.test_run import pixels

pytestmark = pytest.mark.usefixtures("one_thread")

CALL = {"num_inference_steps": 2, "height": 32, "width": 32}


def job(folder, tmp_path, **options):
    return JobConfig(
        model=str(folder),
        output=str(tmp_path / "out"),
        prompt=("a red cat",),
        device="cpu",
        num_threads=1,
        **{**CALL, **options},
    )


def test_images_are_those_of_layerwise_casting_and_are_replayed(tiny, tmp_path, capsys):
    asked = job(tiny("sd"), tmp_path, quantize=("unet=fp8",))
    run_job(asked)
    pipe = ddinfer.load_pipeline(tiny("sd"))
    [without] = ddinfer.generate(pipe, ["a red cat"], **CALL)
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    [result] = ddinfer.generate(pipe, ["a red cat"], **CALL)
    made = pixels(tmp_path / "out")[0]
    assert np.array_equal(made, np.asarray(result.image))
    assert not np.array_equal(made, np.asarray(without.image))
    image = str(tmp_path / "out/images/0000/00000000.png")
    assert json.loads(Image.open(image).text["ddinfer"])["quantize"] == ["unet=fp8"]
    assert replay([image]) == 0
    assert "bit-identical" in capsys.readouterr().out
    with pytest.raises(UsageError, match="quantize:"):
        run_job(job(tiny("sd"), tmp_path))


def test_weights_take_less_memory(tiny, tmp_path):
    def size(**options):
        config = resolve_config(job(tiny("flux"), tmp_path, dtype="bfloat16", **options))
        engine = load_whole_engine(config.model, config, world=World())
        return sum(p.nbytes for p in engine.pipe.transformer.parameters())

    assert size(quantize=("transformer=fp8",)) < 0.65 * size()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": ("unet=int8",)}, "expected COMPONENT=fp8"),
        ({"quantize": ("fp8",)}, "expected COMPONENT=fp8"),
        ({"quantize": ("unett=fp8",)}, "has no such component; it has vae"),
        ({"quantize": ("unet=fp8",), "placement": "balanced"}, "does not go with --placement"),
        ({"quantize": ("unet=fp8",), "pipeline_parallel": 2}, "with --pipeline_parallel"),
        ({"quantize": ("unet=fp8",), "lora": ("a.safetensors",)}, "does not go with --lora"),
        ({"quantize": ("unet=fp8",), "cfg_parallel": 2}, "does not go with --quantize"),
        ({"quantize": ("unet=fp8",), "compile": True}, "does not go with --compile"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tiny, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        prepare(resolve_config(job(tiny("sd"), tmp_path, **options)))
