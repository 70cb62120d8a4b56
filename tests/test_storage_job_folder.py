import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ddinfer.errors import StorageError, UsageError
from ddinfer.storage.disk_space import check_room, estimate_disk
from ddinfer.storage.files import Files
from ddinfer.storage.images import image_path
from ddinfer.storage.job_folder import JobFolder, JobReport
from ddinfer.storage.job_record import read_job
from ddinfer.storage.media import Formats
from ddinfer.storage.metadata import write_requests
from ddinfer.storage.verify import repair, verify
from tests.fake_disk import FakeDisk, Platter
from tests.storage_jobs import describe, make_requests, run_job


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "out"


def images(out):
    return {p.name: p.read_bytes() for p in sorted(out.glob("images/*/*"))}


def check(out):
    return verify(Files(), str(out))


def test_a_job_that_was_stopped_goes_on_and_ends_like_one_that_was_not(out, tmp_path):
    requests = make_requests(7)
    assert run_job(out, requests, stop_after=2) == JobReport(4, 0, [4, 5, 6])
    before = images(out)
    assert run_job(out, requests, failing=[6]) == JobReport(6, 1, [])
    assert run_job(out, requests) == JobReport(6, 1, [])  # failed prompts are left alone
    run_job(tmp_path / "other", requests, failing=[6])
    assert images(out) == images(tmp_path / "other")
    assert before.items() <= images(out).items()
    for name in ("metadata.jsonl", "failures.jsonl", "requests.jsonl.gz"):
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert check(out).is_good


def test_a_batch_runs_whole_and_rewrites_nothing(out):
    requests = make_requests(4)
    run_job(out, requests)
    gone = out / image_path(1)
    kept = (out / image_path(0)).stat().st_mtime_ns
    before = gone.read_bytes()
    gone.unlink()
    assert run_job(out, requests) == JobReport(4, 0, [])
    assert gone.read_bytes() == before
    assert (out / image_path(0)).stat().st_mtime_ns == kept


def refusal(out, requests, **options):
    before = sorted(p for p in out.rglob("*") if "lock" not in p.name)
    with pytest.raises(UsageError) as caught:
        run_job(out, requests, **options)
    assert sorted(p for p in out.rglob("*") if "lock" not in p.name) == before
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_another_job_is_refused_with_the_difference_and_the_ways_out(out):
    requests = make_requests(4)
    run_job(out, requests)
    text = refusal(out, requests, job=describe(requests, dtype="bfloat16"))
    assert 'dtype: "float32" in the directory, "bfloat16" now' in text
    assert "another --output" in text
    assert "--overwrite" in text
    changed = [*requests[:2], replace(requests[2], prompt="new"), requests[3]]
    text = refusal(out, changed)
    assert 'the first that differs is 2 (id 00000002): prompt: "prompt 2" in the directory' in text
    assert "4 in the directory, 3 now; the first 3 are the same" in refusal(out, requests[:3])
    assert "(--extend adds the new ones)" in refusal(out, make_requests(5))


def test_other_versions_can_be_accepted(out):
    requests = make_requests(4)
    run_job(out, requests, stop_after=1)
    newer = describe(requests, {"torch": "3"})
    text = refusal(out, requests, job=newer)
    assert 'version of torch: "2" in the directory, "3" now' in text
    assert "--accept_versions" in text
    assert run_job(out, requests, job=newer, accept_versions=True) == JobReport(4, 0, [])
    assert run_job(out, requests, job=newer) == JobReport(4, 0, [])  # asked once
    assert run_job(out, requests) == JobReport(4, 0, [])
    assert check(out).is_good


def test_extending_adds_and_changes_nothing_of_before(out):
    run_job(out, make_requests(3))
    before = images(out)
    run_job(out, make_requests(6), extend=True)
    assert before.items() <= images(out).items()
    assert read_job(Files(), str(out)).segments == [3, 6]
    assert check(out).is_good
    assert run_job(out, make_requests(6)) == JobReport(6, 0, [])
    assert "cannot be extended" in refusal(
        out, make_requests(7), extend=True, job=describe(make_requests(7), dtype="other")
    )


def test_overwriting_deletes_the_job_and_nothing_else(out):
    run_job(out, make_requests(5))
    (out / "notes.txt").write_text("mine")
    (out / "images" / "sketch.jpg").write_text("mine")
    run_job(out, make_requests(2), overwrite=True, job=describe(make_requests(2), dtype="other"))
    assert (out / "notes.txt").exists()
    assert (out / "images" / "sketch.jpg").exists()
    assert len(list(out.glob("images/*/*.png"))) == 2
    assert check(out).num_good == 2
    assert check(out).extra == ["images/sketch.jpg"]


def test_a_folder_of_somebody_else_is_left_alone(out):
    (out / "images").mkdir(parents=True)
    (out / "images" / "holiday.png").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"contains images but no job\.json"):
            run_job(out, make_requests(2), overwrite=overwrite)
    assert (out / "images" / "holiday.png").read_text() == "mine"


def test_a_folder_with_other_things_in_it_is_fine(out):
    out.mkdir(parents=True)
    (out / "prompts.txt").write_text("a")
    assert run_job(out, make_requests(2)).is_complete


def test_leftovers_of_a_crash_are_swept(out):
    run_job(out, make_requests(2), stop_after=0)
    (out / "images" / "0000").mkdir()
    left = out / "images" / "0000" / ".00000000.png.ddinfer-0123abcd.tmp"
    left.write_text("half")
    run_job(out, make_requests(2))
    assert not left.exists()


def test_lost_requests_are_written_anew_and_nothing_is_deleted_on_a_damaged_record(out):
    requests = make_requests(3)
    run_job(out, requests)
    (out / "requests.jsonl.gz").write_bytes(b"spoilt")
    with pytest.raises(StorageError, match="run the job's own command again"):
        check(out)
    run_job(out, requests)
    assert check(out).is_good
    (out / "job.json").write_text("{")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match=r"job\.json is damaged: .*choose another --output"):
            run_job(out, requests, overwrite=overwrite)
    assert len(images(out)) == 3


def test_requests_that_are_not_the_job_s_are_written_anew(out):
    """Ranks read their Requests from this file, so that a valid file of others will not do."""
    requests = make_requests(3)
    run_job(out, requests, stop_after=1)
    before = (out / "requests.jsonl.gz").read_bytes()
    write_requests(Files(), str(out), [replace(r, prompt="another") for r in requests])
    run_job(out, requests)
    assert (out / "requests.jsonl.gz").read_bytes() == before


def test_looking_needs_no_prompts_and_no_lock(out):
    requests = make_requests(3)
    run_job(out, requests)
    with JobFolder.open(Files(), str(out), describe(requests)):
        assert JobFolder.look(Files(), str(out)).requests == requests
    with pytest.raises(UsageError, match="contains no ddinfer job"):
        JobFolder.look(Files(), str(out.parent))


def test_a_retry_runs_what_failed(out):
    requests = make_requests(4)
    run_job(out, requests, failing=[1])
    folder = JobFolder.look(Files(), str(out))
    state = folder.read_state()
    for index in list(state.failures):
        state.forget(index)
    assert folder.pending(state) == [1]
    assert folder.pending_batches([range(0, 2), range(2, 4)], state) == [range(0, 2)]


ROOT = Path(__file__).parent.parent
LIMITED = """
import resource, sys
from ddinfer.errors import StorageError
from tests.storage_jobs import make_requests, run_job
kind, limit, out = sys.argv[1:]
resource.setrlimit(getattr(resource, kind), (int(limit), int(limit)))
try:
    run_job(out, make_requests(30))
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("kind", "limit", "cause"),
    [("RLIMIT_FSIZE", "4000", "EFBIG"), ("RLIMIT_NOFILE", "5", "EMFILE")],
)
def test_limits_of_the_real_system_end_in_order_and_the_job_goes_on(out, kind, limit, cause):
    command = [sys.executable, "-c", LIMITED, kind, limit, str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ended.returncode, cause in ended.stdout) == (74, True), ended
    assert str(out) in ended.stdout
    assert run_job(out, make_requests(30)).is_complete
    assert check(out).is_good


# --- verify ------------------------------------------------------------------------------------


def test_verify_finds_everything_that_can_be_wrong(out):
    run_job(out, make_requests(8), failing=[7])
    assert (check(out).num_good, check(out).num_failed, check(out).is_good) == (7, 1, True)
    (out / image_path(0)).unlink()
    data = bytearray((out / image_path(1)).read_bytes())
    data[50] ^= 1
    (out / image_path(1)).write_bytes(data)
    (out / image_path(2)).write_bytes(data[:20])
    shutil.copy(out / image_path(3), out / image_path(7))
    shutil.copy(out / image_path(3), out / "images" / "0000" / "copy.png")
    lines = (out / "metadata.jsonl").read_text().splitlines(keepends=True)
    (out / "metadata.jsonl").write_text("".join(lines[1:]))
    report = check(out)
    assert report.missing == [0]
    assert set(report.torn) == {1, 2}
    assert "20 bytes" in report.torn[2]
    assert report.extra == ["images/0000/00000007.png", "images/0000/copy.png"]
    assert report.stale == ["metadata.jsonl"]
    assert report.num_good == 4
    assert json.dumps(report.to_dict())


def test_verify_says_what_is_still_to_be_made(out):
    run_job(out, make_requests(4), stop_after=1)
    assert check(out).pending == [2, 3]
    assert not check(out).is_good


def test_metadata_can_be_rebuilt(out):
    run_job(out, make_requests(4), failing=[2])
    before = (out / "metadata.jsonl").read_bytes()
    (out / "metadata.jsonl").unlink()
    (out / "failures.jsonl").write_text("no")
    assert check(out).stale == ["metadata.jsonl", "failures.jsonl"]
    repair(Files(), str(out), rebuild=True, delete_torn=False)
    assert (out / "metadata.jsonl").read_bytes() == before
    assert check(out).is_good


# --- room --------------------------------------------------------------------------------------


def test_room_is_guessed_by_size_and_measured_once_there_are_images(out):
    requests = make_requests(10)
    guess = estimate_disk(Files(), str(out), requests, call_defaults={"width": 512, "height": 512})
    assert 3e6 < guess.needed_bytes < 10e6
    assert not guess.is_measured
    run_job(out, requests)
    state = JobFolder.look(Files(), str(out)).read_state()
    measured = estimate_disk(Files(), str(out), requests, state=state)
    assert measured.is_measured
    assert measured.needed_bytes < 30_000
    wide = [replace(r, width=1024, height=1024) for r in requests]
    assert estimate_disk(Files(), str(out), wide).needed_bytes > 3 * guess.needed_bytes


def test_room_for_a_video_is_that_of_all_its_frames(out):
    image, *_ = requests = make_requests(1, width=256, height=256)
    frames = [replace(image, kwargs={"num_frames": 81})]

    def needed(requests, **options):
        return estimate_disk(Files(), str(out), requests, **options).needed_bytes

    lossless = Formats(video="frames")
    assert needed(frames, formats=lossless) > 75 * needed(requests)
    assert needed(requests) < needed(frames) < needed(frames, formats=lossless) / 4
    assert needed(requests, call_defaults={"num_frames": 81}) == needed(frames)
    assert needed(frames, call_defaults={"num_frames": 5}) == needed(frames)


def test_no_room_is_an_error_with_numbers():
    platter = Platter(free_bytes=1000)
    estimate = estimate_disk(Files(FakeDisk(platter)), "/out", make_requests(10))
    with pytest.raises(StorageError, match=r"/out: 10 images need about .* MB .*0\.0 MB are free"):
        check_room(estimate, "/out")
