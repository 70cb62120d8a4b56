"""Pipelines that cannot generate from prompts are refused before a weight is read."""

import json
import shutil

import diffusers
import pytest
from diffusers import (
    AutoencoderKL,
)

from ddinfer.config import JobConfig
from ddinfer.errors import UsageError
from ddinfer.job.run import run_job
from ddinfer.models.check import check_pipeline
from tests.test_cli import MAIN, options
from tests.test_cli import run as run_command
from tests.tiny_pipelines import KINDS, tiny_pipeline


@pytest.fixture
def changed(tmp_path):
    """A tiny pipeline with another model_index.json, and no weights at all."""

    def make(kind, **changes):
        folder = tiny_pipeline(kind, tmp_path / "base")
        index = json.loads((folder / "model_index.json").read_text()) | changes
        index = {name: value for name, value in index.items() if value != "gone"}
        other = tmp_path / "changed"
        other.mkdir()
        (other / "model_index.json").write_text(json.dumps(index))
        return other

    return make


def run(folder, out, **options):
    config = JobConfig(model=str(folder), output=str(out), device="cpu", prompt=("a",), **options)
    return run_job(config)


@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_has_saved_passes(kind, tmp_path):
    assert check_pipeline(tiny_pipeline(kind, tmp_path)) is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("sd", name) for name in ("scheduler", "vae", "unet", "text_encoder", "tokenizer")),
        *(("sdxl", name) for name in ("tokenizer", "text_encoder_2", "tokenizer_2")),
        *(("sd3", name) for name in ("transformer", "tokenizer_3")),
    ],
)
@pytest.mark.parametrize("value", [[None, None], None, "gone"])
def test_a_component_that_prompts_need_and_that_is_null(changed, tmp_path, kind, name, value):
    folder = changed(kind, **{name: value})
    message = f"{folder}: model_index.json has no {name} .null or not listed., without which"
    with pytest.raises(UsageError, match=message):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_components_that_may_be_null(tmp_path):
    folder = tiny_pipeline("sd3", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "text_encoder_3")
    report = run(folder, tmp_path / "out", width=32, height=32, num_inference_steps=1)
    assert (report.num_made, report.num_failed) == (1, 0)


@pytest.mark.parametrize("library", ["cosmos", "diffusers", "transformers", "elsewhere"])
def test_a_class_that_is_not_installed(changed, tmp_path, library):
    folder = changed("sd", safety_checker=[library, "LostSafetyChecker"])
    with pytest.raises(UsageError, match=r"safety_checker.* is a LostSafetyChecker") as caught:
        run(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_class_that_moved_out_of_a_pipelines_module(tmp_path):
    folder = tiny_pipeline("sd", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["stable_diffusion", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert not hasattr(diffusers.pipelines.stable_diffusion, "AutoencoderKL")
    assert AutoencoderKL.__module__ != "diffusers.pipelines.stable_diffusion"
    report = run(folder, tmp_path / "out", width=32, height=32, num_inference_steps=1)
    assert (report.num_made, report.num_failed) == (1, 0)


def texts(folder):
    index = {"_class_name": "LLaDA2Pipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (
            texts,
            "LLaDA2Pipeline returns sequences, texts; ddinfer runs pipelines that return images",
        ),
    ],
)
def test_other_kinds_of_pipelines_are_refused_in_one_line(tmp_path, save, message):
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder)
    with pytest.raises(UsageError, match=message):
        run(folder, tmp_path / "out")
    command = [*MAIN, "--nproc_per_node=2", *options(folder, tmp_path / "out", "--prompt", "a")]
    done = run_command(command)
    [line] = done.stderr.splitlines()
    assert message in line
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()
