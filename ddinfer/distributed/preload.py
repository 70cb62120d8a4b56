"""Imported by multiprocessing's forkserver, for its effect: the process that forks the ranks.

`launch` sets the variable `SETUP` for the server alone; elsewhere this import does nothing. The
server leads a session of its own, so that Ctrl-C in the terminal reaches the launcher alone, ends
with the launcher, and does not react to signals that a service manager sends to every process.
Processes forked from it do.
"""

from __future__ import annotations

import os
import pickle
import signal

from ddinfer.distributed.process import end_with_parent, import_once

#: Holds the hexadecimal pickle of what `prepare_server` is called with.
SETUP = "_DDINFER_FORKSERVER"

#: With 1, torch counts GPUs without CUDA (`torch.cuda.is_available`, PyTorch's "poison fork").
COUNT_BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def prepare_server(
    launcher: int, variables: dict[str, str | None], modules: list[str], before_fork: bytes
) -> None:
    """Args:
    launcher: process id of the parent.
    variables: what the environment was before the server was started (``None``: not set).
    modules: to import.
    before_fork: pickled function that imports what depends on the job, or empty.
    """
    end_with_parent(launcher)
    os.setsid()
    _ignore_signals_here(signal.SIGTERM, signal.SIGHUP)
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    variables = {COUNT_BY_NVML: os.environ.get(COUNT_BY_NVML), **variables}
    os.environ.setdefault(COUNT_BY_NVML, "1")
    import_once(modules, (lambda: pickle.loads(before_fork)()) if before_fork else None)
    restore_environment(variables)
    signal.signal(signal.SIGINT, on_interrupt)  # multiprocessing ignores it from here on


def _ignore_signals_here(*numbers: signal.Signals) -> None:
    """Ignore signals in this process; one that is sent to a process forked from it is never lost.

    They are blocked during the fork, and so pending until the child has its handlers back.
    """
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        unblock()

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, numbers),
        after_in_parent=unblock,
        after_in_child=restore,
    )


def restore_environment(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


if SETUP in os.environ:
    prepare_server(*pickle.loads(bytes.fromhex(os.environ.pop(SETUP))))
