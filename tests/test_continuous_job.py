"""Jobs whose denoiser is cut over ranks: the same images, and whatever goes wrong is told."""

import os
import re
import signal
import time

import numpy as np
import pytest

from ddinfer.config import JobConfig
from ddinfer.distributed.peers import is_reported_by_peer
from ddinfer.errors import EXIT_FAILED_PROMPTS, ErrorRecord, RankError, UsageError
from ddinfer.storage.files import Files
from ddinfer.storage.verify import verify
from tests.jobs import end, made, wait_for_words, wait_until
from tests.jobs import job as words_of_job
from tests.moody_continuous import colour, moody_continuous
from tests.moody_pipeline import moody_pipeline
from tests.test_cli import MAIN, ROOT, TORCHRUN, images, run, start, status
from tests.test_restarts import rank_processes
from tests.test_run import file_bytes, job, lines, pixels
from tests.test_run import run as run_job_on_ranks
from tests.tiny_pipelines import call_arguments, tiny_pipeline

STAGES = ["--nproc_per_node=2", "--pipeline_parallel=2"]


def nightly(*values):
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_continuous(tmp_path_factory.mktemp("model")))


def colours(output):
    return {k: tuple(picture[0, 0]) for k, picture in pixels(output).items()}


def deaths(folder):
    files = sorted(folder.glob("out/journal/*"))
    return [x for f in files for x in lines(f) if x["kind"] == "death"]


# --- the same images ---------------------------------------------------------------------------


def test_the_command_on_the_page_draws_the_bytes_of_one_rank(tmp_path):
    page = (ROOT / "docs/pipeline-parallel.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ddinfer (.*--pipeline_parallel 2.*) --output cut-in-two$", page, re.M)
    short = ["--limit=3", "--num_inference_steps=3"]
    done = run([*MAIN, *line.split(), *short, "--output", tmp_path / "cut"])
    assert done.returncode == 0, done.stderr
    assert "images by replica of 2 ranks: 3 (" in done.stderr
    plain = line.split(" --nproc_per_node")[0].split()
    run([*MAIN, *plain, *short, "--output", tmp_path / "whole"])
    assert len(images(tmp_path / "cut")) == 3
    assert images(tmp_path / "cut") == images(tmp_path / "whole")


def test_a_unet_cut_in_two_draws_the_same_bytes(tmp_path):
    prompts = ["a red circle", "a blue square", "a green triangle"]
    more = {"num_inference_steps": 3}
    run_job_on_ranks(job("shapes-sd", tmp_path / "whole", prompts, **more), 1)
    run_job_on_ranks(job("shapes-sd", tmp_path / "cut", prompts, pipeline_parallel=2, **more), 2)
    whole = file_bytes(tmp_path / "whole")
    assert file_bytes(tmp_path / "cut") == whole
    by_time = {**more, "pipeline_parallel": 2, "balance": "time"}
    run_job_on_ranks(job("shapes-sd", tmp_path / "timed", prompts, **by_time), 2)
    assert file_bytes(tmp_path / "timed") == whole
    more |= {"pipeline_parallel": 2, "seed": 9}
    run_job_on_ranks(job("shapes-sd", tmp_path / "other", prompts, **more), 2)
    assert not set(file_bytes(tmp_path / "other").values()) & set(whole.values())


@pytest.mark.parametrize(
    ("schedule", "batch_size"),
    [("static", 1), ("dynamic", 2), nightly("static", 2), nightly("dynamic", 1)],
)
def test_two_replicas_of_two_stages_draw_the_bytes_of_one_rank(tmp_path, schedule, batch_size):
    model = tiny_pipeline("flux", tmp_path)
    arguments = {**call_arguments("flux"), "trust_remote_code": False}
    arguments["pipeline_kwargs"] = {"max_sequence_length": arguments.pop("max_sequence_length")}
    prompts, more = [f"a red cat {k}" for k in range(5)], {**arguments, "batch_size": batch_size}
    run_job_on_ranks(job(model, tmp_path / "whole", prompts, **more), 1)
    more |= {"pipeline_parallel": 2, "schedule": schedule}
    report = run_job_on_ranks(job(model, tmp_path / "cut", prompts, **more), 4)
    assert file_bytes(tmp_path / "cut") == file_bytes(tmp_path / "whole")
    assert (report.num_made, report.num_new, report.num_inexact) == (5, 5, 0)
    assert [times.stage for times in report.ranks] == [0, 1, 0, 1]
    assert [report.ranks[k].images for k in (1, 3)] == [0, 0]


def test_more_images_than_are_in_flight_come_out_right(moody, tmp_path):
    report = run_job_on_ranks(job(moody, tmp_path, "abcdefghi", pipeline_parallel=3), 3)
    assert report.num_made == 9
    assert colours(tmp_path) == {k: colour(k) for k in range(9)}
    assert colour(1) != colour(0)
    assert verify(Files(), str(tmp_path)).is_good


def test_a_replica_without_images_waits_for_the_other(moody, tmp_path):
    report = run_job_on_ranks(job(moody, tmp_path, "a", pipeline_parallel=2), 4)
    assert [times.images for times in report.ranks] == [1, 0, 0, 0]
    assert colours(tmp_path) == {0: colour(0)}
    assert run_job_on_ranks(job(moody, tmp_path, "a", pipeline_parallel=2), 4).num_new == 0


def test_a_job_goes_on_with_other_stages_than_it_was_begun_with(moody, tmp_path):
    run_job_on_ranks(job(moody, tmp_path, "abcde", pipeline_parallel=2), 2)
    before = file_bytes(tmp_path)
    for k in (1, 4):
        (tmp_path / f"images/0000/{k:08}.png").unlink()
    assert run_job_on_ranks(job(moody, tmp_path, "abcde", pipeline_parallel=3), 3).num_new == 2
    assert file_bytes(tmp_path) == before
    (tmp_path / "images/0000/00000002.png").unlink()
    assert run_job_on_ranks(job(moody, tmp_path, "abcde"), 1).num_new == 1
    assert file_bytes(tmp_path) == before


# --- what is refused, before a folder is made ----------------------------------------------------


def test_ranks_that_do_not_come_out_even_are_refused(moody, tmp_path):
    done = run([*MAIN, *words_of_job(moody, tmp_path, "ab", "--nproc_per_node=3", STAGES[1])])
    assert done.returncode == 2
    assert "--pipeline_parallel 2 needs a number of ranks that 2 divides; found 3" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_has_no_blocks_is_refused_by_name(tmp_path):
    model = moody_pipeline(tmp_path)
    with pytest.raises((UsageError, RankError), match=r"MoodyPipeline in .* made of blocks"):
        run_job_on_ranks(job(model, tmp_path / "out", "a", pipeline_parallel=2), 2)
    assert not (tmp_path / "out").exists()


def test_more_stages_than_blocks_are_refused_with_the_numbers(moody, tmp_path):
    more = ["--nproc_per_node=5", "--pipeline_parallel=5"]
    done = run([*MAIN, *words_of_job(moody, tmp_path, "ab", *more, "--dry_run")])
    assert done.returncode == 2
    assert "MoodyBlocks has 4 blocks, too few for 5 ranks" in done.stderr
    done = run([*MAIN, *words_of_job(moody, tmp_path, "ab", *more)])
    assert done.returncode == 2
    assert "MoodyBlocks has 4 blocks, too few for 5 ranks" in done.stderr
    assert not (tmp_path / "out").exists()


def test_compiling_a_cut_denoiser_is_refused():
    with pytest.raises(UsageError, match="--compile does not go with --pipeline_parallel 2"):
        JobConfig(pipeline_parallel=2, compile=True)


def test_the_dry_run_shows_who_holds_and_makes_what(moody, tmp_path):
    more = ["--nproc_per_node=4", "--pipeline_parallel=2", "--dry_run"]
    done = run([*MAIN, *words_of_job(moody, tmp_path, "abc", *more)])
    assert done.returncode == 0, done.stderr
    assert "  ranks 0 to 1: 2 batches, images 0 to 1\n" in done.stdout
    assert "  ranks 2 to 3: 1 batches, images 2 to 2\n" in done.stdout
    assert "stage 1 of the transformer: blocks.2 to blocks.3, 50% of its weights\n" in done.stdout
    assert not (tmp_path / "out").exists()


# --- prompts that fail, ranks that die ------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_failing_prompt_frees_its_slot_and_is_listed(moody, tmp_path, batch_size):
    prompts = ["a", "fail this", "b", "c", "fail that", "d"]
    config = job(moody, tmp_path, prompts, pipeline_parallel=2, batch_size=batch_size)
    report = run_job_on_ranks(config, 2)
    assert (report.num_made, report.num_failed, report.exit_code) == (4, 2, EXIT_FAILED_PROMPTS)
    failures = {row["index"]: row["message"] for row in lines(tmp_path / "failures.jsonl")}
    assert failures == {1: "cannot draw this", 4: "cannot draw that"}
    assert colours(tmp_path) == {k: colour(k) for k in (0, 2, 3, 5)}


def test_a_stage_without_room_makes_smaller_batches_and_that_is_remembered(moody, tmp_path):
    config = job(moody, tmp_path, ["many-last 2"] * 6, pipeline_parallel=2, batch_size=4)
    report = run_job_on_ranks(config, 2)
    assert (report.num_made, report.num_failed, report.num_inexact) == (6, 0, 4)
    assert colours(tmp_path) == {k: colour(k) for k in range(6)}


@pytest.mark.parametrize("where", ["once", "once-last"])
def test_a_killed_rank_ends_the_attempt_and_a_restart_makes_the_rest(moody, tmp_path, where):
    """The first rank of the first replica, then the last one; the other replica goes on."""
    prompts = ["a", f"{where} {tmp_path / 'died'}", *"bcdefg"]
    more = ["--nproc_per_node=4", "--pipeline_parallel=2", "--max_restarts=1"]
    done = run([*MAIN, *words_of_job(moody, tmp_path, prompts, *more)])
    assert done.returncode == 0, done.stderr
    assert f"rank {0 if where == 'once' else 1}" in done.stderr.split("restart 1 of 1")[0]
    assert "killed by SIGKILL" in done.stderr
    assert verify(Files(), str(tmp_path / "out")).is_good
    assert colours(tmp_path / "out") == {k: colour(k) for k in range(8)}
    told = deaths(tmp_path)
    assert any(1 in d["indices"] for d in told)
    assert not any(d["alone"] for d in told)
    assert all(max(d["indices"]) < 4 for d in told), "the other replica's are no suspects"


@pytest.mark.parametrize(("record", "is_guess"), [("ConnectionLost", True), ("ValueError", False)])
def test_a_lost_connection_says_who_but_not_how(record, is_guess):
    """So that the launcher, who knows of the signal, tells of it."""
    error = RankError(1, "running the pipeline", ErrorRecord(record, "closed by peer"))
    assert is_reported_by_peer(error) is is_guess


@pytest.mark.parametrize("where", [nightly("kill"), "kill-last"])
def test_a_prompt_that_always_kills_a_rank_is_failed_and_its_neighbours_are_made(
    moody, tmp_path, where
):
    prompts = ["a", "b", where, "c", "d", "e"]
    done = run([*MAIN, *words_of_job(moody, tmp_path, prompts, *STAGES, "--max_restarts=5")])
    assert done.returncode == 3, done.stderr
    assert "restart 4 of 5" in done.stderr
    assert "restart 5 of 5" not in done.stderr
    (failure,) = lines(tmp_path / "out/failures.jsonl")
    assert (failure["index"], failure["type"]) == (2, "ProcessDied")
    assert colours(tmp_path / "out") == {k: colour(k) for k in (0, 1, 3, 4, 5)}
    rows = lines(tmp_path / "out/metadata.jsonl")
    assert all(row["exact"] for row in rows)
    assert [d["indices"] for d in deaths(tmp_path) if d["alone"]] == [[2], [2]]


def test_without_restarts_the_same_command_goes_on(moody, tmp_path):
    words = words_of_job(
        moody, tmp_path, ["a", f"once-last {tmp_path / 'died'}", "b", "c"], *STAGES
    )
    done = run([*MAIN, *words])
    assert done.returncode == 70, done.stderr
    assert "rank 1" in done.stderr
    assert status(tmp_path / "out")["state"] == "stopped"
    assert run([*MAIN, *words]).returncode == 0
    assert colours(tmp_path / "out") == {k: colour(k) for k in range(4)}


@pytest.mark.parametrize("broken", [nightly(0), 1])
def test_a_rank_that_cannot_load_ends_all_by_name(moody, tmp_path, broken):
    words = words_of_job(moody, tmp_path, "ab", *STAGES)
    started = time.monotonic()
    done = run([*MAIN, *words], MOODY_BROKEN_RANK=str(broken))
    assert done.returncode != 0
    assert f"rank {broken}" in done.stderr
    assert "the disk of this machine is gone" in done.stderr
    assert time.monotonic() - started < 100, "nobody waited for a timeout"
    assert run([*MAIN, *words]).returncode == 0


# --- signals, standing still ----------------------------------------------------------------------


@pytest.mark.parametrize("where", [nightly("wait"), "wait-last"])
def test_sigterm_lets_what_is_in_flight_finish(moody, tmp_path, where):
    gate = tmp_path / "gate"
    words = words_of_job(moody, tmp_path, [f"{where} {gate}", *"abcdefgh"], *STAGES)
    process = start([*MAIN, *words])
    wait_until(process, (tmp_path / "gate.waiting").exists)
    process.send_signal(signal.SIGTERM)
    if where == "wait":
        wait_for_words(process, "received SIGTERM")
    else:  # the first rank hears it when the other stage has handed on what it made
        time.sleep(1)
    gate.touch()
    code, err = end(process)
    assert code == 75, err
    assert 0 in made(tmp_path)
    assert 8 not in made(tmp_path)
    assert run([*MAIN, *words]).returncode == 0
    assert colours(tmp_path / "out") == {k: colour(k) for k in range(9)}


@pytest.mark.parametrize("where", [nightly("wait"), "wait-last"])
def test_what_takes_longer_than_the_grace_is_abandoned(moody, tmp_path, where):
    words = words_of_job(
        moody, tmp_path, [f"{where} {tmp_path / 'gate'}", "a"], *STAGES, "--grace_seconds=0.2"
    )
    process = start([*MAIN, *words])
    wait_until(process, (tmp_path / "gate.waiting").exists)
    process.send_signal(signal.SIGTERM)
    code, err = end(process)
    assert code == 75, err
    assert status(tmp_path / "out")["state"] == "stopped"
    assert not (tmp_path / "out/failures.jsonl").exists(), "nobody failed"
    (tmp_path / "gate").touch()
    assert run([*MAIN, *words]).returncode == 0


def test_a_frozen_stage_is_named_and_not_who_waits_for_it(moody, tmp_path):
    gate = tmp_path / "gate"
    more = ["--nproc_per_node=3", "--pipeline_parallel=3", "--max_restarts=1"]
    more += ["--stuck_timeout=10"]
    process = start([*MAIN, *words_of_job(moody, tmp_path, ["a", f"wait-last {gate}", "b"], *more)])
    wait_until(process, (tmp_path / "gate.waiting").exists)
    os.kill(rank_processes(process)[2], signal.SIGSTOP)
    gate.touch()
    code, err = end(process)
    assert code == 0, err
    assert "rank 2 failed while running the stage of a denoiser" in err
    assert "no progress for" in err
    assert colours(tmp_path / "out") == {k: colour(k) for k in range(3)}
    assert not deaths(tmp_path)


def test_torchrun_starts_replicas_too(moody, tmp_path):
    command = [*TORCHRUN, "--nproc_per_node=2", "ddinfer/main.py", "--pipeline_parallel=2"]
    done = run([*command, *words_of_job(moody, tmp_path, "abc")])
    assert done.returncode == 0, done.stderr
    assert "images by replica of 2 ranks: 3 (" in done.stderr
    assert len(images(tmp_path / "out")) == 3
    assert np.array_equal(colours(tmp_path / "out")[2], colour(2))
