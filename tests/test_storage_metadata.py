import json

import pytest

from ddinfer.errors import StorageError
from ddinfer.request import Request
from ddinfer.storage.files import Files
from ddinfer.storage.journal import JournalState
from ddinfer.storage.metadata import (
    failure_rows,
    metadata_rows,
    read_requests,
    read_status,
    write_requests,
    write_status,
)
from tests.storage_jobs import make_requests, run_job


def made(requests, failed=()):
    state = JournalState(len(requests))
    for request in requests:
        if request.index in failed:
            error = {"type": "E", "message": "m", "traceback": ""}
            state.add_failure({"index": request.index, "error": error})
        else:
            state.add_image({"index": request.index, "sha256": "0" * 64, "bytes": 1})
    return state


def table(requests, **options):
    return list(metadata_rows(requests, made(requests, **options)))


def test_every_row_has_the_same_columns_in_index_order():
    requests = [
        Request(0, "a", "p", 1, kwargs={"eta": 0.5}),
        Request(1, "b", "q", 2, "no", guidance_scale=3.0),
        Request(2, "c", "r", 3),
    ]
    rows = table(requests, failed=[2])
    assert [row["file_name"] for row in rows] == [
        "images/0000/00000000.png",
        "images/0000/00000001.png",
    ]
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["negative_prompt"] is None
    assert rows[0]["guidance_scale"] is None
    assert "width" not in rows[0]
    assert [row["eta"] for row in rows] == [0.5, None]


def test_a_column_has_one_type():
    values = [1, 0.5, "x"]
    rows = table([Request(k, f"{k}", "p", k, kwargs={"a": v}) for k, v in enumerate(values)])
    assert [row["a"] for row in rows] == ["1", "0.5", '"x"']
    rows = table([Request(0, "0", "p", 0, kwargs={"sigmas": [1, 2]}), Request(1, "1", "p", 0)])
    assert [row["sigmas"] for row in rows] == ["[1, 2]", None]
    rows = table([Request(k, f"{k}", "p", k, kwargs={"a": v}) for k, v in enumerate([1, 0.5])])
    assert [row["a"] for row in rows] == [1, 0.5]


def test_arguments_never_hide_a_column_of_ours_or_of_datasets():
    request = Request(
        0,
        "x",
        "p",
        1,
        kwargs={"image": "/a.png", "index": 7, "label": 1, "mask_file_name": "m"},
        input_hashes={"image": "ab"},
    )
    [row] = table([request])
    assert (row["index"], row["argument_index"]) == (0, 7)
    assert row["image_sha256"] == "ab"
    assert "image" not in row
    assert (row["argument_label"], row["argument_mask_file_name"]) == (1, "m")


def test_failures_say_who_and_why():
    requests = make_requests(3)
    [row] = failure_rows(requests, made(requests, failed=[1]))
    assert row == {
        "id": "00000001",
        "index": 1,
        "prompt": "prompt 1",
        "type": "E",
        "message": "m",
        "traceback": "",
    }


def test_requests_come_back_and_have_the_same_bytes_each_time(tmp_path):
    requests = [Request(k, f"é{k}", "🐶", k, kwargs={"a": [k, 0.1]}) for k in range(100)]
    files, path = Files(), tmp_path / "requests.jsonl.gz"
    write_requests(files, str(tmp_path), requests)
    first = path.read_bytes()
    write_requests(files, str(tmp_path), requests)
    assert path.read_bytes() == first
    assert read_requests(files, str(tmp_path)) == requests
    assert read_requests(files, str(tmp_path), 3) == requests[:3]


@pytest.mark.parametrize(
    "spoil", [lambda d: d[:-9], lambda d: b"no", lambda d: d[:40] + b"x" + d[41:]]
)
def test_damaged_requests_are_an_error_with_the_way_out(tmp_path, spoil):
    files, path = Files(), tmp_path / "requests.jsonl.gz"
    write_requests(files, str(tmp_path), make_requests(50))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(StorageError, match=r"requests.jsonl.gz:\d+: damaged .*run the job's own"):
        read_requests(files, str(tmp_path))


def test_status_is_replaced(tmp_path):
    files, out = Files(), str(tmp_path)
    assert read_status(files, out) is None
    write_status(files, out, {"state": "running"})
    write_status(files, out, {"state": "finished", "message": "\ud800"})
    assert read_status(files, out) == {"state": "finished", "message": "\ud800"}
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        read_status(files, out)


def test_datasets_reads_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "test-out"  # a name that could be taken for a split's
    requests = [
        Request(k, f"{k}", f"prompt {k}", k, kwargs={"eta": 0.5} if k else {}) for k in range(5)
    ]
    run_job(out, requests, failing=[3])
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert loaded["prompt"] == ["prompt 0", "prompt 1", "prompt 2", "prompt 4"]
    assert loaded["eta"] == [None, 0.5, 0.5, 0.5]
    assert [image.getpixel((0, 0)) for image in loaded["image"]] == [
        (k, k, 0) for k in (0, 1, 2, 4)
    ]
    lines = (out / "metadata.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["file_name"] == "images/0000/00000000.png"
