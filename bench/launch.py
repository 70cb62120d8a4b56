"""How long it takes to start ranks: torch's mp.spawn, a multiprocessing forkserver, ddinfer.launch.

    launch/bench --only launch

Each rank imports torch, diffusers and a pipeline class, joins a gloo group, exchanges one object
and ends. Every measurement is a new interpreter, from its start to its end.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping
from typing import Any

from bench.measure import PYTHON, ROOT, Size, in_turn, run, summary
from bench.report import spread, table

ABOUT = "starting two ranks: mp.spawn, multiprocessing's forkserver, ddinfer.launch"
EXPECTED_SECONDS = 60
NUM_RANKS = 2
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
    from ddinfer.distributed.launch import launch
    from ddinfer.distributed.process import exit_now

    launch(work_in_world, nproc_per_node=num_ranks, device="cpu", num_threads=1, preload=PRELOAD)
    exit_now(0)


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


def measure(size: Size) -> dict[str, Any]:
    """→ way → seconds and CPU seconds over all processes."""
    environ = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ways = {
        way: lambda way=way: run([PYTHON, __file__, way, str(NUM_RANKS)], environ) for way in WAYS
    }
    return {
        way: {
            "seconds": summary([run.seconds for run in runs]),
            "cpu_seconds": summary([run.cpu_seconds for run in runs]),
        }
        for way, runs in in_turn(ways, size.times(1, 3, 7)).items()
    }


def tables(figures: Mapping[str, Any]) -> str:
    rows = [
        [f"`{way}`", spread(told["seconds"]), spread(told["cpu_seconds"])]
        for way, told in figures.items()
    ]
    return table([f"{NUM_RANKS} ranks", "s", "CPU s, all processes"], rows)


if __name__ == "__main__":
    WAYS[sys.argv[1]](int(sys.argv[2]))
