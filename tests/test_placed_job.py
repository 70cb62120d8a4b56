"""Jobs whose ranks spread the model over tiers: the same images, and clear refusals."""

import json

import pytest

import ddinfer
from ddinfer.config import JobConfig
from ddinfer.errors import UsageError
from tests.ranks import run_ranks
from tests.test_run import file_bytes, job, on_rank, run
from tests.tiny_pipelines import tiny_pipeline

STEPS = {"num_inference_steps": 2, "height": 32, "width": 32, "trust_remote_code": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_pipeline("sd", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """The images of the job on one rank that holds the whole model."""
    output = tmp_path_factory.mktemp("plain") / "out"
    run(job(model, output, "abc", **STEPS), 1)
    return file_bytes(output)


def half_of(model):
    """Half of what the model needs, as ``--max_memory`` takes it."""
    return f"cpu={sum(ddinfer.plan_placement(model).bytes_on().values()) // 2}"


@pytest.mark.parametrize("strategy", ["balanced", "auto"])
def test_a_model_kept_on_disk_in_part_makes_the_same_images(strategy, model, plain, tmp_path):
    placed = ddinfer.plan_placement(model, half_of(model), strategy)
    assert set(placed.devices.values()) == {"cpu", "disk"}  # so that something is brought in
    output = tmp_path / "out"
    run(job(model, output, "abc", placement=strategy, max_memory=half_of(model), **STEPS), 2)
    assert file_bytes(output) == plain


def test_a_placement_from_a_file_is_taken_as_it_is(model, plain, tmp_path):
    file = tmp_path / "placement.json"
    file.write_text(ddinfer.plan_placement(model, half_of(model)).to_json())
    run(job(model, tmp_path / "out", "abc", placement=str(file), **STEPS), 2)
    assert file_bytes(tmp_path / "out") == plain


def test_another_seed_makes_other_images(model, plain, tmp_path):
    more = {"placement": "balanced", "max_memory": half_of(model), "seed": 7, **STEPS}
    run(job(model, tmp_path / "out", "abc", **more), 1)
    assert not set(file_bytes(tmp_path / "out").values()) & set(plain.values())


def test_a_placement_that_leaves_a_part_out_names_it(model, tmp_path):
    file = tmp_path / "placement.json"
    file.write_text(json.dumps({"version": 1, "devices": {"unet": "cpu", "vae": "cpu"}}))
    with pytest.raises(UsageError, match="text_encoder"):
        run(job(model, tmp_path / "out", "a", placement=str(file), **STEPS), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "/nowhere/p.json"}, "/nowhere/p.json: No such file"),
        ({"placement": "balanced", "max_memory": "cpu=lots"}, "'lots' is not a size"),
        ({"placement": "balanced", "max_memory": "0=1GB"}, "names cuda:0, but .* no GPU"),
    ],
)
def test_what_cannot_be_read_is_refused_before_a_folder_is_made(options, message, model, tmp_path):
    config = job(model, tmp_path / "out", "a", **options, **STEPS)
    with pytest.raises(UsageError, match=message):
        run_ranks(on_rank, 1, config, join=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": "0=16GB"}, "add --placement"),
        ({"gpus_per_rank": 2}, "add --placement"),
        ({"gpus_per_rank": 0}, "greater than or equal to 1"),
        ({"placement": "everywhere"}, "none of auto, balanced, staged, nor a FILE.json"),
        ({"placement": "p.json", "max_memory": "0=16GB"}, "use one of them"),
        ({"placement": "auto", "pipeline_parallel": 2}, "use one of them"),
        ({"placement": "auto", "compile": True}, "leave one out"),
    ],
)
def test_options_that_contradict_one_another_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        JobConfig(**options)
