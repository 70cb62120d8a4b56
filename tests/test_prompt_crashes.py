"""Which prompts a killed process had in flight, by its journal, and which are given up."""

from dataclasses import asdict

import pytest

from ddinfer.storage.crashes import prompts_to_give_up, quarantine, record_deaths
from ddinfer.storage.files import Files
from ddinfer.storage.job_record import record_of
from ddinfer.storage.journal import JournalHeader, JournalWriter, read_journals
from ddinfer.storage.metadata import JOB_FILE, write_json
from tests.storage_jobs import describe, make_requests

RECORD = record_of(describe(make_requests(9)))


def start(*indices, beside=()):
    return {
        "kind": "start",
        "indices": list(indices),
        **({"beside": list(beside)} if beside else {}),
    }


def image(index):
    return {"kind": "image", "index": index, "sha256": f"{index:064x}", "bytes": 1, "seconds": 0}


def write(folder, rank, *lines):
    Files().make_folder(str(folder / "journal"))
    write_json(Files(), str(folder / JOB_FILE), asdict(RECORD))
    header = JournalHeader(RECORD.fingerprint, rank=rank, run_id="run/0")
    journal = JournalWriter(Files(), str(folder), header)
    journal.append(list(lines))
    journal.close()


def deaths(folder, signals, num_stages=1):
    record_deaths(Files(), str(folder), "run/0", signals, num_stages)
    state = read_journals(Files(), str(folder), [RECORD.fingerprint], 9)
    return state, [(d["indices"], d["signal"], d["alone"]) for d in state.deaths]


def test_batches_that_end_out_of_order_leave_the_others_in_flight(tmp_path):
    lines = [start(0), start(1, beside=[0]), start(2, beside=[0, 1]), image(1)]
    write(tmp_path, 0, *lines, start(3, beside=[0, 2]))
    _, told = deaths(tmp_path, {0: 9})
    assert told == [([0, 2, 3], 9, False)]


def test_what_has_run_and_is_not_yet_written_is_not_in_flight(tmp_path):
    write(tmp_path, 0, start(0), start(1), image(0), start(2))
    _, told = deaths(tmp_path, {0: 11})
    assert told == [([2], 11, True)]


def test_a_death_between_two_batches_blames_no_prompt(tmp_path):
    write(tmp_path, 0, start(0), image(0))
    write(tmp_path, 1, start(1))
    assert deaths(tmp_path, {0: 9, 1: 9})[1] == [([1], 9, True)]


@pytest.mark.parametrize(
    ("reason", "signals", "num_stages", "is_counted"),
    [
        ("RankError", {1: 9}, 2, True),  # rank 1 holds the second stage of what rank 0 makes
        ("RankError", {1: 9}, 1, False),  # rank 1 has batches of its own
        ("RankError", {2: 9}, 2, False),  # another replica's
        ("RankError", None, 2, False),  # nobody knows who was killed
        ("done", {1: 9}, 2, False),
        ("Stopped", {1: 9}, 2, False),
    ],
)
def test_a_killed_stage_counts_for_the_batches_of_its_replica(
    tmp_path, reason, signals, num_stages, is_counted
):
    end = {"kind": "end", "reason": reason}
    write(tmp_path, 0, start(4), start(5, beside=[4]), end)
    _, told = deaths(tmp_path, signals, num_stages)
    assert told == ([([4, 5], 9, False)] if is_counted else [])


def test_two_deaths_with_others_in_flight_quarantine_the_batches_and_no_more(tmp_path):
    write(tmp_path, 0, start(4), start(5, beside=[4]))
    write(tmp_path, 2, start(4), start(5, beside=[4]))
    state, _ = deaths(tmp_path, {0: 9, 2: 9})
    assert quarantine([[3], [4], [5], [6, 7]], state) == ([[3], [6, 7]], [[4], [5]])
    assert quarantine([[3], [4, 5], [6, 7]], state) == ([[3], [6, 7]], [[4], [5]])
    assert prompts_to_give_up(make_requests(8), state) == []


def test_a_batch_is_never_alone_although_one_prompt_of_it_is_pending(tmp_path):
    """Its neighbour runs again with it, and may be the one that kills."""
    for rank in range(3):
        write(tmp_path, rank, start(4, 5))
    state, told = deaths(tmp_path, None)
    assert told == [([4, 5], 0, False)] * 3
    state.add_image(image(4))
    assert quarantine([[4, 5]], state) == ([], [[5]])
    assert prompts_to_give_up(make_requests(8), state) == []


def test_two_deaths_alone_fail_a_prompt_and_no_neighbour(tmp_path):
    for rank in range(2):
        write(tmp_path, rank, start(4, 5))
        write(tmp_path, rank, start(5))
    state, _ = deaths(tmp_path, {0: 9, 1: 11})
    (line,) = prompts_to_give_up(make_requests(8), state)
    assert line["index"] == 5
    assert "killed 2 times (SIGKILL, SIGSEGV)" in line["error"]["message"]
    state.add(line)
    assert quarantine([[4, 5]], state) == ([], [[4]])


def test_journals_of_the_first_version_count_as_they_did(tmp_path):
    """There a death was journaled per batch, and a start named the wanted prompts alone."""
    old = [{"kind": "start", "indices": [5], "size": 2}, {"kind": "end", "reason": "RankError"}]
    lines = [{"kind": "death", "indices": [5], "signal": 9, "alone": False}] * 2
    write(tmp_path, 0, *old, *lines, {**lines[0], "indices": [3], "alone": True})
    state = read_journals(Files(), str(tmp_path), [RECORD.fingerprint], 9)
    assert quarantine([[3], [4, 5]], state) == ([[3]], [[4], [5]])
    assert prompts_to_give_up(make_requests(8), state) == []
