"""Rank 0's part of a job: what it sends, and what it writes."""

import json
import pickle
from dataclasses import replace

import pytest

from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.errors import Stopped, StorageError, UsageError
from ddinfer.job.assignment import IndexBatches
from ddinfer.job.leader import Leader
from ddinfer.job.prepare import resolve_config
from ddinfer.request import Request
from ddinfer.storage import lease as lease_module
from ddinfer.storage.files import Files
from ddinfer.storage.lease import Holder
from ddinfer.storage.metadata import read_request_rows, write_requests

NUM_PROMPTS = 20_000


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text(
        "".join(f"a red circle above a long line of text, {k}\n" for k in range(NUM_PROMPTS))
    )
    return file


def lead(out, **options):
    config = JobConfig(output=str(out), device="cpu", num_threads=1, **options)
    return Leader(resolve_config(config), World())


@pytest.mark.parametrize(
    ("schedule", "batch_size", "num_bytes"),
    [("static", 1, 5 * NUM_PROMPTS), ("dynamic", 1, 16 * 5 * NUM_PROMPTS), ("static", 8, 20_000)],
)
def test_ranks_are_sent_indices_of_a_few_bytes(tmp_path, prompts, schedule, batch_size, num_bytes):
    options = {"prompts": str(prompts), "schedule": schedule, "batch_size": batch_size}
    leader = lead(tmp_path / "out", **options)
    try:
        assignments = leader.assignments(16)
    finally:
        leader.folder.close()
    sent = [len(pickle.dumps(each)) for each in assignments]
    assert sum(sent) < num_bytes + 16 * 4_000, "4,000 of each describe the job"
    indices = [k for each in assignments for batch in each.batches for k in batch]
    assert sorted(set(indices)) == list(range(NUM_PROMPTS))
    assert len(indices) == NUM_PROMPTS * (16 if schedule == "dynamic" else 1)
    mine = assignments[3]
    rows = read_request_rows(Files(), str(tmp_path / "out"), mine.mask())
    assert len(rows) == len({k for batch in mine.batches for k in batch}), "no more are kept"
    assert rows[mine.batches[0][0]] == leader.job.requests[mine.batches[0][0]]
    assert rows[mine.batches[-1][-1]] == leader.job.requests[mine.batches[-1][-1]]


@pytest.mark.parametrize("size", [1, 255, 256, 70_000])
def test_batches_of_any_size_stay_as_they_are(size):
    batches = [range(k, k + size) for k in (5, 0, 4_000_000_000)] + [range(3, 4)]
    packed = pickle.loads(pickle.dumps(IndexBatches(batches)))
    assert list(packed) == batches
    assert packed[-1] == range(3, 4)
    assert packed[1:3] == batches[1:3]
    assert not IndexBatches()


def test_requests_come_from_the_folder_as_they_were_resolved(tmp_path):
    requests = [
        Request(0, "a", "a \u2028 cat", 7, "dog", 64, 64, 3, 7.0, {"sigmas": [1.0, 2], "n": None}),
        Request(
            1, "b", "two", 2**63 - 1, kwargs={"image": "/a/b.png"}, input_hashes={"image": "ab"}
        ),
        Request(2, "c", "three", 9),
    ]
    write_requests(Files(), str(tmp_path), requests)
    rows = read_request_rows(Files(), str(tmp_path), bytearray(b"\1\0\1"))
    assert [rows[0], rows[2]] == [requests[0], requests[2]]
    with pytest.raises(KeyError):
        rows[1]
    with pytest.raises(StorageError, match=r"contains 3 requests, at least 4 expected"):
        read_request_rows(Files(), str(tmp_path), bytearray(b"\1\1\1\1"))


# --- a lease that another job has taken ----------------------------------------------------------


def take_over(out):
    """What a job on another machine writes once the heartbeat of this one has stopped."""
    other = replace(Holder.of_this_process(), machine="other", host="far", pid=7)
    with open(out / "lock", "r+b") as file:
        file.write(lease_module._encode(other))
    (out / "status.json").write_text('{"state": "running", "by": "the other job"}')
    return (out / "status.json").read_bytes(), (out / "lock").read_bytes()


def test_a_leader_that_lost_its_lease_leaves_the_files_to_the_other_job(tmp_path):
    leader = lead(tmp_path, prompt=("a red circle",))
    leader.mark_running()
    theirs = take_over(tmp_path)
    leader.mark_stopped(Stopped(15))
    assert ((tmp_path / "status.json").read_bytes(), (tmp_path / "lock").read_bytes()) == theirs

    with pytest.raises(StorageError, match="process 7 on far has taken"):
        leader.finish([])
    assert not (tmp_path / "metadata.jsonl").exists()


def test_a_leader_that_holds_its_lease_says_why_it_stopped(tmp_path):
    leader = lead(tmp_path, prompt=("a red circle",))
    leader.mark_stopped(Stopped(15))
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 75


# --- sizes that cannot be right -------------------------------------------------------------------


def test_a_number_of_frames_as_text_is_an_error_of_the_prompt(tmp_path, capsys):
    from ddinfer.errors import InputError
    from ddinfer.prompts.files import read_prompts

    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "num_frames": "81"}\n')
    with pytest.raises(
        InputError, match=r"prompts\.jsonl:1: num_frames must be a positive integer"
    ):
        read_prompts(str(file), call_parameters=["prompt", "num_frames"])


# --- a directory that is somebody else's ----------------------------------------------------------


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_data_set_with_a_job_json_of_its_own_is_refused_and_untouched(tmp_path, overwrite):
    (tmp_path / "images/0000").mkdir(parents=True)
    for name in ("job.json", "metadata.jsonl", "images/0000/00000000.png", "lock"):
        (tmp_path / name).write_text('{"task": "mine"}\n')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=r"job\.json is not the record of a ddinfer job; choose"):
        lead(tmp_path, prompt=("a red circle",), overwrite=overwrite)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
