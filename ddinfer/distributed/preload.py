"""Imported by multiprocessing's forkserver, for its effect: the process that forks the ranks.

`launch` sets the variable `SETUP` for the server alone; elsewhere this import does nothing. The
server leads a session of its own, so that Ctrl-C in the terminal reaches the launcher alone, ends
with the launcher, and does not react to signals that a service manager sends to every process.
Processes forked from it do.
"""

from __future__ import annotations

import gc
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
    _block_signals_here(signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    variables = {COUNT_BY_NVML: os.environ.get(COUNT_BY_NVML), **variables}
    os.environ.setdefault(COUNT_BY_NVML, "1")
    import_once(modules, (lambda: pickle.loads(before_fork)()) if before_fork else None)
    gc.freeze()  # so that forked processes keep sharing what exists now
    restore_environment(variables)


def _block_signals_here(*numbers: signal.Signals) -> None:
    """Block signals in this process, but not in those forked from it; none of theirs is lost."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers))


def restore_environment(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


if SETUP in os.environ:
    prepare_server(*pickle.loads(bytes.fromhex(os.environ.pop(SETUP))))
