import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddinfer.errors import StorageError
from ddinfer.storage import lease as lease_module
from ddinfer.storage.files import Files
from ddinfer.storage.lease import FolderInUse, Holder, Lease, read_holder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def out(tmp_path):
    return str(tmp_path)


def leave(out, **changes):
    """What a process that died has left in the lock file."""
    holder = {"machine": "other", "host": "far", "pid": 7, "run_id": "", "beat": 3, **changes}
    with open(f"{out}/lock", "w") as file:
        json.dump(holder, file)


class Clock:
    """Sleeps in no time; calls what else happens meanwhile."""

    def __init__(self, meanwhile=lambda seconds: None):
        self.seconds, self.meanwhile = 0.0, meanwhile

    def __call__(self, seconds):
        self.seconds += seconds
        self.meanwhile(self.seconds)


def never(seconds):
    raise AssertionError("waited")


def test_a_second_writer_is_refused_by_name_and_the_next_one_is_not(out):
    with (
        Lease.acquire(Files(), out),
        pytest.raises(FolderInUse, match=rf"process {os.getpid()} on .*choose another --output"),
    ):
        Lease.acquire(Files(), out, sleep=never)
    Lease.acquire(Files(), out, sleep=never).release()


def test_a_job_lives_as_long_as_any_of_its_ranks(out):
    first = Lease.acquire(Files(), out)
    second = Lease.join(Files(), out)
    first.release()
    with pytest.raises(FolderInUse):
        Lease.acquire(Files(), out, sleep=never)
    second.release()
    Lease.acquire(Files(), out, sleep=never).release()


def test_nobody_waits_for_a_dead_process_of_this_machine(out):
    code = (
        "import os, sys; from ddinfer.storage.files import Files\n"
        "from ddinfer.storage.lease import Lease\n"
        "Lease.acquire(Files(), sys.argv[1]); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, out], check=False, cwd=ROOT)
    assert done.returncode == -9
    assert read_holder(Files(), out).beat == 0
    Lease.acquire(Files(), out, sleep=never).release()


def test_another_machine_that_is_silent_for_a_minute_is_dead(out):
    leave(out)
    clock, told = Clock(), []
    Lease.acquire(Files(), out, sleep=clock, notify=told.append).release()
    assert clock.seconds == 60
    assert "process 7 on far" in told[0]


def test_another_machine_whose_heart_beats_is_alive(out):
    leave(out)
    clock = Clock(lambda seconds: leave(out, beat=4) if seconds > 10 else None)
    with pytest.raises(FolderInUse, match="process 7 on far"):
        Lease.acquire(Files(), out, sleep=clock)
    assert clock.seconds < 15


def test_another_machine_that_ends_in_order_is_not_waited_for(out):
    leave(out, beat=-1)
    Lease.acquire(Files(), out, sleep=never).release()
    leave(out)
    clock = Clock(lambda seconds: leave(out, beat=-1) if seconds > 10 else None)
    Lease.acquire(Files(), out, sleep=clock).release()
    assert clock.seconds < 15


def test_a_restart_of_the_same_run_takes_over_at_once(out):
    leave(out, run_id="run 1")
    Lease.acquire(Files(), out, "run 1", sleep=never).release()
    leave(out, run_id="run 1")
    clock = Clock()
    Lease.acquire(Files(), out, "run 2", sleep=clock).release()
    assert clock.seconds == 60


def test_a_restart_waits_for_the_last_processes_of_the_attempt_before(out):
    before = Lease.acquire(Files(), out, "run 1")
    clock = Clock(lambda seconds: before.release() if seconds > 2 else None)
    Lease.acquire(Files(), out, "run 1", sleep=clock).release()
    assert 2 < clock.seconds < 5


def test_an_empty_or_spoilt_lock_is_nobodys(out):
    for content in ("", "no", '{"machine": 1}'):
        with open(f"{out}/lock", "w") as file:
            file.write(content)
        Lease.acquire(Files(), out, sleep=never).release()


def test_the_heart_beats_and_notices_when_the_folder_was_taken(out, monkeypatch):
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.01)
    lease = Lease.acquire(Files(), out)
    while read_holder(Files(), out).beat < 3:
        lease.check()
    thief = Holder("m", "thief", 1)
    fd = lease._files.open_in_place(f"{out}/lock")
    with lease._lock:
        lease._files.write_at_start(fd, lease_module._encode(thief))
    lease._thread.join(60)
    with pytest.raises(StorageError, match="process 1 on thief has taken the output folder"):
        lease.check()
    lease._files.close(fd)
    lease.release()
    assert read_holder(Files(), out) == thief
