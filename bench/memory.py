"""Host memory of whole jobs over 1, 2 and 4 ranks: the proportional set size of all processes.

The highest sum over a job's life, launcher included, sampled five times a second. ``loading`` has
the weights alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import inputs
from bench.jobs import Cell, command, environment
from bench.measure import CACHE, Size, progress, run
from bench.report import table

ABOUT = "host memory of whole jobs over 1, 2 and 4 ranks"
EXPECTED_SECONDS = 100
WAYS = ("ddinfer", "spawn", "accelerate")
#: Few cheap images: the peak is in loading and in the first call.
CELL = Cell("memory", "mid", 4, (1, 1, 1), steps=1)


def measure(size: Size) -> dict[str, Any]:
    """→ ranks → way → highest bytes."""
    model = inputs.mid_model()
    found: dict[str, Any] = {"peak_bytes": {}, "weights_bytes": weights_bytes(model)}
    CACHE.mkdir(parents=True, exist_ok=True)
    for ranks in size.pick((2,), (1, 2, 4), (1, 2, 4)):
        cell = replace(CELL, ranks=ranks, num_prompts=max(4, ranks))
        told = found["peak_bytes"][str(ranks)] = {}
        for way in WAYS:
            progress(f"{way}, {ranks} ranks")
            with tempfile.TemporaryDirectory(dir=CACHE) as name:
                prompts = inputs.prompt_file(Path(name), cell.num_prompts)
                words = command(way, cell, model, prompts, Path(name) / "out")
                told[way] = run(words, environment(way), memory_every_seconds=0.2).peak_bytes
    return found


def weights_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*/*.safetensors"))


def tables(figures: Mapping[str, Any]) -> str:
    peaks = figures["peak_bytes"]
    rows = [
        [f"{ranks} rank{'s' * (ranks != '1')}", *(f"{told[way] / 1e9:.2f} GB" for way in WAYS)]
        for ranks, told in peaks.items()
    ]
    weights = f"mid-size model, {figures['weights_bytes'] / 1e9:.2f} GB of weights"
    return table([weights, *WAYS], rows)
