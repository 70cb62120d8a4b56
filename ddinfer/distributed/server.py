"""The process that ranks are forked from, as seen by the launcher that starts it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Pipe

from ddinfer.distributed.rank_server import BOOTSTRAP, FDS_AT_ONCE, Start, serve

#: What torchrun sets for its ranks. A nested launch must not hand it on: with
#: ``TORCHELASTIC_USE_AGENT_STORE`` left in, nobody would host the new store.
TORCHRUN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")
TORCHRUN_NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

#: Forking after large imports is Linux's strength; elsewhere it is not safe.
FORKS = sys.platform == "linux"


class RankServer:
    """Imports what all ranks of a launch need, from the moment it is made; forks them when told.

    So a program that will `launch` can let the seconds of importing begin before it knows how many
    ranks there will be. Used once. It ends with this process, however that ends.

    Args:
        preload: modules. Where importing them opens a GPU, ranks are started anew, and slower.
    """

    def __init__(self, preload: Sequence[str] = ("torch", "torch.distributed")):
        self.control, theirs = Pipe()
        self.process = subprocess.Popen(
            _command(theirs.fileno(), preload),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()

    def set_environment(self, environment: Mapping[str, str]) -> None:
        """Must come once, before `start`: torch's libraries read some of it when they are loaded,
        so the server waits for it before it imports torch."""
        with contextlib.suppress(ConnectionError):  # it is gone: found by who waits for it
            self.control.send_bytes(pickle.dumps(dict(environment)))

    def start(self, start: Start, outcomes: Sequence[int]) -> None:
        """Fork the ranks.

        Args:
            outcomes: file descriptors, each the writing end of a rank's pipe to the launcher.
        """
        with contextlib.suppress(ConnectionError), socket.socket(fileno=self._dup()) as channel:
            self.control.send_bytes(pickle.dumps(start))
            for k in range(0, len(outcomes), FDS_AT_ONCE):
                socket.send_fds(channel, [b"\0"], outcomes[k : k + FDS_AT_ONCE])

    def kill(self) -> None:
        """End the server, its ranks and what they have started: it leads a session of its own."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Leave nothing of it behind; a second time does nothing."""
        self.kill()
        self.process.wait()
        self.control.close()

    def _dup(self) -> int:
        return os.dup(self.control.fileno())


def without_torchrun(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment as it was before a launcher made this process one of its ranks."""
    return {
        name: value
        for name, value in environ.items()
        if name not in TORCHRUN_NAMES and not name.startswith(TORCHRUN_PREFIXES)
    }


def _command(control: int, preload: Sequence[str]) -> list[str]:
    names = list(preload) if FORKS else []
    path = [os.path.abspath(p) if p else os.getcwd() for p in sys.path]
    code = BOOTSTRAP.format(path=path, function=serve.__name__, arguments=(control, names))
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", code]


def _environment() -> dict[str, str]:
    environ = without_torchrun(os.environ)
    # numpy's OpenBLAS is loaded before `set_environment`; who forks should have no threads of it.
    environ.setdefault("OMP_NUM_THREADS", "1")
    # gloo and NCCL read these once, when a group is made.
    loopback = "lo" if sys.platform == "linux" else "lo0"
    environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    return environ
