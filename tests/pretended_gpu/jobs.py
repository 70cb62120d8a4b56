"""``python -m tests.pretended_gpu.jobs LIBRARY FOLDER KIND``: whole jobs on pretended GPUs.

Each makes the same images as a job on the CPU. Prints a line of JSON a job: the kind of device that
its folder names, how many different pictures it made, and how far they are from the CPU's, in steps
of 255.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence

import ddinfer
from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.job.run import run_job
from ddinfer.models.planner import plan_placement
from tests.pretended_gpu import FIRST, SECOND, register
from tests.tiny_pipelines import call_arguments, tiny_pipeline

PROMPTS = ("a red cat", "a dog", "two birds")


def on_rank(world: World, library: str, config: JobConfig, devices: tuple[str, ...]) -> None:
    register(library)
    if world.world_size > 1:  # torch would refuse the device for a group of its own
        torch.distributed.init_process_group("gloo")
    run_job(config, replace(world, device=devices[world.local_rank]))


def pictures(output: Path) -> dict[str, np.ndarray]:
    """Name of a file → its frames."""
    return {
        file.name: np.stack([np.asarray(f) for f in ImageSequence.Iterator(Image.open(file))])
        for file in sorted(output.glob("images/*/*"))
    }


def jobs(folder: Path, scratch: Path) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """Its name, the device of each rank, and options."""
    yield "on the CPU", ("cpu",), {}
    yield "two ranks", (FIRST, SECOND), {}
    yield "in stages", (FIRST,), {"placement": "staged"}
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    budgets = {FIRST: size // 2, SECOND: size // 3, "cpu": size // 5}
    planned, placement = plan_placement(folder, budgets), scratch / "placement.json"
    assert set(planned.devices.values()) >= {FIRST, SECOND, "disk"}
    placement.write_text(planned.to_json())
    yield "spread over two, host and disk", (FIRST,), {"placement": str(placement)}
    yield "cut over two ranks", (FIRST, SECOND), {"pipeline_parallel": 2}


def main(library: str, scratch: Path, kind: str) -> None:
    folder, prompts = tiny_pipeline(kind, scratch), scratch / "prompts.jsonl"
    lines = [{"prompt": prompt, **call_arguments(kind)} for prompt in PROMPTS]
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    expected: dict[str, np.ndarray] = {}
    for name, devices, options in jobs(folder, scratch):
        output = scratch / name.replace(" ", "-")
        config = JobConfig(
            model=str(folder), output=str(output), prompts=str(prompts), num_threads=1, **options
        )  # fmt: skip
        ddinfer.launch(
            on_rank, library, config, devices, nproc_per_node=len(devices), device="cpu",
            num_threads=1, preload=("torch", "torch.distributed", "diffusers", "transformers"),
        )  # fmt: skip
        made = pictures(output)
        expected = expected or made
        apart = max(int(np.abs(made[k].astype(int) - expected[k]).max()) for k in expected)
        identity = json.loads((output / "job.json").read_text())["identity"]
        different = len({picture.tobytes() for picture in made.values()})
        job = {"job": name, "device": identity["device"], "pictures": different, "apart": apart}
        print(json.dumps(job), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
