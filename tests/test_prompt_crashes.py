"""What a killed process had in hand, by its journal, and what that says of its prompts."""

import pytest

from ddinfer.storage.crashes import record_deaths, split_suspects
from ddinfer.storage.files import Files
from ddinfer.storage.journal import JournalHeader, JournalWriter, read_journals


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
    journal = JournalWriter(Files(), str(folder), JournalHeader("f", rank=rank, run_id="run/0"))
    journal.append(list(lines))
    journal.close()


def deaths(folder, signals, num_stages=1):
    record_deaths(Files(), str(folder), "run/0", signals, num_stages)
    state = read_journals(Files(), str(folder), ["f"], 9)
    return state, [(d["indices"], d["signal"], d["alone"]) for d in state.deaths]


def test_batches_that_end_out_of_order_leave_the_others_in_hand(tmp_path):
    lines = [start(0), start(1, beside=[0]), start(2, beside=[0, 1]), image(1)]
    write(tmp_path, 0, *lines, start(3, beside=[0, 2]))
    _, told = deaths(tmp_path, {0: 9})
    assert told == [([0], 9, False), ([2], 9, False), ([3], 9, False)]


def test_what_is_computed_and_not_yet_written_is_no_suspect(tmp_path):
    write(tmp_path, 0, start(0), start(1), image(0), start(2))
    _, told = deaths(tmp_path, {0: 11})
    assert told == [([2], 11, True)]


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
    assert told == ([([4], 9, False), ([5], 9, False)] if is_counted else [])


def test_two_deaths_in_company_make_batches_suspect_and_others_stay_as_they_are(tmp_path):
    write(tmp_path, 0, start(4), start(5, beside=[4]))
    write(tmp_path, 2, start(4), start(5, beside=[4]))
    state, _ = deaths(tmp_path, {0: 9, 2: 9})
    assert split_suspects([[3], [4], [5], [6, 7]], state) == ([[3], [6, 7]], [[4], [5]])
    assert split_suspects([[3], [4, 5], [6, 7]], state) == ([[3], [6, 7]], [[4], [5]])
