"""Every family in every floating type, from files of every type, against plain diffusers."""

import json
import shutil

import diffusers
import pytest
import torch
from PIL import Image

from ddinfer.engines.staged import StagedEngine
from ddinfer.engines.whole import WholeEngine
from ddinfer.inputs import check_media_file
from ddinfer.models.loading import load_model, load_pipeline
from ddinfer.models.pipeline_folder import PipelineSource
from ddinfer.models.stages import StagedPipeline
from ddinfer.models.stand_ins import is_stand_in
from ddinfer.models.tree import tree_of
from ddinfer.request import Prompt, resolve_requests
from tests.tiny_pipelines import FROM_TEXT, IN_STAGES, call_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What SDXL runs in besides bfloat16 from float32 files; the others do in launch/nightly.
SDXL_TOO = {("float16", "auto"), ("float32", "float16")}


def folder_of(kind, stored, tiny):
    """The folder of a tiny pipeline whose weights are stored in the type ``stored``."""
    folder = tiny(kind)
    if stored == "float32":
        return folder
    target = folder.with_name(f"{kind}-{stored}")
    if not target.is_dir():
        pipe = load_pipeline(folder)
        for model in models_of(pipe).values():
            model._keep_in_fp32_modules = None  # everything is stored in the one type
            model.to(DTYPES[stored])
        pipe.save_pretrained(target)
    return target


def models_of(pipe):
    return {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


def plain_pipeline(folder, dtype):
    """What diffusers' own ``from_pretrained(folder, dtype=dtype)`` makes with accelerate installed.

    Without accelerate it refuses models with modules that stay float32, and leaves those float32
    whose first tensor (SD3's position table) has the file's type.
    """
    source = PipelineSource(folder)
    kinds = {name: source.component_class(name) for name in source.model_names()}
    kinds = {n: kind for n, kind in kinds.items() if issubclass(kind, diffusers.ModelMixin)}
    with pytest.MonkeyPatch.context() as patch:
        kept = {name: kind._keep_in_fp32_modules or () for name, kind in kinds.items()}
        for kind in kinds.values():
            patch.setattr(kind, "_keep_in_fp32_modules", None)
        options = {"low_cpu_mem_usage": False}
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options)
        for name, kind in kinds.items():
            model = kind.from_pretrained(folder / name, dtype=torch.float32, **options)
            for path, tensor in model.state_dict(keep_vars=True).items():
                if not set(path.split(".")) & set(kept[name]):
                    tensor.data = tensor.data.to(dtype)
            setattr(pipe, name, model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def requests_for(kind, seed=0):
    rows = [Prompt({"prompt": t, **call_arguments(kind)}) for t in ("a red cat", "two stones")]
    return resolve_requests(rows, base_seed=seed)


def pictures(results):
    made = []
    for result in results:
        assert result.error is None, result.error.traceback
        frames = [result.image] if result.image is not None else result.frames
        made.append(b"".join(frame.tobytes() for frame in frames))
    return made


def run(folder, way, dtype, batches):
    if way == "staged":
        pipeline = StagedPipeline(PipelineSource(folder), dtype, {"cpu": 10**10})
        return pictures(StagedEngine(pipeline).run(batches))
    placed = {}
    if way == "placed":
        size = tree_of(folder, dtype=dtype).num_bytes()
        placed = {"placement": "balanced", "max_memory": {"cpu": size // 2}}
    pipe = load_pipeline(folder, dtype=dtype, **placed)
    pipe.set_progress_bar_config(disable=True)
    return pictures(WholeEngine(pipe).run(batches))


def grid():
    for kind in FROM_TEXT:
        for stored in DTYPES:
            for dtype in ("auto", "bfloat16", "float16"):
                usual = (stored, dtype) == ("float32", "bfloat16")
                usual |= kind == "sdxl" and (stored, dtype) in SDXL_TOO
                marks = () if usual else pytest.mark.nightly
                yield pytest.param(kind, stored, dtype, marks=marks)


@pytest.mark.parametrize(("kind", "stored", "dtype"), grid())
def test_pictures_are_those_of_plain_diffusers_in_every_type(kind, stored, dtype, tiny):
    folder = folder_of(kind, stored, tiny)
    plain = plain_pipeline(folder, DTYPES.get(dtype, torch.float32))
    requests = requests_for(kind)
    batches = [requests[:1], requests[1:]]
    expected = pictures(WholeEngine(plain).run(batches))
    assert len(set(expected)) == 2
    assert pictures(WholeEngine(plain).run([requests_for(kind, seed=9)[:1]])) != expected[:1]
    for way in ("whole", "staged", "placed") if kind in IN_STAGES else ("whole", "placed"):
        assert run(folder, way, dtype, batches) == expected, way


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("kind", FROM_TEXT)
def test_weights_are_those_of_plain_diffusers_in_every_type(kind, stored, dtype, tiny):
    folder = folder_of(kind, stored, tiny)
    plain = models_of(plain_pipeline(folder, DTYPES.get(dtype, torch.float32)))
    ours = models_of(load_pipeline(folder, dtype=dtype))
    assert set(ours) == set(plain)
    for name, model in plain.items():
        expected = dict(model.state_dict()) | dict(model.named_buffers())
        found = dict(ours[name].state_dict()) | dict(ours[name].named_buffers())
        assert set(found) == set(expected)
        wrong = [n for n, tensor in expected.items() if not same(tensor, found[n])]
        assert not wrong, f"{name}: {wrong}"


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def as_pipeline(name, folder, target):
    """The same components under another pipeline's class."""
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text())
    index = {k: v for k, v in index.items() if k not in ("add_watermarker",)}
    (target / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    return target


def image_requests(folder, fields):
    Image.effect_noise((32, 32), 50).convert("RGB").save(folder / "in.png")
    Image.effect_noise((32, 32), 50).save(folder / "mask.png")
    paths = {"image": str(folder / "in.png"), "mask_image": str(folder / "mask.png")}
    row = {"prompt": "a cat", "num_inference_steps": 4, "strength": 0.5, "height": 32, "width": 32}
    row = {n: v for n, v in (row | paths).items() if n in {*fields, "prompt", "image", "strength"}}
    row["input_hashes"] = {n: check_media_file(n, path) for n, path in paths.items() if n in row}
    return resolve_requests([Prompt(row)])


IMAGE_TO_IMAGE = ("StableDiffusionXLImg2ImgPipeline", ("num_inference_steps",))
INPAINTING = (
    "StableDiffusionXLInpaintPipeline",
    ("num_inference_steps", "mask_image", "height", "width"),
)


@pytest.mark.parametrize(
    ("name", "fields", "dtype"),
    [
        (*IMAGE_TO_IMAGE, "float16"),
        pytest.param(*IMAGE_TO_IMAGE, "auto", marks=pytest.mark.nightly),
        pytest.param(*IMAGE_TO_IMAGE, "bfloat16", marks=pytest.mark.nightly),
        (*INPAINTING, "auto"),
        pytest.param(*INPAINTING, "bfloat16", marks=pytest.mark.nightly),
        pytest.param(*INPAINTING, "float16", marks=pytest.mark.nightly),
    ],
)
def test_a_vae_that_the_pipeline_casts_and_casts_back(name, fields, dtype, tiny, tmp_path):
    folder = as_pipeline(name, tiny("sdxl"), tmp_path / "model")
    requests = image_requests(tmp_path, fields)
    plain = plain_pipeline(folder, DTYPES.get(dtype, torch.float32))
    assert plain.vae.config.force_upcast
    expected = pictures(WholeEngine(plain).run([requests]))
    for way in ("whole", "staged", "placed"):
        assert run(folder, way, dtype, [requests, requests]) == expected * 2, way


VAE_ON_DISK = {"unet": "cpu", "text_encoder": "cpu", "text_encoder_2": "cpu", "vae": "disk"}


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("placed", [False, True])
def test_a_call_that_ends_while_the_vae_is_cast_changes_no_later_picture(error, placed, tiny):
    folder = tiny("sdxl")
    pipe = load_pipeline(folder, dtype="float16", placement=VAE_ON_DISK if placed else None)
    pipe.set_progress_bar_config(disable=True)
    batch = requests_for("sdxl")[:1]
    engine = WholeEngine(pipe)
    expected = pictures(engine.run([batch]))

    def fail(*_):
        raise error("in the midst of decoding")

    handle = pipe.vae.decoder.register_forward_pre_hook(fail)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            list(engine.run([batch]))
    else:
        assert [result.error.type for result in engine.run([batch])] == [error.__name__]
    handle.remove()
    assert pipe.vae.dtype == torch.float16
    assert pictures(engine.run([batch])) == expected


def test_casts_of_weights_that_are_away_are_those_of_weights_that_are_here(tiny):
    plain = load_pipeline(tiny("sdxl")).vae
    placed = load_pipeline(tiny("sdxl"), placement=VAE_ON_DISK).vae
    names = [name for name, p in placed.named_parameters() if is_stand_in(p)]
    assert len(names) > 10
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float32):
        plain.to(dtype)  # the lost bits stay lost
        placed.to(dtype)
        for name in names:
            ours = placed.get_parameter(name)
            assert is_stand_in(ours)
            assert ours.dtype == dtype
            assert torch.equal(ours + 0, plain.get_parameter(name))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(placed.decode(latents).sample, plain.decode(latents).sample)


def vision_tower():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 8}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**small))


def language_model_with_eyes():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def clip():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    vision = small | {"image_size": 16, "patch_size": 8}
    return CLIPModel(
        CLIPConfig(text_config=small | {"vocab_size": 64}, vision_config=vision, projection_dim=8)
    )


@pytest.mark.parametrize("make", [vision_tower, language_model_with_eyes, clip])
def test_models_inside_models_have_the_type_that_was_asked_for(make, tmp_path):
    model = make()
    for stored in DTYPES.values():
        shutil.rmtree(tmp_path)
        model.to(stored).save_pretrained(tmp_path)
        for dtype in DTYPES.values():
            plain = type(model).from_pretrained(tmp_path, dtype=dtype)
            ours = load_model(tmp_path, dtype=dtype)
            expected = dict(plain.state_dict()) | dict(plain.named_buffers())
            found = dict(ours.state_dict()) | dict(ours.named_buffers())
            assert set(found) == set(expected)
            assert not [n for n, tensor in expected.items() if not same(tensor, found[n])]
