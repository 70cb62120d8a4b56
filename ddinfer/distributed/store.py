"""Where ranks find one another: the store of a job, on loopback wherever one machine is enough."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from ddinfer.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore


def open_store(world: World, timeout_seconds: float) -> Store:
    """The launcher's store; without one, rank 0 hosts it where MASTER_ADDR says."""
    from torch.distributed import TCPStore

    host, _, digits = world.store_address.rpartition(":")
    port, timeout = int(digits), timedelta(seconds=timeout_seconds)
    if world.launcher_hosts_store or world.rank != 0:
        return TCPStore(host, port, is_master=False, timeout=timeout)
    if _is_loopback(host):  # torch's own server would listen on every address
        return loopback_store(port, timeout_seconds)
    return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout)


def loopback_store(port: int = 0, timeout_seconds: float = 300.0) -> TCPStore:
    """A store that listens on 127.0.0.1 and nowhere else; port 0 takes a free one.

    torch binds its own sockets to every address, also for ``tcp://127.0.0.1``.
    """
    from torch.distributed import TCPStore

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(1024)
    port = listener.getsockname()[1]
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
        master_listen_fd=listener.detach(),
    )


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


@contextlib.contextmanager
def on_loopback(world: World) -> Iterator[None]:
    """On one machine, ranks meet on the loopback interface alone, unless the user chose another."""
    interface = "lo" if os.path.isdir("/sys/class/net/lo") else "lo0"
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if world.num_nodes == 1 else ()
    chosen = [name for name in names if name not in os.environ]
    os.environ.update(dict.fromkeys(chosen, interface))
    try:
        yield
    finally:
        for name in chosen:
            os.environ.pop(name, None)
