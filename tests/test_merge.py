"""``--shard K/N`` and ``ddinfer merge``: a job made in parts is the job made in one piece."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ddinfer.cli import dispatch
from ddinfer.config import JobConfig
from ddinfer.errors import StorageError, UsageError
from ddinfer.job.prepare import Job
from ddinfer.job.run import run_job
from ddinfer.storage.files import Files
from ddinfer.storage.images import image_path
from ddinfer.storage.job_folder import JobDescription, JobFolder
from ddinfer.storage.job_record import Shard
from ddinfer.storage.journal import JournalHeader, JournalWriter
from ddinfer.storage.lease import Lease
from ddinfer.storage.merge import merge
from ddinfer.storage.saving import save_as_made
from ddinfer.storage.verify import verify
from ddinfer.storage.writer import Writer
from tests.fake_disk import Crashed, FakeDisk, Fault, Platter
from tests.moody_pipeline import moody_pipeline
from tests.storage_jobs import IDENTITY, INFO, engine, make_requests

ROOT = Path(__file__).parent.parent
HANG_SECONDS = 240
NUM_REQUESTS = 7


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


# --- which images a part has ---------------------------------------------------------------------


@pytest.mark.parametrize("num_requests", [0, 1, 5, 17])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_parts_are_whole_batches_and_cover_the_job_in_order(num_requests, num_parts, batch_size):
    covered = []
    for part in range(1, num_parts + 1):
        config = JobConfig(shard=f"{part}/{num_parts}", batch_size=batch_size)
        job = Job(config, "model", "model", "Pipeline", {}, make_requests(num_requests), {}, ())
        images = job.images()
        covered += images
        cut = [batch for batch in job.batches() if batch.start in images]
        assert [k for batch in cut for k in batch] == list(images)
    assert covered == list(range(num_requests))


# --- through the command line --------------------------------------------------------------------


def ddinfer(*words):
    """A command in a process of its own, as users start it → (exit code, output, errors)."""
    ended = subprocess.run(
        [sys.executable, "-m", "ddinfer", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    return ended.returncode, ended.stdout, ended.stderr


PROMPTS = ("a", "b", "c", "fail here", "d", "e", "f")


def job_words(moody, *more):
    words = ["--model", moody, "--trust_remote_code", "--device", "cpu", "--num_threads", "1"]
    words += ["--batch_size", "2", *(word for prompt in PROMPTS for word in ("--prompt", prompt))]
    return [*words, *more]


def visible(output):
    """What users get, but the record of the job, as bytes."""
    kept = ("metadata.jsonl", "requests.jsonl.gz")
    files = [*sorted(Path(output).glob("images/*/*.png")), *(Path(output, name) for name in kept)]
    return {str(f.relative_to(output)): f.read_bytes() for f in files}


def ids_of_failures(output):
    lines = Path(output, "failures.jsonl").read_text().splitlines()
    return [json.loads(line)["id"] for line in lines]


def test_a_job_in_two_parts_is_bit_for_bit_the_job_in_one(moody, tmp_path, capsys):
    parts = [tmp_path / "part1", tmp_path / "part2"]
    for number, part in enumerate(parts, 1):
        more = ["--shard", f"{number}/2", "--output", part, "--nproc_per_node", "2"]
        code, _, said = ddinfer(*job_words(moody, *more))
        assert code == (3 if number == 1 else 0), said
        assert f"part {number}/2 of the job: {[4, 3][number - 1]} of its 7 images" in said
    joined, whole, other = tmp_path / "joined", tmp_path / "whole", tmp_path / "other"
    run_job(config(moody, whole, prompt=PROMPTS))
    run_job(config(moody, other, prompt=PROMPTS, seed=1))

    capsys.readouterr()
    assert dispatch(["merge", *map(str, parts), "--output", str(joined), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["num_made"], report["num_failed"], report["num_copied"]) == (6, 1, 6)
    assert report["verify"]["is_good"]
    assert visible(joined) == visible(whole)
    assert visible(joined) != visible(other)
    assert ids_of_failures(joined) == ids_of_failures(whole) == ["00000003"]
    assert dispatch(["verify", str(joined)]) == 0
    assert json.loads((joined / "status.json").read_text())["exit_code"] == 3

    # The joined folder is an ordinary one: nothing is left to do for the job's own command.
    again = run_job(config(moody, joined, prompt=PROMPTS))
    assert (again.num_new, again.num_made, again.exit_code) == (0, 6, 3)
    assert visible(joined) == visible(whole)


# --- in process: what a part knows, and what is refused -------------------------------------------


def config(moody, output, shard=None, **more):
    options = {"num_threads": 1, "device": "cpu", "trust_remote_code": True, "batch_size": 2}
    options |= {"prompt": ("a", "b", "c", "d", "e"), "shard": shard, **more}
    return JobConfig(model=moody, output=str(output), **options)


def test_a_part_knows_what_it_is(moody, tmp_path, capsys):
    out = tmp_path / "part"
    report = run_job(config(moody, out, "2/2"))
    assert (report.num_images, report.num_made) == (1, 1)
    assert [p.name for p in out.glob("images/*/*")] == ["00000004.png"]
    assert run_job(config(moody, out, "2/2")).num_new == 0
    assert dispatch(["verify", str(out)]) == 0
    assert "1 of 1 images are present" in capsys.readouterr().out
    assert dispatch(["status", str(out)]) == 0
    assert "finished, part 2/2 of a job\n  1 of 1 images generated" in capsys.readouterr().out
    (out / image_path(4)).unlink()
    assert dispatch(["verify", str(out)]) == 74
    assert run_job(config(moody, out, "2/2")).num_new == 1
    rows = (out / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(row)["index"] for row in rows] == [4]


def test_failed_prompts_of_a_part_are_tried_again_in_it_alone(moody, tmp_path):
    from ddinfer.cli.retry_failed import RetryOptions, config_of

    gate, out = tmp_path / "gate", tmp_path / "part"
    prompts = ("a", "b", f"need {gate}", "c", f"need {gate}")
    assert run_job(config(moody, out, "2/3", prompt=prompts)).num_failed == 1
    gate.touch()
    again = config_of(RetryOptions(output=str(out), trust_remote_code=True))
    report = run_job(again, retry_failed=True)
    assert (report.num_images, report.num_new, report.num_failed) == (2, 1, 0)


def test_more_parts_than_batches_leave_some_with_nothing(moody, tmp_path):
    parts = [tmp_path / str(number) for number in range(1, 5)]
    for number, part in enumerate(parts, 1):
        report = run_job(config(moody, part, f"{number}/4"))
        assert report.num_made == report.num_images == [2, 2, 1, 0][number - 1]
    done = merge(Files(), [str(p) for p in parts], str(tmp_path / "joined"))
    assert (done.num_made, done.num_images) == (5, 5)


@pytest.mark.parametrize(
    ("begun", "then", "message"),
    [
        ("1/2", "2/2", "contains part 1/2 of this job, but --shard 2/2 was requested"),
        ("1/2", "1/3", "contains part 1/2 of this job, but --shard 1/3 was requested"),
        ("1/2", None, "Resume with --shard 1/2, or choose another --output"),
        (None, "1/2", "Resume without --shard, or choose another --output"),
    ],
)
def test_another_part_is_refused_in_a_folder(moody, tmp_path, begun, then, message):
    out = tmp_path / "out"
    run_job(config(moody, out, begun))
    before = visible(out)
    with pytest.raises(UsageError) as caught:
        run_job(config(moody, out, then))
    assert message in str(caught.value)
    assert visible(out) == before


def test_a_part_cannot_be_extended_but_the_joined_job_can(moody, tmp_path):
    parts = [str(tmp_path / "1"), str(tmp_path / "2")]
    for number, part in enumerate(parts, 1):
        run_job(config(moody, part, f"{number}/2"))
    with pytest.raises(UsageError, match="--extend does not go with --shard"):
        run_job(config(moody, parts[0], "1/2", extend=True))
    joined = tmp_path / "joined"
    merge(Files(), parts, str(joined))
    longer = ("a", "b", "c", "d", "e", "f", "g")
    report = run_job(config(moody, joined, extend=True, prompt=longer))
    assert (report.num_new, report.num_made) == (2, 7)
    assert dispatch(["verify", str(joined)]) == 0
    with pytest.raises(UsageError, match="7 in the directory, 5 now; the first 5 are the same"):
        merge(Files(), parts, str(joined))


def test_dry_run_shows_the_part(moody, tmp_path, capsys):
    from ddinfer.cli.dry_run import print_plan

    assert print_plan(config(moody, tmp_path / "x", "2/2", json=True), 2) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["shard"], plan["images"], plan["batches"]) == ("2/2", 1, 1)
    assert plan["first_requests"][0]["index"] == 4


# --- storage alone -------------------------------------------------------------------------------


def make_part(
    path, part, num_parts, *, disk=None, failing=(3,), stop_after=None, num_threads=1, **changes
):
    """Part ``part`` (from 1) of a job of 7 in batches of 2, or as much of it as is asked for."""
    files = Files(disk)
    requests = make_requests(NUM_REQUESTS, **changes)
    batches = [range(k, min(k + 2, NUM_REQUESTS)) for k in range(0, NUM_REQUESTS, 2)]
    size = -(-len(batches) // num_parts)
    mine = batches[size * (part - 1) : size * part]
    shard = Shard(part, num_parts, mine[0].start, mine[-1].stop)
    identity = {**IDENTITY, "num_threads": num_threads}
    job = JobDescription(requests, identity, {"torch": "2"}, {"shard": str(shard)}, shard)
    with JobFolder.open(files, str(path), job) as folder:
        state = folder.read_state()
        header = JournalHeader(folder.fingerprint, 0, folder.attempt)
        with Writer(
            files, str(path), JournalWriter(files, str(path), header), INFO, wanted=state.is_pending
        ) as writer:
            chosen = ([requests[k] for k in batch] for batch in mine[:stop_after])
            for _ in save_as_made(engine(failing), chosen, writer):
                pass
        folder.finish()
    return str(path)


@pytest.fixture
def parts(tmp_path):
    return [make_part(tmp_path / f"part{k}", k, 2) for k in (1, 2)]


def refusal(paths, target):
    with pytest.raises(UsageError) as caught:
        merge(Files(), paths, str(target))
    assert caught.value.exit_code == 2
    assert not os.path.exists(os.path.join(target, "images"))
    return str(caught.value)


def test_what_is_missing_is_named_before_anything_is_copied(tmp_path, parts):
    text = refusal(parts[:1], tmp_path / "joined")
    assert "3 of 7 images are in no given directory: 00000004, 00000005, 00000006" in text
    assert "not given: part 2/2" in text
    unfinished = make_part(tmp_path / "half", 2, 2, stop_after=1)
    text = refusal([parts[0], unfinished], tmp_path / "joined")
    assert "1 of 7 images are in no given directory: 00000006" in text
    assert f"{unfinished} (part 2/2) is not finished, 1 images are pending" in text
    assert not (tmp_path / "joined").exists()


def test_parts_of_different_jobs_are_told_apart(tmp_path, parts):
    other = make_part(tmp_path / "other", 2, 2, negative_prompt="grey")
    text = refusal([parts[0], other], tmp_path / "joined")
    assert f"{other} and {parts[0]} hold different jobs" in text
    assert "requests: 7 in" in text
    other = make_part(tmp_path / "cores", 2, 2, num_threads=8)
    text = refusal([parts[0], other], tmp_path / "joined")
    assert f"num_threads: 1 in {parts[0]}, 8 in {other}" in text
    assert "only in --shard and --output" in text


def test_folders_that_cannot_be_joined_are_refused(tmp_path, parts):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "contains no ddinfer job" in refusal([parts[0], str(empty)], tmp_path / "joined")
    assert "are the same directory" in refusal([*parts, parts[0] + "/"], tmp_path / "joined")
    with pytest.raises(UsageError, match="is one of the parts"):
        merge(Files(), parts, parts[0])
    assert "nothing to merge" in refusal([], tmp_path / "joined")
    with Lease.acquire(Files(), parts[1]):
        assert "is still being written" in refusal(parts, tmp_path / "joined")


def test_overlapping_parts_must_agree(tmp_path, parts):
    whole = make_part(tmp_path / "whole", 1, 1)
    report = merge(Files(), [*parts, whole], str(tmp_path / "joined"))
    assert (report.num_made, report.num_failed) == (6, 1)
    # An image that one part has and another lists as failed is made.
    failed = make_part(tmp_path / "failed", 1, 2, failing=(0, 3))
    report = merge(Files(), [failed, whole], str(tmp_path / "joined2"))
    assert (report.num_made, report.num_failed) == (6, 1)

    path = tmp_path / "whole/journal/000000-00000.jsonl"
    from ddinfer.storage.journal import decode_line, encode_line

    lines = [decode_line(line) for line in path.read_bytes().splitlines(keepends=True)]
    for line in lines:
        line.pop("crc", None)
        if line["kind"] == "image" and line["index"] == 5:
            line["sha256"] = "0" * 64
    path.write_bytes(b"".join(map(encode_line, lines)))
    with pytest.raises(StorageError, match=r"00000005\.png .* has other bytes in .*whole than in"):
        merge(Files(), [*parts, whole], str(tmp_path / "joined3"))
    assert not (tmp_path / "joined3").exists()
    with pytest.raises(StorageError, match=r"has other bytes for .*05\.png than the parts"):
        merge(Files(), [parts[0], whole], str(tmp_path / "joined"))


def test_a_damaged_image_is_found_and_the_same_command_goes_on(tmp_path, parts):
    image = Path(parts[1], image_path(5))
    good = image.read_bytes()
    image.write_bytes(good[:-1] + b"\0")
    target = str(tmp_path / "joined")
    with pytest.raises(StorageError) as caught:
        merge(Files(), parts, target)
    assert f"{image} is damaged" in str(caught.value)
    assert caught.value.exit_code == 74
    image.write_bytes(good)
    report = merge(Files(), parts, target)
    assert (report.num_made, report.num_failed) == (6, 1)
    assert verify(Files(), target).is_good
    assert merge(Files(), parts, target).num_copied == 0


def test_what_a_part_made_later_is_brought_in_later(tmp_path, parts):
    target = str(tmp_path / "joined")
    assert merge(Files(), parts, target).num_failed == 1
    files = Files()
    with JobFolder.open(
        files, parts[0], description_of(parts[0])
    ) as folder:  # as retry-failed does
        folder.retry_failed(folder.read_state())
    make_part(parts[0], 1, 2, failing=())
    report = merge(files, parts, target)
    assert (report.num_made, report.num_failed, report.num_copied) == (7, 0, 1)
    assert verify(files, target).is_good


def description_of(path):
    folder = JobFolder.look(Files(), path)
    record = folder.record
    return JobDescription(
        folder.all_requests, record.identity, record.versions, record.config, record.shard
    )


# --- faults --------------------------------------------------------------------------------------


def platter_with_parts():
    platter = Platter()
    paths = [make_part(f"/jobs/part{k}", k, 2, disk=FakeDisk(platter)) for k in (1, 2)]
    return platter, paths


def joined_files(platter):
    kept = ("/jobs/joined/images/", "/jobs/joined/metadata", "/jobs/joined/failures")
    return {path: data for path, data in platter.files().items() if path.startswith(kept)}


def undisturbed():
    platter, paths = platter_with_parts()
    disk = FakeDisk(platter)
    merge(Files(disk), paths, "/jobs/joined")
    return joined_files(platter), disk.count


@pytest.mark.parametrize(
    ("kind", "power"),
    [("crash", None), ("crash", "wholly"), ("half", "partly"), ("ENOSPC", None), ("EIO", "partly")],
)
def test_a_fault_at_every_operation_then_the_same_merge_again(kind, power):
    expected, num_operations = undisturbed()
    met = 0
    for at in range(num_operations):
        platter, paths = platter_with_parts()
        platter.power_fails(random.Random(0))  # the parts are durable: nothing is lost here
        disk = FakeDisk(platter, Fault(at, kind))
        try:
            merge(Files(disk), paths, "/jobs/joined")
        except (Crashed, StorageError):
            met += 1
            platter.process_dies(disk)
        if power is not None:
            platter.power_fails(random.Random(at) if power == "partly" else None)
        merge(Files(FakeDisk(platter)), paths, "/jobs/joined")
        for _ in range(2):
            files = Files(FakeDisk(platter))
            assert joined_files(platter) == expected
            assert verify(files, "/jobs/joined").is_good
            platter.power_fails()
    assert met > 20
    assert kind != "crash" or met == num_operations
