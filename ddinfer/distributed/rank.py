"""What runs in each process that `launch` starts: one rank, from its start to its exit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ddinfer.distributed.peers import rank_error
from ddinfer.distributed.process import end_with_parent, exit_now
from ddinfer.errors import EXIT_BUG, EXIT_INTERRUPTED, RankError


@dataclass(frozen=True)
class RankTask:
    """What one rank is to run.

    Attributes:
        environment: all of it.
        payload: pickled ``(fn, args)``.
        device: ``cpu`` where no rank uses a GPU.
    """

    rank: int
    environment: Mapping[str, str]
    payload: bytes
    device: str
    gpus_per_rank: int
    num_threads: int


@dataclass(frozen=True)
class Outcome:
    """How ``fn`` ended on a rank.

    Attributes:
        error: what it raised, which may be the failure of another rank.
        lost_cuda: it was not called: the process was forked after CUDA had been initialized.
    """

    value: Any = None
    error: RankError | None = None
    lost_cuda: bool = False


def run_rank(launcher: Connection, streams: Sequence[Connection]) -> None:
    """The target of each process: report as ready, receive a `RankTask`, send an `Outcome`.

    A launcher that ends in between closes the connection, and with it this process.

    Args:
        streams: standard output and error of the launcher.
    """
    exit_code = EXIT_BUG
    try:
        end_with_parent()
        threading.Thread(target=_end_with_launcher, name="ddinfer-launcher", daemon=True).start()
        with contextlib.suppress(PermissionError):  # it leads a session already
            os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, stream in enumerate(streams, start=1):
            os.dup2(stream.fileno(), fd)
        launcher.send_bytes(pickle.dumps(os.getppid()))
        task: RankTask = pickle.loads(launcher.recv_bytes())
        launcher.send_bytes(_pickled(_run(task), task.rank))
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = 130
    except (EOFError, ConnectionError):
        exit_code = EXIT_INTERRUPTED
    except BaseException:  # noqa: BLE001 - the launcher learns it by the exit code
        traceback.print_exc()
    finally:
        exit_now(exit_code)


def _end_with_launcher() -> None:
    """For a forkserver that another program started, which does not end with the launcher."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(EXIT_INTERRUPTED)


def _run(task: RankTask) -> Outcome:
    from ddinfer.distributed.world import World

    os.environ.clear()
    os.environ.update(task.environment)
    try:
        if task.device != "cpu" and _cuda_is_lost():
            return Outcome(lost_cuda=True)
        import torch

        torch.set_num_threads(task.num_threads)
        fn, args = pickle.loads(task.payload)
        world = World.detect(task.device, gpus_per_rank=task.gpus_per_rank)
        return Outcome(fn(world, *args))
    except BaseException as error:  # noqa: BLE001 - sent to the launcher, which raises it
        return Outcome(error=rank_error(task.rank, "", error))


def _cuda_is_lost() -> bool:
    """Whether this process cannot use a GPU since CUDA was initialized before it was forked."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    if hasattr(torch.cuda, "_is_in_bad_fork"):  # private, but it initializes nothing
        return torch.cuda._is_in_bad_fork()
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return "forked subprocess" in str(error)
    return False


def _pickled(outcome: Outcome, rank: int) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception as error:  # noqa: BLE001 - the value may raise anything
        kind = type(outcome.value).__name__
        problem = TypeError(f"a rank must return what can be pickled, not this {kind}: {error}")
        return pickle.dumps(Outcome(error=rank_error(rank, "", problem)))
