"""`ddinfer report`: what it reads of a job's folder, and what it writes there."""

import base64
import hashlib
import re
from pathlib import Path

import pytest
from PIL import Image

from ddinfer.request import Request
from ddinfer.storage.files import Files
from ddinfer.storage.images import image_path
from ddinfer.storage.job_folder import JobDescription, JobFolder
from ddinfer.storage.job_record import Shard
from ddinfer.storage.journal import JournalHeader, JournalWriter, journal_paths
from ddinfer.storage.lease import Lease
from ddinfer.storage.report_files import THUMBNAILS_FOLDER
from ddinfer.storage.verify import verify
from ddinfer.storage.writer import Writer
from tests.report_jobs import (
    HOSTILE,
    data_of,
    failed,
    made,
    real_job,
    report,
    various_job,
    write_job,
)
from tests.storage_jobs import IDENTITY, INFO, make_requests, run_job


def test_the_page_says_of_every_image_what_the_journals_say(tmp_path, capsys):
    out = various_job(tmp_path / "out")
    assert report(out) == 0
    assert capsys.readouterr().out == f"{out}/report.html\n"
    data = data_of(out)
    columns = data["columns"]
    assert columns["status"] == [2, 2, 2, 1, 2, 2, 2, 1, 2, 2, 2, 2]
    assert columns["id"][:3] == ["mine-0", None, None]
    assert columns["seed"][11] == 111
    assert [data["runs"][k]["rank"] for k in columns["run"]] == [0, 0, 1, 1] * 3
    assert columns["seconds"][0] == 0.5
    assert columns["seconds"][3] is None
    assert columns["batch"] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6]
    assert all(
        a <= b <= c
        for a, b, c in zip(*(columns[n] for n in ("start", "ready", "end")), strict=True)
    )
    assert data["prompts"][data["prompt"][3]] == "a house <b>by</b> the sea"
    assert data["parameter_sets"][data["parameters"][8]]["eta"] == 0.5
    assert data["errors"][data["error_of"]["3"]]["traceback"].startswith("Traceback")
    assert data["flags"] == {"5": ["nsfw"]}
    assert list(data["inexact"]) == ["6"]
    assert data["frames"] == {"8": 4}
    assert data["state"] == "finished"
    assert data["notices"] == []


def test_thumbnails_are_made_once_and_again_for_an_image_that_is_made_again(tmp_path):
    requests = make_requests(4)
    out = tmp_path / "out"
    write_job(out, requests, made)
    assert report(out) == 0
    before = {p: p.stat().st_mtime_ns for p in out.glob("thumbnails/*/*")}
    assert len(before) == 4
    assert report(out) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("thumbnails/*/*")} == before
    for name in before:
        with Image.open(name) as small:
            assert small.size == (48, 32)
    write_job(out, make_requests(4, width=8), made, overwrite=True)
    assert not list(out.glob("thumbnails/*/*"))
    assert not (out / "report.html").exists()


def test_overwrite_leaves_what_is_not_of_the_page(tmp_path):
    out = tmp_path / "out"
    write_job(out, make_requests(2), made)
    report(out)
    kept = [out / THUMBNAILS_FOLDER / "0000/mine.webp", out / THUMBNAILS_FOLDER / "notes.txt"]
    for name in kept:
        name.write_text("kept")
    (out / "report.html").write_text("<html>mine</html>")
    write_job(out, make_requests(1), made, overwrite=True)
    assert all(name.exists() for name in kept)
    assert (out / "report.html").read_text() == "<html>mine</html>"


def test_a_foreign_report_is_not_overwritten(tmp_path, capsys):
    write_job(tmp_path / "out", make_requests(1), made)
    (tmp_path / "out/report.html").write_text("<html>mine</html>")
    assert report(tmp_path / "out") == 2
    assert "was not written by ddinfer report; move it away" in capsys.readouterr().err
    assert (tmp_path / "out/report.html").read_text() == "<html>mine</html>"


def test_verify_and_the_next_run_are_as_before(tmp_path):
    requests = make_requests(4)
    out = tmp_path / "out"
    run_job(out, requests, stop_after=1)
    assert report(out) == 0
    assert verify(Files(), str(out)).extra == []
    assert run_job(out, requests).is_complete
    assert verify(Files(), str(out)).is_good


def test_without_thumbnails_the_page_shows_the_images(tmp_path):
    write_job(tmp_path / "out", make_requests(2), made)
    assert report(tmp_path / "out", "--no_thumbnails") == 0
    assert not (tmp_path / "out/thumbnails").exists()
    assert data_of(tmp_path / "out")["columns"]["thumbnail"] == [0, 0]


@pytest.mark.parametrize("state", ["running", "interrupted", "stopped"])
def test_a_job_that_is_not_finished_has_a_page(tmp_path, state):
    out = tmp_path / "out"
    write_job(out, make_requests(6), lambda r: made(r) if r.index < 2 else None, finish=False)
    if state == "stopped":
        (out / "status.json").write_text('{"state": "stopped", "error": "told to stop"}')
    if state == "running":
        with Lease.acquire(Files(), str(out)):
            assert report(out) == 0
    else:
        assert report(out) == 0
    data = data_of(out)
    assert data["state"] == state
    assert data["columns"]["status"] == [2, 2, 0, 0, 0, 0]
    assert data["error"] == ("told to stop" if state == "stopped" else None)


def test_a_part_of_a_job_shows_its_images(tmp_path):

    requests, files = make_requests(6), Files()
    job = JobDescription(requests, IDENTITY, {"torch": "2"}, shard=Shard(2, 2, 4, 6))
    with JobFolder.open(files, str(tmp_path / "out"), job) as folder:
        header = JournalHeader(folder.fingerprint)
        with Writer(files, folder.path, JournalWriter(files, folder.path, header), INFO) as writer:
            writer.put([made(requests[5])])
    assert report(tmp_path / "out") == 0
    data = data_of(tmp_path / "out")
    assert data["first"] == 4
    assert data["columns"]["status"] == [0, 2]
    assert data["shard"] == "2/2"


def test_a_damaged_journal_is_said_and_the_rest_is_shown(tmp_path, capsys):
    out = write_job(tmp_path / "out", make_requests(8), made, ranks=2, batch_size=1)
    first = journal_paths(Files(), out)[0]
    lines = Path(first).read_bytes().splitlines(keepends=True)
    number = [b'"image"' in line for line in lines].index(True)
    lines[number] = lines[number].replace(b"index", b"iNdex")
    Path(first).write_bytes(b"".join(lines))
    assert report(out) == 0
    (notice,) = data_of(out)["notices"]
    start = f"{first}:{number + 1}: the journal is damaged: its checksum"
    assert notice.startswith(start)
    assert notice in capsys.readouterr().err
    assert data_of(out)["columns"]["status"] == [0, 2] * 4


def test_images_that_are_gone_or_damaged_are_said(tmp_path):
    out = write_job(tmp_path / "out", make_requests(4), made)
    Path(out, image_path(1)).unlink()
    whole = Path(out, image_path(2)).read_bytes()
    Path(out, image_path(2)).write_bytes(whole[:-30])
    Path(out, image_path(3)).write_bytes(b"")
    assert report(out) == 0
    data = data_of(out)
    assert data["columns"]["status"] == [2, 3, 2, 2]
    assert list(data["unreadable"]) == ["2", "3"]
    gone, damaged = data["notices"]
    assert gone.startswith("1 images are in the journal but their files are missing")
    assert damaged.startswith("2 images cannot be opened (image 2: ")


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("job.json", None, 2, "no ddinfer job"),
        ("job.json", b"{", 74, "job.json is damaged"),
        ("requests.jsonl.gz", b"no gzip", 74, "requests.jsonl.gz:1: damaged"),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error_that_says_so(
    tmp_path, capsys, name, content, code, said
):
    out = Path(write_job(tmp_path / "out", make_requests(2), made))
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content)
    assert report(out) == code
    assert said in capsys.readouterr().err
    assert not (out / "report.html").exists()


def test_no_text_of_a_job_ends_the_block_that_it_stands_in(tmp_path):
    requests = [Request(k, f"id-{k}-{text[:40]}", text, k) for k, text in enumerate(HOSTILE)]
    out = write_job(tmp_path / "out", requests, lambda r: failed(r, HOSTILE[r.index] + "\udc80"))
    assert report(out) == 0
    page = Path(out, "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--<" not in page
    data = data_of(out)
    assert [data["prompts"][k] for k in data["prompt"]] == list(HOSTILE)
    assert data["errors"][data["error_of"]["0"]]["message"] == HOSTILE[0] + "\udc80"


def test_the_page_names_its_scripts_by_hash_and_nothing_from_elsewhere(tmp_path):
    out = write_job(tmp_path / "out", make_requests(1), made)
    report(out)
    page = Path(out, "report.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert set(re.findall(r"https?://[^\"'\s]*", page)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in page
    assert "insertAdjacentHTML" not in page


def test_a_real_job_tells_its_times_in_order(tmp_path):
    data = data_of(real_job(tmp_path / "out"))
    (run,) = data["runs"]
    columns = data["columns"]
    assert run["begin"] == 0
    assert run["reason"] == "done"
    assert columns["status"] == [2, 2, 2]
    for start, ready, end, seconds in zip(
        *(columns[name] for name in ("start", "ready", "end", "seconds")), strict=True
    ):
        assert 0 <= start < ready <= end <= run["end"]
        assert abs(ready - start - seconds) < 0.05
