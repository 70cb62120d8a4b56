"""What `--schedule dynamic` gains when prompts differ in cost and one rank is slow.

    launch/bench --only schedule
    python -m bench.schedule [--ranks 4] [--prompts 64]

Real jobs, started as a user starts them, of a pipeline whose step only waits: 10 ms, and twice
that on the last rank. So the figures are about the schedule alone, and hold on a busy machine.
Prompts have 1 to 50 steps, at random. Ideal is the work divided by what the ranks can do together.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.inputs import custom_pipeline
from bench.measure import PYTHON, Size, progress, run
from bench.report import table

ABOUT = "what --schedule dynamic gains with one slow rank and prompts of unequal cost"
EXPECTED_SECONDS = 45
STEP_SECONDS, SLOWDOWN = 0.010, 2.0

PIPELINE = f"""
import os, time
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image


class WaitingPipeline(DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(
        self, prompt: str, num_inference_steps: int = 1, generator: torch.Generator | None = None
    ):
        last = int(os.environ.get("WORLD_SIZE", 1)) - 1
        slow = {SLOWDOWN} if int(os.environ.get("RANK", 0)) == last else 1.0
        time.sleep({STEP_SECONDS} * slow * num_inference_steps)
        colour = (generator.initial_seed() % 255 + 1,) * 3
        return ImagePipelineOutput([Image.new("RGB", (8, 8), colour)])
"""


def write_prompts(folder: Path, order: str, num_prompts: int) -> tuple[Path, int]:
    """→ the prompt file and its steps in all. ``sorted`` is the unkind order: costs drift."""
    generator = random.Random(0)
    steps = [generator.randint(1, 50) for _ in range(num_prompts)]
    if order == "sorted":
        steps.sort()
    file = folder / f"{order}.jsonl"
    lines = [json.dumps({"prompt": "x", "num_inference_steps": n}) for n in steps]
    file.write_text("\n".join(lines) + "\n")
    return file, sum(steps)


def working_seconds(model: Path, prompts: Path, output: Path, ranks: int, schedule: str) -> float:
    """From the loaded model to the last image of the last rank."""
    command = [PYTHON, "-m", "ddinfer", "--model", str(model), "--trust_remote_code"]
    command += ["--prompts", str(prompts), "--output", str(output), "--device", "cpu"]
    command += [f"--nproc_per_node={ranks}", f"--schedule={schedule}", "--num_threads=1", "--json"]
    done = run(command)
    return max(rank["working"] for rank in json.loads(done.stdout)["ranks"])


def measure(size: Size) -> dict[str, Any]:
    return compare(ranks=4, num_prompts=size.pick(16, 64, 96))


def compare(ranks: int, num_prompts: int) -> dict[str, Any]:
    """→ order of the prompts → ideal seconds, and those of both schedules.

    Raises:
        RuntimeError: the two schedules made different bytes.
    """
    speed = (ranks - 1 + 1 / SLOWDOWN) / STEP_SECONDS  # steps a second, all ranks
    found: dict[str, Any] = {"ranks": ranks, "num_prompts": num_prompts, "orders": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = custom_pipeline(folder, "waiting", PIPELINE, "WaitingPipeline")
        for order in ("shuffled", "sorted"):
            prompts, steps = write_prompts(folder, order, num_prompts)
            told = found["orders"][order] = {"ideal": round(steps / speed, 2)}
            for schedule in ("static", "dynamic"):
                progress(f"{order}, {schedule}")
                output = folder / f"{order}-{schedule}"
                told[schedule] = round(working_seconds(model, prompts, output, ranks, schedule), 2)
            for file in (folder / f"{order}-static/images/0000").iterdir():
                other = folder / f"{order}-dynamic/images/0000" / file.name
                if file.read_bytes() != other.read_bytes():
                    raise RuntimeError(f"{order}: {file.name} differs between the schedules")
    return found


def tables(figures: Mapping[str, Any]) -> str:
    rows = [
        [f"{order} by cost", *(f"{told[k]:.2f} s" for k in ("ideal", "static", "dynamic"))]
        for order, told in figures["orders"].items()
    ]
    what = f"{figures['num_prompts']} prompts, {figures['ranks']} ranks, the last half as fast"
    return table([what, "ideal", "static", "dynamic"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()
    print(tables(compare(options.ranks, options.prompts)))


if __name__ == "__main__":
    main()
