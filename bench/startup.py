"""How long ddinfer takes to import, to say its help, and to its first image by either launcher.

    launch/bench --only startup

The jobs run the embedded model on two gloo ranks with one thread each, as a user would start them.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.measure import PYTHON, ROOT, Size, clean_environment, in_turn, summary
from bench.report import spread, table

ABOUT = "import, --help, and command to first image by both launchers"
EXPECTED_SECONDS = 60
MAIN = [PYTHON, str(ROOT / "ddinfer/main.py")]
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "ddinfer/main.py"]
JOB = ["--nproc_per_node=2", "--num_threads=1", "--device=cpu"]


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=clean_environment())
    return time.perf_counter() - started


def import_seconds() -> float:
    """``import ddinfer`` beside an empty interpreter."""
    empty = seconds([PYTHON, "-c", "pass"])
    return seconds([PYTHON, "-c", "import ddinfer"]) - empty


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
            env=clean_environment(),
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


MEASURES: dict[str, Callable[[], float]] = {
    "`import ddinfer`": import_seconds,
    "`ddinfer --help`": help_seconds,
    "command to first image: `ddinfer --nproc_per_node=2`": lambda: first_image_seconds(
        [*MAIN, *JOB]
    ),
    "command to first image: `torchrun ddinfer/main.py --nproc_per_node=2`": lambda: (
        first_image_seconds([*TORCHRUN, *JOB])
    ),
}


def measure(size: Size) -> dict[str, Any]:
    taken = in_turn(MEASURES, size.times(1, 3, 7))
    return {name: summary(values) for name, values in taken.items()}


def tables(figures: Mapping[str, Any]) -> str:
    return table(["", "s"], [[name, spread(told)] for name, told in figures.items()])
