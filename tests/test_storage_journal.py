from pathlib import Path

import pytest

from ddinfer.errors import StorageError
from ddinfer.storage.files import Files
from ddinfer.storage.journal import (
    JournalError,
    JournalHeader,
    JournalWriter,
    decode_line,
    encode_line,
    read_journals,
)
from tests.fake_disk import FakeDisk, Fault, Platter


def image(index, **more):
    return {"kind": "image", "index": index, "sha256": f"{index:064x}", "bytes": 10 + index, **more}


def failed(index):
    error = {"type": "E", "message": "m", "traceback": ""}
    return {"kind": "failed", "index": index, "id": str(index), "error": error}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "journal").mkdir()
    return tmp_path


def write(folder, *records, rank=0, attempt=0, fingerprint="f"):
    journal = JournalWriter(Files(), str(folder), JournalHeader(fingerprint, rank, attempt))
    for record in records:
        journal.append([record])
    journal.close()
    return journal.path


def read(folder, num_requests=8):
    return read_journals(Files(), str(folder), ["f"], num_requests)


def spoil(path, change):
    with open(path, "rb") as file:
        lines = file.readlines()
    with open(path, "wb") as file:
        file.writelines(change(lines))


def test_a_line_knows_when_any_of_its_bytes_is_wrong():
    line = encode_line(image(3, note="é"))
    assert decode_line(line) == image(3, note="é")
    for at in range(len(line)):
        for bit in (1, 128):
            assert decode_line(line[:at] + bytes([line[at] ^ bit]) + line[at + 1 :]) is None
        assert decode_line(line[:at]) is None


def test_journals_of_all_ranks_and_attempts_come_together(folder):
    write(folder, image(0), image(1), rank=0)
    write(folder, failed(4), rank=1)
    write(folder, image(5, exact=False, batch=[5], flags=["black"]), rank=0, attempt=1)
    state = read(folder)
    assert [state.is_done(k) for k in range(8)] == [k in (0, 1, 5) for k in range(8)]
    assert state.is_failed(4)
    assert state.is_pending(7)
    assert (state.num_done, state.num_failed) == (3, 1)
    assert state.sha256(5) == f"{5:064x}"
    assert state.size(5) == 15
    assert state.notes == {5: {"exact": False, "batch": [5], "flags": ["black"]}}
    assert [(a.header.attempt, a.header.rank) for a in state.attempts] == [(0, 0), (0, 1), (1, 0)]


def test_an_image_stays_made_whatever_is_said_of_it_later(folder):
    write(folder, failed(1), image(1), failed(1))
    state = read(folder)
    assert state.is_done(1)
    assert state.failures == {}


def test_a_retried_failure_counts_once(folder):
    write(folder, failed(1))
    write(folder, image(1), attempt=1)
    assert (read(folder).num_done, read(folder).num_failed) == (1, 0)


def test_forgetting_makes_pending(folder):
    write(folder, image(1), failed(2))
    state = read(folder)
    state.forget(1)
    state.forget(2)
    assert (state.num_done, state.num_failed, state.total_bytes) == (0, 0, 0)
    assert state.is_pending(1)


def test_a_torn_last_line_is_nobodys_loss(folder):
    path = write(folder, image(0), image(1))
    whole = Path(path).read_bytes()
    for cut in range(len(whole)):
        with open(path, "wb") as file:
            file.write(whole[:cut])
        state = read(folder)
        assert state.num_done <= 2
    assert read(folder).is_done(0)


def test_a_broken_line_in_the_middle_is_an_error_with_file_line_and_way_out(folder):
    path = write(folder, image(0), image(1))
    spoil(path, lambda lines: [lines[0], lines[1].replace(b"10", b"11"), lines[2]])
    with pytest.raises(JournalError, match=rf"{path}:2: .*checksum.*Remove this file") as caught:
        read(folder)
    assert caught.value.exit_code == 74


def test_a_flipped_byte_anywhere_never_invents_an_image(folder):
    path = write(folder, image(0), image(1))
    whole = Path(path).read_bytes()
    for at in range(0, len(whole), 7):
        with open(path, "wb") as file:
            file.write(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            state = read(folder)
        except JournalError:
            continue
        assert state.num_done < 2
        assert all(state.sha256(k) == f"{k:064x}" for k in range(8) if state.is_done(k))


def test_a_journal_of_another_job_is_an_error(folder):
    path = write(folder, image(0), fingerprint="other")
    with pytest.raises(JournalError, match=rf"{path}:1: the journal of another job"):
        read(folder)


def test_a_journal_of_another_format_is_an_error(folder):
    path = write(folder)
    header = {"kind": "journal", **JournalHeader("f", version=99).__dict__}
    spoil(path, lambda lines: [encode_line(header)])
    with pytest.raises(JournalError, match="journal format 99"):
        read(folder)


@pytest.mark.parametrize(
    "record",
    [image(8), {"kind": "image", "index": 1}, {"kind": "what"}, image(1, sha256="xx"), {"no": 1}],
)
def test_a_line_that_makes_no_sense_is_an_error(folder, record):
    path = write(folder, record)
    with pytest.raises(JournalError, match=rf"{path}:2: "):
        read(folder)


def test_a_missing_header_is_an_error(folder):
    path = write(folder, image(1), image(2))
    spoil(path, lambda lines: lines[1:])
    with pytest.raises(JournalError, match="header is missing"):
        read(folder)


def test_what_a_dead_process_had_in_flight(folder):
    def start(*indices):
        return {"kind": "start", "indices": list(indices)}

    write(folder, start(0, 1), image(0), failed(1), start(2, 3), rank=0)
    write(folder, start(4), image(4), {"kind": "end", "reason": "done"}, rank=1)
    died, ended = read(folder).attempts
    assert (died.in_flight, died.end) == ([[2, 3]], None)
    assert (ended.in_flight, ended.end) == ([], "done")


def test_deaths_are_told(folder):
    death = {"kind": "death", "indices": [3], "signal": 11}
    write(folder, death)
    assert [d["signal"] for d in read(folder).deaths] == [11]


def test_two_processes_never_write_one_file(folder):
    assert write(folder) != write(folder)
    assert len(read(folder).attempts) == 2


def test_nothing_is_appended_after_a_failed_write():
    platter = Platter()
    Files(FakeDisk(platter)).make_folder("/journal")
    disk = FakeDisk(platter)
    journal = JournalWriter(Files(disk), "/", JournalHeader("f"))
    journal.append([image(0)])
    disk.fault = Fault(disk.count, "short-full")
    with pytest.raises(StorageError, match="ENOSPC"):
        journal.append([image(1)])
    disk.fault = None  # there is room again, but the torn line must stay the last
    before = platter.read(journal.path)
    with pytest.raises(StorageError, match="cannot append"):
        journal.append([image(2)])
    assert platter.read(journal.path) == before
    assert read_journals(Files(FakeDisk(platter)), "/", ["f"], 8).is_done(0)


def test_a_page_that_a_power_failure_lost_costs_its_lines_and_no_others(folder):
    path = Path(write(folder, *map(image, range(6))))
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    third = sum(map(len, lines[:3]))
    for start, end in [
        (third + 5, third + 20),  # within a line
        (third + 20, third + len(lines[3]) + 20),  # over the end of a line
        (third, third + len(lines[3])),  # exactly a line, and what follows is taken for its rest
        (len(data) - 3, len(data)),
    ]:
        path.write_bytes(data[:start] + bytes(end - start) + data[end:])
        found = read(folder)
        done = [k for k in range(6) if found.is_done(k)]
        whole = [
            k for k, line in enumerate(lines[1:]) if line in path.read_bytes().splitlines(True)
        ]
        assert done == whole
        assert len(done) in (4, 5)


def test_a_damaged_line_without_zeros_is_still_refused(folder):
    path = Path(write(folder, *map(image, range(3))))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-9] + b"\n" + lines[2] + lines[3])
    with pytest.raises(JournalError, match=r":2: the journal is damaged"):
        read(folder)
