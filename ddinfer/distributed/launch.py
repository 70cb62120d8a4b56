"""Starting ranks on this machine, or joining those that an outer launcher has started."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, Literal

from ddinfer.distributed.devices import Gpus, openmp_environment, resolve_num_threads
from ddinfer.distributed.preload import SETUP, restore_environment
from ddinfer.distributed.process import import_once
from ddinfer.distributed.rank import RankTask
from ddinfer.distributed.store import loopback_interfaces, loopback_store
from ddinfer.distributed.supervise import CudaLost, Supervisor
from ddinfer.distributed.world import from_environment, parse_device, pick_device
from ddinfer.errors import UsageError

StartMethod = Literal["auto", "forkserver", "spawn"]


@dataclass(frozen=True)
class LaunchPlan:
    """How the ranks of this command are started.

    Attributes:
        kind: "join": this process is a rank already, of an outer launcher or the only one;
            "start": it starts ``num_ranks`` of them.
        num_ranks: of the whole job for "join", on this machine for "start".
        note: one sentence for the user, or empty.
    """

    kind: Literal["join", "start"]
    num_ranks: int
    note: str = ""


def plan_launch(
    nproc_per_node: str | int | None,
    device: str = "auto",
    environ: Mapping[str, str] | None = None,
    *,
    gpus_per_rank: int = 1,
    gpus: Gpus | None = None,
) -> LaunchPlan:
    """Decide from the option and from the environment whether to join or to start ranks.

    ``torchrun script --nproc_per_node=2`` passes the option to the script, inside a world of one:
    there the script's number wins. A launcher of several ranks is joined.

    Args:
        nproc_per_node: a number, ``auto``, ``gpu`` or ``cpu``; default: every GPU, else one rank.

    Raises:
        UsageError: two numbers that differ, fewer GPUs than ranks need, an incomplete
            environment, a GPU that this torch cannot use.
    """
    environ = os.environ if environ is None else environ
    outer = from_environment(environ)
    gpus = Gpus() if device == "cpu" else Gpus.probe(environ) if gpus is None else gpus
    wanted = count_ranks(nproc_per_node, gpus)
    if outer.is_launched and (outer.world_size > 1 or outer.num_nodes > 1):
        if wanted is not None and wanted != outer.local_world_size:
            plural = "s" * (outer.local_world_size > 1)
            raise UsageError(
                "two launchers want different numbers of ranks: torchrun started "
                f"{outer.local_world_size} rank{plural} on this machine ({outer.world_size} in "
                f"all), ddinfer was given --nproc_per_node={wanted}; give the number once, before "
                "the script"
            )
        return LaunchPlan("join", outer.world_size)
    num_ranks, note = wanted or default_ranks(device, gpus, gpus_per_rank), ""
    if outer.is_launched and wanted is None and num_ranks > 1:
        idle = gpus.usable - gpus_per_rank
        note = (
            f"torchrun started one rank and this machine has {gpus.usable} GPUs, so that {idle} "
            f"{'is' if idle == 1 else 'are'} idle; --nproc_per_node={num_ranks} uses all"
        )
        num_ranks = 1
    pick_device(device, 0, num_ranks, gpus_per_rank, environ, gpus)
    return LaunchPlan("join" if outer.is_launched and num_ranks == 1 else "start", num_ranks, note)


def count_ranks(nproc_per_node: str | int | None, gpus: Gpus) -> int | None:
    """The number that ``--nproc_per_node`` stands for on this machine; ``None`` if not given."""
    if nproc_per_node is None:
        return None
    text = str(nproc_per_node).strip()
    if text.isdigit() and int(text) > 0:
        return int(text)
    if text == "gpu":
        if not gpus.usable:
            raise UsageError(
                gpus.why_unusable()
                or "--nproc_per_node=gpu: this machine shows no GPU; use a number, auto or cpu"
            )
        return gpus.usable
    if text == "cpu" or (text == "auto" and not gpus.usable):
        return os.cpu_count() or 1
    if text == "auto":
        return gpus.usable
    raise UsageError(f"--nproc_per_node={text} must be a number from 1, auto, gpu or cpu")


def default_ranks(device: str, gpus: Gpus, gpus_per_rank: int = 1) -> int:
    """A rank for every GPU (or set of GPUs), else one."""
    kind, index = parse_device(device)
    if kind == "cpu" or index is not None or not gpus.usable:
        return 1
    return max(1, gpus.usable // gpus_per_rank)


def launch(
    fn: Callable[..., Any],
    *args: Any,
    nproc_per_node: str | int | None = None,
    device: str = "auto",
    gpus_per_rank: int = 1,
    num_threads: int | None = None,
    start_method: StartMethod = "auto",
    preload: Sequence[str] = ("torch", "torch.distributed"),
    before_fork: Callable[[], object] | None = None,
    on_failure: Literal["terminate", "finish"] = "terminate",
    grace_seconds: float = 30.0,
    handle_signals: bool = False,
    on_death: Callable[[int, int], object] = lambda rank, number: None,
    run_id: str | None = None,
    restart_count: int = 0,
) -> list[Any]:
    """Run ``fn(world, *args)`` in one new process for each rank; returns in rank order.

    Ranks see the environment that torchrun would give them, so a plain
    ``torch.distributed.init_process_group()`` works inside ``fn``. On Linux they are forked from
    multiprocessing's forkserver, which imports ``preload`` once for all of them and for later
    launches. Their store is hosted here, on loopback. When this process ends, so do they. Their
    standard input is empty. A rank that returns ends at once, with all processes it has started;
    exit handlers do not run.

    Args:
        fn: a function at the top level of a module.
        args: pickled to every rank.
        nproc_per_node: as on the command line; default: every GPU, else one rank.
        num_threads: CPU threads of each rank; default: ``OMP_NUM_THREADS``, else cores / ranks.
        start_method: "forkserver", "spawn" (each rank is a new interpreter that imports for
            itself), or "auto": forkserver on Linux; spawn elsewhere, and where importing
            ``preload`` has initialized CUDA, which no forked process can use then.
        preload: modules. A forkserver that this program has started before keeps its own.
        before_fork: called once where ``preload`` was imported, to import more that depends on
            the job; picklable. It opens no GPU, connection or thread. What it raises is ignored:
            it is raised again on the ranks. Not called for spawned ranks.
        on_failure: "terminate" ends the other ranks soon after the first failure; "finish" lets
            them do their own share first.
        grace_seconds: how long ranks may take after Ctrl-C or SIGTERM, which they receive too.
        handle_signals: SIGTERM, SIGHUP and Ctrl-C are passed on to the ranks, and their values are
            returned if all of them still return. Main thread only. Without it, no handler is
            installed, and ``KeyboardInterrupt`` ends the ranks.
        on_death: called with (rank, signal) when a signal that was not sent here killed a rank.
        run_id, restart_count: mark this launch as continuing an earlier one.

    Raises:
        RankError: a rank raised, was killed, or ended before ``fn`` returned: the first of them.
        UsageError: more ranks than GPUs, or an ``fn`` that cannot be imported.
        Interrupted: SIGTERM or SIGHUP ended the ranks (only with ``handle_signals``).
    """
    payload = _pickled(fn, args)
    gpus = Gpus() if device == "cpu" else Gpus.probe()
    num_ranks = count_ranks(nproc_per_node, gpus) or default_ranks(device, gpus, gpus_per_rank)
    if pick_device(device, 0, num_ranks, gpus_per_rank, gpus=gpus) == "cpu":
        device = "cpu"
    num_threads = resolve_num_threads(num_threads, num_ranks)
    openmp = openmp_environment(num_threads, num_ranks)
    run_id = uuid.uuid4().hex if run_id is None else run_id
    forkserver = multiprocessing.get_context("forkserver")

    def start_by(context: ForkServerContext | SpawnContext) -> list[Any]:
        supervisor = Supervisor(on_failure, grace_seconds, on_death)
        with supervisor.handling_signals(handle_signals), supervisor.ending_all():
            if context is forkserver:
                start_forkserver(preload, before_fork, openmp)
            import_once(("torch.distributed",))  # while the forkserver does the same
            from torch.distributed import PrefixStore

            store = loopback_store()
            environment = {**os.environ, **loopback_interfaces(), **openmp}
            tasks = [
                RankTask(
                    rank,
                    environment
                    | rank_environment(rank, num_ranks, store.port, run_id, restart_count),
                    payload,
                    device,
                    gpus_per_rank,
                    num_threads,
                )
                for rank in range(num_ranks)
            ]
            supervisor.watch_through(
                PrefixStore(f"ddinfer/{run_id}/{restart_count}/{num_ranks}", store)
            )
            with _environment_of_children(openmp):
                supervisor.start(context, tasks)
            return supervisor.wait()

    if start_method == "forkserver":
        return start_by(forkserver)
    if start_method == "auto" and sys.platform == "linux":
        try:
            return start_by(forkserver)
        except CudaLost:
            sys.stderr.write(
                "ddinfer: note: importing what all ranks need has opened CUDA "
                f"({', '.join(preload)}; is NVML missing?), and no process forked afterwards could "
                "use a GPU: each rank is spawned and imports for itself, which takes some seconds\n"
            )
    return start_by(multiprocessing.get_context("spawn"))


def start_forkserver(
    preload: Sequence[str],
    before_fork: Callable[[], object] | None,
    variables: Mapping[str, str],
) -> None:
    """Start multiprocessing's forkserver, which then imports; does nothing if it is running.

    Args:
        variables: what its environment has in addition, such as OpenMP reads on import.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        [restore_environment.__module__]
    )
    pickled = b"" if before_fork is None else pickle.dumps(before_fork)
    with _environment_of_children(variables, list(preload), pickled):
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def _environment_of_children(variables: Mapping[str, str], *setup: Any) -> Iterator[None]:
    """Inside, processes that multiprocessing starts import from where this one does.

    Python 3.11's forkserver does not receive ``sys.path``. A new interpreter would look into the
    current directory first.

    Args:
        setup: what `preload.prepare_server` is to import; nothing for other processes.
    """
    path = [os.path.abspath(p) if p else os.getcwd() for p in sys.path if os.pathsep not in p]
    changes = {
        **variables,
        "OPENBLAS_NUM_THREADS": "1",  # a process that forks should have no threads
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONSAFEPATH": "1",
    }
    before = {name: os.environ.get(name) for name in changes}
    if setup:
        changes[SETUP] = pickle.dumps((os.getpid(), before, *setup)).hex()
    os.environ.update(changes)
    try:
        yield
    except RuntimeError as error:
        if "bootstrapping" not in str(error):
            raise
        raise UsageError(
            "launch() is called while the script is imported by a rank that launch() started; "
            "put the call under  if __name__ == '__main__':"
        ) from error
    finally:
        restore_environment({**before, SETUP: None})


def rank_environment(
    rank: int, num_ranks: int, port: int, run_id: str, restart_count: int = 0
) -> dict[str, str]:
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
        "TORCHELASTIC_RESTART_COUNT": str(restart_count),
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _pickled(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        payload = pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"launch() runs its function in other processes, so {fn!r} must stand at the top "
            f"level of a module and its arguments must be picklable: {error}"
        ) from error
    main = sys.modules["__main__"]
    if b"__main__" in payload and not (main.__spec__ or getattr(main, "__file__", None)):
        raise UsageError(
            "launch() cannot run a function that was typed into an interpreter or notebook; put "
            "it into a module of its own and import it"
        )
    return payload
