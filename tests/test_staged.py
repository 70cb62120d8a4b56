"""Pipelines in three stages: the images of the whole engine, with one stage's weights in memory."""

import gc
import json
import os
import resource
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddinfer.engines.staged import CLAIMED_BATCHES, RoundLimits, StagedEngine
from ddinfer.engines.whole import WholeEngine
from ddinfer.errors import StorageError, UsageError
from ddinfer.models.devices import PlacementError, memory_budgets
from ddinfer.models.loading import load_pipeline
from ddinfer.models.pipeline_folder import PipelineSource
from ddinfer.models.stages import STAGES, StagedPipeline, components_by_stage
from ddinfer.models.stand_ins import is_stand_in
from ddinfer.prompts.files import prompt_from_fields
from ddinfer.request import Prompt, resolve_requests
from tests.tiny_pipelines import IN_STAGES, call_arguments

PLENTY = {"cpu": 10**10}
MEMORY = 1_000_000_000


def staged(model, budgets=None, **more):
    return StagedEngine(StagedPipeline(PipelineSource(model), "auto", budgets or PLENTY), **more)


def whole(folder):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    return WholeEngine(pipe)


def requests_for(kind, prompts, **fields):
    """One Request a prompt; "a | b" has the negative prompt b."""
    rows = []
    for text in prompts:
        prompt, _, negative = text.partition(" | ")
        row = {"prompt": prompt, **call_arguments(kind), **fields}
        rows.append(Prompt(row | {"negative_prompt": negative} if negative else row))
    return resolve_requests(rows)


def pictures(results):
    """Index → the bytes of its picture or frames."""
    found = {}
    for result in results:
        assert result.error is None, result.error.traceback
        frames = [result.image] if result.image is not None else result.frames
        found[result.index] = b"".join(frame.tobytes() for frame in frames)
    return dict(sorted(found.items()))


@pytest.fixture
def decoded(monkeypatch):
    """Everything that any VAE of a class is given to decode and gives back."""
    seen = []

    def listen(kind):
        decode = kind.decode

        def heard(self, z, *args, **kwargs):
            answer = decode(self, z, *args, **kwargs)
            first = answer[0] if isinstance(answer, tuple) else answer.sample
            seen.append((z.clone(), first.clone()))
            return answer

        monkeypatch.setattr(kind, "decode", heard)
        return seen

    return listen


GUIDED = {"flux": {"true_cfg_scale": 2.0}, "qwen": {"true_cfg_scale": 2.0}}


@pytest.mark.parametrize("kind", IN_STAGES)
def test_images_are_those_of_the_whole_engine_to_the_last_bit(kind, tiny, decoded):
    prompts = ["a cat | a dog", "a cat | a dog", "two stones in water | red", "a big house | a dog"]
    requests = requests_for(kind, prompts, **GUIDED.get(kind, {}))
    batches = [requests[:1], requests[1:3], requests[3:]]
    seen = decoded(PipelineSource(tiny(kind)).component_class("vae"))
    expected = list(whole(tiny(kind)).run(batches))
    exact, seen[:] = list(seen), []
    engine = staged(tiny(kind))
    made = list(engine.run(batches))
    assert engine.spilled_bytes == 0
    assert pictures(made) == pictures(expected)
    assert [(r.exact, r.batch) for r in made] == [(r.exact, r.batch) for r in expected]
    assert len(seen) == len(exact) == 3
    for (z, image), (whole_z, whole_image) in zip(seen, exact, strict=True):
        assert torch.equal(z, whole_z)
        assert torch.equal(image, whole_image)
    others = [[replace(r, seed=r.seed + 100) for r in batch] for batch in batches]
    other = pictures(staged(tiny(kind)).run(others))
    assert all(other[k] != picture for k, picture in pictures(made).items())


def test_without_a_negative_prompt_or_guidance_too(tiny):
    requests = requests_for("flux", ["a cat", "a dog"])
    assert pictures(staged(tiny("flux")).run([requests])) == pictures(
        whole(tiny("flux")).run([requests])
    )
    unguided = requests_for("sd", ["a cat", "a dog"], guidance_scale=1.0)
    assert pictures(staged(tiny("sd")).run([unguided])) == pictures(
        whole(tiny("sd")).run([unguided])
    )


def test_an_image_input_is_encoded_by_the_vae_from_disk(tiny, tmp_path):
    folder = tiny("sd")
    index = json.loads((folder / "model_index.json").read_text())
    other = tmp_path / "img2img"
    other.mkdir()
    for part in folder.iterdir():
        if part.is_dir():
            (other / part.name).symlink_to(part)
    index["_class_name"] = "StableDiffusionImg2ImgPipeline"
    (other / "model_index.json").write_text(json.dumps(index))
    Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "in.png")
    fields = {"prompt": "a cat", "image": str(tmp_path / "in.png"), "num_inference_steps": 4}
    requests = resolve_requests([prompt_from_fields(fields, "prompts[0]")])
    assert pictures(staged(other).run([requests])) == pictures(whole(other).run([requests]))


# -------------------------------------------------------------------- memory


def resident(pipe):
    """Component → its parameters that are in memory."""
    return {
        name: found
        for name, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
        and (found := [p for p in model.parameters() if not is_stand_in(p)])
    }


def test_no_two_stages_are_in_memory_at_once(tiny, monkeypatch):
    load, alive, stages = StagedPipeline.load, [], []

    def watched(self, stage):
        gc.collect()
        assert [ref() for ref in alive if ref() is not None] == []
        pipe = load(self, stage)
        found = resident(pipe)
        assert set(found) == set(self.components[stage])
        alive[:] = [weakref.ref(p) for params in found.values() for p in params]
        stages.append(stage)
        return pipe

    monkeypatch.setattr(StagedPipeline, "load", watched)
    requests = requests_for("sdxl", ["a cat", "a dog", "a house"])
    engine = staged(tiny("sdxl"), limits=RoundLimits(batches=2))
    assert len(pictures(engine.run([[r] for r in requests]))) == 3
    assert stages == [*STAGES, *STAGES]
    gc.collect()
    assert [ref() for ref in alive if ref() is not None] == []


def test_a_stage_larger_than_its_budget_is_brought_in_from_disk(tiny):
    requests = requests_for("flux", ["a cat", "a dog"])
    expected = pictures(whole(tiny("flux")).run([requests]))
    engine = staged(tiny("flux"), {"cpu": 300_000})
    placements = engine.pipeline.placements
    assert {"cpu", "disk"} == set(placements["denoise"].devices.values())
    assert pictures(engine.run([requests])) == expected


def test_a_stage_that_cannot_fit_is_named_with_the_sums(tiny):
    with pytest.raises(PlacementError, match=r"the encode stage \(text_encoder.*does not fit"):
        staged(tiny("flux"), {"cpu": 2_000, "disk": 0})


def test_what_memory_does_not_take_goes_to_a_file_that_has_no_name(tiny, tmp_path):
    requests = requests_for("sd3", ["a cat", "a dog", "a house"])
    batches = [[r] for r in requests]
    expected = pictures(whole(tiny("sd3")).run(batches))
    engine = staged(tiny("sd3"), limits=RoundLimits(memory_bytes=0), folder=tmp_path)

    def open_files():
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return [link for link in links if str(tmp_path) in os.path.realpath(link)]

    results = engine.run(batches)
    first = next(results)
    assert len(open_files()) == 1
    assert list(tmp_path.iterdir()) == []
    assert pictures([first, *results]) == expected
    assert open_files() == []
    assert engine.spilled_bytes > 10_000


def test_a_full_disk_ends_the_job_and_fails_no_prompt(tiny, tmp_path):
    engine = staged(tiny("sd"), limits=RoundLimits(memory_bytes=0), folder=tmp_path)
    results = engine.run([requests_for("sd", ["a cat"])])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StorageError, match=f"could not be kept in a file in {tmp_path}.*large"):
            next(results)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_abandoned_round_leaves_nothing_open(tiny, tmp_path):
    requests = requests_for("sd", ["a cat", "a dog"])
    engine = staged(tiny("sd"), limits=RoundLimits(memory_bytes=0), folder=tmp_path)
    results = engine.run([[r] for r in requests])
    next(results)
    before = len(os.listdir("/proc/self/fd"))
    results.close()
    assert len(os.listdir("/proc/self/fd")) < before


def test_rounds_end_by_number_and_by_bytes_and_pull_no_further(tiny):
    requests = requests_for("sd", ["a cat", "a dog", "a house"])
    pulled = []

    def batches():
        for request in requests:
            pulled.append(request.index)
            yield [request]

    engine = staged(tiny("sd"), limits=RoundLimits(batches=2))
    results = engine.run(batches())
    next(results)
    assert pulled == [0, 1]
    assert len(list(results)) == 2
    assert engine.num_rounds == 2
    small = staged(tiny("sd"), limits=RoundLimits(total_bytes=1))
    assert len(list(small.run([[r] for r in requests[:2]]))) == 2
    assert small.num_rounds == 2


def test_limits_follow_the_host_and_the_schedule():
    assert RoundLimits.of(is_claimed=False, host_bytes=64 * MEMORY).memory_bytes == MEMORY
    small = RoundLimits.of(is_claimed=True, host_bytes=16_000_000)
    assert (small.batches, small.memory_bytes) == (CLAIMED_BATCHES, 1_000_000)


def test_nothing_to_do_loads_nothing(tiny, monkeypatch):
    monkeypatch.setattr(StagedPipeline, "load", None)
    assert list(staged(tiny("sd")).run([])) == []


# -------------------------------------------------------------------- encoding once


def count_calls(monkeypatch, kind):
    calls = []
    forward = kind.forward

    def counted(self, *args, **kwargs):
        calls.append(type(self).__name__)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    return calls


def test_identical_prompts_and_the_negative_prompt_are_encoded_once(tiny, monkeypatch):
    from transformers.models.clip.modeling_clip import CLIPEncoder

    prompts = ["a cat | bad", "a cat | bad", "a dog | bad", "a cat | bad", "a house | bad"]
    requests = requests_for("sd", prompts)
    batches = [[r] for r in requests]
    calls = count_calls(monkeypatch, CLIPEncoder)
    made = pictures(staged(tiny("sd")).run(batches))
    assert len(calls) == 3 + 1
    calls.clear()
    assert pictures(whole(tiny("sd")).run(batches)) == made
    assert len(calls) == 2 * 5
    calls.clear()  # in a batch of two the negative prompt is there twice
    list(staged(tiny("sd")).run([requests[:2], requests[2:4]]))
    assert len(calls) == 2 + 1


def test_an_encoder_that_answers_with_a_cache_is_asked_once_too(tiny, monkeypatch):
    from transformers import Gemma2Model

    calls = count_calls(monkeypatch, Gemma2Model)
    requests = requests_for("sana", ["a cat | bad", "a dog | bad", "a cat | bad"])
    batches = [[r] for r in requests]
    made = pictures(staged(tiny("sana")).run(batches))
    assert len(calls) == 2 + 1
    assert pictures(whole(tiny("sana")).run(batches)) == made


# -------------------------------------------------------------------- failures


def poison(monkeypatch, stage):
    """Prompts with "poison" fail in a stage: their embeddings are NaN, and that is noticed."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    encode, forward = StableDiffusionPipeline.encode_prompt, UNet2DConditionModel.forward
    decode = AutoencoderKL.decode

    def spoilt(self, prompt, *args, **kwargs):
        texts = [prompt] if isinstance(prompt, str) else prompt
        if stage == "encode" and any("poison" in text for text in texts):
            raise ValueError("cannot encode that")
        embeds, negative = encode(self, prompt, *args, **kwargs)
        for row, text in enumerate(texts):
            if "poison" in text:
                embeds[row] = float("nan")
        return embeds, negative

    def checked(self, sample, timestep, encoder_hidden_states, *args, **kwargs):
        if stage == "denoise" and encoder_hidden_states.isnan().any():
            raise ValueError("cannot denoise that")
        return forward(self, sample, timestep, encoder_hidden_states, *args, **kwargs)

    def looked(self, z, *args, **kwargs):
        if stage == "decode" and z.isnan().any():
            raise ValueError("cannot decode that")
        return decode(self, z, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", spoilt)
    monkeypatch.setattr(UNet2DConditionModel, "forward", checked)
    monkeypatch.setattr(AutoencoderKL, "decode", looked)


@pytest.mark.parametrize("stage", STAGES)
def test_a_failing_prompt_fails_alone(stage, tiny, monkeypatch):
    poison(monkeypatch, stage)
    requests = requests_for("sd", ["a cat", "poison", "a dog", "a house"])
    batches = [requests[:2], requests[2:]]
    made = {r.index: r for r in staged(tiny("sd")).run(batches)}
    assert sorted(made) == [0, 1, 2, 3]
    assert made[1].error.type == "ValueError"
    assert made[1].error.message == f"cannot {stage} that"
    assert [made[k].exact for k in range(4)] == [False, False, True, True]
    expected = {r.index: r for r in whole(tiny("sd")).run(batches)}
    for k in (0, 2, 3):
        assert made[k].image.tobytes() == expected[k].image.tobytes()
        assert (made[k].exact, made[k].batch) == (expected[k].exact, expected[k].batch)


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_halves_the_batch_and_the_ceiling_is_remembered(stage, tiny, monkeypatch):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kind, method, largest = {
        "encode": (CLIPTextModel, "forward", 2),
        "denoise": (UNet2DConditionModel, "forward", 4),  # guidance doubles it
        "decode": (AutoencoderKL, "decode", 2),
    }[stage]
    compute, too_large = getattr(kind, method), []

    def limited(self, first=None, *args, **kwargs):
        rows = len(first if first is not None else kwargs["input_ids"])
        if rows > largest:
            too_large.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, first, *args, **kwargs)

    monkeypatch.setattr(kind, method, limited)
    requests = requests_for("sd", [f"a cat {k} | a dog" for k in "abcdefgh"])
    results = list(staged(tiny("sd")).run([requests[:4], requests[4:]]))
    assert len(too_large) == 1
    assert sorted(r.index for r in results) == list(range(8))
    assert {r.batch for r in results} == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert not any(r.exact for r in results)
    pairs = [requests[k : k + 2] for k in range(0, 8, 2)]
    assert pictures(results) == pictures(whole(tiny("sd")).run(pairs))


def test_a_single_image_that_does_not_fit_is_recorded(tiny, monkeypatch):
    from diffusers import UNet2DConditionModel

    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UNet2DConditionModel, "forward", full)
    (result,) = staged(tiny("sd")).run([requests_for("sd", ["a cat"])])
    assert result.error.type == "OutOfMemoryError"


def test_a_sticky_device_error_ends_the_process_and_is_no_failed_prompt(tiny, monkeypatch):
    from diffusers import UNet2DConditionModel

    def broken(self, *args, **kwargs):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(UNet2DConditionModel, "forward", broken)
    with pytest.raises(torch.AcceleratorError):
        list(staged(tiny("sd")).run([requests_for("sd", ["a cat"])]))


# -------------------------------------------------------------------- what cannot be staged


def index_of(folder, pipeline, **components):
    """A pipeline's folder with nothing but names."""
    for name in components:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    data = {"_class_name": pipeline, **components}
    (folder / "model_index.json").write_text(json.dumps(data))
    return PipelineSource(folder)


CLIP, KL = ["transformers", "CLIPTextModel"], ["diffusers", "AutoencoderKL"]
UNET = ["diffusers", "UNet2DConditionModel"]


@pytest.mark.parametrize(
    ("pipeline", "components", "message"),
    [
        ("AmusedPipeline", {"vqvae": ["diffusers", "VQModel"]}, "when it needs its vqvae"),
        ("LDMTextToImagePipeline", {"unet": UNET}, "it has no encode_prompt method"),
        ("StableDiffusionPipeline", {"unet": UNET, "vae": KL}, "it has no text encoder"),
        ("StableDiffusionPipeline", {"text_encoder": CLIP, "vae": KL}, r"no denoiser \(trans"),
        ("StableDiffusionPipeline", {"text_encoder": CLIP, "unet": UNET}, "it has no vae"),
        (
            "AnimateDiffPipeline",
            {"text_encoder": CLIP, "unet": UNET, "vae": KL},
            "decodes a video in several pieces",
        ),
    ],
)
def test_what_cannot_run_in_stages_says_so_and_names_the_alternative(
    pipeline, components, message, tmp_path
):
    with pytest.raises(UsageError, match=rf"{pipeline} cannot .*{message}.*--placement balanced"):
        components_by_stage(index_of(tmp_path, pipeline, **components))


def test_a_pipeline_that_decodes_twice_ends_the_job_instead_of_drawing_nonsense(tiny, monkeypatch):
    from diffusers import StableDiffusionPipeline

    def check(self, image, device, dtype):
        self.vae.decode(torch.zeros(1, 4, 16, 16))
        return image, None

    monkeypatch.setattr(StableDiffusionPipeline, "run_safety_checker", check)
    with pytest.raises(UsageError, match="it decodes in several pieces; use --placement balanced"):
        list(staged(tiny("sd")).run([requests_for("sd", ["a cat"])]))


# -------------------------------------------------------------------- heard by others


class Ear:
    """Who listens: which stage ran when a step was heard."""

    def __init__(self):
        self.heard, self.stage = {}, ""

    def steps(self):
        self.heard[self.stage] = self.heard.get(self.stage, 0) + 1

    def waits(self):
        raise AssertionError("a staged engine waits for nobody")

    def listen_to(self, pipe):
        pipe.vae.decoder.register_forward_pre_hook(lambda *_: self.steps())


def test_every_stage_is_heard_and_so_is_loading(tiny, monkeypatch):
    ear, load = Ear(), StagedPipeline.load

    def told(self, stage):
        ear.stage = f"loading {stage}"
        pipe = load(self, stage)
        ear.stage = stage
        return pipe

    monkeypatch.setattr(StagedPipeline, "load", told)
    engine = staged(tiny("sd"))
    engine.set_progress_listener(ear)
    list(engine.run([requests_for("sd", ["a cat"])]))
    assert set(ear.heard) == {*STAGES, *(f"loading {stage}" for stage in STAGES)}


# -------------------------------------------------------------------- a gigabyte


BIG = """
import sys, threading, time
sys.path.insert(0, {root!r})
from pathlib import Path
from ddinfer.engines.staged import StagedEngine
from ddinfer.models.pipeline_folder import PipelineSource
from ddinfer.models.stages import StagedPipeline
from tests.test_staged import requests_for
import diffusers, transformers
requests = requests_for("flux", ["a cat", "a dog"])
def private():  # pages of mapped files are the kernel's to keep or drop
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) * 1024
peak, stop = 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, private())
        time.sleep(0.01)
pipeline = StagedPipeline(PipelineSource(Path({folder!r})), "auto", {{"cpu": 10**11}})
sizes = {{stage: sum(p.bytes_on().values()) for stage, p in pipeline.placements.items()}}
before = private()
watcher = threading.Thread(target=watch); watcher.start()
results = list(StagedEngine(pipeline).run([[r] for r in requests]))
stop = True; watcher.join()
assert all(r.error is None for r in results)
print(sum(sizes.values()), max(sizes.values()), peak - before)
"""


@pytest.mark.nightly
def test_a_gigabyte_peaks_at_its_largest_stage(tmp_path):
    import diffusers
    from transformers import T5Config, T5EncoderModel

    from tests.tiny_pipelines import flux

    pipe = flux()
    # Stored in another type than it has in memory, so that it is memory and no mapped file.
    pipe.text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(pipe.tokenizer_2), d_model=1024, d_kv=64, d_ff=4096, num_layers=10)
    )
    pipe.transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=6, attention_head_dim=64,
        num_attention_heads=16, joint_attention_dim=1024, pooled_projection_dim=32,
        axes_dims_rope=(8, 28, 28),
    )  # fmt: skip
    pipe.to(torch.bfloat16).save_pretrained(tmp_path)
    code = BIG.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    total, largest, peak = map(int, done.stdout.split())
    print(
        f"{total / 1e6:.0f} MB of weights, largest stage {largest / 1e6:.0f}, peak {peak / 1e6:.0f}"
    )
    assert total >= 1e9
    assert peak <= 1.15 * largest + 100e6


# -------------------------------------------------------------------- on a GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", IN_STAGES)
def test_on_a_gpu_the_pictures_are_the_same_and_memory_is_one_stage(kind, tiny):
    folder, requests = tiny(kind), requests_for(kind, ["a cat", "a dog"])
    pipe = load_pipeline(folder, device="cuda:0", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    expected = list(WholeEngine(pipe).run([requests]))
    del pipe
    gc.collect()
    budgets = memory_budgets({0: "8GB"}, [0])
    pipeline = StagedPipeline(PipelineSource(folder), "float32", budgets)
    made = list(StagedEngine(pipeline).run([requests]))
    for one, other in zip(made, expected, strict=True):
        frames = [one.image] if one.image is not None else one.frames
        others = [other.image] if other.image is not None else other.frames
        for a, b in zip(frames, others, strict=True):
            difference = np.asarray(a).astype(int) - np.asarray(b).astype(int)
            assert np.abs(difference).max() <= 1
