"""The job on real ranks: which images it makes, what it writes, what it does when prompts fail."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ddinfer.config import JobConfig
from ddinfer.errors import EXIT_FAILED_PROMPTS, RankError, UsageError
from ddinfer.job.run import run_job
from ddinfer.models.loading import load_pipeline
from ddinfer.tiny.check import shows
from tests.moody_pipeline import colour, moody_pipeline
from tests.ranks import run_ranks
from tests.tiny_pipelines import call_arguments, tiny_pipeline


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    return tiny_pipeline("sd", tmp_path_factory.mktemp("model"))


def job(model, output, prompts, **more):
    options = {"num_threads": 1, "device": "cpu", "trust_remote_code": True, **more}
    return JobConfig(model=str(model), output=str(output), prompt=tuple(prompts), **options)


def on_rank(world, config):
    return run_job(config, world)


def run(config, num_ranks):
    """The job on ``num_ranks`` ranks → the report, which is the same on all of them."""
    reports = run_ranks(on_rank, num_ranks, config, join=False)
    assert all(report == reports[0] for report in reports)
    return reports[0]


def pixels(output):
    """index → picture, of all images in a folder."""
    files = sorted(Path(output, "images").glob("*/*.png"))
    return {int(f.stem): np.asarray(Image.open(f)) for f in files}


def file_bytes(output):
    return {f.name: f.read_bytes() for f in sorted(Path(output, "images").glob("*/*.png"))}


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def plain_diffusers(folder, prompts, seed):
    """The loop that everybody writes: one process, one prompt at a time."""
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for k, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(seed + k)
        images.append(pipe(prompt, generator=generator, **call_arguments("sd")).images[0])
    return [np.asarray(image) for image in images]


def test_images_are_bit_identical_over_world_sizes_and_to_a_plain_loop(tiny_sd, tmp_path):
    prompts = [f"a red cat {k}" for k in range(5)]
    arguments = call_arguments("sd")
    torch.set_num_threads(1)
    expected = plain_diffusers(tiny_sd, prompts, seed=7)
    other_seed = plain_diffusers(tiny_sd, prompts, seed=8)
    files = None
    for num_ranks in (1, 2, 3, 4):
        out = tmp_path / str(num_ranks)
        report = run(job(tiny_sd, out, prompts, seed=7, **arguments), num_ranks)
        assert [times.rank for times in report.ranks] == list(range(num_ranks))
        made = pixels(out)
        assert list(made) == list(range(5))
        assert all(np.array_equal(made[k], expected[k]) for k in range(5))
        assert not any(np.array_equal(made[k], other_seed[k]) for k in range(5))
        files = files or file_bytes(out)
        assert file_bytes(out) == files
    perturbed = job(tiny_sd, tmp_path / "perturbed", prompts, seed=8, **arguments)
    run(perturbed, 2)
    assert file_bytes(tmp_path / "perturbed") != files


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_any_number_of_prompts_on_any_number_of_ranks(moody, tmp_path, num_ranks):
    for num_prompts in sorted({1, num_ranks - 1, num_ranks, num_ranks + 1} - {0}):
        out = tmp_path / str(num_prompts)
        report = run(job(moody, out, ["x"] * num_prompts, seed=10), num_ranks)
        assert (report.num_made, report.num_failed) == (num_prompts, 0)
        made = pixels(out)
        assert list(made) == list(range(num_prompts))
        for k, picture in made.items():
            assert tuple(picture[0, 0]) == colour(10 + k)
            assert tuple(picture[0, 0]) != colour(11 + k)


def test_the_picture_at_each_place_shows_the_prompt_of_that_place(tmp_path):
    prompts = ["a red circle", "a blue square", "a green triangle", "a yellow square"]
    config = job("shapes-flux", tmp_path, prompts)
    run(config, 3)
    made = {k: Image.fromarray(picture) for k, picture in pixels(tmp_path).items()}
    assert [shows(made[k], prompt) for k, prompt in enumerate(prompts)] == [True] * 4
    swapped = prompts[1:] + prompts[:1]
    assert [shows(made[k], prompt) for k, prompt in enumerate(swapped)] == [False] * 4


def test_batches_do_not_depend_on_the_number_of_ranks(moody, tmp_path):
    prompts = [f"x {k}" for k in range(7)]
    for num_ranks in (1, 3):
        run(job(moody, tmp_path / str(num_ranks), prompts, batch_size=3), num_ranks)
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "3")
    chunk = json.loads(Image.open(tmp_path / "3/images/0000/00000004.png").text["ddinfer"])
    assert chunk["batch"] == [3, 4, 5]


def test_a_failed_prompt_is_listed_and_the_rest_is_made(moody, tmp_path):
    prompts = ["x", "fail this", "y", "z"]
    report = run(job(moody, tmp_path, prompts), 2)
    assert (report.num_made, report.num_failed, report.exit_code) == (3, 1, EXIT_FAILED_PROMPTS)
    assert sorted(pixels(tmp_path)) == [0, 2, 3]
    (failure,) = lines(tmp_path / "failures.jsonl")
    assert (failure["index"], failure["id"]) == (1, "00000001")
    assert failure["message"] == "cannot draw this"
    assert "moody.py" in failure["traceback"]
    assert [row["index"] for row in lines(tmp_path / "metadata.jsonl")] == [0, 2, 3]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("finished", 3)


def test_a_batch_with_a_bad_neighbour_is_made_one_by_one_and_says_so(moody, tmp_path):
    report = run(job(moody, tmp_path, ["x", "fail it", "y"], batch_size=3), 1)
    assert (report.num_made, report.num_failed, report.num_inexact) == (2, 1, 2)
    rows = lines(tmp_path / "metadata.jsonl")
    assert [row["exact"] for row in rows] == [False, False]
    chunk = json.loads(Image.open(tmp_path / "images/0000/00000002.png").text["ddinfer"])
    assert (chunk["exact"], chunk["batch"]) == (False, [2])


def test_out_of_memory_makes_smaller_batches(moody, tmp_path):
    report = run(job(moody, tmp_path, ["many 2"] * 6, batch_size=4), 1)
    assert (report.num_made, report.num_inexact) == (6, 4)
    assert list(pixels(tmp_path)) == list(range(6))


def test_the_same_command_makes_only_what_is_missing(moody, tmp_path):
    config = job(moody, tmp_path, [f"x {k}" for k in range(5)], batch_size=2)
    run(config, 2)
    before = file_bytes(tmp_path)
    kept = tmp_path / "images/0000/00000002.png"
    written = kept.stat().st_mtime_ns
    (tmp_path / "images/0000/00000003.png").unlink()
    report = run(config, 3)
    assert (report.num_new, report.num_made) == (1, 5)
    assert file_bytes(tmp_path) == before
    assert kept.stat().st_mtime_ns == written, "its batch ran again, but it was there already"
    assert run(config, 1).num_new == 0


def test_another_job_in_the_folder_is_refused_on_every_rank(moody, tmp_path):
    run(job(moody, tmp_path, ["x"]), 1)
    before = file_bytes(tmp_path)
    with pytest.raises(UsageError, match="--overwrite"):
        run(job(moody, tmp_path, ["x"], seed=1), 1)
    with pytest.raises((UsageError, RankError), match="--overwrite"):
        run(job(moody, tmp_path, ["x"], seed=1), 2)
    assert file_bytes(tmp_path) == before
    run(job(moody, tmp_path, ["x"], seed=1, overwrite=True), 2)
    assert file_bytes(tmp_path) != before


def test_threads_of_the_first_run_are_kept_when_the_job_goes_on(moody, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    config = job(moody, tmp_path, ["x", "y"], num_threads=None)
    run_job(config)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_job(config).num_made == 2
    assert json.loads((tmp_path / "job.json").read_text())["identity"]["num_threads"] == 2
    torch.set_num_threads(1)


def test_input_errors_come_before_anything_is_written(moody, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="takes no argument 'etta'"):
        run_job(job(moody, out, ["x"], pipeline_kwargs={"etta": 1}))
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}\n{"prompt": 3}\n')
    with pytest.raises(UsageError, match=r"p\.jsonl:2"):
        run_job(JobConfig(model=moody, output=str(out), prompts=str(file), trust_remote_code=True))
    with pytest.raises(UsageError, match="trust_remote_code"):
        run_job(JobConfig(model=moody, output=str(out), prompt=("x",)))
    with pytest.raises(UsageError, match="no prompts for"):
        run_job(JobConfig(model=moody, output=str(out), trust_remote_code=True))
    with pytest.raises(UsageError, match="run_job is one rank and starts no others"):
        run_job(job(moody, out, ["x"], nproc_per_node=2))
    assert not out.exists()


def test_a_rank_that_breaks_is_raised_on_every_rank_and_nothing_made_is_lost(moody, tmp_path):
    out = tmp_path / "out"
    file = tmp_path / "p.txt"
    file.write_text("x\nx\nx\nbreak\n")
    options = {"num_threads": 1, "device": "cpu", "trust_remote_code": True}
    config = JobConfig(model=moody, output=str(out), prompts=str(file), **options)
    with pytest.raises((torch.AcceleratorError, RankError), match="the device is gone"):
        run(config, 2)
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "stopped"
    assert "rank 1" in status["error"]
    assert 3 not in pixels(out)
    with pytest.raises(torch.AcceleratorError):
        run(config, 1)
    assert sorted(pixels(out)) == [0, 1, 2], "what came before it is made and stays"


def test_video_frames_are_saved_in_one_lossless_file(tmp_path):
    model = tiny_pipeline("wan", tmp_path)
    arguments = call_arguments("wan")
    named = {n: arguments.pop(n) for n in ("num_inference_steps", "height", "width")}
    out = tmp_path / "out"
    options = {"pipeline_kwargs": arguments, "video_format": "apng", "fps": 4, **named}
    run_job(job(model, out, ["a red cat"], **options))
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    torch.set_num_threads(1)
    expected = pipe("a red cat", generator=generator, output_type="pil", **named, **arguments)
    with Image.open(out / "images/0000/00000000.png") as file:
        assert file.info["duration"] == 250
        frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(file)]
    assert len(frames) == 5
    for frame, wanted in zip(frames, expected.frames[0], strict=True):
        assert np.array_equal(frame, np.asarray(wanted))


def test_datasets_reads_the_folder(moody, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    run_job(job(moody, out, ["a dog", "fail", "a cat"], negative_prompt="rain"))
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=cache)
    assert loaded["prompt"][:] == ["a dog", "a cat"]
    assert loaded["seed"][:] == [0, 2]
    assert [tuple(image.getpixel((0, 0))) for image in loaded["image"]] == [colour(0), colour(2)]
