"""A model larger than the memory it may use: --placement beside Accelerate and diffusers.

The same Flux-shaped pipeline of random weights, stored in bfloat16, in each way: seconds an image
(the first left out), the highest memory, and the images compared with those of the resident model.
On a GPU the budget is the GPU's and what does not fit waits in host memory. Without a GPU the
budget is the host's: the model runs in float32, so that its weights are copies and not views into
the file, what does not fit waits on disk, and memory is that of the process without mapped files
(RssAnon), less that of the same process with its imports.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import inputs
from bench.jobs import SCRIPTS, compare, pixels
from bench.measure import (
    CACHE,
    COMPETITORS_PYTHON,
    PYTHON,
    Size,
    anonymous_bytes,
    competitors_versions,
    in_turn,
    ratios,
    run,
    summary,
)
from bench.report import spread, table

ABOUT = "a model larger than its memory: --placement beside Accelerate's and diffusers' offloading"
EXPECTED_SECONDS = 400
#: Part of the weights that may be in memory at once.
SHARE = 0.6
OURS = ("ddinfer --placement balanced", "ddinfer --placement staged")
PEERS = {
    "resident": "diffusers, all in memory",
    "device_map": 'Accelerate, device_map="auto"',
    "sequential_offload": "Accelerate, cpu_offload / disk_offload",
    "group_offload": "diffusers, group offloading",
    "model_offload": "diffusers, model offloading",
}


def measure(size: Size) -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    model = inputs.wide_flux()
    stored = sum(file.stat().st_size for file in model.glob("*/*.safetensors"))
    weights = stored * (2 if dtype == "float32" else 1)
    budget = round(SHARE * weights)
    found: dict[str, Any] = {
        "competitors": competitors_versions(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "dtype": dtype,
        "weights_bytes": weights,
        "budget_bytes": budget,
        "num_images": size.pick(2, 3, 5),
        "ways": {},
    }
    names = [*PEERS, *OURS] if device == "cuda" else [*list(PEERS)[:-1], *OURS]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        prompts = inputs.prompt_file(folder, found["num_images"])
        ways = {
            way: _job(
                way,
                model,
                prompts,
                folder,
                device=device,
                dtype=dtype,
                budget=budget,
                num_images=found["num_images"],
            )
            for way in names
        }
        taken = in_turn(ways, size.times(1, 3, 5))
        resident = [r["seconds"] for r in taken["resident"]]
        for way, runs in taken.items():
            seconds = [r["seconds"] for r in runs]
            found["ways"][way] = {
                "seconds_per_image": summary(seconds),
                "of_resident": ratios(seconds, resident),
                "peak_bytes": max(r["peak_bytes"] for r in runs),
                **compare(folder / way.replace(" ", ""), folder / "resident"),
            }
    return found


def _job(
    way: str,
    model: Path,
    prompts: Path,
    folder: Path,
    *,
    device: str,
    dtype: str,
    budget: int,
    num_images: int,
) -> Callable[[], dict[str, float]]:
    output = folder / way.replace(" ", "")
    words = ["--model", str(model), "--prompts", str(prompts), "--output", str(output)]
    words += [f"--device={device}", f"--dtype={dtype}"]
    if way in PEERS:
        offload_folder = folder / f"{way}-offloaded"
        words += ["--call", json.dumps(inputs.WIDE_FLUX_CALL), f"--budget={budget}"]
        words += ["--offload_folder", str(offload_folder)]
        command = [COMPETITORS_PYTHON, str(SCRIPTS / "offload.py"), way, *words]
    else:
        place = "0" if device == "cuda" else "cpu"
        words += [*way.split()[1:], f"--max_memory={place}={budget}", "--overwrite", "--json"]
        words += [f"--pipeline_kwargs={json.dumps(inputs.WIDE_FLUX_CALL)}"]
        command = [PYTHON, "-m", "ddinfer", *words, "--nproc_per_node=1", "--num_threads=1"]

    def measured() -> dict[str, float]:
        read = _GpuBytes() if device == "cuda" else anonymous_bytes
        done = run(command, {"OMP_NUM_THREADS": "1"}, memory_every_seconds=0.02, memory=read)
        if way in PEERS:
            seconds = sum(json.loads(done.stdout.splitlines()[-1])["seconds"])
        else:
            seconds = json.loads(done.stdout)["ranks"][0]["working"]
        return {"seconds": seconds / num_images, "peak_bytes": done.peak_bytes}

    return measured


class _GpuBytes:
    """Bytes in use on the first GPU, of which nothing is left between the commands."""

    def __init__(self) -> None:
        import torch

        self.before = torch.cuda.device_memory_used(0)

    def __call__(self, pid: int) -> int:
        import torch

        return torch.cuda.device_memory_used(0) - self.before


def problems(figures: Mapping[str, Any]) -> list[str]:
    """Ways whose images are not those of the resident model."""
    return [
        f"{way}: {told['different_images']} images differ, by up to {told['largest_difference']}"
        for way, told in figures["ways"].items()
        if told["largest_difference"] > 1
    ]


def tables(figures: Mapping[str, Any]) -> str:
    rows = [
        [PEERS.get(way, f"`{way}`"), spread(told["seconds_per_image"]), spread(told["of_resident"]),
         f"{told['peak_bytes'] / 1e9:.2f} GB", pixels(told)]
        for way, told in figures["ways"].items()
    ]  # fmt: skip
    what = (
        f"{figures['device']}, {figures['weights_bytes'] / 1e9:.2f} GB of {figures['dtype']} "
        f"weights, {figures['budget_bytes'] / 1e9:.2f} GB allowed, {figures['num_images']} images"
    )
    return table([what, "s an image", "of all in memory", "highest memory", "images"], rows)
