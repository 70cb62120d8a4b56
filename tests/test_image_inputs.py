"""Image inputs of every kind against plain diffusers, called with what its `load_image` returns."""

import csv
import dataclasses
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from PIL import Image

import ddinfer
from ddinfer.config import JobConfig
from ddinfer.errors import InputError, UsageError
from ddinfer.inputs import needed_images
from ddinfer.job.prepare import prepare, resolve_config
from ddinfer.job.run import run_job
from tests.ranks import run_ranks
from tests.tiny_pipelines import tiny_pipeline

CALL = {"num_inference_steps": 2, "strength": 0.9, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pipelines by the names of their classes, and pictures as users have them."""
    root = tmp_path_factory.mktemp("inputs")
    base = tiny_pipeline("sd", root)
    index = json.loads((base / "model_index.json").read_text())
    for name in ("Img2Img", "Inpaint"):
        shutil.copytree(base, root / name)
        index["_class_name"] = f"StableDiffusion{name}Pipeline"
        (root / name / "model_index.json").write_text(json.dumps(index))
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter: 32 x 64
    colours = Image.fromarray(noise[..., :3])
    colours.save(root / "phone.jpg", exif=exif)
    Image.fromarray(noise[..., 0]).save(root / "grey.png")
    Image.fromarray(noise).save(root / "rgba.png")
    colours.quantize(16).save(root / "palette.png")
    for size in ((64, 32), (32, 64)):
        mask = Image.new("L", size)
        mask.paste(255, (8, 8, 24, 24))
        mask.save(root / f"mask-{size[0]}.png")
    return root


PICTURES = ("phone.jpg", "grey.png", "rgba.png", "palette.png")


@pytest.fixture(scope="module")
def plain(folder):
    """What plain diffusers makes, request by request."""

    def make(kind, seed, **arguments):
        pipe = DiffusionPipeline.from_pretrained(folder / kind)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(seed)
        [image] = pipe(prompt="a red cat", generator=generator, **CALL, **arguments).images
        return image

    return make


def job(folder, out, kind, **options):
    return JobConfig(
        model=str(folder / kind),
        output=str(out),
        device="cpu",
        num_threads=1,
        pipeline_kwargs={"strength": 0.9, **options.pop("pipeline_kwargs", {})},
        num_inference_steps=2,
        guidance_scale=3.0,
        **options,
    )


def made(out):
    return [np.asarray(Image.open(path)) for path in sorted(out.rglob("0*.png"))]


def write(path, rows):
    """The rows in the format of the ending."""
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(
                {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                for row in rows
            )
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("ending", "placement"), [("jsonl", None), ("csv", "staged")])
def test_img2img_of_every_kind_of_picture(folder, plain, tmp_path, ending, placement):
    rows = [{"prompt": "a red cat", "image": name} for name in PICTURES]
    rows += [{"prompt": "a red cat", "image": [name]} for name in PICTURES[:2]]
    prompts = write(folder / f"img2img.{ending}", rows)
    run_job(job(folder, tmp_path, "Img2Img", prompts=prompts, placement=placement))
    expected = [
        plain("Img2Img", k, image=load_image(str(folder / name)))
        for k, name in enumerate((*PICTURES, *PICTURES[:2]))
    ]
    pictures = made(tmp_path)
    assert expected[0].size == (32, 64)
    assert len(pictures) == len(expected)
    for picture, other in zip(pictures, expected, strict=True):
        assert np.array_equal(picture, np.asarray(other))


@pytest.mark.parametrize(("ending", "placement"), [("json", "staged"), ("jsonl", None)])
def test_inpainting_takes_masks(folder, plain, tmp_path, ending, placement):
    masks = {"phone.jpg": "mask-32.png", "rgba.png": "mask-64.png"}
    rows = [{"prompt": "a red cat", "image": i, "mask_image": m} for i, m in masks.items()]
    prompts = write(folder / f"inpaint.{ending}", rows)
    size = {"width": 64, "height": 32}
    run_job(job(folder, tmp_path, "Inpaint", prompts=prompts, placement=placement, **size))
    pictures = made(tmp_path)
    for k, (image, mask) in enumerate(masks.items()):
        mask_image = load_image(str(folder / mask))
        images = {"image": load_image(str(folder / image)), "mask_image": mask_image}
        assert np.array_equal(pictures[k], np.asarray(plain("Inpaint", k, **images, **size)))
    assert len(pictures) == 2


def test_images_for_all_prompts_and_a_row_that_has_its_own(folder, plain, tmp_path):
    rows = [{"prompt": "a red cat"}, {"prompt": "a red cat", "image": "rgba.png"}]
    prompts = write(folder / "shared.jsonl", rows)
    kwargs = {"image": str(folder / "phone.jpg"), "mask_image": str(folder / "mask-32.png")}
    size = {"width": 32, "height": 32}
    run_job(job(folder, tmp_path, "Inpaint", prompts=prompts, pipeline_kwargs=kwargs, **size))
    mask = load_image(kwargs["mask_image"])
    for k, name in enumerate(("phone.jpg", "rgba.png")):
        images = {"image": load_image(str(folder / name)), "mask_image": mask}
        assert np.array_equal(made(tmp_path)[k], np.asarray(plain("Inpaint", k, **images, **size)))


def test_the_pictures_of_a_batch_are_those_of_single_calls(folder, plain, tmp_path):
    shutil.copy(folder / "phone.jpg", folder / "copy.jpg")
    rows = [{"prompt": "a red cat", "image": name} for name in ("phone.jpg", "copy.jpg")]
    prompts = write(folder / "batch.jsonl", rows)
    run_job(job(folder, tmp_path, "Img2Img", prompts=prompts, batch_size=4))
    for k, picture in enumerate(made(tmp_path)):
        expected = plain("Img2Img", k, image=load_image(str(folder / "phone.jpg")))
        assert np.array_equal(picture, np.asarray(expected))
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [line["exact"] for line in lines] == [True] * 2
    assert len({line["image_sha256"] for line in lines}) == 1  # the same bytes, the same input


def test_objects_per_prompt_in_a_program(folder, plain):
    pipe = ddinfer.load_pipeline(folder / "Img2Img", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    phone = load_image(str(folder / "phone.jpg"))
    tensor = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    given = [
        (Image.open(folder / "phone.jpg"), phone),
        ([Image.open(folder / "phone.jpg")], [phone]),
        (str(folder / "phone.jpg"), phone),
        (Image.open(folder / "rgba.png"), load_image(str(folder / "rgba.png"))),
        (tensor, tensor),
        (tensor.numpy().transpose(0, 2, 3, 1), tensor.numpy().transpose(0, 2, 3, 1)),
    ]
    rows = [{"prompt": "a red cat", "image": image} for image, _ in given]
    rows[1] = ddinfer.Request(7, "asked", "a red cat", 1, kwargs={"image": given[1][0]})
    results = ddinfer.generate(pipe, rows, batch_size=2, **CALL)
    for k, (_, image) in enumerate(given):
        assert np.array_equal(results[k].image, plain("Img2Img", k, image=image))
    assert results[0].request.kwargs["image"] is given[0][0]
    other = ddinfer.generate(pipe, [{**rows[4], "image": tensor + 1e-3}], **CALL)
    assert other[0].request.content_hash() != results[4].request.content_hash()


def on_ranks(group, folder, differ):
    pipe = ddinfer.load_pipeline(folder / "Img2Img", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    image = load_image(str(folder / "phone.jpg"))
    tensor = torch.full((1, 3, 32, 32), 0.5)
    if differ:
        tensor[0, 0, 0, 0] += group.world.rank
    rows = [{"prompt": "a red cat", "image": item} for item in (image, tensor)]
    results = ddinfer.generate(pipe, rows, **CALL)
    assert [type(r.request.kwargs["image"]) for r in results] == [type(image), torch.Tensor]
    return [np.asarray(result.image) for result in results]


def test_ranks_compare_objects_by_their_content(folder, plain):
    tensor = torch.full((1, 3, 32, 32), 0.5)
    expected = [
        plain("Img2Img", k, image=image)
        for k, image in enumerate((load_image(str(folder / "phone.jpg")), tensor))
    ]
    for pictures in run_ranks(on_ranks, 2, folder, False):
        assert all(map(np.array_equal, pictures, expected))
    with pytest.raises(UsageError, match="prompts and arguments"):
        run_ranks(on_ranks, 2, folder, True)


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("StableDiffusionPipeline", []),
        ("FluxKontextPipeline", []),
        ("Flux2Pipeline", []),
        ("StableDiffusionImg2ImgPipeline", ["image"]),
        ("FluxFillPipeline", ["image", "mask_image"]),
        ("StableDiffusionControlNetPipeline", ["image"]),
        ("FluxControlNetPipeline", ["control_image"]),
        ("StableDiffusionXLControlNetInpaintPipeline", ["image", "mask_image", "control_image"]),
        ("WanImageToVideoPipeline", ["image"]),
        ("LTXImageToVideoPipeline", ["image"]),
    ],
)
def test_images_that_a_pipeline_class_needs(name, images):
    assert needed_images(getattr(diffusers, name)) == images


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "truncated", "truncated.png"])
def test_a_file_that_cannot_be_an_image_is_refused_with_its_line(folder, tmp_path, kind):
    name = {"folder": "Img2Img", "text": "bad.txt"}.get(kind, f"{kind}.jpg")
    (folder / "bad.txt").write_text("no image")
    (folder / "truncated.jpg").write_bytes((folder / "phone.jpg").read_bytes()[:-900])
    (folder / "truncated.png.jpg").write_bytes((folder / "rgba.png").read_bytes()[:-900])
    rows = [{"prompt": "a cat", "image": "phone.jpg"}, {"prompt": "a cat", "image": name}]
    prompts = write(folder / "bad.jsonl", rows)
    with pytest.raises(InputError, match=rf"bad.jsonl:2: image: .*{name}"):
        run_job(job(folder, tmp_path / "out", "Img2Img", prompts=prompts))
    shared = {"image": [str(folder / name)]}
    with pytest.raises(InputError, match=rf"--pipeline_kwargs: image: .*{name}"):
        run_job(job(folder, tmp_path / "out", "Img2Img", prompt=["a"], pipeline_kwargs=shared))
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_missing_or_too_many_is_refused_with_its_line(folder, tmp_path):
    rows = [{"prompt": "a cat", "image": "phone.jpg"}, {"prompt": "a cat"}]
    prompts = write(folder / "few.jsonl", rows)
    with pytest.raises(InputError, match=r"few\.jsonl:2: no image; StableDiffusionImg2ImgPipeline"):
        run_job(job(folder, tmp_path / "out", "Img2Img", prompts=prompts))
    with pytest.raises(InputError, match=r"few\.jsonl:1: no mask_image; StableDiffusionInpaint"):
        run_job(job(folder, tmp_path / "out", "Inpaint", prompts=prompts))
    with pytest.raises(InputError, match=r"few\.jsonl:1: this pipeline takes no image"):
        run_job(job(folder, tmp_path / "out", "sd", prompts=prompts))
    image = {"image": str(folder / "phone.jpg")}
    with pytest.raises(UsageError, match="takes no argument 'image'"):
        run_job(job(folder, tmp_path / "out", "sd", prompt=["a cat"], pipeline_kwargs=image))
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_after_it_was_read_fails_its_prompt(folder):
    shutil.copy(folder / "phone.jpg", folder / "changing.jpg")
    pipe = ddinfer.load_pipeline(folder / "Img2Img", device="cpu")
    rows = [{"prompt": "a", "image": str(folder / name)} for name in ("rgba.png", "changing.jpg")]
    results = ddinfer.stream(pipe, rows, **CALL)
    assert next(results).error is None
    shutil.copy(folder / "grey.png", folder / "changing.jpg")
    assert "image has changed" in str(next(results).error)


def test_null_and_an_empty_cell_are_the_default_and_noted(folder, tmp_path, caplog):
    rows = [{"prompt": "a red cat", "num_inference_steps": n, "eta": None} for n in (None, 3)]
    requests = []
    for ending in ("jsonl", "json", "csv"):
        prompts = write(folder / f"nulls.{ending}", rows)
        if ending == "csv":
            (folder / "nulls.csv").write_text(
                "prompt,num_inference_steps,eta\na red cat,,\na red cat,3,\n"
            )
        config = job(folder, tmp_path, "sd", prompts=prompts, pipeline_kwargs={"clip_skip": None})
        config = dataclasses.replace(config, pipeline_kwargs={"clip_skip": None})
        caplog.clear()
        prepared = prepare(resolve_config(config))
        requests.append([request.to_dict() for request in prepared.requests])
        assert f"nulls.{ending}: no value, so the default is used: eta (2), num" in caplog.text
        assert prepared.notes == (
            "--pipeline_kwargs: no value, so the default is used: clip_skip (1)",
        )
    assert requests[0] == requests[1] == requests[2]
    assert [request["num_inference_steps"] for request in requests[0]] == [2, 3]
    assert all("kwargs" not in request for request in requests[0])


@pytest.mark.parametrize("placement", [None, "staged"])
def test_second_prompts_form_batches(tmp_path_factory, tmp_path, placement):
    model = tiny_pipeline("sdxl", tmp_path_factory.mktemp("model"))
    texts = {
        "prompt": ["a red cat", "a blue dog"],
        "prompt_2": ["old house", "new stone"],
        "negative_prompt": ["night", "day"],
        "negative_prompt_2": ["water", "sky"],
    }
    rows = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
    rows.append({"prompt": "a red cat", "negative_prompt": "night"})
    config = JobConfig(
        model=str(model), output=str(tmp_path / "out"), device="cpu", num_threads=1, batch_size=4,
        prompts=write(tmp_path / "texts.jsonl", rows), width=32, height=32,
        num_inference_steps=2, placement=placement,
    )  # fmt: skip
    run_job(config)
    pipe = DiffusionPipeline.from_pretrained(model)
    generators = [torch.Generator("cpu").manual_seed(k) for k in range(2)]
    size = {"width": 32, "height": 32, "num_inference_steps": 2}
    expected = pipe(**texts, generator=generators, **size).images
    for picture, other in zip(made(tmp_path)[:2], expected, strict=True):
        assert np.array_equal(picture, np.asarray(other))
    swapped = {**texts, "prompt_2": texts["prompt_2"][::-1]}
    generators = [torch.Generator("cpu").manual_seed(k) for k in range(2)]
    others = pipe(**swapped, generator=generators, **size).images
    assert not np.array_equal(made(tmp_path)[0], np.asarray(others[0]))
    lines = (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["exact"] for line in lines] == [True] * 3
