"""Starting ranks on this machine, hearing how they end, and never leaving one behind."""

from __future__ import annotations

import os
import pickle
import sys
import uuid
from collections.abc import Callable, Sequence
from multiprocessing import process
from typing import Any, Literal

from ddinfer.distributed.devices import Gpus, openmp_environment
from ddinfer.distributed.devices import resolve_num_threads as resolve_num_threads
from ddinfer.distributed.plan import LaunchPlan as LaunchPlan
from ddinfer.distributed.plan import count_ranks, default_ranks
from ddinfer.distributed.plan import plan_launch as plan_launch
from ddinfer.distributed.process import end_with_parent as end_with_parent
from ddinfer.distributed.process import leave as leave
from ddinfer.distributed.rank_server import Start
from ddinfer.distributed.server import FORKS, RankServer
from ddinfer.distributed.supervise import Interrupted as Interrupted
from ddinfer.distributed.supervise import Supervisor
from ddinfer.distributed.world import pick_device
from ddinfer.errors import UsageError


def launch(
    fn: Callable[..., Any],
    *args: Any,
    nproc_per_node: str | int | None = None,
    device: str = "auto",
    gpus_per_rank: int = 1,
    num_threads: int | None = None,
    preload: Sequence[str] = ("torch", "torch.distributed"),
    before_fork: Callable[[], object] | None = None,
    on_failure: Literal["terminate", "finish"] = "terminate",
    grace_seconds: float = 30.0,
    handle_signals: bool = False,
    on_death: Callable[[int, int], object] = lambda rank, number: None,
    run_id: str | None = None,
    restart_count: int = 0,
    server: RankServer | None = None,
) -> list[Any]:
    """Run ``fn(world, *args)`` in one new process for each rank; returns in rank order.

    The ranks see the environment that torchrun would give them, so `World.detect`,
    `process_group` and a plain ``torch.distributed.init_process_group()`` work inside ``fn``. They
    are forked from a process that has imported ``preload`` once for all of them. Their store is
    hosted here, on loopback, and outlives any of them. When this process dies, however, so do
    they. Their standard input is empty. A rank that returns is over at once: what its other
    threads still do is not waited for, and exit handlers do not run.

    Args:
        fn: importable in another process: a function at the top level of a module.
        args: pickled to every rank.
        nproc_per_node: as on the command line; default: every GPU, else one rank.
        num_threads: CPU threads of each rank; default: ``OMP_NUM_THREADS``, else cores / ranks.
        preload: modules. Where importing them opens a GPU, which no process can use that is forked
            later, each rank is a new interpreter that imports for itself, and a note says so.
        before_fork: called once where ``preload`` was imported, to import more that depends on
            the job; picklable, and it opens no GPU, no connection and no thread. Where ranks are
            not forked it is not called, and what it raises is not told: the ranks will meet it.
        on_failure: "terminate" ends the other ranks soon after the first failure; "finish" lets
            them do their own share first.
        grace_seconds: after Ctrl-C or SIGTERM the ranks get the same signal, and this long.
        handle_signals: for a command line: SIGTERM and Ctrl-C are passed on to the ranks once,
            and what they return is returned if all of them still return. Main thread only.
            Without it, no handler is installed: ``KeyboardInterrupt`` ends the ranks and goes on.
        on_death: told (rank, signal) of a rank that a signal killed which nothing here has sent.
        run_id, restart_count: tell the ranks that this launch goes on with an earlier one.
        server: one that has begun to import, instead of ``preload``. It serves one launch; whoever
            made it closes it.

    Raises:
        RankError: a rank raised, was killed, or ended before ``fn`` returned: the first of them.
        UsageError: more ranks than GPUs, or an ``fn`` that cannot be imported.
        Interrupted: SIGTERM ended the ranks (only with ``handle_signals``).
    """
    if getattr(process.current_process(), "_inheriting", False):
        raise UsageError(
            "launch() is called while the script is imported by a rank that launch() started; "
            "put the call under  if __name__ == '__main__':"
        )
    gpus = Gpus() if device == "cpu" else Gpus.probe()
    wanted = count_ranks(nproc_per_node, gpus)
    num_ranks = default_ranks(device, gpus, gpus_per_rank) if wanted is None else wanted
    if pick_device(device, 0, num_ranks, gpus_per_rank, gpus=gpus) == "cpu":
        device = "cpu"
    threads = resolve_num_threads(num_threads, num_ranks)
    payload = _pickled(fn, args)

    server = RankServer(preload) if server is None else server
    server.set_environment(openmp_environment(threads, num_ranks))
    pipes = [os.pipe() for _ in range(num_ranks)]
    writers = [writer for _, writer in pipes]
    supervisor = Supervisor(
        server, [reader for reader, _ in pipes], writers, on_failure, grace_seconds, on_death
    )
    with supervisor.ending_all(), supervisor.handling_signals(handle_signals):
        # torch is imported here while the server does the same.
        from ddinfer.distributed.process_group import loopback_store

        store = loopback_store()
        run_id = uuid.uuid4().hex if run_id is None else run_id
        environments = [
            rank_environment(rank, num_ranks, store.port, run_id, restart_count)
            for rank in range(num_ranks)
        ]
        start = Start(
            payload,
            pickle.dumps(before_fork) if before_fork and FORKS else b"",
            _main_module() if b"__main__" in payload else {},
            sys.argv,
            device,
            gpus_per_rank,
            threads,
            environments,
        )
        return supervisor.run(start, store, f"ddinfer/{run_id}/{restart_count}")


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
        return pickle.dumps((fn, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"launch() runs its function in other processes, so {fn!r} must stand at the top "
            f"level of a module and its arguments must be picklable: {error}"
        ) from error


def _main_module() -> dict[str, str]:
    """How ``__main__`` is found again in another process, as multiprocessing does it."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None:
        return {"init_main_from_name": name}
    path = getattr(main, "__file__", None)
    if path is None:
        raise UsageError(
            "launch() cannot run a function that was typed into an interpreter or notebook; put "
            "it into a module of its own and import it"
        )
    return {"init_main_from_path": os.path.abspath(path)}
