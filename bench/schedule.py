"""What `--schedule dynamic` gains when prompts differ in cost and one rank is slow.

    python -m bench.schedule [--ranks 4] [--prompts 96]

Real jobs, started as a user starts them, of a pipeline whose step only waits: 10 ms, and twice
that on the last rank. So the figures are about the schedule alone, and hold on a busy machine.
Prompts have 1 to 50 steps, at random. Ideal is the work divided by what the ranks can do together.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

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


def write_pipeline(folder: Path) -> Path:
    from diffusers import DDIMScheduler

    target = folder / "waiting"
    DDIMScheduler().save_pretrained(target / "scheduler")
    (target / "waiting.py").write_text(PIPELINE)
    index = {
        "_class_name": ["waiting", "WaitingPipeline"],
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (target / "model_index.json").write_text(json.dumps(index))
    return target


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
    command = [sys.executable, "-m", "ddinfer", "--model", str(model), "--trust_remote_code"]
    command += ["--prompts", str(prompts), "--output", str(output), "--device", "cpu"]
    command += [f"--nproc_per_node={ranks}", f"--schedule={schedule}", "--num_threads=1", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return max(rank["working"] for rank in json.loads(done.stdout)["ranks"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=96)
    options = parser.parse_args()
    speed = (options.ranks - 1 + 1 / SLOWDOWN) / STEP_SECONDS  # steps a second, all ranks
    print(
        f"{options.prompts} prompts of 1 to 50 steps, {options.ranks} ranks, the last half as fast"
    )
    print(f"{'order':<10}{'ideal':>8}{'static':>9}{'dynamic':>9}   seconds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_pipeline(folder)
        for order in ("shuffled", "sorted"):
            prompts, steps = write_prompts(folder, order, options.prompts)
            seconds = {
                schedule: working_seconds(
                    model, prompts, folder / f"{order}-{schedule}", options.ranks, schedule
                )
                for schedule in ("static", "dynamic")
            }
            same = all(
                file.read_bytes()
                == (folder / f"{order}-dynamic/images/0000" / file.name).read_bytes()
                for file in (folder / f"{order}-static/images/0000").iterdir()
            )
            print(
                f"{order:<10}{steps / speed:>8.2f}{seconds['static']:>9.2f}"
                f"{seconds['dynamic']:>9.2f}   {'same bytes' if same else 'BYTES DIFFER'}"
            )


if __name__ == "__main__":
    main()
