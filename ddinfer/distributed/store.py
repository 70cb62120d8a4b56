"""Where ranks find one another: the store of a job, on loopback wherever one machine is enough."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from ddinfer.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore


#: Key of an address of some machine other than that of MASTER_ADDR.
_ADDRESS = "address"

#: The ioctl of Linux that asks for an interface's IPv4 address (netdevice(7)).
_SIOCGIFADDR = 0x8915


def open_store(world: World, timeout_seconds: float) -> Store:
    """The launcher's store; without one, rank 0 hosts it at MASTER_ADDR. Every rank calls this.

    Rank 0 listens on loopback only where all ranks are on its machine. With several machines its
    name may resolve to loopback, too (127.0.1.1 on Debian and Ubuntu), where none could connect.
    """
    from torch.distributed import TCPStore

    host, _, digits = world.store_address.rpartition(":")
    port, timeout = int(digits), timedelta(seconds=timeout_seconds)
    if world.launcher_hosts_store or world.rank != 0:
        return TCPStore(host, port, is_master=False, timeout=timeout)
    if world.num_nodes == 1 and is_loopback(host):  # torch's server would listen on every address
        return loopback_store(port, timeout_seconds, host=host)
    return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout)


def loopback_store(
    port: int = 0, timeout_seconds: float = 300.0, *, host: str = "127.0.0.1"
) -> TCPStore:
    """A store that listens on one loopback address and nowhere else; port 0 takes a free one.

    torch binds its own sockets to every address, also for ``tcp://127.0.0.1``.
    """
    from torch.distributed import TCPStore

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(1024)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
        master_listen_fd=listener.detach(),
    )


def is_loopback(host: str, unresolved: bool = False) -> bool:
    """Whether a name resolves to loopback on this machine; ``unresolved`` if it does not resolve.

    Another machine may resolve it otherwise.
    """
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return unresolved


def announce_address(world: World, store: Store) -> None:
    """Write to the store by which address another machine reaches this one. Every rank calls this.

    It is the one from which this machine connects to MASTER_ADDR, so that machine itself has none.
    """
    host, _, port = world.store_address.rpartition(":")
    address = _own_address(host, int(port))
    if address is not None:
        store.set(_ADDRESS, address)


def loopback_interfaces() -> dict[str, str]:
    """What gloo and NCCL read when a group is created."""
    interface = "lo" if sys.platform == "linux" else "lo0"
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


@contextlib.contextmanager
def network_interface(world: World, store: Store) -> Iterator[None]:
    """Choose where gloo and NCCL listen, unless the environment has. After `announce_address`.

    On one machine they listen on loopback. On several gloo listens where the machine's own name
    resolves to; where that is loopback, it is given the interface that reaches the other machines.
    """
    chosen: Mapping[str, str | None] = {}
    if world.num_nodes == 1:
        chosen = loopback_interfaces()
    elif is_loopback(socket.gethostname(), unresolved=True):  # gloo's way
        host, _, port = world.store_address.rpartition(":")
        address = _own_address(host, int(port))
        if address is None and store.check([_ADDRESS]):  # MASTER_ADDR is this machine
            address = _own_address(store.get(_ADDRESS).decode(), int(port))
        chosen = {"GLOO_SOCKET_IFNAME": _interface_of(address)}
    names = {k: v for k, v in chosen.items() if v is not None and k not in os.environ}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def _own_address(host: str, port: int) -> str | None:
    """The address from which this machine reaches ``host``; ``None`` where that is loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))  # sends nothing
        except OSError:  # an IPv6 name, or no route
            return None
        address = probe.getsockname()[0]
    return None if address.startswith("127.") else address


def _interface_of(address: str | None) -> str | None:
    """The name of the interface that has an IPv4 address."""
    if address is None or not sys.platform.startswith("linux"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
