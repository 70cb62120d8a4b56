"""The process that a launch's ranks are forked from: it imports once what all of them need.

It knows no more than that: `launch` tells it what to import and what to run, and hears from it
which process is which rank and how each ended. It and its ranks are a session of their own: a
Ctrl-C in the terminal reaches the launcher alone, which passes it on once.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import process, spawn
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from ddinfer.distributed.preload import import_for_good
from ddinfer.distributed.process import end_with_parent, leave
from ddinfer.errors import EXIT_BUG, ErrorRecord, RankError, exit_code_of

#: Runs in a bare interpreter whose first import must be ours: nothing from the current folder.
BOOTSTRAP = (
    "import sys; sys.path[:] = {path!r}; "
    "from ddinfer.distributed.rank_server import {function}; {function}{arguments!r}"
)

#: With 1, torch counts GPUs without CUDA (`torch.cuda.is_available`, PyTorch's "poison fork").
_COUNT_BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"

#: File descriptors in one message; the kernel takes at most 253.
FDS_AT_ONCE = 64


@dataclass(frozen=True)
class Start:
    """What to run.

    Attributes:
        payload: pickled ``(fn, args)``.
        before_fork: empty, or a pickled function that imports what only this launch needs.
        main: how the launcher's ``__main__`` is imported again, where ``fn`` comes from it.
        device: ``cpu`` where no rank will use a GPU.
        environments: what each rank adds to the environment.
    """

    payload: bytes
    before_fork: bytes
    main: Mapping[str, str]
    argv: Sequence[str]
    device: str
    gpus_per_rank: int
    num_threads: int
    environments: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Outcome:
    """How ``fn`` ended on a rank.

    Attributes:
        error: what it raised.
        exit_code: that the command line would end with.
        blamed: the `RankError` it raised, which tells of another rank's failure.
    """

    value: Any = None
    error: ErrorRecord | None = None
    exit_code: int = 0
    blamed: RankError | None = None


def serve(control: int, modules: Sequence[str]) -> None:
    """The server's whole life.

    Args:
        control: file descriptor of its connection with the launcher.
        modules: what to import before it is told more.
    """
    end_with_parent()
    launcher = Connection(control)
    with _counting_gpus_without_cuda():
        import_for_good(modules, before_torch=lambda: os.environ.update(_hear(launcher)))
        start: Start = _hear(launcher)
        outcomes = _hear_files(launcher, len(start.environments))
        if start.before_fork:
            import_for_good((), partial(_call, start.before_fork))
    anew = start.device != "cpu" and _a_fork_has_lost_cuda()
    if anew:
        sys.stderr.write(
            "ddinfer: note: what is imported before ranks are forked has opened CUDA "
            f"({', '.join(modules)}; is NVML missing?), and no forked process could use a GPU: "
            "every rank imports for itself, which takes some seconds more\n"
        )
    ranks: dict[int, int] = {}
    wake, signalled = _pipe()
    signal.set_wakeup_fd(signalled)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(len(start.environments)):
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            mine = outcomes.pop(rank)
            if anew:
                _become_rank_anew(rank, start, me, mine)
            _be_rank(rank, start, me, mine, (launcher.fileno(), wake, signalled, *outcomes))
        ranks[pid] = rank
        launcher.send_bytes(pickle.dumps(("started", rank, pid)))
    for fd in outcomes:
        os.close(fd)
    events = selectors.PollSelector()
    events.register(wake, selectors.EVENT_READ)
    events.register(launcher, selectors.EVENT_READ)
    while ranks:
        for pid, exitcode in _ended():
            launcher.send_bytes(pickle.dumps(("ended", ranks.pop(pid), exitcode)))
        if not ranks:
            break
        if any(key.fd == launcher.fileno() for key, _ in events.select()):
            # It never speaks again: it is gone.
            os.killpg(0, signal.SIGKILL)
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)
    leave(0)


def _hear(launcher: Connection) -> Any:
    try:
        return pickle.loads(launcher.recv_bytes())
    except EOFError:
        os._exit(0)


def _hear_files(launcher: Connection, number: int) -> list[int]:
    """File descriptors that follow a message, `FDS_AT_ONCE` with each byte."""
    found: list[int] = []
    with socket.socket(fileno=os.dup(launcher.fileno())) as channel:
        while len(found) < number:
            byte, fds, _, _ = socket.recv_fds(channel, 1, FDS_AT_ONCE)
            if not byte:
                os._exit(0)
            found += fds
    for fd in found:
        os.set_inheritable(fd, False)
    return found


def _call(pickled: bytes) -> None:
    pickle.loads(pickled)()


def _ended() -> list[tuple[int, int]]:
    """(pid, exit code) of children that have ended; negative for a signal."""
    found: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append((pid, os.waitstatus_to_exitcode(status)))


def _pipe() -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    return ends


@contextlib.contextmanager
def _counting_gpus_without_cuda() -> Iterator[None]:
    """Inside, looking for GPUs, as ``import diffusers`` does, leaves them to forked processes.

    That needs NVML. Where it is missing torch asks CUDA all the same.
    """
    if _COUNT_BY_NVML in os.environ:
        yield
        return
    os.environ[_COUNT_BY_NVML] = "1"
    try:
        yield
    finally:
        del os.environ[_COUNT_BY_NVML]


def _a_fork_has_lost_cuda() -> bool:
    """Whether a forked process could not use a GPU, since this one has opened CUDA."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    pid = os.fork()
    if pid == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(pid, 0)[1] != 0


def _become_rank_anew(rank: int, start: Start, server: int, outcome: int) -> NoReturn:
    """Go on as the same process in a new interpreter, where nothing has been imported."""
    said = os.memfd_create("ddinfer-rank", 0)
    with os.fdopen(said, "wb", closefd=False) as file:
        pickle.dump((rank, start, server, outcome), file)
    os.lseek(said, 0, os.SEEK_SET)
    os.set_inheritable(outcome, True)  # all other files close
    code = BOOTSTRAP.format(path=sys.path, function=be_rank_anew.__name__, arguments=(said,))
    os.execv(sys.executable, [*sys.orig_argv[:-1], code])


def be_rank_anew(said: int) -> None:
    with os.fdopen(said, "rb") as file:
        rank, start, server, outcome = pickle.load(file)
    os.set_inheritable(outcome, False)
    _be_rank(rank, start, server, outcome, ())


def _be_rank(rank: int, start: Start, server: int, outcome: int, close: Sequence[int]) -> None:
    """A rank's whole life.

    Args:
        server: its process id.
        outcome: where to write how it went.
        close: file descriptors of others.
    """
    exit_code = EXIT_BUG
    try:
        end_with_parent(server)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd in close:
            os.close(fd)
        os.environ.update(start.environments[rank])
        process.current_process().name = f"rank-{rank}"
        threading.current_thread().name = f"rank-{rank}"
        data = _pickled(_run(rank, start))
        with os.fdopen(outcome, "wb") as pipe:
            pipe.write(len(data).to_bytes(8, "little") + data)
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = 130
    except BaseException:  # noqa: BLE001 - the launcher hears it by the exit code
        traceback.print_exc()
    finally:
        leave(exit_code)


def _run(rank: int, start: Start) -> Outcome:
    from ddinfer.distributed.world import World

    try:
        import torch

        torch.set_num_threads(start.num_threads)
        sys.argv[:] = start.argv
        _import_main(start.main)
        fn, args = pickle.loads(start.payload)
        world = World.detect(start.device, gpus_per_rank=start.gpus_per_rank)
        return Outcome(fn(world, *args))
    except RankError as error:
        if error.rank == rank:
            return Outcome(error=ErrorRecord.of(error), exit_code=error.exit_code)
        return Outcome(exit_code=error.exit_code, blamed=error)
    except BaseException as error:  # noqa: BLE001 - told to the launcher, which raises it
        return Outcome(error=ErrorRecord.of(error), exit_code=exit_code_of(error))


def _import_main(main: Mapping[str, str]) -> None:
    """Import the launcher's script as ``__mp_main__``, as multiprocessing does."""
    if not main:
        return
    # So that a script without `if __name__ == "__main__"` is told, instead of starting ranks.
    setattr(process.current_process(), "_inheriting", True)  # noqa: B010 - no public name
    try:
        spawn.prepare(dict(main))
    finally:
        delattr(process.current_process(), "_inheriting")


def _pickled(outcome: Outcome) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception as error:  # noqa: BLE001 - whatever pickle meets in the value
        kind = type(outcome.value).__name__
        problem = TypeError(f"a rank must return what can be pickled, not this {kind}: {error}")
        return pickle.dumps(Outcome(error=ErrorRecord.of(problem), exit_code=EXIT_BUG))
