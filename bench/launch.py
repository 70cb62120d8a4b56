"""How long it takes to start ranks: torch's mp.spawn, a multiprocessing forkserver, ddinfer.launch.

    python bench/launch.py [NUM_RANKS [REPETITIONS]]

Each rank imports torch, diffusers and a pipeline class, joins a gloo group, exchanges one object
and ends. Every measurement is a new interpreter, from its start to its end: median seconds of
wall time, and of CPU time over all processes. Run it on an idle machine, or compare CPU times.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRELOAD = ["torch", "torch.distributed", "diffusers", "diffusers.pipelines.flux.pipeline_flux"]


def work(rank: int, num_ranks: int, port: int) -> None:
    import torch.distributed as dist
    from diffusers import FluxPipeline  # noqa: F401 - what a job would import

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks
    )
    everyone = [None] * num_ranks
    dist.all_gather_object(everyone, rank)
    assert everyone == list(range(num_ranks))
    dist.destroy_process_group()


def by_spawn(num_ranks: int) -> None:
    import torch.multiprocessing as mp

    mp.spawn(work, (num_ranks, free_port()), nprocs=num_ranks)


def by_forkserver(num_ranks: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    ranks = [context.Process(target=work, args=(k, num_ranks, port)) for k in range(num_ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0


def by_ddinfer(num_ranks: int) -> None:
    from ddinfer.distributed.launch import launch, leave

    launch(work_in_world, nproc_per_node=num_ranks, device="cpu", num_threads=1, preload=PRELOAD)
    leave(0)


def work_in_world(world) -> None:
    from diffusers import FluxPipeline  # noqa: F401

    from ddinfer.distributed.process_group import process_group

    with process_group(world) as group:
        assert group.all_gather_object(world.rank) == list(range(world.world_size))


def free_port() -> int:
    import socket

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


WAYS = {"mp.spawn": by_spawn, "forkserver": by_forkserver, "ddinfer.launch": by_ddinfer}


def main(num_ranks: int = 2, repetitions: int = 5) -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environ |= {"PYTHONPATH": ROOT, "TRANSFORMERS_VERBOSITY": "error"}
    adopt_orphans()
    measured: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(repetitions):
        for way in WAYS:  # in turn, so that a busy minute hits all of them
            used, started = cpu_seconds(), time.monotonic()
            subprocess.run([sys.executable, __file__, way, str(num_ranks)], env=environ, check=True)
            reap()
            measured[way].append((time.monotonic() - started, cpu_seconds() - used))
    print(f"{num_ranks} ranks, {repetitions} times each     wall s    CPU s")
    for way, pairs in measured.items():
        wall, cpu = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"{way:<26}{wall:>8.1f}{cpu:>9.1f}")


def adopt_orphans() -> None:
    """Count the forkserver too, which outlives its interpreter for a moment (Linux)."""
    set_child_subreaper = 36  # prctl(2)
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def cpu_seconds() -> float:
    """Of all processes below this one that have been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in WAYS:
        WAYS[sys.argv[1]](int(sys.argv[2]))
    else:
        main(*map(int, sys.argv[1:]))
