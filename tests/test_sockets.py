"""Where the processes of a whole job listen: on loopback and nowhere else."""

import ipaddress
import os
from pathlib import Path

import pytest

from tests.jobs import STARTS, end, family, job, wait_until
from tests.moody_pipeline import moody_pipeline
from tests.test_cli import start

LISTENING = "0A"  # the kernel's number of that state


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


def listening_sockets():
    """Inode of a socket → the address and port, in hex, on which it listens."""
    rows = []
    for name in ("tcp", "tcp6"):
        lines = Path(f"/proc/net/{name}").read_text().splitlines()
        rows += [line.split() for line in lines[1:]]
    return {row[9]: row[1] for row in rows if row[3] == LISTENING}


def is_loopback(address):
    """Whether an address as the kernel prints it, in words of reversed bytes, is this machine."""
    words = bytes.fromhex(address.partition(":")[0])
    plain = b"".join(words[k : k + 4][::-1] for k in range(0, len(words), 4))
    found = ipaddress.ip_address(plain)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_addresses_are_read_as_the_kernel_prints_them():
    assert is_loopback("0100007F:1F90")
    assert is_loopback("00000000000000000000000001000000:1F90")
    assert is_loopback("0000000000000000FFFF00000100007F:1F90")
    assert not is_loopback("00000000:1F90")
    assert not is_loopback("00000000000000000000000000000000:1F90")
    assert not is_loopback("0000000000000000FFFF00000102A8C0:1F90")


def sockets_of(pid):
    """Inodes of the sockets that a process has open."""
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


@pytest.mark.parametrize("name", ["one process", "two ranks", "torchrun"])
def test_a_running_job_listens_on_loopback_alone(moody, tmp_path, name):
    gates = [tmp_path / "first", tmp_path / "second"]
    words = job(moody, tmp_path, [f"wait {gates[0]}", f"wait {gates[1]}"])
    process = start([*STARTS[name], *words])
    wait_until(process, (tmp_path / "first.waiting").exists)
    if name != "one process":
        wait_until(process, (tmp_path / "second.waiting").exists)
    members = family(process.pid)
    if name == "torchrun":  # its own store is its own affair
        members.remove(process.pid)
    # Beside the launcher and two ranks: the forkserver and multiprocessing's resource tracker.
    assert len(members) == {"one process": 1, "two ranks": 5, "torchrun": 2}[name]
    found = listening_sockets()
    addresses = [found[inode] for pid in members for inode in sockets_of(pid) if inode in found]
    for gate in gates:
        gate.touch()
    code, err = end(process)
    assert code == 0, err
    assert all(map(is_loopback, addresses)), addresses
    if name != "one process":  # which has nobody to listen to
        assert addresses, "the store and gloo listen somewhere"
