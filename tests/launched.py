"""A small program that uses the launcher as ddinfer's own command does; tests start it in ways.

``python launched.py WHAT FOLDER [--nproc_per_node N]``. Each rank writes its process id into
``FOLDER/pid-RANK``. Rank 0, or the launcher, writes its result into ``FOLDER/result``.
"""

import argparse
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from ddinfer.distributed.devices import Gpus
from ddinfer.distributed.launch import launch, plan_launch
from ddinfer.distributed.process import end_with_parent, exit_now
from ddinfer.distributed.process_group import process_group
from ddinfer.distributed.world import World
from ddinfer.errors import DdinferError


def ranks_work(world, what, folder):
    """What every rank does, by name."""
    with process_group(world) as group:
        group.enter("running", "prompt 3")
        Path(folder, f"pid-{world.rank}.tmp").write_text(str(os.getpid()))
        os.replace(Path(folder, f"pid-{world.rank}.tmp"), Path(folder, f"pid-{world.rank}"))
        group.wait_for_peers()
        if what == "exit" and world.rank == 1:
            os._exit(0)
        if what == "raise" and world.rank == 1:
            raise ValueError("the picture is upside down")
        if what == "restart" and world.rank == 1 and world.restart_count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "sleep":
            time.sleep(3600)
        if what == "compute":  # holds the interpreter's lock for good: no thread of ours can run
            ctypes.PyDLL(None).sleep(3600)
        if what == "meet":
            wait_for(Path(folder, "go"))
        return group.all_gather_object(
            (world.rank, world.local_rank, world.world_size, gpu_of(world))
        )


def gpu_of(world):
    """The device that this rank would get on a machine with two GPUs."""
    two = Gpus(usable=2, present=2, torch_version="2.13.0", cuda_version="12.8")
    return World.detect("cuda", gpus=two).device if world.local_world_size <= 2 else "cpu"


def wait_for(path):
    while not path.exists():
        time.sleep(0.02)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("folder")
    parser.add_argument("--nproc_per_node")
    options = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    try:
        plan = plan_launch(options.nproc_per_node, "cpu")
        if plan.kind == "join":
            world = World.detect("cpu")
            result, is_first = ranks_work(world, options.what, options.folder), world.rank == 0
        else:
            launched = launch(
                ranks_work,
                options.what,
                options.folder,
                nproc_per_node=plan.num_ranks,
                device="cpu",
                handle_signals=True,
                grace_seconds=20,
            )
            result, is_first = launched[0], True
    except DdinferError as error:
        print(f"error: {error}", file=sys.stderr)
        exit_now(error.exit_code)
    if is_first:
        Path(options.folder, "result").write_text(repr(result))
    exit_now(0)


if __name__ == "__main__":
    main()
