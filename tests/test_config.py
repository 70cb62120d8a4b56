"""The three layers of configuration, and what each says about a mistake."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from ddinfer.cli.options import option_groups, parse_config
from ddinfer.config import JobConfig
from ddinfer.errors import UsageError


def test_defaults_need_no_option():
    config = parse_config([], {})
    assert config == JobConfig()


def test_underscores_and_dashes_are_alike():
    assert parse_config(["--batch_size", "3"], {}) == parse_config(["--batch-size=3"], {})


def test_short_and_long_names_are_alike():
    short = parse_config(["-m", "x/y", "-p", "f.txt", "-o", "d", "--steps", "4"], {})
    words = ["--model", "x/y", "--prompts", "f.txt", "--output", "d", "--num_inference_steps", "4"]
    assert short == parse_config(words, {})


def test_prompt_is_repeatable_and_kept_as_typed():
    config = parse_config(["--prompt", " a dog ", "--prompt=--x"], {})
    assert config.prompt == (" a dog ", "--x")


def test_file_below_environment_below_command_line(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("batch_size: 2\nseed: 2\nlimit: 2\nprompts: from-file.txt\n")
    environ = {"DDINFER_SEED": "3", "DDINFER_LIMIT": "3", "HOME": "/"}
    config = parse_config(["--config", str(file), "--limit", "4"], environ)
    assert (config.batch_size, config.seed, config.limit) == (2, 3, 4)
    assert config.prompts == "from-file.txt"


def test_config_file_may_be_named_in_the_environment(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("seed: 9\n")
    assert parse_config([], {"DDINFER_CONFIG": str(file)}).seed == 9


def test_prompts_of_a_higher_layer_replace_those_below(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("prompts: from-file.txt\n")
    config = parse_config(["--config", str(file), "--prompt", "a dog"], {})
    assert (config.prompts, config.prompt) == (None, ("a dog",))
    config = parse_config(["--config", str(file)], {"DDINFER_PROMPT": "a cat"})
    assert (config.prompts, config.prompt) == (None, ("a cat",))


def test_switch_of_a_file_can_be_turned_off_again(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("vae_tiling: true\n")
    assert parse_config(["--config", str(file)], {}).vae_tiling is True
    assert parse_config(["--config", str(file), "--no_vae_tiling"], {}).vae_tiling is False


def test_pipeline_kwargs_are_a_json_object():
    assert parse_config(["--pipeline_kwargs", '{"eta": 0.5}'], {}).pipeline_kwargs == {"eta": 0.5}
    environ = {"DDINFER_PIPELINE_KWARGS": '{"eta": 0.5}'}
    assert parse_config([], environ).pipeline_kwargs == {"eta": 0.5}


def test_what_is_saved_runs_again_and_holds_no_token(tmp_path):
    config = parse_config(["--prompt", "a dog", "--steps", "3", "--token", "secret"], {})
    saved = {"fingerprint": "x", "config": config.to_dict()}
    file = tmp_path / "job.json"
    file.write_text(json.dumps(saved))
    assert "secret" not in file.read_text()
    again = parse_config(["--config", str(file)], {})
    assert again.to_dict() == config.to_dict()
    assert yaml.safe_load(yaml.safe_dump(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepps", "3"], "--steps"),
        (["--batch_size", "many"], "batch_size"),
        (["--batch_size", "0"], "greater than"),
        (["--pipeline_kwargs", "[1]"], "expected a JSON object"),
        (["--dtype", "fp64"], "float32"),
        (["a dog"], "a dog"),
    ],
)
def test_bad_option_ends_with_code_2_and_says_what_is_right(argv, message, capsys):
    with pytest.raises((SystemExit, UsageError)) as ended:
        parse_config(argv, {})
    error = ended.value
    assert (error.code if isinstance(error, SystemExit) else error.exit_code) == 2
    printed = capsys.readouterr()
    assert message in printed.out + printed.err + str(error)


def test_every_option_stands_in_one_group_of_the_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"], {})
    text = capsys.readouterr().out
    for title in ("What to generate", "Models larger than a GPU", "When something goes wrong"):
        assert title in text
    grouped = [f.name for group in option_groups().values() for f in fields(group)]
    assert grouped == [f.name for f in fields(JobConfig)]
    for name in grouped:
        assert f"--{name}" in text, name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise: 3", "did you mean batch_size"),
        ("batch_size: many", "bad.yaml: --batch_size 'many'"),
        ("batch_size: true", "bad.yaml: --batch_size True"),
        ("- 3", "expected a mapping"),
        ("a: [", "not YAML"),
        ("seed: -1", "greater than or equal to 0"),
        ("pipeline_kwargs: {generator: 3}", "generator"),
        ("prompts: a.txt\nprompt: [b]", "both given"),
    ],
)
def test_bad_config_file_is_named(text, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises((UsageError, SystemExit)) as caught:
        parse_config(["--config", str(file)], {})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a red circle"}, "--prompt 'a red circle': input should be a valid tuple"),
        ({"prompt": ["a", 3]}, "--prompt"),
        ({"batch_size": "four"}, "--batch_size 'four': input should be a valid integer"),
        ({"batch_size": 1.5}, "--batch_size 1.5: input should be a valid integer"),
        ({"seed": True}, "--seed True"),
        ({"dtype": "float8"}, "--dtype float8: 'float8' is none of auto, float32"),
        ({"guidance_scale": "much"}, "--guidance_scale 'much': input should be a valid number"),
        ({"pipeline_kwargs": [1]}, "--pipeline_kwargs"),
        ({"json": 2}, "--json 2: input should be a valid boolean"),
        ({"seed": Path("3")}, "--seed"),
        ({"model": 3}, "--model 3: input should be a valid string"),
    ],
)
def test_a_program_that_gives_another_type_is_told(options, message):
    with pytest.raises(UsageError, match=message):
        JobConfig(**options)


def test_a_program_may_give_paths_lists_and_whole_numbers():
    config = JobConfig(output=Path("a/b"), prompt=["x"], guidance_scale=3, nproc_per_node=2)
    assert config == JobConfig(output="a/b", prompt=["x"], guidance_scale=3.0, nproc_per_node=2)
    assert JobConfig(nproc_per_node="auto").nproc_per_node == "auto"


def test_the_number_of_ranks_may_stand_in_a_file(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("nproc_per_node: 2\n")
    assert parse_config(["--config", str(file)], {}).nproc_per_node == 2
    assert parse_config(["--nproc_per_node=auto"], {}).nproc_per_node == "auto"


def test_missing_config_file_and_unknown_variable_are_named():
    with pytest.raises(UsageError, match=r"nowhere\.yaml: No such file"):
        parse_config(["--config", "nowhere.yaml"], {})
    with pytest.raises(
        UsageError, match="DDINFER_SEDE is not an option; did you mean DDINFER_SEED"
    ):
        parse_config([], {"DDINFER_SEDE": "1"})
    with pytest.raises(UsageError, match="DDINFER_SEED"):
        parse_config([], {"DDINFER_SEED": "one"})
    with pytest.raises(UsageError, match="DDINFER_PIPELINE_KWARGS"):
        parse_config([], {"DDINFER_PIPELINE_KWARGS": "{"})
