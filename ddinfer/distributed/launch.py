"""Starting ranks on this machine, hearing how they end, and never leaving one behind."""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ddinfer.distributed.board import Board, Failure
from ddinfer.distributed.gpus import Gpus
from ddinfer.distributed.gpus import resolve_num_threads as resolve_num_threads
from ddinfer.distributed.world import World, pick_device
from ddinfer.errors import EXIT_BUG, EXIT_INTERRUPTED, ErrorRecord, RankError, UsageError

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

#: Seconds that the ranks beside a failed one get to hear of it and end by themselves.
FAILURE_GRACE_SECONDS = 5.0
#: Seconds between SIGTERM and SIGKILL.
TERMINATE_SECONDS = 5.0


@dataclass(frozen=True)
class LaunchPlan:
    """How the ranks of this command come to be.

    Attributes:
        kind: "join": this process is a rank already; "spawn": it starts ``num_ranks`` of them.
        note: one sentence for the user, or empty.
    """

    kind: Literal["join", "spawn"]
    num_ranks: int
    note: str = ""


def plan_launch(
    nproc_per_node: str | int | None, device: str, environ: Mapping[str, str]
) -> LaunchPlan:
    """Decide who starts the ranks, from the option and from what an outer launcher has set.

    Args:
        nproc_per_node: a number, or as torchrun spells it ``auto``, ``gpu`` or ``cpu``;
            default: every GPU, else one rank.

    Raises:
        UsageError: two launchers that want different numbers, more ranks than GPUs, or a word
            that is none of these.
    """
    wanted = _count(nproc_per_node, device)
    outer = environ.get("WORLD_SIZE") if environ.get("RANK") is not None else None
    if outer is None:
        ranks = wanted if wanted is not None else max(1, _usable_gpus(device))
        pick_device(device, 0, ranks)  # more ranks than GPUs is found here, before any starts
        return LaunchPlan("spawn", ranks)
    local = int(environ.get("LOCAL_WORLD_SIZE", outer))
    if int(outer) == 1 and int(environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        if wanted is not None and wanted > 1:
            pick_device(device, 0, wanted)
            return LaunchPlan("spawn", wanted)
        idle = _usable_gpus(device) - 1
        note = (
            f"one rank, {idle} idle GPUs; --nproc_per_node={idle + 1} uses all" if idle > 0 else ""
        )
        return LaunchPlan("join", 1, note if wanted is None else "")
    if wanted is not None and wanted != local:
        raise UsageError(
            f"--nproc_per_node={local} was given to torchrun and --nproc_per_node={wanted} to "
            "ddinfer; give it once"
        )
    return LaunchPlan("join", int(outer))


def _count(nproc_per_node: str | int | None, device: str) -> int | None:
    if nproc_per_node is None:
        return None
    text = str(nproc_per_node)
    if text.isdigit() and int(text) > 0:
        return int(text)
    if text == "cpu":
        return os.cpu_count() or 1
    if text == "gpu":
        return _usable_gpus("cuda")
    if text == "auto":
        return _usable_gpus(device) or os.cpu_count() or 1
    raise UsageError(f"--nproc_per_node={text} must be a number from 1, auto, gpu or cpu")


def _usable_gpus(device: str) -> int:
    return 0 if device == "cpu" else Gpus.probe().usable


def launch(
    fn: Callable[..., Any],
    *args: Any,
    nproc_per_node: str | int | None = None,
    device: str = "auto",
    num_threads: int | None = None,
    preload: Sequence[str] = ("torch", "torch.distributed"),
    on_failure: Literal["terminate", "finish"] = "terminate",
) -> list[Any]:
    """Run ``fn(world, *args)`` in one new process for each rank; returns in rank order.

    The ranks see the environment that torchrun would give them, so `World.detect`,
    `process_group` and a plain ``torch.distributed.init_process_group()`` work inside ``fn``. They
    are forked from a server that has imported ``preload`` once for all of them. Their store is
    hosted here, on loopback, and outlives any of them. When this process dies, so do they.

    Args:
        fn: importable in another process.
        nproc_per_node: as on the command line; default: every GPU, else one.
        num_threads: CPU threads of each rank; default: ``OMP_NUM_THREADS``, else cores / ranks.
        on_failure: "terminate" ends the other ranks soon after the first failure; "finish" lets
            them end by themselves.

    Raises:
        RankError: a rank raised, was killed, or ended before ``fn`` returned: the first of them.
        UsageError: more ranks than GPUs.
    """
    num_ranks = _count(nproc_per_node, device) or max(1, _usable_gpus(device))
    pick_device(device, 0, num_ranks)
    from ddinfer.distributed.process_group import loopback_store  # imports torch

    store = loopback_store()
    run_id = uuid.uuid4().hex
    threads = resolve_num_threads(num_threads, num_ranks)
    context = _forkserver(preload, threads)
    ranks = []
    for rank in range(num_ranks):
        environment = _rank_environment(rank, num_ranks, store.port, run_id)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main,
            args=(sender, environment, device, threads, fn, args),
            name=f"ddinfer-rank-{rank}",
        )
        process.start()
        sender.close()
        ranks.append(_Rank(rank, process, receiver))
    from torch.distributed import PrefixStore

    watch = _Watch(
        ranks, PrefixStore("board", PrefixStore(f"ddinfer/{run_id}/0", store)), on_failure
    )
    try:
        watch.wait()
    finally:
        _end([r.process for r in ranks])
    if watch.failure is not None:
        raise watch.failure
    return [r.value for r in ranks]


@dataclass
class _Rank:
    number: int
    process: Any  # multiprocessing.Process of the forkserver context
    receiver: multiprocessing.connection.Connection
    answered: bool = False
    value: Any = None

    def read(self) -> BaseException | None:
        """Take the rank's answer from its pipe; returns the exception if it was one."""
        try:
            kind, self.value = pickle.loads(self.receiver.recv_bytes())
        except EOFError:
            return None
        self.answered = True
        return self.value if kind == "error" else None


class _Watch:
    """Waits until every rank has ended, and finds out which failed first."""

    def __init__(self, ranks: list[_Rank], store: Any, on_failure: str):
        self.ranks, self.store, self.on_failure = ranks, store, on_failure
        self.failure: RankError | None = None
        self._deadline: float | None = None

    def wait(self) -> None:
        waiting = {r.process.sentinel: r for r in self.ranks}
        pipes = {r.receiver: r for r in self.ranks}
        while waiting:
            left = None if self._deadline is None else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            ready = multiprocessing.connection.wait([*pipes, *waiting], timeout=left)
            for item in ready:
                if item in pipes:
                    self._hear(pipes.pop(item))
            for item in ready:
                if item in waiting:
                    self._ended(waiting.pop(item), pipes)

    def _hear(self, rank: _Rank) -> None:
        error = rank.read()
        if error is not None:
            self._fail(error if isinstance(error, RankError) else None, rank)

    def _ended(self, rank: _Rank, pipes: dict[Any, _Rank]) -> None:
        if rank.receiver in pipes and rank.receiver.poll():
            self._hear(pipes.pop(rank.receiver))
        rank.process.join()
        if not rank.answered:
            self._fail(None, rank)

    def _fail(self, error: RankError | None, rank: _Rank) -> None:
        board = Board(self.store, [r.number for r in self.ranks])
        if error is None:
            phase = board.activity_of(rank.number) or "starting"
            failure = Failure(rank.number, phase, exitcode=rank.process.exitcode)
        else:
            failure = Failure.of(rank.number, error.phase, error)
        self.failure = self.failure or board.post_failure(failure).to_error()
        if self.on_failure == "terminate" and self._deadline is None:
            self._deadline = time.monotonic() + FAILURE_GRACE_SECONDS


def _end(processes: list[Any]) -> None:
    """Terminate what is still alive, kill what does not go, reap all."""
    alive = [p for p in processes if p.is_alive()]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + TERMINATE_SECONDS
    for process in alive:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _rank_environment(rank: int, num_ranks: int, port: int, run_id: str) -> dict[str, str]:
    """What torchrun would set for this rank, with the store hosted by the launcher."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(num_ranks),
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _forkserver(preload: Sequence[str], num_threads: int) -> Any:
    """A context whose processes are forked from one server that has imported ``preload``.

    The server is the interpreter's own: it starts with the first launch and stays for later ones.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    from multiprocessing import forkserver

    # Waiting OpenMP threads must sleep, not spin, where ranks share cores. Read at import only.
    openmp = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(num_threads)}
    with _environment_changed(openmp):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment_changed(changes: Mapping[str, str]) -> Iterator[None]:
    """Torchrun's variables taken out and ``changes`` put in, for what is started inside."""
    kept = dict(os.environ)
    for name in kept:
        if name in TORCHRUN_NAMES or name.startswith(TORCHRUN_PREFIXES):
            del os.environ[name]
    for name, value in changes.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _rank_main(
    sender: multiprocessing.connection.Connection,
    environment: Mapping[str, str],
    device: str,
    num_threads: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """A rank's whole life. Leaves without the interpreter's teardown, which takes a second."""
    _end_with_launcher()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(num_threads)
    try:
        answer = _pickled(("result", fn(World.detect(device), *args)))
    except RankError as error:
        answer = _pickled(("error", error))
    except BaseException as error:  # noqa: BLE001 - told to the launcher, which raises it
        answer = _pickled(("error", _as_rank_error(int(environment["RANK"]), error)))
    sender.send_bytes(answer)
    sender.close()
    leave(0)


def _as_rank_error(rank: int, error: BaseException) -> RankError:
    exit_code = getattr(error, "exit_code", EXIT_BUG)
    return RankError(rank, "running", ErrorRecord.of(error), exit_code=exit_code)


def _pickled(answer: tuple[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol=5).dump(answer)
    return buffer.getvalue()


def leave(exit_code: int) -> None:
    """End this process at once, with its output flushed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def _end_with_launcher() -> None:
    """End when the launcher does: its end of our sentinel pipe closes, whatever killed it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=watch, name="ddinfer-launcher-watch", daemon=True).start()


def end_with_parent() -> None:
    """End when the process that started this one does; for processes under torchrun.

    On Linux the kernel sends SIGKILL. Elsewhere a thread looks every half second.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0) == 0:
            if os.getppid() != parent:  # it died before we asked
                os._exit(EXIT_INTERRUPTED)
            return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=watch, name="ddinfer-parent-watch", daemon=True).start()
