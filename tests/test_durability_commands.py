"""``ddinfer status``, ``verify`` and ``retry-failed``: a job seen and mended from its folder."""

import json

import pytest

from ddinfer.cli import dispatch
from ddinfer.config import JobConfig
from ddinfer.job.run import run_job
from ddinfer.storage.files import Files
from ddinfer.storage.lease import Lease
from tests.moody_pipeline import moody_pipeline
from tests.test_cli import MAIN, images, options, run


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def finished(moody, tmp_path):
    """A job of four prompts, of which one failed, because a file was not there yet."""
    out = tmp_path / "out"
    prompts = ("a", "b", f"need {tmp_path / 'thing'}", "c")
    options = {"num_threads": 1, "device": "cpu", "trust_remote_code": True}
    run_job(JobConfig(model=moody, output=str(out), prompt=prompts, **options))
    return out


def said(capsys, *words):
    """(exit code, JSON) of a command."""
    capsys.readouterr()
    code = dispatch([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_status_of_a_finished_job(finished, capsys):
    code, status = said(capsys, "status", finished)
    assert (code, status["state"], status["exit_code"]) == (0, "finished", 3)
    assert (status["num_made"], status["num_failed"], status["num_pending"]) == (3, 1, 0)
    assert dispatch(["status", str(finished)]) == 0
    assert "3 of 4 images generated, 1 failed" in capsys.readouterr().out


def test_status_while_a_job_runs_and_after_it_died(finished, capsys):
    (finished / "images/0000/00000000.png").unlink()
    for journal in finished.glob("journal/*.jsonl"):
        whole = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(whole[:2]))  # its first start is the last that it wrote
    with Lease.acquire(Files(), str(finished)):
        _, status = said(capsys, "status", finished)
        assert status["state"] == "running"
        assert status["holder"].startswith("process ")
        assert status["ranks"] == [{"rank": 0, "state": "running", "in_flight": [[0]]}]
    _, status = said(capsys, "status", finished)
    assert status["state"] == "interrupted"
    assert status["ranks"][0]["state"] == "died"
    assert status["num_pending"] == 4


def test_verify_finds_what_is_missing_torn_and_extra(finished, capsys):
    code, report = said(capsys, "verify", finished)
    assert (code, report["is_good"], report["num_good"]) == (0, True, 3)
    torn = finished / "images/0000/00000001.png"
    data = bytearray(torn.read_bytes())
    data[-1] ^= 1
    torn.write_bytes(data)
    (finished / "images/0000/00000000.png").unlink()
    (finished / "images/0000/mine.png").write_bytes(b"")
    code, report = said(capsys, "verify", finished)
    assert code == 74
    assert (report["missing"], list(report["torn"])) == ([0], ["1"])
    assert report["extra"] == ["images/0000/mine.png"]
    assert dispatch(["verify", str(finished)]) == 74
    shown = capsys.readouterr().out
    assert "missing: images/0000/00000000.png; run the same command again to generate them" in shown


def test_verify_rebuilds_metadata(finished, capsys):
    before = (finished / "metadata.jsonl").read_bytes()
    (finished / "metadata.jsonl").write_bytes(before[:-20])
    assert said(capsys, "verify", finished)[0] == 74
    code, report = said(capsys, "verify", finished, "--rebuild")
    assert (code, report["stale"]) == (0, [])
    assert (finished / "metadata.jsonl").read_bytes() == before


def test_retry_failed_needs_nothing_but_the_folder(finished, moody, tmp_path, capsys):
    images = {f: f.read_bytes() for f in finished.glob("images/*/*.png")}
    (tmp_path / "thing").touch()
    options = {"num_threads": 1, "device": "cpu", "trust_remote_code": True}
    prompts = ("a", "b", f"need {tmp_path / 'thing'}", "c")
    same = JobConfig(model=moody, output=str(finished), prompt=prompts, **options)
    assert run_job(same).num_failed == 1, "a rerun leaves failed prompts alone"
    report = run_job(same, retry_failed=True)
    assert (report.num_new, report.num_failed, report.num_made) == (1, 0, 4)
    assert all(f.read_bytes() == data for f, data in images.items())
    assert (finished / "failures.jsonl").read_bytes() == b""
    assert said(capsys, "verify", finished)[0] == 0


def test_retry_failed_does_not_need_the_prompt_file(moody, tmp_path):
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text(f"a\nneed {tmp_path / 'thing'}\n")
    assert run([*MAIN, *options(moody, out, "--prompts", file)]).returncode == 3
    (tmp_path / "thing").touch()
    file.unlink()
    done = run([*MAIN, "retry-failed", out, "--trust_remote_code"])
    assert done.returncode == 0, done.stderr
    assert sorted(images(out)) == ["00000000.png", "00000001.png"]


def test_a_prompt_that_fails_again_is_listed_again(finished, moody, capsys):
    from ddinfer.cli.retry_failed import RetryOptions, config_of

    config = config_of(RetryOptions(output=str(finished), trust_remote_code=True))
    assert run_job(config, retry_failed=True).num_failed == 1
    assert said(capsys, "verify", finished)[0] == 0


@pytest.mark.parametrize("command", ["status", "verify", "retry-failed"])
def test_a_folder_without_a_job_is_told(command, tmp_path, capsys):
    assert dispatch([command, str(tmp_path)]) == 2
    assert "contains no ddinfer job" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
