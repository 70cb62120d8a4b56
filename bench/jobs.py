"""Whole jobs, from the command to the last image, beside what people use today.

The ways, measured in turn with the same model, prompts, seeds, steps, type and files:

- ``ddinfer``: the command.
- ``plain``: plain diffusers in one process that uses all cores (bench/competitors/plain.py).
- ``spawn``: the diffusers guides' torch script, corrected so that it runs (…/spawn.py).
- ``accelerate``: their ``split_between_processes`` script under torchrun (…/accelerate_split.py).

Every picture of every run is compared with ddinfer's of the same round.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import inputs
from bench.measure import (
    CACHE,
    COMPETITORS_PYTHON,
    PYTHON,
    ROOT,
    Run,
    Size,
    competitors_versions,
    in_turn,
    ratios,
    run,
    summary,
)
from bench.report import spread, verdict

SCRIPTS = ROOT / "bench" / "competitors"
COMPETITORS = ("plain", "spawn", "accelerate")


@dataclass(frozen=True)
class Cell:
    """One kind of job.

    Attributes:
        repetitions: rounds when run quickly, by default, and in full; 0 leaves it out.
        steps: of every image; ``None`` with ``mixed``, where each prompt has its own.
        goal: highest ratio to the fastest competitor that the project wants.
    """

    name: str
    model: str
    num_prompts: int
    repetitions: tuple[int, int, int]
    steps: int | None = None
    batch_size: int = 1
    ranks: int = 2
    mixed: bool = False
    goal: float = 0.97
    ways: Sequence[str] = field(default=("ddinfer", *COMPETITORS))

    @property
    def call(self) -> dict[str, Any]:
        call = dict(inputs.TINY_CALL if self.model == "tiny" else inputs.MID_CALL)
        return call | ({} if self.steps is None else {"num_inference_steps": self.steps})

    @property
    def text(self) -> str:
        steps = "2 to 24 steps" if self.mixed else f"{self.call['num_inference_steps']} steps"
        size = f"{self.call['height']}²"
        return (
            f"{self.num_prompts:,} prompts, {steps}, {size}, batch {self.batch_size}, "
            f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        )


@dataclass(frozen=True)
class Jobs:
    """Cells that are run together: one part of `launch/bench`."""

    ABOUT: str
    EXPECTED_SECONDS: int
    cells: Sequence[Cell]

    def measure(self, size: Size) -> dict[str, Any]:
        """→ cell name → its figures."""
        found: dict[str, Any] = {"competitors": competitors_versions(), "cells": {}}
        for python in (PYTHON, COMPETITORS_PYTHON):  # so that nobody is the first to read the disk
            run([python, "-c", "from diffusers import StableDiffusionPipeline"])
        for cell in self.cells:
            if size.pick(*cell.repetitions) == 0:
                continue
            if size.is_quick:
                cell = replace(cell, num_prompts=min(cell.num_prompts, 2 * 8))
            found["cells"][cell.name] = measure_cell(cell, size.times(*cell.repetitions))
        return found

    def tables(self, figures: Mapping[str, Any]) -> str:
        return tables(figures)

    def problems(self, figures: Mapping[str, Any]) -> list[str]:
        return problems(figures)


PARTS = {
    "jobs_short": Jobs(
        "short jobs beside plain diffusers, mp.spawn and Accelerate; time to the first step",
        150,
        [
            Cell("short-8", "tiny", 8, (1, 5, 9), goal=0.80),
            Cell("one-rank-8", "tiny", 8, (0, 3, 5), ranks=1, goal=0.80,
                 ways=("ddinfer", "plain")),
        ],
    ),
    "jobs_64": Jobs(
        "64 prompts beside the same, batch 1 and 8",
        150,
        [
            Cell("tiny-64", "tiny", 64, (0, 3, 5)),
            Cell("tiny-64-batch-8", "tiny", 64, (1, 1, 5), batch_size=8),
        ],
    ),
    "jobs_steps": Jobs(
        "very short images, and mixed steps, beside the same",
        115,
        [
            Cell("one-step-256", "tiny", 256, (0, 2, 5), steps=1),
            Cell("mixed-64", "tiny", 64, (1, 1, 5), mixed=True,
                 ways=("ddinfer", "ddinfer --schedule dynamic", *COMPETITORS)),
        ],
    ),
    "jobs_parti": Jobs(
        "all of PartiPrompts, one step, beside the same",
        130,
        [Cell("parti-1632", "tiny", 1632, (1, 1, 3), steps=1)],
    ),
    "jobs_mid": Jobs(
        "about a second an image, beside the same",
        215,
        [
            Cell("mid-8", "mid", 8, (1, 1, 5)),
            Cell("mid-64", "mid", 64, (0, 1, 3)),
            Cell("mid-64-batch-8", "mid", 64, (0, 0, 2), batch_size=8),
        ],
    ),
}  # fmt: skip


def measure_cell(cell: Cell, repetitions: int) -> dict[str, Any]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        steps = inputs.mixed_steps(cell.num_prompts) if cell.mixed else ()
        prompts = inputs.prompt_file(folder, cell.num_prompts, steps)
        jobs = {way: _Job(cell, way, prompts, folder) for way in cell.ways}
        taken = in_turn({way: job.run for way, job in jobs.items()}, repetitions, f"{cell.name}: ")
    return _figures(cell, taken)


class _Job:
    """One way to make the images of a cell; each call of `run` makes them all anew."""

    #: The pictures of ddinfer's last run, which the others of the round are compared with.
    reference: Path

    def __init__(self, cell: Cell, way: str, prompts: Path, folder: Path):
        self.cell, self.way, self.folder = cell, way, folder
        self.output = folder / way.replace(" ", "")
        model = inputs.tiny_model() if cell.model == "tiny" else inputs.mid_model()
        self.command = command(way, cell, model, prompts, self.output)
        self.environ = environment(way)

    def run(self) -> dict[str, float]:
        shutil.rmtree(self.output, ignore_errors=True)
        first_steps = self.folder / "first-steps"
        shutil.rmtree(first_steps, ignore_errors=True)
        first_steps.mkdir()
        hook = {"BENCH_FIRST_STEP": str(first_steps), "PYTHONPATH": str(ROOT / "bench" / "hooks")}
        done = run(self.command, {**self.environ, **hook})
        images = sorted(self.output.rglob("*.png"))
        if len(images) != self.cell.num_prompts:
            raise RuntimeError(f"{self.way} made {len(images)} of {self.cell.num_prompts} images")
        if self.way == "ddinfer":
            type(self).reference = self.output
        return {**_times(done, first_steps, images), **compare(self.output, self.reference)}


def _times(done: Run, first_steps: Path, images: Sequence[Path]) -> dict[str, float]:
    steps = [float(file.read_text()) - done.started for file in first_steps.iterdir()]
    return {
        "seconds": done.seconds,
        "last_image": max(file.stat().st_mtime for file in images) - done.started_at,
        "first_step": min(steps),
        "first_step_of_all": max(steps),
        "cpu_seconds": done.cpu_seconds,
    }


def command(way: str, cell: Cell, model: Path, prompts: Path, output: Path) -> list[str]:
    """What a user would type."""
    words = ["--model", str(model), "--prompts", str(prompts), "--output", str(output)]
    words += ["--batch_size", str(cell.batch_size)]
    if way.startswith("ddinfer"):
        call = [f"--{name}={value}" for name, value in cell.call.items()]
        words += ["--device=cpu", f"--nproc_per_node={cell.ranks}", *call, *way.split()[1:]]
        if cell.ranks == 1:
            return [PYTHON, "-m", "ddinfer", *words]
        return [PYTHON, "-m", "ddinfer", *words, "--num_threads=1"]
    words += ["--call", json.dumps(cell.call), "--ranks", str(cell.ranks)]
    if way == "plain":
        return [COMPETITORS_PYTHON, str(SCRIPTS / "plain.py"), *words]
    if way == "spawn":
        return [COMPETITORS_PYTHON, str(SCRIPTS / "spawn.py"), *words]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cell.ranks}"]
    return [COMPETITORS_PYTHON, *torchrun, str(SCRIPTS / "accelerate_split.py"), *words]


def environment(way: str) -> Mapping[str, str]:
    """One thread a rank for those with ranks; ddinfer is told by its option."""
    return {"OMP_NUM_THREADS": "1"} if way in ("spawn", "accelerate") else {}


def compare(folder: Path, reference: Path) -> dict[str, float]:
    """How many images differ from the reference's, and by how much at most, of 255."""
    import numpy as np
    from PIL import Image

    theirs = {file.name: file for file in reference.rglob("*.png")}
    different, largest = 0, 0
    for file in folder.rglob("*.png"):
        with Image.open(file) as a, Image.open(theirs[file.name]) as b:
            apart = np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()
        different += int(apart > 0)
        largest = max(largest, int(apart))
    return {"different_images": different, "largest_difference": largest}


# --- figures ------------------------------------------------------------------------------------

TIMES = ("seconds", "last_image", "first_step", "first_step_of_all", "cpu_seconds")


def _figures(cell: Cell, taken: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    ways: dict[str, Any] = {}
    for way, runs in taken.items():
        ways[way] = {name: summary([r[name] for r in runs]) for name in TIMES}
        ways[way]["different_images"] = max(r["different_images"] for r in runs)
        ways[way]["largest_difference"] = max(r["largest_difference"] for r in runs)
    others = [way for way in taken if way in COMPETITORS]
    fastest = min(others, key=lambda way: ways[way]["last_image"]["median"])

    def over(way: str, name: str) -> dict[str, Any]:
        return ratios([r[name] for r in taken["ddinfer"]], [r[name] for r in taken[way]])

    figures = {
        "text": cell.text,
        "model": cell.model,
        "goal": cell.goal,
        "ways": ways,
        "fastest": fastest,
        "ratio_last_image": over(fastest, "last_image"),
        "ratio_seconds": over(fastest, "seconds"),
    }
    if "accelerate" in taken:
        figures["ratio_first_step"] = over("accelerate", "first_step_of_all")
    return figures


def problems(figures: Mapping[str, Any]) -> list[str]:
    """Where the work compared was not the same: pictures that differ."""
    found = []
    for name, cell in figures["cells"].items():
        for way, told in cell["ways"].items():
            # Another number of threads rounds differently: 1 of 255, on few pixels.
            allowed = 1 if way == "plain" else 0
            if told["largest_difference"] > allowed:
                found.append(
                    f"{name}: {told['different_images']} images of {way} differ from ddinfer's, "
                    f"by up to {told['largest_difference']} of 255"
                )
    return found


def tables(figures: Mapping[str, Any]) -> str:
    lines = [
        "| job | way | to the last image, s | to the prompt, s | to the first step, s | CPU s | "
        "pictures |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in figures["cells"].values():
        label = f"{cell['model']}: {cell['text']}"
        for way, told in cell["ways"].items():
            lines.append(
                f"| {label} | {way} | {spread(told['last_image'])} | {spread(told['seconds'])} | "
                f"{spread(told['first_step_of_all'])} | {spread(told['cpu_seconds'])} | "
                f"{pixels(told)} |"
            )
            label = ""
    lines += ["", "Ratios, each of one round; under 1 ddinfer is faster:", ""]
    lines += [
        "| job | fastest other | to the last image | goal | to the prompt | "
        "first step / Accelerate's |",
        "|---|---|---|---|---|---|",
    ]
    for cell in figures["cells"].values():
        first = cell.get("ratio_first_step")
        lines.append(
            f"| {cell['model']}: {cell['text']} | {cell['fastest']} | "
            f"{spread(cell['ratio_last_image'])} | ≤ {cell['goal']} "
            f"{verdict(cell['ratio_last_image']['median'] <= cell['goal'])} | "
            f"{spread(cell['ratio_seconds'])} | "
            + (f"{spread(first)}, goal ≤ 0.6 {verdict(first['median'] <= 0.6)} |" if first else "|")
        )
    return "\n".join(lines)


def pixels(told: Mapping[str, Any]) -> str:
    if not told["different_images"]:
        return "same"
    return f"{told['different_images']} differ, by ≤ {told['largest_difference']} of 255"
