"""Host memory and seconds of loading a model in 1, 2 and 4 processes, beside from_pretrained.

`from_pretrained` is measured as it is without Accelerate, in ddinfer's environment, and with its
defaults in one that has Accelerate, which is what most users have.

    launch/bench --only loading

For each: seconds until every weight was read once, and the proportional set size summed over the
processes, less that of the same processes with their imports and no model, as a multiple of the
weights' stored bytes.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.measure import (
    CACHE,
    COMPETITORS_PYTHON,
    PYTHON,
    ROOT,
    Size,
    competitors_versions,
    progress,
    proportional_bytes,
)
from bench.report import table

ABOUT = "host memory and seconds of loading weights alone, beside from_pretrained"
EXPECTED_SECONDS = 95

#: How a process loads.
WAYS = {
    "ddinfer": "from ddinfer.models.loading import load_model; model = load_model(folder)",
    "from_pretrained": (
        "model = diffusers.FluxTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)"
    ),
    "ddinfer, as bfloat16": (
        "from ddinfer.models.loading import load_model; model = load_model(folder, dtype='bf16')"
    ),
    "from_pretrained, as bfloat16": (
        "model = diffusers.FluxTransformer2DModel.from_pretrained("
        "folder, dtype=torch.bfloat16, low_cpu_mem_usage=False)"
    ),
    "from_pretrained with Accelerate": (
        "model = diffusers.FluxTransformer2DModel.from_pretrained(folder)"
    ),
    "from_pretrained with Accelerate, as bfloat16": (
        "model = diffusers.FluxTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)"
    ),
}

CHILD = """
import sys, time
sys.path.insert(0, {root!r})
import torch, diffusers
{imports}
diffusers.FluxTransformer2DModel
torch.set_num_threads(1)
folder = {folder!r}
started = time.perf_counter()
{way}
if model is not None:
    with torch.no_grad():
        total = sum(float(p.view(-1).view(torch.uint8)[::4096].sum()) for p in model.parameters())
print(time.perf_counter() - started, flush=True)
sys.stdin.read()
"""


def measure(size: Size) -> dict[str, Any]:
    """→ ranks → way → seconds, and memory as a multiple of the weights."""
    competitors = competitors_versions()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        num_bytes = make_model(folder, size.pick(0.4, 0.6, 1.2))
        found: dict[str, Any] = {"bytes": num_bytes, "competitors": competitors, "ranks": {}}
        for ranks in size.pick((1,), (1, 2, 4), (1, 2, 4)):
            empty = {python: load_in_ranks("model = None", python, folder, ranks)[1]
                     for python in (PYTHON, COMPETITORS_PYTHON)}  # fmt: skip
            told = found["ranks"][str(ranks)] = {}
            for way, code in WAYS.items():
                progress(f"{ranks} processes, {way}")
                python = COMPETITORS_PYTHON if "Accelerate" in way else PYTHON
                seconds, used = load_in_ranks(code, python, folder, ranks)
                multiple = round((used - empty[python]) / num_bytes, 3)
                told[way] = {"seconds": round(seconds, 2), "of_weights": multiple}
    return found


def tables(figures: Mapping[str, Any]) -> str:
    rows = [
        [way, *(f"{told[way]['of_weights']:.2f} × in {told[way]['seconds']:.1f} s"
                for told in figures["ranks"].values())]
        for way in WAYS
    ]  # fmt: skip
    header = [f"{ranks} process{'es' * (ranks != '1')}" for ranks in figures["ranks"]]
    return table([f"{figures['bytes'] / 1e9:.2f} GB of weights", *header], rows)


def make_model(folder: Path, gigabytes: float) -> int:
    """Saves a Flux-shaped transformer; returns the bytes of its weight files."""
    if not (folder / "config.json").is_file():
        import diffusers

        layers = max(1, round((gigabytes * 1e9 - 0.3e9) / 57e6))
        model: Any = diffusers.FluxTransformer2DModel(
            num_layers=2, num_single_layers=layers, attention_head_dim=64,
            num_attention_heads=16, axes_dims_rope=(8, 28, 28),
        )  # fmt: skip
        model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_in_ranks(way: str, python: str, folder: Path, ranks: int) -> tuple[float, int]:
    """Seconds of the slowest process and bytes of all, once all have loaded."""
    imports = "import ddinfer.models.loading" if python == PYTHON else "import accelerate"
    code = CHILD.format(root=str(ROOT), imports=imports, folder=str(folder), way=way)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    children = [
        subprocess.Popen(
            [python, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for _ in range(ranks)
    ]
    seconds = []
    for child in children:
        assert child.stdout is not None
        seconds.append(float(child.stdout.readline()))
    time.sleep(0.5)
    used = sum(proportional_bytes(child.pid) for child in children)
    for child in children:
        child.communicate("")
    return max(seconds), used
