"""Host memory and seconds of loading a model in 1, 2 and 4 processes, beside from_pretrained.

    python bench/loading.py [--gigabytes 1.2] [--ranks 1,2,4] [--folder FOLDER]

Prints a line for each: seconds until every weight was read once, and the proportional set size
summed over the processes, less that of the same processes with their imports and no model, as a
multiple of the weights' stored bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: How a process loads; each is run with the folder as its last argument.
WAYS = {
    "no model": "model = None",
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
}

CHILD = """
import sys, time
sys.path.insert(0, {root!r})
import torch, diffusers
import ddinfer.models.loading
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--folder", type=Path, help="keeps the model here between runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        size = make_model(folder, options.gigabytes)
        print(f"{size / 1e9:.2f} GB of float32 weights")
        for ranks in map(int, options.ranks.split(",")):
            _, empty = measure("no model", folder, ranks)
            for way in list(WAYS)[1:]:
                seconds, used = measure(way, folder, ranks)
                print(
                    f"{ranks} ranks, {way:<30}{seconds:6.1f} s "
                    f"{(used - empty) / 1e9:6.2f} GB = {(used - empty) / size:.2f} × the weights"
                )


def make_model(folder: Path, gigabytes: float) -> int:
    """Saves a Flux-shaped transformer; returns the bytes of its weight files."""
    if not (folder / "config.json").is_file():
        import diffusers

        layers = max(1, round((gigabytes * 1e9 - 0.3e9) / 57e6))
        diffusers.FluxTransformer2DModel(
            num_layers=2, num_single_layers=layers, attention_head_dim=64,
            num_attention_heads=16, axes_dims_rope=(8, 28, 28),
        ).save_pretrained(folder)  # fmt: skip
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(way: str, folder: Path, ranks: int) -> tuple[float, int]:
    """Seconds of the slowest process and bytes of all, once all have loaded."""
    code = CHILD.format(root=str(ROOT), folder=str(folder), way=WAYS[way])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
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


def proportional_bytes(pid: int) -> int:
    """Proportional set size: shared pages are divided among the processes that have them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no Pss in /proc/{pid}/smaps_rollup")


if __name__ == "__main__":
    main()
