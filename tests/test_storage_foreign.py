"""A folder of somebody else's files, of every kind and name: each survives byte for byte."""

import importlib
import json

import pytest

from ddinfer.errors import StorageError, UsageError
from ddinfer.storage.files import Files
from ddinfer.storage.images import image_path
from ddinfer.storage.report_files import thumbnail_name
from ddinfer.storage.verify import verify
from tests.storage_jobs import describe, make_requests, run_job

#: Names that a job writes itself, and names close to them.
NAMES = [
    "lock",
    "rank0.lock",
    "job.json",
    "requests.jsonl.gz",
    "metadata.jsonl",
    "failures.jsonl",
    "status.json",
    "journal/000000-00000.jsonl",
    "journal/notes.jsonl",
    "journal/notes.txt",
    "images/holiday.png",
    "images/0000/holiday.png",
    "images/0000/00000000.png",
    "images/0000/00000001.PNG",
    "images/0000/00000077.png",
    "images/0001/00000001.png",
    "images/0001/00010001.png",
    "images/12/7.png",
    "images/0000/.00000000.png.swp",
    "images/0000/.00000000.png.ab.tmp",
    ".job.json.tmp",
    ".download.tmp",
    "prompts.txt",
]

#: What else a file of our name may hold: what looks like ours most.
LOOKALIKES = {
    "lock": [b"", b"pid 12", b'{"pid": 12}', b'{"machine": 1}'],
    "job.json": [
        b"",
        b"[]",
        b"{}",
        b'{"version": 1, "task": "classify"}',
        b'{"version": 1, "fingerprint": "ab"}',
        json.dumps(
            {
                "version": 1,
                "fingerprint": "0" * 64,
                "num_requests": 2,
                "requests_sha256": "0" * 64,
                "identity": {},
                "versions": {},
                "config": {},
                "fingerprints": ["0" * 64],
                "segments": [2],
            }
        ).encode(),
    ],
    "requests.jsonl.gz": [b"", b"\x1f\x8b"],
    "metadata.jsonl": [b"", b'{"file_name": "images/0000/00000000.png"}\n'],
    "journal/000000-00000.jsonl": [b"", b'{"step": 1}\n'],
}

#: In a job's own folder these are names that no job of ours writes.
BESIDE = [name for name in NAMES if name not in (
    "lock", "rank0.lock", "job.json", "requests.jsonl.gz", "metadata.jsonl", "failures.jsonl",
    "status.json", "journal/000000-00000.jsonl", "images/0000/00000000.png",
)]  # fmt: skip


def put(out, files):
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)


def kept(out, files):
    return {name: (out / name).read_bytes() for name in files if (out / name).exists()} == files


def attempt(out, **options):
    try:
        run_job(out, make_requests(3), **options)
    except (UsageError, StorageError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"extend": True}], ids=str)
def test_foreign_files_in_place_of_a_job_survive(tmp_path, options):
    cases = [{name: b"mine"} for name in NAMES]
    cases += [{name: data} for name, contents in LOOKALIKES.items() for data in contents]
    cases += [
        {"job.json": b'{"a": 1}', "metadata.jsonl": b"{}\n", "images/0000/00000000.png": b"mine"},
        dict.fromkeys(NAMES, b"mine"),
    ]
    for number, files in enumerate(cases):
        out = tmp_path / str(number)
        put(out, files)
        said = attempt(out, **options)
        # An empty lock is one that was never written.
        if files != {"lock": b""}:
            assert kept(out, files), f"{files} was changed: {said}"
        if said is not None:
            found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
            assert found == set(files), "refused, and yet something was written"
            assert "--output" in said, said


@pytest.mark.parametrize("options", [{}, {"overwrite": True}], ids=str)
def test_foreign_files_beside_a_job_survive(tmp_path, options):
    files = dict.fromkeys(BESIDE, b"mine")
    put(tmp_path, files)
    for name in list(files):  # a job does not begin between somebody's images
        if name.startswith(("images/", "journal/")):
            (tmp_path / name).unlink()
    for folder in ("images/0000", "images/0001", "images/12", "images", "journal"):
        (tmp_path / folder).rmdir()
    run_job(tmp_path, make_requests(3), stop_after=1)
    put(tmp_path, files)
    assert attempt(tmp_path, **options) is None
    assert kept(tmp_path, files)
    assert len(list(tmp_path.glob("images/0000/0000000?.png"))) == 3
    assert attempt(tmp_path, overwrite=True, job=describe(make_requests(3), dtype="other")) is None
    assert kept(tmp_path, files)


def test_overwriting_deletes_everything_that_the_job_wrote(tmp_path):
    run_job(tmp_path, make_requests(5), failing=[4])
    left = tmp_path / "images/0000" / (".00000000.png.ddinfer-0123abcd.tmp")
    left.write_bytes(b"half")
    assert run_job(tmp_path, make_requests(2), overwrite=True).is_complete
    assert sorted(p.name for p in tmp_path.glob("images/*/*")) == ["00000000.png", "00000001.png"]
    assert len(list(tmp_path.glob("journal/*"))) == 1
    assert (tmp_path / "failures.jsonl").read_bytes() == b""
    assert not (tmp_path / image_path(2)).exists()
    assert verify(Files(), str(tmp_path)).is_good


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path, overwrite):
    mine = tmp_path / "mine"
    mine.write_bytes(b"")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/lock").symlink_to(mine)
    assert attempt(tmp_path / "out", overwrite=overwrite) is not None
    assert mine.read_bytes() == b""


def use(out, command):
    """Run a command that writes or deletes in a job's directory → its error."""
    if command.startswith("run"):
        return attempt(out, overwrite="--overwrite" in command)
    name, *rest = command.split()
    with pytest.raises(UsageError) as refused:
        importlib.import_module(f"ddinfer.cli.{name}").main([str(out), *rest])
    return str(refused.value)


@pytest.mark.parametrize(
    "name", ["images", "images/0000", "journal", "thumbnails", "thumbnails/0000"]
)
@pytest.mark.parametrize("command", ["run", "run --overwrite", "verify --repair", "report"])
def test_a_directory_of_a_job_that_is_a_link_is_refused_and_nothing_is_written(
    tmp_path, name, command
):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    run_job(out, make_requests(3), stop_after=1)
    (out / image_path(0)).write_bytes(b"torn")
    thumbnail = out / thumbnail_name(0, "0123456789ab", 1)
    thumbnail.parent.mkdir(parents=True)
    thumbnail.write_bytes(b"old")
    (out / name).rename(elsewhere)
    (out / name).symlink_to(elsewhere)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    message = use(out, command)
    assert message is not None
    assert str(out / name) in message
    assert str(elsewhere) in message
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
