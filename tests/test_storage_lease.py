import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ddinfer.errors import StorageError
from ddinfer.storage import lease as lease_module
from ddinfer.storage.files import Disk, Files
from ddinfer.storage.lease import FolderInUse, Holder, Lease, is_held, read_holder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def out(tmp_path):
    return str(tmp_path)


def leave(out, run_id="", **changes):
    """What a process that died has left in the lock file."""
    holder = replace(Holder.of_this_process(run_id), machine="other", host="far", pid=7, beat=3)
    with open(f"{out}/lock", "w") as file:
        json.dump(asdict(replace(holder, **changes)), file)


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


def test_an_empty_or_torn_lock_is_nobodys(out):
    for content in ("", "\0" * 512, '{"machine": "m", "host": "torn'):
        with open(f"{out}/lock", "w") as file:
            file.write(content)
        Lease.acquire(Files(), out, sleep=never).release()


def test_the_heart_beats_and_notices_when_the_folder_was_taken(out, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    lease = Lease.acquire(Files(), out)
    while read_holder(Files(), out).beat < 3:
        lease.check()
    thief = Holder("m", "thief", 1)
    with lease._lock, open(f"{out}/lock", "r+b") as file:
        file.write(lease_module._encode(thief))
    lease._thread.join(60)
    for check in (lease.check, lease.confirm):
        with pytest.raises(StorageError, match=r"process 1 on thief has taken .*had expired"):
            check()
    lease.release()
    assert read_holder(Files(), out) == thief


def test_who_releases_a_lease_that_was_taken_leaves_the_new_holder_alone(out):
    lease = Lease.acquire(Files(), out)  # its next heartbeat is 10 s away
    thief = Holder("m", "thief", 1)
    with open(f"{out}/lock", "r+b") as file:
        file.write(lease_module._encode(thief))
    with pytest.raises(StorageError, match="process 1 on thief has taken"):
        lease.release()
    assert read_holder(Files(), out) == thief


@pytest.mark.parametrize("run_id", ["x" * 4000, "Läufe/№ 7 \U0001f600" * 40, "\udcff", "\0\n\"'"])
def test_run_ids_of_any_length_and_alphabet(out, monkeypatch, run_id):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr("socket.gethostname", lambda: "höst" * 60)
    with Lease.acquire(Files(), out, run_id) as lease:
        while read_holder(Files(), out).beat < 2:
            lease.check()
        assert is_held(Files(), out)
        assert (Path(out) / "lock").stat().st_size == 512
    leave(out, run_id)
    Lease.acquire(Files(), out, run_id, sleep=never).release()


def test_looking_whether_a_job_runs_never_keeps_one_from_starting(out):
    Lease.acquire(Files(), out).release()
    stop = threading.Event()

    def look():
        files = Files()
        while not stop.is_set():
            is_held(files, out)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            Lease.acquire(Files(), out).release()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_reader_who_may_not_write_sees_whether_a_job_runs(out, monkeypatch):
    """On NFS an exclusive flock needs a descriptor that is open for writing."""
    opened = []
    plain = Disk.open
    monkeypatch.setattr(
        Disk, "open", lambda self, path, flags: opened.append(flags) or plain(self, path, flags)
    )
    with Lease.acquire(Files(), out):
        opened.clear()
        assert is_held(Files(), out)
    assert opened == [os.O_RDONLY]
    assert not is_held(Files(), out)


# --- file systems without flock ----------------------------------------------------------------


class NoFlock(Disk):
    def lock(self, fd, exclusive):
        raise OSError(self.code, os.strerror(self.code))


@pytest.fixture(params=["ENOSYS", "ENOTSUP", "ENOLCK"])
def no_flock(request):
    disk = NoFlock()
    disk.code = getattr(errno, request.param)
    return Files(disk)


def test_without_flock_a_job_on_the_same_machine_is_refused_while_the_heart_beats(
    out, no_flock, monkeypatch
):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.01)
    with Lease.acquire(no_flock, out, sleep=Clock()) as lease:
        Lease.join(no_flock, out).release()
        told = []
        with pytest.raises(FolderInUse, match=rf"process {os.getpid()} on"):
            # A second of real time, in which the first job's heart beats.
            Lease.acquire(no_flock, out, sleep=lambda _: time.sleep(0.1), notify=told.append)
        assert "flock is missing here" in told[0]
        assert is_held(no_flock, out)
        lease.check()
    assert not is_held(no_flock, out)
    Lease.acquire(no_flock, out, sleep=Clock()).release()


def test_without_flock_a_dead_process_is_waited_for_as_long_as_a_heartbeat_lasts(out, no_flock):
    leave(out, machine=Holder.of_this_process().machine)
    clock = Clock()
    Lease.acquire(no_flock, out, sleep=clock).release()
    assert clock.seconds == 60 + lease_module.CONFIRM_SECONDS


def test_without_flock_one_of_two_jobs_that_start_together_gets_the_folder(out, no_flock):
    def meanwhile(seconds):
        leave(out, pid=8)  # the other one writes its name as well

    with pytest.raises(FolderInUse, match="process 8 on far"):
        Lease.acquire(no_flock, out, sleep=Clock(meanwhile))
    assert read_holder(no_flock, out).pid == 8, "it is left alone"
