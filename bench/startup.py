"""How long a short job takes to start, and what a rank's time goes into beside its pipeline.

    python bench/startup.py [--repetitions 5]

Prints a Markdown table: medians over the repetitions, with the lowest and the highest. The jobs run
the embedded model on two gloo ranks with one thread each, as a user would start them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAIN = [sys.executable, str(ROOT / "ddinfer/main.py")]
JOB = ["--nproc_per_node=2", "--num_threads=1", "--device=cpu"]


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - started


def import_seconds() -> float:
    """``import ddinfer`` beside an empty interpreter."""
    empty = seconds([sys.executable, "-c", "pass"])
    return seconds([sys.executable, "-c", "import ddinfer"]) - empty


def help_seconds() -> float:
    return seconds([*MAIN, "--help"])


def first_image_seconds(launcher: list[str]) -> float:
    """From the command to the first image in its place."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        started = time.perf_counter()
        job = subprocess.Popen(
            [*launcher, "--output", str(out)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not list(out.glob("images/*/*.png")):
            if job.poll() is not None:
                raise SystemExit(f"{launcher} ended with {job.returncode} before an image")
            time.sleep(0.01)
        took = time.perf_counter() - started
        job.wait()
        return took


def overhead_share() -> float:
    """Part of the ranks' working time that is not inside the pipeline's calls."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output", folder + "/out", "--num_images_per_prompt=4", "--json"]
        done = subprocess.run([*MAIN, *JOB, *words], check=True, capture_output=True, cwd=ROOT)
        ranks = json.loads(done.stdout)["ranks"]
        working = sum(rank["working"] for rank in ranks)
        return 1 - sum(rank["pipeline"] for rank in ranks) / working


def measured(name: str, unit: str, measure: Callable[[], float], repetitions: int) -> str:
    values = sorted(measure() for _ in range(repetitions))
    factor = 100 if unit == "%" else 1
    low, middle, high = (factor * v for v in (values[0], statistics.median(values), values[-1]))
    return f"| {name} | {middle:.3g} {unit} | {low:.3g} … {high:.3g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    torchrun = [sys.executable, "-m", "torch.distributed.run", "ddinfer/main.py"]
    rows = [
        measured("`import ddinfer`", "s", import_seconds, repetitions),
        measured("`ddinfer --help`", "s", help_seconds, repetitions),
        measured(
            "command to first image: `ddinfer --nproc_per_node=2`",
            "s",
            lambda: first_image_seconds([*MAIN, *JOB]),
            repetitions,
        ),
        measured(
            "command to first image: `torchrun ddinfer/main.py --nproc_per_node=2`",
            "s",
            lambda: first_image_seconds([*torchrun, *JOB]),
            repetitions,
        ),
        measured("a rank's time outside the pipeline", "%", overhead_share, repetitions),
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, ", end="")
    print(f"{repetitions} repetitions\n")
    print("| | median | lowest … highest |\n|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
