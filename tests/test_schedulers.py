"""Other schedulers, for a job and for single prompts: what plain diffusers makes with them."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

import ddinfer
from ddinfer.cli.replay import main as replay
from ddinfer.config import JobConfig
from ddinfer.errors import InputError, UsageError
from ddinfer.job.prepare import prepare, resolve_config
from ddinfer.job.run import run_job
from tests.test_run import lines, pixels
from tests.test_run import run as run_on_ranks
from tests.tiny_pipelines import call_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

EULER = "EulerDiscreteScheduler"
KARRAS = 'UniPCMultistepScheduler:{"use_karras_sigmas": true}'
ROWS = [
    {"prompt": "a red cat", "scheduler": EULER},
    {"prompt": "a blue dog"},
    {"prompt": "a green bird", "scheduler": KARRAS},
    {"prompt": "a red car", "scheduler": EULER},
]
CALL = {"num_inference_steps": 3, "height": 32, "width": 32}


def plain(folder):
    """The pictures of `ROWS`, each scheduler made once, as a diffusers user does."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    others = {
        None: own,
        EULER: EulerDiscreteScheduler.from_config(own.config),
        KARRAS: UniPCMultistepScheduler.from_config(own.config, use_karras_sigmas=True),
    }
    images = []
    for seed, row in enumerate(ROWS):
        pipe.scheduler = others[row.get("scheduler")]
        generator = torch.Generator("cpu").manual_seed(seed)
        images.append(np.asarray(pipe(row["prompt"], generator=generator, **CALL).images[0]))
    return images


@pytest.fixture(scope="module")
def expected(tiny):
    return plain(tiny("sd"))


def job(folder, tmp_path, rows=ROWS, **options):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JobConfig(
        model=str(folder),
        prompts=str(file),
        output=str(tmp_path / "out"),
        device="cpu",
        num_threads=1,
        **{**CALL, **options},
    )


@pytest.mark.parametrize("mode", [None, "staged", "balanced", "continuous"])
def test_rows_with_schedulers_are_those_of_plain_diffusers(tiny, expected, tmp_path, mode):
    if mode == "continuous":
        run_on_ranks(job(tiny("sd"), tmp_path, pipeline_parallel=2), 2)
    else:
        run_job(job(tiny("sd"), tmp_path, placement=mode))
    for made, image in zip(pixels(tmp_path / "out").values(), expected, strict=True):
        assert np.array_equal(made, image)


def test_neighbours_with_other_schedulers_share_no_batch(tiny, tmp_path):
    found = prepare(resolve_config(job(tiny("sd"), tmp_path, batch_size=4)))
    assert [len(batch) for batch in found.batches()] == [1, 1, 1, 1]
    same = [{**row, "scheduler": EULER} for row in ROWS]
    found = prepare(resolve_config(job(tiny("sd"), tmp_path, same, batch_size=4)))
    assert [len(batch) for batch in found.batches()] == [4]


def test_the_job_s_scheduler_is_for_rows_that_name_none(tiny, expected, tmp_path, capsys):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    rows[2]["scheduler"] = KARRAS
    asked = job(tiny("sd"), tmp_path, rows, scheduler=EULER)
    run_job(asked)
    images = pixels(tmp_path / "out")
    for k in (0, 2, 3):
        assert np.array_equal(images[k], expected[k])
    assert not np.array_equal(images[1], expected[1])
    assert [row["scheduler"] for row in lines(tmp_path / "out/metadata.jsonl")] == [
        EULER, EULER, KARRAS, EULER,
    ]  # fmt: skip
    image = tmp_path / "out/images/0000/00000000.png"
    assert "Sampler: Euler," in Image.open(image).text["parameters"]
    assert replay([str(image)]) == 0
    with pytest.raises(UsageError, match="contains another job"):
        run_job(job(tiny("sd"), tmp_path, rows))


def test_generate_takes_them_by_prompt_and_for_all_and_leaves_the_pipeline(tiny, expected):
    pipe = ddinfer.load_pipeline(tiny("sd"))
    own = pipe.scheduler
    results = ddinfer.generate(pipe, ROWS, **CALL)
    assert all(
        np.array_equal(np.asarray(r.image), e) for r, e in zip(results, expected, strict=False)
    )
    results = ddinfer.generate(pipe, ["a red cat"], scheduler=EULER, **CALL)
    assert np.array_equal(np.asarray(results[0].image), expected[0])
    assert pipe.scheduler is own
    with pytest.raises(UsageError, match=r"prompt 0 .*did you mean EulerDiscreteScheduler"):
        ddinfer.generate(pipe, ["a red cat"], scheduler="EulerDiscrete", **CALL)


WRONG = {
    "misspelt": ("sd", "EulerDiscretScheduler", "did you mean EulerDiscreteScheduler"),
    "no scheduler": ("sd", "UNet2DConditionModel", "is not a scheduler of diffusers"),
    "no JSON": ("sd", "EulerDiscreteScheduler:{karras}", "not JSON after the colon"),
    "no object": ("sd", "EulerDiscreteScheduler:3", "expected an object"),
    "unknown setting": ("sd", 'EulerDiscreteScheduler:{"karras": 1}', "has no setting karras"),
    "bad setting": ("sd", 'EulerDiscreteScheduler:{"beta_schedule": "x"}', "x"),
    "no step": ("sd", "RePaintScheduler", "original_image"),
    "not for flow": ("sd3", "EulerDiscreteScheduler", "flow matching"),
    "flow for others": ("sd", "FlowMatchEulerDiscreteScheduler", "does not have|flow matching"),
    "without mu": ("flux", "FlowMatchHeunDiscreteScheduler", "calls set_timesteps with mu, sigmas"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_pipeline_cannot_use_is_refused_before_loading(tiny, tmp_path, name):
    kind, scheduler, message = WRONG[name]
    options = {} if kind != "flux" else {"pipeline_kwargs": {"max_sequence_length": 16}}
    asked = job(tiny(kind), tmp_path, [{"prompt": "a cat", "scheduler": scheduler}], **options)
    with pytest.raises(UsageError, match=message) as error:
        prepare(resolve_config(asked))
    assert "\n" not in str(error.value)


def test_sigmas_of_a_row_need_a_scheduler_that_takes_them(tiny, tmp_path):
    rows = [{"prompt": "a cat", "scheduler": "DDIMScheduler", "sigmas": [1.0, 0.5]}]
    with pytest.raises(UsageError, match="set_timesteps with sigmas, which DDIMScheduler"):
        prepare(resolve_config(job(tiny("sd"), tmp_path, rows)))


def test_a_flow_model_takes_another_sampler_with_flow_sigmas(tiny, tmp_path):
    scheduler = 'UniPCMultistepScheduler:{"use_flow_sigmas": true, "flow_shift": 3.0}'
    call = call_arguments("sd3")
    options = {"pipeline_kwargs": {"max_sequence_length": 16}}
    rows = [{"prompt": "a red cat", "scheduler": scheduler}]
    run_job(job(tiny("sd3"), tmp_path, rows, **options))
    pipe = DiffusionPipeline.from_pretrained(tiny("sd3"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, use_flow_sigmas=True, flow_shift=3.0
    )
    generator = torch.Generator("cpu").manual_seed(0)
    [image] = pipe("a red cat", generator=generator, **{**call, **CALL}).images
    assert np.array_equal(pixels(tmp_path / "out")[0], np.asarray(image))


def test_a_scheduler_that_is_no_text_is_an_error_of_its_line(tiny, tmp_path):
    with pytest.raises(InputError, match="jsonl:1: scheduler must be text"):
        prepare(resolve_config(job(tiny("sd"), tmp_path, [{"prompt": "a cat", "scheduler": 3}])))
