"""Jobs with --placement staged: on ranks, killed in a round, refused, and resumed."""

import json
from dataclasses import replace

import pytest

from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.engines.staged import load_staged_engine
from ddinfer.errors import UsageError
from ddinfer.models.stages import StagedPipeline
from ddinfer.storage.files import Files
from ddinfer.storage.verify import verify
from tests.jobs import job as words_of
from tests.jobs import made
from tests.ranks import run_ranks
from tests.test_cli import MAIN
from tests.test_cli import run as run_command
from tests.test_run import file_bytes, job, on_rank, run
from tests.test_staged import requests_for
from tests.tiny_pipelines import tiny_pipeline

STEPS = {"num_inference_steps": 2, "height": 32, "width": 32}

#: Dies while it decodes: always, or once (when the file that the prompt names is not there).
DEADLY = """
import os, signal
from diffusers import StableDiffusionPipeline

class DeadlyPipeline(StableDiffusionPipeline):
    def check_inputs(self, prompt, *args, **kwargs):
        self.__dict__["_word"], _, self.__dict__["_rest"] = str(prompt).partition(" ")
        return super().check_inputs(prompt, *args, **kwargs)

    def run_safety_checker(self, image, device, dtype):
        if self._word == "kill" or self._word == "once" and not os.path.exists(self._rest):
            if self._word == "once":
                open(self._rest, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run_safety_checker(image, device, dtype)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_pipeline("sd", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def deadly(tmp_path_factory):
    folder = tiny_pipeline("sd", tmp_path_factory.mktemp("deadly"))
    (folder / "deadly.py").write_text(DEADLY)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["deadly", "DeadlyPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize("schedule", ["static", "dynamic"])
def test_ranks_that_work_in_stages_make_the_same_images(schedule, model, tmp_path):
    more = {**STEPS, "batch_size": 2, "schedule": schedule, "negative_prompt": "a dog"}
    run(job(model, tmp_path / "plain", "abcde", **more), 1)
    report = run(job(model, tmp_path / "out", "abcde", placement="staged", **more), 2)
    assert (report.num_new, report.num_inexact) == (5, 0)
    expected = file_bytes(tmp_path / "plain")
    assert file_bytes(tmp_path / "out") == expected
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")) == []
    run(job(model, tmp_path / "other", "abcde", placement="staged", **{**more, "seed": 9}), 1)
    assert not set(file_bytes(tmp_path / "other").values()) & set(expected.values())


def journal(folder, kind):
    files = sorted(folder.glob("out/journal/*"))
    return [x for f in files for x in map(json.loads, f.open()) if x["kind"] == kind]


SMALL = ["--height=32", "--width=32", "--steps=2"]


def test_a_round_that_was_killed_is_made_again(deadly, tmp_path):
    prompts = ["a", f"once {tmp_path / 'died'}", *"bcde"]
    more = ["--placement=staged", "--nproc_per_node=2", "--max_restarts=1", *SMALL]
    done = run_command([*MAIN, *words_of(deadly, tmp_path, prompts, *more)])
    assert done.returncode == 0, done.stderr
    assert "killed by SIGKILL" in done.stderr
    deaths = journal(tmp_path, "death")
    assert {1, 2} <= {k for death in deaths for k in death["indices"]} <= {0, 1, 2}
    assert not any(death["alone"] for death in deaths), "others were in the round"
    assert sorted(x["index"] for x in journal(tmp_path, "image")) == list(range(6)), "none twice"
    assert verify(Files(), str(tmp_path / "out")).is_good
    assert [x for x in (tmp_path / "out").iterdir() if x.name.startswith(".")] == []


@pytest.mark.nightly
def test_a_prompt_that_always_kills_is_found_in_its_round(deadly, tmp_path):
    prompts = ["a", "kill", "b", "c"]
    more = ["--placement=staged", "--nproc_per_node=2", "--max_restarts=6", *SMALL]
    done = run_command([*MAIN, *words_of(deadly, tmp_path, prompts, *more)])
    assert done.returncode == 3, done.stderr
    assert made(tmp_path) == [0, 2, 3]
    (failure,) = map(json.loads, (tmp_path / "out/failures.jsonl").open())
    assert (failure["index"], failure["type"]) == (1, "ProcessDied")


def test_a_pipeline_without_stages_is_refused_before_a_folder_is_made(model, tmp_path):
    folder = tiny_pipeline("sd", tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["vqvae"] = index.pop("vae")
    index["_class_name"] = "LDMTextToImagePipeline"
    index["bert"] = index.pop("text_encoder")
    (folder / "model_index.json").write_text(json.dumps(index))
    for old, new in (("vae", "vqvae"), ("text_encoder", "bert")):
        (folder / old).rename(folder / new)
    config = job(folder, tmp_path / "out", "a", placement="staged", **STEPS)
    with pytest.raises(UsageError, match=r"cannot run in stages.*--placement balanced"):
        run_ranks(on_rank, 1, config, join=False)
    assert not (tmp_path / "out").exists()


def test_options_reach_the_stage_they_are_for(tmp_path, monkeypatch):
    folder, pipes, load = tiny_pipeline("flux", tmp_path), {}, StagedPipeline.load

    def noted(self, stage):
        pipes[stage] = load(self, stage)
        return pipes[stage]

    monkeypatch.setattr(StagedPipeline, "load", noted)
    config = JobConfig(
        model=str(folder), output=str(tmp_path), placement="staged", device="cpu",
        vae_tiling=True, vae_slicing=True, attention_backend="native",
    )  # fmt: skip
    engine = load_staged_engine(str(folder), config, world=World())
    assert len(list(engine.run([requests_for("flux", ["a cat"])]))) == 1
    assert pipes["decode"].vae.use_tiling
    assert pipes["decode"].vae.use_slicing
    blocks = pipes["denoise"].transformer.transformer_blocks
    assert {b.attn.processor._attention_backend.value for b in blocks} == {"native"}
    wrong = replace(config, attention_backend="telepathy")
    pipes.clear()
    with pytest.raises(UsageError, match="--attention_backend telepathy"):
        load_staged_engine(str(folder), wrong, world=World())
    assert not pipes, "before anything is loaded"


def test_a_stage_that_does_not_fit_says_so_before_weights_are_read(model, tmp_path):
    config = job(
        model, tmp_path / "out", "a", placement="staged", max_memory="cpu=10kB,disk=0", **STEPS
    )
    with pytest.raises(UsageError, match=r"the encode stage \(text_encoder\): .* does not fit"):
        run_ranks(on_rank, 1, config, join=False)
