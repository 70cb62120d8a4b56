"""Jobs in which several ranks make each image: the same images, and what happens when one fails."""

import re
import signal

import numpy as np
import pytest

from ddinfer.config import JobConfig
from ddinfer.errors import EXIT_FAILED_PROMPTS, PromptsFailed, RankError, UsageError
from ddinfer.storage.files import Files
from ddinfer.storage.verify import verify
from tests.jobs import end, wait_until
from tests.jobs import job as words_of_job
from tests.moody_team import moody_team
from tests.ranks import run_ranks
from tests.test_cli import MAIN, ROOT, images, run, start
from tests.test_run import file_bytes, job, lines, pixels
from tests.test_run import run as run_job_on_ranks
from tests.test_team import make_pipe
from tests.tiny_pipelines import call_arguments, tiny_pipeline

TOKENS = ["--nproc_per_node=2", "--sequence_parallel=2"]
GUIDANCE = ["--nproc_per_node=2", "--cfg_parallel=2"]


def nightly(*values):
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_team(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def plain(moody, tmp_path_factory):
    """index → picture, as one rank makes it whatever the prompt says."""
    output = tmp_path_factory.mktemp("plain")
    run_job_on_ranks(job(moody, output, "abcdefgh"), 1)
    return pixels(output)


def same_pictures(output, expected, indices):
    made = pixels(output)
    assert sorted(made) == sorted(indices)
    assert all(np.array_equal(made[k], expected[k]) for k in indices)


# --- the same images ------------------------------------------------------------------------------


def test_the_command_on_the_page_makes_the_bytes_of_one_rank(tmp_path):
    page = (ROOT / "docs/one-image.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ddinfer (.*--cfg_parallel 2.*) --output two-ranks$", page, re.M)
    short = ["--limit=2", "--num_inference_steps=3"]
    done = run([*MAIN, *line.split(), *short, "--output", tmp_path / "two"])
    assert done.returncode == 0, done.stderr
    assert "images by replica of 2 ranks: 2 (" in done.stderr
    alone = line.replace("--nproc_per_node 2", "").split()
    run([*MAIN, *alone, *short, "--output", tmp_path / "one"])
    assert len(images(tmp_path / "two")) == 2
    assert images(tmp_path / "two") == images(tmp_path / "one")


@pytest.mark.parametrize(
    ("options", "num_ranks"),
    [
        ({"sequence_parallel": 2}, 2),
        nightly({"cfg_parallel": 2, "sequence_parallel": 2}, 4),
        nightly({"sequence_parallel": 3}, 3),
        nightly({"sequence_parallel": 2, "batch_size": 2}, 2),
        nightly({"sequence_parallel": 2, "schedule": "dynamic"}, 4),
    ],
)
def test_several_ranks_make_the_images_of_one(tmp_path, options, num_ranks):
    model = tiny_pipeline("sd3", tmp_path)
    arguments = {**call_arguments("sd3"), "trust_remote_code": False}
    arguments["pipeline_kwargs"] = {"max_sequence_length": arguments.pop("max_sequence_length")}
    prompts = [f"a red cat {k}" for k in range(3)]
    alone = {
        name: value for name, value in options.items() if name in ("cfg_parallel", "batch_size")
    }
    run_job_on_ranks(job(model, tmp_path / "one", prompts, **alone, **arguments), 1)
    report = run_job_on_ranks(
        job(model, tmp_path / "many", prompts, **options, **arguments), num_ranks
    )
    assert (report.num_made, report.num_inexact) == (3, 0)
    one, many = pixels(tmp_path / "one"), pixels(tmp_path / "many")
    assert all(np.array_equal(one[k], many[k]) for k in range(3))


def test_a_job_is_another_job_with_another_option_and_not_with_other_ranks(moody, plain, tmp_path):
    prompts = "abcd"
    run_job_on_ranks(job(moody, tmp_path, prompts, cfg_parallel=2), 1)
    before = file_bytes(tmp_path)
    same_pictures(tmp_path, plain, range(4))
    for k in (1, 3):
        (tmp_path / f"images/0000/{k:08}.png").unlink()
    assert run_job_on_ranks(job(moody, tmp_path, prompts, cfg_parallel=2), 4).num_new == 2
    assert file_bytes(tmp_path) == before
    with pytest.raises(UsageError, match="cfg_parallel"):
        run_job_on_ranks(job(moody, tmp_path, prompts), 1)


# --- what is refused, before a folder is made ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_parallel": 2, "pipeline_parallel": 2}, "--cfg_parallel 2 does not go with --pipe"),
        ({"sequence_parallel": 2, "placement": "balanced"}, "does not go with --placement bal"),
        ({"sequence_parallel": 2, "compile": True}, "does not go with --compile"),
        ({"sequence_parallel": 2, "attention_backend": "flash"}, "--attention_backend flash is"),
        ({"cfg_parallel": 0}, "--cfg_parallel 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        JobConfig(**options)


def test_ranks_that_do_not_come_out_even_are_refused(moody, tmp_path):
    more = ["--nproc_per_node=3", "--cfg_parallel=2", "--sequence_parallel=2"]
    done = run([*MAIN, *words_of_job(moody, tmp_path, "ab", *more)])
    assert done.returncode == 2
    expected = "--cfg_parallel 2 --sequence_parallel 2 needs a number of ranks that 4 divides"
    assert expected in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_unet_is_refused_before_a_folder_is_made(tmp_path):
    config = job("shapes-sd", tmp_path / "out", ["a red circle"], sequence_parallel=2)
    expected = "unet is a UNet2DConditionModel, a UNet. Use --cfg_parallel for it"
    with pytest.raises((UsageError, RankError), match=expected):
        run_job_on_ranks(config, 2)
    assert not (tmp_path / "out").exists()


def test_the_dry_run_shows_which_ranks_make_what(moody, tmp_path):
    more = ["--nproc_per_node=4", "--cfg_parallel=2", "--dry_run"]
    done = run([*MAIN, *words_of_job(moody, tmp_path, "abc", *more)])
    assert done.returncode == 0, done.stderr
    assert "  ranks 0 to 1: 2 batches, images 0 to 1\n" in done.stdout
    assert "  ranks 2 to 3: 1 batches, images 2 to 2\n" in done.stdout


# --- prompts that fail, ranks that die ---


@pytest.mark.parametrize(
    "options", [{"sequence_parallel": 2}, {"cfg_parallel": 2}], ids=["tokens", "guidance"]
)
def test_a_prompt_that_fails_on_one_rank_fails_alone(moody, plain, tmp_path, options):
    prompts = ["a", "raise it", "c", "fail", "e"]
    report = run_job_on_ranks(job(moody, tmp_path, prompts, **options), 2)
    assert (report.num_made, report.num_failed, report.exit_code) == (3, 2, EXIT_FAILED_PROMPTS)
    told = {row["index"]: row["message"] for row in lines(tmp_path / "failures.jsonl")}
    assert "rank 1 failed while running the denoiser: ValueError: cannot draw it" in told[1]
    assert told[3] == "cannot draw fail"
    same_pictures(tmp_path, plain, (0, 2, 4))


def test_a_rank_without_room_halves_the_batch(moody, plain, tmp_path):
    config = job(moody, tmp_path, ["many 2"] * 4, sequence_parallel=2, batch_size=4)
    report = run_job_on_ranks(config, 2)
    assert (report.num_made, report.num_failed, report.num_inexact) == (4, 0, 4)
    same_pictures(tmp_path, plain, range(4))


@pytest.mark.parametrize("options", [TOKENS, nightly(GUIDANCE)], ids=["tokens", "guidance"])
def test_a_killed_rank_is_named_and_a_restart_makes_the_rest(moody, plain, tmp_path, options):
    prompts = ["a", f"once {tmp_path / 'died'}", "c", "d"]
    more = [*options, "--max_restarts=1"]
    done = run([*MAIN, *words_of_job(moody, tmp_path, prompts, *more)])
    assert done.returncode == 0, done.stderr
    assert "rank 1" in done.stderr.split("restart 1 of 1")[0]
    assert "killed by SIGKILL" in done.stderr
    same_pictures(tmp_path / "out", plain, range(4))
    assert verify(Files(), str(tmp_path / "out")).is_good


@pytest.mark.nightly
def test_sigterm_lets_the_image_finish(moody, plain, tmp_path):
    gate = tmp_path / "gate"
    words = words_of_job(moody, tmp_path, [f"wait {gate}", *"bcdefgh"], *TOKENS)
    process = start([*MAIN, *words])
    wait_until(process, (tmp_path / "gate.waiting").exists)
    process.send_signal(signal.SIGTERM)
    gate.touch()
    code, err = end(process)
    assert code == 75, err
    assert run([*MAIN, *words]).returncode == 0
    same_pictures(tmp_path / "out", plain, range(8))


# --- in a program's own group ---


def generate_in_teams(group, num_prompts, options):
    from ddinfer import generate

    pipe = make_pipe("flux")
    more = {**call_arguments("flux"), "true_cfg_scale": 3.0, "negative_prompt": "a dog"}
    prompts = [f"a red cat {k}" for k in range(num_prompts)]
    forward = pipe.transformer.forward
    made = [generate(pipe, prompts, **options, **more) for _ in range(2)]
    assert pipe.transformer.forward == forward, "the caller's pipeline is as it was"
    assert [r.index for r in made[0]] == list(range(num_prompts))
    plain = generate(pipe, prompts, **more)
    for results in made:
        for result, expected in zip(results, plain, strict=True):
            assert np.array_equal(np.asarray(result.image), np.asarray(expected.image))
    return [result.rank for result in made[0]]


def test_generate_makes_the_images_of_plain_diffusers_in_teams():
    ranks = run_ranks(generate_in_teams, 4, 3, {"cfg_parallel": 2})
    assert ranks == [[0, 0, 2]] * 4


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [(2, {"sequence_parallel": 2}), (4, {"cfg_parallel": 2, "sequence_parallel": 2}),
     (1, {"cfg_parallel": 2})],
)  # fmt: skip
def test_generate_in_other_teams(num_ranks, options):
    run_ranks(generate_in_teams, num_ranks, 2, options)


def generate_refused(group):
    from ddinfer import generate

    told = []
    for kind, options in (("flux", {"cfg_parallel": 3}), ("sd", {"sequence_parallel": 2})):
        try:
            generate(make_pipe(kind), ["a cat"], **options)
        except UsageError as error:
            told.append(str(error))
    try:
        generate(make_pipe("flux"), ["a cat"], sequence_parallel=2, height=31)
    except PromptsFailed as error:
        told.append(str(error))
    return told


def test_generate_refuses_on_every_rank_what_cannot_be_split():
    for told in run_ranks(generate_refused, 2):
        assert "need a number of ranks that 3 divides; the group has 2" in told[0]
        assert "unet is a UNet2DConditionModel" in told[1]
