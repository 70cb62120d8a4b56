"""Signals to a process whose main thread cannot hear them; `test_stop_phases` has whole jobs."""

import signal
import sys
import time

import pytest

from ddinfer.distributed.process import COPY_SECONDS
from tests.jobs import end, wait_for_words
from tests.test_cli import start

CHILD = """
import ctypes, os, signal, time
import ddinfer.job.shutdown
from ddinfer.errors import Stopped
from ddinfer.job.shutdown import ShutdownRequest

ddinfer.job.shutdown.OVERDUE_SECONDS = 0.5
with ShutdownRequest({grace}, verbose=True).on_signals() as stop:
    {body}
"""

#: As if the signal came when the read had been called and had not begun: nothing interrupts it.
READS_UNINTERRUPTED = """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    os.write(1, b"ready")
    try:
        os.read(os.pipe()[0], 1)
    except Stopped as stopped:
        print(f": {stopped}", flush=True)
        raise SystemExit(stopped.exit_code)
"""

#: A second lock of the same mutex waits for ever, whatever signals come.
HANGS = """
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    os.write(1, b"ready")
    lock(mutex)
"""


def started(body, grace=0.2):
    process = start([sys.executable, "-c", CHILD.format(body=body.strip(), grace=grace)])
    assert process.stdout.read(5) == "ready", process.stderr.read()
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_read_that_the_signal_did_not_interrupt_is_given_up_after_the_grace(number, code):
    process = started(READS_UNINTERRUPTED)
    process.send_signal(number)
    wait_for_words(process, f"received {number.name}; finishing the current batch (up to 0.2 s)")
    assert end(process)[0] == code
    assert process.stdout.read() == (
        f": received {number.name}; run the same command again to resume\n"
    )


def test_a_main_thread_that_nothing_interrupts_does_not_keep_the_process():
    process = started(HANGS)
    process.send_signal(signal.SIGTERM)
    wait_for_words(process, "received SIGTERM; finishing the current batch")
    code, err = end(process)
    assert code == 75
    assert "run the same command again to resume" in err


def test_a_second_signal_ends_a_main_thread_that_nothing_interrupts():
    process = started(HANGS, grace=600)
    process.send_signal(signal.SIGINT)
    wait_for_words(process, "received SIGINT")
    process.send_signal(signal.SIGTERM)  # a copy of it, as launchers forward them
    time.sleep(COPY_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 130


def test_words_that_nobody_reads_do_not_stop_the_clock():
    process = started(f"os.write(2, b'.' * 65536)\n{READS_UNINTERRUPTED}")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75


def test_a_signal_to_a_forked_child_ends_the_child_alone():
    process = started("""
    born, birth = os.pipe()
    child = os.fork()
    if not child:
        os.write(birth, b".")
        time.sleep(600)
    os.read(born, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.3)  # longer than the grace
    assert not stop.is_requested
    os.write(1, b"ready")
    """)
    assert end(process) == (0, "")


def test_an_alarm_of_somebody_else_asks_for_nothing_and_spoils_nothing():
    process = started(f"os.kill(os.getpid(), signal.SIGALRM)\n{READS_UNINTERRUPTED}")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75
    assert process.stdout.read().startswith(": received SIGTERM")


def test_signals_are_as_before_afterwards():
    process = started("""
    pass
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
assert signal.set_wakeup_fd(-1) == -1
os.write(1, b"ready")
time.sleep(600)
""")
    process.send_signal(signal.SIGTERM)
    assert end(process) == (-signal.SIGTERM, "")
