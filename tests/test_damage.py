"""Jobs whose journals or prompts were damaged: finished with the right images, or a clear error.

Never is an image missing, torn or another one in a job that counts as complete.
"""

import itertools
import json
import random
import re
import shutil

import pytest

from ddinfer.cli import dispatch
from ddinfer.config import JobConfig
from ddinfer.errors import StorageError, UsageError
from ddinfer.job.run import run_job
from ddinfer.storage.files import Files
from ddinfer.storage.verify import verify
from tests.jobs import STARTS, is_whole, job
from tests.moody_pipeline import moody_pipeline
from tests.test_cli import images, run

PROMPTS = [f"a picture of {k}" for k in range(6)]
PROMPTS[3] = "fail for once"


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def finished(moody, tmp_path_factory):
    """A finished job in two attempts; one of its prompts has failed."""
    folder = tmp_path_factory.mktemp("finished")
    write_prompts(folder, PROMPTS)
    go_on(moody, folder)
    (folder / "out/images/0000/00000001.png").unlink()
    go_on(moody, folder)
    assert len(list((folder / "out").glob("journal/*"))) == 2
    return folder


def write_prompts(folder, prompts):
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))


def go_on(model, folder, **more):
    """Run the job in ``folder``, here in this process."""
    config = JobConfig(
        model=model,
        prompts=str(folder / "prompts.txt"),
        output=str(folder / "out"),
        batch_size=2,
        num_threads=1,
        device="cpu",
        trust_remote_code=True,
        **more,
    )
    return run_job(config)


def copy_of(finished, folder):
    target = folder / "copy"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(finished, target)
    return target


def check_that_it_is_mended(model, folder, finished, journal):
    """The same command finishes the job, or says what to remove, and then it does."""
    refusal = None
    try:
        report = go_on(model, folder)
    except StorageError as error:
        refusal = str(error)
    if refusal is not None:
        assert re.search(re.escape(str(journal)) + r":\d+: ", refusal), refusal
        assert images(folder / "out") == images(finished / "out"), "refused, and yet changed"
        journal.unlink()
        report = go_on(model, folder)
    assert (report.num_made, report.num_failed) == (5, 1)
    assert images(folder / "out") == images(finished / "out")
    for name in ("metadata.jsonl", "failures.jsonl"):
        assert columns(folder / "out" / name) == columns(finished / "out" / name)
    assert verify(Files(), str(folder / "out")).is_good
    return refusal is not None


def columns(file):
    """Its rows, without the traceback, which tells lines of the test."""
    return [{**json.loads(row), "traceback": ""} for row in file.open()]


def lengths(journal):
    """Where to cut a journal: at every line's end, beside it, and every few bytes."""
    data = journal.read_bytes()
    ends = [k + 1 for k, byte in enumerate(data) if byte == ord("\n")]
    beside = {end + d for end in ends for d in (-1, 0, 1)}
    return sorted(k for k in {*range(0, len(data), 29), *beside} if k < len(data))


@pytest.mark.parametrize(
    "count", [16, pytest.param(None, marks=pytest.mark.nightly)], ids=["some", "all"]
)
def test_a_job_whose_journal_was_cut_short_is_made_whole_again(moody, tmp_path, finished, count):
    journals = sorted((finished / "out/journal").iterdir())
    cuts = [(journal.name, length) for journal in journals for length in lengths(journal)]
    for name, length in cuts if count is None else random.Random(0).sample(cuts, count):
        folder = copy_of(finished, tmp_path)
        journal = folder / "out/journal" / name
        journal.write_bytes(journal.read_bytes()[:length])
        refused = check_that_it_is_mended(moody, folder, finished, journal)
        assert not refused, f"only the last line of {name} was torn, at {length}"


@pytest.mark.parametrize(
    "count", [16, pytest.param(200, marks=pytest.mark.nightly)], ids=["some", "many"]
)
def test_a_flipped_byte_in_a_journal_is_mended_or_named(moody, tmp_path, finished, count):
    rng = random.Random(count)
    refusals = 0
    for _ in range(count):
        folder = copy_of(finished, tmp_path)
        journal = rng.choice(sorted((folder / "out/journal").iterdir()))
        data = bytearray(journal.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        journal.write_bytes(data)
        refusals += check_that_it_is_mended(moody, folder, finished, journal)
    assert refusals, "none was in a line that another follows"


def test_a_flipped_byte_in_the_prompts_is_another_job_and_says_which_prompt(
    moody, tmp_path, finished
):
    data = (finished / "prompts.txt").read_bytes()
    rng = random.Random(1)
    for place, bit in itertools.product(rng.sample(range(len(data)), 4), (0, 4, 7)):
        folder = copy_of(finished, tmp_path)
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        (folder / "prompts.txt").write_bytes(damaged)
        with pytest.raises(UsageError) as caught:
            go_on(moody, folder)
        line = data[:place].count(b"\n")
        if bit == 7:  # no UTF-8 any more
            assert f"prompts.txt:{line + 1}:" in str(caught.value)
        else:
            assert "contains another job" in str(caught.value)
            assert f"the first that differs is {line} " in str(caught.value)
        assert images(folder / "out") == images(finished / "out")
        (folder / "prompts.txt").write_bytes(data)
        assert go_on(moody, folder).num_new == 0


def test_a_flipped_byte_in_the_job_s_own_files_is_mended_or_named(moody, tmp_path, finished):
    rng = random.Random(2)
    for name, _ in itertools.product(["job.json", "requests.jsonl.gz"], range(8)):
        folder = copy_of(finished, tmp_path)
        file = folder / "out" / name
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        report, refusal = None, ""
        try:
            report = go_on(moody, folder)
        except (StorageError, UsageError) as error:
            refusal = str(error)
        if report is None:
            assert str(folder / "out") in refusal
        else:
            assert (report.num_made, report.num_failed) == (5, 1)
        assert images(folder / "out") == images(finished / "out")


def test_a_torn_image_is_found_deleted_and_made_again(moody, tmp_path, finished, capsys):
    folder = copy_of(finished, tmp_path)
    torn = folder / "out/images/0000/00000004.png"
    data = torn.read_bytes()
    torn.write_bytes(data[:-3])
    assert go_on(moody, folder).num_new == 0, "a rerun does not read what is there"
    assert dispatch(["verify", str(folder / "out")]) == 74
    assert "--repair deletes them" in capsys.readouterr().out
    assert dispatch(["verify", str(folder / "out"), "--repair"]) == 74
    assert "missing: images/0000/00000004.png" in capsys.readouterr().out
    assert not torn.exists()
    assert go_on(moody, folder).num_new == 1
    assert images(folder / "out") == images(finished / "out")
    assert dispatch(["verify", str(folder / "out"), "--repair"]) == 0


def test_a_damaged_journal_on_the_command_line(moody, tmp_path):
    """Two ranks, torn and flipped: 74 with file and line, and the advice helps."""
    command = [*STARTS["two ranks"], *job(moody, tmp_path, PROMPTS)]
    assert run(command).returncode == 3
    before = images(tmp_path / "out")
    first, second = sorted((tmp_path / "out/journal").iterdir())
    first.write_bytes(first.read_bytes()[:-300])
    data = bytearray(second.read_bytes())
    data[data.index(b"sha256") + 20] ^= 1
    second.write_bytes(data)
    done = run(command)
    assert done.returncode == 74, done.stderr
    assert re.search(re.escape(str(second)) + r":\d+: the journal is damaged", done.stderr)
    assert "Remove this file" in done.stderr
    second.unlink()
    assert run(command).returncode == 3
    assert is_whole(tmp_path)
    assert images(tmp_path / "out") == before
