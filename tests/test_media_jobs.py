"""Videos with sound, sound alone, and pipelines without a prompt: jobs against plain diffusers."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.kandinsky5.pipeline_output import KandinskyImagePipelineOutput
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput
from diffusers.pipelines.marigold.pipeline_marigold_depth import MarigoldDepthOutput
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput
from diffusers.utils import load_image, load_video
from PIL import Image

import ddinfer
from ddinfer.cli import dispatch
from ddinfer.config import JobConfig
from ddinfer.engines.outputs import outputs_of
from ddinfer.errors import InputError, UsageError
from ddinfer.inputs import load_input, read_audio, read_frames
from ddinfer.job.run import run_job
from ddinfer.prompts.files import read_prompts
from ddinfer.request import Request, Result
from ddinfer.storage.files import Files
from ddinfer.storage.media import Formats, read_text
from ddinfer.storage.verify import verify
from tests.ranks import run_ranks
from tests.test_storage_media import RATE, frames, sound, video
from tests.tiny_pipelines import call_arguments, tiny_pipeline

ENDINGS = {
    "ltx2": "mp4",
    "stable_audio": "wav",
    "stable_video": "mp4",
    "marigold": "png",
    "unconditional": "png",
}
#: What a row says for each of them.
ROWS = {
    "ltx2": {"prompt": "a red cat"},
    "stable_audio": {"prompt": "a red cat"},
    "stable_video": {"image": "first.png"},
    "marigold": {"image": "first.png"},
    "unconditional": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pipelines, a picture, and a prompt file for each of them."""
    root = tmp_path_factory.mktemp("media")
    frames(1, (40, 32))[0].save(root / "first.png")
    for kind in ENDINGS:
        tiny_pipeline(kind, root)
        rows = [ROWS[kind], {**ROWS[kind], "seed": 7}]
        (root / f"{kind}.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    return root


def job(folder, out, kind, **options):
    arguments = call_arguments(kind)
    named = ("num_inference_steps", "height", "width")
    options.update((name, arguments.pop(name)) for name in named if name in arguments)
    options.setdefault("prompts", str(folder / f"{kind}.jsonl"))
    return JobConfig(
        model=str(folder / kind),
        output=str(out),
        device="cpu",
        num_threads=1,
        pipeline_kwargs=arguments,
        **options,
    )


def files(out):
    return {path.name: path.read_bytes() for path in sorted((out / "images/0000").iterdir())}


def plain(folder, kind, seed):
    """What plain diffusers makes, as a Result."""
    torch.set_num_threads(1)
    pipe = DiffusionPipeline.from_pretrained(folder / kind)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"generator": torch.Generator("cpu").manual_seed(seed), **call_arguments(kind)}
    request = Request(0, "a", "", seed)
    if kind == "stable_audio":
        [audio] = pipe("a red cat", **arguments).audios
        return Result(request, audio=audio.numpy(), sampling_rate=800)
    if kind == "stable_video":
        image = load_image(str(folder / "first.png"))
        return Result(request, frames=pipe(image, **arguments, output_type="pil").frames[0], fps=7)
    if kind == "unconditional":
        return Result(request, image=pipe(**arguments).images[0])
    if kind == "marigold":
        depth = pipe(load_image(str(folder / "first.png")), **arguments).prediction
        # What its export_depth_to_16bit_png does; that one fails with this Pillow.
        return Result(request, image=Image.fromarray((depth[0, ..., 0] * 65535).astype(np.uint16)))
    made = pipe("a red cat", **arguments, output_type="pil")
    [audio] = made.audio.numpy()
    return Result(request, frames=made.frames[0], audio=audio, sampling_rate=16_000, fps=24)


def on_rank(world, config):
    return run_job(config, world)


@pytest.mark.parametrize("kind", ENDINGS)
def test_files_are_those_of_plain_diffusers_on_any_ranks_and_resumed(kind, folder, tmp_path):
    out = tmp_path / "one"
    report = run_job(job(folder, out, kind))
    assert (report.num_made, report.num_failed) == (2, 0)
    made = files(out)
    names = [f"0000000{k}.{ENDINGS[kind]}" for k in range(2)]
    assert list(made) == names
    for name, seed in zip(names, (0, 7), strict=True):
        text = read_text(str(out / "images/0000" / name))
        assert Formats().encode(plain(folder, kind, seed), text) == made[name]
    assert made[names[0]] != Formats().encode(
        plain(folder, kind, 1), read_text(str(out / "images/0000" / names[0]))
    )
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"images/0000/{name}" for name in names]
    (out / "images/0000" / names[1]).unlink()
    run_job(job(folder, out, kind))
    assert files(out) == made
    assert verify(Files(), str(out)).is_good
    run_ranks(on_rank, 2, job(folder, tmp_path / "two", kind), join=False)
    assert files(tmp_path / "two") == made


@pytest.mark.parametrize(
    ("kind", "options", "num_ranks"),
    [
        ("ltx2", {"pipeline_parallel": 2}, 2),
        pytest.param("ltx2", {"placement": "balanced"}, 1, marks=pytest.mark.nightly),
        pytest.param("stable_audio", {"pipeline_parallel": 2}, 2, marks=pytest.mark.nightly),
        pytest.param("stable_audio", {"placement": "balanced"}, 1, marks=pytest.mark.nightly),
        pytest.param("stable_video", {"pipeline_parallel": 2}, 2, marks=pytest.mark.nightly),
        pytest.param("stable_video", {"placement": "balanced"}, 1, marks=pytest.mark.nightly),
    ],
)
def test_cut_and_placed_models_make_the_same_files(kind, options, num_ranks, folder, tmp_path):
    run_job(job(folder, tmp_path / "one", kind))
    run_ranks(on_rank, num_ranks, job(folder, tmp_path / "out", kind, **options), join=False)
    assert files(tmp_path / "out") == files(tmp_path / "one")


@pytest.mark.parametrize("kind", ENDINGS)
def test_stages_are_refused_by_name(kind, folder, tmp_path):
    with pytest.raises(UsageError, match=r"cannot run in stages: .* use --placement balanced"):
        run_job(job(folder, tmp_path / "out", kind, placement="staged"))
    assert not (tmp_path / "out").exists()


def test_sound_in_animated_images_is_refused_before_loading(folder, tmp_path):
    with pytest.raises(UsageError, match=r"LTX2Pipeline makes videos with sound, .*apng"):
        run_job(job(folder, tmp_path / "out", "ltx2", video_format="apng"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ENDINGS)
def test_replay_makes_the_same_bytes(kind, folder, tmp_path, capsys):
    out = tmp_path / "out"
    run_job(job(folder, out, kind, limit=1, fps=12))
    path = out / f"images/0000/00000000.{ENDINGS[kind]}"
    copy = tmp_path / f"copy.{ENDINGS[kind]}"
    assert dispatch(["replay", str(path), "--save", str(copy)]) == 0
    assert "bit-identical: every byte" in capsys.readouterr().out
    assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("options", [{"video_format": "frames"}, {"audio_format": "flac"}])
def test_another_format_is_another_job(options, folder, tmp_path):
    run_job(job(folder, tmp_path / "out", "stable_audio", limit=1))
    with pytest.raises(UsageError, match=next(iter(options))):
        run_job(job(folder, tmp_path / "out", "stable_audio", limit=1, **options))


def test_generate_returns_sound_and_frames(folder):
    pipe = DiffusionPipeline.from_pretrained(folder / "ltx2")
    pipe.set_progress_bar_config(disable=True)
    [result] = ddinfer.generate(pipe, ["a red cat"], seed=7, **call_arguments("ltx2"))
    expected = plain(folder, "ltx2", 7)
    assert (result.sampling_rate, result.fps) == (16_000, 24)
    assert np.array_equal(result.audio, expected.audio)
    assert all(map(np.array_equal, result.frames, expected.frames))


def test_generate_needs_no_prompt_where_the_pipeline_takes_none(folder):
    pipe = DiffusionPipeline.from_pretrained(folder / "stable_video")
    pipe.set_progress_bar_config(disable=True)
    rows = [{"image": Image.open(folder / "first.png"), "seed": 7}]
    [result] = ddinfer.generate(pipe, rows, **call_arguments("stable_video"))
    expected = plain(folder, "stable_video", 7)
    assert all(map(np.array_equal, result.frames, expected.frames))
    with pytest.raises(UsageError, match="StableVideoDiffusionPipeline takes no argument 'prompt'"):
        ddinfer.generate(pipe, ["a red cat"])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            '{"image": "first.png", "prompt": "a"}',
            {},
            r"rows.jsonl:1: this pipeline takes no prompt",
        ),
        ('{"seed": 3}', {}, "no image"),
        ('{"image": "first.png"}', {"batch_size": 2}, "use --batch_size 1"),
        ('{"image": "stable_video.jsonl"}', {}, "image: .*not an image"),
    ],
)
def test_what_a_call_without_a_prompt_lacks_is_said_before_loading(
    rows, options, message, folder, tmp_path
):
    (folder / "rows.jsonl").write_text(rows)
    config = job(folder, tmp_path / "out", "stable_video", prompts=str(folder / "rows.jsonl"))
    with pytest.raises(UsageError, match=message):
        run_job(ddinfer.JobConfig(**{**vars(config), **options}))
    assert not (tmp_path / "out").exists()


def test_a_pipeline_with_a_prompt_still_needs_one(folder, tmp_path):
    (folder / "none.jsonl").write_text('{"seed": 3}')
    config = job(folder, tmp_path / "out", "ltx2", prompts=str(folder / "none.jsonl"))
    with pytest.raises(UsageError, match="no 'prompt'; every row needs one"):
        run_job(config)


def test_one_image_for_a_pipeline_without_a_prompt_needs_no_prompt_file(folder, tmp_path):
    config = job(folder, tmp_path / "out", "stable_video", prompts=None)
    arguments = {**config.pipeline_kwargs, "image": str(folder / "first.png")}
    run_job(ddinfer.JobConfig(**{**vars(config), "pipeline_kwargs": arguments}))
    text = read_text(str(tmp_path / "out/images/0000/00000000.mp4"))
    assert (
        Formats().encode(plain(folder, "stable_video", 0), text)
        == (tmp_path / "out/images/0000/00000000.mp4").read_bytes()
    )


# --- what pipelines return --------------------------------------------------------------------


class Vocoder:
    class config:
        output_sampling_rate = RATE


class Pipe:
    vocoder = Vocoder()

    def __call__(self, fps=24.0): ...


PIXELS = np.linspace(0, 1, 2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)


def test_outputs_are_found_whatever_they_are_called():
    batch = PIXELS[None]
    [output] = outputs_of(Pipe(), LTX2PipelineOutput(frames=batch, audio=sound()[None]), 1, {})
    assert (len(output.frames), output.fps, output.audio.shape) == (2, 24.0, (2, RATE))
    [output] = outputs_of(Pipe(), KandinskyImagePipelineOutput(image=PIXELS[:1]), 1, {})
    assert (output.image.size, output.frames, output.audio) == ((6, 4), None, None)
    one, _ = outputs_of(Pipe(), AudioPipelineOutput(audios=sound()), 2, {})  # of one channel
    assert (one.audio.shape, one.sampling_rate, one.image) == ((1, RATE), RATE, None)
    depth = MarigoldDepthOutput(prediction=PIXELS[:1, ..., :1], uncertainty=None, latent=None)
    [output] = outputs_of(Pipe(), depth, 1, {})
    assert output.image.mode == "I;16"
    assert np.asarray(output.image).max() == int(PIXELS[0, ..., 0].max() * 65535)


def test_a_bare_video_with_its_sound_is_one_output():
    """Cosmos 3 returns them so, as `video` and `sound`."""
    bare = type("Output", (), {"video": PIXELS, "sound": torch.from_numpy(sound())})()
    [output] = outputs_of(Pipe(), bare, 1, {})
    assert (len(output.frames), output.audio.shape) == (2, (2, RATE))


def test_frames_without_a_number_a_second_last_as_long_as_their_sound():
    class Silent(Pipe):
        def __call__(self): ...

    made = LTX2PipelineOutput(frames=PIXELS[None], audio=sound(0.25)[None])
    [output] = outputs_of(Silent(), made, 1, {})
    assert output.fps == 8.0


def test_strange_outputs_are_errors_and_flags():
    with pytest.raises(RuntimeError, match="without any of frames, videos"):
        outputs_of(Pipe(), type("Latents", (), {"latents": 1})(), 1, {})
    with pytest.raises(RuntimeError, match="returned 2 images for 1 prompts"):
        outputs_of(Pipe(), type("Two", (), {"images": PIXELS})(), 1, {})
    [output] = outputs_of(Pipe(), AudioPipelineOutput(audios=0 * sound()[None]), 1, {})
    assert output.flags == ("silent",)
    broken = sound()[None].copy()
    broken[0, 0, 5] = np.nan
    [output] = outputs_of(Pipe(), AudioPipelineOutput(audios=broken), 1, {})
    assert output.flags == ("nan",)


# --- inputs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """One video of twelve frames in every form, and sound."""
    root = tmp_path_factory.mktemp("clips")
    moving = frames()
    for name, formats in {"a.mp4": Formats(), "a.zip": Formats(video="frames")}.items():
        (root / name).write_bytes(formats.encode(video(with_sound=name == "a.mp4"), {}))
    (root / "folder").mkdir()
    for k, frame in enumerate(moving):
        frame.save(root / f"folder/{k}.png")  # 10.png comes after 9.png
    (root / "folder/notes.txt").write_text("not a frame")
    first, *rest = (frame.quantize(64) for frame in moving)
    first.save(root / "a.gif", save_all=True, append_images=rest)
    (root / "a.wav").write_bytes(
        Formats().encode(Result(Request(0, "a", "", 0), audio=sound(), sampling_rate=RATE), {})
    )
    (root / "broken.mp4").write_bytes((root / "a.mp4").read_bytes()[:2000])
    return root


@pytest.mark.parametrize("name", ["a.mp4", "a.zip", "folder", "a.gif"])
def test_a_video_is_its_frames(name, clips):
    (clips / "rows.jsonl").write_text(json.dumps({"prompt": "a", "video": name}))
    [prompt] = read_prompts(clips / "rows.jsonl")
    loaded, digest = load_input("video", prompt.fields["video"])
    assert digest == prompt.fields["input_hashes"]["video"]
    assert [frame.mode for frame in loaded] == ["RGB"] * 12
    lossless = name in ("a.zip", "folder")
    for frame, expected in zip(loaded, frames(), strict=True):
        off = np.abs(np.subtract(frame, expected, dtype=int))
        assert off.max() == 0 if lossless else off.mean() < 12


@pytest.mark.parametrize("form", ["jsonl", "csv", "pipeline_kwargs", "generate"])
def test_a_job_on_a_video(form, clips, tmp_path):
    """Compared with plain diffusers, called with what its `load_video` returns."""
    model = tiny_pipeline("video_to_video", tmp_path)
    arguments = call_arguments("video_to_video")
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    loaded = [frame.convert("RGB") for frame in load_video(str(clips / "a.gif"))]
    generator = torch.Generator("cpu").manual_seed(0)
    [expected] = pipe(
        prompt="a red cat", video=loaded, generator=generator, output_type="pil", **arguments
    ).frames
    if form == "generate":
        [result] = ddinfer.generate(pipe, [{"prompt": "a red cat", "video": loaded}], **arguments)
        shown = result.frames
    else:
        more = {"prompts": str(tmp_path / f"rows.{form}")}
        if form == "jsonl":
            row = {"prompt": "a red cat", "video": str(clips / "a.gif")}
            (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        elif form == "csv":
            (tmp_path / "rows.csv").write_text(f"prompt,video\na red cat,{clips / 'a.gif'}\n")
        else:
            arguments["video"] = str(clips / "a.gif")
            more = {"prompt": ("a red cat",)}
        named = {n: arguments.pop(n) for n in ("num_inference_steps", "height", "width")}
        out = tmp_path / "out"
        config = JobConfig(
            model=str(model), output=str(out), device="cpu", num_threads=1, video_format="frames",
            pipeline_kwargs=arguments, **named, **more,
        )  # fmt: skip
        assert run_job(config).num_failed == 0
        shown = read_frames(str(out / "images/0000/00000000.zip"))
    for frame, wanted in zip(shown, expected, strict=True):
        assert np.array_equal(frame, wanted)


def test_masks_and_sound_by_path(clips):
    masks, _ = load_input("mask", str(clips / "folder"))
    assert {mask.mode for mask in masks} == {"L"}
    heard, _ = load_input("src_audio", str(clips / "a.wav"))
    assert heard.shape == (2, RATE)
    assert np.abs(heard.numpy() - sound()).max() < 1e-4
    resampled, _ = load_input("initial_audio_waveforms", str(clips / "a.wav"), 8000)
    assert resampled.shape == (1, 2, 8000)
    track, rate = read_audio(str(clips / "a.mp4"))
    assert (len(track), rate) == (2, RATE)


def test_a_changed_frame_changes_the_hash(clips, tmp_path):
    (tmp_path / "folder").mkdir()
    for k, frame in enumerate(read_frames(str(clips / "folder"))):
        frame.save(tmp_path / f"folder/{k}.png")
    _, before = load_input("video", str(tmp_path / "folder"))
    frames(1, seed=5)[0].save(tmp_path / "folder/3.png")
    assert load_input("video", str(tmp_path / "folder"))[1] != before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "broken.mp4"}, "not a video that can be decoded"),
        ({"video": "none.mp4"}, "No such file"),
        ({"image": "a.mp4"}, "image takes a picture"),
        ({"src_audio": "a.gif"}, "not sound that can be decoded"),
        ({"video": 3}, "must be a file's path"),
    ],
)
def test_inputs_that_cannot_be_decoded_are_named_with_their_line(row, message, clips):
    (clips / "bad.jsonl").write_text(json.dumps({"prompt": "a", **row}))
    with pytest.raises(InputError, match=rf"bad\.jsonl:1: .*{message}"):
        read_prompts(clips / "bad.jsonl")
