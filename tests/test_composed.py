"""Another pipeline class and components from elsewhere, over the same checkpoint."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.utils import load_image
from PIL import Image

import ddinfer
from ddinfer.cli.replay import main as replay
from ddinfer.config import JobConfig
from ddinfer.errors import UsageError
from ddinfer.job.prepare import prepare, resolve_config
from ddinfer.job.run import run_job
from ddinfer.models.composed import compose
from tests.local_hub import local_hub
from tests.test_run import run as run_on_ranks
from tests.tiny_pipelines import call_arguments, tiny_pipeline

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Composed folders go where this test's other files go."""
    home = str(tmp_path_factory.mktemp("hf"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", home)  # for ranks
        patch.setattr("huggingface_hub.constants.HF_HOME", home)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base checkpoint, two ControlNets, another VAE and pictures."""
    root = tmp_path_factory.mktemp("parts")
    base = tiny_pipeline("sd", root)
    pipe = DiffusionPipeline.from_pretrained(base)
    torch.manual_seed(0)
    for name in ("canny", "depth"):
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        net.save_pretrained(root / name)
    vae = AutoencoderKL.from_config(pipe.vae.config)
    vae.save_pretrained(root / "other-vae")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "image.png")
    Image.fromarray(noise[::-1].copy()).save(root / "other.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(root / "mask.png")
    return root


def plain(pipe, seed=0, **arguments):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    [image] = pipe(prompt="a red cat", generator=generator, **CALL, **arguments).images
    return np.asarray(image)


def config(root, out, **options):
    return JobConfig(
        model=str(root / "sd"),
        output=str(out),
        device="cpu",
        num_threads=1,
        prompt=("a red cat",),
        **CALL,
        **options,
    )


def made(out):
    return np.asarray(Image.open(out / "images/0000/00000000.png").convert("RGB"))


def images_of(root, *names):
    found = [load_image(str(root / name)) for name in names]
    return found if len(found) > 1 else found[0]


def cases(root):
    """What is asked of a job → its options, and the same with plain diffusers."""
    base = root / "sd"
    canny, depth = (ControlNetModel.from_pretrained(root / n) for n in ("canny", "depth"))
    image, mask = str(root / "image.png"), str(root / "mask.png")
    picture = images_of(root, "image.png")
    net = f"controlnet={root / 'canny'}"
    return {
        "img2img": (
            {"pipeline": "img2img", "pipeline_kwargs": {"image": image, "strength": 0.9}},
            (StableDiffusionImg2ImgPipeline.from_pretrained(base), {"image": picture,
             "strength": 0.9}),
        ),
        "inpaint": (
            {"pipeline": "inpaint", "height": 32, "width": 32,
             "pipeline_kwargs": {"image": image, "mask_image": mask}},
            (StableDiffusionInpaintPipeline.from_pretrained(base), {"image": picture,
             "mask_image": load_image(mask).convert("L"), "height": 32, "width": 32}),
        ),
        "a controlnet": (
            {"pipeline": "text2img", "component": (net,), "pipeline_kwargs": {"image": image}},
            (StableDiffusionControlNetPipeline.from_pretrained(base, controlnet=canny),
             {"image": picture}),
        ),
        "img2img with a controlnet": (
            {"pipeline": "img2img", "component": (net,),
             "pipeline_kwargs": {"image": image, "control_image": str(root / "other.png")}},
            (StableDiffusionControlNetImg2ImgPipeline.from_pretrained(base, controlnet=canny),
             {"image": picture, "control_image": images_of(root, "other.png")}),
        ),
        "two controlnets": (
            {"pipeline": "StableDiffusionControlNetPipeline",
             "component": (net, f"controlnet={root / 'depth'}"),
             "pipeline_kwargs": {"image": [image, str(root / "other.png")]}},
            (StableDiffusionControlNetPipeline.from_pretrained(base, controlnet=[canny, depth]),
             {"image": images_of(root, "image.png", "other.png")}),
        ),
        "another vae": (
            {"component": (f"vae={root / 'other-vae'}",), "height": 32, "width": 32},
            (DiffusionPipeline.from_pretrained(
                base, vae=AutoencoderKL.from_pretrained(root / "other-vae")),
             {"height": 32, "width": 32}),
        ),
    }  # fmt: skip


NAMES = ("img2img", "inpaint", "a controlnet", "img2img with a controlnet", "two controlnets",
         "another vae")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_job_makes_what_plain_diffusers_makes_of_the_same_parts(root, tmp_path, name):
    options, (pipe, arguments) = cases(root)[name]
    run_job(config(root, tmp_path / "out", **options))
    assert np.array_equal(made(tmp_path / "out"), plain(pipe, **arguments))
    assert not np.array_equal(made(tmp_path / "out"), plain(pipe, seed=1, **arguments))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("staged", "img2img"),
        ("balanced", "two controlnets"),
        ("continuous", "two controlnets"),
        pytest.param("staged", "two controlnets", marks=pytest.mark.nightly),
        pytest.param("balanced", "img2img", marks=pytest.mark.nightly),
        pytest.param("continuous", "img2img", marks=pytest.mark.nightly),
    ],
)
def test_every_way_to_hold_the_model_makes_the_same_bytes(root, tmp_path, mode, name):
    options, (pipe, arguments) = cases(root)[name]
    expected = plain(pipe, **arguments)
    if mode == "continuous":
        run_on_ranks(config(root, tmp_path / "out", pipeline_parallel=2, **options), 2)
    else:
        run_job(config(root, tmp_path / "out", placement=mode, **options))
    assert np.array_equal(made(tmp_path / "out"), expected)


def test_components_are_part_of_the_job_and_replay_finds_them(root, tmp_path, capsys):
    options, _ = cases(root)["a controlnet"]
    asked = config(root, tmp_path / "out", **options)
    run_job(asked)
    assert run_job(asked).num_new == 0
    image = tmp_path / "out/images/0000/00000000.png"
    record = json.loads(Image.open(image).text["ddinfer"])
    assert record["pipeline"] == "StableDiffusionControlNetPipeline"
    assert record["components"] == {"controlnet": ["canny"]}
    assert replay([str(image)]) == 0
    assert "bit-identical" in capsys.readouterr().out
    other = dataclasses.replace(asked, component=(f"controlnet={root / 'depth'}",))
    with pytest.raises(UsageError, match="contains another job"):
        run_job(other)
    assert str(root) not in Image.open(image).text["ddinfer"]  # no path of this machine


def test_an_image_alone_is_replayed_with_the_parts_named(root, tmp_path, capsys):
    options, _ = cases(root)["another vae"]
    run_job(config(root, tmp_path / "out", **options))
    alone = tmp_path / "alone.png"
    alone.write_bytes((tmp_path / "out/images/0000/00000000.png").read_bytes())
    words = [str(alone), "--model", str(root / "sd")]
    assert replay([*words, "--component", options["component"][0]]) == 0
    assert "the files of" not in capsys.readouterr().out
    assert replay(words) != 0
    assert "the files of" in capsys.readouterr().out


def test_changed_weights_of_a_component_are_another_job(root, tmp_path):
    copy = tmp_path / "net"
    ControlNetModel.from_pretrained(root / "canny").to(torch.float64).save_pretrained(copy)
    options, _ = cases(root)["a controlnet"]
    asked = config(root, tmp_path / "out", **{**options, "component": (f"controlnet={copy}",)})
    run_job(asked)
    ControlNetModel.from_pretrained(root / "canny").save_pretrained(copy)
    with pytest.raises(UsageError, match="model_hash"):
        run_job(asked)


def test_a_loaded_pipeline_takes_the_same_parts(root):
    pipe = ddinfer.load_pipeline(
        root / "sd", pipeline="text2img", components={"controlnet": str(root / "canny")}
    )
    picture = images_of(root, "image.png")
    [result] = ddinfer.generate(pipe, [{"prompt": "a red cat", "image": picture}], **CALL)
    net = ControlNetModel.from_pretrained(root / "canny")
    expected = StableDiffusionControlNetPipeline.from_pretrained(root / "sd", controlnet=net)
    assert np.array_equal(np.asarray(result.image), plain(expected, image=picture))


def test_a_dtype_by_component_is_that_of_its_weights_and_of_the_job(tiny, tmp_path):
    folder, call = tiny("wan"), call_arguments("wan")
    asked = JobConfig(
        model=str(folder),
        output=str(tmp_path / "out"),
        device="cpu",
        num_threads=1,
        prompt=("a red cat",),
        dtype="vae=float32,bfloat16",
        video_format="apng",
        pipeline_kwargs=call,
    )
    run_job(asked)
    types = {"vae": "float32", "default": "bfloat16"}
    pipe = ddinfer.load_pipeline(folder, dtype=types)
    assert (pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.float32, torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    [frames] = pipe("a red cat", generator=generator, output_type="pil", **call).frames
    [image] = (tmp_path / "out/images").glob("*/*")
    first = np.asarray(Image.open(image).convert("RGB"))
    assert np.array_equal(first, np.asarray(frames[0]))
    assert run_job(dataclasses.replace(asked, dtype="vae=float32, bfloat16")).num_new == 0
    assert json.loads(Image.open(image).text["ddinfer"])["dtype"] == "vae=float32,bfloat16"
    assert replay([str(image)]) == 0
    with pytest.raises(UsageError, match="dtype"):
        run_job(dataclasses.replace(asked, dtype="bfloat16"))


WRONG = {
    "no such class": ({"pipeline": "StableDifusionPipeline"}, "nor a pipeline class of diffusers"),
    "a class that is none": ({"pipeline": "UNet2DConditionModel"}, "UNet2DConditionModel"),
    "no such component": ({"component": ("refiner=.",)}, "holds no component|no such component"),
    "a net without its class": ({"component": ("controlnet=NET",)}, "use --pipeline "
                                "StableDiffusionControlNetPipeline"),
    "two vaes": ({"component": ("vae=VAE", "vae=VAE")}, "takes only one vae"),
    "nowhere": ({"component": ("vae=./nowhere",)}, "no such folder, and not a Hub id"),
    "no name": ({"component": ("VAE",)}, "expected NAME=FOLDER_OR_ID"),
    "dtype": ({"dtype": "vae=float8"}, "'float8' is none of"),
    "dtype of nothing": ({"dtype": "vea=float32"}, "has no component vea; it has vae"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_before_weights_are_read(root, tmp_path, name):
    options, message = WRONG[name]
    if "component" in options:
        places = {"NET": str(root / "canny"), "VAE": str(root / "other-vae")}
        parts = (part.partition("=") for part in options["component"])
        options = {"component": tuple(n + s + places.get(p, p) for n, s, p in parts)}
    with pytest.raises(UsageError, match=message) as error:
        prepare(resolve_config(config(root, tmp_path / "out", **options)))
    assert "\n" not in str(error.value)


def test_a_task_without_a_sibling_is_refused_by_name(tiny, tmp_path):
    with pytest.raises(UsageError, match="has no inpaint pipeline for the checkpoint of a Sana"):
        compose(tiny("sana"), "inpaint", {})


def test_a_component_brings_no_code_that_is_not_trusted(root, tmp_path):
    net = tmp_path / "net"
    ControlNetModel.from_pretrained(root / "canny").save_pretrained(net)
    (net / "evil.py").write_text("raise SystemExit('ran')")
    info = json.loads((net / "config.json").read_text())
    info.update(_class_name="EvilNet", auto_map={"AutoModel": "evil.EvilNet"})
    (net / "config.json").write_text(json.dumps(info))
    options, _ = cases(root)["a controlnet"]
    asked = config(root, tmp_path / "out", **{**options, "component": (f"controlnet={net}",)})
    with pytest.raises(UsageError, match="EvilNet"):
        prepare(resolve_config(asked))


def test_a_component_of_the_hub_is_fetched_without_other_variants(root, tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    ControlNetModel.from_pretrained(root / "canny").save_pretrained(repo)
    (repo / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    (repo / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with local_hub("somebody/canny", {"main": repo}) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        folder = compose(root / "sd", "text2img", {"controlnet": ["somebody/canny"]})
    weights = sorted(p.name for p in (folder / "controlnet").iterdir() if p.suffix != ".json")
    assert weights == ["diffusion_pytorch_model.safetensors"]
    assert os.path.realpath(folder / "controlnet" / weights[0]).startswith(str(tmp_path / "cache"))
